"""
A run's folder: its contents, and how they survive crashes.

    log.txt             one line per event: step, kind, value; kinds are "train", "val", "hella", "lr", ...
    run.json            the run's settings and, once it is finished, its results
    status.json         how far it is, its last events and samples, for plot.py watch
    loss.png            its curves
    checkpoint_00250/   a Hugging Face GPT-2 folder with a model card, plus trainer.pt (what --resume needs)
                        and SHA256SUMS
    .lock               held by the process that trains here

Nothing half-written ever has a final name: files and folders are written under a temporary name, flushed to
disk, then renamed. Checksums reveal a checkpoint that is damaged later.

Training waits only while a checkpoint is copied to host memory: a thread writes the copy. Without memory for
a copy, training waits until all is written.
"""

import contextlib
import errno
import io
import json
import math
import operator
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from support.cli import InputError, RunFault, advice, in_words
from support.data import order
from support.data.shards import Shards
from support.files import flush_to_disk, lock_folder, sha256, to_json, try_to_save, write_file
from support.machine.device import (
    device_name,
    free_host_memory,
    is_out_of_memory,
    release_pinned_memory,
    to_host,
)
from support.machine.processes import World
from support.machine.sharding import collect, is_sharded, shard_states
from support.model.huggingface import CARD, list_checkpoints, step_of
from support.run.card import PICTURE, run_card
from support.run.curves import draw_runs, measured_alike, read_event, read_log, read_run, read_status

import safetensors
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from train_gpt2 import GPT, GPTConfig, TrainConfig

MAY_BE_EDITED = (CARD, PICTURE)  # a checkpoint's files without a sum; before version 1.2 they had one
SAVE_AT_LEAST_EVERY = 15 * 60  # seconds of work that a slow machine may lose
# Reading a damaged checkpoint raises one of these.
DAMAGE = (FileNotFoundError, ValueError, RuntimeError, EOFError, AttributeError, UnpicklingError)
PLAN = ("max_steps", "cooldown")  # settings that may change before they have changed a learning rate
HINTS = {  # advice for settings that differ
    "plan": "{rates}; to train longer, start a new run: your other flags, --init_from {path} --log_dir NEW",
    "data": "data is the fingerprint of the shards: others, other shares, or shards.json has come or gone",
    "order_of_tokens": "the order of tokens has changed since: resume with the version that began the run",
}


class RunFolder:
    """A run's folder. Every process has one, but only the main process writes."""

    def __init__(self, config: "TrainConfig", world: World, print: Callable[[str], None]):
        self.config, self.world, self.print, self.path = config, world, print, config.log_dir
        self.unwritten = b""  # log.txt lines that a full disk has delayed
        self.saved_at = time.monotonic()
        self.writer = ThreadPoolExecutor(1)  # Python waits for its thread at exit: an error loses no save
        self.saving: Future[None] | None = None  # the save that the thread was last given
        self.failed: BaseException | None = None  # why the last save that failed did so
        self.shards: Shards  # what the run trains on; `open` sets it
        self.recipe: dict[str, Any] = {}  # all settings that decide the run's numbers
        self.defaults: dict[str, Any] = {}  # the recipe of a default run, without the data
        self.checkpoint: Path | None = None  # where to resume; only the main process knows
        self.trainer: dict[str, Any] = {}  # the contents of the checkpoint's trainer.pt
        self.first_step = 0
        self.run_id = uuid.uuid4().hex[:8]  # the same after every --resume
        self.interruptions = 0
        self.plans: list[dict[str, Any]] = []  # changes of the run's length: at which step, and to what
        self.before: dict[str, Any] = {}  # the interrupted run's run.json
        self.facts: dict[str, Any] = {}  # the contents of run.json
        self.saved = False  # whether the run has ever had a checkpoint
        self.samples: tuple[int, list[str]] | None = None  # step and texts of the latest samples

    # ------------------------------------------------------------------ opening

    def open(
        self, model_config: "GPTConfig", shards: Shards, get_lr: Callable[[int, "TrainConfig"], float]
    ) -> int:
        """Create the folder, or find its newest sound checkpoint; returns the step to start at. The length of
        a run may change while `get_lr`, of a step and a configuration, is the same for all steps done.

        Raises InputError, in every process, if another process trains in the folder, or if it holds a run
        that is not to be resumed, has another recipe, or has only damaged checkpoints.
        """
        self.shards, self.get_lr = shards, get_lr
        tokens = {
            "data": shards.fingerprint,
            "order_of_tokens": order.VERSION if self.config.shuffle else 1,  # the tutorial's has no versions
        }
        self.recipe = self.config.recipe_fields() | asdict(model_config) | tokens
        self.defaults = type(self.config)().recipe_fields() | asdict(type(model_config)())
        self.first_step = self.world.from_main(self.open_here)
        self.world.from_main(lambda: try_to_save(self.path, "--log_dir"))
        return self.first_step

    def open_here(self) -> int:
        """`open`, in the main process."""
        for name in self.look(lock=True):  # make room: the run will save these steps again
            aside = self.path / f"{name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / name).rename(aside)
        # A run's own, which was killed while it wrote:
        for name in ("checkpoint_*", "trial.*", "log.txt.*", "run.json.*", "status.json.*", "loss.png.*"):
            for leftover in self.path.glob(f"{name}.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if self.interruptions and "result" not in self.before and (status := read_status(self.path)):
            self.write_status(status | {"time": time.time(), "ended": False, "task": "starting"})
        return self.trainer.get("step", 0)

    def look(self, lock: bool) -> list[str]:
        """Find the newest sound checkpoint; returns the names of damaged ones. Without `lock`, nothing in the
        folder changes. Raises InputError as `open` does."""
        begun = self.holds_a_run()
        if begun and not self.config.resume:
            raise InputError(
                f"{self.path} already holds a run; continue it with --resume, choose another --log_dir, or "
                "delete the folder to start over"
            )
        if lock:
            self.lock_file = lock_folder(self.path, "--log_dir")  # held until the end
        if begun:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # run.json may be damaged
                before = read_run(self.path)
                self.run_id, self.interruptions = before["run_id"], before["interruptions"]
                self.plans = before.get("plans", [])
                self.before = before
            self.interruptions += 1
        damaged = self.find_checkpoint()
        if damaged and not self.checkpoint:
            raise InputError(
                f"{self.path} has no sound checkpoint, only damaged ones ({', '.join(damaged)}); delete the "
                "folder to start over, or choose another --log_dir"
            )
        if self.checkpoint:
            self.compare_recipes(self.trainer["recipe"], self.trainer.get("step", 0))
        elif begun:
            self.check_nothing_is_lost()
        return damaged

    def read_lines(self) -> list[bytes]:
        """The lines of log.txt with their ends; none if there is no such file."""
        log = self.path / "log.txt"
        return io.BytesIO(log.read_bytes()).readlines() if log.exists() else []  # only "\n" ends a line

    def holds_a_run(self) -> bool:
        """Whether there is a run to resume, or to lose. A run stopped before its first step does not count:
        it leaves at most the log lines of its first evaluation."""
        events = [read_event(line) for line in self.read_lines()]
        harmless = all(event and event[0] == 0 and event[1] != "train" for event in events)
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
            except DAMAGE as error:
                if is_out_of_memory(error):
                    raise
                self.print(f"DAMAGED: {folder}: {in_words(error).splitlines()[0]}; skipping it")
                damaged.append(folder.name)
            else:
                self.checkpoint, self.trainer, self.saved = folder, trainer, True
                break
        return damaged

    def check_nothing_is_lost(self) -> None:
        """Raises InputError unless the run in the folder, which has no checkpoint, died before its first
        save. Only then may its log be cut back to nothing."""
        steps = [event[0] for line in self.read_lines() if (event := read_event(line))]
        never_saves = self.before.get("train_config", {}).get("checkpoint_every") == 0
        done = "result" in self.before or (never_saves and max(steps, default=0) > 0)
        if done or self.before.get("saved", True):  # an older version did not record that
            raise InputError(
                f"{self.path} holds the log of a run but no checkpoint to continue it from, and a new run "
                "would erase that log; choose another --log_dir, or delete the folder to start over"
            )
        self.compare_recipes(self.before["recipe"], step=0)

    def compare_recipes(self, before: dict[str, Any], step: int) -> None:
        """Raises InputError, listing every difference, unless the run in the folder, now at `step`, had the
        same recipe `before`. What may change by now is not compared; a setting that is not known there had
        its default, and the order of tokens, its first version."""
        before, now = self.defaults | {"order_of_tokens": 1} | before, self.recipe
        may_change = asdict(self.config).keys() - now.keys()
        names = [name for name in before | now if name not in may_change]
        different = [name for name in names if before.get(name) != now.get(name)]
        changes = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in different]
        plan = {name: before[name] for name in different if name in PLAN}
        self.plans = [entry for entry in self.plans if entry["step"] < step]  # later ones have been undone
        if self.config.max_steps < step:
            raise InputError(
                f"--max_steps {self.config.max_steps}: the run in {self.path} has done {step}; name at "
                "least as many, or begin another run with another --log_dir"
            )
        if plan and len(plan) == len(different):
            earlier = replace(self.config, **plan)
            if all(self.get_lr(i, earlier) == self.get_lr(i, self.config) for i in range(step)):
                if step:
                    self.plans.append({"step": step, **{name: now[name] for name in PLAN}})
                    self.print(f"a new plan from step {step} on: {'; '.join(changes)}")
                return
        if different:
            rates = "a cosine's rates depend on its end from the first step on"
            if now.get("schedule") != "cosine":
                rates = f"the learning rates of the {step} steps done would have been others"
            hints = [HINTS[name] for name in different if name in HINTS] + [HINTS["plan"]] * bool(plan)
            text = "; ".join(changes + [hint.format(path=self.path, rates=rates) for hint in hints])
            raise InputError(f"{self.path} can't be resumed with another recipe: {text}")

    def fitted_before(self) -> tuple[int, int] | None:
        """The micro-batch that the interrupted run found, as (rows, chunks of the loss), if it was made on
        the same device, with the same flags that matter for memory."""
        flags = ("dtype", "compile", "shard", "recompute", "memory_limit_gb", "micro_batch_size")
        now = [device_name(self.world.device), self.world.size, *(getattr(self.config, f) for f in flags)]
        found = None
        with contextlib.suppress(KeyError, TypeError):  # run.json may be another version's, or damaged
            device, size, then = (self.before[name] for name in ("device", "world_size", "train_config"))
            if [device, size, *(then[flag] for flag in flags)] == now:
                found = int(self.before["micro_batch_size"]), int(self.before["loss_chunks"])
        return self.world.from_main(lambda: found)

    def restore(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Restore the training state from the checkpoint, and cut log.txt back to its step.

        Only the main process has read the checkpoint; the others receive the optimizer's moments over the
        network, so hosts need no shared disk.
        """
        self.cut_log(self.first_step)
        if self.first_step == 0:
            return
        world, parameters = self.world, [p for group in optimizer.param_groups for p in group["params"]]
        if any(map(is_sharded, parameters)):
            shard_states(optimizer, self.trainer.get("optimizer", {}).get("state", {}), world)
        else:
            if world.is_main:
                for group in self.trainer["optimizer"]["param_groups"]:
                    if "fused" in group:  # this device decides, not the one that saved
                        group["fused"] = optimizer.defaults["fused"]
                optimizer.load_state_dict(self.trainer["optimizer"])
            if world.size > 1:
                broadcast_states(optimizer, parameters, world)
        if scaler_state := world.from_main(lambda: self.trainer["scaler"]):  # empty if the scaler was off
            scaler.load_state_dict(scaler_state)
        if self.plans and self.plans[-1]["step"] == self.first_step:
            self.append(self.first_step, {name: str(self.plans[-1][name]) for name in PLAN})
        self.trainer.pop("optimizer", None)  # frees 8 bytes a parameter
        torch.set_rng_state(world.from_main(lambda: self.trainer["rng"]))
        self.print(f"resuming at step {self.first_step} from {self.checkpoint}")

    # ------------------------------------------------------------------ log.txt, run.json, status.json

    def cut_log(self, step: int) -> None:
        """Keep only the lines of log.txt for steps before `step`: later steps run again. What a power cut
        damaged is dropped too: a line without an end, and zeros. Any other line is somebody's, and stays."""
        if self.world.is_main:
            kept = []
            for line in self.read_lines():
                event = read_event(line)
                damaged = b"\0" in line or not line.endswith(b"\n") or line.isspace()
                if not damaged and (event is None or event[0] < step):
                    kept.append(line)
            write_file(self.path / "log.txt", lambda file: file.write(b"".join(kept)))

    def append(self, step: int, values: dict[str, str]) -> None:
        """Add a line to log.txt for each value: step, kind, value. A full disk only delays them."""
        if self.world.is_main:
            self.unwritten += "".join(f"{step} {kind} {value}\n" for kind, value in values.items()).encode()
            with contextlib.suppress(OSError):
                self.write_log()

    def write_log(self) -> None:
        """Append the unwritten lines to log.txt: all of them, or none and an OSError."""
        with open(self.path / "log.txt", "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if self.unwritten and (n := file.write(self.unwritten)) < len(self.unwritten):
                    file.write(self.unwritten[n:])  # raises the reason
                    raise OSError("log.txt could not be written")
            except OSError:
                file.truncate(size)  # leave no half line
                raise
        self.unwritten = b""

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write run.json: the facts of the run, and what --resume asks of it."""
        self.facts = facts = facts | {"recipe": self.recipe, "saved": self.saved}
        if self.world.is_main:
            write_file(self.path / "run.json", lambda file: file.write(to_json(facts).encode()))

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace status.json, without waiting for the disk. On a full disk the old one stays."""
        with contextlib.suppress(OSError):
            text = json.dumps(status).encode()
            write_file(self.path / "status.json", lambda file: file.write(text), flush=False)

    def draw(self) -> None:
        """Redraw loss.png. If that fails, print the reason and carry on."""
        if self.world.is_main:
            try:
                draw_runs([self.path], self.path / PICTURE)
            except Exception as error:
                self.print(f"loss.png could not be drawn: {error}")

    # ------------------------------------------------------------------ checkpoints

    def save(
        self,
        step: int,
        raw_model: "GPT",
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        **state: Any,
    ) -> None:
        """Save checkpoint_<step>: a Hugging Face folder, trainer.pt with all that --resume needs (tensors and
        plain values, including `state`), a model card, and SHA256SUMS.

        Returns as soon as all of it is copied to host memory; a thread writes the copy. Where there is no
        memory for a copy, returns when all is written. First waits for the save before. If a save fails (a
        full disk), prints the reason, leaves nothing behind, and keeps the earlier checkpoints.
        """
        self.finish_save()
        release_pinned_memory(self.world.device)
        self.saved_at = time.monotonic()
        weights: dict[str, torch.Tensor] = dict(raw_model.named_parameters())
        trainer = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            **state,
            "rng": torch.get_rng_state(),
            "recipe": self.recipe,
        }
        sharded = any(map(is_sharded, weights.values()))
        if sharded:
            weights, trainer = collect((weights, trainer), keep=self.world.is_main)
        size = sum(t.nbytes for t in tree_leaves((weights, trainer)) if isinstance(t, torch.Tensor))
        # A copy needs twice its size: the thread transposes, and training may still grow. Where less is free,
        # training waits while its own tensors are written: the system kills a process that takes too much.
        in_place = not sharded and self.world.from_main(lambda: free_host_memory() < 2 * size)
        if self.world.is_main:
            with self.failure_reported(step):
                needed = size + 10_000_000
                if (free := shutil.disk_usage(self.path).free) < needed:
                    reason = f"{free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB are needed"
                    raise OSError(errno.ENOSPC, reason)
                self.write_log()
                card = self.make_card(step, state)
                if not sharded and not in_place:
                    weights, trainer = to_host((weights, trainer))
                self.saving = self.writer.submit(
                    self.write_checkpoint, step, raw_model, weights, trainer, card=card
                )
        if in_place:
            self.finish_save()

    @contextlib.contextmanager
    def failure_reported(self, step: int) -> Iterator[None]:
        """If what is done inside to save `step` fails: print the reason and leave nothing behind."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError, safetensors.SafetensorError) as caught:
            reason = caught.__context__  # of PyTorch's error, which is about its own file format
            error = reason if isinstance(reason, OSError) and isinstance(caught, RuntimeError) else caught
            self.failed = error
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
            log = read_log(self.path / "log.txt")
            card = run_card(self.facts, step, state["spent"], log, samples=self.samples, picture=bool(files))
            return {CARD: card.encode(), **files}
        except Exception as error:
            self.print(f"step {step}: the model card could not be written: {error}")
            return {}

    def renew_card(self, step: int, state: dict[str, Any]) -> None:
        """Write the card of checkpoint_<step> again: a run that was stopped in its last evaluation had saved
        before that."""
        folder = self.path / f"checkpoint_{step:05d}"
        if self.world.is_main and folder.exists():
            for name, contents in self.make_card(step, state).items():
                write_file(folder / name, operator.methodcaller("write", contents))

    def write_checkpoint(
        self,
        step: int,
        raw_model: "GPT",
        weights: dict[str, torch.Tensor],
        trainer: dict[str, Any],
        card: dict[str, bytes],
    ) -> None:
        """Write checkpoint_<step>; it is complete on disk before it gets its name. Then delete older ones."""
        final = self.path / f"checkpoint_{step:05d}"
        temporary = self.path / f"{final.name}.tmp"
        with self.failure_reported(step):
            raw_model.save_pretrained(temporary, weights)
            for name, contents in card.items():
                (temporary / name).write_bytes(contents)
            with open(temporary / "trainer.pt", "wb") as file:  # PyTorch's own would not tell why it failed
                torch.save(trainer, file)
            files = [file for file in sorted(temporary.iterdir()) if file.name not in MAY_BE_EDITED]
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
            (temporary / "SHA256SUMS").write_text(sums, encoding="utf-8", newline="\n")
            for path in (*temporary.iterdir(), temporary, self.path / "log.txt"):
                flush_to_disk(path)
            os.rename(temporary, final)
            flush_to_disk(self.path)
            self.print(f"step {step}: saved {final} in {time.monotonic() - self.saved_at:.1f} s")
            self.delete_old_checkpoints()
        if final.exists() and self.facts and not self.saved:
            self.saved = True
            try:
                self.write_facts(self.facts)
            except OSError:  # the next save tries again
                self.saved = False

    def delete_old_checkpoints(self) -> None:
        """Delete all checkpoints except the last two, the best, and those at multiples of --keep_every."""
        with contextlib.suppress(InputError, OSError):  # a log that can't be read: then all stay
            best, every = self.best_checkpoint()[0], self.config.keep_every
            for old in list_checkpoints(self.path)[:-2]:
                if old != best and (not every or step_of(old) % every):
                    shutil.rmtree(old, ignore_errors=True)

    def best_checkpoint(self) -> tuple[Path | None, float]:
        """The checkpoint at whose step the log has the lowest validation loss, of those on as many tokens as
        now, and that loss; None and nan without one."""
        folders = list_checkpoints(self.path)
        losses = measured_alike(self.facts, read_log(self.path / "log.txt"), "val") if folders else {}
        measured = [folder for folder in folders if step_of(folder) in losses]
        best = min(measured, key=lambda folder: losses[step_of(folder)], default=None)
        return best, losses[step_of(best)] if best else math.nan

    def finish_save(self) -> None:
        """Wait, in every process, until the save that the thread was given is complete or has failed. The
        main process answers every second: the others give up on one that is silent for --timeout_minutes."""

        def is_finished() -> bool:
            if self.saving and wait([self.saving], timeout=1).done:
                self.saving.result()  # raises an error that nobody expected
            return not self.saving or self.saving.done()

        while not self.world.from_main(is_finished):
            pass

    def overdue(self) -> bool:
        """Whether the last attempt to save was more than SAVE_AT_LEAST_EVERY seconds ago. Only the main
        process says so: all have to save at the same step."""
        return self.world.is_main and time.monotonic() - self.saved_at > SAVE_AT_LEAST_EVERY

    def wait_for_save(self, step: int) -> None:
        """Wait for the save in flight. Raises RunFault, in every process, unless `step` has a checkpoint: the
        end of a run must not be lost silently."""
        self.finish_save()
        saved, reason, what_to_do = self.world.from_main(
            lambda: (
                (self.path / f"checkpoint_{step:05d}").exists(),
                in_words(self.failed) if self.failed else "the checkpoint is gone",
                advice(self.failed),
            )
        )
        if not saved:
            raise RunFault(
                f"the end of the run, step {step}, could not be saved ({reason}); {what_to_do}, then run it "
                "again with --resume"
            )


def broadcast_states(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], world: World
) -> None:
    """Give every process the main process's optimizer state: tensors of a parameter's shape, and scalars."""
    states = [{name: t.dim() for name, t in optimizer.state[p].items() if t is not None} for p in parameters]
    for parameter, dims in zip(parameters, world.from_main(lambda: states), strict=True):
        for name, dim in dims.items():
            like = parameter if dim else torch.zeros((), device=parameter.device)
            dist.broadcast(optimizer.state[parameter].setdefault(name, torch.zeros_like(like)), src=0)


def check_sums(folder: Path) -> None:
    """Raises ValueError or OSError, naming the file, unless every file in SHA256SUMS matches its sum."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("  ") for line in lines)
    expected = {name: digest for digest, name in pairs if name not in MAY_BE_EDITED}
    for name in ("model.safetensors", "config.json", "trainer.pt", *expected):
        if name not in expected or sha256(folder / name) != expected[name]:
            raise ValueError(f"{name} is not what SHA256SUMS says")


def versions() -> dict[str, str | None]:
    """The versions of Python and PyTorch, and this repository's commit if git knows it, with ", with changes"
    if the files differ from it."""

    def ask_git(*command: str) -> str:
        here = Path(__file__).parent
        with contextlib.suppress(OSError):  # there is no git
            done = subprocess.run(
                ["git", *command], cwd=here, capture_output=True, encoding="utf-8", check=False
            )
            return "" if done.returncode else done.stdout.strip()
        return ""

    commit = None
    if ask_git("ls-files", "--error-unmatch", __file__):  # else this repository is a folder in another one
        commit = ask_git("rev-parse", "--verify", "--quiet", "HEAD")
        commit += ", with changes" if ask_git("status", "--porcelain", "--untracked-files=no") else ""
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}
