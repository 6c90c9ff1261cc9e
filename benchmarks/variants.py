"""
`train_gpt2.py --optimizer muon` with one idea more, for `python -m benchmarks.recipes --variants`.

    python -m benchmarks.variants NAME [the flags of train_gpt2.py]

    momentum    the momentum rises from 0.85 to 0.95 over the first tenth (Jordan et al., modded-nanogpt)
    zero        the last matrix of each block's two parts begins at zero (modded-nanogpt, nanochat)
    cautious    a weight decays only where its update shrinks it too (arXiv 2510.12402)
    average     the mean of the weights over the last twentieth of the steps (LAWA, arXiv 2306.03241)
    batches     twice the steps, with half the batch; after 40% of them, only every second one updates
    halves      twice the steps, with half the batch, to the end: what `batches` is to be compared with
    nesterov    before each step, the weights go on along the average of their last steps (arXiv 2605.25395)
    power       the cooldown falls as a power of 1.2 instead of in a straight line (PowerCool, modded-nanogpt)
    both        `nesterov` and `power`
    normuon     the neurons of an update get the same RMS in the long run (NorMuon, arXiv 2510.05491)

A run begins anew each time: what these ideas keep is in no checkpoint.
"""

import functools
import sys
from typing import Any

import train_gpt2
from support.cli import run_command
from support.model import muon
from support.model.muon import Muon

import torch


class Variant(Muon):
    """Muon that counts its steps."""

    steps = 0  # of the whole run
    done = 0

    def step(self, closure: Any = None) -> None:
        self.done += 1
        super().step(closure)


class MomentumWarmUp(Variant):
    def step(self, closure: Any = None) -> None:
        self.momentum = 0.85 + 0.10 * min(1, 10 * self.done / self.steps)
        super().step(closure)


class CautiousDecay(Variant):
    @torch.no_grad()
    def step_matrices(self, group: dict[str, Any]) -> None:
        before = [parameter.clone() for parameter in group["params"]]
        super().step_matrices({**group, "weight_decay": 0.0})
        for weight, old in zip(group["params"], before, strict=True):
            shrinks = (weight - old) * old < 0
            weight -= group["lr"] * group["weight_decay"] * old * shrinks


class Average(Variant):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        count = self.done - (self.steps - self.steps // 20)  # of weights to be averaged, so far
        if count <= 0:
            return
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        if count == 1:
            self.mean = [weight.clone() for weight in weights]
        for mean, weight in zip(self.mean, weights, strict=True):
            mean.lerp_(weight, 1 / count)
            if self.done == self.steps:
                weight.copy_(mean)


class LargerBatchesLater(Variant):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        late = self.done >= 0.4 * self.steps
        if late and self.done % 2 == 0:  # the first of two: keep it
            self.done += 1
            self.first = [weight.grad.clone() for weight in weights]
            return
        if late:
            for weight, gradient in zip(weights, self.first, strict=True):
                weight.grad.lerp_(gradient, 0.5)
        super().step(closure)


class EMANesterov(Variant):
    """Weights go on by 0.6 lr / max_lr times the exponential average m of their last steps, from 16% to 77%
    of the steps on. The average reaches back over 3.2% of them. So it is in modded-nanogpt (record 39 of
    track_3_optimization: steps 500 to 2,400 of 3,125, an average of 100 steps)."""

    steps_mean = None  # the weights' mean change in a step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        if self.steps_mean is None:
            self.steps_mean = [torch.zeros_like(weight) for weight in weights]
            self.last = [weight.clone() for weight in weights]  # before they went on
        super().step(closure)
        lr = next(group["lr"] for group in self.param_groups if "parts" in group)
        beta = 0.6 * lr / self.defaults["lr"] if 0.16 <= self.done / self.steps < 0.77 else 0.0
        for weight, mean, last in zip(weights, self.steps_mean, self.last, strict=True):
            mean.lerp_(weight - last, 1 / max(1.0, 0.032 * self.steps))
            last.copy_(weight)
            weight.add_(mean, alpha=beta)


class NorMuon(Variant):
    """Divides each row of the updates U V^T by its RMS, averaged over the last steps, and then restores the
    update's norm. Of a wide matrix it takes the columns: the rows of U V^T are equally long there."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.squares: dict[tuple[int, ...], torch.Tensor] = {}  # mean squares, of all matrices of one shape

    def step_matrices(self, group: dict[str, Any]) -> None:
        muon.orthogonalize_together = self.normalize
        super().step_matrices(group)
        muon.orthogonalize_together = orthogonalize_together

    def normalize(self, matrices: torch.Tensor, rows: int, *others: Any) -> torch.Tensor:
        updates = orthogonalize_together(matrices, rows, *others).float()
        X = updates.view(-1, rows, updates.size(1))
        norms = X.norm(dim=(1, 2), keepdim=True)
        squares = X.square().mean(dim=2 if rows >= X.size(2) else 1, keepdim=True)
        mean = self.squares.setdefault(tuple(X.shape), torch.zeros_like(squares))
        X = X / mean.lerp_(squares, 0.05).sqrt().clamp(min=1e-8)
        return (X * (norms / X.norm(dim=(1, 2), keepdim=True))).flatten(0, 1)


def power_cooldown(step: int, config: train_gpt2.TrainConfig) -> float:
    """train_gpt2.get_lr, with a power of 1.2 instead of the straight line."""
    lr = get_lr(step, config)
    in_cooldown = config.max_steps - step < config.cooldown * config.max_steps
    return lr * (lr / config.max_lr) ** 0.2 if in_cooldown and step >= config.warmup_steps else lr


def zero_projections(model: train_gpt2.GPT) -> train_gpt2.GPT:
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            torch.nn.init.zeros_(parameter)
    return model


get_lr = train_gpt2.get_lr
orthogonalize_together = muon.orthogonalize_together
OPTIMIZERS: dict[str, type[Variant]] = {
    "momentum": MomentumWarmUp, "zero": Variant, "cautious": CautiousDecay, "average": Average,
    "batches": LargerBatchesLater, "halves": Variant,
    "nesterov": EMANesterov, "power": Variant, "both": EMANesterov, "normuon": NorMuon,
}  # fmt: skip


def main(name: str, config: train_gpt2.TrainConfig) -> None:
    Variant.steps = config.max_steps
    muon.Muon = OPTIMIZERS[name]  # type: ignore[misc]
    if name == "zero":
        pad = train_gpt2.GPT.pad_vocabulary
        train_gpt2.GPT.pad_vocabulary = lambda model: pad(zero_projections(model))  # type: ignore[method-assign]
    if name in ("power", "both"):
        train_gpt2.get_lr = power_cooldown
    train_gpt2.main(config)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in OPTIMIZERS:
        sys.exit(f"name a variant: {', '.join(OPTIMIZERS)}")
    variant = functools.partial(main, sys.argv.pop(1))
    run_command(variant, train_gpt2.TrainConfig, default=train_gpt2.choose_defaults(sys.argv))
