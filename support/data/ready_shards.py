"""
Token shards that others have made: fetched from a dataset on the Hub, checked and recorded.

Two datasets that many use, of .bin files with 100 million tokens each:

    karpathy/fineweb-edu-100B-gpt2-token-shards   edu_fineweb_val_000000.bin, edu_fineweb_train_000001.bin, …
    kjj0/fineweb10B-gpt2                          fineweb_val_000000.bin, fineweb_train_000001.bin, …

(Sources: dev/data/edu_fineweb.sh in llm.c; data/cached_fineweb10B.py in modded-nanogpt.)
"""

import itertools
import os
import shlex
import sys
from pathlib import Path

from support.cli import InputError, plural
from support.data.documents import File
from support.data.encodings import get_encoding
from support.data.hub import Downloads, is_copy, repository_files
from support.data.shards import (
    PARTIAL,
    JobProgress,
    Record,
    ShardEntry,
    check_ids,
    compare_records,
    find_record,
    is_sound,
    new_record,
    open_shard,
    split_of,
    write_record,
)
from support.files import check_disk, flush_to_disk, sha256

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
    done: dict[str, ShardEntry] = {}  # by name
    earlier = find_record(folder)
    if earlier:
        compare_records(folder, earlier, {"shards": dataset, "revision": revision})
        done = {shard["file"]: shard for shard in earlier["shards"] if is_sound(folder, shard)}
        for shard in earlier["shards"]:
            if shard["file"] not in done:
                print(f"{folder / shard['file']} is missing or damaged: fetching it again")
        if is_finished(folder, earlier, max_tokens) and len(done) == len(earlier["shards"]):
            print(f"{folder} is finished: {earlier['tokens']:,} tokens in {plural(len(done), 'shard')}")
            return
    commit, listed = repository_files(dataset, earlier["source"]["revision"] if earlier else revision)
    chosen = choose_shards(dataset, listed, max_tokens)
    for name, file in chosen.items():
        path = folder / name
        if name not in done and path.exists() and is_copy(path, file):  # killed before it was recorded
            done[name] = check_shard(path, file)
    missing = [file for name, file in chosen.items() if name not in done]

    about = f"about {sum(map(count_tokens, chosen.values())):,} tokens in {plural(len(chosen), 'shard')}"
    here = f", {len(chosen) - len(missing):,} of them here already" if len(missing) < len(chosen) else ""
    print(f"{dataset} at {commit[:8]}: {about}{here}")
    downloads = Downloads(dataset, commit, missing, folder, keep=False, ahead=True)
    n_bytes = sum(file.size for file in missing)
    print(f"to {folder}: {check_disk(folder, n_bytes - downloads.bytes_here(), 'the shards')}")
    print("training can start when all are here: any step may need any shard")

    settings = {"shards": dataset, "revision": revision, "max_tokens": max_tokens}
    record = new_record(get_encoding(ENCODING), {"dataset": dataset, "revision": commit}, settings)

    def write_partial() -> None:
        record["shards"] = [done[name] for name in chosen if name in done]
        write_record(folder / PARTIAL, record)

    write_partial()
    (folder / "shards.json").unlink(missing_ok=True)  # of a finished job that lost a shard, or gets more
    progress = JobProgress("B", n_bytes, interval=0)
    for i, file in enumerate(missing):
        downloads.drop_before(file.name)
        path = downloads.path(i)
        entry = check_shard(path, file)
        flush_to_disk(path)
        os.replace(path, folder / path.name)
        flush_to_disk(folder)
        done[path.name] = entry
        write_partial()
        progress.update(file.size, path.name)
    progress.bar.close()
    downloads.remove()
    os.replace(folder / PARTIAL, folder / "shards.json")
    where = f"{record['tokens']:,} tokens in {plural(len(chosen), 'shard')} in {folder}"
    print(f"{where}; next: python train_gpt2.py --data_dir {shlex.quote(folder.as_posix())}")


def choose_shards(dataset: str, files: list[File], max_tokens: int | None) -> dict[str, File]:
    """The validation shards among `files`, then the training shards, by name (without folders); with
    `max_tokens`, only as many as it takes to hold so many tokens in all, one for training at least.

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
    val, train = ([shards[stem] for stem in sorted(shards)] for shards in splits.values())
    before = itertools.accumulate(map(count_tokens, train), initial=sum(map(count_tokens, val)))
    wanted = max_tokens or sys.maxsize
    needed = [file for file, n in zip(train, before, strict=False) if n < wanted or file is train[0]]
    return {Path(file.name).name: file for file in (*val, *needed)}


def count_tokens(file: File) -> int:
    """The tokens that a shard of this size holds."""
    return max(0, file.size - HEADER[Path(file.name).suffix]) // 2


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
    return {"file": path.name, "tokens": len(tokens), "sha256": file.sha256 or sha256(path)}
