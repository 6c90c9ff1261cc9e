"""
Token shards: the record, writing, reading, checking.

A shard is a 1-D uint16 `.npy` file of token ids, or one of llm.c's `.bin` files. A folder's `shards.json`
records what its shards were made from, and their checksums; shards without it load too.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NotRequired, TypedDict

from support.cli import InputError, RunFault, advice, in_words, plural, speaks_for_host
from support.data.documents import Piece
from support.data.encodings import get_encoding
from support.data.order import Order, WindowOrder
from support.data.tokens import encode_stream
from support.files import (
    allow_open_files,
    check_not_pointer,
    expect_random_reads,
    sha256,
    to_json,
    write_file,
)

import numpy as np
import tiktoken
from tqdm import tqdm

WINDOW = 1025  # tokens that one row needs at the default --sequence_length
MADE_ELSEWHERE = {"made": "elsewhere"}  # the source in a record of shards that fineweb.py has only checked
PARTIAL = "shards.partial.json"  # the record of an unfinished job of fineweb.py
LINE = "{n_fmt} of about {total_fmt}{unit} | {rate_fmt} | {remaining} left{postfix}"  # fields are tqdm's

# -----------------------------------------------------------------------------
# the record


class Place(TypedDict):
    """Where a token of the stream comes from."""

    file: str
    document: int  # in the file, from 0
    token: int  # index in the document; 0 is its <|endoftext|>


class ShardEntry(TypedDict):
    """A shard in the record; for shards made elsewhere, only the first three fields are known."""

    file: str
    tokens: int
    sha256: str
    ends_at: NotRequired[Place]  # where the next shard begins
    documents: NotRequired[int]  # documents that end in this shard
    remarks: NotRequired[dict[str, int]]  # of each of REMARKS, how many documents
    remarked: NotRequired[dict[str, str]]  # and the first of them: its place, and how much of it
    holds: NotRequired[dict[str, int]]  # of the validation split: its files, and how many documents of each
    groups_end_at: NotRequired[list[Place]]  # of the validation split: where the rest of each group begins


class Record(TypedDict):
    """The contents of shards.json."""

    encoding: str
    vocab_size: int
    source: dict[str, Any]
    settings: dict[str, Any]
    documents: int
    tokens: int
    remarks: dict[str, int]
    remarked: NotRequired[dict[str, str]]
    shards: list[ShardEntry]


def new_record(encoding: tiktoken.Encoding, source: dict[str, Any], settings: dict[str, Any]) -> Record:
    """A record without shards yet."""
    return {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "source": source,
        "settings": settings,
        "documents": 0,
        "tokens": 0,
        "remarks": {},
        "shards": [],
    }


def write_record(file: Path, record: Record) -> None:
    """Update the record's totals, then write it to `file`."""
    shards = record["shards"]
    record["documents"] = sum(shard.get("documents", 0) for shard in shards)
    record["tokens"] = sum(shard["tokens"] for shard in shards)
    record["remarked"] = {}
    for shard in reversed(shards):
        record["remarked"] |= shard.get("remarked", {})
    record["remarks"] = dict(sum((Counter(shard.get("remarks", {})) for shard in shards), Counter()))
    write_file(file, lambda opened: opened.write(to_json(record).encode()))


def read_record(file: Path) -> Record:
    """Read fineweb.py's record from shards.json or PARTIAL. Raises InputError if it is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"encoding": str, "source": dict, "settings": dict, "tokens": int, "shards": list}
        sound = all(isinstance(record[name], kind) for name, kind in kinds.items())
        for entry in record["shards"]:
            sound &= isinstance(entry["tokens"], int) and isinstance(entry["file"] + entry["sha256"], str)
            if file.name == PARTIAL and "shards" not in record["settings"]:  # needed to resume
                sound &= {"file", "document", "token"} <= entry["ends_at"].keys()
        if not sound:
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: damaged; remove it and the shards beside it, and write them again with fineweb.py"
        ) from error
    return record


# -----------------------------------------------------------------------------
# the job: making shards, or fetching them


def find_record(folder: Path) -> Record | None:
    """The record of an earlier job in `folder`, finished or not. Raises InputError if there are shards but no
    record."""
    for name in ("shards.json", PARTIAL):
        if (folder / name).exists():
            record = read_record(folder / name)
            return record if record["shards"] else None  # no shards: the job had only begun
    if [*folder.glob("*.npy"), *folder.glob("*.bin")]:
        raise InputError(
            f"{folder} holds shards made elsewhere, of which there is no record; see what they are with "
            f"--check {folder}, or choose another --output_dir"
        )
    return None


def compare_records(folder: Path, record: Record, now: dict[str, Any]) -> None:
    """Raises InputError, naming the differences, unless the shards in `folder` were made from the input and
    with the settings of `now`."""
    then = {"encoding": record["encoding"], **record["source"], **record["settings"]}
    differences = []
    for name, value in now.items():
        if not isinstance(value, list):
            if then.get(name) != value:
                differences.append(f"{name} was {then.get(name)}, is {value}")
        elif (was := then.get(name, [])) != value:
            then_and_now = [{tuple(item) for item in items} for items in (was, value)]
            changed = [item for item in (*was, *value) if not all(tuple(item) in of for of in then_and_now)]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            differences.append(f"{name} differ in {(changed or value)[0]}{more}")
    if differences:
        raise InputError(
            f"{folder} was made with other settings: {'; '.join(differences)}; choose another "
            "--output_dir, or remove that one"
        )


def drop_damaged(folder: Path, record: Record) -> bool:
    """Remove the first missing or damaged shard, and all that follow it, from the record; returns whether
    there was one."""
    for i, shard in enumerate(record["shards"]):
        if not is_sound(folder, shard):
            print(f"{folder / shard['file']} is missing or damaged: continuing from there")
            del record["shards"][i:]
            return True
    return False


def is_sound(folder: Path, shard: ShardEntry) -> bool:
    """Whether a recorded shard is in `folder`, with as many tokens as the record says."""
    try:
        return len(open_shard(folder / shard["file"])) == shard["tokens"]
    except (InputError, FileNotFoundError):
        return False


class JobProgress:
    """Progress of a job: a bar on a terminal; elsewhere lines, at least `interval` seconds apart."""

    def __init__(self, unit: str, total: int | None, interval: float, done: int = 0):
        on_terminal = sys.stderr.isatty()
        self.interval = math.inf if on_terminal else interval
        self.last_print = time.monotonic()
        self.bar = tqdm(
            initial=done,
            total=total,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            delay=0 if on_terminal else math.inf,  # a bar that is never shown counts all the same
            bar_format=None if on_terminal else LINE,
        )

    def update(self, n: int, note: str) -> None:
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)
        if time.monotonic() - self.last_print >= self.interval:
            self.last_print = time.monotonic()
            print(self.bar, flush=True)


# -----------------------------------------------------------------------------
# writing


@dataclass(frozen=True)
class Stream:
    """Documents for a ShardWriter, from the one at `start` on: their tokens from that place on, at most
    `limit`."""

    documents: Iterable[Piece]
    start: Place = field(default_factory=lambda: Place(file="", document=0, token=0))
    limit: int | None = None


class ShardWriter:
    """Cuts streams of tokens into shards in `folder`.

    The first shard, the validation split, has `val_size` tokens, every other exactly `shard_size`, even if
    that cuts a document; only the last is shorter. shards.partial.json records each shard with the documents
    that end in it and the place where the next begins; at the end it becomes shards.json. To continue a
    `record` with finished shards, the first stream must start where the last one `ends_at`.
    """

    def __init__(self, folder: Path, record: Record, on_shard: Callable[[str], None] = lambda file: None):
        self.folder, self.record, self.on_shard = folder, record, on_shard
        settings, shards = record["settings"], record["shards"]
        self.shard_size = settings["shard_size"]
        self.val_size = settings.get("val_size") or self.shard_size
        self.left = (settings["max_tokens"] or sys.maxsize) - sum(shard["tokens"] for shard in shards)
        largest = min(max(self.shard_size, self.val_size), self.left)
        try:
            self.buffer = np.empty(largest, np.uint16)  # the shard in progress
        except (MemoryError, ValueError) as error:
            raise InputError(
                f"--{'shard' if self.shard_size >= largest else 'val'}_size {largest}: a shard is built in "
                f"memory, and {largest / 5e8:,.0f} GB could not be allocated"
            ) from error
        self.filled = self.skip = 0
        self.limit = sys.maxsize  # tokens that are still to be taken of this stream
        self.ends_at: Place = {"file": "", "document": 0, "token": 0}  # where the next token comes from
        self.groups_end_at: list[Place] = []  # where each stream with a limit ended
        self.documents = 0  # that end in the shard in progress
        self.holds: Counter[str] = Counter()  # documents of each file in the shard in progress
        self.new_to_shard = True  # whether the document in progress has not been counted there
        self.remarks: Counter[str] = Counter()
        self.remarked: dict[str, str] = {}  # where in the shard in progress each remark came first
        self.document_remarks: Counter[str] = Counter()  # of the document in progress, and
        self.characters = 0  # how much of it has been read
        write_record(folder / PARTIAL, record)  # before the first shard, so that none lacks a record
        (folder / "shards.json").unlink(missing_ok=True)  # left by a finished job that lost a shard

    def begin(self, stream: Stream) -> None:
        """Get ready for the pieces of a stream."""
        self.ends_at, self.skip = stream.start.copy(), stream.start["token"]
        self.limit = sys.maxsize if stream.limit is None else stream.limit

    def add(self, piece: Piece, tokens: np.ndarray, remarks: dict[str, int]) -> int:
        """Add what `encode_stream` yields; returns how many of the tokens were taken."""
        before = self.left
        if piece.begins:
            self.ends_at = {"file": piece.file, "document": piece.document, "token": 0}
            self.document_remarks, self.characters = Counter(), 0
            self.new_to_shard = True
        self.document_remarks.update(remarks)
        self.characters += len(piece.text or "")
        done = min(self.skip, len(tokens))  # already in a finished shard
        self.skip -= done
        self.ends_at["token"] += done
        while done < len(tokens) and self.left and self.limit:
            if self.filled == (self.shard_size if self.record["shards"] else self.val_size):
                self.finish_shard()
            capacity = self.shard_size if self.record["shards"] else self.val_size
            n = min(len(tokens) - done, capacity - self.filled, self.left, self.limit)
            self.buffer[self.filled : self.filled + n] = tokens[done : done + n]
            self.filled += n
            self.left -= n
            self.limit -= n
            done += n
            self.ends_at["token"] += n
            self.holds[piece.file] += self.new_to_shard
            self.new_to_shard = False
        if piece.ends and done == len(tokens):
            self.ends_at = {"file": piece.file, "document": piece.document + 1, "token": 0}
            self.documents += piece.text is not None
            for name, n in self.document_remarks.items():
                self.remarks[name] += 1
                of_all = f": {n:,} of {self.characters:,} characters"
                how_much = {"replaced": of_all, "nul": of_all, "end_of_text": f": {n:,} times"}.get(name, "")
                self.remarked.setdefault(name, f"{piece.file}, document {piece.document + 1}{how_much}")
        return before - self.left

    def finish_shard(self) -> None:
        shards = self.record["shards"]
        path = self.folder / f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        try:
            write_file(path, lambda file: write_shard(file, self.buffer[: self.filled]))
        except OSError as error:
            raise RunFault(
                f"{path} could not be written ({error.strerror or in_words(error)}); {advice(error)}, then "
                "run the same command again"
            ) from error
        entry: ShardEntry = {
            "file": path.name,
            "tokens": self.filled,
            "sha256": sha256(path),
            "ends_at": self.ends_at.copy(),
            "documents": self.documents,
            "remarks": dict(sorted(self.remarks.items())),
            "remarked": dict(sorted(self.remarked.items())),
        }
        if not shards:
            entry |= {"holds": dict(self.holds), "groups_end_at": self.groups_end_at}
        shards.append(entry)
        write_record(self.folder / PARTIAL, self.record)
        self.filled, self.documents, self.remarks, self.holds = 0, 0, Counter(), Counter()
        self.remarked = {}
        self.new_to_shard = True
        self.on_shard(self.ends_at["file"])

    def finish(self) -> None:
        """Write the last shard and shards.json. Raises InputError if the input has no text, or no more tokens
        than the validation shard takes."""
        if self.filled:
            self.finish_shard()
        if len(self.record["shards"]) < 2:
            for shard in self.record["shards"]:
                (self.folder / shard["file"]).unlink()
            (self.folder / PARTIAL).unlink()
            n_tokens = self.record["tokens"]
            if n_tokens <= self.record["documents"]:  # only an <|endoftext|> for each
                raise InputError("the input holds no text")
            val_size = max(n_tokens // 10, min(n_tokens // 2, WINDOW))
            shorter = f", and train with a --sequence_length below {val_size}" if val_size < WINDOW else ""
            raise InputError(
                f"the input's {n_tokens:,} tokens all fit into the first shard, which is the validation "
                f"split, and leave none to train on; choose --val_size {val_size}{shorter}"
            )
        os.replace(self.folder / PARTIAL, self.folder / "shards.json")


def write_shard(file: BinaryIO, tokens: np.ndarray) -> None:
    """np.save, whose own error on a full disk has no number."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
    file.write(tokens.data)


def write_shards(
    streams: Iterable[Stream],
    writer: ShardWriter,
    workers: int = 1,
    on_piece: Callable[[int, Piece], None] = lambda n_tokens, piece: None,
) -> Record:
    """Tokenize the streams, one after another, into the writer's shards; returns the contents of shards.json.
    Calls `on_piece` with the number of tokens taken of each piece, and the piece."""
    encoding = get_encoding(writer.record["encoding"])
    for stream in streams:
        if not writer.left:
            break
        writer.begin(stream)
        for piece, tokens, remarks in encode_stream(stream.documents, encoding, workers):
            on_piece(writer.add(piece, tokens, remarks), piece)
            if not (writer.left and writer.limit):
                break
        if stream.limit is not None:
            writer.groups_end_at.append(writer.ends_at.copy())
    writer.finish()
    return writer.record


# -----------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Shards:
    """The token shards of a folder, memory-mapped: (n,) uint16 each, keyed by split ("train", "val")."""

    folder: Path
    files: dict[str, list[Path]]
    tokens: dict[str, list[np.ndarray]]
    encoding: str
    source: dict[str, Any]  # what shards.json says of the text: "dataset" and "config" if from the Hub
    fingerprint: str  # changes whenever the shards do
    parts: "tuple[Shards, ...]" = ()  # the data sets of a mix
    shares: tuple[float, ...] = ()  # of each part in every step; none: in proportion to their sizes

    def count(self, split: str) -> int:
        return sum(len(tokens) for tokens in self.tokens[split])

    def proportions(self) -> list[float]:
        """Of each part (or of these shards, which are one), its part in the tokens that a run trains on."""
        total = self.count("train")
        return list(self.shares) or [part.count("train") / total for part in self.parts or (self,)]

    def order(self, split: str, T: int, rows_per_step: int, seed: int | None) -> Order:
        """The order of the windows of a split. Raises InputError if there is not one window of T + 1 tokens,
        or if a part of a mix has less than 2 of a step's rows."""
        for tokens in self.tokens[split] if seed is not None else ():
            expect_random_reads(tokens)
        parts = self.parts if self.shares else (self,)
        orders = [WindowOrder([len(tokens) for tokens in part.tokens[split]], T, seed) for part in parts]
        for part, order in zip(parts, orders, strict=True):
            if order.n_windows == 0:
                longest = max(len(tokens) for tokens in part.tokens[split])
                raise InputError(
                    f"{part.folder}: no shard of the {split} split has {T + 1} tokens, which one row of "
                    f"--sequence_length {T} needs; lower it to at most {longest - 1}, or make larger shards"
                )
        if self.shares and min(self.shares) * rows_per_step < 2:
            raise InputError(
                f"--data_dir: a share of {min(self.shares):.3g} is less than 2 of a step's {rows_per_step} "
                "rows; raise it, or --total_batch_size"
            )
        return Order(orders, rows_per_step, self.shares or (1.0,))

    def describe(self) -> str | None:
        """In words, the text that they were made from; None if there is no record of that."""
        if self.parts:
            texts = [part.describe() or "text of unrecorded source" for part in self.parts]
            shares = [f"{share:.1%}" for share in self.proportions()]
            return "; ".join(f"{share} {text}" for share, text in zip(shares, texts, strict=True))
        if files := self.source.get("files"):
            # Names alone: this goes into a model's card, and nobody publishes the paths of their machine.
            names = [PurePosixPath(name).name.encode(errors="replace").decode() for name, _ in files]
            return f"the text of {describe_files(names)}"
        dataset: str | None = self.source.get("dataset")
        return dataset

    def names(self) -> list[str]:
        """A name for each part, fit for a log: its folder's; its path if two would have one name; or
        that with a number."""
        folders = [part.folder for part in self.parts or (self,)]
        names: list[str] = []
        for name_of in (lambda folder: folder.resolve().name, Path.as_posix):
            names = [re.sub(r"[^\w./-]", "_", name_of(folder)) for folder in folders]
            if len(set(names)) == len(names):
                return names
        return [f"{name}_{number}" for number, name in enumerate(names)]


def describe_files(names: Sequence[str]) -> str:
    """In words, how many files there are, and the first names."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{plural(len(names), 'file')} ({', '.join(names[:3])}{more})"


def open_shard(file: Path, remedy: str = "write it again with fineweb.py") -> np.ndarray:
    """Memory-map one shard, (n,) uint16: `.npy`; llm.c's `.bin` (header: 256 int32, first 20240520, 1, n); or
    nanoGPT's train.bin and val.bin, which are the tokens alone.

    Raises InputError, naming the file and the remedy, for anything else; OSError if the system can't open it.
    """
    tokens: np.ndarray
    check_not_pointer(file)
    try:
        if file.suffix == ".bin":
            tokens = open_bin(file, remedy)
        else:
            tokens = mapped = np.lib.format.open_memmap(file, mode="r")
            if extra := file.stat().st_size - mapped.offset - mapped.nbytes:
                raise InputError(
                    f"{file}: {extra:,} bytes follow the {tokens.size:,} tokens of its header; {remedy}"
                )
    except InputError:
        raise
    except OSError as error:  # mmap's names no file
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    except Exception as error:  # NumPy parses the header as Python, so a damaged one can fail in any way
        raise InputError(f"{file}: empty, cut short or not a token shard ({error}); {remedy}") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise InputError(f"{file}: {tokens.ndim}-D {tokens.dtype}, a token shard is 1-D uint16; {remedy}")
    return tokens


def open_bin(file: Path, remedy: str) -> np.ndarray:
    """Memory-map a `.bin` file. nanoGPT's two have no header: their names tell what they are."""
    with open(file, "rb") as opened:
        begin = opened.read(1024)
    header = np.frombuffer(begin[: len(begin) // 4 * 4], dtype="<i4")
    if file.name in ("train.bin", "val.bin") and (len(header) == 0 or header[0] != 20240520):
        if (file.parent / "meta.pkl").exists():
            raise InputError(
                f"{file}: its tokens are those of the meta.pkl beside it, not GPT-2's; make shards of the "
                "text itself, with fineweb.py --encoding bytes"
            )
        return np.memmap(file, dtype="<u2", mode="r")
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise InputError(f"{file}: not a token shard of llm.c (its header is wrong); {remedy}")
    tokens = np.memmap(file, dtype="<u2", mode="r", offset=header.nbytes)
    if len(tokens) != header[2]:
        raise InputError(f"{file}: holds {len(tokens):,} tokens, its header says {header[2]:,}; {remedy}")
    return tokens


def split_of(file: Path) -> str | None:
    """The split that a shard's name contains as a word: "train" in edufineweb_train_000001.npy. Raises
    InputError if it contains both."""
    words = set(re.findall(r"(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", file.name.lower()))
    if len(words) > 1:
        raise InputError(f"{file}: its name says both 'train' and 'val', so its split is unknown")
    return words.pop() if words else None


def load_shards(folder: Path, verify: bool = False) -> Shards:
    """Find the shards in `folder` and check them, against `shards.json` if there is one. `verify` reads them
    all and compares their SHA-256.

    Raises InputError if the folder, a split or a shard is missing or damaged, or if there is nothing to
    verify the shards by.
    """
    if not folder.is_dir():
        raise InputError(
            f"the data folder {folder} does not exist; write it with `python fineweb.py`, name another "
            "with --data_dir, or try `python train_gpt2.py --demo`"
        )
    if (folder / PARTIAL).exists():
        names = [shlex.quote(str(folder / name)) for name in (PARTIAL, "shards.json")]
        raise InputError(
            f"{folder} is not finished: run the same fineweb.py command again to continue; to use what there "
            f"is (and to continue later, move it back): mv {' '.join(names)}"
        )
    shown = (file for file in folder.iterdir() if not file.name.startswith("."))  # the Finder hides its notes
    files = sorted(file for file in shown if file.suffix in (".npy", ".bin"))
    allow_open_files(len(files))
    record = read_record(folder / "shards.json") if (folder / "shards.json").exists() else None
    if verify and not record:
        raise InputError(
            f"--verify: {folder} has no shards.json to compare with; for new runs, this makes one: "
            f"python fineweb.py --check {shlex.quote(str(folder))} --write_shards_json"
        )
    ours = record and record["source"] != MADE_ELSEWHERE
    remedy = "run fineweb.py again" if ours else "fetch or copy it again"
    entries = {entry["file"]: entry for entry in record["shards"]} if record else {}
    if missing := entries.keys() - {file.name for file in files}:
        raise InputError(f"{folder / min(missing)}: missing, though shards.json lists it; {remedy}")
    if record:
        listed = [file for file in files if file.name in entries]
        others = [file.name for file in files if file not in listed and split_of(file)]
        if others and speaks_for_host():
            print(f"note: {folder}: shards.json does not list {describe_files(others)}; not used")
        files = listed
    splits = {split: [file for file in files if split_of(file) == split] for split in ("train", "val")}
    tokens = {split: [open_shard(file, remedy) for file in splits[split]] for split in splits}
    digest = hashlib.sha256()
    for split in splits:
        if not splits[split]:
            raise InputError(
                f"{folder} has no shard of the {split} split (a .npy or .bin file with '{split}' in its "
                f"name); if it holds text: python fineweb.py --input {folder} --output_dir my_shards"
            )
        for file, shard in zip(splits[split], tokens[split], strict=True):
            if record:
                check_entry(file, len(shard), entries[file.name], verify, remedy)
            digest.update(f"{file.name} {len(shard)}\n".encode())
    digest.update(json.dumps([entry["sha256"] for entry in record["shards"]] if record else []).encode())
    encoding, source = (record["encoding"], record["source"]) if record else ("gpt2", {})
    return Shards(folder, splits, tokens, encoding, source, fingerprint=digest.hexdigest())


# -----------------------------------------------------------------------------
# mixing


def split_share(folder: Path) -> tuple[Path, float | None]:
    """The folder and the share in FOLDER:SHARE; the share is None without one."""
    name, _, share = folder.as_posix().rpartition(":")
    if name and not folder.exists():
        with contextlib.suppress(ValueError):
            return Path(name), float(share)
    return folder, None


def encoding_of(folder: Path) -> str | None:
    """The encoding in the record of a folder, which may have a share; None if it has no record."""
    file = split_share(folder)[0] / "shards.json"
    return read_record(file)["encoding"] if file.is_file() else None


def load_mix(folders: Sequence[Path], verify: bool = False) -> Shards:
    """`load_shards` of one folder, or of several, which are mixed: in proportion to their sizes, or by shares
    (FOLDER:SHARE each), which are divided by their sum.

    Raises InputError if only some have a share, if a share is not positive, if a folder is named twice, or if
    their encodings differ.
    """
    named = [split_share(folder) for folder in folders]
    shares = [share for _, share in named if share is not None]
    if not folders or (shares and len(shares) < len(named)):
        raise InputError("--data_dir: name folders, or give each of them a share, as in A:0.3 B:0.7")
    if any(not 0 < share < math.inf for share in shares):
        raise InputError(f"--data_dir: a share must be above 0: {' '.join(map(str, folders))}")
    if len({folder.resolve() for folder, _ in named}) < len(named):
        raise InputError(f"--data_dir: a folder is named twice: {' '.join(map(str, folders))}")
    parts = tuple(load_shards(folder, verify) for folder, _ in named)
    if len(parts) == 1:
        return parts[0]
    if len({part.encoding for part in parts}) > 1:
        kinds = ", ".join(f"{part.folder} {part.encoding}" for part in parts)
        raise InputError(f"--data_dir: the folders differ in their encoding: {kinds}")
    shares = [share / sum(shares) for share in shares]
    digest = hashlib.sha256(json.dumps([[part.fingerprint for part in parts], shares]).encode())
    return Shards(
        folder=parts[0].folder,
        files={split: [file for part in parts for file in part.files[split]] for split in ("train", "val")},
        tokens={
            split: [array for part in parts for array in part.tokens[split]] for split in ("train", "val")
        },
        encoding=parts[0].encoding,
        source={},  # each part has its own
        fingerprint=digest.hexdigest(),
        parts=parts,
        shares=tuple(shares),
    )


# -----------------------------------------------------------------------------
# checking


def check_entry(file: Path, n_tokens: int, entry: ShardEntry, verify: bool, remedy: str) -> None:
    """Raises InputError if a shard differs from its `entry` in shards.json; compares sums if `verify`."""
    if n_tokens != entry["tokens"]:
        raise InputError(f"{file}: holds {n_tokens:,} tokens, shards.json says {entry['tokens']:,}; {remedy}")
    if verify and sha256(file) != entry["sha256"]:
        raise InputError(f"{file}: its SHA-256 is not the one in shards.json; remove it and {remedy}")


def check_ids(file: Path, tokens: np.ndarray, encoding: tiktoken.Encoding) -> None:
    """Raises InputError, naming the file and the place, for a token id beyond the encoding's."""
    for start in range(0, len(tokens), 10_000_000):  # not all in memory at once
        part = tokens[start : start + 10_000_000]
        if (largest := int(part.max())) >= encoding.n_vocab:
            raise InputError(
                f"{file}: token {start + int(part.argmax()):,} is {largest}, beyond the "
                f"{encoding.n_vocab:,} of the {encoding.name} encoding"
            )


def check_folder(folder: Path, encoding_name: str, write_json: bool) -> None:
    """Verify the shards in `folder`, whoever made them, and print what they hold. Raises InputError, naming
    the shard, if one is damaged or holds ids beyond the encoding's."""
    if not folder.is_dir():
        raise InputError(f"--check {folder}: no such folder")
    has_record = (folder / "shards.json").exists()
    shards = load_shards(folder, verify=has_record)
    encoding = get_encoding(shards.encoding if has_record else encoding_name)
    origin = "as shards.json says" if has_record else "--encoding; there is no shards.json"
    print(f"{folder}: {encoding.name} encoding ({origin})")
    for split in ("val", "train"):
        for file, tokens in zip(shards.files[split], shards.tokens[split], strict=True):
            check_ids(file, tokens, encoding)
        words = encoding.decode(shards.tokens[split][0][:30].tolist())
        n_shards = plural(len(shards.files[split]), "shard")
        print(f"{split:6} {shards.count(split):14,} tokens in {n_shards:>10}, beginning {words!r}")
    if has_record:
        print("sound: headers, sizes, ids and the SHA-256 of every shard")
    elif write_json:
        record = new_record(encoding, MADE_ELSEWHERE, {})
        for file in (*shards.files["val"], *shards.files["train"]):
            n_tokens = len(open_shard(file))
            record["shards"].append({"file": file.name, "tokens": n_tokens, "sha256": sha256(file)})
        write_record(folder / "shards.json", record)
        print(
            "sound: headers, sizes and ids; shards.json now holds their sums. A run that began without it "
            "can be resumed without it only"
        )
    else:
        print("sound: headers, sizes and ids; --write_shards_json records their sums for the next time")
