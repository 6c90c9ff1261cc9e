"""
Token shards, and what every script here shares: how it starts and how it fails, the encodings.

A shard is a 1-D uint16 `.npy` file of token ids, or one of llm.c's `.bin` files. A folder of them, made by
fineweb.py or elsewhere, is read with `load_shards`; `shards.json` beside them, if there is one, says what
they were made from and how they can be verified.
"""

import contextlib
import errno
import hashlib
import inspect
import io
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tyro

VERSION = "1.0"
END_OF_TEXT = "<|endoftext|>"
PARTIAL = "shards.partial.json"  # the record of a job of fineweb.py that is not finished


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
    with it; `default` is an instance that holds other defaults than the dataclass. --version says which this
    is, --help lists the flags, under headings that stand as comments in the dataclass.

    Bad input ends with one line on standard error and exit status 2, a fault while running (a full disk, no
    permission) with one line and status 1, Ctrl-C with 130; never with a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a text may hold what a terminal can't show
            stream.reconfigure(errors="backslashreplace")
    if "--version" in sys.argv[1:]:
        print(f"{Path(sys.argv[0]).name} {VERSION}, Python {platform.python_version()}")
        return
    options = {} if default is None else {"default": default}
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_of(config, options), end="")
        else:
            main(tyro.cli(config, use_underscores=True, **options))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CommandError, OSError) as error:
        # under torchrun, what all processes found is said once on each host
        if getattr(error, "alone", True) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def help_of(config: Any, options: dict[str, Any]) -> str:
    """tyro's --help, in which a comment "# -- the model" above a field of `config` has become a heading, and
    a default of None, whose meaning each flag explains, is not mentioned."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            tyro.cli(config, use_underscores=True, **options)
        except SystemExit as end:
            if end.code:  # not a call for help, but `--prompt -h`
                raise
    source = inspect.getsource(config) if inspect.isclass(config) else ""
    headings = {name: heading for heading, name in re.findall(r"# -- (.+)\n +(\w+):", source)}
    help = re.sub(r"\{None\}\|(\w+)(?=  )", r"\1       ", text.getvalue()).replace("{None}|", "")
    help = re.sub(r"\s+\(default:(\s+None)?\s*\)", "", help)
    help = re.sub(r"  -h, --help( .* )show.*exit", r"\g<0>\n  --version \1say which this is and exit", help)
    for name, heading in headings.items():
        help = re.sub(rf"^  --{name}\b", f"\n {heading}\n\\g<0>", help, flags=re.MULTILINE)
    return re.sub(r" +$", "", help, flags=re.MULTILINE)


# -----------------------------------------------------------------------------
# files


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


def lock_folder(folder: Path, flag: str) -> Any:
    """Make `folder` (named by `flag`) if need be, and lock it; the lock ends with the returned file, or with
    the process, however it ends. InputError if another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the caller holds it
    except OSError as error:
        reason = "is a file, not a folder" if folder.is_file() else error.strerror
        raise InputError(f"{flag} {folder}: {reason}") from error
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0x7FFFFFF0)  # beyond the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise InputError(f"{folder} is in use by {file.read() or 'another process'}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


@contextlib.contextmanager
def hub_errors(wanted: str) -> Iterator[None]:
    """Turns the many ways a download fails into one line that says what was wanted: InputError when it will
    never be there, RunFault when it may be the next time."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of every attempt to reach the network, in several lines each
    try:
        yield
    except Exception as error:
        network = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)
        from_client = type(error).__module__.startswith(("http", "requests"))
        full = getattr(error, "errno", None) == errno.ENOSPC
        if isinstance(error, CommandError) or full or not (from_client or isinstance(error, network)):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = RunFault if may_pass(error) else InputError
        raise kind(f"could not fetch {wanted} from the Hugging Face Hub: {first_line}") from error


def may_pass(error: BaseException | None) -> bool:
    """Whether a failed request may succeed later: no connection, a time-out, 408, 429, 5xx. Not another
    status, nor a name that the Hub does not know."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, DatasetsError | HFValidationError):
        return False
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status >= 500 or status in (408, 429)
        error = error.__cause__ or error.__context__
    return True


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
            f"use --encoding bytes where shards are made. What it said: {str(error).splitlines()[0][:150]}"
        ) from error


# -----------------------------------------------------------------------------
# shards


def new_record(
    encoding: tiktoken.Encoding, source: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """shards.json before there is any shard."""
    return {"encoding": encoding.name, "vocab_size": encoding.n_vocab, "source": source, "settings": settings,
            "documents": 0, "tokens": 0, "remarks": {}, "shards": []}  # fmt: skip


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
            tokens = np.lib.format.open_memmap(file, mode="r")
    except InputError:
        raise
    except Exception as error:  # a damaged header is parsed as Python, and can fail in as many ways
        raise InputError(f"{file}: empty, cut short or not a token shard ({error}); {remedy}") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise InputError(f"{file}: {tokens.ndim}-D {tokens.dtype}, a token shard is 1-D uint16; {remedy}")
    return tokens


def read_record(file: Path) -> dict[str, Any]:
    """The record that fineweb.py left in shards.json, or in PARTIAL. InputError if it is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["tokens"], int) or not isinstance(record["encoding"], str):
            raise TypeError
        if not isinstance(record["source"], dict) or not isinstance(record["settings"], dict):
            raise TypeError
        for entry in record["shards"]:
            if not isinstance(entry["tokens"], int) or not isinstance(entry["file"] + entry["sha256"], str):
                raise TypeError
            if file.name == PARTIAL and not {"file", "document", "token"} <= entry["ends_at"].keys():
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: damaged; remove it and the shards beside it, and write them again with fineweb.py"
        ) from error
    return record


def split_of(file: Path) -> str | None:
    """The split that a shard's name names as a word of its own; "train" in edufineweb_train_000001.npy."""
    found = re.search(r"(?<![a-z])(train|val)(ing|idation)?(?![a-z])", file.name.lower())
    return found[1] if found else None


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
    if (folder / PARTIAL).exists():
        raise InputError(
            f"{folder} is not finished: run the same fineweb.py command again to go on, or remove {PARTIAL} "
            "to use what there is"
        )
    if (folder / "shards.json").exists():
        record = read_record(folder / "shards.json")
        expected = {entry["file"]: entry["tokens"] for entry in record["shards"]}
        sums = {entry["file"]: entry["sha256"] for entry in record["shards"]}
        if missing := expected.keys() - {file.name for file in files}:
            raise InputError(
                f"{folder / min(missing)}: missing, though shards.json lists it; run fineweb.py again"
            )
        files = [file for file in files if file.name in expected]
    splits = {split: [file for file in files if split_of(file) == split] for split in ("train", "val")}
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
                raise InputError(
                    f"{file}: its SHA-256 is not the one in shards.json; remove it and run fineweb.py again"
                )
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


def check_folder(folder: Path, encoding_name: str, write_json: bool) -> None:
    """Verify the shards in `folder`, whoever made them, and say what they hold. Raises InputError, naming the
    shard, when one is damaged or holds ids beyond the encoding's."""
    if not folder.is_dir():
        raise InputError(f"--check {folder}: no such folder")
    shards = load_shards(folder, verify=True)
    has_record = (folder / "shards.json").exists()
    encoding = get_encoding(shards.encoding if has_record else encoding_name)
    said_by = "as shards.json says" if has_record else "--encoding; there is no shards.json"
    print(f"{folder}: {encoding.name} encoding ({said_by})")
    for split in ("val", "train"):
        for file, tokens in zip(shards.files[split], shards.tokens[split], strict=True):
            for start in range(0, len(tokens), 10_000_000):  # not all in memory at once
                part = tokens[start : start + 10_000_000]
                if (largest := int(part.max())) >= encoding.n_vocab:
                    raise InputError(
                        f"{file}: token {start + int(part.argmax()):,} is {largest}, beyond the "
                        f"{encoding.n_vocab:,} of the {encoding.name} encoding"
                    )
        words = encoding.decode(shards.tokens[split][0][:30].tolist())
        n_shards = len(shards.files[split])
        print(f"{split:6} {shards.count(split):14,} tokens in {n_shards:3} shards, beginning {words!r}")
    if has_record:
        print("sound: headers, sizes, ids and the SHA-256 of every shard")
    elif write_json:
        record = new_record(encoding, {"made": "elsewhere"}, {})
        for split in ("val", "train"):
            for file, tokens in zip(shards.files[split], shards.tokens[split], strict=True):
                record["shards"].append({"file": file.name, "tokens": len(tokens), "sha256": sha256(file)})
            record["tokens"] += shards.count(split)
        write_file(folder / "shards.json", lambda file: file.write(to_json(record).encode()))
        print("sound: headers, sizes and ids; their sums are in shards.json now")
    else:
        print("sound: headers, sizes and ids; --write_shards_json records their sums for the next time")
