"""
Text in, token shards out.

    python fineweb.py                           # FineWeb-Edu sample-10BT from the Hub: 100 shards, 20 GB
    python fineweb.py --max_tokens 300000000    # a trial: its first 300 million tokens
    python fineweb.py --input my_text/ --output_dir my_shards
    python fineweb.py --shards OWNER/NAME       # no text: fetch the ready token shards of a dataset
    python fineweb.py --check my_shards         # verify shards, made here or elsewhere

A shard is a 1-D uint16 `.npy` file of token ids. All documents, each preceded by `<|endoftext|>`, form one
stream of tokens, which is cut into shards. The first shard is the validation split, with a part of each group
of files; the rest are for training. `shards.json`, written last, records what they were made from.

You may kill the job at any time: the same command resumes after the last finished shard, recorded in
`shards.partial.json`, and produces the same bytes.

Files on the Hub (hub.py in support/data) or on disk become documents (documents.py), tokens (tokens.py) and
shards (shards.py). This file connects these steps. Shards that others have made take a shorter way
(ready_shards.py).
"""

import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.cli import InputError, duration, file_size, plural, run_command
from support.data.documents import (
    File,
    Piece,
    Reading,
    check_columns,
    local_files,
    read_documents,
    text_bytes,
)
from support.data.encodings import get_encoding
from support.data.hub import TEMPORARY, Downloads, dataset_files
from support.data.ready_shards import fetch_shards
from support.data.shards import (
    WINDOW,
    JobProgress,
    Place,
    Record,
    ShardWriter,
    Stream,
    check_folder,
    compare_records,
    describe_files,
    drop_damaged,
    find_record,
    new_record,
    open_shard,
    write_shards,
)
from support.data.tokens import REMARKS, encode_piece
from support.files import check_disk, lock_folder, remove_leftovers

import numpy as np

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
BYTES_PER_TOKEN = {"gpt2": 4.4, "bytes": 1.0}  # for English text
LARGEST_SHARD = 100_000_000  # tokens, the tutorial's
LITTLE = 1_000_000  # bytes of text; less is too little to learn English from


@dataclass(frozen=True)
class ShardConfig:
    """Tokenize text into shards for train_gpt2.py."""

    # -- what is read
    input: tuple[str, ...] = ()
    """local files, folders or globs of .parquet, .jsonl (or .ndjson) and .txt (one document each); the last
    two also packed, as .gz or .zst"""
    dataset: str = FINEWEB_EDU  # without --input: a dataset on the Hugging Face Hub
    config: str | None = None  # the dataset's configuration; default for FineWeb-Edu: sample-10BT
    revision: str = "main"  # the dataset's branch, tag or commit; the commit is recorded
    text_column: str = "text"  # the parquet column, or the key of a JSON line, that holds the text
    split_at: str | None = None
    """a .txt file holds several documents, with this between them, such as "<|endoftext|>\""""
    skip_bad_rows: bool = False  # skip and count the lines that hold no document, instead of stopping there

    # -- instead: shards that others have made
    shards: str | None = None
    """OWNER/NAME of a dataset on the Hub: fetch its token shards (GPT-2's tokens, .npy or llm.c's .bin)"""

    # -- what is written
    output_dir: Path = Path("edu_fineweb10B")  # folder for the shards; made if missing
    shard_size: int | None = None
    """tokens per shard (2 bytes each); default: 100 million, or fewer if the input would not fill ten"""
    val_size: int | None = None  # tokens of the validation split; default: as many as in a shard
    max_tokens: int | None = None
    """stop after this many tokens; with --shards, after the shard that holds the last of them"""
    encoding: Literal["gpt2", "bytes"] = "gpt2"  # gpt2: GPT-2's 50,257 tokens; bytes: one token per byte

    # -- how
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """threads that tokenize; their number never changes the result"""
    keep_downloads: bool = False
    """keep the Hub's files in OUTPUT_DIR/downloads; otherwise each is deleted when its shards are safe"""

    # -- instead: look at shards that are there
    check: Path | None = None
    """only verify the shards in this folder: headers, sizes, ids, and sums where shards.json has them"""
    write_shards_json: bool = False
    """with --check: write a missing shards.json, which says that the shards are in --encoding"""


def check_flags(config: ShardConfig) -> None:
    """Raises InputError for flags that make no sense."""
    for name, smallest in (("shard_size", 2), ("val_size", 2), ("workers", 1), ("max_tokens", 1)):
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: must be at least {smallest}")
    if config.shards is not None:
        usable = {"shards", "revision", "output_dir", "max_tokens"}
        for name, default in vars(ShardConfig()).items():
            if name not in usable and getattr(config, name) != default:
                raise InputError(f"--{name} does not go with --shards, whose files are tokens already")
    else:
        val_size = config.val_size or config.shard_size
        if config.max_tokens is not None and val_size is not None and config.max_tokens <= val_size:
            raise InputError(
                f"--max_tokens {config.max_tokens}: the first {val_size} tokens are the validation split, so "
                "none would be left to train on; choose a smaller --val_size"
            )
    given = [argument.split("=")[0] for argument in sys.argv]
    if given.count("--input") > 1 or ("--input" in given and not all(config.input or [""])):
        raise InputError("--input: name one or more files behind one --input")
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"--output_dir {config.output_dir}: a file of that name exists")
    if config.split_at == "":
        raise InputError("--split_at: name what stands between two documents")
    if config.write_shards_json and not config.check:
        raise InputError("--write_shards_json goes with --check FOLDER")


def estimate_tokens(config: ShardConfig, files: list[File]) -> float:
    """About how many tokens the files hold; at most --max_tokens."""
    estimate = sum(text_bytes(file, config.text_column) for file in files) / BYTES_PER_TOKEN[config.encoding]
    return min(estimate, config.max_tokens or estimate)


def choose_shard_size(n_tokens: float) -> int:
    """100 million tokens, the tutorial's shard; if that would make fewer than ten shards, the largest of 1,
    2, 5, 10, 20, 50 ... that makes ten. Of little text, three shards that can hold a row."""
    sizes = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
    wanted = max(n_tokens / 10, min(n_tokens / 3, 2 * WINDOW), 2)
    return max(size for size in sizes if size <= min(wanted, LARGEST_SHARD))


def size_of_job(
    config: ShardConfig, files: list[File], shard_size: int, n_tokens: int, bytes_here: int = 0
) -> str:
    """State in words how much will be written; `n_tokens` are there already, and `bytes_here` of the
    downloads. Raises InputError if the rest does not fit on the disk."""
    estimate = max(estimate_tokens(config, files), n_tokens)
    n_shards = plural(math.ceil(estimate / shard_size), "shard")
    downloads = sorted(file.size for file in files if file.path is None)
    purpose = "the shards"
    if downloads:
        purpose = f"{'all' if config.keep_downloads else 'two'} downloads and the shards"
    if not config.keep_downloads:
        downloads = downloads[-2:]
    n_bytes = max(0, sum(downloads) - bytes_here) + 2 * (estimate - n_tokens)
    need = check_disk(config.output_dir, n_bytes, purpose, begun=n_tokens > 0)
    return f"about {estimate:,.0f} tokens in {n_shards} of {shard_size:,}; {need}"


def read_files(
    files: list[File], reading: Reading, place: Place | None, downloads: Downloads | None = None
) -> Iterator[Piece]:
    """The documents of the files, from the one at `place`, or all."""
    start, first = 0, 0
    if place:
        start, first = [file.name for file in files].index(place["file"]), place["document"]
    for i, file in enumerate(files[start:], start):
        path = downloads.path(i) if downloads else file.path
        assert path is not None, "a file on the Hub is downloaded"
        yield from read_documents(file, path, reading, first)
        first = 0


def groups_of(files: list[File]) -> list[list[File]]:
    return [list(group) for _, group in itertools.groupby(files, key=lambda file: file.group)]


def accept_changes(files: list[File], record: Record, folder: Path, reading: Reading) -> None:
    """Note in the record of an unfinished job the new sizes of files that are not wholly in finished shards:
    a user may have mended a line there. Raises InputError if a file is not the one that was begun."""
    first, last = record["shards"][0], record["shards"][-1]
    places = {place["file"]: place for place in (*first.get("groups_end_at", []), last["ends_at"])}
    groups = [[file.name for file in group] for group in groups_of(files)]
    current = next((i for i, group in enumerate(groups) if last["ends_at"]["file"] in group), len(groups))
    unread = set()
    for group in groups[current:]:  # the groups before are in the shards
        begins = [i for i, name in enumerate(group) if name in places]
        unread |= set(group[begins[-1] if begins else 0 :])
    found = {file.name: file for file in files}
    for entry in record["source"].get("files", []):
        name = entry[0]
        if name in unread and entry[1] != found[name].size:
            entry[1] = found[name].size
            if name in places:
                check_place(found[name], places[name], record, folder, reading)
            print(f"note: {name} has changed; what was read of it before stays in the shards")


def check_place(file: File, place: Place, record: Record, folder: Path, reading: Reading) -> None:
    """Raises InputError unless the file still has what the finished shards hold of it, up to `place`. Of what
    training has, the last document tells; of what only the validation split has, everything."""
    encoding = get_encoding(record["encoding"])
    first, last = record["shards"][0], record["shards"][-1]
    only_validation = place in first.get("groups_end_at", [])
    documents: list[list[np.ndarray]] = []  # of each, its pieces' tokens
    assert file.path is not None, "a local file"
    for piece in read_documents(file, file.path, reading):
        if piece.document >= place["document"] + (place["token"] > 0):
            break
        if piece.text is not None:
            if piece.begins:
                documents = documents if only_validation else []
                documents.append([])
            documents[-1].append(encode_piece(encoding, piece)[1])
    *before, tokens = map(np.concatenate, documents or [[np.empty(0, np.uint16)]])
    complete = len(tokens) >= place["token"]
    tokens = tokens[: place["token"] or len(tokens)]
    if only_validation:
        complete &= len(documents) == first.get("holds", {}).get(file.name)
        tokens = np.concatenate([*before, tokens])
        same = complete and tokens.tobytes() in open_shard(folder / first["file"]).tobytes()
    else:
        end = open_shard(folder / last["file"])[-len(tokens) :]
        same = np.array_equal(tokens[-len(end) :], end)
    begun = place["document"] > 0 or place["token"] > 0
    if begun and not (len(tokens) and same):
        raise InputError(
            f"{file.name} has changed before the place where the finished shards in {folder} end; choose "
            "another --output_dir, or remove that one"
        )


def streams_of(
    files: list[File], reading: Reading, writer: ShardWriter, downloads: Downloads | None = None
) -> Iterator[Stream]:
    """What goes into the shards that the writer's record lacks, in this order: for the validation split, the
    beginning of each group of files, in proportion to its size; for training, the rest of each group."""
    groups = groups_of(files)
    starts: list[Place] = [{"file": group[0].name, "document": 0, "token": 0} for group in groups]
    shards, first = writer.record["shards"], 0
    if shards:
        starts, place = shards[0].get("groups_end_at") or starts, shards[-1]["ends_at"]
        (first,) = (i for i, group in enumerate(groups) if place["file"] in {file.name for file in group})
        starts = [*starts[:first], place, *starts[first + 1 :]]
    elif len(groups) > 1:
        sizes = list(
            itertools.accumulate(sum(text_bytes(f, reading.column) for f in group) for group in groups)
        )
        ends = [round(writer.val_size * size / (sizes[-1] or 1)) for size in sizes]
        for group, start, (before, end) in zip(groups, starts, itertools.pairwise([0, *ends]), strict=True):
            yield Stream(read_files(group, reading, start), start, limit=end - before)
        starts = writer.groups_end_at
    for group, start in zip(groups[first:], starts[first:], strict=True):
        yield Stream(read_files(group, reading, start, downloads), start)


class TokenProgress(JobProgress):
    """Progress in tokens. Estimates the total from the share of the input's bytes read so far."""

    def __init__(self, files: list[File], limit: int | None, record: Record):
        super().__init__(" tokens", limit, interval=30, done=record["tokens"])
        self.limit, self.record = limit or sys.maxsize, record
        sizes = list(itertools.accumulate((file.size for file in files), initial=0))
        self.before = dict(zip((file.name for file in files), sizes, strict=False))  # bytes before each file
        self.input_size = sizes[-1]

    def on_piece(self, n_tokens: int, piece: Piece) -> None:
        position = self.before[piece.file] + piece.position
        if position:
            self.bar.total = min(self.limit, (self.bar.n + n_tokens) * self.input_size // position)
        self.update(n_tokens, f"shard {len(self.record['shards'])}, {piece.file}")


def closing_line(folder: Path, record: Record, n_new: int, seconds: float) -> str:
    """A summary of the finished job, with its remarks."""
    validation, last = record["shards"][0], record["shards"][-1]["tokens"]
    remarked = {name: f" (first {place})" for name, place in record.get("remarked", {}).items()}
    remarks = "".join(
        f"; {REMARKS[name]}: {count:,}{remarked.get(name, '')}" for name, count in record["remarks"].items()
    )
    holds, held_out = validation.get("holds", {}), validation["tokens"]
    of_what = ""
    if holds:
        of_what = f", {plural(sum(holds.values()), 'document')} of {describe_files(list(holds))}"
    return (
        f"{plural(record['documents'], 'document')}, {record['tokens']:,} tokens in "
        f"{plural(len(record['shards']), 'shard')} in {folder} (the first is the validation split, "
        f"{held_out:,} tokens or {held_out / record['tokens']:.1%} of all{of_what}; the last holds what was "
        f"left, {last:,}: that is normal){remarks}; {duration(seconds)}, {n_new / seconds:,.0f} tokens/s"
    )


def make_shards(config: ShardConfig, files: list[File]) -> None:
    """Make shards of the local `files`; without, of --dataset."""
    folder, from_hub = config.output_dir, not files
    settings: dict[str, Any] = {
        "shard_size": config.shard_size,
        "val_size": config.val_size,
        "max_tokens": config.max_tokens,
        "text_column": config.text_column,
        "split_at": config.split_at,
    }
    reading = Reading(config.text_column, config.split_at, config.skip_bad_rows)
    source: dict[str, Any] = {"files": [[file.name, file.size] for file in files]}
    subset = "sample-10BT" if config.config is None and config.dataset == FINEWEB_EDU else config.config
    if from_hub:
        settings |= {"dataset": config.dataset, "config": subset, "revision": config.revision}

    record = find_record(folder)
    if record:
        settings["shard_size"] = config.shard_size or record["settings"].get("shard_size")
        if not (folder / "shards.json").exists() and "shards" not in record["settings"]:
            accept_changes(files, record, folder, reading)
        compare_records(folder, record, {"shards": None, "encoding": config.encoding, **source, **settings})
        if not drop_damaged(folder, record) and (folder / "shards.json").exists():
            n_shards = plural(len(record["shards"]), "shard")
            print(f"{folder} is finished: {record['tokens']:,} tokens in {n_shards}")
            shutil.rmtree(folder / TEMPORARY, ignore_errors=True)  # of a job killed at its end
            return
    name = "the input"
    if from_hub:
        commit = record["source"]["revision"] if record else config.revision
        commit, files = dataset_files(config.dataset, subset, commit)
        source = {"dataset": config.dataset, "config": subset, "revision": commit}
        name = f"{config.dataset} {subset or ''} at {commit[:8]}"
    check_columns(files, reading)
    shard_size = settings["shard_size"] or choose_shard_size(estimate_tokens(config, files))
    settings["shard_size"] = shard_size
    record = record or new_record(get_encoding(config.encoding), source, settings)
    n_tokens = sum(shard["tokens"] for shard in record["shards"])

    size = file_size(sum(file.size for file in files))
    how = f"{config.encoding} encoding, {plural(config.workers, 'thread')}"
    print(f"{name}: {plural(len(files), 'file')}, {size}; {how}")
    downloads = None
    if from_hub:
        keep, ahead = config.keep_downloads, config.max_tokens is None  # otherwise the next may not be needed
        downloads = Downloads(config.dataset, commit, files, folder, keep=keep, ahead=ahead)
        shards = record["shards"]
        downloads.drop_before(shards[-1]["ends_at"]["file"] if shards else files[0].name)
    bytes_here = downloads.bytes_here() if downloads else 0
    print(f"to {folder}: {size_of_job(config, files, shard_size, n_tokens, bytes_here)}")
    if n_tokens:
        print(f"resuming after {plural(len(record['shards']), 'finished shard')}, {n_tokens:,} tokens")
    writer = ShardWriter(folder, record, downloads.drop_before if downloads else lambda file: None)
    progress = TokenProgress(files, config.max_tokens, record)
    started = time.perf_counter()
    streams = streams_of(files, reading, writer, downloads)
    write_shards(streams, writer, config.workers, progress.on_piece)
    progress.bar.close()
    if downloads:
        downloads.remove()
    print(closing_line(folder, record, record["tokens"] - n_tokens, time.perf_counter() - started))
    if record["tokens"] * BYTES_PER_TOKEN[config.encoding] < LITTLE:
        print("note: less than a million characters of text; a model will memorize it")


def main(config: ShardConfig) -> None:
    check_flags(config)
    if config.check:
        check_folder(config.check, config.encoding, config.write_shards_json)
        return
    files = local_files(config.input, config.output_dir)
    with lock_folder(config.output_dir, "--output_dir"):
        remove_leftovers(config.output_dir)
        if config.shards is not None:
            fetch_shards(config.shards, config.revision, config.output_dir, config.max_tokens)
        else:
            make_shards(config, files)


if __name__ == "__main__":
    run_command(main, ShardConfig, usual_flag="--input")
