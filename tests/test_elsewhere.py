"""Windows and macOS, as far as can be told from Linux: what the scripts would meet there."""

import ast
import ctypes
import os
import sys
import types

from conftest import ROOT, TINY, call, run
from support.cli import InputError
from support.files import lock_folder
from support.machine import device, processes
from support.run import folder as run_folder

import pytest
import torch

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")])
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
FORKING = {
    "fork",
    "forkpty",
    "setsid",
    "killpg",
    "SIGKILL",
    "SIGUSR1",
    "SIGHUP",
    "SIGALRM",
    "mkfifo",
    "getuid",
}


@pytest.mark.parametrize("script", FILES, ids=lambda path: path.stem)
def test_nothing_that_only_posix_has(script):
    """No module is imported at the top, and no call is made, that Windows lacks; no process is forked."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not POSIX_ONLY & set(names)
        assert "multiprocessing" not in names
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not FORKING & used


def test_every_text_file_names_its_encoding(tmp_path, text_shards):
    """Windows' own is not UTF-8. Python can warn of every file that is opened without saying; here a warning
    from one of our files is an error."""
    log_dir = tmp_path / "Ein Lauf, größer"  # and neither spaces nor other letters hurt
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    ours = [f"-Werror::EncodingWarning:{name}" for name in ("__main__", *modules)]
    python = ("-X", "warn_default_encoding", *ours)
    flags = (*TINY, "--max_steps=2", "--sample_every=2", f"--data_dir={text_shards}", f"--log_dir={log_dir}")
    run(*python, "train_gpt2.py", *flags)
    (tmp_path / "größer.txt").write_text("naïve " * 100, encoding="utf-8")
    shards = ("--encoding=bytes", "--shard_size=100", f"--output_dir={tmp_path / 'out'}")
    run(*python, "fineweb.py", "--input", tmp_path / "größer.txt", *shards)
    assert (log_dir / "loss.png").exists()
    assert call("sample.py", f"--model={log_dir}", "--num_samples=1", "--device=cpu").stdout.startswith("> ")


def test_a_folder_is_locked_with_windows_own_call(tmp_path, monkeypatch):
    """One byte, far beyond the text that the other process reads; a refusal names the holder."""
    locked = []
    msvcrt = types.SimpleNamespace(
        LK_NBLCK=2, locking=lambda fd, *what: locked.append((os.lseek(fd, 0, 1), *what))
    )
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    folder = tmp_path / "log"
    folder.mkdir()
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        held = lock_folder(folder, "--log_dir")
        assert locked == [(0x7FFFFFF0, 2, 1)]
        held.close()

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        msvcrt.locking = refuse
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
            lock_folder(folder, "--log_dir")


def test_windows_can_not_flush_a_folder(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    file = tmp_path / "file"
    file.touch()
    for system in ("posix", "nt"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", system)
            run_folder.flush_to_disk(file)
            run_folder.flush_to_disk(tmp_path)
    assert flushed == [str(file), str(tmp_path), str(file)]


def test_what_only_linux_has_is_asked_for_on_linux_only(monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(ctypes, "CDLL", fail)
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        device.keep_freed_memory()  # mallopt is glibc's
    monkeypatch.delattr(os, "sysconf")
    assert device.memory_limit(torch.device("cpu"), None) is None  # Windows: not known
    assert device.memory_limit(torch.device("cpu"), 2.0) == 2 * 2**30


def test_a_mac_has_one_process(monkeypatch):
    """Its GPU can't be shared, and there is no NCCL; without an NVIDIA GPU several processes use gloo."""
    monkeypatch.setattr(processes, "choose_device", torch.device)
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="several processes can't share MPS"):
        processes.start_processes("mps", 1)
    # PyTorch for Windows has CUDA and no NCCL.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="this PyTorch has no NCCL, which several GPUs need; use one, or"):
        processes.start_processes("cuda", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert processes.start_processes("mps", 1).collective_device == torch.device("cpu")
