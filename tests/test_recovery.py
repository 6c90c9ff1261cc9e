"""A run that survives: every fault, made to happen."""

import copy
import errno
import fcntl
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

from conftest import ROOT, TINY, call, faulty, make_shards, run, run_folder, torchrun
from support.cli import InputError, RunFault
from support.data.shards import Shards, load_shards
from support.files import sha256
from support.machine.device import device_name
from support.machine.processes import STOP_SIGNALS, Stopped, StopSignals, World
from support.model.huggingface import list_checkpoints, step_of
from support.run import folder as folder_module
from support.run.curves import read_log
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer, get_lr

import numpy as np
import pytest
import safetensors
import torch
from filelock import FileLock

NO_SHARDS = Shards(Path(), {}, {}, "gpt2", {}, "")
FLAGS = (
    *TINY,
    "--max_steps=20",
    "--val_every=5",
    "--sample_every=0",
    "--checkpoint_every=4",
    "--keep_every=8",
)


def hear_signals():
    """Even if the tests run under nohup or in the background, where some are ignored."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def open_terminal():
    hear_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def start(faults, *flags, processes=0, to_torchrun=(), **options):
    """Start a run in the background, in a session of its own; returns the process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *to_torchrun]
    launcher = torchrun if processes else []
    command = [sys.executable, *launcher, ROOT / "tests/faults.py", *flags]
    env = {**os.environ, "FAULTS": faults, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        env=env,
        cwd=ROOT,
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_signals, **options},
    )


def wait_for_step(file: Path, step: int, timeout: float = 60):
    end = time.monotonic() + timeout
    while not (file.exists() and (file.read_text() or "0").isdigit() and int(file.read_text() or 0) >= step):
        assert time.monotonic() < end, "the run did not get so far"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_shards):
    """A run of 20 steps that nothing happens to; beside its folder, the hashes of the tokens it saw. It is
    made once for all parallel processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed/log"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name("lock")):
        if not list_checkpoints(folder):
            flags = (*FLAGS, f"--data_dir={text_shards}", f"--log_dir={folder}")
            faulty(f"tokens={folder.parent / 'hashes'}", *flags, "--micro_batch_size=8")
    return folder


@pytest.fixture
def flags(text_shards, tmp_path):
    return (*FLAGS, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")


def assert_same_end(folder, undisturbed):
    assert (folder / "log.txt").read_text() == (undisturbed / "log.txt").read_text()
    for file in ("model.safetensors", "config.json"):
        assert sha256(folder / "checkpoint_00020" / file) == sha256(undisturbed / "checkpoint_00020" / file)


# ------------------------------------------------------------------ killed


def kill_trials(kills, seed, tmp_path, text_shards, timeout, *flags):
    done = run(
        ROOT / "tests/kill_trials.py",
        kills,
        seed,
        tmp_path,
        *FLAGS,
        "--checkpoint_every=1",
        f"--data_dir={text_shards}",
        *flags,
        env={"PYTHONPATH": str(ROOT)},
        timeout=timeout,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_killed_at_a_random_moment_it_ends_the_same(optimizer, tmp_path, text_shards):
    result = kill_trials(1, 1, tmp_path, text_shards, 120, f"--optimizer={optimizer}")
    assert result["kills"] == 1
    assert result["differences"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_at_fifty_random_moments_it_ends_the_same(optimizer, tmp_path, text_shards):
    result = kill_trials(50, 2, tmp_path, text_shards, 900, f"--optimizer={optimizer}")
    print(result)
    assert result["kills"] == 50
    assert result["differences"] == 0
    assert result["resumed"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("moment", [24, 32])
def test_killed_inside_a_save(moment, flags, tmp_path, undisturbed):
    """At the flush of a file, and at the rename, of the second checkpoint."""
    killed = faulty(f"kill_at={moment}", *flags, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "log").glob("checkpoint_*.tmp"))
    assert [path.name for path in list_checkpoints(tmp_path / "log")] == ["checkpoint_00004"]
    call("train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", undisturbed)
    assert not list((tmp_path / "log").glob("*.tmp"))


@pytest.mark.slow
def test_killed_at_every_flush_and_rename(flags, tmp_path, undisturbed):
    for moment in itertools.count():
        shutil.rmtree(tmp_path / "log", ignore_errors=True)
        killed = faulty(f"kill_at={moment}", *flags, check=False)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
        call("train_gpt2.py", *flags, "--resume")
        assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.slow
def test_one_of_two_processes_killed(flags, tmp_path, undisturbed):
    """The other ends within a minute, nothing is left running, and the run goes on. Until then they
    accumulated gradients over two micro-steps: their losses are those of one process."""
    steps = tmp_path / "steps"
    both = start(f"slow=0.1 step_file={steps}", *flags, "--micro_batch_size=2", processes=2)
    wait_for_step(steps, 6)
    children = workers(both.pid)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    killed_at = time.monotonic()
    both.communicate(timeout=60)
    assert both.returncode != 0
    assert time.monotonic() - killed_at < 60
    assert not any(alive(child) for child in children)
    done = call("train_gpt2.py", *flags, "--resume")
    assert re.search("resuming at step [46] ", done.stdout)  # the save at step 6 may have been complete
    compare_losses(tmp_path / "log", undisturbed)


def workers(pid):
    """The processes that torchrun, process `pid`, has started."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], text=True, capture_output=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "faults.py" in line]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def compare_losses(folder, undisturbed):
    one, other = read_log(folder / "log.txt"), read_log(undisturbed / "log.txt")
    for kind in ("train", "val"):
        assert [step for step, _ in one[kind]] == [step for step, _ in other[kind]]
        for (_, a), (_, b) in zip(one[kind], other[kind], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(flags, tmp_path, undisturbed):
    steps = tmp_path / "steps"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max_restarts=3",
        ROOT / "tests/faults.py",
        *flags,
        "--micro_batch_size=4",
        "--resume",
    ]
    env = {
        **os.environ,
        "FAULTS": f"slow=0.1 step_file={steps}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    launcher = subprocess.Popen(
        list(map(str, command)), env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        for step in (6, 13):
            wait_for_step(steps, step, timeout=100)
            os.kill(workers(launcher.pid)[step % 2], signal.SIGKILL)
    except AssertionError:
        launcher.terminate()
        print(*launcher.communicate(timeout=60))
        raise
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert out.count("resuming at step") == 2
    compare_losses(tmp_path / "log", undisturbed)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_last_finished_step(number, status, flags, tmp_path, undisturbed):
    steps = tmp_path / "steps"
    process = start(f"slow=0.1 step_file={steps}", *flags)
    wait_for_step(steps, 6)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert err.strip() == "stopping: the last finished step is saved; Ctrl-C again ends at once"
    stopped_at = int(re.search(r"stopped at step (\d+), state saved", out)[1])
    assert list_checkpoints(tmp_path / "log")[-1].name == f"checkpoint_{stopped_at:05d}"
    call("train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_pipe_whose_reader_ends_with_it(number, flags, tmp_path):
    """As in `python train_gpt2.py 2>&1 | tee run.out`: tee gets the signal too."""
    steps = tmp_path / "steps"
    process = start(f"slow=0.1 step_file={steps}", *flags, stderr=subprocess.STDOUT)
    wait_for_step(steps, 6)
    process.stdout.close()
    process.send_signal(number)
    process.wait(timeout=30)
    events = json.loads((tmp_path / "log/status.json").read_text())["events"]
    stopped_at = int(re.search(r"stopped at step (\d+), state saved", events[-1][1])[1])
    assert list_checkpoints(tmp_path / "log")[-1].name == f"checkpoint_{stopped_at:05d}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_terminal_that_is_closed_saves_the_last_finished_step(processes, flags, tmp_path, undisturbed):
    """As when an ssh connection is lost: SIGHUP arrives, and nothing can be printed any more."""
    ours, theirs = os.openpty()
    steps = tmp_path / "steps"
    process = start(f"slow=0.1 step_file={steps}", *flags, *["--micro_batch_size=4"] * bool(processes),
                    processes=processes, stdin=theirs, stdout=theirs, stderr=theirs,
                    preexec_fn=open_terminal)  # fmt: skip
    os.close(theirs)
    end = time.monotonic() + 60
    while not (steps.exists() and int(steps.read_text() or 0) >= 6):
        assert time.monotonic() < end
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 2**16)
    os.close(ours)
    status = process.wait(timeout=60)
    assert status == 128 + signal.SIGHUP if not processes else status != 0
    events = json.loads((tmp_path / "log/status.json").read_text())["events"]
    stopped_at = int(re.search(r"stopped at step (\d+), state saved", events[-1][1])[1])
    assert list_checkpoints(tmp_path / "log")[-1].name == f"checkpoint_{stopped_at:05d}"
    assert stopped_at < 20
    if not processes:
        call("train_gpt2.py", *flags, "--resume")
        assert_same_end(tmp_path / "log", undisturbed)


def test_what_is_ignored_stays_ignored():
    """As SIGHUP is under nohup, and Ctrl-C in what a script starts in the background."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    assert len(STOP_SIGNALS) == (2 if sys.platform == "win32" else 6)
    try:
        for number in STOP_SIGNALS:
            for each in STOP_SIGNALS:
                signal.signal(each, signal.SIG_IGN if each == number else signal.SIG_DFL)
            stop = StopSignals(is_main=True)
            for each in STOP_SIGNALS:
                assert signal.getsignal(each) == (signal.SIG_IGN if each == number else stop.handle)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once(first, flags, tmp_path):
    steps = tmp_path / "steps"
    process = start(f"slow=1.5 step_file={steps}", *flags)
    wait_for_step(steps, 0)
    process.send_signal(first)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - sent < 1


# ------------------------------------------------------------------ what a signal costs


def stop_trials(stops, processes, tmp_path, text_shards, *flags):
    """A run with eight micro-steps a step is stopped so often, in turn by each signal and in parts of each
    kind; see tests/stop_trials.py."""
    item = {"endings": [" on", " off", " by", " in"], "label": 0}
    items = [{"ind": i, "ctx": "green bottles "[: 3 + 3 * i], **item} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = (*FLAGS, "--max_steps=10", "--micro_batch_size=1", f"--data_dir={text_shards}", *flags)
    flags += ("--hellaswag_every=5", f"--hellaswag_data={tmp_path / 'items.jsonl'}")
    done = run(
        ROOT / "tests/stop_trials.py",
        *(stops, 1, processes, tmp_path, *flags, "--val_tokens=256", "--sample_every=5"),
        env={"PYTHONPATH": str(ROOT)},
        timeout=900,
    )
    return json.loads(done.stdout)


KINDS = {"micro-step", "validation", "HellaSwag", "sample"}


def test_after_a_signal_nothing_new_is_begun(tmp_path, text_shards):
    """No micro-step, no batch of an evaluation, no token; and the run ends with the bits of one never
    stopped."""
    result = stop_trials(4, 1, tmp_path, text_shards)
    assert not result["wrong"]
    assert result["stopped"].keys() == KINDS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [(1, ()), (1, ("--optimizer=muon",)), (2, ()), (2, ("--optimizer=muon",)), (2, ("--shard",))],
)
def test_stopped_at_twenty_random_moments(processes, more, tmp_path, text_shards):
    """By a signal to one of two processes, or to both."""
    result = stop_trials(20, processes, tmp_path, text_shards, *more)
    assert not result["wrong"]
    assert result["stopped"].keys() == KINDS


def play(seed, n_processes=3, n_places=6):
    """Processes that check for signals in a random order, at every place and, at random, between two. After
    every second place they wait for each other, as in an all-reduce. Returns how many places each has passed,
    and how many the foremost had when the first process with a signal looked."""
    chance, store = np.random.default_rng(seed), torch.distributed.HashStore()
    stops = [object.__new__(StopSignals) for _ in range(n_processes)]
    store.set("key", "go 0")
    for stop in stops:
        stop.store, stop.key, stop.agreed, stop.received = store, "key", 0, 0
    running, foremost = set(range(n_processes)), None
    while running:
        rank = int(chance.choice(sorted(running)))
        stop = stops[rank]
        stop.received = stop.received or int(chance.random() < 0.05) * signal.SIGTERM
        behind = {other for other in range(n_processes) if stops[other].agreed < stop.agreed}
        if stop.agreed % 2 == 0 and behind:
            assert behind <= running, "it waits for a process that has stopped"
            continue
        if stop.received and foremost is None:
            foremost = max(other.agreed for other in stops)
        try:
            stop.check(all_meet=chance.random() < 0.5)
        except Stopped:
            running.remove(rank)
        else:
            if stop.agreed == n_places:
                running.remove(rank)
    return [stop.agreed for stop in stops], foremost


def test_processes_stop_at_the_same_place():
    """In whatever order they look: all of them, no further than where the foremost was."""
    stopped = 0
    for seed in range(300):
        passed, foremost = play(seed)
        assert len(set(passed)) == 1
        if foremost is not None and passed[0] < 6:
            stopped += 1
            assert passed[0] == foremost
    assert 100 < stopped < 300


@pytest.fixture
def stop_at(monkeypatch):
    """The run sends itself SIGTERM at the n-th check for signals, before it looks."""

    def choose(n):
        check, checks = StopSignals.check, itertools.count(1)

        def send_and_check(self, *arguments, **options):
            if self.in_steps and next(checks) == n:
                os.kill(os.getpid(), signal.SIGTERM)
            check(self, *arguments, **options)

        monkeypatch.setattr(StopSignals, "check", send_and_check)

    yield choose
    monkeypatch.undo()


def test_stopped_in_its_last_evaluation_a_run_is_finished_later(
    stop_at, flags, tmp_path, undisturbed, monkeypatch
):
    shutil.copytree(undisturbed, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/checkpoint_00020")
    stop_at(4 + 2)  # four steps of one micro-step, then the second batch of the validation
    done = call("train_gpt2.py", *flags, "--micro_batch_size=8", "--resume", check=False)
    assert done.returncode == 143
    assert "stopped at step 20, state saved" in done.stdout
    assert "result" not in json.loads((tmp_path / "log/run.json").read_text())
    monkeypatch.undo()
    sums = (tmp_path / "log/checkpoint_00020/SHA256SUMS").read_bytes()
    done = call("train_gpt2.py", *flags, "--micro_batch_size=8", "--resume")
    assert "done: 20 steps" in done.stdout
    assert "SAVED" not in done.stdout
    assert_same_end(tmp_path / "log", undisturbed)
    assert (tmp_path / "log/checkpoint_00020/SHA256SUMS").read_bytes() == sums
    assert "| 20 | 5,120 |" in (tmp_path / "log/checkpoint_00020/README.md").read_text()
    assert "is finished: its model is" in call("train_gpt2.py", *flags, "--resume").stdout


@pytest.mark.parametrize("begun", [False, True])
def test_stopped_with_nothing_new_it_saves_nothing(begun, stop_at, flags, tmp_path, undisturbed, monkeypatch):
    """In the first step, or in the first one after --resume, whose checkpoint is there."""
    if begun:
        shutil.copytree(undisturbed, tmp_path / "log")
        shutil.rmtree(tmp_path / "log/checkpoint_00020")
    stop_at(1)
    before = {path: sha256(path) for path in tmp_path.glob("log/checkpoint_*/*")}
    done = call("train_gpt2.py", *flags, *["--resume"] * begun, check=False)
    assert done.returncode == 143
    assert f"stopped at step {'16, state saved' if begun else '0, nothing to save yet'}" in done.stdout
    assert "SAVED" not in done.stdout
    assert {path: sha256(path) for path in tmp_path.glob("log/checkpoint_*/*")} == before
    monkeypatch.undo()
    call("train_gpt2.py", *flags, *["--resume"] * begun)
    assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(flags, tmp_path, undisturbed):
    """An evaluation may take long, and there is nothing to save: neither a checkpoint nor a run to resume."""
    process = start("slow_evaluation=5", *flags)
    for line in process.stdout:
        if line.startswith("run folder:"):  # the table's last line: the evaluation follows
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=3)
    assert (process.returncode, err.strip()) == (143, "stopped before the first step, nothing is lost")
    call("train_gpt2.py", *flags)
    assert_same_end(tmp_path / "log", undisturbed)
    assert json.loads((tmp_path / "log/run.json").read_text())["interruptions"] == 0


@pytest.mark.slow
def test_two_processes_stop_before_the_first_step_together(flags, tmp_path):
    launcher = start("slow_evaluation=5", *flags, "--micro_batch_size=4", processes=2)
    for line in launcher.stdout:
        if line.startswith("run folder:"):
            break
    time.sleep(0.5)
    os.killpg(launcher.pid, signal.SIGTERM)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode != 0
    assert err.count("stopped before the first step, nothing is lost") == 1
    assert "lost contact" not in err
    assert not list_checkpoints(tmp_path / "log")


@pytest.mark.parametrize("holds", ["train", "notes", "half a line", "result", "evaluations"])
def test_a_folder_is_taken_only_where_nothing_is_lost(holds, tmp_path):
    """Somebody's notes are called log.txt too, and a run of no steps has a result."""
    text = {"train": "0 val 10.9\n0 train 10.9\n", "notes": "0 val 10.9\nbuy milk\n", "half a line": "0 va"}
    (tmp_path / "log.txt").write_text(text.get(holds, "0 val 10.9\n0 hella 0.25\n"))
    (tmp_path / "run.json").write_text(json.dumps({"result": {}} if holds == "result" else {"run_id": "1"}))
    folder = run_folder(tmp_path)
    if holds == "evaluations":
        assert folder.open(GPTConfig(), NO_SHARDS, get_lr) == folder.interruptions == 0
    else:
        with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
            folder.open(GPTConfig(), NO_SHARDS, get_lr)


def test_a_damaged_record_does_not_stand_in_the_way(tmp_path):
    """run.json only describes a run; with a checkpoint there is something to go on with."""
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "checkpoint_00004").mkdir()
    folder = run_folder(tmp_path, resume=True)
    assert folder.holds_a_run()
    with pytest.raises(InputError, match="has no sound checkpoint, only damaged ones"):
        folder.open(GPTConfig(), NO_SHARDS, get_lr)


@pytest.mark.parametrize("record", ["[]", "{}", '{"run_id": "1", "interruptions": 0, "train_config": 7}'])
def test_a_strange_record_names_no_micro_batch(record, tmp_path):
    folder = run_folder(tmp_path, resume=True)
    folder.before = json.loads(record)
    assert folder.fitted_before() is None


def test_another_way_to_divide_memory_is_searched_anew(tmp_path):
    record = {"device": device_name(World().device), "world_size": 1, "micro_batch_size": 4, "loss_chunks": 1}
    for shard, found in ((False, (4, 1)), (True, None)):
        folder = run_folder(tmp_path, resume=True)
        folder.before = record | {"train_config": asdict(TrainConfig(shard=shard))}
        assert folder.fitted_before() == found


LOGS = {  # what log.txt and run.json hold besides a recipe, and what --resume may do
    "the tutorial's": ("0 train 10.9\n19072 val 3.1\n", None, False),
    "another program's": ("0 train 10.9\n", {"lr": 1}, False),
    "a finished run's": ("0 train 10.9\n", {"result": {}}, False),
    "a run's whose checkpoints are gone": ("0 train 10.9\n700 train 4.2\n", {"saved": True}, False),
    "an older version's": ("0 train 10.9\n", {"saved": None}, False),
    "one's that never saves": ("0 train 10.9\n1 train 9.2\n", {"every": 0}, False),
    "one's that died before its first save": ("0 val 10.9\n0 train 10.9\n1700 train 4.2\n", {}, True),
    "only evaluations": ("250 val 3.2\n", None, False),
}


@pytest.mark.parametrize("whose", LOGS)
def test_a_log_without_its_checkpoint_is_not_erased(whose, tmp_path):
    lines, record, may_start = LOGS[whose]
    folder = run_folder(tmp_path, resume=True)
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    folder.lock_file.close()
    (tmp_path / "log.txt").write_text(lines)
    if record is not None:
        config = {"checkpoint_every": record.get("every", 1000)}
        known = {"run_id": "1", "interruptions": 0, "train_config": config, "recipe": folder.recipe}
        known = record if "lr" in record else known | {"saved": False} | record
        known = {name: value for name, value in known.items() if value is not None}
        (tmp_path / "run.json").write_text(json.dumps(known))
    (tmp_path / "notes.txt.tmp").write_text("somebody's")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    again = run_folder(tmp_path, resume=True)
    if may_start:
        assert again.open(GPTConfig(), NO_SHARDS, get_lr) == 0
        again.lock_file.close()
        other = run_folder(tmp_path, resume=True, max_lr=1e-3)
        with pytest.raises(InputError, match=r"another recipe: max_lr was 0\.0006, is 0\.001"):
            other.open(GPTConfig(), NO_SHARDS, get_lr)
    else:
        with pytest.raises(InputError, match="holds the log of a run but no checkpoint to continue it from"):
            again.open(GPTConfig(), NO_SHARDS, get_lr)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_the_script_for_a_cluster(flags, tmp_path, undisturbed):
    """docs/cluster.md's, with stand-ins for torchrun, which adds the flags of the test, and for scontrol."""
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    (tmp_path / "job.sh").write_text(re.search(r"```bash\n(#!.*?)```", page, re.DOTALL)[1])
    steps, calls = tmp_path / "steps", tmp_path / "calls"
    more = " ".join(["tests/faults.py", *flags, "--micro_batch_size=4", "--resume"])
    stand_ins = {
        "torchrun": f"exec {sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 {more}",
        "scontrol": f'echo "$@" >> {calls}',
    }
    for name, command in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "FAULTS": f"slow=0.1 step_file={steps}", "PYTHONPATH": str(ROOT)}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1"}

    def submit():
        return subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, preexec_fn=hear_signals)  # fmt: skip

    job = submit()
    wait_for_step(steps, 6)
    job.send_signal(signal.SIGUSR1)  # to the shell alone
    out, _ = job.communicate(timeout=60)
    stopped_at = re.search(r"stopped at step (\d+), state saved", out)[1]
    assert calls.read_text() == "requeue 4711\n"
    job = submit()
    out, _ = job.communicate(timeout=100)
    assert f"resuming at step {stopped_at}" in out
    assert "done: 20 steps" in out
    assert job.returncode == 0
    assert calls.read_text() == "requeue 4711\n"
    compare_losses(tmp_path / "log", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one", "all", "torchrun"])
def test_a_signal_to_one_of_two_processes_or_to_all(whom, flags, tmp_path, undisturbed):
    """Or to torchrun, which passes on what it is told to."""
    steps = tmp_path / "steps"
    options = {"to_torchrun": ["--signals-to-handle=SIGTERM,SIGUSR1"]}
    launcher = start(f"slow=0.1 step_file={steps}", *flags, "--micro_batch_size=4", processes=2, **options)
    wait_for_step(steps, 6)
    if whom == "one":
        os.kill(workers(launcher.pid)[1], signal.SIGTERM)
    elif whom == "torchrun":
        os.kill(launcher.pid, signal.SIGUSR1)
    else:
        os.killpg(launcher.pid, signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert out.count("state saved") == 1
    stopped_at = int(re.search(r"stopped at step (\d+), state saved", out)[1])
    assert list_checkpoints(tmp_path / "log")[-1].name == f"checkpoint_{stopped_at:05d}"
    done = call("train_gpt2.py", *flags, "--resume")  # one process goes on with what two began
    assert f"resuming at step {stopped_at}" in done.stdout
    compare_losses(tmp_path / "log", undisturbed)


# ------------------------------------------------------------------ saved while training goes on


class Run:
    """A small model that is trained and saved. `gate` holds the thread back before it writes anything;
    `events` is the order in which things happened, `said` what was printed."""

    def __init__(self, folder, monkeypatch):
        self.said, self.events, self.gate = [], [], threading.Event()
        self.folder = run_folder(folder, self.said.append)
        self.model = GPT(GPTConfig(16, 257, 2, 2, 16, encoding="bytes")).pad_vocabulary()
        self.optimizer = configure_optimizer(self.model, TrainConfig())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        (folder / "log.txt").touch()
        save_pretrained = GPT.save_pretrained

        def held_back(*arguments):
            assert self.gate.wait(30)
            self.events.append("written")
            save_pretrained(*arguments)

        monkeypatch.setattr(GPT, "save_pretrained", held_back)
        monkeypatch.setattr(folder_module, "free_host_memory", lambda: 2**40)

    def train(self):
        tokens = torch.randint(257, (2, 17))
        loss = self.scaler.scale(self.model(tokens[:, :-1], tokens[:, 1:]))
        loss.backward()
        self.optimizer.param_groups[0]["lr"] *= 0.9
        self.scaler.step(self.optimizer)
        self.scaler.update(self.scaler.get_scale() / 2)
        self.optimizer.zero_grad()

    def save(self, step):
        self.folder.save(step, self.model, self.optimizer, self.scaler, loss=0.5)
        self.events.append(f"save {step} called")

    def state(self):
        """All that a checkpoint must restore; not a copy."""
        return self.model.state_dict(), self.optimizer.state_dict(), self.scaler.state_dict()

    def open_gate_in(self, seconds):
        threading.Timer(seconds, lambda: (self.events.append("gate opened"), self.gate.set())).start()


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    made = Run(tmp_path, monkeypatch)
    made.train()
    yield made
    made.gate.set()
    made.folder.writer.shutdown()


def test_a_checkpoint_holds_the_moment_of_the_call(small_run, tmp_path):
    """Though training has gone on before the first byte was written."""
    oracle, rng = copy.deepcopy(small_run.state()), torch.get_rng_state()
    small_run.save(7)
    for _ in range(3):
        small_run.train()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(small_run.state(), oracle, rtol=0, atol=0)
    small_run.gate.set()
    small_run.folder.wait_for_save(7)
    assert small_run.folder.find_checkpoint() == []
    stored = small_run.folder.trainer
    weights = GPT.from_pretrained(tmp_path / "checkpoint_00007").pad_vocabulary().state_dict()
    torch.testing.assert_close((weights, stored["optimizer"], stored["scaler"]), oracle, rtol=0, atol=0)
    assert torch.equal(stored["rng"], rng)


def test_the_best_checkpoint_is_kept_and_named(small_run):
    """Of a run that overfits; what is not finite is not the best. Its card says which one it is."""
    folder = small_run.folder
    small_run.gate.set()
    losses = {1: 5.0, 2: 3.0, 3: math.nan, 4: 2.5, 5: 2.75, 6: 2.75, 7: 4.0}
    kept = []
    for step, loss in losses.items():
        folder.append(step, {"val": str(loss)})
        small_run.save(step)
        folder.finish_save()
        kept.append([step_of(path) for path in list_checkpoints(folder.path)])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    assert folder.best_checkpoint() == (folder.path / "checkpoint_00004", 2.5)


def test_a_second_save_and_the_end_wait_for_the_first(small_run):
    small_run.save(1)
    small_run.open_gate_in(0.2)
    small_run.save(2)
    small_run.folder.wait_for_save(2)
    small_run.events.append("end")
    assert small_run.events[:3] == ["save 1 called", "gate opened", "written"]
    assert sorted(small_run.events[3:5]) == ["save 2 called", "written"]
    assert small_run.events[5:] == ["end"]
    assert [text[:13] for text in small_run.said] == ["step 1: saved", "step 2: saved"]


def test_the_end_waits_for_the_save_in_flight(small_run):
    small_run.save(1)
    small_run.open_gate_in(0.2)
    small_run.folder.wait_for_save(1)
    assert small_run.events == ["save 1 called", "gate opened", "written"]


def test_without_memory_for_a_copy_training_waits(small_run, tmp_path, monkeypatch):
    """The contents are the same."""

    def contents():
        folder = tmp_path / "checkpoint_00001"
        trainer = torch.load(folder / "trainer.pt", weights_only=True)
        return trainer, {file.name: sha256(file) for file in folder.glob("*.*[ns]")}  # weights and .json

    small_run.gate.set()
    small_run.save(1)
    small_run.folder.wait_for_save(1)
    with_copy = contents()
    shutil.rmtree(tmp_path / "checkpoint_00001")
    size = sum(t.numel() * 4 for t in small_run.model.parameters()) * 3  # and the optimizer's moments
    monkeypatch.setattr(folder_module, "free_host_memory", lambda: 2 * size)  # the moments' step counts too
    monkeypatch.setattr(folder_module, "to_host", None)  # not to be called
    small_run.save(1)
    assert small_run.events[-2:] == ["written", "save 1 called"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= with_copy[1].keys()
    assert contents()[1] == with_copy[1]
    torch.testing.assert_close(contents()[0], with_copy[0], rtol=0, atol=0)


FAILURES = {
    "[Errno 28]": OSError(errno.ENOSPC, "No space left on device"),
    "torch": RuntimeError("PytorchStreamWriter failed writing file data/0"),
    "safetensors": safetensors.SafetensorError("I/O error"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("place", ["to_host", "sha256"])  # in the main process's thread, in the writing one
@pytest.mark.parametrize("failure", FAILURES)
def test_a_save_that_fails_is_said_and_leaves_nothing(failure, place, small_run, tmp_path, monkeypatch):
    reason = {"[Errno 28]": "No space left on device", "memory": "MemoryError"}.get(failure)
    small_run.gate.set()
    small_run.save(1)
    with monkeypatch.context() as patch:
        small_run.folder.finish_save()

        def fail(_):
            raise FAILURES[failure]

        patch.setattr(folder_module, place, fail)
        small_run.save(2)
        small_run.train()
        small_run.folder.finish_save()
    text = f"step 2: NOT SAVED: {reason or FAILURES[failure]}; the checkpoints before it are intact"
    assert small_run.said[1:] == [text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00001", "log.txt"]
    advice = "free some disk space" if isinstance(FAILURES[failure], OSError) else "remove the cause"
    repeated = re.escape(f"step 2, could not be saved ({reason or FAILURES[failure]}); {advice}, then run it")
    with pytest.raises(RunFault, match=repeated):
        small_run.folder.wait_for_save(2)
    small_run.save(3)
    small_run.folder.wait_for_save(3)


def test_a_run_json_that_can_not_be_written_is_no_lost_checkpoint(small_run, monkeypatch):
    """Another program may hold it. The next save writes it."""
    folder, written = small_run.folder, []

    def write(facts):
        if not written:
            written.append("failed")
            raise PermissionError(errno.EACCES, "Access is denied")
        written.append(folder.saved)

    folder.facts = {"a": 1}
    monkeypatch.setattr(folder, "make_card", lambda *_: {})
    monkeypatch.setattr(folder, "write_facts", write)
    small_run.gate.set()
    for step in (1, 2):
        small_run.save(step)
        folder.wait_for_save(step)
    assert not [text for text in small_run.said if "NOT SAVED" in text]
    assert written == ["failed", True]


def test_what_nobody_expects_in_the_thread_is_not_lost(small_run, monkeypatch):
    monkeypatch.setattr(folder_module, "sha256", lambda _: 1 / 0)
    small_run.gate.set()
    small_run.save(1)
    with pytest.raises(ZeroDivisionError):
        small_run.folder.wait_for_save(1)


def in_flight(flags, tmp_path, faults=""):
    """A run whose first checkpoint is being written, for seconds, while training goes on."""
    steps = tmp_path / "steps"
    process = start(f"slow=0.05 slow_flush=0.25 step_file={steps} {faults}", *flags)
    wait_for_step(steps, 6)
    assert (tmp_path / "log/checkpoint_00004.tmp").exists()
    return process


@pytest.mark.slow
def test_a_signal_while_a_save_is_in_flight(flags, tmp_path, undisturbed):
    process = in_flight(flags, tmp_path)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    stopped_at = int(re.search(r"stopped at step (\d+), state saved", out)[1])
    names = [path.name for path in list_checkpoints(tmp_path / "log")]
    assert names == ["checkpoint_00004", f"checkpoint_{stopped_at:05d}"]
    assert out.index("step 4: saved") < out.index(f"step {stopped_at}: saved") < out.index("stopped at")
    call("train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.slow
def test_killed_while_a_save_is_in_flight(flags, tmp_path, undisturbed):
    process = in_flight(flags, tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert not list_checkpoints(tmp_path / "log")
    call("train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", undisturbed)
    assert not list((tmp_path / "log").glob("*.tmp"))


@pytest.mark.slow
def test_a_second_ctrl_c_while_a_save_is_in_flight(flags, tmp_path):
    process = in_flight(flags, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)  # the loop has ended: the second save waits for the first
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - sent < 1
    assert not list_checkpoints(tmp_path / "log")


@pytest.mark.slow
def test_an_error_lets_the_save_in_flight_finish(flags, tmp_path):
    steps = tmp_path / "steps"
    done = faulty(f"nan_gradient=5 slow_flush=0.2 step_file={steps}", *flags, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 5: the gradient norm is nan")
    assert done.stderr.count("\n") == 1
    assert "step 4: saved" in done.stdout
    assert "resuming at step 4" in call("train_gpt2.py", *flags, "--resume").stdout


@pytest.mark.slow
def test_two_processes_save_while_training_goes_on(flags, tmp_path, undisturbed):
    """The second one waits at the end until the first one has saved."""
    done = faulty(
        "slow_flush=0.2", *flags, "--micro_batch_size=2", launch=lambda *a, **k: torchrun(2, *a, **k)
    )
    assert done.stdout.count(": saved") == 5
    assert done.stdout.index("step 20: saved") < done.stdout.index("done: 20 steps")
    compare_losses(tmp_path / "log", undisturbed)
    folder = run_folder(tmp_path / "log")
    assert (folder.find_checkpoint(), folder.trainer["step"]) == ([], 20)


# ------------------------------------------------------------------ disks


@pytest.mark.slow
def test_a_full_disk_loses_nothing(flags, tmp_path, undisturbed):
    """Files may not grow to a checkpoint's size: saves fail, training goes on, and the next run resumes."""
    size = (undisturbed / "checkpoint_00020/trainer.pt").stat().st_size
    back_to_step_8(undisturbed, tmp_path / "log")
    before = {file: sha256(file) for file in list_checkpoints(tmp_path / "log")[-1].iterdir()}
    full = faulty(f"disk={size // 2}", *flags, "--resume", check=False)
    assert full.returncode == 1
    assert full.stdout.count("NOT SAVED") >= 2
    assert "could not be saved (File too large); allow larger files" in full.stderr
    assert "then run it again with --resume" in full.stderr
    assert full.stderr.count("\n") == 1
    assert {file: sha256(file) for file in before} == before
    assert not list((tmp_path / "log").glob("*.tmp"))
    call("train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", undisturbed)


def test_free_space_is_checked_before_a_save(flags, tmp_path, monkeypatch):
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    done = call("train_gpt2.py", *flags, check=False)
    assert done.returncode == 1
    assert done.stdout.count("NOT SAVED: 0 MB are free, 10 MB are needed") == 5
    assert "step 20, could not be saved (0 MB are free, 10 MB are needed); free some disk" in done.stderr
    assert not list((tmp_path / "log").glob("checkpoint_*"))


def test_a_log_line_that_did_not_fit_is_written_later(tmp_path, monkeypatch):
    folder = run_folder(tmp_path)
    folder.append(0, {"train": "1.0"})
    script = (
        "import resource, sys; from pathlib import Path; from conftest import run_folder\n"
        "folder = run_folder(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "folder.append(1, {'train': '2.0'}); folder.append(2, {'train': '3.0'})\n"
        "assert Path(sys.argv[1], 'log.txt').read_text() == '0 train 1.0\\n'\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "folder.append(3, {'train': '4.0'})\n"
    )
    run("-c", script, tmp_path, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert (tmp_path / "log.txt").read_text() == "0 train 1.0\n1 train 2.0\n2 train 3.0\n3 train 4.0\n"


CHECKPOINT_FILES = ["SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "trainer.pt"]


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_used(file, flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    newest = tmp_path / "log/checkpoint_00020" / file
    data = bytearray(newest.read_bytes())
    at = (
        data.index(b"  model.safetensors") - 9 if file == "SHA256SUMS" else len(data) // 3
    )  # the card may change
    data[at] ^= 1
    newest.write_bytes(data)
    done = call("train_gpt2.py", *flags, "--resume")
    assert "DAMAGED" in done.stdout
    assert "checkpoint_00020" in done.stdout.split("DAMAGED")[1].splitlines()[0]
    assert "resuming at step 16" in done.stdout
    assert (tmp_path / "log/log.txt").read_text() == (undisturbed / "log.txt").read_text()


def test_half_a_checkpoint_and_a_pickle_bomb_are_passed_over(flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    (tmp_path / "log/checkpoint_00020/trainer.pt").unlink()
    bomb = tmp_path / "log/checkpoint_00016"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Bomb(), bomb / "trainer.pt")
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in bomb.iterdir() if path.name != "SHA256SUMS")
    (bomb / "SHA256SUMS").write_text(sums)  # whoever plants a bomb can compute its sum
    done = call("train_gpt2.py", *flags, "--resume")
    assert done.stdout.count("DAMAGED") == 2
    assert (tmp_path / "log/checkpoint_00016.damaged").exists()
    assert "resuming at step 8" in done.stdout  # the one that --keep_every has kept
    assert not (tmp_path / "executed").exists()
    assert (tmp_path / "log/log.txt").read_text() == (undisturbed / "log.txt").read_text()


@pytest.mark.parametrize("place", ["sha256", "torch.load"])
@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EACCES, errno.EIO)),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    ],
    ids=str,
)
def test_the_systems_errors_set_no_checkpoint_aside(error, place, undisturbed, tmp_path, monkeypatch):
    log = tmp_path / "log"
    shutil.copytree(undisturbed, log)
    before = sorted(log.rglob("*"))
    folder = run_folder(log)
    with monkeypatch.context() as patch:
        target = (torch, "load") if place == "torch.load" else (folder_module, "sha256")
        patch.setattr(*target, Mock(side_effect=error))
        with pytest.raises(type(error), match=re.escape(str(error))):
            folder.find_checkpoint()
    assert sorted(log.rglob("*")) == before
    assert folder.find_checkpoint() == []


def test_only_damaged_checkpoints_are_not_a_reason_to_start_over(flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    for checkpoint in list_checkpoints(tmp_path / "log"):
        (checkpoint / "config.json").unlink()
    done = call("train_gpt2.py", *flags, "--resume", check=False)
    assert done.returncode == 2
    assert "has no sound checkpoint, only damaged ones (checkpoint_00020, checkpoint_00016" in done.stderr
    assert (tmp_path / "log/log.txt").read_text() == (undisturbed / "log.txt").read_text()
    assert "; delete the folder to start over, or choose another --log_dir" in done.stderr


def test_somebodys_line_stays_whatever_is_in_it(tmp_path):
    """A carriage return, as a bar of progress has it, ends no line."""
    (tmp_path / "log.txt").write_bytes(b"0 train 5\na bar\rat work\n1 train 4\n")
    run_folder(tmp_path).cut_log(1)
    assert (tmp_path / "log.txt").read_bytes() == b"0 train 5\na bar\rat work\n"


def test_what_a_power_cut_leaves_in_the_log_is_cut_out(flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/checkpoint_00020")
    with open(tmp_path / "log/log.txt", "ab") as file:
        file.write(b"\n20 tr\xff" + b"\0" * 100 + b"\n21 val")
    call("train_gpt2.py", *flags, "--resume")
    assert (tmp_path / "log/log.txt").read_bytes() == (undisturbed / "log.txt").read_bytes()


def test_other_lines_of_the_log_survive(tmp_path):
    """Values of any name for the steps that are done; and what is no value at all, whoever wrote it."""
    kept = [b"0 train 9.1\n", b"a note\n", b"0 my/value -1e-05\n", b"caf\xe9 99\n", b"1 ema nan\n"]
    cut = [b"2 ema 0.5\n", b"2 train 8.0\n", b"\0\0\0\n", b"3 tra"]
    lines = [*kept[:3], *cut[:1], *kept[3:], *cut[1:]]
    (tmp_path / "log.txt").write_bytes(b"".join(lines))
    run_folder(tmp_path).cut_log(2)
    assert (tmp_path / "log.txt").read_bytes() == b"".join(kept)


def test_a_run_without_a_scaler_resumes_with_one(tmp_path):
    """Begun in float32, resumed on a card that needs float16: there is no scaler state to load."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    folder = run_folder(tmp_path)
    before = torch.get_rng_state()
    folder.first_step = 3
    folder.trainer = {"optimizer": optimizer.state_dict(), "scaler": {}, "rng": before}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    torch.rand(3)
    folder.restore(optimizer, scaler)
    assert torch.equal(torch.get_rng_state(), before)
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_of_another_device_has_this_ones_optimizer(name, small_run):
    """Saved where optimizers have no fused version, as on a Mac, resumed where they have."""
    config = TrainConfig(optimizer=name)
    saved = configure_optimizer(small_run.model, config)
    small_run.optimizer = saved
    small_run.train()
    state = saved.state_dict()
    for group in state["param_groups"]:
        group["fused"] = False
    small_run.folder.trainer = {"optimizer": state, "scaler": {}, "rng": torch.get_rng_state()}
    small_run.folder.first_step = 1
    small_run.optimizer = resumed = configure_optimizer(small_run.model, config)
    small_run.folder.restore(resumed, torch.amp.GradScaler("cpu", enabled=False))
    resumed.found_inf = torch.zeros(())  # as the loop does for a fused optimizer
    small_run.train()
    assert all(group["fused"] for group in resumed.param_groups)
    assert resumed.state_dict()["state"][0]["step"] == 2


def test_the_last_two_and_the_kept_ones_are_there(undisturbed):
    assert [path.name for path in list_checkpoints(undisturbed)] == [
        "checkpoint_00008",
        "checkpoint_00016",
        "checkpoint_00020",
    ]


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    for name in ("checkpoint_99999", "checkpoint_100000", "checkpoint_00005", "checkpoint_00007.tmp"):
        (tmp_path / name).mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint_00005", "checkpoint_99999", "checkpoint_100000"]


@pytest.mark.slow
def test_slow_machines_save_by_the_clock(flags, tmp_path, undisturbed, monkeypatch):
    """15 minutes between checkpoints at most; here no time at all, at every step."""
    monkeypatch.setattr(folder_module, "SAVE_AT_LEAST_EVERY", 0.0)
    call("train_gpt2.py", *flags, "--checkpoint_every=1000", "--keep_every=0")
    names = [path.name for path in list_checkpoints(tmp_path / "log")]
    assert names == ["checkpoint_00019", "checkpoint_00020"]
    assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_finished_run_says_so(processes, flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    if processes == 1:
        done = call("train_gpt2.py", *flags, "--resume")
    else:
        done = torchrun(2, ROOT / "train_gpt2.py", *flags, "--resume", "--micro_batch_size=4")
    assert "is finished: its model is" in done.stdout
    assert (tmp_path / "log/log.txt").read_text() == (undisturbed / "log.txt").read_text()


def test_a_finished_run_of_no_steps_says_so(flags, tmp_path):
    """As for the scores of a model, `--init_from MODEL --max_steps 0`."""
    flags = (*flags, "--max_steps=0", f"--log_dir={tmp_path}/log")
    assert "done: 0 steps" in call("train_gpt2.py", *flags).stdout
    before = (tmp_path / "log/log.txt").read_text()
    assert "is finished: its model is" in call("train_gpt2.py", *flags, "--resume").stdout
    assert (tmp_path / "log/log.txt").read_text() == before


# ------------------------------------------------------------------ another recipe, another layout


def test_another_recipe_is_refused_with_the_difference(flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/checkpoint_00020")
    before = {path: sha256(path) for path in (tmp_path / "log").rglob("*") if path.is_file()}
    other = make_shards(tmp_path / "other_data", [5000, 5000])
    (other / "shards.json").write_text(
        json.dumps(
            {
                "encoding": "bytes",
                "tokens": 10_000,
                "source": {},
                "settings": {},
                "shards": [
                    {"file": path.name, "tokens": 5000, "sha256": sha256(path)}
                    for path in sorted(other.glob("*.npy"))
                ],
            }
        )
    )
    gpt2_data = make_shards(tmp_path / "other_vocabulary", [5000, 5000])
    for change, message in (
        (("--max_lr=0.004", "--seed=7"), "max_lr was 0.003, is 0.004; seed was 1337, is 7"),
        (("--n_layer=3",), "n_layer was 2, is 3"),
        ((f"--data_dir={other}",), "data was "),
        ((f"--data_dir={other}",), "data is the fingerprint of the shards"),
        ((f"--data_dir={gpt2_data}",), "vocab_size was 257, is 50257"),
    ):
        done = call("train_gpt2.py", *flags, *change, "--resume", check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert {path: sha256(path) for path in before if path.name != ".lock"} == {
        path: digest for path, digest in before.items() if path.name != ".lock"
    }


def test_a_setting_that_may_change_by_now_is_not_compared(tmp_path):
    """An older version compared it."""
    folder = run_folder(tmp_path)
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    folder.trainer = {"step": 1000, "recipe": folder.recipe | {"dtype": "bfloat16"}}
    folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
    folder.trainer["recipe"] |= {"max_steps": 5}
    with pytest.raises(
        InputError, match=f"max_steps was 5, is 19073; a cosine's .* --init_from {tmp_path} --log"
    ):
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))


TRAPEZOID = {"schedule": "trapezoid", "max_steps": 100, "cooldown": 0.4, "warmup_steps": 10}
CONSTANT = "the learning rates of the 50 steps done would have been others; to train longer"


@pytest.mark.parametrize(
    ("then", "now", "refusal"),
    [
        ({}, {"max_steps": 1000}, None),  # falls at 600 instead of 60
        ({}, {"max_steps": 84}, None),  # falls at 50.4: the end begins now
        ({}, {"max_steps": 70, "cooldown": 2 / 7}, None),
        ({}, {"cooldown": 0.1}, None),
        ({}, {"max_steps": 80}, CONSTANT),  # would have fallen since 48
        ({}, {"cooldown": 0.52}, CONSTANT),
        ({"cooldown": 0.6}, {"cooldown": 0.4}, CONSTANT),  # has fallen since 40
        ({"max_steps": 50}, {"max_steps": 200}, CONSTANT),  # is at its end
        ({"grad_clip": 1.0}, {"max_steps": 1000, "grad_clip": 2.0}, "grad_clip was"),
        (
            {"schedule": "cosine"},
            {"schedule": "cosine", "max_steps": 101},
            "a cosine's rates depend on its end",
        ),
        ({"schedule": "cosine"}, {"schedule": "cosine", "cooldown": 0.1}, None),  # a cosine has none
    ],
)
def test_the_length_may_change_while_no_rate_does(then, now, refusal, tmp_path):
    """Compared step by step, over the 50 steps that are done."""
    then, now = TRAPEZOID | then, TRAPEZOID | then | now
    folder = run_folder(tmp_path, **now)
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    before = replace(folder.config, **then)
    folder.trainer = {"step": 50, "recipe": folder.recipe | before.recipe_fields()}
    same = [get_lr(step, before) for step in range(50)] == [get_lr(step, folder.config) for step in range(50)]
    if refusal:
        assert not same or now["max_steps"] == 1000  # where something else differs too
        with pytest.raises(InputError, match=refusal):
            folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
        assert not folder.plans
    else:
        assert same
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
        plan = {"max_steps": folder.config.max_steps, "cooldown": folder.config.cooldown}
        assert folder.plans == [{"step": 50, **plan}]


@pytest.mark.parametrize("max_steps", [49, 0])
@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_fewer_steps_than_are_done_are_refused(schedule, max_steps, tmp_path):
    """Even in a warm-up, where no rate depends on the end."""
    folder = run_folder(tmp_path, schedule=schedule, warmup_steps=80, cooldown=0.1, max_steps=max_steps)
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    folder.trainer = {"step": 50, "recipe": folder.recipe | {"max_steps": 100}}
    with pytest.raises(InputError, match=rf"--max_steps {max_steps}: the run in .* has done 50; name"):
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
    assert not folder.plans


def test_a_plan_that_came_to_nothing_is_forgotten(tmp_path):
    """Made at step 50, and the run killed before its next save: neither a second try nor a return to the old
    plan leaves two."""
    for now, plans in ((200, [(20, 100), (50, 200)]), (100, [(20, 100)])):
        folder = run_folder(tmp_path / str(now), **TRAPEZOID | {"max_steps": now})
        folder.open(GPTConfig(), NO_SHARDS, get_lr)
        before = replace(folder.config, max_steps=100)
        folder.trainer = {"step": 50, "recipe": folder.recipe | before.recipe_fields()}
        folder.plans = [{"step": 20, "max_steps": 100}, {"step": 50, "max_steps": 200}]
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
        assert [(plan["step"], plan["max_steps"]) for plan in folder.plans] == plans


def test_the_commit_is_that_of_the_code_and_says_if_the_code_differs(tmp_path, monkeypatch):
    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(folder_module, "__file__", str(code))
    git("init")
    assert folder_module.versions()["commit"] is None  # a folder in another repository
    git("add", "code.py")
    git("commit", "-m", "a")
    commit = folder_module.versions()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    code.write_text("2")
    assert folder_module.versions()["commit"] == f"{commit}, with changes"


def test_a_difference_with_braces_is_said_as_it_is(tmp_path):
    folder = run_folder(tmp_path, init_from="{a}")
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    folder.trainer = {"step": 5, "recipe": folder.recipe | {"init_from": "{}"}}
    with pytest.raises(InputError, match=r"init_from was \{\}, is \{a\}"):
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_whose_length_changed_has_the_bits_of_one_planned_so(optimizer, text_shards, tmp_path):
    """Prolonged at step 8, and brought to its end at step 12, which a second resume does not disturb."""
    trapezoid = *FLAGS, f"--data_dir={text_shards}", f"--optimizer={optimizer}", "--schedule=trapezoid"
    short, long, end = (
        [f"--max_steps={n}", f"--cooldown={share}"] for n, share in ((20, 0.5), (40, 0.5), (20, 0.4))
    )
    log = f"--log_dir={tmp_path / 'a'}"
    call("train_gpt2.py", *trapezoid, *end, f"--log_dir={tmp_path / 'planned'}")
    call("train_gpt2.py", *trapezoid, *short, log)
    for step in (16, 20):
        shutil.rmtree(tmp_path / f"a/checkpoint_{step:05d}")
    steps = (tmp_path / "a/log.txt").read_text()
    assert "20 val" in steps
    done = faulty("nan=0:13", *trapezoid, *long, log, "--resume", check=False)
    assert "a new plan from step 8 on: max_steps was 20, is 40" in done.stdout
    assert done.returncode
    for name, more in (("12 on: max_steps was 40, is 20; cooldown was 0.5, is 0.4", ()), ("", ("--verify",))):
        done = call("train_gpt2.py", *trapezoid, *end, log, "--resume", *more)
        assert (f"a new plan from step {name}" in done.stdout) == bool(name)
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (tmp_path / folder / "checkpoint_00020" / name for folder in ("a", "planned"))
        assert ours.read_bytes() == theirs.read_bytes()
    lines = (tmp_path / "a/log.txt").read_text().splitlines()
    plans = [line for line in lines if line.split()[1] in ("max_steps", "cooldown")]
    assert plans == ["8 max_steps 40", "8 cooldown 0.5", "12 max_steps 20", "12 cooldown 0.4"]
    planned = (tmp_path / "planned/log.txt").read_text().splitlines()
    assert [line for line in lines if line not in plans] == planned
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert [plan["step"] for plan in run["plans"]] == [8, 12]
    assert run["train_config"]["max_steps"] == 20


def test_losses_on_other_tokens_are_not_compared(flags, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/checkpoint_00020")
    log = tmp_path / "log/log.txt"
    log.write_text(re.sub(r"(?m)^0 val .*$", "0 val 0.1", log.read_text()))
    done = call("train_gpt2.py", *flags, "--val_tokens=256", "--resume")
    assert "on 256 tokens" in done.stdout
    run = json.loads((tmp_path / "log/run.json").read_text())
    assert run["val_since"] == 16
    assert run["result"]["best_validation_loss"] == dict(read_log(log)["val"])[20] > 0.1


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_of_the_first_order_of_tokens_is_not_resumed(shuffle, tmp_path):
    """It visited the shards one after another, and its recipe does not mention the order. The tutorial's
    order, without shuffling, is as it was."""
    folder = run_folder(tmp_path, shuffle=shuffle)
    folder.open(GPTConfig(), NO_SHARDS, get_lr)
    recipe = {name: value for name, value in folder.recipe.items() if name != "order_of_tokens"}
    folder.trainer = {"recipe": recipe}
    if shuffle:
        message = r"order_of_tokens was 1, is 2; .* resume with the version that began the run$"
        with pytest.raises(InputError, match=message):
            folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))
    else:
        folder.compare_recipes(folder.trainer["recipe"], folder.trainer.get("step", 0))


def back_to_step_8(undisturbed, folder):
    """A copy of the undisturbed run, as if it had been killed after its second checkpoint."""
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "checkpoint_00020")
    shutil.rmtree(folder / "checkpoint_00016")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_on_another_layout_the_tokens_are_the_same(processes, flags, tmp_path, undisturbed):
    """Begun with micro-batches of 8 rows, resumed with 4, or with 2 on two processes: the same windows in
    every step."""
    hashes = tmp_path / "hashes"
    back_to_step_8(undisturbed, tmp_path / "log")
    launch = run if processes == 1 else lambda *a, **k: torchrun(2, *a, **k)
    rows = f"--micro_batch_size={4 // processes}"
    faulty(f"tokens={hashes}_", *flags, rows, "--resume", launch=launch)

    def windows(*files):
        lines = [line for file in files for line in Path(file).read_text().splitlines()]
        return sorted(line for line in lines if int(line.split()[0]) >= 8)

    whole = windows(undisturbed.parent / "hashes0")
    assert len(whole) == 12 * 8
    assert windows(*(f"{hashes}_{rank}" for rank in range(processes))) == whole
    compare_losses(tmp_path / "log", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_muon_goes_on_with_another_number_of_processes(first, second, flags, tmp_path):
    """Its momentum reaches every process; the losses are those of a run on one layout."""
    flags = (*flags, "--optimizer=muon", "--max_steps=12", "--checkpoint_every=6", "--val_every=0")

    def train(processes, *more):
        launch = run if processes == 1 else lambda *a, **k: torchrun(2, *a, **k)
        launch("train_gpt2.py", *flags, *more)

    train(first)
    losses = read_log(tmp_path / "log/log.txt")["train"]
    shutil.rmtree(tmp_path / "log/checkpoint_00012")
    train(second, "--resume")
    resumed = read_log(tmp_path / "log/log.txt")["train"]
    assert [step for step, _ in resumed] == [step for step, _ in losses] == list(range(12))
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in losses], abs=1e-4)


# ------------------------------------------------------------------ bad numbers, bad data


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_before_the_update(flags, tmp_path):
    done = faulty(
        "nan=1:6", *flags, "--micro_batch_size=4", launch=lambda *a, **k: torchrun(2, *a, **k), check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: step 6: the loss of rank 1 is nan") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "log")] == ["checkpoint_00004"]
    assert read_log(tmp_path / "log/log.txt")["train"][-1][0] == 5
    call("train_gpt2.py", *flags, "--resume")


@pytest.mark.slow
def test_nan_in_the_gradient_alone(flags, tmp_path):
    done = faulty(f"nan_gradient=5 step_file={tmp_path / 'steps'}", *flags, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 5: the gradient norm is nan, the losses are finite")
    assert done.stderr.count("\n") == 1


def test_a_token_outside_the_vocabulary_stops_with_its_place(flags, text_shards, tmp_path):
    data = shutil.copytree(text_shards, tmp_path / "data")
    shard = data / "edufineweb_train_000001.npy"
    tokens = np.load(shard)
    tokens[11_111] = 65_535
    np.save(shard, tokens)
    done = call("train_gpt2.py", *flags, f"--data_dir={data}", "--verify", check=False)
    assert done.returncode == 2
    assert f"{shard}: its SHA-256 is not the one in shards.json" in done.stderr
    done = call(
        "train_gpt2.py", *flags, f"--data_dir={data}", "--max_steps=300", "--val_every=0", check=False
    )
    assert done.returncode == 2
    assert f"{shard}: token id 65535 at offset 11111, outside the vocabulary of 257" in done.stderr


def test_verify_accepts_sound_shards(flags):
    assert "done: 1 step;" in call("train_gpt2.py", *flags, "--verify", "--max_steps=1").stdout


def test_verify_needs_something_to_verify_by(tmp_path):
    make_shards(tmp_path, [5000, 5000])
    assert load_shards(tmp_path).count("train") == 5000
    with pytest.raises(
        InputError, match=f"--verify: {tmp_path} has no shards.json .*: python fineweb.py --check"
    ):
        load_shards(tmp_path, verify=True)


# ------------------------------------------------------------------ one run, one folder


@pytest.mark.slow
def test_two_runs_in_one_folder(flags, tmp_path):
    steps = tmp_path / "steps"
    first = start(f"slow=0.3 step_file={steps}", *flags)
    wait_for_step(steps, 1)
    second = run("train_gpt2.py", *flags, "--resume", check=False)
    assert second.returncode == 2
    assert f"is in use by process {first.pid} on" in second.stderr
    first.kill()  # its lock dies with it
    first.communicate()
    third = call("train_gpt2.py", *flags, "--max_steps=20", "--resume")
    assert "done: 20 steps" in third.stdout


def test_resume_starts_where_nothing_is(flags, tmp_path, undisturbed):
    call("train_gpt2.py", *flags, "--resume", "--max_steps=2")
    assert read_log(tmp_path / "log/log.txt")["train"] == read_log(undisturbed / "log.txt")["train"][:2]


@pytest.mark.slow
def test_a_clock_set_back_harms_nothing(flags, tmp_path, undisturbed, monkeypatch):
    started, real_time = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: 2 * started - real_time())
    done = call("train_gpt2.py", *flags)
    assert_same_end(tmp_path / "log", undisturbed)
    assert not re.search(r"dt: -|tok/sec: -|in -", done.stdout)
