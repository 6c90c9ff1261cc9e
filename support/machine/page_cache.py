"""Reading files before they are needed: from then on, the system serves them from memory, its page cache."""

import threading
from collections.abc import Sequence
from pathlib import Path

from support.machine.device import free_host_memory

CHUNK = 2**22  # bytes of a read


def read_into_cache(files: Sequence[Path]) -> threading.Thread:
    """Let a thread read the files one after another, up to half of the memory that is free. The system gives
    that memory to whoever needs it. Where free memory is not known, or a file can't be read, nothing is done:
    whoever needs the file will say so."""
    thread = threading.Thread(target=fill_cache, args=(files, free_host_memory() // 2), daemon=True)
    thread.start()
    return thread


def fill_cache(files: Sequence[Path], budget: int) -> None:
    """Read the first `budget` bytes of the files."""
    buffer = memoryview(bytearray(CHUNK))
    for file in files:
        try:
            with open(file, "rb", buffering=0) as opened:
                while budget > 0 and (n := opened.readinto(buffer[: min(CHUNK, budget)])):
                    budget -= n
        except OSError:
            continue
