"""
What a checkpoint of the 124M model costs: seconds to save it, seconds to find, verify and load it again.

    python -m benchmarks.checkpoint [--n 5] [--folder /disk/that/matters] [--out results.json]

The share of training time is the time of a save over the interval between two: 15 minutes on slow machines.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support.processes import World
from support.run_folder import SAVE_AT_LEAST_EVERY, RunFolder, list_checkpoints
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import tyro


@dataclass(frozen=True)
class Config:
    """Time saving and resuming the 124M model."""

    n: int = 5  # measurements
    folder: Path | None = None  # where to write; default: a temporary folder
    out: Path | None = None  # write the figures here as JSON


def main(config: Config) -> None:
    world = World(0, 1, torch.device("cpu"))
    model = GPT(GPTConfig()).pad_vocabulary()
    optimizer = configure_optimizer(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    saves, resumes = [], []
    root = Path(tempfile.mkdtemp(dir=config.folder))
    folder = RunFolder(root, True, lambda _: None)
    (root / "log.txt").touch()
    for i in range(config.n):
        start = time.perf_counter()
        assert folder.save(i, model, optimizer, scaler, {"loss": 0.0})
        saves.append(time.perf_counter() - start)
        start = time.perf_counter()
        folder.find_checkpoint()
        loaded = GPT.from_pretrained(folder.checkpoint).pad_vocabulary()
        folder.restore(configure_optimizer(loaded, TrainConfig()), scaler, i, world)
        resumes.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in list_checkpoints(root)[-1].iterdir())
    shutil.rmtree(root)
    median = {"save": statistics.median(saves), "resume": statistics.median(resumes)}
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "n": config.n,
        "megabytes": round(size / 1e6),
        "save_seconds": saves,
        "resume_seconds": resumes,
        "median": median,
        "share_at_15_minutes": median["save"] / SAVE_AT_LEAST_EVERY,
    }
    print(f"{result['device']}, PyTorch {torch.__version__}, n = {config.n}: {result['megabytes']:,} MB")
    for name, values in (("save", saves), ("resume", resumes)):
        print(f"{name:7} median {median[name]:5.2f} s   ({min(values):.2f} to {max(values):.2f})")
    print(f"share of training time, a save every 15 minutes: {100 * result['share_at_15_minutes']:.2f}%")
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
