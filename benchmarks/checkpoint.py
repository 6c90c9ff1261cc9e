"""
What a checkpoint of the 124M model costs: seconds to save it, seconds to find, verify and load it again, and
what training loses while a thread saves.

    python -m benchmarks.checkpoint [--n 5] [--folder /disk/that/matters] [--out results.json]

Each round saves twice: once training waits for all of it, once a thread writes a copy while training goes on.
Then it trains as many steps as it did meanwhile, with nothing beside them: the difference is what was lost.
The share of training time is what is lost over the interval between two saves: 15 minutes on slow machines.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support.machine.device import free_host_memory, keep_freed_memory
from support.machine.processes import World
from support.model.huggingface import list_checkpoints
from support.run import folder as run_folder
from support.run.folder import SAVE_AT_LEAST_EVERY, RunFolder
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import tyro

ROWS, TOKENS = 4, 64  # of the batch that is trained on meanwhile


@dataclass(frozen=True)
class Config:
    """Time saving and resuming the 124M model."""

    n: int = 5  # measurements
    folder: Path | None = None  # where to write; default: a temporary folder
    out: Path | None = None  # write the figures here as JSON


class Training:
    """The 124M model in training, and the folder it is saved in."""

    def __init__(self, root: Path):
        self.model = GPT(GPTConfig()).pad_vocabulary()
        self.optimizer = configure_optimizer(self.model, TrainConfig())
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batch = torch.randint(50257, (ROWS, TOKENS + 1))
        self.folder = RunFolder(TrainConfig(log_dir=root, keep_every=0), World(), lambda _: None)
        (root / "log.txt").touch()

    def step(self) -> None:
        self.model(self.batch[:, :-1], self.batch[:, 1:]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, step: int, in_a_thread: bool) -> float:
        """Seconds for which training stands still."""
        run_folder.free_host_memory = free_host_memory if in_a_thread else lambda: 0
        start = time.perf_counter()
        self.folder.save(step, self.model, self.optimizer, self.scaler, loss=0.0)
        seconds = time.perf_counter() - start
        assert bool(self.folder.saving and not self.folder.saving.done()) == in_a_thread
        return seconds

    def resume(self, step: int) -> float:
        """Seconds to find, verify and load the newest checkpoint."""
        start = time.perf_counter()
        self.folder.find_checkpoint()
        loaded = GPT.from_pretrained(self.folder.checkpoint).pad_vocabulary()
        optimizer = configure_optimizer(loaded, TrainConfig())
        self.folder.first_step = step
        self.folder.restore(optimizer, self.scaler)
        return time.perf_counter() - start


def seconds_of(training: Training, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    return time.perf_counter() - start


def longest_gap(training: Training) -> float:
    """Seconds that a loop which does nothing was held up at most, until the save in flight was complete."""
    gap, last = 0.0, time.perf_counter()
    while not training.folder.saving.done():
        time.sleep(0.0005)
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
    return gap


def resident() -> float:
    """GB (10**9 bytes) of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(training: Training, i: int) -> dict[str, float]:
    """One round, in seconds."""
    figures = {"save_in_place": training.save(4 * i, in_a_thread=False)}
    training.step()
    begin = time.perf_counter()
    figures["stand_still"] = training.save(4 * i + 1, in_a_thread=True)
    start, steps = time.perf_counter(), 0
    while not training.folder.saving.done():
        training.step()
        steps += 1
    busy = time.perf_counter() - start
    figures["save_meanwhile"] = time.perf_counter() - begin
    figures["lost"] = figures["stand_still"] + busy - seconds_of(training, steps)
    figures["steps_meanwhile"] = steps
    training.save(4 * i + 2, in_a_thread=True)
    figures["longest_gap"] = longest_gap(training)
    figures["resume"] = training.resume(4 * i + 2)
    return figures


def main(config: Config) -> None:
    keep_freed_memory()
    root = Path(tempfile.mkdtemp(dir=config.folder))
    training = Training(root)
    seconds_of(training, 3)
    before = resident() if sys.platform == "linux" else None
    rounds = [measure(training, i) for i in range(config.n)]
    size = sum(file.stat().st_size for file in list_checkpoints(root)[-1].iterdir())
    shutil.rmtree(root)
    columns = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    median = {name: statistics.median(values) for name, values in columns.items()}
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "n": config.n,
        "batch": f"{ROWS} x {TOKENS}",
        "megabytes": round(size / 1e6),
        "seconds": columns,
        "median": median,
        "resident_gb": {"before": before, "after": before and resident()},
        "share_at_15_minutes": median["lost"] / SAVE_AT_LEAST_EVERY,
    }
    print(f"{result['device']}, PyTorch {torch.__version__}, n = {config.n}: {result['megabytes']:,} MB")
    for name, values in columns.items():
        print(f"{name:16} median {median[name]:6.2f}   ({min(values):.2f} to {max(values):.2f})")
    print(f"memory, GB: {result['resident_gb']}")
    print(f"share of training time, a save every 15 minutes: {100 * result['share_at_15_minutes']:.2f}%")
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
