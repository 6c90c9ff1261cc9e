"""Reliable files: checksums, atomic writes, locks, free space."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from support.cli import InputError, file_size, in_words, remedy

import numpy as np


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_not_pointer(path: Path) -> None:
    """Raises InputError if the file only says where Git LFS keeps the real one; OSError as `open` does."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
            raise InputError(f"{path}: a Git LFS pointer, not the file; fetch it with `git lfs pull`")


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def write_file(path: Path, write: Callable[[BinaryIO], object], flush: bool = True) -> None:
    """Write atomically: call `write(file)` on a temporary file, flush it to disk, then rename it to `path`.
    The temporary file is this call's own: another process may write to `path` at the same time.

    Without `flush`, it does not wait for the disk, and a power cut may leave an empty file. Raises OSError,
    naming `path`.
    """
    temporary = own_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.strerror is None:  # from a library, with its own message
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def own_name(path: Path) -> Path:
    """A temporary name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder. Windows and many network file systems can't flush a folder, each with an
    error of its own; they are asked for nothing more. Raises OSError where data may be lost."""
    if path.is_dir() and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or errno.errorcode.get(error.errno or 0) in ("EIO", "ENOSPC", "EDQUOT"):
            raise


def try_to_save(folder: Path, flag: str) -> None:
    """Do once in `folder`, the value of `flag`, what a save does: write a file in a new folder, flush both,
    rename the folder. Raises InputError, with the reason, if the file system can't."""
    trial = own_name(folder / "trial")
    renamed = trial.with_suffix(".renamed.tmp")
    try:
        step = "written"
        trial.mkdir()
        write_file(trial / "file", lambda file: file.write(b"trial"))
        flush_to_disk(trial)
        step = "renamed"
        os.rename(trial, renamed)
    except OSError as error:
        what_to_do = (remedy(error) if step == "written" else None) or "choose a folder on another disk"
        raise InputError(
            f"{flag} {folder}: no checkpoint could be saved there, since a folder can't be {step} "
            f"({error.strerror or in_words(error)}); {what_to_do}"
        ) from error
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed job of fineweb.py was writing; the caller holds the folder's lock."""
    for name in ("edufineweb_*.npy*.tmp", "shards*.json*.tmp"):
        for leftover in folder.glob(name):
            leftover.unlink()


def allow_open_files(n: int) -> None:
    """Raise this process's limit of open files by `n`, as far as the system lets it: a memory-mapped file
    counts as open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + n if hard == resource.RLIM_INFINITY else min(soft + n, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def expect_random_reads(mapped: np.ndarray) -> None:
    """Tell the system that a memory-mapped array will be read here and there: it then reads only what is
    asked for. Otherwise it reads far around, and where memory is short, drops that before it is of use."""
    file: mmap.mmap | None = getattr(mapped, "_mmap", None)
    if file and hasattr(mmap, "MADV_RANDOM"):  # Windows has no such call
        file.madvise(mmap.MADV_RANDOM)


def check_disk(folder: Path, needed: float, purpose: str, begun: bool = False) -> str:
    """State in words how many bytes are `needed` in --output_dir, and how many are free. Raises InputError if
    those are fewer. What helps depends on whether the job has `begun`."""
    free = shutil.disk_usage(folder).free
    need = f"needs up to {file_size(needed)} of disk space ({purpose}); {file_size(free)} is free"
    if needed > free:
        remedy = "make room, or move the folder to another disk"
        remedy = remedy if begun else "choose another disk, or set --max_tokens"
        raise InputError(f"--output_dir {folder}: {need}; {remedy}")
    return need


def make_folder(folder: Path, flag: str) -> None:
    """Create `folder`, the value of `flag`, if needed. Raises InputError if that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file, not a folder" if folder.is_file() else error.strerror or str(error)
        if folder.is_symlink() and not os.path.exists(folder):
            reason = "a link to a place that does not exist; is its disk mounted?"
        raise InputError(f"{flag} {folder}: {reason}") from error


def lock_folder(folder: Path, flag: str) -> IO[str]:
    """Lock `folder`, the value of `flag`, and create it if needed.

    The lock is released when the returned file is closed or the process ends, however it ends. Raises
    InputError if another process holds it. Where the file system has no locks, print a note and do without.
    """
    make_folder(folder, flag)
    try:
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the caller holds it
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror or error}") from error
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0x7FFFFFF0)  # beyond the text, which must stay readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or (os.name == "nt" and isinstance(error, PermissionError)):
            file.seek(0)
            raise InputError(f"{folder} is in use by {file.read() or 'another process'}") from error
        print(f"note: {folder} can't be locked ({error.strerror or error}); use it for one job at a time")
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file
