"""Downloads from the Hugging Face Hub: retried, resumed and verified."""

import contextlib
import errno
import functools
import posixpath
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from support.cli import CommandError, InputError, RunFault, in_words
from support.data.documents import KINDS, File
from support.files import sha256

from tqdm import tqdm

RETRY_AFTER = (1, 5, 30, 120)  # seconds to wait before each new attempt to reach the Hub
T = TypeVar("T")

# -----------------------------------------------------------------------------
# errors


@contextlib.contextmanager
def hub_errors(wanted: str) -> Iterator[None]:
    """Turn any failed download into a one-line error that names what was wanted: InputError if the failure is
    permanent, RunFault if it may be temporary."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it logs several lines for every attempt
    try:
        yield
    except Exception as error:
        network = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)
        from_client = type(error).__module__.startswith(("http", "requests"))
        full = getattr(error, "errno", None) == errno.ENOSPC
        if isinstance(error, CommandError) or full or not (from_client or isinstance(error, network)):
            raise
        kind = RunFault if may_pass(error) else InputError
        raise kind(f"could not fetch {wanted} from the Hugging Face Hub: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of the library's message, or what to do where it names a status only."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated; accept its conditions on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "it does not exist, or it is private; for a private one, log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    for n, wait in enumerate(RETRY_AFTER):
        try:
            with hub_errors(wanted):
                return fetch()
        except RunFault as fault:
            tqdm.write(f"{fault if n == 0 else 'still failing'}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    try:
        with hub_errors(wanted):
            return fetch()
    except RunFault as fault:
        raise RunFault(f"{fault}; nothing is lost; run the same command again to continue") from fault


@functools.cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once and with little patience."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP client of this release raises
        return False
    return True


@contextlib.contextmanager
def hub_or_disk(wanted: str) -> Iterator[None]:
    """`hub_errors`, for what may lie on this disk from an earlier download.

    If the Hub can't be reached, its libraries look at the disk alone. By themselves they would try to reach
    the Hub for half a minute first, and then not say so.
    """
    from huggingface_hub import constants

    if hub_answers():
        with hub_errors(wanted):
            yield
        return
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        with hub_errors(wanted):
            yield
    except CommandError as error:
        raise RunFault(
            f"could not fetch {wanted}: {constants.ENDPOINT} can't be reached, and no earlier download is "
            "on this disk"
        ) from error
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


# -----------------------------------------------------------------------------
# models


@functools.cache
def model_files(repository: str, wanted: str) -> tuple[Path, Path]:
    """config.json and model.safetensors of a model on the Hub, downloaded if they are not on this disk yet.

    Raises InputError or RunFault, in which `wanted` names the model.
    """
    from huggingface_hub import hf_hub_download

    with hub_or_disk(wanted):
        config_file, weights_file = (
            Path(hf_hub_download(repository, file)) for file in ("config.json", "model.safetensors")
        )
    return config_file, weights_file


# -----------------------------------------------------------------------------
# datasets


def dataset_files(dataset: str, config: str | None, revision: str) -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and the files of the dataset's train split in the order in which
    `datasets.load_dataset` reads them.

    Raises InputError if the dataset, configuration, revision or split does not exist, or one of its files
    can't be read here; RunFault if the Hub can't be reached.
    """
    from datasets import load_dataset_builder

    wanted = f"the file list of {dataset}, configuration {config}, at {revision}"
    try:
        builder = retried(wanted, lambda: load_dataset_builder(dataset, name=config, revision=revision))
    except (ValueError, RuntimeError) as error:  # an unknown configuration, or a dataset that is a script
        if isinstance(error, InputError):
            raise
        raise InputError(f"{dataset}: {str(error).splitlines()[0]}") from error
    splits = builder.config.data_files or {}
    if "train" not in splits:
        raise InputError(f"{dataset}: no train split, only {', '.join(map(str, splits)) or 'nothing'}")
    commit, names = "", []
    for url in splits["train"]:
        found = re.fullmatch(r"hf://datasets/(.+?)@([^/]+)/(.+)", url)
        if not found:
            raise InputError(
                f"{dataset}: its files are not on the Hub; download them and name them with --input"
            )
        commit = found[2]
        names.append(found[3])
    if unreadable := [name for name in names if not name.endswith(KINDS)]:
        raise InputError(f"{dataset}: {unreadable[0]} can't be read here; supported are {', '.join(KINDS)}")
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    files = retried(wanted, lambda: list_files(dataset, commit, folder))
    return commit, [files[name] for name in names]


def repository_files(dataset: str, revision: str) -> tuple[str, list[File]]:
    """The commit that `revision` stands for, and all files of the dataset's repository.

    Raises InputError if the dataset or revision does not exist; RunFault if the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    wanted = f"the file list of {dataset} at {revision}"
    commit = retried(wanted, lambda: HfApi().dataset_info(dataset, revision=revision).sha) or revision
    return commit, list(retried(wanted, lambda: list_files(dataset, commit)).values())


def list_files(dataset: str, commit: str, folder: str = "") -> dict[str, File]:
    """The files in a folder of a dataset's repository, and in the folders below it, by name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(
        dataset, folder or None, recursive=True, revision=commit, repo_type="dataset"
    )
    files = {}
    for entry in tree:
        if isinstance(entry, RepoFile):
            digest = entry.lfs.sha256 if entry.lfs else None  # git itself stores small files, without
            files[entry.path] = File(entry.path, entry.size, None, digest)
    return files


def is_copy(path: Path, file: File) -> bool:
    """Whether `path` has the size and SHA-256 that the Hub lists for `file`."""
    return path.stat().st_size == file.size and file.sha256 in (None, sha256(path))


class Downloads:
    """Downloads a dataset's files: the one being read and, in the background, the next."""

    def __init__(self, dataset: str, commit: str, files: list[File], folder: Path, keep: bool, ahead: bool):
        self.dataset, self.commit, self.files, self.folder = dataset, commit, files, folder
        self.keep, self.ahead = keep, ahead
        self.downloads: dict[int, Future[Path]] = {}  # by index into `files`
        for leftover in folder.rglob("*.incomplete"):  # of a killed job; the library would begin another
            leftover.unlink()

    def path(self, i: int) -> Path:
        """Wait for file `i` and return its path. Raises what `fetch` raises."""
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
        """While file `i` is read, download the next, as soon as the files before `i` are dropped."""
        if self.ahead and i + 1 < len(self.files) and not any(j < i for j in self.downloads):
            self.start(i + 1)

    def drop_before(self, name: str) -> None:
        """Drop all files before the one called `name`: their shards are safely on disk."""
        for i, file in enumerate(self.files):
            if file.name == name:
                break
            self.downloads.pop(i, None)
            if not self.keep:
                (self.folder / file.name).unlink(missing_ok=True)

    def fetch(self, file: File) -> Path:
        """Download a file and compare its size and SHA-256 with the Hub's. huggingface_hub resumes after a
        lost connection. Raises InputError if the Hub has no such file, RunFault if no sound copy arrives."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
            print(f"downloading {file.name} ({file.size / 1e9:.2f} GB)", flush=True)

        def attempt() -> Path:
            path = Path(
                hf_hub_download(
                    self.dataset, file.name, repo_type="dataset", revision=self.commit, local_dir=self.folder
                )
            )
            if is_copy(path, file):
                return path
            path.unlink()
            raise OSError("the download does not match the Hub's size or SHA-256")

        try:
            return retried(file.name, attempt)
        except OSError as error:  # only a full disk is not a CommandError by now
            raise RunFault(
                f"{file.name} could not be written ({in_words(error)}); free some disk space, then run the "
                "same command again"
            ) from error
