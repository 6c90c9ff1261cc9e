"""Reliable files: checksums, atomic writes, locks, free space."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from support.cli import InputError, file_size


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

    Without `flush`, it does not wait for the disk, and a power cut may leave an empty file. Raises OSError,
    naming `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
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


def flush_to_disk(path: Path) -> None:
    """fsync a file or, except on Windows, a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk(folder: Path, needed: float, purpose: str) -> str:
    """State in words how many bytes are `needed` in --output_dir, and how many are free. Raises InputError if
    those are fewer."""
    free = shutil.disk_usage(folder).free
    need = f"needs up to {file_size(needed)} of disk space ({purpose}); {file_size(free)} is free"
    if needed > free:
        raise InputError(f"--output_dir {folder}: {need}; choose another disk, or set --max_tokens")
    return need


def lock_folder(folder: Path, flag: str) -> IO[str]:
    """Lock `folder`, the value of `flag`, and create it if needed.

    The lock is released when the returned file is closed or the process ends, however it ends. Raises
    InputError if another process holds it. Where the file system has no locks, print a note and do without.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the caller holds it
    except OSError as error:
        reason = "is a file, not a folder" if folder.is_file() else error.strerror or str(error)
        raise InputError(f"{flag} {folder}: {reason}") from error
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0x7FFFFFF0)  # beyond the text, which must stay readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InputError(f"{folder} is in use by {file.read() or 'another process'}") from error
    except OSError as error:
        print(f"note: {folder} can't be locked ({error.strerror or error}); use it for one job at a time")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
