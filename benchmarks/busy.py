"""
The demo's speed on a quiet machine and beside a busy loop, by how long OpenMP's threads spin.

    python -m benchmarks.busy [--n 5] [--out results.json]

The ways take turns; each figure is the mean rate of a run of its own. 300,000 turns are libgomp's default.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training import spread
from support.machine.device import choose_device, device_name

import torch
import tyro

SPINS = {"1000": "the scripts' default", "300000": "libgomp's default"}


@dataclass(frozen=True)
class Config:
    """Measure the demo beside another program."""

    n: int = 5  # rounds
    steps: int = 100  # of each run
    out: Path | None = None  # write the figures here as JSON


def rate(spins: str, steps: int) -> float:
    """The tokens/s of a run of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_gpt2.py", "--demo", f"--max_steps={steps}", "--warmup_steps=10",
                   "--val_every=0", "--sample_every=0", "--checkpoint_every=0", f"--log_dir={folder}/log",
                   "--data_dir=demo_data"]  # fmt: skip
        env = {**os.environ, "GOMP_SPINCOUNT": spins}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = re.search(r"speed: +([\d,]+) tokens/s", done.stdout)
    assert found, done.stdout
    return float(found[1].replace(",", ""))


def main(config: Config) -> None:
    name = device_name(choose_device("cpu"))
    print(f"{name}, PyTorch {torch.__version__}, {config.steps} steps of the demo, n = {config.n}")
    rates: dict[str, list[float]] = {
        f"{state}, {spins}": [] for spins in SPINS for state in ("quiet", "busy")
    }
    for _ in range(config.n):
        for spins in SPINS:
            rates[f"quiet, {spins}"].append(rate(spins, config.steps))
        loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            for spins in SPINS:
                rates[f"busy, {spins}"].append(rate(spins, config.steps))
        finally:
            loop.kill()
    for way, values in rates.items():
        quiet = rates[f"quiet, {way.split(', ')[1]}"]
        kept = spread([a / b for a, b in zip(values, quiet, strict=True)], ".0%")
        whose = SPINS[way.split(", ")[1]]
        print(f"{way:14} {spread(values, '7,.0f')} tokens/s, {kept} of the quiet rate ({whose})")
    quiet = [a / b for a, b in zip(rates["quiet, 1000"], rates["quiet, 300000"], strict=True)]
    print(f"quiet, 1000 turns against 300,000: {spread(quiet, '.2f')} x")
    if config.out:
        facts = {"device": name, "torch": torch.__version__, "n": config.n, "steps": config.steps,
                 "tokens_per_second": rates}  # fmt: skip
        config.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
