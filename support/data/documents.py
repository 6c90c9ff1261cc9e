"""
Read text files as a stream of documents.

A document is a row of a .parquet file, a line of a .jsonl file, or a whole .txt file. Long documents are
split into pieces that can be tokenized separately, so memory stays bounded.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, AnyStr, BinaryIO

from support.cli import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

KINDS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".txt")  # .json: one object per line
RECORDS = ("shards.json", "shards.partial.json")  # fineweb.py's own, in its --output_dir
PIECE = 250_000  # characters: the approximate size of a piece
LONGEST_WORD = 4_000_000  # characters; tiktoken needs about 50 bytes of memory per character of a word
BOUNDARY = re.compile(r"(?<=\S)(?=[ \n])|(?<=[ \t\r\n])(?=[ \t\r\n]\S)")  # see cut_document
ERRORS = "surrogateescape"  # a byte that is not UTF-8 becomes a lone surrogate, which tokens.py replaces


@dataclass(frozen=True)
class File:
    """An input file; `path` is None while it is only on the Hub."""

    name: str
    size: int  # bytes
    path: Path | None = None
    sha256: str | None = None  # as listed on the Hub
    group: int = 0  # of the files of one kind in one folder; the validation split holds a part of each group


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    file: str
    document: int  # its row or line in the file, from 0
    text: str | None  # None: a null row
    begins: bool = True
    ends: bool = True
    cuts_word: bool = False  # ends within a word
    position: int = 0  # bytes of the file read so far


# -----------------------------------------------------------------------------
# files


def local_files(patterns: Sequence[str], output_dir: Path | None = None) -> list[File]:
    """The files that `patterns` name, without those in `output_dir`, in groups: the files of one kind in one
    folder, glob, or list. Groups come in the order of the patterns. In a group, .txt files are ordered by a
    hash of their names, so that neighbours are about different things; other files, of many documents each,
    by name, or as they are listed. Duplicates are left out; links to folders are not followed.

    Raises InputError for a pattern that matches nothing, for a file of another type, and if none is left.
    """
    found: dict[Path, tuple[str, Path, str]] = {}  # by resolved path: group, path, name within the group
    kinds = ", ".join(KINDS)
    for pattern in patterns:
        paths = [Path(pattern)]
        if not paths[0].exists():
            paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [(file, path) for path in paths for file in files_in(path)]
        if not files:
            there = f"no {kinds} files there" if paths else "no such file"
            raise InputError(f"--input {pattern}: {there}")
        for file, path in files:
            is_output = output_dir and output_dir.resolve() in file.resolve().parents
            if is_output and (file.name in RECORDS or file != Path(pattern)):
                continue
            if not file.name.endswith(KINDS):
                raise InputError(f"--input {file}: ends in {file.suffix or 'nothing'}; supported are {kinds}")
            # A shell expands a glob itself; then the folder of the files it lists makes the group.
            place = str(file.parent if file == Path(pattern) else pattern)
            name = file.name if file == path else file.relative_to(path).as_posix()
            found.setdefault(file.resolve(), (place, file, name))
    if patterns and not found:
        raise InputError(f"--input {' '.join(patterns)}: all in --output_dir, which is left out")
    groups: dict[tuple[str, str], list[tuple[str, Path]]] = {}
    for place, path, name in found.values():
        groups.setdefault((place, kind_of(path)), []).append((name, path))
    for (_, kind), members in groups.items():
        if kind == ".txt":
            members.sort(key=lambda member: hashlib.sha256(member[0].encode(errors=ERRORS)).digest())
    unique = len({path.name for _, path, _ in found.values()}) == len(found)
    return [
        File(path.name if unique else path.as_posix(), path.stat().st_size, path, group=number)
        for number, members in enumerate(groups.values())
        for _, path in members
    ]


def kind_of(path: Path) -> str:
    """The kind of a file by its name: .parquet, .txt, or .jsonl for all that holds a JSON object a line."""
    return path.suffix if path.suffix in (".parquet", ".txt") else ".jsonl"


def files_in(path: Path) -> list[Path]:
    """The file at `path`, or all files of KINDS in the folder and its subfolders."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.name.endswith(KINDS) and file.is_file())


def text_bytes(file: File, column: str) -> float:
    """The approximate bytes of text in a file. FineWeb-Edu's parquet files hold 1.6 times their size."""
    if file.path is None or not file.name.endswith(".parquet"):
        return file.size * (1.6 if file.name.endswith(".parquet") else 3 if file.name.endswith(".gz") else 1)
    with open_parquet(file.path, column) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


def check_columns(files: Sequence[File], column: str) -> None:
    """Raises InputError unless the first line of every file of JSON lines here has text in this column. (Of
    parquet files, `text_bytes` reads the schema.)"""
    for file in files:
        if file.path and kind_of(file.path) == ".jsonl":
            with open(file.path, "rb") as opened:
                for number, row in itertools.islice(json_lines(opened), 1):
                    text_of(row, column, f"{file.path}, line {number + 1}")


# -----------------------------------------------------------------------------
# documents


def read_documents(file: File, path: Path, column: str, first: int = 0) -> Iterator[Piece]:
    """The documents of the file at `path` in order, starting with number `first`. Raises InputError, naming
    file and line, for anything that is not a document."""
    if file.name.endswith(".parquet"):
        yield from read_parquet(file, path, column, first)
        return
    with open(path, "rb") as opened:
        if not file.name.endswith(".txt"):
            for number, row in json_lines(opened, first):
                text = text_of(row, column, f"{path}, line {number + 1}")
                chunks = None if text is None else chunks_of(text)
                yield from cut_document(file.name, number, chunks, opened.tell)
        elif first == 0:
            text_file = io.TextIOWrapper(opened, "utf-8-sig", ERRORS)
            yield from cut_document(file.name, 0, iter(lambda: text_file.read(PIECE), ""), opened.tell)


def json_lines(file: BinaryIO, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects in an open .jsonl or .jsonl.gz file, each with the number of its line, from 0. Begins
    with line `first`; blank lines are skipped.

    Raises InputError, naming file and line, for a line that is not a JSON object, and for damaged gzip data.
    """
    stream = gzip.GzipFile(fileobj=file) if file.name.endswith(".gz") else file
    try:
        for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig", ERRORS)):
            if number < first or line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file.name}, line {number + 1}: not JSON") from error
            if not isinstance(row, dict):
                raise InputError(f"{file.name}, line {number + 1}: not a JSON object")
            yield number, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file.name}: not a sound gzip file ({error})") from error


def text_of(row: dict[str, Any], column: str, place: str) -> str | None:
    """The text in a JSON object; None for a null. Raises InputError, naming the `place`."""
    if column not in row:
        raise InputError(
            f"{place}: no key {column!r} but {list(row)}; name the one that holds the text with --text_column"
        )
    text = row[column]
    if not isinstance(text, str | None):
        raise InputError(f"{place}: {column!r} is {type(text).__name__}, not a string")
    return text


def read_parquet(file: File, path: Path, column: str, first: int) -> Iterator[Piece]:
    import pyarrow

    with open_parquet(path, column) as parquet:
        groups, row = list(range(parquet.num_row_groups)), 0
        while groups and row + parquet.metadata.row_group(groups[0]).num_rows <= first:
            row += parquet.metadata.row_group(groups.pop(0)).num_rows

        def position() -> int:
            return file.size * (row + 1) // parquet.metadata.num_rows

        for batch in parquet.iter_batches(64, groups, [column]):
            for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                if row >= first:
                    chunks = None if raw is None else codecs.iterdecode(chunks_of(raw), "utf-8", ERRORS)
                    yield from cut_document(file.name, row, chunks, position)
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
    file: str, document: int, chunks: Iterable[str] | None, position: Callable[[], int] = lambda: 0
) -> Iterator[Piece]:
    """Split a document, given in chunks of any size, into pieces that can be tokenized separately.
    `position()` tells how many bytes of the file have been read so far.

    Cuts fall where BOUNDARY matches. The first alternative is before a space or newline that follows a
    non-white-space character. No GPT-2 token crosses such a cut: in GPT-2's pattern, white space begins a
    token or stands alone, and never affects what precedes it. The second cuts long white space (a million
    spaces are too much for tiktoken) before its last character, which belongs to the next word.
    """
    if chunks is None:
        yield Piece(file, document, None, position=position())
        return
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        if len(rest) >= PIECE:
            # near the end; anywhere if the text is long without a boundary
            near_end = len(rest) - 1000 if len(rest) < 2 * PIECE else 1
            found = BOUNDARY.search(rest, near_end) or BOUNDARY.search(rest, 1)
            if found or len(rest) > LONGEST_WORD:
                end = found.start() if found else len(rest)
                yield Piece(
                    file, document, rest[:end], begins, ends=False, cuts_word=not found, position=position()
                )
                rest, begins = rest[end:], False
    yield Piece(file, document, rest, begins, position=position())


def chunks_of(text: AnyStr) -> Iterator[AnyStr]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]
