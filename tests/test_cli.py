"""How every script starts and fails."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, call, run
from fineweb import ShardConfig
from support.cli import InputError, check_numbers, in_words, parse, whole_number
from support.data.shards import load_shards
from support.files import write_file
from train_gpt2 import TrainConfig

import pytest
import torch


@pytest.mark.parametrize(
    ("text", "number"), [("19073", 19073), ("524_288", 524_288), ("1e6", 10**6), ("2.5e3", 2500), ("-3", -3)]
)
def test_whole_numbers_as_people_write_them(text, number):
    assert whole_number(text) == number
    if number > 0:
        assert parse(ShardConfig, {}, [f"--shard_size={text}"]).shard_size == number


@pytest.mark.parametrize("text", ["1.5", "many", "", "nan", "inf"])
def test_what_is_no_whole_number(text):
    with pytest.raises((ValueError, OverflowError)):
        whole_number(text)
    done = call("fineweb.py", f"--shard_size={text}", check=False)
    assert done.returncode == 2
    assert "--shard_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "hint"),
    [
        ("sample.py", "--model log/demo"),
        ("hellaswag.py", "--model log/demo"),
        ("fineweb.py", "--input log/demo"),
        ("plot.py", "run log/demo"),
        ("train_gpt2.py", "--help"),
    ],
)
def test_a_word_without_its_flag(script, hint):
    done = call(script, "log/demo", check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: 'log/demo' can't stand alone; did you mean {hint}?\n"


def test_a_flag_without_its_dashes():
    done = call("train_gpt2.py", "resume", check=False)
    assert done.stderr == "error: 'resume' can't stand alone; did you mean --resume?\n"


def test_help_quotes_as_people_do():
    assert "(default: 'Hello, I'm a language" in call("sample.py", "--help").stdout


def test_a_number_that_can_not_be_meant():
    for changes in (
        {"max_lr": float("nan")},
        {"timeout_minutes": float("inf")},
        {"max_steps": -1},
        {"total_batch_size": 0},
        {"cooldown": 1.1},
        {"momentum": 1.0},
        {"n_layer": 0},
        {"seed": 2**64},
        {"seed": -1},
    ):
        ((name, value),) = changes.items()
        with pytest.raises(InputError, match=f"--{name} {value}: must be"):
            check_numbers(TrainConfig(**changes))
    check_numbers(TrainConfig(max_steps=0, cooldown=1.0, momentum=0.0, seed=2**64 - 1))
    torch.Generator().manual_seed(2**64 - 1)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied") as caught:
        write_file(tmp_path / "a.json", lambda file: file.write(b""))
    assert in_words(caught.value) == f"{tmp_path / 'a.json'}: Permission denied"
    tmp_path.chmod(0o700)


def test_an_error_of_the_system_names_the_file_and_not_a_number(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        write_file(tmp_path / "nowhere/a.json", lambda file: file.write(b""))
    assert in_words(caught.value) == f"{tmp_path / 'nowhere/a.json'}: No such file or directory"


def test_a_picture_in_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 10.9\n")
    done = call("plot.py", "run", tmp_path, f"--out={tmp_path}/no/a.png", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}/no/a.png: No such file or directory (there is no folder {tmp_path}/no)\n",
    )


def test_a_run_elsewhere_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("log/demo").mkdir(parents=True)
    Path("log/demo/log.txt").write_text("0 val 10.9\n")
    done = call("plot.py", "run", "log", check=False)
    assert "log holds no run" in done.stderr
    assert "did you mean log/demo?" in done.stderr


def test_without_standard_streams_a_script_works_silently(tmp_path):
    """No file gets the number of a missing stream: what a library writes to that number would end there."""
    (tmp_path / "x.txt").write_text("a word " * 300)
    script = (
        "import os, runpy, sys; from support import files; write = files.write_file\n"
        "files.write_file = lambda *a, **k: [os.write(fd, b'lost') for fd in (1, 2)] and write(*a, **k)\n"
        "sys.argv[0] = 'fineweb.py'; runpy.run_path('fineweb.py', run_name='__main__')"
    )
    flags = f"--input={tmp_path}/x.txt --encoding=bytes --shard_size=700 --output_dir={tmp_path}/out"
    command = f'"{sys.executable}" -c "{script}" {flags} <&- >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == 0
    load_shards(tmp_path / "out", verify=True)
    assert (tmp_path / "out/.lock").read_text().startswith("process ")


@pytest.mark.parametrize(
    ("platform_name", "release", "given", "expected"),
    [
        ("linux", "6.1.0-18-amd64", {}, "expandable_segments:True"),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", {}, None),
        ("linux", "4.4.0-19041-Microsoft", {}, None),  # WSL 1
        ("linux", "5.15.136-tegra", {}, None),
        ("linux", "6.1.0", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ("linux", "6.1.0", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, None),
        ("win32", "10", {}, None),
    ],
)
def test_segments_grow_where_drivers_can_do_that(platform_name, release, given, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(os, "environ", dict(given))
    runpy.run_path(str(ROOT / "support/__init__.py"))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "3"}, True),  # left over
        ({"LOCAL_RANK": ""}, True),
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "x"}, True),
        ({"LOCAL_RANK": "1", "MASTER_ADDR": "x"}, False),
    ],
)
def test_an_error_is_printed_whatever_variables_are_left_over(environment, speaks, monkeypatch):
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = call("plot.py", "run", "/no/where", check=False)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, speaks)


@pytest.mark.slow
def test_openmp_threads_spin_little_unless_the_user_chose():
    """libgomp reads the variable when torch is imported; OMP_DISPLAY_ENV makes it print what it read."""
    show = {"OMP_DISPLAY_ENV": "verbose"}
    done = run("-c", "import support, torch", cwd=ROOT, env=show)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch does not use libgomp")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
    done = run("-c", "import support, torch", cwd=ROOT, env={**show, "GOMP_SPINCOUNT": "7"})
    assert "GOMP_SPINCOUNT = '7'" in done.stderr
    done = run("-c", "import support, torch", cwd=ROOT, env={**show, "OMP_WAIT_POLICY": "ACTIVE"})
    assert "GOMP_SPINCOUNT = '1000'" not in done.stderr
