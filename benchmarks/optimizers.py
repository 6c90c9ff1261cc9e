"""
What Muon costs: training steps with AdamW and with Muon, taking turns in one process on a CPU.

    python -m benchmarks.optimizers [--n 7] [--seconds 4] [--threads 1]

The models and batches are those of `python -m benchmarks.recipes`, in bfloat16. A ratio compares the same
round.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.recipes import ROOT, SIZES
from benchmarks.training import spread
from support.cli import PositiveFloat, PositiveInt, check_numbers
from support.files import to_json, write_file
from support.machine.device import autocast_to, keep_freed_memory
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import tyro


@dataclass(frozen=True)
class Config:
    """Compare the time of a step with AdamW and with Muon."""

    n: PositiveInt = 7  # rounds
    seconds: PositiveFloat = 4.0  # of steps in a row, before it is the other's turn
    threads: PositiveInt = 1
    out: Path = ROOT / "benchmarks/results/optimizers_cpu.json"


def make_step(size: str, name: Literal["adamw", "muon"]) -> Callable[[], float]:
    """A function that trains one step of 32 rows of 128 bytes, and returns its loss."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    shape = GPTConfig(**SIZES[size], block_size=128, vocab_size=257, encoding="bytes")
    model = GPT(shape).pad_vocabulary()
    optimizer = configure_optimizer(model, TrainConfig(optimizer=name), None, torch.bfloat16)
    rows = torch.randint(256, (32, 129))

    def step() -> float:
        with autocast_to(device, torch.bfloat16):
            loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def rate(step: Callable[[], float], seconds: float) -> float:
    """Tokens/s of steps in a row that take about so long, at least three."""
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        step()
        count += 1
    return count * 32 * 128 / (time.perf_counter() - start)


def main(config: Config) -> None:
    check_numbers(config)
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    results = {}
    print("| model | AdamW, bytes/s | Muon, bytes/s | Muon beside AdamW |\n| --- | --- | --- | --- |")
    for size in SIZES:
        steps = {"adamw": make_step(size, "adamw"), "muon": make_step(size, "muon")}
        for step in steps.values():
            step(), step()
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(config.n):
            for name in list(steps)[:: 1 if i % 2 else -1]:
                rates[name].append(rate(steps[name], config.seconds))
        ratios = [muon / adamw for adamw, muon in zip(rates["adamw"], rates["muon"], strict=True)]
        results[size] = {**rates, "ratios": ratios}
        columns = [*(spread(of, ",.0f") for of in rates.values()), spread(ratios, ".2f")]
        print(f"| {size} | {' | '.join(columns)} |", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    record = {"machine": machine, "threads": config.threads, "n": config.n, "models": results}
    write_file(config.out, lambda file: file.write(to_json(record).encode()))


if __name__ == "__main__":
    main(tyro.cli(Config))
