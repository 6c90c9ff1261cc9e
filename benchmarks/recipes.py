"""
How many tokens each recipe needs for the same loss: three ways to train small GPT-2s, each with its own rate.

    python fineweb.py --input TEXT --encoding bytes --shard_size 4000000 --output_dir text_bytes
    python -m benchmarks.recipes --data_dir text_bytes [--sizes 1M 3M 10M] [--hours 6]
    python -m benchmarks.recipes --data_dir text_bytes --sweeps --batches --sizes 1M 3M   # what is best
    python -m benchmarks.recipes --data_dir text_bytes --variants nesterov power   # one idea more
    python -m benchmarks.recipes --table            # from what is measured so far; draws --picture too

Tokens are bytes, so that the layers are the model and not the embedding. Every run is train_gpt2.py with a
finished schedule, 4,096 bytes a step in rows of 128, in bfloat16, on one thread; runs are independent and go
side by side. Interrupt it at will: the same command goes on.

Sweeps and variants take 500 steps, with the first seed. The rates of AdamW and Muon are swept at the first
size, by factors of 2 and past the ends until the best lies inside. The second size is swept in the same way,
around what (width)^-1/2 makes of that rate; the third takes what it makes of the second's. Then each of the
other fields is swept, the rest as they are. CHOSEN holds what these sweeps found; it is for a person to set.

The comparison takes 1,000 steps. "Tokens that Muon needs" interpolates its final losses after 1,000, 500, 350
and 250 steps, each at the end of a schedule of its own, linear in the logarithm of the steps. The shorter
runs are made as far as needed.
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
VARIANTS = (  # see benchmarks/variants.py
    "momentum", "zero", "cautious", "average", "batches", "halves", "nesterov", "power", "both",
    "normuon",
)  # fmt: skip
SWEEP_STEPS = 500  # of the sweeps and the variants
SWEEP = {"AdamW": (2e-3, 4e-3, 8e-3), "Muon": (4e-3, 8e-3, 16e-3)}  # the rates to begin with
GRID: dict[str, tuple[float, ...]] = {  # the other fields that are swept, one at a time
    "cooldown": (0.2, 0.4, 0.6, 0.8, 1.0),
    "weight_decay": (0.0, 0.03, 0.1, 0.3),
    "adamw_lr_ratio": (0.5, 1.0, 2.0, 4.0, 8.0),
    "warmup_steps": (0, 10, 25, 50, 100),
    "momentum": (0.5, 0.7, 0.8, 0.85, 0.9, 0.95),
}
OF_BOTH = {"cooldown": 0.6, "weight_decay": 0.1, "adamw_lr_ratio": 2.0, "warmup_steps": 100}
DEFAULT = {"AdamW": {**OF_BOTH, "momentum": 0.9}, "Muon": {**OF_BOTH, "momentum": 0.95}}  # of these runs
LONG_DECAYS = (0.0, 0.1, 0.3)  # also tried with twice the steps
CHOSEN = {  # by the sweeps
    "tutorial": "",
    "AdamW": "--cooldown 0.4 --momentum 0.8",
    "Muon": "--warmup_steps 10 --momentum 0.9",
}
TOKENS_PER_STEP, VAL_EVERY = 4096, 125
BATCHES = {  # the tokens in a step, and the squares of two rates, both as multiples of the common ones
    1 / 8: (1 / 2, 1 / 4), 1 / 4: (1, 1 / 2), 1 / 2: (1, 1 / 2), 2: (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Compare the recipes."""

    data_dir: Path = Path("text_bytes")  # token shards of bytes
    folder: Path = Path("log/recipes")  # where the runs live
    sizes: tuple[Literal["1M", "3M", "10M"], ...] = ("1M", "3M", "10M")
    jobs: PositiveInt = 2  # runs at once
    hours: PositiveFloat | None = None  # begin no run after so many hours
    steps: PositiveInt = STEPS  # of a full run
    sweeps: bool = False  # the rate and other fields of AdamW and Muon, one at a time
    batches: bool = False  # fewer and more tokens in a step, with rates of their own
    variants: tuple[str, ...] = ()  # Muon with one idea more each, see benchmarks/variants.py
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
    changes: str = ""  # further flags, such as "--cooldown 0.8"

    @property
    def name(self) -> str:
        changes = self.changes.replace(" --", "_").replace("--", "_").replace(" ", "=")
        return f"{self.size}_{self.way}_{self.rate:.2g}_{self.seed}_{self.steps}{changes}"

    def command(self, config: Config) -> list[str]:
        variant = self.way in VARIANTS
        script = ["-m", "benchmarks.variants", self.way] if variant else [str(ROOT / "train_gpt2.py")]
        halves = 2 if self.way in ("batches", "halves") else 1  # steps with half the tokens
        flags = {
            **SIZES[self.size], **WAYS["Muon" if variant else self.way],
            "recipe": "tutorial" if self.way == "tutorial" else "fast",
            "max_lr": self.rate, "seed": self.seed, "max_steps": self.steps * halves,
            "data_dir": config.data_dir, "log_dir": config.folder / self.name, "sequence_length": 128,
            "total_batch_size": TOKENS_PER_STEP // halves, "val_every": VAL_EVERY * halves,
            "val_tokens": 65_536, "hellaswag_every": 0, "sample_every": 0,
            "checkpoint_every": 0 if variant else 250, "dtype": "bfloat16",
        }  # fmt: skip
        flags["warmup_steps"] *= halves
        words = self.changes.replace("--", "").split()
        flags |= dict(zip(words[::2], words[1::2], strict=True))
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, *script, *words, "--no_compile", *([] if variant else ["--resume"])]


Results = dict[str, dict[str, Any]]  # by the run's name


def final(results: Results, run: Run) -> float | None:
    """The run's final validation loss, nats per byte; None if it has not been run."""
    return results[run.name]["loss"] if run.name in results else None


def best_rate(results: Results, size: str, way: str, steps: int, changes: str = "") -> float | None:
    """The rate with the lowest final loss among the first seed's runs; None if there are none."""
    of_way = (size, way, SEEDS[0], steps, changes)
    losses = {
        r["rate"]: r["loss"] for r in results.values()
        if (r["size"], r["way"], r["seed"], r["steps"], r["changes"]) == of_way
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
    runs = {rate: Run(size, way, rate, SEEDS[0], steps) for rate in rates}
    while len(runs) > 1:
        losses = {rate: final(results, run) or math.inf for rate, run in runs.items()}
        best = min(losses, key=lambda rate: losses[rate])
        if math.inf in losses.values() or min(losses) < best < max(losses):
            break
        further = best / 2 if best == min(losses) else best * 2
        runs[further] = runs[best]._replace(rate=further)
    return list(runs.values())


def settled(results: Results, size: str, way: str, steps: int) -> float | None:
    """The best rate, once its sweep is done."""
    runs = sweep(results, size, way, steps)
    done = runs and all(final(results, run) is not None for run in runs)
    return best_rate(results, size, way, steps) if done else None


def changed(run: Run, field: str, value: float) -> Run:
    """The run with another value of one field."""
    return run if value == DEFAULT[run.way][field] else run._replace(changes=f"--{field} {value:g}")


def sweep_field(results: Results, run: Run, field: str) -> list[Run]:
    """The runs that differ from `run` in one field. At the first size, all values. At the next, the smaller
    size's best and its neighbours, and further ones while the best is at an end."""
    runs = [changed(run, field, value) for value in GRID[field]]
    sizes = list(SIZES)
    if run.size == sizes[0]:
        return runs
    smaller = sizes[sizes.index(run.size) - 1]
    rate = settled(results, smaller, run.way, run.steps)
    losses = [final(results, of._replace(size=smaller, rate=rate or 0.0)) for of in runs]
    tried = {GRID[field].index(DEFAULT[run.way][field])}
    while None not in losses:
        best = losses.index(min(loss for loss in losses if loss is not None))
        if tried >= (near := {best - 1, best, best + 1} & set(range(len(runs)))):
            break
        tried |= near
        losses = [final(results, of) if i in tried else math.inf for i, of in enumerate(runs)]
    return [runs[i] for i in sorted(tried)]


def wanted_sweeps(results: Results, size: str) -> list[Run]:
    """The runs that sweep the rate, and then one other field at a time, with the first seed; and weight decay
    with twice the steps."""
    runs = []
    for way in SWEEP:
        runs += sweep(results, size, way, SWEEP_STEPS)
        if (rate := settled(results, size, way, SWEEP_STEPS)) is None:
            continue
        run = Run(size, way, rate, SEEDS[0], SWEEP_STEPS)
        for field in GRID:
            if way == "Muon" or field != "adamw_lr_ratio":
                runs += sweep_field(results, run, field)
        twice = run._replace(steps=2 * SWEEP_STEPS)
        runs += [changed(twice, "weight_decay", decay) for decay in LONG_DECAYS]
    return runs


def wanted_batches(results: Results, size: str) -> list[Run]:
    """An eighth to twice the tokens in a step, as many in all, with two rates each."""
    runs = []
    for way in SWEEP:
        rate = settled(results, size, way, SWEEP_STEPS)
        for factor, squares in BATCHES.items() if rate else ():
            changes = " ".join(
                f"--{name} {value:.0f}" for name, value in (
                    ("total_batch_size", TOKENS_PER_STEP * factor),
                    ("warmup_steps", WAYS[way]["warmup_steps"] / factor), ("val_every", VAL_EVERY / factor),
                )
            )  # fmt: skip
            for square in squares:
                of = float(f"{(rate or 0) * math.sqrt(square):.2g}")
                runs.append(Run(size, way, of, SEEDS[0], round(SWEEP_STEPS / factor), changes))
    return runs


def wanted(results: Results, size: str, steps: int) -> list[Run]:
    """The runs of the comparison at `size` that what is known so far calls for, with the rates that were best
    after SWEEP_STEPS. Those that are done are among them."""
    largest = size == list(SIZES)[-1]
    seeds = SEEDS[:1] if largest else SEEDS
    runs, rates = [], {}
    for way in SWEEP:
        runs += sweep(results, size, way, SWEEP_STEPS)
        rates[way] = settled(results, size, way, SWEEP_STEPS)
        runs += [Run(size, way, rates[way] or 0.0, seed, steps, CHOSEN[way]) for seed in seeds if rates[way]]
    targets = [run["loss"] for run in of_all_seeds(results, size, "AdamW", steps)]
    if all(rates.values()) and len(targets) == len(seeds):
        for part in SHORTER:
            shorter = steps * part // STEPS
            runs.append(Run(size, "Muon", rates["Muon"] or 0.0, SEEDS[0], shorter, CHOSEN["Muon"]))
            loss = final(results, runs[-1])
            if loss is None or loss >= max(targets):
                break
    return runs + ([] if largest else [Run(size, "tutorial", TUTORIAL_RATE, seed, steps) for seed in seeds])


def wanted_variants(results: Results, size: str, variants: tuple[str, ...]) -> list[Run]:
    """Each variant with each seed, and Muon as it is, at the rate that is best for Muon as it is."""
    rate = settled(results, size, "Muon", SWEEP_STEPS)
    ways = ("Muon", *variants)
    return [Run(size, way, rate, seed, SWEEP_STEPS) for way in ways for seed in SEEDS] if rate else []


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
        report(results, config)
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
            todo = []
            for size in config.sizes:
                if config.sweeps:
                    todo += wanted_sweeps(results, size)
                if config.batches:
                    todo += wanted_batches(results, size)
                if config.variants:
                    todo += wanted_variants(results, size, config.variants)
                if not (config.sweeps or config.batches or config.variants):
                    todo += wanted(results, size, config.steps)
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
    report(results, config)


def report(results: Results, config: Config) -> None:
    """Print what is measured, and draw the picture."""
    tables = (table(results, config.steps), table_of_sweeps(results), table_of_variants(results))
    print("\n\n".join("\n".join(lines) for lines in tables))
    draw(results, "3M", config.steps, config.picture)


def steps_for(results: Results, size: str, loss: float, steps: int) -> float | None:
    """After how many steps, in a schedule of its own, Muon ends at `loss`; None outside of what was run."""
    rate = best_rate(results, size, "Muon", steps, CHOSEN["Muon"])
    points = sorted(
        (r["loss"], math.log(r["steps"])) for r in results.values()
        if (r["size"], r["way"], r["rate"], r["seed"], r["changes"])
        == (size, "Muon", rate, SEEDS[0], CHOSEN["Muon"])
    )  # fmt: skip
    if not points or not points[0][0] <= loss <= points[-1][0]:
        return None
    losses, logs = zip(*points, strict=True)
    return math.exp(np.interp(loss, losses, logs))


def of_all_seeds(results: Results, size: str, way: str, steps: int) -> list[dict[str, Any]]:
    """The way's results with its best rate, one for each seed."""
    rate = best_rate(results, size, way, steps, CHOSEN[way]) or 0.0
    runs = [Run(size, way, rate, seed, steps, CHOSEN[way]) for seed in SEEDS]
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


def table_of_sweeps(results: Results) -> list[str]:
    """The final losses of the sweeps, a line for each field."""
    lines = [
        "| parameters | way | steps | changed | final losses, nats a byte |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for way in SWEEP:
            rate = best_rate(results, size, way, SWEEP_STEPS)
            if rate is None:
                continue
            run = Run(size, way, rate, SEEDS[0], SWEEP_STEPS)
            rates = sorted(
                r["rate"]
                for r in results.values()
                if Run(**{n: r[n] for n in Run._fields}) == run._replace(rate=r["rate"])
            )
            rows = {("rate", SWEEP_STEPS): {f"{of:.2g}": run._replace(rate=of) for of in rates}}
            for field, grid in GRID.items():
                for steps in (SWEEP_STEPS, 2 * SWEEP_STEPS):
                    rows[field, steps] = {
                        f"{of:g}": changed(run._replace(steps=steps), field, of) for of in grid
                    }
            for (field, steps), runs in rows.items():
                losses = [
                    f"{value}: {loss:.4f}" for value, of in runs.items() if (loss := final(results, of))
                ]
                if len(losses) > 1:
                    lines.append(f"| {size} | {way} | {steps} | {field} | {', '.join(losses)} |")
            for of in wanted_batches(results, size):
                if of.way == way and (loss := final(results, of)):
                    change = f"{of.changes.split()[1]} bytes a step, rate {of.rate:.2g}"
                    lines.append(f"| {size} | {way} | {of.steps} | {change} | {loss:.4f} |")
    return lines


def table_of_variants(results: Results) -> list[str]:
    """By how much each variant changes the final loss, in nats per byte, seed by seed; and how many tokens
    less that is worth, by the slope of Muon's loss between SWEEP_STEPS and twice as many."""
    lines = [
        "| parameters | variant | n | change of the final loss | fewer tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        rate = best_rate(results, size, "Muon", SWEEP_STEPS)
        plain = {seed: final(results, Run(size, "Muon", rate or 0.0, seed, SWEEP_STEPS)) for seed in SEEDS}
        longer = final(results, Run(size, "Muon", rate or 0.0, SEEDS[0], 2 * SWEEP_STEPS))
        for way in VARIANTS:
            losses = {seed: final(results, Run(size, way, rate or 0.0, seed, SWEEP_STEPS)) for seed in SEEDS}
            changes = [loss - of for seed, loss in losses.items() if loss and (of := plain[seed])]
            if changes:
                gains = ""
                if longer and (of := plain[SEEDS[0]]):
                    gains = spread(
                        [1 - math.exp(change * math.log(2) / (of - longer)) for change in changes], ".1%"
                    )
                lines.append(f"| {size} | {way} | {len(changes)} | {spread(changes, '+.4f')} | {gains} |")
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
            if (r["size"], r["way"], r["changes"]) == (size, "Muon", CHOSEN["Muon"])
            and r["steps"] < steps]  # fmt: skip
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
