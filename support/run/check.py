"""
`train_gpt2.py --check`: everything that a run does, done once, before the run costs money.

The check is the script itself. A process that got --check starts its own command three times, as a child: to
measure the machine, to train for a few steps in a temporary folder, and to resume there from a checkpoint. A
variable in the child's environment says which. Under torchrun every process does so, and they agree through
torchrun's store. None of them takes a GPU: the children find the memory that a run will find.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.cli import InputError, duration
from support.files import own_name, to_json
from support.machine.measure import measure_machine
from support.machine.processes import CHECK_PHASE, STOP_SIGNALS, find_store, read_layout, start_processes
from support.model.huggingface import list_checkpoints
from support.run.curves import read_log, read_run
from support.run.findings import Findings
from support.run.report import check_tracker

import torch.distributed as dist

if TYPE_CHECKING:
    from train_gpt2 import TrainConfig

CHECK_FOLDER = "GPT2_CHECK_FOLDER"  # the environment variable that names a child's folder
PHASES = {
    "measure": "the devices and their links, the memory, the disk",
    "train": "five steps, with evaluations and checkpoints",
    "resume": "the last step again, from the checkpoint before it",
}
STEPS, SAVED_AT = 5, 4  # The children train for so many steps, and resume at that one.
HELLASWAG_ITEMS = 10
SAFE_LR = 1e-4  # without a warm-up
PROGRESS = r"warm-up|a micro-batch of|torch\.compile failed|step +\d+ \|"  # lines of a child that are shown
TRACEBACK = "Traceback (most recent call last):"
GRACE = 10  # seconds for a child to end by itself, once another process's child has failed
SAME_LOSS = 1e-3  # The losses of a resumed step differ by at most this share; on a CPU, not at all.


def rehearse(config: "TrainConfig", get_lr: Callable[[int, "TrainConfig"], float]) -> "TrainConfig":
    """In a child, the configuration to go on with. In the process that got --check, check the run of `config`
    and `get_lr`, and exit: with 0, with 1 after a fault, with 2 after bad input."""
    phase = os.environ.get(CHECK_PHASE)
    if phase is None:
        sys.exit(Check(config, get_lr).run())
    folder = Path(os.environ[CHECK_FOLDER])
    if phase == "measure":
        measure(config, folder)
        sys.exit(0)
    _, _, size = read_layout()
    trains = phase == "train"
    check_tracker(config.tracker)
    return replace(
        config,
        check=False,
        log_dir=folder,
        resume=not trains,
        verify=config.verify and trains,
        tracker=None,
        max_steps=STEPS,
        # The same rate in all steps: after a tiny update, a lost state of the optimizer would not show.
        warmup_steps=0,
        max_lr=min(config.max_lr, SAFE_LR),
        schedule="trapezoid",
        cooldown=0.001,
        val_every=STEPS,
        val_tokens=size * max(2**12, config.sequence_length),  # a few rows may be of one line again and again
        hellaswag_every=STEPS if config.hellaswag_every and trains else 0,
        hellaswag_limit=HELLASWAG_ITEMS,
        sample_every=STEPS if config.sample_every and trains else 0,
        checkpoint_every=SAVED_AT,
    )


def measure(config: "TrainConfig", folder: Path) -> None:
    """Write what the machine is and can do to machine.json in `folder`."""
    world = start_processes(config.device, config.timeout_minutes)
    world.require_same(**config.common_fields())  # of the real run: the children's lengths are the same
    machine = measure_machine(world, config.log_dir, folder)
    if world.is_main:
        (folder / "machine.json").write_text(to_json(machine), encoding="utf-8")
    world.disconnect()
    world.exit(0)


class Check:
    """The check, in one of the processes that got --check."""

    def __init__(self, config: "TrainConfig", get_lr: Callable[[int, "TrainConfig"], float]):
        self.config, self.get_lr = config, get_lr
        self.rank, _, self.size = read_layout()
        self.folder = own_name(config.log_dir / "trial")  # should it be left, the next run removes it
        self.limit = 60 * config.timeout_minutes  # seconds of a phase
        self.patience = timedelta(seconds=self.limit + 6 * GRACE)  # for another process's child to end
        self.lines: list[str] = []  # what this process's children have printed
        self.child: subprocess.Popen[str] | None = None
        self.store: dist.Store | None = None  # of several processes

    def run(self) -> int:
        """Run all phases and report; returns the exit status."""
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            return 1  # torchrun --max_restarts: a check that has failed is over
        for number in STOP_SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        log_dir = self.config.log_dir
        made = [path for path in (log_dir, *log_dir.parents) if not path.exists()]
        try:
            if self.size > 1:
                self.store = dist.PrefixStore("check", find_store(self.rank, self.size, self.patience))
            status = self.run_phases()
            status = self.from_all("end", status)[0]  # by now the main process has printed
            with contextlib.suppress(RuntimeError):  # the main process may hold the store, and be gone
                self.from_all("left", status)
            return status
        finally:
            if self.child:
                self.child.kill()
                self.child.wait()
            if self.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
                for path in made:
                    with contextlib.suppress(OSError):  # not made, or used by now
                        path.rmdir()

    def run_phases(self) -> int:
        """Run one phase after another until one fails; then the main process reports."""
        findings, losses = None, {}
        for number, (phase, text) in enumerate(PHASES.items(), start=1):
            self.print(f"check {number}/{len(PHASES)}: {text}")
            ends = self.from_all(phase, self.run_child(phase))
            if any(end["status"] for end in ends):
                self.print_faults(told(ends))
                return 2 if any(end["status"] == 2 for end in ends) else 1
            if phase == "train" and self.rank == 0:
                findings = Findings(self.config, self.folder, self.lines, self.get_lr)
                losses = last_losses(self.folder)
                shutil.rmtree(list_checkpoints(self.folder)[-1])
        if not findings:  # another process reports
            return 0
        again, tolerance = last_losses(self.folder), 0.0 if findings.on_cpu else SAME_LOSS
        for warning in findings.warnings():
            self.print(f"WARNING: {warning}")
        faults = [
            f"the {name} of the resumed step is {again[name]}, and was {loss}: the checkpoint came back with "
            "other values, or the device computes wrongly; try another --log_dir, or --dtype float32"
            for name, loss in losses.items()
            if not abs(again[name] - loss) <= tolerance * abs(loss)  # written so that nan fails too
        ]
        same = "the same digits" if again == losses else "the same losses within 0.1%"
        self.print(findings.table("other losses" if faults else same))
        self.print_faults([*faults, *findings.refusals])
        return 1 if faults or findings.refusals else 0

    def run_child(self, phase: str) -> dict[str, Any]:
        """Run this process's child of a phase to its end: its exit status, what errors it told, and the last
        line that it printed."""
        environment = {**os.environ, CHECK_PHASE: phase, CHECK_FOLDER: str(self.folder)}
        if self.store:  # A process of the check holds the store if torchrun does not; no child opens another.
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        command, pipe = [sys.executable, *sys.argv], subprocess.PIPE
        self.child = child = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        lines: list[str] = []
        reader = threading.Thread(target=self.read_lines, args=(child, lines), daemon=True)
        reader.start()
        reason = self.wait_for(child, phase)
        status = child.wait()
        reader.join(timeout=GRACE)  # a compiler's process may still hold the pipe
        self.lines += lines
        last = next(filter(None, reversed(lines)), "")
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if reason is not None:
            status, errors = 1, [reason] if reason else []
        elif status < 0 and not errors:
            name, short = signal.Signals(-status).name, "memory was short: see dmesg, and free some"
            why = f"if nobody sent it, {short}" if name == "SIGKILL" else f"its last line: {last}"
            errors = [f"{name} ended a process; {why}"]
        if TRACEBACK in lines:  # a mistake in the code
            print("\n".join(lines[lines.index(TRACEBACK) :]), file=sys.stderr)
        if status and self.store:
            self.store.set("failed", "")
        return {"status": status, "errors": errors, "last": last}

    def wait_for(self, child: "subprocess.Popen[str]", phase: str) -> str | None:
        """Wait for the end of a child, or kill it; returns why, or "" where another process knows."""
        began, others_failed = time.monotonic(), math.inf
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
                return None
            now = time.monotonic()
            if self.store and others_failed == math.inf and self.store.check(["failed"]):
                others_failed = now
            reason = self.too_slow()
            if now - others_failed > GRACE:
                reason = ""
            elif now - began > self.limit:
                limit = f"{self.config.timeout_minutes:.3g} minutes (--timeout_minutes)"
                reason = f"{PHASES[phase]}: not done in {limit}; a process hangs, or the machine is too slow"
            if reason is not None:
                child.kill()
                return reason

    def too_slow(self) -> str | None:
        """Why the steps would take too long, as soon as the warm-up has told how long one takes."""
        with contextlib.suppress(OSError, InputError):
            facts = read_run(self.folder) if self.rank == 0 else {}
            seconds = facts.get("warm_up_step_seconds") or 0.0
            if (STEPS + 1) * seconds > self.limit:
                whole = duration(seconds * self.config.max_steps)
                minutes = math.ceil((STEPS + 4) * seconds / 60)
                return (
                    f"a step would take about {duration(seconds)} on {facts['device']}, and the run {whole}; "
                    "take a faster machine, or a smaller model: --demo; to check it all the same: "
                    f"--timeout_minutes {minutes}"
                )
        return None

    def read_lines(self, child: "subprocess.Popen[str]", lines: list[str]) -> None:
        """Collect the lines that a child prints, and show its progress."""
        for line in child.stdout or ():
            lines.append(line.rstrip())
            if re.match(PROGRESS, line):
                with contextlib.suppress(OSError):  # The main thread, too, will find that nobody reads.
                    self.print(f"    {line.rstrip()}")

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def print_faults(self, faults: list[str]) -> None:
        for fault in faults if self.rank == 0 else ():
            print(f"error: {fault}", file=sys.stderr, flush=True)

    def from_all(self, name: str, value: Any) -> list[Any]:
        """Every process's `value`, by rank."""
        if not self.store:
            return [value]
        keys = [f"{name} {rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(value))
        self.store.wait(keys, self.patience)
        return [json.loads(self.store.get(key)) for key in keys]


def told(ends: list[dict[str, Any]]) -> list[str]:
    """What the children told of a fault, each line once. That another process is lost is told only if nobody
    knows more."""
    ranks = {line: rank for rank, end in reversed(list(enumerate(ends))) for line in end["errors"]}
    known = {line: rank for line, rank in ranks.items() if not line.startswith("lost contact")} or ranks
    if not known:
        failed = next(rank for rank, end in enumerate(ends) if end["status"])
        known = {f"a process ended unexpectedly: {ends[failed]['last']}": failed}
    return [f"rank {rank}: {line}" if rank else line for line, rank in known.items()]


def last_losses(folder: Path) -> dict[str, float]:
    """The loss of the last step that was tried, and the validation loss after it, in nats; the latter depends
    on the optimizer's state. nan for one that is not in the log."""
    log = read_log(folder / "log.txt")
    return {
        "loss": dict(log["train"]).get(STEPS - 1, math.nan),
        "validation loss": dict(log["val"]).get(STEPS, math.nan),
    }
