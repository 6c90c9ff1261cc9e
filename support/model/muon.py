"""
Muon, the optimizer of --recipe fast (K. Jordan et al., 2024: https://kellerjordan.github.io/posts/muon).

The updates that SGD and Adam make to a weight matrix have a few large singular values and many small ones.
Muon replaces the gradient, averaged over the last steps, by the nearest matrix whose singular values are all
1, so that directions which are rare in the gradient are learned as fast as common ones. That this is why it
learns from fewer tokens is its authors' conjecture.

In symbols: where the average is U S V^T, its singular value decomposition, the update is U V^T. A GPU is slow
at decompositions, but the Newton-Schulz iteration needs nothing but matrix products.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from support.machine.processes import World, all_gather

import torch
from torch import nn
from torch.nn import functional as F

MOMENTUM = 0.95  # Jordan et al.
RMS_OF_ADAMW = 0.2  # what AdamW's updates tend to have: rates stay of the same order (arXiv 2502.16982, 2.2)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(n, rows, columns) matrices U S V^T to U V^T, approximately.

    X X^T is U S^2 U^T, so a step, (a I + b X X^T + c (X X^T)^2) X, leaves U and V alone and maps each
    singular value s to a s + b s^3 + c s^5. Five steps with Jordan's coefficients bring all values from 0.002
    to 1 between 0.68 and 1.21; nearer to 1 gains nothing, he found.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices  # X X^T is smaller this way round
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above the norm
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT.contiguous() if tall else X  # NCCL's all-gather takes nothing else


def muon_groups(model: nn.Module, weight_decay: float, adamw_lr_ratio: float) -> list[dict[str, Any]]:
    """The matrices of a GPT's blocks, for Muon, and the rest, for AdamW: embeddings, norms and biases, whose
    learning rate is `adamw_lr_ratio` times Muon's. Only the matrices decay."""
    matrices = {name: p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    parts = [3 if name.endswith("c_attn.weight") else 1 for name in matrices]  # queries, keys, values
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        {"params": list(matrices.values()), "parts": parts, "weight_decay": weight_decay},
        {"params": rest, "lr_ratio": adamw_lr_ratio, "weight_decay": 0.0},
    ]


class Muon(torch.optim.AdamW):
    """Muon for the group of matrices, AdamW for the other groups. A matrix W, whose averaged gradient is
    U S V^T, becomes (1 - lr * weight_decay) W - lr * 0.2 * sqrt(max(rows, columns)) * U V^T.

    Args:
        groups: as for AdamW. The group of matrices has `parts`: into how many matrices of equal height each
            of its parameters is cut. Queries, keys and values share a parameter, but are three matrices.
        world: the processes that share the work. All have the same gradients; each orthogonalizes some of the
            matrices and gets the others' from those who did. None: this process does it alone.
        dtype: of the matrix products in `orthogonalize`: bfloat16 is exact enough, float16's range too small.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        super().__init__(groups, **options)
        self.world = world
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if "parts" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "parts" in group:
                self.step_matrices(group)

    def step_matrices(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", group["params"][0].new_zeros(()))  # 1: skip the step
        lr = group["lr"] * (1 - found_inf)
        same_shape = defaultdict(list)  # (rows, columns) -> pairs of a matrix and its averaged gradient
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            state = self.state[parameter]
            if not state:
                state["step"] = parameter.new_zeros(())  # AdamW expects it when it loads a state
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1 - found_inf
            # In a skipped step the buffer takes the gradient's place, and stays as it is.
            gradient = torch.where(found_inf > 0, state["momentum_buffer"], parameter.grad)
            state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
            average = gradient.lerp(state["momentum_buffer"], MOMENTUM)  # Nesterov's look ahead
            for pair in zip(parameter.chunk(parts), average.chunk(parts), strict=True):
                same_shape[pair[0].shape].append(pair)
        for shape, pairs in same_shape.items():
            matrices, averages = (list(tensors) for tensors in zip(*pairs, strict=True))
            updates = self.orthogonalize_together(torch.stack(averages))
            updates *= -lr * RMS_OF_ADAMW * math.sqrt(max(shape))  # U V^T has an RMS of 1 / sqrt(max(shape))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, updates.unbind())

    def orthogonalize_together(self, matrices: torch.Tensor) -> torch.Tensor:
        """`orthogonalize`, divided among the processes."""
        X = matrices.to(self.dtype)
        if self.world and self.world.size > 1:
            share = math.ceil(len(X) / self.world.size)
            own = orthogonalize(X[self.world.rank * share :][:share])
            own = F.pad(own, (0, 0, 0, 0, 0, share - len(own)))  # the last processes may have less
            X = X.new_empty(self.world.size * share, *X.shape[1:])
            all_gather(X, own)
            X = X[: len(matrices)]
        else:
            X = orthogonalize(X)
        return X.to(matrices.dtype)
