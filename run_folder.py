"""
The folder of a run: what is in it, and how it survives.

    log.txt             one line per event: step, "train", "val" or "hella", value
    run.json            what the run was made with
    loss.png            its curves
    checkpoint_00250/   a Hugging Face GPT-2 folder, plus trainer.pt (what --resume needs) and SHA256SUMS
    .lock               held by the process that trains here

Nothing half-written is ever found under a final name: files and folders are written under a temporary name,
flushed to disk, then renamed. A checkpoint that is damaged later is recognised by its sums.
"""

import os
import pickle
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch

import plot
from fineweb import InputError, sha256, to_json, write_file


class RunFolder:
    """The folder of a run: log.txt, run.json, loss.png and checkpoints. Only the main process writes."""

    def __init__(self, path: Path, is_main: bool, say: Callable[[str], None]):
        self.path, self.is_main, self.say = path, is_main, say
        self.unwritten = ""  # lines of log.txt that a full disk refused
        self.saved_at = time.monotonic()

    def claim(self, resume: bool) -> None:
        """Make the folder and lock it; the lock ends with the process, however it ends.

        Raises InputError when another process trains in it, or it holds a run that is not to be resumed.
        """
        if not self.is_main:
            return
        if not resume and ((self.path / "log.txt").exists() or list_checkpoints(self.path)):
            raise InputError(
                f"{self.path} already holds a run; go on with --resume, or choose another --log_dir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
        except OSError as error:
            raise InputError(f"--log_dir {self.path}: {error.strerror}") from error
        try:
            lock_or_raise(self.lock_file)
        except OSError as error:
            self.lock_file.seek(0)
            raise InputError(
                f"{self.path} is in use by {self.lock_file.read() or 'another process'}"
            ) from error
        self.lock_file.truncate(0)
        self.lock_file.write(f"process {os.getpid()} on {platform.node()}")
        self.lock_file.flush()
        for leftover in self.path.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def newest_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest sound checkpoint and the contents of its trainer.pt; None and {} where there is none.
        Damaged ones are named and put aside."""
        for folder in reversed(list_checkpoints(self.path) if self.is_main else []):
            try:
                check_sums(folder)
                trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
                if not trainer.keys() >= {"step", "optimizer", "scaler", "rng", "recipe", "loss"}:
                    raise ValueError("trainer.pt lacks entries")
                return folder, trainer
            except (
                OSError,
                ValueError,
                RuntimeError,
                EOFError,
                AttributeError,
                pickle.UnpicklingError,
            ) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                aside = folder.with_name(f"{folder.name}.damaged")
                self.say(
                    f"DAMAGED: {folder}: {reason}; it is now {aside.name}, and the one before it is used"
                )
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        return None, {}

    def cut_log(self, step: int) -> None:
        """Keep what log.txt says of the steps before `step`: they are not run again, the others are."""
        if not self.is_main:
            return
        log, kept = self.path / "log.txt", ""
        if log.exists():
            whole = [
                line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
            ]
            kept = "".join(line for line in whole if int(line.split()[0]) < step)
        write_file(log, lambda file: file.write(kept.encode()))

    def event(self, step: int, kind: str, value: str) -> None:
        """One line for log.txt: step, "train", "val" or "hella", value. A full disk only delays it."""
        if not self.is_main:
            return
        self.unwritten += f"{step} {kind} {value}\n"
        with open(self.path / "log.txt", "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(self.unwritten.encode()) == len(self.unwritten):
                    self.unwritten = ""
                    return
            except OSError:
                pass
            file.truncate(size)  # no half lines

    def describe(self, facts: dict[str, Any]) -> None:
        """Write run.json."""
        if self.is_main:
            write_file(self.path / "run.json", lambda file: file.write(to_json(facts).encode()))

    def draw(self) -> None:
        """loss.png, redrawn. A picture is never worth a run: if it fails, that is said."""
        if self.is_main:
            try:
                plot.draw_runs([self.path], self.path / "loss.png")
            except (OSError, InputError) as error:
                self.say(f"loss.png could not be drawn: {error}")

    def save(self, step: int, raw_model: Any, trainer: dict[str, Any], keep_every: int) -> bool:
        """Write checkpoint_<step>: a Hugging Face folder, plus `trainer` (tensors and plain values) as
        trainer.pt, plus SHA256SUMS. It is complete on disk before it gets its name. Older ones go, but for
        the last two and every `keep_every` steps.

        Returns whether it worked. If not (a full disk), nothing is left of it, the reason is said, and the
        checkpoints before it are as they were.
        """
        final = self.path / f"checkpoint_{step:05d}"
        temporary = self.path / f"{final.name}.tmp"
        self.saved_at = time.monotonic()
        try:
            tensors = [
                *raw_model.parameters(),
                *(t for s in trainer["optimizer"]["state"].values() for t in s.values()),
            ]
            needed = sum(t.numel() * t.element_size() for t in tensors) + 10_000_000
            if (free := shutil.disk_usage(self.path).free) < needed:
                raise OSError(f"{free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB are needed")
            raw_model.save_pretrained(temporary)
            torch.save({"step": step, **trainer}, temporary / "trainer.pt")
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
            (temporary / "SHA256SUMS").write_text(sums)
            for path in (*temporary.iterdir(), temporary, self.path / "log.txt"):
                flush_to_disk(path)
            os.rename(temporary, final)
            flush_to_disk(self.path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.say(f"step {step}: NOT SAVED: {error}; the checkpoints before it are intact")
            return False
        for old in list_checkpoints(self.path)[:-2]:
            if not keep_every or step_of(old) % keep_every:
                shutil.rmtree(old)
        self.say(f"step {step}: saved {final} in {time.monotonic() - self.saved_at:.1f} s")
        return True


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint_"))


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in log_dir.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdigit()]
    return sorted(found, key=step_of)


def check_sums(folder: Path) -> None:
    """Raises ValueError or OSError, naming the file, unless every file is what SHA256SUMS says."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name in ("model.safetensors", "config.json", "trainer.pt", *expected):
        if name not in expected or sha256(folder / name) != expected[name]:
            raise ValueError(f"{name} is not what SHA256SUMS says")


def flush_to_disk(path: Path) -> None:
    """fsync a file or, where the system can (not on Windows), a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_or_raise(file: Any) -> None:
    """Lock an open file for this process; OSError if another holds the lock."""
    if os.name == "nt":
        import msvcrt

        file.seek(0x7FFFFFF0)  # beyond the text, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def compare_recipes(log_dir: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError, listing every difference, unless the run in `log_dir` goes on as it began."""
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        changes = "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in different)
        raise InputError(f"{log_dir} can't be resumed with another recipe: {changes}")


def versions() -> dict[str, str | None]:
    """What the run was made with: Python, PyTorch, and this repository's commit where git knows it."""
    git = shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent,
    capture_output=True,
                                    text=True, check=False).stdout.strip()  # fmt: skip
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}
