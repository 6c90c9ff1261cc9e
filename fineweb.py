"""
Text in, token shards out.

    python fineweb.py                           # FineWeb-Edu sample-10BT from the Hub: 100 shards, 20 GB
    python fineweb.py --max_tokens 300000000    # a trial: its first 300 million tokens
    python fineweb.py --input my_text/ --output_dir my_shards --shard_size 1000000
    python fineweb.py --shards OWNER/NAME       # no text: fetch the ready token shards of a dataset
    python fineweb.py --check my_shards         # verify shards, made here or elsewhere

A shard is a 1-D uint16 `.npy` file of token ids. All documents, in input order and each preceded by
`<|endoftext|>`, form one stream of tokens, which is cut into shards. The first shard is the validation split;
the rest are for training. `shards.json`, written last, records what they were made from.

You may kill the job at any time: the same command resumes after the last finished shard, recorded in
`shards.partial.json`, and produces the same bytes.

Files on the Hub (hub.py in support/data) or on disk become documents (documents.py), tokens (tokens.py) and
shards (shards.py). This file connects these steps. Shards that others have made take a shorter way
(ready_shards.py).
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from support.cli import InputError, file_size, plural, run_command
from support.data.documents import File, Piece, local_files, read_documents, text_bytes
from support.data.encodings import get_encoding
from support.data.hub import Downloads, dataset_files
from support.data.ready_shards import fetch_shards
from support.data.shards import (
    Place,
    Record,
    ShardWriter,
    check_folder,
    compare_records,
    drop_damaged,
    find_record,
    new_record,
    write_shards,
)
from support.data.tokens import REMARKS
from support.files import lock_folder

from tqdm import tqdm

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
BYTES_PER_TOKEN = {"gpt2": 4.4, "bytes": 1.0}  # for English text
LITTLE = 1_000_000  # bytes of text; less is too little to learn English from


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
    """Its branch, tag or commit; resolved to a commit at the start, and recorded."""
    text_column: str = "text"
    """The column of a parquet file, or the key of a JSON line, that holds the text."""
    # -- instead: shards that others have made
    shards: str | None = None
    """OWNER/NAME of a dataset on the Hub that holds token shards in the gpt2 encoding, .npy or llm.c's .bin,
    with 'train' or 'val' in their names; goes with --revision, --output_dir and --max_tokens only."""
    # -- what is written
    output_dir: Path = Path("edu_fineweb10B")
    """Folder for the shards; made if missing."""
    shard_size: int = 100_000_000
    """Tokens per shard (2 bytes each)."""
    max_tokens: int | None = None
    """Stop after this many tokens, with --shards after the shard that holds the last of them; default: the
    whole input."""
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


def check_flags(config: ShardConfig) -> None:
    """Raises InputError for flags that make no sense."""
    for name, smallest in (("shard_size", 2), ("workers", 1), ("max_tokens", 1)):
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: must be at least {smallest}")
    if config.shards is not None:
        usable = {"shards", "revision", "output_dir", "max_tokens"}
        for name, default in vars(ShardConfig()).items():
            if name not in usable and getattr(config, name) != default:
                raise InputError(f"--{name} does not go with --shards, whose files are tokens already")
    elif config.max_tokens is not None and config.max_tokens <= config.shard_size:
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


def check_disk(config: ShardConfig, files: list[File], n_tokens: int) -> str:
    """Describe the job's disk use; `n_tokens` are already written. Raises InputError if the rest does not fit
    on the disk."""
    text = sum(text_bytes(file, config.text_column) for file in files)
    estimate = text / BYTES_PER_TOKEN[config.encoding]
    estimate = max(min(estimate, config.max_tokens or estimate), n_tokens)
    sizes = sorted(file.size for file in files if file.path is None)
    downloads = sum(sizes if config.keep_downloads else sizes[-2:])
    needed, free = 2 * (estimate - n_tokens) + downloads, shutil.disk_usage(config.output_dir).free
    at_once = ("all downloads" if config.keep_downloads else "two downloads") + " and " if sizes else ""
    summary = (
        f"about {estimate:,.0f} tokens in {plural(math.ceil(estimate / config.shard_size), 'shard')}; needs "
        f"up to {file_size(needed)} of disk space ({at_once}the shards); {file_size(free)} is free"
    )
    if needed > free:
        raise InputError(
            f"--output_dir {config.output_dir}: {summary}; choose another disk, or set --max_tokens"
        )
    return summary


def read_files(
    files: list[File], column: str, ends_at: Place | None, downloads: Downloads | None = None
) -> Iterator[Piece]:
    """The documents of all files, from the one that `ends_at` (of the last finished shard) names."""
    names = [file.name for file in files]
    start = names.index(ends_at["file"]) if ends_at else 0
    for i in range(start, len(files)):
        path = files[i].path
        if path is None:
            assert downloads is not None, "a file on the Hub is downloaded"
            path = downloads.path(i)
        first = ends_at["document"] if ends_at and i == start else 0
        for piece in read_documents(files[i], path, column, first):
            if downloads:
                downloads.look_ahead(i)
            yield piece


class Progress:
    """Progress in tokens: a bar on a terminal, elsewhere a line every 30 seconds. The input's total is
    estimated from the share of its bytes read so far."""

    def __init__(self, files: list[File], n_tokens: int, limit: int | None, record: Record):
        self.limit, self.n_tokens, self.record = limit, n_tokens, record
        self.before: dict[str, tuple[int, int]] = {}  # file name: (bytes before the file, its own)
        self.input_size = 0  # bytes
        for file in files:
            self.before[file.name] = self.input_size, file.size
            self.input_size += file.size
        self.started = self.said = time.monotonic()
        self.at_start = n_tokens
        self.bar = tqdm(initial=n_tokens, total=limit, unit=" tokens", unit_scale=True, dynamic_ncols=True,
                        disable=not sys.stderr.isatty())  # fmt: skip

    def update(self, n: int, piece: Piece) -> None:
        self.n_tokens += n
        shard = len(self.record["shards"])
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


def closing_line(folder: Path, record: Record, n_new: int, seconds: float) -> str:
    """A summary of the finished job, with its remarks."""
    held_out, last = record["shards"][0]["tokens"], record["shards"][-1]["tokens"]
    remarks = "".join(f"; {REMARKS[name]}: {count:,}" for name, count in record["remarks"].items())
    return (
        f"{plural(record['documents'], 'document')}, {record['tokens']:,} tokens in "
        f"{plural(len(record['shards']), 'shard')} in {folder} (the first is the validation split, "
        f"{held_out:,} tokens or {held_out / record['tokens']:.1%} of all; the last holds what was left, "
        f"{last:,}: that is normal){remarks}; "
        f"{tqdm.format_interval(seconds)}, {n_new / seconds:,.0f} tokens/s"
    )


def main(config: ShardConfig) -> None:
    check_flags(config)
    if config.check:
        check_folder(config.check, config.encoding, config.write_shards_json)
        return
    if config.shards is not None:
        with lock_folder(config.output_dir, "--output_dir"):
            fetch_shards(config.shards, config.revision, config.output_dir, config.max_tokens)
        return
    folder = config.output_dir
    files = local_files(config.input, folder)
    from_hub = not config.input
    if config.config is None and config.dataset == FINEWEB_EDU:
        config = replace(config, config="sample-10BT")
    names = [
        "shard_size",
        "max_tokens",
        "text_column",
        *(("dataset", "config", "revision") if from_hub else ()),
    ]
    settings = {name: getattr(config, name) for name in names}
    source: dict[str, Any] = {"files": [[file.name, file.size] for file in files]}

    held = lock_folder(folder, "--output_dir")
    record = find_record(folder)
    if record:
        then = {
            "encoding": record["encoding"],
            "files": record["source"].get("files", []),
            **record["settings"],
        }
        compare_records(folder, then, {"shards": None, "encoding": config.encoding, **source, **settings})
        if not drop_damaged(folder, record) and (folder / "shards.json").exists():
            shards = plural(len(record["shards"]), "shard")
            print(f"{folder} is finished: {record['tokens']:,} tokens in {shards}")
            if not config.keep_downloads:
                shutil.rmtree(folder / "downloads", ignore_errors=True)
            return
    commit = ""
    if from_hub:
        commit = record["source"]["revision"] if record else config.revision
        commit, files = dataset_files(config.dataset, config.config, commit)
        source = {"dataset": config.dataset, "config": config.config, "revision": commit}
    record = record or new_record(get_encoding(config.encoding), source, settings)
    n_tokens = sum(shard["tokens"] for shard in record["shards"])
    ends_at = record["shards"][-1]["ends_at"] if record["shards"] else None

    name = f"{config.dataset} {config.config or ''} at {commit[:8]}" if from_hub else "the input"
    size = file_size(sum(file.size for file in files))
    how = f"{config.encoding} encoding, {plural(config.workers, 'thread')}"
    print(f"{name}: {plural(len(files), 'file')}, {size}; {how}")
    print(f"to {folder}: {check_disk(config, files, n_tokens)}")
    if n_tokens:
        print(f"resuming after {plural(len(record['shards']), 'finished shard')}, {n_tokens:,} tokens")

    hub = None
    if from_hub:  # with --max_tokens, the next file may not be needed
        ahead = config.max_tokens is None
        hub = Downloads(config.dataset, commit, files, folder / "downloads", config.keep_downloads, ahead)
        hub.drop_before(ends_at["file"] if ends_at else files[0].name)
    writer = ShardWriter(folder, record, hub.drop_before if hub else lambda file: None)
    progress = Progress(files, n_tokens, config.max_tokens, record)
    started = time.monotonic()
    documents = read_files(files, config.text_column, ends_at, hub)
    write_shards(documents, writer, config.workers, progress.update)
    progress.bar.close()
    if hub and not config.keep_downloads:
        shutil.rmtree(folder / "downloads", ignore_errors=True)
    held.close()
    print(closing_line(folder, record, record["tokens"] - n_tokens, time.monotonic() - started))
    if record["tokens"] * BYTES_PER_TOKEN[config.encoding] < LITTLE:
        print("note: less than a million characters of text; a model will memorize it")


if __name__ == "__main__":
    run_command(main, ShardConfig, usual_flag="--input")
