"""
Read text files as a stream of documents.

A document is a row of a .parquet file, a line of a .jsonl file, or a .txt file, whole or split where a mark
stands. Long documents are split into pieces that can be tokenized separately, so memory stays bounded.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, AnyStr, BinaryIO, cast

from support.cli import InputError, RunFault, brief, plural
from support.files import check_not_pointer

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# The kinds of files by the ends of their names, in any case; all but .parquet may be packed, too.
KINDS = {
    ".parquet": ".parquet",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".jsonl",  # one object a line
    ".txt": ".txt",
}
PACKED = (".gz", ".zst")
SUPPORTED = "supported are .parquet, .jsonl (.ndjson, .json), .txt, the last ones also as .gz or .zst"
# What stands beside the documents in a folder: fineweb.py's own records, and those of `datasets`.
RECORDS = ("shards.json", "shards.partial.json")
NOT_TEXT = {*RECORDS, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# A split's name, as the name of a folder or of a file, where a number may follow: test-00000-of-00010
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.]\d.*)?")
# The first bytes of a Zstandard frame, or of one to be skipped, as pzstd writes it (RFC 8878, section 3.1)
ZSTANDARD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
PIECE = 250_000  # characters: the approximate size of a piece
LONGEST_WORD = 4_000_000  # characters; tiktoken needs about 50 bytes of memory per character of a word
STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "null")  # Arrow's names
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
    text: str | None  # None: a null row, or a bad one
    begins: bool = True
    ends: bool = True
    cuts_word: bool = False  # ends within a word
    bad: bool = False  # a row that holds no document
    position: int = 0  # bytes of the file read so far


# -----------------------------------------------------------------------------
# files


def kind_of(name: str) -> str | None:
    """The kind of a file by its name: .parquet, .txt, or .jsonl for all that holds a JSON object a line; None
    if its documents can't be read here."""
    path = PurePath(name.lower())
    if path.suffix in PACKED:
        kind = KINDS.get(path.with_suffix("").suffix)
        return kind if kind != ".parquet" else None
    return KINDS.get(path.suffix)


def local_files(patterns: Sequence[str], output_dir: Path | None = None) -> list[File]:
    """The files that `patterns` name, without those in `output_dir`, in groups: the files of one kind in one
    folder, glob, or list. Groups come in the order of the patterns. In a group, .txt files are ordered by a
    hash of their names, so that neighbours are about different things; other files, of many documents each,
    by name, or as they are listed. Duplicates are left out; links to folders are not followed. Of a folder,
    one line says what else is left out (see `files_in`).

    Raises InputError for a pattern that matches nothing, for a file of another type or one that can't be
    read, and if none is left.
    """
    found: dict[Path, tuple[str, Path, str]] = {}  # by resolved path: group, path, name within the group
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        paths = [Path(pattern)]
        if not paths[0].exists():
            paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
        left_here: Counter[str] = Counter()
        files = [(file, path) for path in paths for file in files_in(path, output_dir, left_here)]
        left_out += left_here
        if not files and not left_here["in --output_dir"]:
            there = f"no documents there; {SUPPORTED}{in_all(left_here)}" if paths else "no such file"
            raise InputError(f"--input {pattern}: {there}")
        for file, path in files:
            if kind_of(file.name) is None:
                raise InputError(f"--input {file}: ends in {file.suffix or 'nothing'}; {SUPPORTED}")
            if not os.access(file, os.R_OK) or not file.is_file():
                fault = "a link to a file that does not exist"
                if os.path.exists(file):
                    fault = "you may not read it" if file.is_file() else "a pipe or a device, not a file"
                raise InputError(f"--input {file}: {fault}")
            # A shell expands a glob itself; then the folder of the files it lists makes the group.
            place = str(file.parent if file == Path(pattern) else pattern)
            name = file.name if file == path else file.relative_to(path).as_posix()
            found.setdefault(Path(os.path.realpath(file)), (place, file, name))
    if patterns and not found:
        raise InputError(f"--input {' '.join(patterns)}: all in --output_dir, which is left out")
    if note := in_all(left_out):
        print(note.removeprefix("; "))
    groups: dict[tuple[str, str | None], list[tuple[str, Path]]] = {}
    for place, path, name in found.values():
        groups.setdefault((place, kind_of(path.name)), []).append((name, path))
    for (_, kind), members in groups.items():
        if kind == ".txt":
            members.sort(key=lambda member: hashlib.sha256(member[0].encode(errors=ERRORS)).digest())
    unique = len({path.name for _, path, _ in found.values()}) == len(found)
    return [
        File(path.name if unique else path.as_posix(), path.stat().st_size, path, group=number)
        for number, members in enumerate(groups.values())
        for _, path in members
    ]


def files_in(path: Path, output_dir: Path | None, left_out: Counter[str]) -> list[Path]:
    """The file at `path`, or all files with documents in the folder and its subfolders.

    Counts in `left_out` what else is there: hidden files, files of other kinds, records of a data set and,
    beside a train split, the other splits; and what lies in `output_dir`, except documents that are named
    there. Raises OSError for a folder that can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    output = os.path.realpath(output_dir) + os.sep if output_dir else None
    files = [path]
    if path.is_dir():
        walk = os.walk(path, onerror=fail)
        files = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    kept: dict[Path, str] = {}  # each file, and the split that its name names
    for file in files:
        inside = file.relative_to(path).parts  # () for the file at `path`, which is named, not found
        in_output = output and os.path.realpath(file).startswith(output)
        if in_output and (inside or file.name in RECORDS or kind_of(file.name) is None):
            left_out["in --output_dir"] += 1
        elif any(part.startswith(".") or part == "__MACOSX" for part in inside):
            left_out["hidden file"] += 1
        elif inside and file.name in NOT_TEXT:
            left_out["data-set record"] += 1
        elif inside and file.exists() and not file.is_file():  # a pipe, a socket
            left_out["special file"] += 1
        elif inside and kind_of(file.name) is None:
            left_out[f"{file.suffix.lower()} file" if file.suffix else "other file"] += 1
        else:
            stems = [*inside[:-1], file.name.split(".")[0]]
            splits = [found[1] for stem in stems if (found := SPLIT.fullmatch(stem.lower()))]
            kept[file] = splits[0] if splits and inside else ""
    if "train" in kept.values():
        for file, split in list(kept.items()):
            if split not in ("", "train"):
                left_out[f"{split}-split file"] += 1
                del kept[file]
    return list(kept)


def in_all(left_out: Counter[str]) -> str:
    """In words, what was left out; "" if nothing was, except in --output_dir."""
    counts = [plural(n, what) for what, n in left_out.items() if what != "in --output_dir"]
    return f"; left out: {', '.join(counts)}" if counts else ""


def text_bytes(file: File, column: str) -> float:
    """The approximate bytes of text in a file. FineWeb-Edu's parquet files hold 1.6 times their size."""
    is_parquet, is_packed = kind_of(file.name) == ".parquet", file.name.lower().endswith(PACKED)
    if file.path is None or not is_parquet:
        return file.size * (1.6 if is_parquet else 3 if is_packed else 1)
    with open_parquet(file.path, column) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


def check_columns(files: Sequence[File], reading: "Reading") -> None:
    """Raises InputError unless the first line of every file of JSON lines here has text in the column. (Of
    parquet files, `text_bytes` reads the schema.)"""
    for file in files:
        if file.path and kind_of(file.name) == ".jsonl" and not reading.skip_bad_rows:
            with open_text(file.path) as (lines, _):
                for number, line in itertools.islice(json_lines(lines), 1):
                    place = f"{file.path}, line {number + 1}"
                    text_of(row_of(line, place), reading.column, place)


# -----------------------------------------------------------------------------
# documents


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    column: str = "text"  # of a parquet file, or the key of a JSON line
    split_at: str | None = None  # a .txt file holds several documents, with this between them
    skip_bad_rows: bool = False  # skip and count lines that hold no document


def read_documents(file: File, path: Path, reading: Reading, first: int = 0) -> Iterator[Piece]:
    """The documents of the file at `path` in order, starting with number `first`. Raises InputError, naming
    file and line, for anything that is not a document."""
    kind = kind_of(file.name)
    if kind == ".parquet":
        yield from read_parquet(file, path, reading.column, first)
        return
    with open_text(path) as (text_file, raw):
        if kind == ".jsonl":
            for number, line in json_lines(text_file, first):
                place = f"{path}, line {number + 1}"
                try:
                    text = text_of(row_of(line, place), reading.column, place)
                except InputError:
                    if not reading.skip_bad_rows:
                        raise
                    yield Piece(file.name, number, None, bad=True, position=raw.tell())
                    continue
                chunks = None if text is None else chunks_of(text)
                yield from cut_document(file.name, number, chunks, raw.tell)
        else:
            chunks = iter(lambda: text_file.read(PIECE), "")
            parts = split_text(check_utf8(chunks, path), reading.split_at)
            for number, part in itertools.groupby(parts, key=lambda pair: pair[0]):
                if number >= first:
                    yield from cut_document(file.name, number, (text for _, text in part), raw.tell)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[tuple[io.TextIOWrapper, BinaryIO]]:
    """Open a text file; returns it as text, and beside that its bytes on disk, whose position shows progress.
    Its first bytes tell whether gzip or Zstandard has packed it, and whether it is UTF-16 or UTF-32; any
    other is UTF-8.

    Raises InputError for packed data that are damaged, for a Git LFS pointer, and for a Parquet file.
    """
    check_not_pointer(path)
    with open(path, "rb") as raw:
        try:
            head = raw.peek(4)[:4]
            stream: BinaryIO = raw
            if head.startswith(b"\x1f\x8b"):
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            elif ZSTANDARD.match(head):
                import pyarrow

                stream = pyarrow.CompressedInputStream(raw, "zstd")
            elif head == b"PAR1":
                raise InputError(f"{path}: a Parquet file; give it a name that ends in .parquet")
            buffered = io.BufferedReader(cast(io.RawIOBase, stream)) if stream is not raw else raw
            begin = buffered.peek(64)[:64]
            head = begin[:4]
            # A lone surrogate for what can't be decoded, as with ERRORS, which UTF-16 does not take
            codecs.register_error("lone", lambda error: ("\udc80", getattr(error, "end", 0)))
            if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
                text = io.TextIOWrapper(buffered, "utf-32", "lone")
            elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                text = io.TextIOWrapper(buffered, "utf-16", "lone")
            elif 3 * begin.count(0) > len(begin):
                raise InputError(
                    f"{path}: more than a third of its first bytes are NUL: an archive, or UTF-16 without "
                    "its byte-order mark, which iconv -f UTF-16LE -t UTF-8 IN > OUT makes readable"
                )
            else:
                text = io.TextIOWrapper(buffered, "utf-8-sig", ERRORS)
            yield text, raw
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's, not the unpacker's
                raise
            raise InputError(f"{path}: damaged, it can't be unpacked ({error})") from error


def check_utf8(chunks: Iterable[str], path: Path) -> Iterator[str]:
    """The chunks of a text. Raises InputError if more than a tenth of one is not UTF-8: then the text is in
    another encoding, or there is none."""
    for chunk in chunks:
        wrong = len(re.findall("[\ud800-\udfff]", chunk)) if len(chunk) > 1000 and not chunk.isascii() else 0
        if 10 * wrong > len(chunk):
            raise InputError(
                f"{path}: more than a tenth of it is not UTF-8: another encoding, which iconv -f ENCODING -t "
                "UTF-8 IN > OUT makes readable, or no text"
            )
        yield chunk


def split_text(chunks: Iterable[str], mark: str | None) -> Iterator[tuple[int, str]]:
    """The documents between the marks in a text (None: the text is one), each as its number and some of its
    text, several times if it is long. A line break behind a mark belongs to the mark; where two marks leave
    nothing between them, there is no document."""
    if mark is None:
        yield 0, ""  # an empty text is a document, too
        for chunk in chunks:
            yield 0, chunk
        return
    number, rest, behind_mark = 0, "", False
    for chunk in itertools.chain(chunks, [""]):  # the empty one at the end
        *ended, rest = (rest + chunk).split(mark)
        # What is left may end with the beginning of a mark, except at the end.
        safe = max(0, len(rest) - len(mark) + 1) if chunk else len(rest)
        for i, part in enumerate([*ended, rest[:safe]]):
            if part:
                text = part.removeprefix("\n") if behind_mark else part
                behind_mark = False
                if text:
                    yield number, text
            if i < len(ended):
                number, behind_mark = number + 1, True
        rest = rest[safe:]


def json_lines(lines: Iterable[str], first: int = 0) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number, from 0. Begins with line `first`."""
    for number, line in enumerate(lines):
        if number >= first and not line.isspace():
            yield number, line


def row_of(line: str, place: str) -> dict[str, Any]:
    """The JSON object in a line. Raises InputError, naming the `place`, for anything else."""
    try:
        row, fault = json.loads(line), "not a JSON object"
    except (ValueError, RecursionError) as error:
        row, fault = None, f"not JSON ({brief(error)})"
    if isinstance(row, dict):
        return row
    start = line.strip()
    if start.startswith("["):
        fault = "a JSON array; put each object on a line of its own: jq -c '.[]' IN > OUT.jsonl"
    elif start == "{":
        fault = "JSON over several lines; put each object on one: jq -c . IN > OUT.jsonl"
    raise InputError(f"{place}: {fault}")


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


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .parquet file, or the objects of a file of JSON lines, each after its place in words.
    Raises InputError, naming that place, for anything else."""
    if kind_of(path.name) == ".parquet":
        with open_parquet(path) as parquet:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in parquet.iter_batches())
            for number, row in enumerate(rows):
                yield f"{path}, row {number + 1}", row
        return
    with open_text(path) as (lines, _):
        for number, line in json_lines(lines):
            place = f"{path}, line {number + 1}"
            yield place, row_of(line, place)


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
def open_parquet(path: Path, column: str | None = None) -> Iterator["ParquetFile"]:
    """Open a parquet file. Raises InputError if it lacks this column of strings or reading it fails."""
    import pyarrow
    import pyarrow.parquet

    check_not_pointer(path)
    try:
        # no pre_buffer: it would hold whole row groups, which may be large
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as parquet:
            schema = parquet.schema_arrow
            if column is not None and schema.names.count(column) != 1:
                raise InputError(
                    f"{path}: no single column {column!r} but {schema.names}; name the one that holds "
                    "the text with --text_column"
                )
            if column is not None:
                kind = schema.field(column).type
                kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if str(kind) not in STRINGS:
                    raise InputError(f"{path}: the column {column!r} holds {kind}, not strings")
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's
            raise
        if isinstance(error, MemoryError):
            raise RunFault(f"{path}: out of memory ({str(error).splitlines()[0]})") from error
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
            found = BOUNDARY.search(rest, max(1, len(rest) - 1000))
            if not found:  # the last one, wherever it is
                found = max(BOUNDARY.finditer(rest, 1), key=re.Match.start, default=None)
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
