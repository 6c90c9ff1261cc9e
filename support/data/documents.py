"""
Read text files as a stream of documents.

A document is a row of a .parquet file, a line of a .jsonl file, or a whole .txt file. Long documents are
split into pieces that can be tokenized separately, so memory stays bounded.
"""

import codecs
import contextlib
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, AnyStr

from support.cli import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")  # one JSON object per line
KINDS = (".parquet", *LINES, ".txt")
RECORDS = ("shards.json", "shards.partial.json")  # fineweb.py's own, in its --output_dir
PIECE = 250_000  # characters: the approximate size of a piece
LONGEST_WORD = 4_000_000  # characters; tiktoken needs about 50 bytes of memory per character of a word


@dataclass(frozen=True)
class File:
    """An input file; `path` is None while it is only on the Hub."""

    name: str
    size: int  # bytes
    path: Path | None = None
    sha256: str | None = None  # as listed on the Hub


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    file: str
    document: int  # its row or line in the file, from 0
    text: str | None  # None: a null row
    begins: bool = True
    ends: bool = True
    cut: bool = False  # ends within a word
    share: float = 1.0  # share of the file read so far


# -----------------------------------------------------------------------------
# files


def local_files(patterns: Sequence[str], output_dir: Path | None = None) -> list[File]:
    """The files that `patterns` name, in that order. Those of a folder or a glob are sorted, without those in
    `output_dir`. Duplicates are left out; links to folders are not followed.

    Raises InputError for a pattern that matches nothing, for a file of another type, and if none is left.
    """
    paths: dict[Path, Path] = {}  # keyed by resolved path
    for pattern in patterns:
        found = [Path(pattern)]
        is_named = found[0].is_file()
        if not found[0].exists():
            found = sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise InputError(f"--input {pattern}: no such file")
        for path in found:
            inside = [path]
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.name.endswith(KINDS) and p.is_file())
            if not inside and len(found) == 1:
                raise InputError(f"--input {path}: the folder holds no {', '.join(KINDS)} files")
            for file in inside:
                inside_output = output_dir and output_dir.resolve() in file.resolve().parents
                if not inside_output or (is_named and file.name not in RECORDS):
                    paths.setdefault(file.resolve(), file)
    for path in paths.values():
        if not path.name.endswith(KINDS):
            raise InputError(
                f"--input {path}: ends in {path.suffix or 'nothing'}; supported are {', '.join(KINDS)}"
            )
    if patterns and not paths:
        raise InputError(
            f"--input {' '.join(patterns)}: no {', '.join(KINDS)} files there, or all in --output_dir, which "
            "is left out"
        )
    names = [path.name for path in paths.values()]
    if len(set(names)) < len(names):
        names = [path.as_posix() for path in paths.values()]
    return [File(name, path.stat().st_size, path) for name, path in zip(names, paths.values(), strict=True)]


def text_bytes(file: File, column: str) -> float:
    """The approximate bytes of text in a file. FineWeb-Edu's parquet files hold 1.6 times their size."""
    if file.path is None or not file.name.endswith(".parquet"):
        return file.size * (1.6 if file.name.endswith(".parquet") else 3 if file.name.endswith(".gz") else 1)
    with open_parquet(file.path, column) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


# -----------------------------------------------------------------------------
# documents


def read_documents(file: File, path: Path, column: str, first: int = 0) -> Iterator[Piece]:
    """The documents of the file at `path` in order, starting with number `first`.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer counts and replaces. Raises
    InputError, naming file and line, for anything that is not a document.
    """
    if file.name.endswith(".parquet"):
        yield from read_parquet(file, path, column, first)
        return
    with open(path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")

        def share() -> float:
            return raw.tell() / max(1, file.size)

        try:
            if file.name.endswith(".txt"):
                if first == 0:
                    yield from cut_document(file.name, 0, iter(lambda: text.read(PIECE), ""), share)
                return
            for number, line in enumerate(text):
                if number >= first and not line.isspace():
                    document = text_of_line(path, number + 1, line, column)
                    if document is None:
                        yield Piece(file.name, number, None)
                    else:
                        yield from cut_document(file.name, number, chunks_of(document), share)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: not a sound gzip file ({error})") from error


def text_of_line(path: Path, number: int, line: str, column: str) -> str | None:
    """The text in a line of JSON; None for a null. Raises InputError, naming the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: not a JSON object")
    if column not in row:
        raise InputError(
            f"{path}, line {number}: no key {column!r} but {list(row)}; name the one that holds the text "
            "with --text_column"
        )
    if not isinstance(row[column], str | None):
        raise InputError(f"{path}, line {number}: {column!r} is {type(row[column]).__name__}, not a string")
    return row[column]


def read_parquet(file: File, path: Path, column: str, first: int) -> Iterator[Piece]:
    import pyarrow

    with open_parquet(path, column) as parquet:
        groups, row = list(range(parquet.num_row_groups)), 0
        while groups and row + parquet.metadata.row_group(groups[0]).num_rows <= first:
            row += parquet.metadata.row_group(groups.pop(0)).num_rows
        for batch in parquet.iter_batches(64, groups, [column]):
            for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                if row >= first and raw is None:
                    yield Piece(file.name, row, None)
                elif row >= first:
                    chunks = codecs.iterdecode(chunks_of(raw), "utf-8", "surrogateescape")
                    share = (row + 1) / parquet.metadata.num_rows
                    yield from cut_document(file.name, row, chunks, itertools.repeat(share).__next__)
                row += 1


@contextlib.contextmanager
def open_parquet(path: Path, column: str) -> Iterator["ParquetFile"]:
    """Open a parquet file. Raises InputError if it lacks this column of strings or reading it fails."""
    import pyarrow
    import pyarrow.parquet

    try:
        # no pre_buffer: it would hold whole row groups, which may be large
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as parquet:
            schema = parquet.schema_arrow
            if schema.names.count(column) != 1:
                raise InputError(
                    f"{path}: no single column {column!r} but {schema.names}; name the one that holds "
                    "the text with --text_column"
                )
            kind = str(schema.field(column).type)
            if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
                raise InputError(f"{path}: the column {column!r} holds {kind}, not strings")
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a sound parquet file ({str(error).splitlines()[0]})") from error


# -----------------------------------------------------------------------------
# pieces


def cut_document(
    file: str, document: int, chunks: Iterable[str], share: Callable[[], float] = lambda: 1.0
) -> Iterator[Piece]:
    """Split a document, given in chunks of any size, into pieces that can be tokenized separately.

    Cuts fall before a space or newline that follows a non-white-space character. No GPT-2 token crosses such
    a cut: in GPT-2's pattern, white space begins a token or stands alone, and never affects what precedes it.
    Long white space (a million spaces are too much for tiktoken) is cut before its last character, which
    belongs to the next word.
    """
    boundary = re.compile(r"(?<=\S)(?=[ \n])|(?<=[ \t\r\n])(?=[ \t\r\n]\S)")
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        if len(rest) >= PIECE:
            # near the end; anywhere if the text is long without a boundary
            near_end = len(rest) - 1000 if len(rest) < 2 * PIECE else 1
            found = boundary.search(rest, near_end) or boundary.search(rest, 1)
            if found or len(rest) > LONGEST_WORD:
                end = found.start() if found else len(rest)
                yield Piece(file, document, rest[:end], begins, False, not found, share())
                rest, begins = rest[end:], False
    yield Piece(file, document, rest, begins, True, False, share())


def chunks_of(text: AnyStr) -> Iterator[AnyStr]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]
