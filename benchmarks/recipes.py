"""
How many tokens each recipe needs for the same loss: three ways to train small GPT-2s, each with its own rate.

    python fineweb.py --input TEXT --encoding bytes --shard_size 4000000 --output_dir text_bytes
    python -m benchmarks.recipes --data_dir text_bytes [--sizes 1M 3M 10M] [--hours 6]
    python -m benchmarks.recipes --data_dir text_bytes --variants   # then: Muon with one idea more each
    python -m benchmarks.recipes --table            # from what is measured so far; draws --picture too

Tokens are bytes, so that the layers are the model and not the embedding. Every run is train_gpt2.py with a
finished schedule, 4,096 bytes a step in rows of 128, in bfloat16, on one thread; runs are independent and go
side by side. The rates of AdamW and Muon are swept at the first size, by factors of 2 and past the ends until
the best lies inside. The second size is swept in the same way, around what (width)^-1/2 makes of that
rate; the third takes what it makes of the second's. Interrupt it at will: the same command goes on.

"Tokens that Muon needs" interpolates its final losses after 1,000, 500, 350 and 250 steps, each at the end of
a schedule of its own, linear in the logarithm of the steps. The shorter runs are made as far as needed.
"""

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from support.cli import PositiveFloat, PositiveInt, check_numbers
from support.files import to_json, write_file
from support.run.curves import read_run, save_picture

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
SHORTER = (500, 350, 250)  # Muon's, to find where it reaches AdamW's loss
SEEDS = (1337, 1338, 1339)
# The tutorial's warm-up is 3.75% of its steps.
WAYS: dict[str, dict[str, Any]] = {
    "tutorial": {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": round(0.0375 * STEPS)},
    "AdamW": {"optimizer": "adamw", "schedule": "trapezoid", "warmup_steps": 100},
    "Muon": {"optimizer": "muon", "schedule": "trapezoid", "warmup_steps": 100},
}
TUTORIAL_RATE = 6e-4
VARIANTS = ("momentum", "zero", "cautious", "average", "batches", "halves")  # see benchmarks/variants.py
VARIANT_STEPS = 500  # of the smallest size
SWEEP = {"AdamW": (2e-3, 4e-3, 8e-3), "Muon": (4e-3, 8e-3, 16e-3)}


@dataclass(frozen=True)
class Config:
    """Compare the recipes."""

    data_dir: Path = Path("text_bytes")  # token shards of bytes
    folder: Path = Path("log/recipes")  # where the runs live
    sizes: tuple[Literal["1M", "3M", "10M"], ...] = ("1M", "3M", "10M")
    jobs: PositiveInt = 2  # runs at once
    hours: PositiveFloat | None = None  # begin no run after so many hours
    steps: PositiveInt = STEPS  # of a full run
    variants: bool = False  # Muon with one idea more each, at the first size
    table: bool = False  # only print the table of what is measured, and draw the picture
    out: Path = ROOT / "benchmarks/results/recipes_cpu.json"
    picture: Path = ROOT / "docs/recipes.png"  # loss against tokens, at the middle size


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
        variant = self.way in VARIANTS
        script = ["-m", "benchmarks.variants", self.way] if variant else [str(ROOT / "train_gpt2.py")]
        halves = 2 if self.way in ("batches", "halves") else 1  # steps with half the tokens
        flags = {
            **SIZES[self.size], **WAYS["Muon" if variant else self.way],
            "recipe": "tutorial" if self.way == "tutorial" else "fast",
            "max_lr": self.rate, "seed": self.seed, "max_steps": self.steps * halves,
            "data_dir": config.data_dir, "log_dir": config.folder / self.name, "sequence_length": 128,
            "total_batch_size": 4096 // halves, "val_every": 125 * halves, "val_tokens": 65_536,
            "hellaswag_every": 0, "sample_every": 0, "checkpoint_every": 0 if variant else 250,
            "dtype": "bfloat16",
        }  # fmt: skip
        flags["warmup_steps"] *= halves
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, *script, *words, "--no_compile", *([] if variant else ["--resume"])]


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


def sweep(results: Results, size: str, way: str, steps: int) -> list[Run]:
    """The runs that find the best rate, as far as known: past the ends of the sweep while the best is there.
    No runs before the smaller size's rate is known; only the carried rate at the last size."""
    sizes = list(SIZES)
    rates = list(SWEEP[way])
    if size != sizes[0]:
        smaller = sizes[sizes.index(size) - 1]
        if (known := settled(results, smaller, way, steps)) is None:
            return []
        carried = known * math.sqrt(SIZES[smaller]["n_embd"] / SIZES[size]["n_embd"])
        rates = [float(f"{carried * factor:.2g}") for factor in ((1,) if size == sizes[-1] else (0.5, 1, 2))]
    while len(rates) > 1:
        losses = {rate: final(results, Run(size, way, rate, SEEDS[0], steps)) or math.inf for rate in rates}
        best = min(rates, key=lambda rate: losses[rate])
        if math.inf in losses.values() or min(rates) < best < max(rates):
            break
        rates.append(best / 2 if best == min(rates) else best * 2)
    return [Run(size, way, rate, SEEDS[0], steps) for rate in rates]


def settled(results: Results, size: str, way: str, steps: int) -> float | None:
    """The best rate, once its sweep is done."""
    runs = sweep(results, size, way, steps)
    done = runs and all(final(results, run) is not None for run in runs)
    return best_rate(results, size, way, steps) if done else None


def wanted(results: Results, size: str, steps: int) -> list[Run]:
    """The runs of `size` that what is known so far calls for. Those that are done are among them."""
    runs = [run for way in SWEEP for run in sweep(results, size, way, steps)]
    rates = {way: settled(results, size, way, steps) for way in SWEEP}
    largest = size == list(SIZES)[-1]
    seeds = SEEDS[:1] if largest else SEEDS
    for way, rate in rates.items():
        runs += [Run(size, way, rate, seed, steps) for seed in seeds if rate]
    targets = [run["loss"] for run in of_all_seeds(results, size, "AdamW", steps)]
    if all(rates.values()) and len(targets) == len(seeds):
        for part in SHORTER:
            runs.append(Run(size, "Muon", rates["Muon"] or 0.0, SEEDS[0], steps * part // STEPS))
            loss = final(results, runs[-1])
            if loss is None or loss >= max(targets):
                break
    return runs + ([] if largest else [Run(size, "tutorial", TUTORIAL_RATE, seed, steps) for seed in seeds])


def wanted_variants(results: Results, size: str, steps: int) -> list[Run]:
    """Each variant with each seed, and Muon as it is, at the rate that is best for Muon as it is."""
    rate = settled(results, size, "Muon", steps)
    ways = ("Muon", *VARIANTS)
    return [Run(size, way, rate, seed, VARIANT_STEPS) for way in ways for seed in SEEDS] if rate else []


def carry_out(run: Run, config: Config) -> dict[str, Any]:
    """Run it, or what is left of it, on one thread. Raises CalledProcessError with its last words."""
    log = config.folder / f"{run.name}.txt"
    if run.way in VARIANTS:  # these can't be resumed
        shutil.rmtree(config.folder / run.name, ignore_errors=True)
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
    check_numbers(config)
    record = json.loads(config.out.read_text(encoding="utf-8")) if config.out.exists() else {"runs": {}}
    results: Results = record["runs"]
    if config.table:
        print("\n".join([*table(results, config.steps), "", *table_of_variants(results, config.steps)]))
        draw(results, "3M", config.steps, config.picture)
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
            if config.variants:
                todo = wanted_variants(results, next(iter(SIZES)), config.steps)
            else:
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
    print("\n".join([*table(results, config.steps), "", *table_of_variants(results, config.steps)]))
    draw(results, "3M", config.steps, config.picture)


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


def of_all_seeds(results: Results, size: str, way: str, steps: int) -> list[dict[str, Any]]:
    """The way's results with its best rate, one for each seed."""
    rate = best_rate(results, size, way, steps) or 0.0
    runs = [Run(size, way, rate, seed, steps) for seed in SEEDS]
    return [results[run.name] for run in runs if run.name in results]


def spread(values: list[float], form: str) -> str:
    """Mean (least to most) of `values`."""
    of = f"{statistics.mean(values):{form}}"
    return of if len(values) == 1 else f"{of} ({min(values):{form}} to {max(values):{form}})"


def table(results: Results, steps: int) -> list[str]:
    """What is measured so far, as lines of Markdown."""
    lines = [
        "| parameters | way | rate | n | final loss, nats a byte | Muon needs of its tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for way in WAYS:
            runs = of_all_seeds(results, size, way, steps)
            if not runs:
                continue
            losses = [run["loss"] for run in runs]
            needed = [steps_for(results, size, loss, steps) for loss in losses]
            shares = [of / steps for of in needed if of]
            share = spread(shares, ".0%") if way != "Muon" and len(shares) == len(runs) else ""
            lines.append(
                f"| {runs[0]['parameters'] / 1e6:.2f} M | {way} | {runs[0]['rate']:.2g} | {len(runs)} "
                f"| {spread(losses, '.3f')} | {share} |"
            )
    return lines


def table_of_variants(results: Results, steps: int) -> list[str]:
    """By how much each variant changes the final loss, in nats per byte, seed by seed."""
    lines = ["| variant | n | change of the final loss |", "| --- | --- | --- |"]
    runs = wanted_variants(results, next(iter(SIZES)), steps)
    for way in VARIANTS:
        changes = [
            loss - plain for run in runs if run.way == way
            if (loss := final(results, run)) is not None
            if (plain := final(results, run._replace(way="Muon"))) is not None
        ]  # fmt: skip
        if changes:
            lines.append(f"| {way} | {len(changes)} | {spread(changes, '+.3f')} |")
    return lines


def draw(results: Results, size: str, steps: int, out: Path) -> None:
    """Loss against tokens, three ways: the mean of the seeds, a band from the least to the most, and the ends
    of Muon's shorter runs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for color, way in zip(("C7", "C0", "C3"), WAYS, strict=True):
        runs = of_all_seeds(results, size, way, steps)
        if not runs:
            continue
        tokens = [step * runs[0]["tokens"] / steps for step, _ in runs[0]["curve"]]
        losses = [[loss for _, loss in run["curve"]] for run in runs]
        low, middle, high = (
            [of(at) for at in zip(*losses, strict=True)] for of in (min, statistics.mean, max)
        )
        axis.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
        name = "the tutorial's recipe" if way == "tutorial" else f"{way}, trapezoid"
        label = f"{name}, {runs[0]['rate']:.2g}: {middle[-1]:.3f}"
        axis.plot(tokens, middle, color=color, marker="o", markersize=4, label=label)
    ends = [(r["tokens"], r["loss"]) for r in results.values()
            if r["size"] == size and r["way"] == "Muon" and r["steps"] < steps]  # fmt: skip
    if ends:
        axis.plot(*zip(*sorted(ends), strict=True), "s", color="C3", markerfacecolor="white",
                  label="the ends of shorter schedules with Muon")  # fmt: skip
    axis.set_ylim(top=3.3)
    axis.set_title("validation loss, nats per byte", fontsize=14)
    axis.set_xlabel("bytes trained on", fontsize=12)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=11, frameon=False)
    save_picture(figure, out)


if __name__ == "__main__":
    main(tyro.cli(Config))
