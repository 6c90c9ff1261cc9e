"""Format numbers and text for people."""

import math


def plural(n: int, noun: str) -> str:
    """1 row, 2 rows, 1 process, 2 processes, 1,000 files."""
    ending = "" if n == 1 else "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """12 days, 13 h 20 min, 11 min, 2 min 33 s, 45 s."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def file_size(n_bytes: float) -> str:
    """1.2 GB, 350 MB; GB and MB are 10**9 and 10**6 bytes, as disks are sold."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{math.ceil(n_bytes / 1e6)} MB"


def printable(text: str) -> str:
    """A model's text for a terminal: line breaks are indented, other white space becomes a space, and
    unprintable characters become U+FFFD."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n    ".join(
        "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in lines
    )
