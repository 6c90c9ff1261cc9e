"""
A run's folder: its contents, and how they survive crashes.

    log.txt             one line per event: step, "train", "val" or "hella", value
    run.json            the run's settings and, once it is finished, its results
    status.json         how far it is, its last events and samples, for plot.py watch
    loss.png            its curves
    checkpoint_00250/   a Hugging Face GPT-2 folder with a model card, plus trainer.pt (what --resume needs)
                        and SHA256SUMS
    .lock               held by the process that trains here

Nothing half-written ever has a final name: files and folders are written under a temporary name, flushed to
disk, then renamed. Checksums reveal a checkpoint that is damaged later.

Training waits only while a checkpoint is copied to host memory: a thread writes the copy.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from support.cli import InputError, RunFault, in_words
from support.data.shards import Shards
from support.files import flush_to_disk, lock_folder, sha256, to_json, write_file
from support.machine.device import device_name, free_host_memory, to_host
from support.machine.processes import World
from support.machine.sharding import collect, is_divided, share_out_states
from support.model.huggingface import CARD, list_checkpoints, step_of
from support.run.card import PICTURE, run_card
from support.run.curves import draw_runs, read_log, read_run

import safetensors
import torch
import torch.distributed as dist

SAVE_AT_LEAST_EVERY = 15 * 60  # seconds: the most work that a slow machine may lose
# what a checkpoint of version 1.0 does not say
ONLY_CHOICE = {"optimizer": "adamw", "adamw_lr_ratio": 2.0, "schedule": "cosine", "cooldown": 0.6}
LOG_LINE = re.compile(rb"(\d+) (train|val|hella) \S+\n")


class Model(Protocol):
    """The model to save: a GPT."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def save_pretrained(self, folder: Path, weights: dict[str, torch.Tensor]) -> None: ...


class RunFolder:
    """A run's folder. Only the main process writes to it."""

    def __init__(self, path: Path, is_main: bool, print: Callable[[str], None], keep_every: int = 0):
        self.path, self.is_main, self.print, self.keep_every = path, is_main, print, keep_every
        self.unwritten = b""  # log.txt lines that a full disk has delayed
        self.saved_at = time.monotonic()
        self.writer = ThreadPoolExecutor(1)  # Python ends only when its thread has: an error loses no save
        self.saving: Future[None] | None = None  # the save that the thread was last given
        self.recipe: dict[str, Any] = {}  # all settings that affect the run's numbers
        self.checkpoint: Path | None = None  # to resume from
        self.trainer: dict[str, Any] = {}  # the contents of its trainer.pt
        self.run_id = uuid.uuid4().hex[:8]  # the same after every --resume
        self.interruptions = 0
        self.before: dict[str, Any] = {}  # run.json, of a run that is resumed
        self.facts: dict[str, Any] = {}  # the contents of run.json
        self.samples: tuple[int, list[str]] | None = None  # the latest ones: their step, their texts

    def open(self, resume: bool, recipe: dict[str, Any]) -> int:
        """Create the folder, or find its newest sound checkpoint; returns the step to start at.

        Raises InputError if another process trains in the folder, or if it holds a run that is not to be
        resumed, has another recipe, or has only damaged checkpoints.
        """
        self.recipe = recipe
        begun = self.holds_a_run()
        if begun and not resume:
            raise InputError(
                f"{self.path} already holds a run; continue it with --resume, choose another --log_dir, or "
                "delete the folder to start over"
            )
        self.lock_file = lock_folder(self.path, "--log_dir")  # held until the end
        if begun:
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
                before = read_run(self.path)
                self.run_id, self.interruptions = before["run_id"], before["interruptions"]
                self.before = before
            self.interruptions += 1
        damaged = self.find_checkpoint()
        if damaged and not self.checkpoint:
            raise InputError(
                f"{self.path} has no sound checkpoint, only damaged ones ({', '.join(damaged)}); remove them "
                "to start over, or choose another --log_dir"
            )
        if self.checkpoint:
            compare_recipes(self.path, self.trainer["recipe"], recipe)
        for name in damaged:  # moved aside, so that the step can be saved again
            aside = self.path / f"{name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / name).rename(aside)
        for leftover in self.path.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return self.trainer.get("step", 0)

    def holds_a_run(self) -> bool:
        """Whether there is a run to resume, or to lose. A run stopped before its first step does not count:
        it leaves at most the log lines of its first evaluation."""
        log = self.path / "log.txt"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        harmless = all(LOG_LINE.fullmatch(line) and b" train " not in line for line in lines)
        return bool(list_checkpoints(self.path)) or not harmless or "result" in read_run(self.path)

    def find_checkpoint(self) -> list[str]:
        """Set `checkpoint` and `trainer` to the newest sound checkpoint. Skips damaged ones, printing the
        reason for each, and returns their names."""
        damaged = []
        for folder in reversed(list_checkpoints(self.path)):
            try:
                check_sums(folder)
                trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
                if not trainer.keys() >= {"step", "optimizer", "scaler", "rng", "recipe", "loss"}:
                    raise ValueError("trainer.pt lacks entries")
            except (
                FileNotFoundError,
                ValueError,
                RuntimeError,
                EOFError,
                AttributeError,
                UnpicklingError,
            ) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.print(f"DAMAGED: {folder}: {reason}; skipping it")
                damaged.append(folder.name)
                continue
            self.checkpoint, self.trainer = folder, trainer
            break
        return damaged

    def fitted_before(self, config: dict[str, Any], world: World) -> tuple[int, int] | None:
        """The micro-batch that the interrupted run found, as (rows, chunks of the loss), if it was made on
        the same device, with the same flags that matter for memory."""
        flags = ("dtype", "compile", "recompute", "memory_limit_gb", "micro_batch_size")
        here = [device_name(world.device), world.size, *(config[name] for name in flags)]
        with contextlib.suppress(KeyError, TypeError):  # run.json may be another version's, or damaged
            then = [self.before["device"], self.before["world_size"]]
            then += [self.before["train_config"][name] for name in flags]
            if then == here:
                return int(self.before["micro_batch_size"]), int(self.before["loss_chunks"])
        return None

    def restore(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, first_step: int, world: World
    ) -> None:
        """Restore the training state from the checkpoint, and cut log.txt back to its step.

        Only the main process has read the checkpoint; the others receive the optimizer's moments over the
        network, so hosts need no shared disk.
        """
        self.cut_log(first_step)
        if first_step == 0:
            return
        divided = any(is_divided(p) for p in optimizer.param_groups[0]["params"])
        if divided:
            share_out_states(optimizer, self.trainer.get("optimizer", {}).get("state", {}), world)
        elif world.is_main:
            optimizer.load_state_dict(self.trainer["optimizer"])
        if scaler_state := world.from_main(lambda: self.trainer["scaler"]):  # empty if the scaler was off
            scaler.load_state_dict(scaler_state)
        self.trainer.pop("optimizer", None)  # 8 bytes a parameter that nobody reads again
        torch.set_rng_state(world.from_main(lambda: self.trainer["rng"]))
        if world.size > 1 and not divided:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            names_of = world.from_main(lambda: [list(optimizer.state[p]) for p in parameters])
            for parameter, names in zip(parameters, names_of, strict=True):
                for name in names:
                    like = torch.zeros((), device=parameter.device) if name == "step" else parameter
                    dist.broadcast(optimizer.state[parameter].setdefault(name, torch.zeros_like(like)), src=0)
        self.print(f"resuming at step {first_step} from {self.checkpoint}")

    def cut_log(self, step: int) -> None:
        """Keep only the lines of log.txt for steps before `step`: later steps run again. Lines that a power
        cut damaged are dropped too."""
        if self.is_main:
            log = self.path / "log.txt"
            lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
            found = [match for line in lines if (match := LOG_LINE.fullmatch(line))]
            kept = b"".join(match[0] for match in found if int(match[1]) < step)
            write_file(log, lambda file: file.write(kept))

    def event(self, step: int, kind: str, value: str) -> None:
        """Add a line to log.txt: step, "train", "val" or "hella", value. A full disk only delays it."""
        if self.is_main:
            self.unwritten += f"{step} {kind} {value}\n".encode()
            with contextlib.suppress(OSError):
                self.write_log()

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace status.json, without waiting for the disk. On a full disk the old one stays."""
        with contextlib.suppress(OSError):
            text = json.dumps(status).encode()
            write_file(self.path / "status.json", lambda file: file.write(text), flush=False)

    def write_log(self) -> None:
        """Append the unwritten lines to log.txt: all of them, or none and an OSError."""
        with open(self.path / "log.txt", "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if self.unwritten and file.write(self.unwritten) < len(self.unwritten):
                    raise OSError("log.txt could not be written")
            except OSError:
                file.truncate(size)  # no half lines
                raise
        self.unwritten = b""

    def describe(self, facts: dict[str, Any]) -> None:
        """Write run.json."""
        self.facts = facts
        if self.is_main:
            write_file(self.path / "run.json", lambda file: file.write(to_json(facts).encode()))

    def draw(self) -> None:
        """Redraw loss.png. If that fails, print the reason and carry on."""
        if self.is_main:
            try:
                draw_runs([self.path], self.path / PICTURE)
            except Exception as error:
                self.print(f"loss.png could not be drawn: {error}")

    def save(
        self,
        step: int,
        raw_model: Model,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        state: dict[str, Any],
    ) -> None:
        """Save checkpoint_<step>: a Hugging Face folder, trainer.pt with all that --resume needs (tensors and
        plain values, including `state`), a model card, and SHA256SUMS.

        Returns as soon as all of it is copied to host memory; a thread writes the copy. First waits for the
        save before. If a save fails (a full disk), prints the reason, leaves nothing behind, and keeps the
        earlier checkpoints.
        """
        self.finish_save()
        self.saved_at = time.monotonic()
        weights: dict[str, torch.Tensor] = dict(raw_model.named_parameters())
        trainer = {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                   **state, "rng": torch.get_rng_state(), "recipe": self.recipe}  # fmt: skip
        divided = any(map(is_divided, weights.values()))
        if divided:
            weights, trainer = collect((weights, trainer), keep=self.is_main)
        if not self.is_main:
            return
        tensors = [*weights.values(), *(t for s in optimizer.state.values() for t in s.values())]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self.failure_reported(step):
            needed = size + 10_000_000
            if (free := shutil.disk_usage(self.path).free) < needed:
                raise OSError(f"{free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB are needed")
            self.write_log()
            card = self.make_card(step, state)
            # Twice the copy: the thread needs memory too, to transpose, and training may still grow. If less
            # is free, training waits while its own tensors are written: the system kills what takes too much.
            if not divided and free_host_memory() < 2 * size:
                self.write_checkpoint(step, raw_model, weights, trainer, card)
            else:
                if not divided:
                    weights, trainer = to_host(weights), to_host(trainer)
                self.saving = self.writer.submit(
                    self.write_checkpoint, step, raw_model, weights, trainer, card
                )

    @contextlib.contextmanager
    def failure_reported(self, step: int) -> Iterator[None]:
        """If what is done inside to save `step` fails: print the reason and leave nothing behind."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError, safetensors.SafetensorError) as error:
            shutil.rmtree(self.path / f"checkpoint_{step:05d}.tmp", ignore_errors=True)
            self.print(f"step {step}: NOT SAVED: {in_words(error)}; the checkpoints before it are intact")

    def make_card(self, step: int, state: dict[str, Any]) -> dict[str, bytes]:
        """The model card and its picture, as they are now: file name to contents. If that fails, print the
        reason: no checkpoint is lost for want of a card."""
        if not self.facts:
            return {}
        try:
            picture = self.path / PICTURE
            files = {PICTURE: picture.read_bytes()} if picture.exists() else {}
            events = read_log(self.path / "log.txt")
            text = run_card(self.facts, step, state.get("spent", {}), events, self.samples, bool(files))
            return {CARD: text.encode(), **files}
        except Exception as error:
            self.print(f"step {step}: the model card could not be written: {error}")
            return {}

    def write_checkpoint(
        self,
        step: int,
        raw_model: Model,
        weights: dict[str, torch.Tensor],
        trainer: dict[str, Any],
        card: dict[str, bytes],
    ) -> None:
        """Write checkpoint_<step>; it is complete on disk before it gets its name. Then delete older ones,
        except the last two and those at multiples of `keep_every` steps."""
        final = self.path / f"checkpoint_{step:05d}"
        temporary = self.path / f"{final.name}.tmp"
        with self.failure_reported(step):
            raw_model.save_pretrained(temporary, weights)
            for name, contents in card.items():
                (temporary / name).write_bytes(contents)
            torch.save(trainer, temporary / "trainer.pt")
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
            (temporary / "SHA256SUMS").write_text(sums, encoding="utf-8", newline="\n")
            for path in (*temporary.iterdir(), temporary, self.path / "log.txt"):
                flush_to_disk(path)
            os.rename(temporary, final)
            flush_to_disk(self.path)
            for old in list_checkpoints(self.path)[:-2]:
                if not self.keep_every or step_of(old) % self.keep_every:
                    shutil.rmtree(old, ignore_errors=True)
            self.print(f"step {step}: saved {final} in {time.monotonic() - self.saved_at:.1f} s")

    def finish_save(self) -> None:
        """Wait until the save that the thread was given is complete, or has failed."""
        if self.saving:
            self.saving.result()  # raises what nobody expected

    def overdue(self) -> bool:
        """Whether the last attempt to save was more than SAVE_AT_LEAST_EVERY seconds ago. Only the main
        process says so: all have to save at the same step."""
        return self.is_main and time.monotonic() - self.saved_at > SAVE_AT_LEAST_EVERY

    def require(self, step: int) -> None:
        """Wait for the save in flight. Raises RunFault unless `step` has a checkpoint: the end of a run must
        not be lost silently."""
        self.finish_save()
        if not (self.path / f"checkpoint_{step:05d}").exists():
            raise RunFault(
                f"the end of the run, step {step}, could not be saved; free some disk space, then "
                "run it again with --resume"
            )


def check_sums(folder: Path) -> None:
    """Raises ValueError or OSError, naming the file, unless every file matches SHA256SUMS. The model card
    and its picture may change: their reader may edit them."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    expected = {name: digest for name, digest in expected.items() if name not in (CARD, PICTURE)}
    for name in ("model.safetensors", "config.json", "trainer.pt", *expected):
        if name not in expected or sha256(folder / name) != expected[name]:
            raise ValueError(f"{name} is not what SHA256SUMS says")


def recipe_of(config: Any, model_config: Any, shards: Shards) -> dict[str, Any]:
    """All that decides a run's numbers, as plain values. `config` and `model_config` are train_gpt2.py's
    dataclasses. What is missing here (processes, micro-batch, precision, intervals) may differ when a run is
    resumed."""
    names = ("init_from", "sequence_length", "total_batch_size", "max_steps", "warmup_steps", "max_lr",
             "weight_decay", "grad_clip", "val_tokens", "seed", "shuffle", *ONLY_CHOICE)  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return {**values, **asdict(model_config), "data": shards.fingerprint}


def compare_recipes(log_dir: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError, listing every difference, unless the run in `log_dir` has the same recipe."""
    then = {**ONLY_CHOICE, **then}
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        changes = "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in different)
        hint = ""
        if "max_steps" in different:
            hint += (
                f"; to train longer, start a new run: your other flags, --init_from {log_dir} --log_dir NEW"
            )
        if "data" in different:
            hint += (
                "; data is the fingerprint of the shards: they are others, or shards.json was written or "
                "removed since"
            )
        raise InputError(f"{log_dir} can't be resumed with another recipe: {changes}{hint}")


def versions() -> dict[str, str | None]:
    """The versions of Python and PyTorch, and this repository's commit if git knows it."""
    commit = None
    if git := shutil.which("git"):
        command = [git, "rev-parse", "HEAD"]
        here = Path(__file__).parent
        commit = subprocess.run(command, cwd=here, capture_output=True, check=False).stdout.decode().strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}
