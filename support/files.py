"""Reliable files: checksums, atomic writes, locks."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from support.cli import InputError


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def lock_folder(folder: Path, flag: str) -> IO[str]:
    """Lock `folder`, which the flag called `flag` names, and create it if needed.

    The lock is released when the returned file is closed or the process ends, however it ends. Raises
    InputError if another process holds it.
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
    except OSError as error:
        file.seek(0)
        raise InputError(f"{folder} is in use by {file.read() or 'another process'}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
