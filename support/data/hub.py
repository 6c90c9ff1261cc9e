"""Downloads from the Hugging Face Hub: retried, resumed and verified."""

import contextlib
import functools
import json
import math
import os
import posixpath
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from support.cli import CommandError, InputError, RunFault, advice, brief, file_size, in_words, remedy
from support.data.documents import SUPPORTED, File, kind_of
from support.files import sha256

from tqdm import tqdm

PATIENCE = 5  # seconds to wait for the Hub before this disk is searched
RETRY_AFTER = (1, 5, 30, 120)  # seconds to wait before each new attempt to reach the Hub
ADVICE = {  # for errors of huggingface_hub whose own message names a status only
    "GatedRepoError": "it is gated; accept its conditions on its page, then log in with `hf auth login`",
    "RepositoryNotFoundError": "it does not exist, or it is private and needs `hf auth login`",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
}
WEIGHTS = (  # a model's weights, in the order in which they are looked for
    "model.safetensors",
    "model.safetensors.index.json",  # names the parts of a model in several files
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TEMPORARY = ".fineweb_downloads"  # in --output_dir; whoever calls a folder so means this one
PICKLES = (".pt", ".pth", ".ckpt")  # what training scripts save: one file with weights and sizes
T = TypeVar("T")

# -----------------------------------------------------------------------------
# errors


@contextlib.contextmanager
def hub_errors(wanted: str) -> Iterator[None]:
    """Turn any failed download into a one-line error that names what was wanted: InputError if the failure is
    permanent, RunFault if it may be temporary."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it logs several lines for every attempt
    try:
        yield
    except Exception as error:
        from_client = type(error).__module__.startswith(("http", "requests"))  # not all are OSErrors
        from_client |= isinstance(error, RuntimeError) and raised_by_hub(error)  # hf_xet's, written in Rust
        if remedy(error) and not isinstance(error, OSError):
            raise OSError(in_words(error)) from error  # of this disk, from a library written in Rust
        # A library met an answer that is not the Hub's, such as the page of a login portal.
        strange = isinstance(error, json.JSONDecodeError) or (
            isinstance(error, TypeError | KeyError | AttributeError) and raised_by_hub(error)
        )
        if remedy(error) or not (from_client or strange or isinstance(error, OSError | HFValidationError)):
            raise  # not a failed download: a full disk, a folder without permission, a mistake in the code
        if is_offline(error):
            raise InputError(
                f"could not fetch {wanted}: HF_HUB_OFFLINE is set, and no earlier download of it is on this "
                "disk; unset it, or name files on this disk"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = ADVICE.get(type(error).__name__, lines[0])
        reason = "its answer is not the Hub's; is there a proxy or a login page?" if strange else reason
        kind = RunFault if may_pass(error) else InputError
        raise kind(f"could not fetch {wanted} from the Hugging Face Hub: {reason}") from error


def raised_by_hub(error: BaseException) -> bool:
    """Whether the innermost line of Python is one of huggingface_hub."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return place.startswith("huggingface_hub")


def is_offline(error: BaseException) -> bool:
    """Whether the library did not ask the Hub, since HF_HUB_OFFLINE forbids it, or a variable to that effect:
    the user's choice, or that of `hub_or_disk`."""
    chain: BaseException | None = error
    while chain is not None:
        if "OfflineModeIsEnabled" in f"{type(chain).__name__} {chain}":  # datasets has it in the text only
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def may_pass(error: BaseException | None) -> bool:
    """Whether a failed request may succeed later: no connection, a timeout, status 408, 429 or 5xx; not for
    any other status, nor for a name that the Hub does not know."""
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


def retried(wanted: str, fetch: Callable[[], T]) -> T:
    """Call `fetch()`; retry temporary failures after RETRY_AFTER seconds."""
    for wait in (*RETRY_AFTER, None):
        try:
            with hub_errors(wanted):
                return fetch()
        except RunFault as fault:
            if wait is None:
                raise RunFault(f"{fault}; nothing is lost; run the same command again to continue") from fault
            tqdm.write(f"{fault}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


@functools.cache
def hub_answers() -> bool | None:
    """Whether the Hub can be reached, asked once and with little patience: None if there is no answer yet."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of whatever HTTP client this release has
        refused = type(error).__name__ in ("ConnectError", "ConnectionError")  # no route, no name, no server
        return False if refused else None
    return True


def hub_or_disk(wanted: str, fetch: Callable[[], T]) -> T:
    """Call `fetch()`, for what may lie on this disk from an earlier download. Raises what `hub_errors` does.

    If the Hub does not answer at once, its libraries look at the disk alone first; then, unless there is no
    way to the Hub, they ask it with their own patience. By themselves they would try to reach the Hub for
    half a minute before they look, and `datasets.load_dataset` has no argument against that. So this sets
    what the environment variable HF_HUB_OFFLINE sets.
    """
    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE and not hub_answers():
            constants.HF_HUB_OFFLINE = True
            try:
                with hub_errors(wanted):
                    return fetch()
            except CommandError as error:
                if hub_answers() is False:
                    raise RunFault(
                        f"could not fetch {wanted}: {constants.ENDPOINT} can't be reached, and no earlier "
                        "download is on this disk"
                    ) from error
            finally:
                constants.HF_HUB_OFFLINE = False
        with hub_errors(wanted):
            return fetch()
    except OSError as error:  # of this disk
        raise RunFault(f"could not fetch {wanted} ({in_words(error)}); {advice(error)}") from error


# -----------------------------------------------------------------------------
# models


def newest_pickle(names: Iterable[str]) -> str | None:
    """The training checkpoint with the highest number. One without a number, such as nanoGPT's ckpt.pt, is
    kept up to date, so it counts as the newest."""

    def age(name: str) -> tuple[float, str]:
        numbers = re.findall(r"\d+", name)
        return (float(numbers[-1]) if numbers else math.inf), name

    found = [name for name in names if name.endswith(PICKLES) and name != "trainer.pt"]  # that one is ours
    return max(found, key=age, default=None)


@functools.cache
def model_files(repository: str, wanted: str) -> tuple[Path, Path]:
    """The files of a model on the Hub that hold its configuration and its weights: config.json and the first
    of WEIGHTS, or the newest of PICKLES for both. Whatever is not on this disk yet is downloaded, with the
    other parts of the weights and the tokenizer beside them.

    Raises InputError or RunFault, in which `wanted` names the model.
    """
    from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*names: str) -> Path | None:
        """The first of these files that there is."""
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
                    raise  # the Hub did not answer
        return None

    def find() -> tuple[Path, Path]:
        config, weights = fetch("config.json"), fetch(*WEIGHTS)
        if config and weights:
            for name in ("tokenizer.json", "vocab.json"):
                fetch(name)
            if weights.suffix == ".json":
                for part in parts_of(weights):
                    hf_hub_download(repository, part)
            return config, weights
        offline = constants.HF_HUB_OFFLINE
        there = os.listdir(snapshot_download(repository)) if offline else list_repo_files(repository)
        if pickle := newest_pickle(name for name in there if "/" not in name):
            file = Path(hf_hub_download(repository, pickle))
            return file, file
        if offline:
            raise FileNotFoundError("no earlier download is on this disk")
        missing = "model.safetensors or pytorch_model.bin" if config else "config.json"
        files = ", ".join(sorted(there)[:8]) + ", ..." * (len(there) > 8)
        raise InputError(f"{wanted}: on the Hub it has no {missing}, only {files or 'nothing'}")

    return hub_or_disk(wanted, find)


def parts_of(index_file: Path) -> list[str]:
    """The names of the files that an index names. Raises InputError if it is not an index."""
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        if any(Path(name).name != name for name in names):  # it must not lead out of the folder
            raise ValueError("a name with a folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index_file}: not an index of weights ({brief(error)})") from error
    return sorted(names)


# -----------------------------------------------------------------------------
# datasets


def dataset_files(dataset: str, config: str | None, revision: str) -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and the files of the dataset's train split in the order in which
    `datasets.load_dataset` reads them.

    Raises InputError if the dataset, configuration, revision or split does not exist, or one of its files
    can't be read here; RunFault if the Hub can't be reached.
    """
    from datasets import DatasetBuilder, load_dataset_builder

    wanted = f"the file list of {dataset}, configuration {config}, at {revision}"

    def build() -> DatasetBuilder:
        # With a cache of its own: without the Hub, `datasets` would answer from rows that it has cached.
        with tempfile.TemporaryDirectory() as empty:
            return load_dataset_builder(dataset, name=config, revision=revision, cache_dir=empty)

    try:
        builder = retried(wanted, build)
    except CommandError:
        raise
    except (ValueError, RuntimeError) as error:  # an unknown configuration, or a dataset that is a script
        raise InputError(f"{dataset}: {str(error).splitlines()[0]}") from error
    splits = builder.config.data_files or {}
    if "train" not in splits:
        raise InputError(f"{dataset}: no train split, only {', '.join(map(str, splits)) or 'nothing'}")
    commit, names = "", []
    for url in splits["train"]:
        found = re.fullmatch(r"hf://datasets/.+?@([^/]+)/(.+)", url)
        if not found:
            raise InputError(
                f"{dataset}: its files are not on the Hub; download them and name them with --input"
            )
        commit, name = found.groups()
        if kind_of(name) is None:
            raise InputError(f"{dataset}: {name} can't be read here; {SUPPORTED}")
        names.append(name)
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    _, listed = repository_files(dataset, commit, folder)
    files = {file.name: file for file in listed}
    return commit, [files[name] for name in names]


def repository_files(dataset: str, revision: str, folder: str = "") -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and the files in a folder of the dataset's repository and in the
    folders below it.

    Raises InputError if the dataset or revision does not exist; RunFault if the Hub can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def listing() -> tuple[str, list[File]]:
        api = HfApi()
        commit = api.dataset_info(dataset, revision=revision).sha or revision
        tree = api.list_repo_tree(
            dataset, folder or None, recursive=True, revision=commit, repo_type="dataset"
        )
        files = []
        for entry in tree:
            if isinstance(entry, RepoFile):
                digest = entry.lfs.sha256 if entry.lfs else None  # Git itself stores small files, without one
                files.append(File(entry.path, entry.size, None, digest))
        return commit, files

    return retried(f"the file list of {dataset} at {revision}", listing)


def is_copy(path: Path, file: File) -> bool:
    """Whether `path` has the size and SHA-256 that the Hub lists for `file`."""
    return path.stat().st_size == file.size and file.sha256 in (None, sha256(path))


class Downloads:
    """A dataset's files, downloaded in order: the one being read and, with `ahead`, the next in the
    background. With `keep`, they stay in `output_dir`/downloads. Without, they lie in TEMPORARY and are
    deleted when they are dropped, so that two at most are on disk."""

    def __init__(
        self, dataset: str, commit: str, files: list[File], output_dir: Path, keep: bool, ahead: bool
    ):
        self.dataset, self.commit, self.files = dataset, commit, files
        self.output_dir = output_dir
        self.folder = output_dir / ("downloads" if keep else TEMPORARY)
        self.keep, self.ahead = keep, ahead
        self.futures: dict[int, Future[Path]] = {}  # by index into `files`
        self.current = -1  # index of the file being read
        for leftover in (self.folder / ".cache/huggingface").rglob("*.incomplete"):  # of a killed job
            leftover.unlink()  # the library would begin another

    def bytes_here(self) -> int:
        """The bytes of the files that an earlier job has left here."""
        paths = [self.folder / file.name for file in self.files]
        return sum(path.stat().st_size for path in paths if path.exists())

    def remove(self) -> None:
        """Remove what lies in TEMPORARY, be it of an earlier job."""
        shutil.rmtree(self.output_dir / TEMPORARY, ignore_errors=True)

    def path(self, i: int) -> Path:
        """Wait for file `i`, which will be read next, and return its path. Raises what `fetch` raises."""
        self.current = i
        self.start(i)
        while not self.futures[i].done():
            futures.wait([self.futures[i]], timeout=0.5)  # without an end, Windows would not see Ctrl-C
        path = self.futures[i].result()
        self.look_ahead()
        return path

    def drop_before(self, name: str) -> None:
        """Drop all files before the one called `name`: their shards are safely on disk."""
        for i, file in enumerate(self.files):
            if file.name == name:
                break
            self.futures.pop(i, None)
            if not self.keep:
                (self.folder / file.name).unlink(missing_ok=True)
        self.look_ahead()

    def look_ahead(self) -> None:
        """Start the next download, as soon as the files before the current one are dropped."""
        is_next = 0 <= self.current < len(self.files) - 1
        if self.ahead and is_next and all(i >= self.current for i in self.futures):
            self.start(self.current + 1)

    def start(self, i: int) -> None:
        if i in self.futures:
            return
        future = self.futures[i] = Future()

        def work() -> None:
            try:
                future.set_result(self.fetch(self.files[i]))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # daemon: it must not outlive an interrupted job

    def fetch(self, file: File) -> Path:
        """Download a file and compare its size and SHA-256 with the Hub's. huggingface_hub resumes after a
        lost connection. Raises InputError if the Hub has no such file, RunFault if no sound copy arrives."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
            print(f"downloading {file.name} ({file_size(file.size)})", flush=True)
        download = functools.partial(hf_hub_download, repo_type="dataset", revision=self.commit)

        def attempt() -> Path:
            path = Path(download(self.dataset, file.name, local_dir=self.folder))
            if is_copy(path, file):
                return path
            path.unlink()
            raise OSError("the download does not match the Hub's size or SHA-256")

        try:
            return retried(file.name, attempt)
        except OSError as error:  # by now a CommandError, unless this disk failed
            raise RunFault(
                f"{file.name} could not be written ({in_words(error)}); {advice(error)}, then run the same "
                "command again"
            ) from error
