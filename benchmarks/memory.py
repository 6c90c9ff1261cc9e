"""
What a training step takes of memory, and of time: with the logits whole and in chunks, and with the blocks
kept or computed again, for micro-batches of several sizes.

    python -m benchmarks.memory [--n 3] [--device cuda --sequence_length 1024] [--out results.json]

Every figure is a process of its own, whose peak is the system's count (a GPU's: PyTorch's); the ways of one
size take turns.
"""

import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training import spread
from support.machine.device import autocast_to, choose_device, choose_dtype, device_name, keep_freed_memory
from support.machine.micro_batch import LOSS_CHUNKS, try_step
from train_gpt2 import GPT, GPTConfig

import torch
import tyro

WAYS = {"plain": (1, False), "loss in chunks": (LOSS_CHUNKS, False), "chunks, recompute": (LOSS_CHUNKS, True)}


@dataclass(frozen=True)
class Config:
    """Measure memory."""

    n: int = 3  # rounds
    batch_sizes: tuple[int, ...] = (4, 8, 16, 64)  # rows
    sequence_length: int = 128  # tokens in a row
    n_layer: int = 12
    device: str = "cpu"
    compile: bool = False
    out: Path | None = None  # write the figures here as JSON


def measure(config: Config, rows: int, way: str, pipe: Any) -> None:
    """Send the seconds of a trial (two micro-steps and a validation batch) and the peak bytes."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = GPT(GPTConfig(n_layer=config.n_layer)).pad_vocabulary().to(device)
    model.loss_chunks, model.recompute = WAYS[way]
    run = torch.compile(model, dynamic=False) if config.compile else model
    autocast = autocast_to(device, choose_dtype("auto", device, model.config.n_embd))

    def step() -> None:
        try_step(run, rows, config.sequence_length, autocast, device)

    if device.type == "cuda":
        step()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # compilation may have taken more than a step does
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    pipe.send((seconds, peak))


def main(config: Config) -> None:
    name = device_name(choose_device(config.device))
    print(f"{name}, PyTorch {torch.__version__}; {config.n_layer} layers, rows of {config.sequence_length} "
          f"tokens, compiled: {config.compile}, n = {config.n}")  # fmt: skip
    context = multiprocessing.get_context("spawn")
    results = {}
    for rows in config.batch_sizes:
        figures: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(config.n):
            for way, values in figures.items():
                here, there = context.Pipe()
                process = context.Process(target=measure, args=(config, rows, way, there))
                process.start()
                there.close()
                try:
                    values.append(here.recv())
                except EOFError:  # killed: out of memory
                    values.append((float("nan"), float("nan")))
                process.join()
        for way, values in figures.items():
            seconds, peaks = zip(*values, strict=True)
            ratios = [s / plain for s, (plain, _) in zip(seconds, figures["plain"], strict=True)]
            line = f"{rows:3} rows, {way:18} peak {statistics.median(peaks) / 2**30:6.2f} GB, "
            print(line + f"{spread(list(seconds), '.2f')} s, {spread(ratios, '.2f')} x plain", flush=True)
        results[rows] = figures
    if config.out:
        facts = {"device": name, "torch": torch.__version__, "n": config.n, "n_layer": config.n_layer,
                 "sequence_length": config.sequence_length, "compile": config.compile,
                 "seconds_and_peak_bytes": results}  # fmt: skip
        config.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
