"""Not a test: stops a small run by signals at random moments, resumes it, and compares its end with an
undisturbed one.

    python tests/stop_trials.py STOPS SEED PROCESSES FOLDER FLAG...

The signal goes to one process or to all, when one of them begins a part: a micro-step, a batch of an
evaluation or a token of a sample. As in kill_trials.py, each trial is a fork. Prints a JSON object: how many
stops there were in parts of each kind, runs finished, and what was wrong.
"""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import hellaswag
import train_gpt2
from support.files import sha256
from support.machine.processes import STOP_SIGNALS, StopSignals
from support.model import sampling
from support.run.folder import RunFolder

import torch
from kill_trials import start

NEVER = ("", 0)
KINDS = {  # what begins a part
    "micro-step": (train_gpt2.GPT, "forward"),
    "validation": (train_gpt2.GPT, "forward"),
    "HellaSwag": (hellaswag, "score_batch"),
    "sample": (sampling, "next_logits"),
}


class Parts:
    """Counts the parts that this process begins from the first step on, and sends a signal in the one chosen,
    as (kind, count), to the processes `to`."""

    def __init__(self, file: Path, chosen: tuple[str, int], number: int, to: list[int]):
        self.file, self.chosen, self.number, self.to = file, chosen, number, to
        self.begun: Counter[str] = Counter()
        self.after = -1  # parts begun after the signal
        for kind in ("micro-step", "HellaSwag", "sample"):
            owner, name = KINDS[kind]
            setattr(owner, name, self.counting(kind, getattr(owner, name)))
        begin_steps = StopSignals.begin_steps
        self.counts = False

        def begin(stop, world):
            begin_steps(stop, world)
            self.counts = True

        StopSignals.begin_steps = begin

    def counting(self, kind, function):
        def wrapped(*arguments, **options):
            if self.counts:
                is_validation = kind == "micro-step" and not torch.is_grad_enabled()
                self.begin("validation" if is_validation else kind)
            return function(*arguments, **options)

        return wrapped

    def begin(self, kind):
        self.begun[kind] += 1
        self.after += self.after >= 0
        if (kind, self.begun[kind]) == self.chosen:
            self.after = 0
            for pid in self.to:
                os.kill(pid, self.number)
        self.file.write_text(json.dumps([self.begun, self.after]))


def train(folder: Path, flags: list[str], processes: int, chosen=NEVER, number: int = 0) -> list[int]:
    """Train in forks; returns their exit statuses. The last one sends the signal, to itself or to all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children: list[int] = []
    for rank in range(processes):
        last = rank == processes - 1
        others = children[:] if random.random() < 0.5 else []

        def prepare(rank=rank, last=last, others=others):
            if processes > 1:
                os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            for each in STOP_SIGNALS:
                signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
            file = folder.with_suffix(f".parts{rank}")
            Parts(file, chosen if last else NEVER, number, [*others, os.getpid()])
            RunFolder.draw = lambda self: None  # takes longer than the run

        children.append(start(folder, flags, prepare))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def end_of(folder: Path) -> list[str]:
    """What a run leaves behind: its log, its model, and whether it has a result."""
    last = max(folder.glob("checkpoint_*"))
    result = "result" in json.loads((folder / "run.json").read_text())
    return [(folder / "log.txt").read_text(), last.name, sha256(last / "model.safetensors"), str(result)]


def main(stops: int, seed: int, processes: int, root: Path, flags: list[str]) -> None:
    torch.set_num_threads(1)
    random.seed(seed)
    importlib.import_module("torch._dynamo")  # so that no fork has to

    statuses = train(root / "undisturbed", flags, processes)
    assert not any(statuses), (root / "undisturbed.out").read_text()[-3000:]
    expected = end_of(root / "undisturbed")
    mine = f".parts{processes - 1}"
    in_all, _ = json.loads((root / "undisturbed").with_suffix(mine).read_text())
    stopped, runs, wrong = Counter(), 0, []
    folder = root / "stopped"
    while sum(stopped.values()) < stops:
        left = in_all
        while True:
            n = sum(stopped.values())
            kind, number = list(KINDS)[n % len(KINDS)], STOP_SIGNALS[n % len(STOP_SIGNALS)]
            chosen = (kind, random.randint(1, max(1, left[kind]))) if n < stops else NEVER
            statuses = train(folder, flags, processes, chosen, number)
            begun, after = json.loads(folder.with_suffix(mine).read_text())
            if not any(statuses):
                break
            stopped[kind] += 1
            left = {kind: count - begun.get(kind, 0) for kind, count in left.items()}
            if statuses[-1] != 128 + number or any(s not in (128 + number, 143) for s in statuses):
                wrong.append(f"{statuses} after signal {number}: {folder.with_suffix('.out').read_text()}")
            if processes == 1 and after:
                wrong.append(f"{after} parts begun after a signal in {kind}")
            if wrong:
                break
        if not wrong and end_of(folder) != expected:
            wrong.append(f"another end: {end_of(folder)} instead of {expected}")
        if wrong:
            break
        runs += 1
        shutil.rmtree(folder)
        folder.with_suffix(".out").unlink()
    print(json.dumps({"stopped": stopped, "runs": runs, "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
