"""One process or several: the same batch, the same gradients, the same losses; and how they meet."""

import contextlib
import errno
import re
import socket
from dataclasses import replace
from pathlib import Path

from conftest import ROOT, TINY, call, run, torchrun
from support.cli import InputError, RunFault
from support.machine.processes import World, faults_in_one_line, start_processes
from support.run.curves import read_log
from train_gpt2 import TrainConfig

import pytest
import torch
import torch.distributed as dist


def gradients(tmp_path, text_shards, name, launch, micro_batch_size):
    file = tmp_path / name
    launch(
        ROOT / "tests/faults.py",
        *TINY,
        "--max_steps=1",
        "--grad_clip=1e9",
        "--sample_every=0",
        f"--micro_batch_size={micro_batch_size}",
        f"--data_dir={text_shards}",
        f"--log_dir={tmp_path / name}_log",
        env={"FAULTS": f"gradients={file}", "PYTHONPATH": str(ROOT)},
    )
    return torch.load(f"{file}0"), file


def relative_difference(a, b):
    difference = sum((a[name] - b[name]).double().square().sum() for name in a).sqrt()
    return (difference / sum(t.double().square().sum() for t in a.values()).sqrt()).item()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 8])
def test_gradients_do_not_depend_on_the_layout(rows, tmp_path, text_shards):
    """8 rows a step: in 4 micro-steps (or at once), and in 2 micro-steps of 2 processes."""
    one_process, _ = gradients(tmp_path, text_shards, "one", run, rows)
    two_processes, file = gradients(tmp_path, text_shards, "two", lambda *a, **k: torchrun(2, *a, **k), 2)
    assert relative_difference(one_process, two_processes) < 1e-6
    other_rank = torch.load(f"{file}1")
    assert all(torch.equal(two_processes[name], other_rank[name]) for name in other_rank)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, text_shards):
    common = (*TINY, f"--data_dir={text_shards}", "--max_steps=12", "--val_every=5", "--sample_every=6")
    call("train_gpt2.py", *common, "--micro_batch_size=2", f"--log_dir={tmp_path / 'one'}")
    done = torchrun(2, "train_gpt2.py", *common, "--micro_batch_size=4", f"--log_dir={tmp_path / 'two'}")
    assert "256 tokens a step = 4 rows x 32 tokens x 2 processes x 1 micro-step" in done.stdout
    assert done.stdout.count("step 12: validation loss") == 1  # only one process speaks
    one, two = read_log(tmp_path / "one" / "log.txt"), read_log(tmp_path / "two" / "log.txt")
    assert [step for step, _ in one["val"]] == [0, 5, 10, 12]
    assert len(one["train"]) == 12
    for kind in ("train", "val"):
        for (step, a), (other_step, b) in zip(one[kind], two[kind], strict=True):
            assert step == other_step
            assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.slow
def test_bad_input_is_said_once_by_all_processes(tmp_path):
    done = torchrun(2, "train_gpt2.py", *TINY, f"--data_dir={tmp_path / 'nowhere'}", check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: the data folder") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_lr": 1e-3}, "the processes differ in max_lr: 0.0006, 0.001"),
        ({"val_every": 100}, "the processes differ in val_every: 250, 100"),
        ({"data_dir": (Path("here"),), "device": "cpu", "micro_batch_size": 4, "resume": True}, None),
    ],
)
def test_each_host_has_a_command_but_one_recipe(changes, message):
    class Two(World):
        def from_all(self, value):
            return [value, replace(TrainConfig(), **changes).common_fields()]

    world = Two(0, 2, torch.device("cpu"))
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        world.require_same(**TrainConfig().common_fields())


@pytest.mark.slow
def test_a_save_may_take_longer_than_the_timeout(tmp_path, text_shards):
    """The other process waits as long as the main one shows that it lives."""
    flags = (*TINY, "--max_steps=2", "--sample_every=0", "--timeout_minutes=0.25")
    env = {"FAULTS": "slow_flush=3", "PYTHONPATH": str(ROOT)}
    folders = (f"--data_dir={text_shards}", f"--log_dir={tmp_path}")
    done = torchrun(2, ROOT / "tests/faults.py", *flags, *folders, env=env)
    (seconds,) = re.findall(r"step 2: saved .* in ([\d.]+) s", done.stdout)
    assert float(seconds) > 15


LAYOUT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def layout(monkeypatch):
    """Sets the environment variables of a layout, and no other."""

    def set_variables(**variables):
        for name in LAYOUT:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
        ({"RANK": "first"}, "RANK is 'first', not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', not a number"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x', not a number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0, but WORLD_SIZE is 0"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but WORLD_SIZE is not set"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but WORLD_SIZE is not set"),
        ({**TWO, "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({**TWO, "LOCAL_RANK": None}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),  # all would take GPU 0
        ({**TWO, "MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({**TWO, "MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({**TWO, "MASTER_PORT": "auto"}, "MASTER_PORT is 'auto', not a port"),
        ({**TWO, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999', not a port"),
    ],
)
def test_variables_that_can_not_be_meant(variables, fault, layout):
    layout(**variables)
    with pytest.raises(InputError) as caught:
        start_processes("cpu", 0.01)
    message = str(caught.value)
    assert message.startswith(f"environment variables: {fault}; start several processes with torchrun")
    unset = message.rpartition("unset ")[2].split()
    layout(**{name: value for name, value in variables.items() if name not in unset})
    assert start_processes("cpu", 0.01).size == 1  # the advice works


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process(variables, layout):
    layout(**variables)
    assert start_processes("cpu", 1) == World()


def test_a_port_in_use_and_a_peer_that_never_comes(layout):
    """Neither is contact that was lost; the line names what to change."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = str(other.getsockname()[1])
        other.listen()
        layout(**TWO | {"MASTER_PORT": port})
        with pytest.raises(RunFault, match=rf"port {port} \(MASTER_PORT\) is in use .* set another one"):
            start_processes("cpu", 0.01)
    never = (
        rf"never connected: of 2 processes \(WORLD_SIZE\), not all came to 127\.0\.0\.1:{port} \(MASTER_ADDR"
    )
    for rank in ("0", "1"):
        layout(**TWO | {"MASTER_PORT": port, "RANK": rank})
        with pytest.raises(RunFault, match=never):
            start_processes("cpu", 0.01)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("CUDA driver error: operation not supported"), "the GPU or its driver failed"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel"), "the GPU or its"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "the GPU or its driver failed"),
        (RuntimeError("Found no NVIDIA driver on your system."), "the GPU or its driver failed"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out of memory"),
        (dist.DistBackendError("NCCL communicator was aborted"), "lost contact with another process"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"), "lost contact"),
    ],
)
def test_the_machines_faults_in_one_line(error, message):
    with pytest.raises(RunFault, match=f"^{message}") as caught, faults_in_one_line():
        raise error
    assert str(caught.value).count("\n") == 0
    vgpu = "PYTORCH_ALLOC_CONF=expandable_segments:False" in str(caught.value)
    assert vgpu == message.startswith("the GPU")
    assert "--resume" not in str(caught.value)
    with pytest.raises(RunFault, match="--resume"), faults_in_one_line(resumes=True):
        raise error


def test_a_mistake_in_the_code_keeps_its_traceback():
    for text in ("expected all tensors on cuda:0 and cpu", "shapes differ", "error in a matrix"):
        with pytest.raises(RuntimeError, match=text) as caught, faults_in_one_line():
            raise RuntimeError(text)
        assert not isinstance(caught.value, RunFault)


def test_an_error_of_the_main_process_is_told_to_all():
    def fail():
        raise OSError(errno.EMFILE, "Too many open files", "checkpoint")

    with pytest.raises(
        RunFault, match=r"^checkpoint: Too many open files; allow more open files \(ulimit -n\)$"
    ):
        World().from_main(fail)
    with pytest.raises(RunFault, match="Too many open files"):
        World().on_each_host(fail)


def test_one_process_of_each_host(monkeypatch):
    done = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        World().on_each_host(lambda rank=rank: done.append(rank))
    assert done == ["0"]
