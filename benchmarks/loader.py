"""
How many rows a second the loader reads: windows mixed over a group of shards beside one shard after another;
and from a cold disk, with and without reading ahead.

    python -m benchmarks.loader --folder A_DISK [--n 5] [--shards 100] [--out results.json]

The shards, 10 MB each, are made in the folder and stay there. Before each cold round the system is asked to
forget them (posix_fadvise, Linux). "short": only a quarter of the group fits into the memory that is free.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.training import spread
from support.data import order
from support.data.shards import load_shards
from support.machine import page_cache
from train_gpt2 import TokenLoader, TrainConfig

import numpy as np
import tyro

SHARD = 5_000_000  # tokens


@dataclass(frozen=True)
class Config:
    """Time the loader."""

    folder: Path  # on the disk to measure
    n: int = 5  # rounds
    shards: int = 100
    warm_rows: int = 50_000
    cold_rows: int = 5_000
    out: Path | None = None  # write the figures here as JSON


def make_shards(config: Config) -> list[Path]:
    """The training shards: files of random tokens, and a small one for validation."""
    config.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(config.shards + 1):
        file = config.folder / f"{'train' if i else 'val'}_{i:06d}.npy"
        if not file.exists():
            np.save(file, rng.integers(0, 50_257, SHARD if i else 5_000, dtype=np.uint16))
    os.sync()
    return load_shards(config.folder).files["train"]


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache; whoever maps them must have ended."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rows_per_second(folder: Path, n_rows: int, group: int, ahead: bool = False) -> float:
    """Rows of 1,024 tokens a second, in batches of 64."""
    with mock.patch.object(order, "GROUP", group):
        loader = TokenLoader(load_shards(folder), "train", TrainConfig())
        start = time.perf_counter()
        for files in loader.order.begun_by(0) if ahead else ():
            loader.world.read_ahead([loader.files[i] for i in files])
        for first in range(0, n_rows, 64):
            loader.windows(first, 64)
        return n_rows / (time.perf_counter() - start)


def measure(config: Config) -> dict[str, Any]:
    """Print the figures and return them, raw."""
    files = make_shards(config)
    size = sum(file.stat().st_size for file in files)
    rows_per_second(config.folder, size // 2048, group=2**31)  # warm
    warm: dict[str, list[float]] = {"mixed": [], "one shard after another": []}
    for _ in range(config.n):
        for name, group in (("mixed", 2**31), ("one shard after another", 1)):
            warm[name].append(rows_per_second(config.folder, config.warm_rows, group))
    cold: dict[str, list[float]] = {"cold": [], "cold, read ahead": [], "cold, read ahead, short": []}
    for _ in range(config.n):
        for name, free in zip(cold, (0, 4 * size, size // 2), strict=True):
            forget(files)
            with mock.patch.object(page_cache, "free_host_memory", lambda free=free: free):
                cold[name].append(rows_per_second(config.folder, config.cold_rows, 2**31, ahead=True))
    for rates, base in ((warm, "one shard after another"), (cold, "cold")):
        for name, values in rates.items():
            ratios = [value / other for value, other in zip(values, rates[base], strict=True)]
            print(f"{name:24} {spread(values, ',.0f')} rows/s, {spread(ratios, '.2f')} x {base}")
    return {"megabytes": size / 1e6, "n": config.n, "rows_per_second": warm | cold}


def main(config: Config) -> None:
    result = measure(config)
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
