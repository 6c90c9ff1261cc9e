"""Files on file systems that lack something, or that fail: locks, flushes, renames, limits."""

import errno
import os
import stat
from pathlib import Path
from unittest.mock import Mock

from conftest import ROOT, TINY, call, make_shards, run
from support.cli import InputError, RunFault, advice, with_remedy
from support.data import demo
from support.data.shards import load_shards
from support.files import flush_to_disk, lock_folder, try_to_save, write_file
from support.run.curves import read_run

import pytest
import safetensors

NO_LOCKS = ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EACCES", "EPERM", "EBADF", "EIO")


def failing(number: int, function=None, only=lambda *_: True):
    """A function that fails with an OSError where `only` says so; elsewhere it is `function`."""

    def fail(*arguments, **options):
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return fail


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks_is_not_in_use(name, tmp_path, monkeypatch, capsys):
    number = getattr(errno, name)
    monkeypatch.setattr("fcntl.flock", failing(number))
    with lock_folder(tmp_path / "log", "--log_dir") as lock:
        assert not lock.closed
    note = f"note: {tmp_path}/log can't be locked ({os.strerror(number)}); use it for one job at a time\n"
    assert capsys.readouterr().out == note


def test_only_a_lock_that_is_held_means_in_use(tmp_path):
    with (
        lock_folder(tmp_path, "--log_dir"),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
    ):
        lock_folder(tmp_path, "--log_dir")
    lock_folder(tmp_path, "--log_dir").close()


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EBADF", "EACCES", "ENOSYS", "EISDIR"])
def test_a_folder_that_can_not_be_flushed_is_no_error(name, tmp_path, monkeypatch):
    """A file that can't be flushed is."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", failing(getattr(errno, name)))
    flush_to_disk(tmp_path)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        flush_to_disk(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        write_file(tmp_path / "other", lambda file: file.write(b"text"))
    monkeypatch.setattr(os, "open", failing(getattr(errno, name)))  # as Windows does
    flush_to_disk(tmp_path)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_folder_that_is_lost_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(getattr(errno, name)))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        flush_to_disk(tmp_path)


@pytest.mark.parametrize("name", ["EMFILE", "EXDEV", "EACCES", "ENOSYS"])
def test_a_folder_that_can_not_be_renamed_is_refused(name, tmp_path, monkeypatch):
    try_to_save(tmp_path, "--log_dir")
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "rename", failing(getattr(errno, name), os.rename, lambda old, _: Path(old).is_dir())
        )
        with pytest.raises(InputError) as caught:
            try_to_save(tmp_path, "--log_dir")
    reason = os.strerror(getattr(errno, name))
    assert str(caught.value) == (
        f"--log_dir {tmp_path}: no checkpoint could be saved there, since a folder can't be renamed "
        f"({reason}); choose a folder on another disk"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(
        InputError, match=r"can't be written \(No space left on device\); free some disk space"
    ):
        try_to_save(tmp_path, "--log_dir")
    assert not list(tmp_path.iterdir())


def test_what_a_disk_can_not_do_is_known_before_step_0(text_shards, tmp_path, monkeypatch):
    """Without a flush of folders, a run saves; without a rename, it does not begin."""
    flags = (*TINY, "--max_steps=1", "--sample_every=0", f"--data_dir={text_shards}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EINVAL, os.fsync, is_folder))
        done = call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'saved'}")
    assert (tmp_path / "saved/checkpoint_00001/SHA256SUMS").exists()
    assert "NOT SAVED" not in done.stdout
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(errno.EMFILE, os.rename, lambda old, _: Path(old).is_dir()))
        done = call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'refused'}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a folder can't be renamed (Too many open files)" in done.stderr
    assert "step 0" not in done.stdout
    assert [path.name for path in (tmp_path / "refused").iterdir()] == [".lock"]


def test_two_may_write_one_file(tmp_path):
    """The second begins and ends while the first writes: the first, which ends last, wins."""
    path = tmp_path / "file"

    def write_slowly(file):
        file.write(b"first")
        write_file(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"

    write_file(path, write_slowly)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_two_demos_at_once_use_the_data_of_the_faster(tmp_path, monkeypatch):
    folder, write = tmp_path / "demo_data", demo.write_shards
    monkeypatch.setattr(demo, "standard_library_prose", lambda: iter(["a word " * 60_000]))

    def write_while_another_does(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(demo, "write_shards", write)
            demo.write_demo_shards(folder)
            before.update((path, path.stat().st_ino) for path in folder.iterdir())
        return write(*arguments)

    before: dict[Path, int] = {}
    monkeypatch.setattr(demo, "write_shards", write_while_another_does)
    demo.write_demo_shards(folder)
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    assert load_shards(folder, verify=True).count("train") > 0


def test_a_demo_that_can_not_be_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "standard_library_prose", lambda: iter(["a word " * 60_000]))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises((OSError, RunFault), match="Input/output error"):
        demo.write_demo_shards(tmp_path / "demo_data")
    assert not list(tmp_path.iterdir())


OPEN_ALL = """
import resource, sys
from dataclasses import dataclass
from pathlib import Path
from support.cli import run_command
from support.data.shards import load_mix
@dataclass
class Config:
    pass
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv.pop())))
run_command(lambda _: print(load_mix([Path("shards")]).count("train")), Config)
"""


def test_more_shards_than_open_files(tmp_path):
    """The limit is raised as far as the system lets it; where that is too low, the limit is named."""
    make_shards(tmp_path / "shards", [50] * 100)
    env = {"PYTHONPATH": str(ROOT)}
    assert run("-c", OPEN_ALL, "4096", cwd=tmp_path, env=env).stdout == "4950\n"
    done = run("-c", OPEN_ALL, "64", cwd=tmp_path, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: shards/edufineweb_train_0000")
    assert done.stderr.endswith(".npy: Too many open files; allow more open files (ulimit -n)\n")


def test_only_a_full_disk_wants_space():
    wants_space = {name for name in errno.errorcode.values()
                   if "disk space" in advice(OSError(getattr(errno, name), "reason"))}  # fmt: skip
    assert wants_space == {"ENOSPC", "EDQUOT"}
    full = safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    assert advice(full) == "free some disk space"
    for error in (RuntimeError("x"), MemoryError(), OSError("28"), None):
        assert advice(error) == "remove the cause"
    assert with_remedy(OSError(errno.EMFILE, "Too many", "a.npy")).startswith(
        "a.npy: Too many; allow more open"
    )
    assert with_remedy(InputError("what")) == "what"


def test_a_link_to_a_disk_that_is_not_there(tmp_path):
    (tmp_path / "scratch").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=r"--log_dir .*scratch: a link to a place that does not exist"):
        lock_folder(tmp_path / "scratch", "--log_dir")


def test_a_record_that_can_not_be_read_is_not_taken_for_none(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied", "x")))
    with pytest.raises(PermissionError):
        read_run(tmp_path)
