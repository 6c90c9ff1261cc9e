"""
Token shards that others have made: fetched from a dataset on the Hub, checked and recorded.

Two datasets that many use, of .bin files with 100 million tokens each:

    karpathy/fineweb-edu-100B-gpt2-token-shards   edu_fineweb_val_000000.bin, edu_fineweb_train_000001.bin, …
    kjj0/fineweb10B-gpt2                          fineweb_val_000000.bin, fineweb_train_000001.bin, …

(Sources: dev/data/edu_fineweb.sh in llm.c; data/cached_fineweb10B.py in modded-nanogpt.)
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.cli import InputError, file_size, plural
from support.data.documents import File
from support.data.encodings import get_encoding
from support.data.hub import Downloads, is_copy, repository_files
from support.data.shards import (
    PARTIAL,
    Record,
    ShardEntry,
    check_ids,
    compare_records,
    find_record,
    is_sound,
    new_record,
    open_shard,
    split_of,
)
from support.files import flush_to_disk, sha256, to_json, write_file

from tqdm import tqdm

HEADER = {".bin": 1024, ".npy": 128}  # bytes before the tokens: llm.c's 256 int32; what np.save writes
ENCODING = "gpt2"  # a shard does not name its encoding; only its ids can be checked


def fetch_shards(dataset: str, revision: str, folder: Path, max_tokens: int | None) -> None:
    """Fetch the dataset's shards into `folder`, which the caller has locked: those of the validation split,
    then as many for training as `max_tokens` need in all (None: every one).

    shards.partial.json records the shards that are complete; at the end it becomes shards.json. So the same
    call resumes, and one with a larger `max_tokens` adds to what is there.

    Raises InputError if the dataset has no usable shards, if `folder` holds something else, or if its disk is
    too small; RunFault if the Hub can't be reached or the disk is full.
    """
    settings = {"shards": dataset, "revision": revision, "max_tokens": max_tokens}
    done: dict[str, ShardEntry] = {}
    earlier = find_record(folder)
    if earlier:
        compare_records(folder, earlier["settings"], {"shards": dataset, "revision": revision})
        done = sound_shards(folder, earlier)
        if is_finished(folder, earlier, max_tokens) and len(done) == len(earlier["shards"]):
            print(f"{folder} is finished: {earlier['tokens']:,} tokens in {plural(len(done), 'shard')}")
            return
    commit, listed = repository_files(dataset, earlier["source"]["revision"] if earlier else revision)
    files = choose_shards(dataset, listed, max_tokens)
    for file in files:
        path = folder / local_name(file)
        if path.name not in done and path.exists() and is_copy(path, file):  # killed before it was recorded
            done[path.name] = check_shard(path, file)
    missing = [file for file in files if local_name(file) not in done]

    about = f"about {sum(map(count_tokens, files)):,} tokens in {plural(len(files), 'shard')}"
    here = len(files) - len(missing)
    print(f"{dataset} at {commit[:8]}: {about}" + (f", {here:,} of them here already" if here else ""))
    print(f"to {folder}: {check_disk(folder, missing)}")
    print("training can start when all are here: any step may need any shard")
    record = new_record(get_encoding(ENCODING), {"dataset": dataset, "revision": commit}, settings)
    write_partial(folder, record, files, done)
    (folder / "shards.json").unlink(missing_ok=True)  # of a finished job that lost a shard, or gets more

    for entry in download_shards(dataset, commit, missing, folder):
        done[entry["file"]] = entry
        write_partial(folder, record, files, done)
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    os.replace(folder / PARTIAL, folder / "shards.json")
    where = f"{record['tokens']:,} tokens in {plural(len(files), 'shard')} in {folder}"
    print(f"{where}; next: python train_gpt2.py --data_dir {shlex.quote(str(folder))}")


def download_shards(dataset: str, commit: str, files: list[File], folder: Path) -> Iterator[ShardEntry]:
    """Download the shards one after another; yields the entry of each when it is sound and in `folder`."""
    hub = Downloads(dataset, commit, files, folder / "downloads", keep=False, ahead=True)
    progress = Progress(files)
    for i, file in enumerate(files):
        hub.drop_before(file.name)
        path = hub.path(i)
        hub.look_ahead(i)
        entry = check_shard(path, file)
        flush_to_disk(path)
        os.replace(path, folder / entry["file"])
        flush_to_disk(folder)
        yield entry
        progress.update(file)
    progress.bar.close()


# -----------------------------------------------------------------------------
# which shards


def local_name(file: File) -> str:
    """A shard's name in our folder: the Hub's, without its folders."""
    return Path(file.name).name


def count_tokens(file: File) -> int:
    """The tokens that a shard of this size holds."""
    return max(0, file.size - HEADER[Path(file.name).suffix]) // 2


def choose_shards(dataset: str, files: list[File], max_tokens: int | None) -> list[File]:
    """The validation shards among `files`, then the training shards, by name; with `max_tokens`, only as many
    as it takes to hold so many tokens in all, one for training at least.

    Raises InputError if a split has none, or if it isn't clear which files are shards of which split.
    """
    splits: dict[str, dict[str, File]] = {"val": {}, "train": {}}
    for file in files:
        name = Path(file.name)
        split = split_of(name) if name.suffix in HEADER else None
        if split and (first := splits[split].setdefault(name.stem, file)) is not file:
            raise InputError(
                f"--shards {dataset}: {first.name} and {file.name} would be one file here, or hold the same "
                "tokens; choose another dataset"
            )
    for split, shards in splits.items():
        if not shards:
            raise InputError(
                f"--shards {dataset}: {plural(len(files), 'file')}, but no shard of the {split} split (a "
                f".npy or .bin file with '{split}' in its name); if it holds text, use --dataset {dataset}"
            )
    val, train = ([shards[name] for name in sorted(shards)] for shards in splits.values())
    chosen, n_tokens = val, sum(map(count_tokens, val))
    for n, file in enumerate(train):
        if n and n_tokens >= (max_tokens or sys.maxsize):
            break
        chosen, n_tokens = [*chosen, file], n_tokens + count_tokens(file)
    return chosen


# -----------------------------------------------------------------------------
# what is here


def sound_shards(folder: Path, record: Record) -> dict[str, ShardEntry]:
    """The recorded shards that are in `folder`, by name; says which are not."""
    sound = {}
    for shard in record["shards"]:
        if is_sound(folder, shard):
            sound[shard["file"]] = shard
        else:
            print(f"{folder / shard['file']} is missing or damaged: fetching it again")
    return sound


def is_finished(folder: Path, record: Record, max_tokens: int | None) -> bool:
    """Whether the job in `folder` came to its end, and has all tokens that are now asked for."""
    ended = (folder / "shards.json").exists() and not (folder / PARTIAL).exists()
    then = record["settings"]["max_tokens"]
    return ended and (then in (None, max_tokens) or (max_tokens or sys.maxsize) <= record["tokens"])


def check_shard(path: Path, file: File) -> ShardEntry:
    """Open a complete download and check its ids; returns its entry in the record. Raises InputError if it is
    not a token shard in ENCODING."""
    tokens = open_shard(path, "choose another dataset")
    check_ids(path, tokens, get_encoding(ENCODING))
    return {"file": local_name(file), "tokens": len(tokens), "sha256": file.sha256 or sha256(path)}


def check_disk(folder: Path, missing: list[File]) -> str:
    """Describe the disk space that the job needs. Raises InputError if there is less."""
    needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    summary = f"needs {file_size(needed)} of disk space; {file_size(free)} is free"
    if needed > free:
        raise InputError(f"--output_dir {folder}: {summary}; choose another disk, or set --max_tokens")
    return summary


def write_partial(folder: Path, record: Record, files: list[File], done: dict[str, ShardEntry]) -> None:
    """Record the shards that are `done`, in the order of `files`."""
    record["shards"] = [done[name] for name in map(local_name, files) if name in done]
    record["tokens"] = sum(shard["tokens"] for shard in record["shards"])
    write_file(folder / PARTIAL, lambda file: file.write(to_json(record).encode()))


class Progress:
    """Progress in bytes, shard by shard: a bar on a terminal, elsewhere a line for each."""

    def __init__(self, files: list[File]):
        self.fetched, self.total = 0, sum(file.size for file in files)
        self.started = time.monotonic()
        self.bar = tqdm(total=self.total, unit="B", unit_scale=True, dynamic_ncols=True,
                        disable=not sys.stderr.isatty())  # fmt: skip

    def update(self, file: File) -> None:
        self.fetched += file.size
        self.bar.update(file.size)
        if self.bar.disable:
            rate = self.fetched / (time.monotonic() - self.started)
            left = tqdm.format_interval((self.total - self.fetched) / rate)
            done = f"{file_size(self.fetched)} of {file_size(self.total)}"
            print(f"{local_name(file)} is here: {done} | {rate / 1e6:,.1f} MB/s | {left} left", flush=True)
