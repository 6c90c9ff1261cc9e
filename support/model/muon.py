"""
Muon, the optimizer of --recipe fast (K. Jordan et al., 2024: https://kellerjordan.github.io/posts/muon).

The updates that SGD and Adam make to a weight matrix have a few large singular values and many small ones.
Muon replaces the gradient, averaged over the last steps, by the nearest matrix whose singular values are all
1, so that directions which are rare in the gradient are learned as fast as common ones. That this is why it
learns from fewer tokens is its authors' conjecture.

In symbols: where the average is U S V^T, its singular value decomposition, the update is U V^T. A GPU is slow
at decompositions, but the Newton-Schulz iteration needs nothing but matrix products.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from support.machine.processes import World, all_gather
from support.machine.sharding import local_tensor, processes_with_shards

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

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
        world: the processes that have a copy of the model each, with the same gradients, and share the work.
            None: this process does it alone. Of a sharded model, those that have its shards share it.
        dtype: of the matrix products in `orthogonalize`: bfloat16 is exact enough, float16's range too small.
        momentum: the share of the average gradient that a step keeps.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.95,  # Jordan et al.
        **options: Any,
    ):
        super().__init__(groups, **options)
        self.world = world
        self.dtype = dtype
        self.momentum = momentum

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
        device = group["params"][0].device
        found_inf = getattr(self, "found_inf", torch.zeros((), device=device))  # 1: skip the step
        lr = group["lr"] * (1 - found_inf)
        same_shape = defaultdict(list)  # (rows, columns) of a matrix -> parameters and their parts
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=device)  # AdamW expects it when it loads a state
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = state["step"].to(device)  # where AdamW is not fused, it loads this to the CPU
            same_shape[len(parameter) // parts, parameter.size(1)].append((parameter, parts))
        for shape, parameters in same_shape.items():
            weights = [local_tensor(parameter) for parameter, _ in parameters]
            averages = torch.cat([self.average(parameter, found_inf) for parameter, _ in parameters])
            updates = orthogonalize_together(averages.to(self.dtype), shape[0], parameters, self.world)
            updates = updates.to(averages.dtype)
            updates *= -lr * RMS_OF_ADAMW * math.sqrt(max(shape))  # U V^T has an RMS of 1 / sqrt(max(shape))
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, updates.split([len(weight) for weight in weights]))

    def average(self, parameter: torch.Tensor, found_inf: torch.Tensor) -> torch.Tensor:
        """Add a parameter's gradient to its momentum; returns the average of its gradients. Of a sharded
        parameter, all this is about the rows that this process has."""
        state = self.state[parameter]
        state["step"] += 1 - found_inf
        momentum, gradient = map(local_tensor, (state["momentum_buffer"], parameter.grad))
        # In a skipped step the buffer takes the gradient's place, and stays as it is.
        gradient = torch.where(found_inf > 0, momentum, gradient)
        momentum.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum)  # Nesterov's look ahead


# -----------------------------------------------------------------------------
# the work, divided among the processes
#
# Each process owns some of the matrices of one shape, and orthogonalizes these. If each has a copy of the
# model, an owner has its matrices, and the others get its results: an all-gather. If each has a shard, it
# has some rows of every matrix. An all-to-all brings an owner the rows of its matrices from all processes,
# and another all-to-all takes the results back: no process has more matrices whole than its own.


def orthogonalize_together(
    matrices: torch.Tensor, rows: int, parameters: list[tuple[Any, int]], world: World | None
) -> torch.Tensor:
    """`orthogonalize` of matrices of one shape, divided among the processes.

    Args:
        matrices: (all rows that this process has, columns), one matrix below the other; may be overwritten.
        rows: of a whole matrix.
        parameters: whose parts the matrices are, one after another, and into how many each is cut.
        world: as for Muon.

    Returns:
        The results, of the shape of `matrices`: of each, the rows that this process has.
    """
    if group := processes_with_shards(parameters[0][0]):
        held = [
            [n for p, parts in parameters for n in rows_in_shard(len(p), parts, rank, group.size())]
            for rank in range(group.size())
        ]
        return orthogonalize_shards(matrices, rows, held, group)
    X = matrices.view(-1, rows, matrices.size(1))
    X = orthogonalize_copies(X, world) if world and world.size > 1 else orthogonalize(X)
    return X.flatten(0, 1)


def orthogonalize_copies(matrices: torch.Tensor, world: World) -> torch.Tensor:
    """`orthogonalize` of (n, rows, columns) matrices that all processes have."""
    share = math.ceil(len(matrices) / world.size)
    own = orthogonalize(matrices[world.rank * share :][:share])
    own = F.pad(own, (0, 0, 0, 0, 0, share - len(own)))  # the last processes may have less
    X = matrices.new_empty(world.size * share, *matrices.shape[1:])
    all_gather(X, own)
    return X[: len(matrices)]


def orthogonalize_shards(
    shards: torch.Tensor, rows: int, held: list[list[int]], group: dist.ProcessGroup
) -> torch.Tensor:
    """`orthogonalize` of n matrices of which each process in the group has some rows.

    Args:
        shards: (all rows that this process has, columns), contiguous; overwritten by the results.
        rows: of a whole matrix.
        held: held[r][i] is how many rows of matrix i process r has. A process has those that follow on the
            previous one's.
    """
    rank, size = group.rank(), group.size()
    share = math.ceil(len(held[0]) / size)
    owned = [slice(r * share, (r + 1) * share) for r in range(size)]  # the last processes may have less
    to_owners = [sum(held[rank][matrices]) for matrices in owned]  # rows
    of_own = [heights[owned[rank]] for heights in held]  # `held` of the matrices that this process owns
    from_all = [sum(heights) for heights in of_own]

    own = shards.new_empty(sum(from_all), shards.size(1))
    dist.all_to_all_single(own, shards, from_all, to_owners, group=group)
    own = transpose_blocks(own, of_own)  # they came by process, then by matrix
    own = orthogonalize(own.view(-1, rows, own.size(1))).flatten(0, 1)
    own = transpose_blocks(own, list(zip(*of_own, strict=True)))
    dist.all_to_all_single(shards, own, to_owners, from_all, group=group)
    return shards


def rows_in_shard(rows: int, parts: int, rank: int, size: int) -> list[int]:
    """How many rows of each of a parameter's `parts` matrices lie in the shard of process `rank` of `size`.
    fully_shard cuts the parameter's rows as torch.chunk does, no matter where a matrix ends."""
    share, height = math.ceil(rows / size), rows // parts
    first, end = rank * share, (rank + 1) * share
    return [max(0, min(end, (i + 1) * height) - max(first, i * height)) for i in range(parts)]


def transpose_blocks(X: torch.Tensor, heights: Sequence[Sequence[int]]) -> torch.Tensor:
    """Blocks of rows, heights[i][j] each, that lie ordered by i, then by j, ordered by j, then by i."""
    blocks = X.split([height for row in heights for height in row])
    n = len(heights[0]) if heights else 0
    return torch.cat([X[:0], *itertools.chain(*(blocks[j::n] for j in range(n)))])
