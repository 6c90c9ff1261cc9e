"""
Text in, token shards out.

    python fineweb.py                           # FineWeb-Edu sample-10BT from the Hub: 100 shards, 20 GB
    python fineweb.py --max_tokens 300000000    # its first 300 million tokens: a trial
    python fineweb.py --input my_text/*.txt --output_dir my_shards --shard_size 1000000

A shard is a 1-D uint16 `.npy` file of token ids. The stream that is cut into shards is, for every document in
input order, `<|endoftext|>` and then the document's tokens. The first shard is the validation split, the
others are for training. `shards.json`, written last, says what they were made from.

This file also holds the two encodings (`get_encoding`), the prose that the demo trains on
(`standard_library_prose`) and the way every script here starts (`run_command`).
"""

import ast
import contextlib
import glob
import hashlib
import json
import os
import pydoc_data.topics
import shutil
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

DATASET = "HuggingFaceFW/fineweb-edu"
DATASET_FOLDER = "sample/10BT"  # in the dataset's repository: 14 parquet files, 9.95 billion GPT-2 tokens
END_OF_TEXT = "<|endoftext|>"
DOCUMENTS_PER_TASK = 256  # what one worker takes at a time: large enough to hide the cost of handing it over


@dataclass(frozen=True)
class ShardConfig:
    """Tokenize text into shards for train_gpt2.py."""

    input: tuple[str, ...] = ()
    """Local .parquet (column "text"), .jsonl (key "text") or .txt files; none: FineWeb-Edu sample-10BT."""
    output_dir: Path = Path("edu_fineweb10B")
    """Folder for the shards; made if missing."""
    shard_size: int = 100_000_000
    """Tokens per shard (2 bytes each)."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that tokenize; their number never changes the result."""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: the 50,257 tokens of GPT-2; bytes: one token per byte."""
    max_tokens: int | None = None
    """Stop after this many tokens; default: the whole input."""
    revision: str = "main"
    """Branch, tag or commit of FineWeb-Edu; the commit it stands for is recorded in shards.json."""


# -----------------------------------------------------------------------------
# how every script starts, and what it says when its input is bad


class CommandError(Exception):
    """What ends a script with one line: the file or flag, what is wrong, what to do. `alone`: of the
    processes that torchrun started, only this one may have found it."""

    def __init__(self, message: str, alone: bool = False):
        super().__init__(message)
        self.alone = alone


class InputError(CommandError, ValueError):
    """Bad input: exit status 2."""


class RunFault(CommandError):
    """A fault while running: exit status 1."""


def run_command(main: Callable[[Any], None], config: Any, default: Any = None) -> None:
    """Parse the command line into `config` (a dataclass, or a union of them: subcommands) and call `main`
    with it; `default` is an instance that holds other defaults than the dataclass.

    Bad input ends with one line on standard error and exit status 2, a fault while running (a full disk, no
    permission) with one line and status 1, Ctrl-C with 130; never with a traceback.
    """
    options = {} if default is None else {"default": default}
    arguments = tyro.cli(config, use_underscores=True, **options)
    try:
        main(arguments)
    except (CommandError, OSError) as error:
        # under torchrun, what all processes found is said once on each host
        if getattr(error, "alone", True) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# -----------------------------------------------------------------------------
# encodings


def get_encoding(name: str) -> tiktoken.Encoding:
    """The encoding called `name`: "gpt2" (50,257 tokens) or "bytes" (256 single bytes and <|endoftext|>).

    Raises InputError for another name, or when tiktoken can't download GPT-2's vocabulary.
    """
    if name == "bytes":
        single_bytes = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str="(?s:.)", mergeable_ranks=single_bytes, special_tokens={END_OF_TEXT: 256}
        )
    if name != "gpt2":
        raise InputError(f"encoding {name!r} is unknown; there are 'gpt2' and 'bytes'")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors
        raise InputError(
            "tiktoken could not download GPT-2's vocabulary (vocab.bpe and encoder.json). Without a network, "
            "copy tiktoken's cache folder from a machine that has it and set TIKTOKEN_CACHE_DIR to it, or "
            f"use the 'bytes' encoding. What it said: {str(error).splitlines()[0]}"
        ) from error


# -----------------------------------------------------------------------------
# documents


@dataclass(frozen=True)
class Documents:
    """Consecutive documents of one input file; `first` is the index of the first of them in that file."""

    file: str
    first: int
    texts: list[str]


def read_documents(path: Path, name: str) -> Iterator[Documents]:
    """The documents of a .parquet, .jsonl or .txt file (a .txt file is one document), in order, in small
    groups.

    Raises InputError, naming file and line, for what is not a document.
    """
    if path.suffix == ".txt":
        yield Documents(name, 0, [path.read_text(encoding="utf-8", errors="replace")])
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8", errors="replace") as lines:
            yield from in_groups(
                name, (text_of_line(path, number, line) for number, line in enumerate(lines, 1))
            )
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as parquet:
                if "text" not in parquet.schema_arrow.names:
                    raise InputError(
                        f"{path}: no column 'text', only {', '.join(parquet.schema_arrow.names)}"
                    )
                row_groups = (
                    parquet.read_row_group(i, columns=["text"]) for i in range(parquet.num_row_groups)
                )
                texts = (text or "" for table in row_groups for text in table.column("text").to_pylist())
                yield from in_groups(name, texts)
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a sound parquet file ({error})") from error
    else:
        raise InputError(
            f"{path}: ends in {path.suffix or 'nothing'}; --input takes .parquet, .jsonl and .txt"
        )


def text_of_line(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path}, line {number}: not a JSON object with a "text"') from error
    if not isinstance(text, str):
        raise InputError(f'{path}, line {number}: "text" is {type(text).__name__}, not a string')
    return text


def in_groups(file: str, texts: Iterable[str]) -> Iterator[Documents]:
    first, group = 0, []
    for text in texts:
        group.append(text)
        if len(group) == DOCUMENTS_PER_TASK:
            yield Documents(file, first, group)
            first, group = first + len(group), []
    if group:
        yield Documents(file, first, group)


def local_documents(patterns: Iterable[str]) -> Iterator[Documents]:
    """The documents of all files that `patterns` name, in the order given."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise InputError(f"--input {pattern}: no such file")
        paths.extend(Path(name) for name in found)
    for path in paths:
        if path.is_dir():
            raise InputError(f"--input {path}: a folder; name its files, for example {path}/*.parquet")
        yield from read_documents(path, path.name)


def hub_files(revision: str) -> tuple[str, list[str]]:
    """The commit that `revision` of FineWeb-Edu stands for, and the names of the sample's parquet files."""
    from huggingface_hub import HfApi

    with hub_errors(f"{DATASET} at {revision!r}"):
        info = HfApi().dataset_info(DATASET, revision=revision)
    names = [s.rfilename for s in info.siblings or []]
    files = sorted(n for n in names if n.startswith(DATASET_FOLDER + "/") and n.endswith(".parquet"))
    if not files:
        raise InputError(
            f"{DATASET} at {revision!r} has no parquet files in {DATASET_FOLDER}; try --revision main"
        )
    return info.sha, files


def hub_documents(commit: str, files: list[str], folder: Path) -> Iterator[Documents]:
    """The documents of the Hub's `files`, downloaded one at a time into `folder` and deleted when read."""
    from huggingface_hub import hf_hub_download

    for name in files:
        with hub_errors(name):
            path = Path(
                hf_hub_download(DATASET, name, repo_type="dataset", revision=commit, local_dir=folder)
            )
        yield from read_documents(path, name)
        path.unlink()


@contextlib.contextmanager
def hub_errors(wanted: str) -> Iterator[None]:
    """Turns the many ways a download fails into one InputError that says what was wanted."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except Exception as error:
        network = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)
        from_client = type(error).__module__.startswith(("http", "requests"))
        if isinstance(error, InputError) or not (from_client or isinstance(error, network)):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"could not fetch {wanted} from the Hugging Face Hub: {first_line}") from error


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
# tokens


def encode_documents(encoding: tiktoken.Encoding, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of `texts`, each document behind an <|endoftext|>, and every document's share of them.

    Returns (n_tokens,) uint16 and (n_documents,) int64. A "<|endoftext|>" written in a document is text.
    """
    separator = np.array([encoding.eot_token], dtype=np.uint32)
    pieces = []
    for text in texts:
        try:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD, as in tiktoken's encode_ordinary
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
        pieces += [separator, tokens]
    stream = np.concatenate(pieces)
    assert stream.max() < 2**16, "a token id does not fit uint16"
    lengths = np.array([len(piece) + 1 for piece in pieces[1::2]], dtype=np.int64)
    return stream.astype(np.uint16), lengths


_worker_encoding: tiktoken.Encoding | None = None  # one per worker process, made by start_worker


def start_worker(encoding_name: str) -> None:
    global _worker_encoding
    _worker_encoding = get_encoding(encoding_name)


def encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return encode_documents(_worker_encoding, texts)


def encode_stream(
    stream: Iterable[Documents], encoding_name: str, workers: int
) -> Iterator[tuple[Documents, np.ndarray, np.ndarray]]:
    """Each group of documents with its tokens and lengths (see `encode_documents`), in input order.

    At most three groups per worker are in flight, so memory is bounded however large the input. Workers are
    spawned, not forked: the same code runs on Linux, macOS and Windows.
    """
    if workers == 1:
        encoding = get_encoding(encoding_name)
        for documents in stream:
            yield documents, *encode_documents(encoding, documents.texts)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (encoding_name,)) as pool:
        in_flight: deque = deque()
        try:
            for documents in stream:
                in_flight.append((documents, pool.submit(encode_in_worker, documents.texts)))
                if len(in_flight) > 3 * workers:
                    documents, result = in_flight.popleft()
                    yield documents, *result.result()
            while in_flight:
                documents, result = in_flight.popleft()
                yield documents, *result.result()
        finally:  # the reader may stop early (--max_tokens): drop what nobody waits for
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# shards


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Call `write(file)` on a temporary file, flush it to disk, then give it its final name: all or
    nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shards(
    stream: Iterable[Documents],
    output_dir: Path,
    *,
    shard_size: int,
    encoding_name: str,
    workers: int = 1,
    max_tokens: int | None = None,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Tokenize `stream` and cut it into shards in `output_dir`; returns the contents of shards.json.

    A shard ends after exactly `shard_size` tokens, in the middle of a document if need be; only the last is
    shorter. `source` (where the text came from) is recorded as it is. Raises InputError when the input has no
    document, or not more tokens than the validation shard takes.
    """
    encoding = get_encoding(encoding_name)
    limit = max_tokens or sys.maxsize
    buffer, filled = np.empty(min(shard_size, limit), dtype=np.uint16), 0  # the shard in progress
    shards: list[dict[str, Any]] = []
    n_tokens = n_documents = 0
    ends_at: dict[str, Any] = {}

    def finish_shard() -> None:
        split = "train" if shards else "val"
        path = output_dir / f"edufineweb_{split}_{len(shards):06d}.npy"
        write_file(path, lambda file: np.save(file, buffer[:filled]))
        shards.append({"file": path.name, "tokens": filled, "sha256": sha256(path), "ends_at": ends_at})

    with tqdm(
        total=max_tokens, unit=" tokens", unit_scale=True, desc="tokenizing", dynamic_ncols=True
    ) as bar:
        for documents, tokens, lengths in encode_stream(stream, encoding_name, workers):
            document_ends = np.cumsum(lengths)
            taken = 0
            while taken < len(tokens) and n_tokens < limit:
                n = min(len(tokens) - taken, len(buffer) - filled, limit - n_tokens)
                buffer[filled : filled + n] = tokens[taken : taken + n]
                taken, filled, n_tokens = taken + n, filled + n, n_tokens + n
                bar.update(n)
                # the next token of the stream: token `token` of document `document` of `file`
                whole = int(np.searchsorted(document_ends, taken, side="right"))
                into = taken - (int(document_ends[whole - 1]) if whole else 0)
                ends_at = {"file": documents.file, "document": documents.first + whole, "token": into}
                if filled == len(buffer) and n_tokens < limit:
                    finish_shard()
                    filled = 0
                    bar.set_postfix_str(f"{len(shards)} shards written")
            n_documents += int(np.searchsorted(document_ends, taken, side="right"))
            if n_tokens >= limit:
                break
    if not n_tokens:
        raise InputError("the input has no document")
    if len(shards) + (filled > 0) < 2:
        for shard in shards:
            (output_dir / shard["file"]).unlink()
        raise InputError(
            f"the input's {n_tokens:,} tokens all fit into the first shard, which is the validation split, "
            f"and leave none to train on; choose a smaller --shard_size, for example {max(1, n_tokens // 10)}"
        )
    if filled:
        finish_shard()
    record = {
        "encoding": encoding_name,
        "vocab_size": encoding.n_vocab,
        "source": source,
        "settings": {"shard_size": shard_size, "max_tokens": max_tokens},
        "documents": n_documents,
        "tokens": n_tokens,
        "shards": shards,
    }
    write_file(output_dir / "shards.json", lambda file: file.write(to_json(record).encode()))
    return record


@dataclass(frozen=True)
class Shards:
    """The token shards of a folder, memory-mapped: (n,) uint16 each, keyed by split ("train", "val")."""

    folder: Path
    files: dict[str, list[Path]]
    tokens: dict[str, list[np.ndarray]]
    encoding: str
    dataset: str | None  # which data it is, where shards.json says so
    fingerprint: str  # changes whenever the shards do

    def count(self, split: str) -> int:
        return sum(len(tokens) for tokens in self.tokens[split])


def open_shard(file: Path) -> np.ndarray:
    """Map one shard, (n,) uint16: `.npy`, or llm.c's `.bin` (256 int32 of header: 20240520, 1, n).

    Raises InputError, naming the file, unless it is exactly that.
    """
    remedy = "write it again with fineweb.py"
    try:
        if file.suffix == ".bin":
            header = np.fromfile(file, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise InputError(f"{file}: not a token shard of llm.c (its header is wrong)")
            tokens = np.memmap(file, dtype="<u2", mode="r", offset=header.nbytes)
            if len(tokens) != header[2]:
                raise InputError(
                    f"{file}: holds {len(tokens):,} tokens, its header says {header[2]:,}; {remedy}"
                )
        else:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: empty, cut short or not a token shard ({error}); {remedy}") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise InputError(f"{file}: {tokens.ndim}-D {tokens.dtype}, a token shard is 1-D uint16; {remedy}")
    return tokens


def read_shards_json(folder: Path) -> dict[str, Any]:
    """The record that `write_shards` left. InputError if it is damaged."""
    try:
        record = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        if not isinstance(record["tokens"], int) or not isinstance(record["encoding"], str):
            raise TypeError
        for entry in record["shards"]:
            if not isinstance(entry["tokens"], int) or not isinstance(entry["file"] + entry["sha256"], str):
                raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'shards.json'}: damaged; write the shards again with fineweb.py"
        ) from error
    return record


def load_shards(folder: Path, verify: bool = False) -> Shards:
    """Find and check the shards in `folder`; `shards.json` is used if there is one. `verify` reads them all
    and compares their sums.

    Raises InputError when the folder, a split or a shard is missing or damaged.
    """
    if not folder.is_dir():
        raise InputError(
            f"the data folder {folder} does not exist; write it with `python fineweb.py`, name another "
            "with --data_dir, or try `python train_gpt2.py --demo`"
        )
    files = sorted(file for file in folder.iterdir() if file.suffix in (".npy", ".bin"))
    record: dict[str, Any] = {}
    if (folder / "shards.json").exists():
        record = read_shards_json(folder)
        expected = {entry["file"]: entry["tokens"] for entry in record["shards"]}
        sums = {entry["file"]: entry["sha256"] for entry in record["shards"]}
        if missing := expected.keys() - {file.name for file in files}:
            raise InputError(
                f"{folder / min(missing)}: missing, though shards.json lists it; run fineweb.py again"
            )
        files = [file for file in files if file.name in expected]
    splits = {split: [file for file in files if split in file.name] for split in ("train", "val")}
    tokens = {split: [open_shard(file) for file in splits[split]] for split in splits}
    digest = hashlib.sha256()
    for split in ("train", "val"):
        if not splits[split]:
            raise InputError(
                f"{folder} has no shard of the {split} split (a .npy or .bin file with '{split}' in its "
                "name); write the shards with fineweb.py"
            )
        for file, shard in zip(splits[split], tokens[split], strict=True):
            if record and len(shard) != expected[file.name]:
                raise InputError(
                    f"{file}: holds {len(shard):,} tokens, shards.json says {expected[file.name]:,}; "
                    "run fineweb.py again"
                )
            if record and verify and sha256(file) != sums[file.name]:
                raise InputError(f"{file}: its SHA-256 is not the one in shards.json; run fineweb.py again")
            digest.update(f"{file.name} {len(shard)}\n".encode())
    digest.update(json.dumps([entry["sha256"] for entry in record.get("shards", [])]).encode())
    return Shards(
        folder,
        splits,
        tokens,
        record.get("encoding", "gpt2"),
        record.get("source", {}).get("dataset"),
        digest.hexdigest(),
    )


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
    write_shards(in_groups("standard library", standard_library_prose()), temporary, shard_size=200_000,
                 encoding_name="bytes", source={"dataset": f"prose of {python}'s library"})  # fmt: skip
    temporary.rename(output_dir)


def main(config: ShardConfig) -> None:
    if config.shard_size < 2:
        raise InputError(f"--shard_size {config.shard_size}: must be at least 2 tokens")
    if config.workers < 1:
        raise InputError(f"--workers {config.workers}: must be at least 1")
    if config.max_tokens is not None and config.max_tokens < 1:
        raise InputError(f"--max_tokens {config.max_tokens}: must be at least 1")
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"--output_dir {config.output_dir}: a file of that name exists")

    settings = {"shard_size": config.shard_size, "max_tokens": config.max_tokens}
    source: dict[str, Any] = {"dataset": DATASET, "folder": DATASET_FOLDER}
    if config.input:
        source = {"files": [Path(name).name for name in config.input]}
    if (config.output_dir / "shards.json").exists():
        record = read_shards_json(config.output_dir)
        wanted = {"encoding": config.encoding, "settings": settings, "source": source}
        for key, value in wanted.items():
            made_with = record.get(key)
            if isinstance(made_with, dict):  # whatever else it records: the revision
                made_with = {
                    name: made_with.get(name) for name in {**made_with, **value} if name != "revision"
                }
            if made_with != value:
                raise InputError(
                    f"{config.output_dir} was made with {key} {made_with}, not {value}; "
                    "choose another --output_dir"
                )
        print(
            f"{config.output_dir} is finished: {record['tokens']:,} tokens in {len(record['shards'])} shards"
        )
        return
    if list(config.output_dir.glob("*.npy")):
        raise InputError(
            f"{config.output_dir} holds shards but no shards.json: a run that did not finish, or shards made "
            "elsewhere; remove them or choose another --output_dir"
        )

    get_encoding(config.encoding)  # fails now, not after the first download
    if config.input:
        stream = local_documents(config.input)
    else:
        source["revision"], files = hub_files(config.revision)
        stream = hub_documents(source["revision"], files, config.output_dir / "downloads")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    record = write_shards(
        stream,
        config.output_dir,
        shard_size=config.shard_size,
        encoding_name=config.encoding,
        workers=config.workers,
        max_tokens=config.max_tokens,
        source=source,
    )
    last = record["shards"][-1]
    print(
        f"{record['documents']:,} documents, {record['tokens']:,} tokens in {len(record['shards'])} shards "
        f"in {config.output_dir} (the last one holds what was left: {last['tokens']:,})"
    )


if __name__ == "__main__":
    run_command(main, ShardConfig)
