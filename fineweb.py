"""
Text in, token shards out.

    python fineweb.py                           # FineWeb-Edu sample-10BT from the Hub: 100 shards, 20 GB
    python fineweb.py --max_tokens 300000000    # its first 300 million tokens: a trial
    python fineweb.py --input my_text/ --output_dir my_shards --shard_size 1000000
    python fineweb.py --check my_shards         # verify shards, made here or elsewhere

A shard is a 1-D uint16 `.npy` file of token ids. The stream that is cut into shards is, for every document in
input order, `<|endoftext|>` and then the document's tokens. The first shard is the validation split, the
others are for training. `shards.json`, written last, says what they were made from.

The job may be killed at any time: the same command goes on after the last finished shard, which
`shards.partial.json` names, and ends with the same bytes.

This file also makes the shards of the demo, from the prose that every Python brings along.
"""

import ast
import codecs
import contextlib
import glob
import gzip
import io
import json
import math
import os
import posixpath
import pydoc_data.topics
import re
import shutil
import sys
import sysconfig
import threading
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, AnyStr, Literal

import numpy as np
import tiktoken
from tqdm import tqdm

from shards import (
    END_OF_TEXT,
    PARTIAL,
    InputError,
    RunFault,
    check_folder,
    get_encoding,
    hub_errors,
    lock_folder,
    new_record,
    open_shard,
    read_record,
    run_command,
    sha256,
    to_json,
    write_file,
)

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")  # one JSON object a line
KINDS = (".parquet", *LINES, ".txt")
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
TASK_CHARACTERS = 250_000  # what a thread takes at a time, and the size of the pieces of a long document
LONGEST_WORD = 4_000_000  # characters; tiktoken needs some 50 bytes of memory for each character of a word
RETRY_AFTER = (1, 5, 30, 120)  # seconds to wait before each new attempt to reach the Hub
REMARKS = {
    "null": "null rows skipped",
    "empty": "empty documents (only their <|endoftext|> is written)",
    "replaced": "documents with bytes that are not UTF-8 or with lone surrogates (U+FFFD stands for each)",
    "end_of_text": "documents that contain the characters <|endoftext|> (kept as text)",
    "cut": f"words of more than {LONGEST_WORD:,} characters (tokenized in parts)",
}


@dataclass(frozen=True)
class ShardConfig:
    """Tokenize text into shards for train_gpt2.py."""

    # -- what is read
    input: tuple[str, ...] = ()
    """Local files, folders or globs of .parquet, .jsonl, .jsonl.gz and .txt, each file read once; a .txt
    file is one document. Without: --dataset."""
    dataset: str = FINEWEB_EDU
    """A dataset on the Hugging Face Hub."""
    config: str | None = None
    """Its configuration; default: for FineWeb-Edu sample-10BT (there are sample-100BT and sample-350BT), for
    another dataset its own default."""
    revision: str = "main"
    """Its branch, tag or commit; what it stands for at the start is used to the end, and recorded."""
    text_column: str = "text"
    """The column of a parquet file, or the key of a JSON line, that holds the text."""
    # -- what is written
    output_dir: Path = Path("edu_fineweb10B")
    """Folder for the shards; made if missing."""
    shard_size: int = 100_000_000
    """Tokens per shard (2 bytes each)."""
    max_tokens: int | None = None
    """Stop after this many tokens; default: the whole input."""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: the 50,257 tokens of GPT-2; bytes: one token per byte."""
    # -- how
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads that tokenize; their number never changes the result."""
    keep_downloads: bool = False
    """Keep the Hub's files, in OUTPUT_DIR/downloads; default: each is deleted when its shards are safe."""
    # -- instead: look at shards that are there
    check: Path | None = None
    """Only verify the shards in this folder: headers, sizes, ids, and sums where shards.json has them."""
    write_shards_json: bool = False
    """With --check: write the shards.json that is missing, saying that the shards are in --encoding."""


# -----------------------------------------------------------------------------
# documents


@dataclass(frozen=True)
class File:
    """One file of the input; `path` is None as long as it is only on the Hub."""

    name: str
    size: int  # bytes
    path: Path | None = None
    sha256: str | None = None  # as the Hub has it


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    file: str
    document: int  # its row or line in the file, from 0
    text: str | None  # None: a null
    begins: bool = True
    ends: bool = True
    cut: bool = False  # within a word
    share: float = 1.0  # of the file, read so far


def cut_document(
    file: str, document: int, chunks: Iterable[str], share: Callable[[], float] = lambda: 1.0
) -> Iterator[Piece]:
    """A document, given in any chunks, as pieces that can be tokenized apart.

    It is cut before a space or newline that follows something else. No token of GPT-2 crosses that: in its
    pattern white space begins a token or stands alone, and what precedes never depends on it. Long white
    space (a million spaces exceed what tiktoken can do) is cut before its last character, which belongs to
    the word.
    """
    boundary = re.compile(r"(?<=\S)(?=[ \n])|(?<=[ \t\r\n])(?=[ \t\r\n]\S)")
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        if len(rest) >= TASK_CHARACTERS:
            # near the end, or at the first chance after much of one kind
            near_end = len(rest) - 1000 if len(rest) < 2 * TASK_CHARACTERS else 1
            found = boundary.search(rest, near_end) or boundary.search(rest, 1)
            if found or len(rest) > LONGEST_WORD:
                end = found.start() if found else len(rest)
                yield Piece(file, document, rest[:end], begins, False, not found, share())
                rest, begins = rest[end:], False
    yield Piece(file, document, rest, begins, True, False, share())


def chunks_of(text: AnyStr) -> Iterator[AnyStr]:
    for start in range(0, len(text), TASK_CHARACTERS):
        yield text[start : start + TASK_CHARACTERS]


def read_documents(file: File, path: Path, column: str, first: int = 0) -> Iterator[Piece]:
    """The documents of a file at `path` in order, from number `first` on.

    Bytes that are not UTF-8 become lone surrogates, which the encoder counts and replaces. Raises InputError,
    naming file and line, for what is not a document.
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
                    yield from cut_document(file.name, 0, iter(lambda: text.read(TASK_CHARACTERS), ""), share)
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
                    yield from cut_document(file.name, row, chunks, lambda share=share: share)
                row += 1


@contextlib.contextmanager
def open_parquet(path: Path, column: str) -> Iterator[Any]:
    """A pyarrow ParquetFile that has this column of strings; InputError otherwise, or when reading it
    fails."""
    import pyarrow
    import pyarrow.parquet

    try:
        # not pre_buffer: it holds whole row groups, which may be large
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


def local_files(patterns: Iterable[str], output_dir: Path | None = None) -> list[File]:
    """The files that `patterns` name, in their order; those of a folder or a glob are sorted. Each once; none
    that a folder or glob finds in `output_dir`; links to folders inside a folder are not followed."""
    paths: dict[Path, Path] = {}  # by what they are after all links
    for pattern in patterns:
        found = [Path(pattern)]
        if not found[0].exists():
            found = sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise InputError(f"--input {pattern}: no such file")
        for path in found:
            inside = [path]
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.name.endswith(KINDS) and p.is_file())
            if not inside and len(found) == 1:
                raise InputError(f"--input {path}: a folder without {', '.join(KINDS)} files")
            for file in inside:
                if not (output_dir and output_dir.resolve() in file.resolve().parents):
                    paths.setdefault(file.resolve(), file)
    for path in paths.values():
        if not path.name.endswith(KINDS):
            raise InputError(
                f"--input {path}: ends in {path.suffix or 'nothing'}; what can be read ends in "
                f"{', '.join(KINDS)}"
            )
    names = [path.name for path in paths.values()]
    if len(set(names)) < len(names):
        names = [path.as_posix() for path in paths.values()]
    return [File(name, path.stat().st_size, path) for name, path in zip(names, paths.values(), strict=True)]


def text_bytes(file: File, column: str) -> float:
    """About how many bytes of text a file holds. FineWeb-Edu's parquet files hold 1.6 times their size."""
    if file.path is None or not file.name.endswith(".parquet"):
        return file.size * (1.6 if file.name.endswith(".parquet") else 3 if file.name.endswith(".gz") else 1)
    with open_parquet(file.path, column) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


def standard_library_prose() -> Iterator[str]:
    """English that every Python brings along: the language reference's topics, then the docstrings of the
    standard library, read from its source files without importing them. About 2.2 million characters."""
    yield from pydoc_data.topics.topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    not_prose = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}
    sources = [path for path in library.rglob("*.py") if not not_prose & set(path.relative_to(library).parts)]
    for source in sorted(sources):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(source.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        if text := "\n\n".join(docstring for docstring in docstrings if docstring):
            yield text


# -----------------------------------------------------------------------------
# the Hugging Face Hub


def patiently(wanted: str, fetch: Callable[[], Any]) -> Any:
    """`fetch()`, tried again after RETRY_AFTER seconds when it fails for a reason that may pass."""
    for wait in (*RETRY_AFTER, None):
        try:
            with hub_errors(wanted):
                return fetch()
        except RunFault as fault:
            if wait is None:
                raise RunFault(f"{fault}; nothing is lost, the same command goes on") from fault
            tqdm.write(f"{fault}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def hub_files(dataset: str, config: str | None, revision: str) -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and the files of the dataset's train split in the order in which
    `datasets.load_dataset` reads them.

    Raises InputError when there is no such dataset, configuration, revision or split, or none of its files
    can be read here; RunFault when the Hub can't be reached.
    """
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    wanted = f"the file list of {dataset}, configuration {config}, at {revision}"
    try:
        builder = patiently(wanted, lambda: load_dataset_builder(dataset, name=config, revision=revision))
    except (ValueError, RuntimeError) as error:  # an unknown configuration; a dataset that is a script
        if isinstance(error, InputError):
            raise
        raise InputError(f"{dataset}: {str(error).splitlines()[0]}") from error
    splits = builder.config.data_files or {}
    if "train" not in splits:
        raise InputError(f"{dataset}: no train split, only {', '.join(map(str, splits)) or 'nothing'}")
    found = [re.fullmatch(r"hf://datasets/(.+?)@([^/]+)/(.+)", url) for url in splits["train"]]
    if not all(found):
        raise InputError(f"{dataset}: its files are not on the Hub; download them and name them with --input")
    commit, names = found[0][2], [match[3] for match in found]
    if unreadable := [name for name in names if not name.endswith(KINDS)]:
        raise InputError(
            f"{dataset}: {unreadable[0]} can't be read here; what can ends in {', '.join(KINDS)}"
        )
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    options = {"recursive": True, "revision": commit, "repo_type": "dataset"}
    tree = patiently(wanted, lambda: list(HfApi().list_repo_tree(dataset, folder or None, **options)))
    entries = {entry.path: entry for entry in tree}
    lfs = {name: getattr(entries[name], "lfs", None) for name in names}
    return commit, [File(name, entries[name].size, None, lfs[name] and lfs[name].sha256) for name in names]


class Downloads:
    """The files from the Hub on this disk: the one being read and, downloading meanwhile, the next."""

    def __init__(self, dataset: str, commit: str, files: list[File], folder: Path, keep: bool, ahead: bool):
        self.dataset, self.commit, self.files, self.folder = dataset, commit, files, folder
        self.keep, self.ahead = keep, ahead
        self.downloads: dict[int, Future] = {}  # by the file's place in `files`
        for leftover in folder.rglob("*.incomplete"):  # of a killed job: huggingface_hub would begin another
            leftover.unlink()

    def path(self, i: int) -> Path:
        """Where file `i` is, once it is there. Raises what `fetch` raises."""
        self.start(i)
        return self.downloads[i].result()

    def start(self, i: int) -> None:
        if i in self.downloads:
            return
        download = self.downloads[i] = Future()

        def work() -> None:
            try:
                download.set_result(self.fetch(self.files[i]))
            except BaseException as error:
                download.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # daemon: it must not outlive an interrupted job

    def look_ahead(self, i: int) -> None:
        """While file `i` is read: start the next, as soon as the one before is gone."""
        if self.ahead and i + 1 < len(self.files) and not any(j < i for j in self.downloads):
            self.start(i + 1)

    def drop_before(self, name: str) -> None:
        """The shards of all files before the one called `name` are safe."""
        for i, file in enumerate(self.files):
            if file.name == name:
                break
            self.downloads.pop(i, None)
            if not self.keep:
                (self.folder / file.name).unlink(missing_ok=True)

    def fetch(self, file: File) -> Path:
        """Download a file (when the connection is cut, huggingface_hub goes on where it was) and compare its
        size and SHA-256 with the Hub's. Raises InputError when the Hub has no such file, RunFault when it
        can't be had soundly."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
            print(f"downloading {file.name} ({file.size / 1e9:.2f} GB)", flush=True)

        def attempt() -> Path:
            options = {"repo_type": "dataset", "revision": self.commit, "local_dir": self.folder}
            path = Path(hf_hub_download(self.dataset, file.name, **options))
            if path.stat().st_size == file.size and file.sha256 in (None, sha256(path)):
                return path
            path.unlink()
            raise OSError("what came is not what the Hub says it has (size or SHA-256)")

        return patiently(file.name, attempt)


def read_files(
    files: list[File], column: str, ends_at: dict[str, Any] | None, downloads: Downloads | None = None
) -> Iterator[Piece]:
    """The documents of all files, from the one that `ends_at` (of a finished shard) names on."""
    names = [file.name for file in files]
    start = names.index(ends_at["file"]) if ends_at else 0
    for i in range(start, len(files)):
        path = files[i].path or downloads.path(i)
        first = ends_at["document"] if ends_at and i == start else 0
        for piece in read_documents(files[i], path, column, first):
            if downloads:
                downloads.look_ahead(i)
            yield piece


# -----------------------------------------------------------------------------
# tokens


def encode_piece(encoding: tiktoken.Encoding, piece: Piece) -> tuple[np.ndarray, set[str]]:
    """The tokens of a piece, (n,) uint16, behind an <|endoftext|> if a document begins; and what there is to
    remark on, as keys of REMARKS."""
    if piece.text is None:
        return np.empty(0, np.uint16), {"null"}
    text, remarks = piece.text, {"cut"} if piece.cut else set()
    try:
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates become U+FFFD, as in tiktoken's encode_ordinary
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        remarks.add("replaced")
    except ValueError as error:
        raise InputError(
            f"{piece.file}, document {piece.document + 1}: tiktoken can't tokenize it ({error})"
        ) from error
    if END_OF_TEXT in text:
        remarks.add("end_of_text")
    if piece.begins:
        tokens = np.concatenate((np.array([encoding.eot_token], tokens.dtype), tokens))
        if piece.ends and not text:
            remarks.add("empty")
    return tokens.astype(np.uint16), remarks


def encode_task(encoding: tiktoken.Encoding, pieces: list[Piece]) -> list[tuple[Piece, np.ndarray, set[str]]]:
    """What `encode_piece` says of each piece. Where none is remarkable one call does for all: threads wait
    for Python's lock at the end of a call, and there are too many documents for that."""
    if all(piece.text and piece.begins and piece.ends and END_OF_TEXT not in piece.text for piece in pieces):
        text = "".join(END_OF_TEXT + piece.text for piece in pieces)
        with contextlib.suppress(UnicodeEncodeError):
            tokens = encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(np.uint16)
            documents = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token)[1:])
            return [(piece, tokens, set()) for piece, tokens in zip(pieces, documents, strict=True)]
    return [(piece, *encode_piece(encoding, piece)) for piece in pieces]


def encode_stream(
    stream: Iterable[Piece], encoding: tiktoken.Encoding, workers: int
) -> Iterator[tuple[Piece, np.ndarray, set[str]]]:
    """Each piece with its tokens and remarks, in input order.

    Threads are enough: tiktoken lets go of Python's lock while it works. Each has at most three tasks
    waiting, so memory is bounded however large the input.
    """
    with ThreadPoolExecutor(workers) as pool:
        in_flight: deque[Future] = deque()
        try:
            for task in in_tasks(stream):
                in_flight.append(pool.submit(encode_task, encoding, task))
                if len(in_flight) > 3 * workers:
                    yield from in_flight.popleft().result()
            while in_flight:
                yield from in_flight.popleft().result()
        finally:  # the reader may stop early (--max_tokens): drop what nobody waits for
            pool.shutdown(cancel_futures=True)


def in_tasks(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    task, characters = [], 0
    for piece in stream:
        task.append(piece)
        characters += len(piece.text or "") + 1
        if characters >= TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task


# -----------------------------------------------------------------------------
# shards


class ShardWriter:
    """Cuts the stream of tokens into shards in `folder`.

    A shard ends after exactly `shard_size` tokens, in the middle of a document if need be; only the last is
    shorter. Each is recorded, with the place where the input goes on and the documents that end in it, in
    shards.partial.json, which becomes shards.json at the end. A `record` that lists finished shards is gone
    on with: the stream must begin with the document that their last `ends_at` names.
    """

    def __init__(
        self, folder: Path, record: dict[str, Any], on_shard: Callable[[str], None] = lambda file: None
    ):
        self.folder, self.record, self.on_shard = folder, record, on_shard
        settings, shards = record["settings"], record["shards"]
        self.left = (settings["max_tokens"] or sys.maxsize) - sum(shard["tokens"] for shard in shards)
        try:
            self.buffer = np.empty(min(settings["shard_size"], self.left), np.uint16)  # the shard in progress
        except (MemoryError, ValueError) as error:
            raise InputError(
                f"--shard_size {settings['shard_size']}: a shard is held in memory while it is filled, and "
                f"{settings['shard_size'] / 5e8:,.0f} GB are not to be had"
            ) from error
        self.filled, self.skip = 0, shards[-1]["ends_at"]["token"] if shards else 0
        self.ends_at: dict[str, Any] = {}  # where the next token of the stream comes from
        self.documents, self.remarks, self.of_document = 0, Counter(), set()
        self.write_record()  # before the first shard, which would else belong to nobody
        (folder / "shards.json").unlink(missing_ok=True)  # of a finished job that lost a shard

    def add(self, piece: Piece, tokens: np.ndarray, remarks: set[str]) -> int:
        """Take what `encode_stream` yields; returns how many of the tokens were new, up to max_tokens."""
        before = self.left
        if piece.begins:
            self.ends_at = {"file": piece.file, "document": piece.document, "token": 0}
            self.of_document = set()
        self.of_document |= remarks
        done = min(self.skip, len(tokens))  # in a finished shard already
        self.skip -= done
        self.ends_at["token"] += done
        while done < len(tokens) and self.left:
            if self.filled == len(self.buffer):
                self.finish_shard()
            n = min(len(tokens) - done, len(self.buffer) - self.filled, self.left)
            self.buffer[self.filled : self.filled + n] = tokens[done : done + n]
            self.filled, self.left, done = self.filled + n, self.left - n, done + n
            self.ends_at["token"] += n
        if piece.ends and done == len(tokens):
            self.ends_at = {"file": piece.file, "document": piece.document + 1, "token": 0}
            self.documents += piece.text is not None
            self.remarks.update(self.of_document)
        return before - self.left

    def finish_shard(self) -> None:
        shards = self.record["shards"]
        path = self.folder / f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        try:
            write_file(path, lambda file: np.save(file, self.buffer[: self.filled]))
        except OSError as error:
            raise RunFault(
                f"{path} could not be written ({error}); make room, then the same command goes on"
            ) from error
        shards.append({"file": path.name, "tokens": self.filled, "sha256": sha256(path),
                       "ends_at": self.ends_at.copy(), "documents": self.documents,
                       "remarks": dict(sorted(self.remarks.items()))})  # fmt: skip
        self.filled, self.documents, self.remarks = 0, 0, Counter()
        self.write_record()
        self.on_shard(self.ends_at["file"])

    def write_record(self) -> None:
        shards = self.record["shards"]
        self.record["documents"] = sum(shard["documents"] for shard in shards)
        self.record["tokens"] = sum(shard["tokens"] for shard in shards)
        self.record["remarks"] = dict(sum((Counter(shard["remarks"]) for shard in shards), Counter()))
        write_file(self.folder / PARTIAL, lambda file: file.write(to_json(self.record).encode()))

    def finish(self) -> None:
        """Write the last shard and shards.json. Raises InputError when the input has no document, or not more
        tokens than the validation shard takes."""
        if self.filled:
            self.finish_shard()
        if len(self.record["shards"]) < 2:
            for shard in self.record["shards"]:
                (self.folder / shard["file"]).unlink()
            (self.folder / PARTIAL).unlink()
            if not self.record["shards"]:
                raise InputError("the input has no document")
            n_tokens = self.record["tokens"]
            raise InputError(
                f"the input's {n_tokens:,} tokens all fit into the first shard, which is the validation "
                "split, and leave none to train on; choose a smaller --shard_size, for example "
                f"{max(1, n_tokens // 10)}"
            )
        os.replace(self.folder / PARTIAL, self.folder / "shards.json")


class Progress:
    """The job in tokens: on a terminal a bar, elsewhere a line every half minute. How many tokens the input
    has is known at its end; until then it is estimated from the share of its bytes that is read."""

    def __init__(self, files: list[File], n_tokens: int, limit: int | None):
        self.limit, self.n_tokens = limit, n_tokens
        self.before, self.input_size = {}, 0  # bytes
        for file in files:
            self.before[file.name] = self.input_size, file.size
            self.input_size += file.size
        self.started = self.said = time.monotonic()
        self.at_start = n_tokens
        self.bar = tqdm(initial=n_tokens, total=limit, unit=" tokens", unit_scale=True, dynamic_ncols=True,
                        disable=not sys.stderr.isatty())  # fmt: skip

    def update(self, n: int, piece: Piece, shard: int) -> None:
        self.n_tokens += n
        before, size = self.before[piece.file]
        read = (before + piece.share * size) / max(1, self.input_size)
        total = min(self.limit or sys.maxsize, int(self.n_tokens / read) if read else sys.maxsize)
        self.bar.total = max(total, self.n_tokens)
        self.bar.set_postfix_str(f"shard {shard}, {piece.file}", refresh=False)
        self.bar.update(n)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= 30:
            self.said = now
            rate = (self.n_tokens - self.at_start) / (now - self.started)
            left = tqdm.format_interval((self.bar.total - self.n_tokens) / rate) if rate else "?"
            done = (
                f"{self.n_tokens:,} of about {self.bar.total:,} tokens | {rate:,.0f} tokens/s | {left} left"
            )
            print(f"{done} | shard {shard} | {piece.file}", flush=True)


def write_shards(
    stream: Iterable[Piece], writer: ShardWriter, workers: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Tokenize `stream` into the writer's shards; returns the contents of shards.json."""
    encoding = get_encoding(writer.record["encoding"])
    for piece, tokens, remarks in encode_stream(stream, encoding, workers):
        n = writer.add(piece, tokens, remarks)
        if progress:
            progress.update(n, piece, len(writer.record["shards"]))
        if not writer.left:
            break
    writer.finish()
    return writer.record


def write_demo_shards(output_dir: Path) -> None:
    """The demo's data: `standard_library_prose` in the bytes encoding. Does nothing if `output_dir` is
    there."""
    if output_dir.exists():
        return
    python = f"Python {sys.version.split()[0]}"
    print(f"writing the prose of the standard library of {python} to {output_dir}")
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    settings = {"shard_size": 200_000, "max_tokens": None}
    record = new_record(get_encoding("bytes"), {"dataset": f"prose of {python}'s library"}, settings)
    texts = enumerate(standard_library_prose())
    write_shards((Piece("standard library", i, text) for i, text in texts), ShardWriter(temporary, record))
    temporary.rename(output_dir)


# -----------------------------------------------------------------------------
# the command


def check_flags(config: ShardConfig) -> None:
    for name, smallest in (("shard_size", 2), ("workers", 1), ("max_tokens", 1)):
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: must be at least {smallest}")
    if config.max_tokens is not None and config.max_tokens <= config.shard_size:
        raise InputError(
            f"--max_tokens {config.max_tokens} with --shard_size {config.shard_size}: the first shard is the "
            "validation split, so none would be left to train on; choose a smaller --shard_size"
        )
    given = [argument.split("=")[0] for argument in sys.argv]
    if given.count("--input") > 1 or ("--input" in given and not all(config.input or [""])):
        raise InputError("--input: name one or more files behind one --input")
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"--output_dir {config.output_dir}: a file of that name exists")
    if config.write_shards_json and not config.check:
        raise InputError("--write_shards_json goes with --check FOLDER")


def find_record(folder: Path) -> dict[str, Any] | None:
    """What an earlier job in `folder` recorded, finished or not. Raises InputError when there are shards but
    no record."""
    for name in ("shards.json", PARTIAL):
        if (folder / name).exists():
            record = read_record(folder / name)
            return record if record["shards"] else None  # none: it had only begun
    if list(folder.glob("*.npy")):
        raise InputError(
            f"{folder} holds shards made elsewhere, of which there is no record; see what they are with "
            f"--check {folder}, or choose another --output_dir"
        )
    return None


def drop_damaged(folder: Path, record: dict[str, Any]) -> bool:
    """Take the first shard that is not whole, and all that follow it, off the record; says whether there was
    one."""
    for i, shard in enumerate(record["shards"]):
        try:
            if len(open_shard(folder / shard["file"])) == shard["tokens"]:
                continue
        except InputError:
            pass
        print(f"{folder / shard['file']} is missing or damaged: going on from there")
        del record["shards"][i:]
        return True
    return False


def compare_records(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError, with the difference, unless the shards in `folder` are made of the same input with the same
    settings."""
    differences = []
    for name in now:
        if isinstance(now[name], list):
            changed = [item for item in then.get(name) or [] if item not in now[name]]
            changed += [item for item in now[name] if item not in (then.get(name) or [])]
            if changed:
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                differences.append(f"{name} differ in {changed[0]}{more}")
                continue
        if then.get(name) != now[name]:
            differences.append(f"{name} was {then.get(name)}, is {now[name]}")
    if differences:
        raise InputError(
            f"{folder} was made with other settings: {'; '.join(differences)}; choose another "
            "--output_dir, or remove that one"
        )


def megabytes(size: float) -> str:
    """A number of bytes for a reader."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{math.ceil(size / 1e6)} MB"


def check_disk(config: ShardConfig, files: list[File], n_tokens: int) -> str:
    """Say what the job takes, of which `n_tokens` are there already. Raises InputError when the disk is too
    small for the rest."""
    # English has about 4.4 bytes in a token of GPT-2
    estimate = sum(text_bytes(file, config.text_column) for file in files) / (
        4.4 if config.encoding == "gpt2" else 1
    )
    estimate = max(min(estimate, config.max_tokens or estimate), n_tokens)
    sizes = sorted(file.size for file in files if file.path is None)
    downloads = sum(sizes if config.keep_downloads else sizes[-2:])
    needed, free = 2 * (estimate - n_tokens) + downloads, shutil.disk_usage(config.output_dir).free
    at_once = ("all downloads" if config.keep_downloads else "two downloads") + " and " if sizes else ""
    summary = (
        f"about {estimate:,.0f} tokens in {math.ceil(estimate / config.shard_size)} shards; takes up to "
        f"{megabytes(needed)} of disk ({at_once}the shards), {megabytes(free)} are free"
    )
    if needed > free:
        raise InputError(
            f"--output_dir {config.output_dir}: {summary}; choose another disk, or set --max_tokens"
        )
    return summary


def main(config: ShardConfig) -> None:
    check_flags(config)
    if config.check:
        check_folder(config.check, config.encoding, config.write_shards_json)
        return
    folder = config.output_dir
    files = local_files(config.input, folder)
    from_hub = () if files else ("dataset", "config", "revision")
    if config.config is None and config.dataset == FINEWEB_EDU:
        config = replace(config, config="sample-10BT")
    settings = {
        name: getattr(config, name) for name in ("shard_size", "max_tokens", "text_column", *from_hub)
    }
    source: dict[str, Any] = {"files": [[file.name, file.size] for file in files]}
    encoding = get_encoding(config.encoding)  # fails now, not after the first download

    held = lock_folder(folder, "--output_dir")
    record = find_record(folder)
    if record:
        then = {
            "encoding": record["encoding"],
            "files": record["source"].get("files", []),
            **record["settings"],
        }
        compare_records(folder, then, {"encoding": config.encoding, **source, **settings})
        if not drop_damaged(folder, record) and (folder / "shards.json").exists():
            print(f"{folder} is finished: {record['tokens']:,} tokens in {len(record['shards'])} shards")
            if not config.keep_downloads:
                shutil.rmtree(folder / "downloads", ignore_errors=True)
            return
    if from_hub:
        commit = record["source"]["revision"] if record else config.revision
        commit, files = hub_files(config.dataset, config.config, commit)
        source = {"dataset": config.dataset, "config": config.config, "revision": commit}
    record = record or new_record(encoding, source, settings)
    n_tokens = sum(shard["tokens"] for shard in record["shards"])
    ends_at = record["shards"][-1]["ends_at"] if record["shards"] else None

    name = f"{config.dataset} {config.config or ''} at {commit[:8]}" if from_hub else "the input"
    size = megabytes(sum(file.size for file in files))
    print(f"{name}: {len(files)} files, {size}; {encoding.name} encoding, {config.workers} threads")
    print(f"to {folder}: {check_disk(config, files, n_tokens)}")
    if n_tokens:
        print(f"going on after {len(record['shards'])} finished shards, {n_tokens:,} tokens")

    hub = None
    if from_hub:  # a trial may not need the next file
        ahead = config.max_tokens is None
        hub = Downloads(config.dataset, commit, files, folder / "downloads", config.keep_downloads, ahead)
        hub.drop_before(ends_at["file"] if ends_at else files[0].name)
    writer = ShardWriter(folder, record, hub.drop_before if hub else lambda file: None)
    progress = Progress(files, n_tokens, config.max_tokens)
    started = time.monotonic()
    write_shards(read_files(files, config.text_column, ends_at, hub), writer, config.workers, progress)
    progress.bar.close()
    if hub and not config.keep_downloads:
        shutil.rmtree(folder / "downloads", ignore_errors=True)
    held.close()

    seconds = time.monotonic() - started
    remarks = "".join(f"; {count:,} {REMARKS[name]}" for name, count in record["remarks"].items())
    held_out = record["shards"][0]["tokens"]
    print(
        f"{record['documents']:,} documents, {record['tokens']:,} tokens in {len(record['shards'])} shards "
        f"in {folder} (the first is the validation split, {held_out:,} tokens or "
        f"{held_out / record['tokens']:.1%} of all; the last holds what was left, "
        f"{record['shards'][-1]['tokens']:,}: that is normal)"
        f"{remarks}; {tqdm.format_interval(seconds)}, {(record['tokens'] - n_tokens) / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    run_command(main, ShardConfig)
