"""
How many tokens each recipe needs for the same loss: three ways to train small GPT-2s, each with its own rate.

    python fineweb.py --input TEXT --encoding bytes --shard_size 4000000 --output_dir text_bytes
    python -m benchmarks.recipes --data_dir text_bytes [--sizes 1M 3M 10M] [--hours 6]
    python -m benchmarks.recipes --table            # from what is measured so far

Tokens are bytes, so that the layers are the model and not the embedding. Every run is train_gpt2.py with a
finished schedule, 4,096 bytes a step in rows of 128, in bfloat16, on one thread; runs are independent and go
side by side. The rates of AdamW and Muon are swept at the first size, by factors of 2 and past the ends until
the best lies inside. They are carried to the next size by (width)^-1/2, and checked one step of the sweep to
either side at the second size. Interrupt it at will: the same command goes on where it was.

"Tokens that Muon needs" interpolates its final losses after 250, 350, 500 and 1,000 steps, linear in the
logarithm of the steps.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from support.cli import check_numbers
from support.curves import read_run
from support.files import to_json, write_file

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
SIZES = {  # a model of about so many parameters
    "1M": {"n_layer": 2, "n_head": 4, "n_embd": 192},
    "3M": {"n_layer": 4, "n_head": 4, "n_embd": 256},
    "10M": {"n_layer": 6, "n_head": 6, "n_embd": 384},
}
STEPS = 1000
SHORTER = (250, 350, 500)  # Muon's, to find where it reaches the others' loss
SEEDS = (1337, 1338, 1339)
# The tutorial's warm-up is 3.75% of its steps.
WAYS: dict[str, dict[str, Any]] = {
    "tutorial": {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": round(0.0375 * STEPS)},
    "AdamW": {"optimizer": "adamw", "schedule": "trapezoid", "warmup_steps": 100},
    "Muon": {"optimizer": "muon", "schedule": "trapezoid", "warmup_steps": 100},
}
TUTORIAL_RATE = 6e-4
SWEEP = {"AdamW": (2e-3, 4e-3, 8e-3), "Muon": (4e-3, 8e-3, 16e-3)}


@dataclass(frozen=True)
class Config:
    """Compare the recipes."""

    data_dir: Path = Path("text_bytes")  # token shards of bytes
    folder: Path = Path("log/recipes")  # where the runs live
    sizes: tuple[Literal["1M", "3M", "10M"], ...] = ("1M", "3M", "10M")
    jobs: int = 2  # runs at once
    hours: float | None = None  # begin no run after so many hours
    steps: int = STEPS  # of a full run
    table: bool = False  # only print the table of what is measured
    out: Path = ROOT / "benchmarks/results/recipes_cpu.json"


class Run(NamedTuple):
    """One run of the comparison."""

    size: str
    way: str
    rate: float  # peak learning rate
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.size}_{self.way}_{self.rate:.2g}_{self.seed}_{self.steps}"

    def command(self, config: Config) -> list[str]:
        flags = {
            **SIZES[self.size], **WAYS[self.way],
            "max_lr": self.rate, "seed": self.seed, "max_steps": self.steps,
            "data_dir": config.data_dir, "log_dir": config.folder / self.name, "sequence_length": 128,
            "total_batch_size": 4096, "val_every": 125, "val_tokens": 65_536, "hellaswag_every": 0,
            "sample_every": 0, "checkpoint_every": 250, "dtype": "bfloat16",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(ROOT / "train_gpt2.py"), *words, "--no_compile", "--resume"]


Results = dict[str, dict[str, Any]]  # by the run's name


def final(results: Results, run: Run) -> float | None:
    """The run's final validation loss, nats per byte; None if it has not been run."""
    return results[run.name]["loss"] if run.name in results else None


def best_rate(results: Results, size: str, way: str, steps: int) -> float | None:
    """The rate with the lowest final loss among the first seed's runs; None if there are none."""
    losses = {
        r["rate"]: r["loss"] for r in results.values()
        if (r["size"], r["way"], r["seed"], r["steps"]) == (size, way, SEEDS[0], steps)
    }  # fmt: skip
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def wanted(results: Results, size: str, steps: int) -> list[Run]:
    """The runs of `size` that what is known so far calls for. Those that are done are among them."""
    runs: list[Run] = []
    rates = {"tutorial": TUTORIAL_RATE}
    settled = True
    names = list(SIZES)
    for way in ("AdamW", "Muon"):
        if size == names[0]:
            tried = list(SWEEP[way])
            while (best := best_rate(results, size, way, steps)) in (
                min(tried),
                max(tried),
            ):  # go on past the end
                tried.append(best / 2 if best == min(tried) else best * 2)
                if final(results, Run(size, way, tried[-1], SEEDS[0], steps)) is None:
                    break
        else:
            smaller = names[names.index(size) - 1]
            if (known := best_rate(results, smaller, way, steps)) is None:
                return []  # the smaller size comes first
            width = SIZES[size]["n_embd"] / SIZES[smaller]["n_embd"]
            centre = float(f"{known / math.sqrt(width):.2g}")
            tried = [centre / 2, centre, centre * 2] if size == names[1] else [centre]
        sweep = [Run(size, way, rate, SEEDS[0], steps) for rate in tried]
        runs += sweep
        if any(final(results, run) is None for run in sweep):
            settled = False
        else:
            rates[way] = best_rate(results, size, way, steps) or 0.0
    if size == names[-1]:
        return runs + ([Run(size, "Muon", rates["Muon"], SEEDS[0], steps // 2)] if settled else [])
    runs += [Run(size, "tutorial", TUTORIAL_RATE, seed, steps) for seed in SEEDS]
    if settled:
        runs += [Run(size, way, rates[way], seed, steps) for way in ("AdamW", "Muon") for seed in SEEDS]
        runs += [Run(size, "Muon", rates["Muon"], SEEDS[0], steps * part // STEPS) for part in SHORTER]
    return runs


def carry_out(run: Run, config: Config) -> dict[str, Any]:
    """Run it, or what is left of it, on one thread. Raises CalledProcessError with its last words."""
    log = config.folder / f"{run.name}.txt"
    with open(log, "a", encoding="utf-8") as output:
        subprocess.run(run.command(config), stdout=output, stderr=output, check=True, cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    record = read_run(config.folder / run.name)
    lines = (config.folder / run.name / "log.txt").read_text(encoding="utf-8").split("\n")
    curve = [
        (int(step), float(loss))
        for step, kind, loss in (line.split() for line in lines if line)
        if kind == "val"
    ]
    return {
        **run._asdict(), "parameters": record["parameters"], "loss": curve[-1][1], "curve": curve,
        "tokens": record["result"]["tokens"], "training_hours": record["result"]["training_hours"],
        "tokens_per_second": record["result"]["tokens_per_second"],
    }  # fmt: skip


def main(config: Config) -> None:
    check_numbers(config, {"jobs", "hours", "steps"})
    record = json.loads(config.out.read_text(encoding="utf-8")) if config.out.exists() else {"runs": {}}
    results: Results = record["runs"]
    if config.table:
        print("\n".join(table(results, config.steps)))
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    started, lock = time.monotonic(), threading.Lock()

    def work(run: Run) -> None:
        result = carry_out(run, config)
        with lock:
            results[run.name] = result
            record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
            write_file(config.out, lambda file: file.write(to_json(record).encode()))
            print(f"{run.name}: {result['loss']:.4f} nats a byte", flush=True)

    with ThreadPoolExecutor(config.jobs) as pool:
        running: dict[Future[None], Run] = {}
        while True:
            todo = [run for size in config.sizes for run in wanted(results, size, config.steps)]
            todo = [
                run for run in dict.fromkeys(todo) if run.name not in results and run not in running.values()
            ]
            in_time = config.hours is None or time.monotonic() - started < 3600 * config.hours
            while todo and in_time and len(running) < config.jobs:
                run = todo.pop(0)
                running[pool.submit(work, run)] = run
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                future.result()  # raises what went wrong
    print("\n".join(table(results, config.steps)))


def steps_for(results: Results, size: str, loss: float, steps: int) -> float | None:
    """After how many steps, in a schedule of its own, Muon ends at `loss`; None outside of what was run."""
    rate = best_rate(results, size, "Muon", steps)
    points = sorted(
        (r["loss"], math.log(r["steps"])) for r in results.values()
        if (r["size"], r["way"], r["rate"], r["seed"]) == (size, "Muon", rate, SEEDS[0])
    )  # fmt: skip
    if not points or not points[0][0] <= loss <= points[-1][0]:
        return None
    losses, logs = zip(*points, strict=True)
    return math.exp(np.interp(loss, losses, logs))


def table(results: Results, steps: int) -> list[str]:
    """What is measured so far, as lines of Markdown."""
    lines = [
        "| parameters | way | rate | final loss, nats a byte | tokens that Muon needs for it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for way in WAYS:
            rate = best_rate(results, size, way, steps)
            losses = [
                loss for seed in SEEDS
                if rate and (loss := final(results, Run(size, way, rate, seed, steps))) is not None
            ]  # fmt: skip
            if not rate or not losses:
                continue
            mean, spread = (
                statistics.mean(losses),
                f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else "",
            )
            needed = steps_for(results, size, losses[0], steps) if way != "Muon" else None
            share = f"{needed / steps:.0%}" if needed else ""
            parameters = f"{results[Run(size, way, rate, SEEDS[0], steps).name]['parameters'] / 1e6:.2f} M"
            lines.append(
                f"| {parameters} | {way} | {rate:.2g} | {mean:.3f}{spread}, n = {len(losses)} | {share} |"
            )
    return lines


if __name__ == "__main__":
    main(tyro.cli(Config))
