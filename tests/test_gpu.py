"""What a GPU decides, on one that is not there (pretended_gpu.py): waits, copies, NCCL's rules, memory."""

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import benchmarks.gpu
import benchmarks.sampling
import benchmarks.training
import train_gpt2
from conftest import ROOT, call, run, torchrun
from hellaswag import Item, batches, fit, limits_for, render, score_batch
from pretended_gpu import GB, NONSENSE
from pretended_gpu import pretended_gpu as pretended
from support.cli import RunFault
from support.data.encodings import get_encoding
from support.machine import device as devices
from support.machine.measure import measure_machine
from support.machine.processes import STOP_SIGNALS, World
from support.model.muon import Muon, muon_groups
from support.model.sampling import stream
from support.run.curves import read_log
from support.run.folder import RunFolder
from support.run.report import Report
from train_gpt2 import GPT, GPTConfig, TrainConfig

import pytest
import torch
import torch.distributed as dist

SMALL = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32, encoding="bytes")
ITEMS = [Item(i, "a b c d " * (1 + i % 3), ("x y", "z w u", "q", "r s t"), i % 4) for i in range(8)]
A_PLAIN_STEP = ["event"]  # why the host waits


@pytest.fixture
def config(text_shards, tmp_path, monkeypatch):
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(vars(item)) + "\n" for item in ITEMS))
    monkeypatch.setattr(Report, "show", lambda *_: None)
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield TrainConfig(
        data_dir=(text_shards,), log_dir=tmp_path / "cpu", n_layer=2, n_head=2, n_embd=32, sequence_length=32,
        total_batch_size=128, max_steps=4, warmup_steps=2, max_lr=3e-3, val_every=2, val_tokens=1056,
        sample_every=0, hellaswag_every=4, hellaswag_data=items, checkpoint_every=2, device="cpu",
        dtype="float32", compile=False, micro_batch_size=2,
    )  # fmt: skip
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(config: TrainConfig) -> Any:
    """The log of a run in this process, which may be stopped."""
    try:
        with contextlib.suppress(SystemExit):
            train_gpt2.main(config)
    finally:
        gc.unfreeze()
        gc.collect()  # closes the lock of the run's folder
    return read_log(config.log_dir / "log.txt")


# -----------------------------------------------------------------------------
# the pretended GPU itself


def test_it_computes_as_the_cpu_does_and_says_cuda():
    x = torch.arange(6.0).view(2, 3)
    with pretended() as gpu:
        y = x.pin_memory().to("cuda", non_blocking=True)
        assert (y.device, y.is_cuda) == (torch.device("cuda", 0), True)
        assert gpu.waits == [], gpu.waits
        assert gpu.allocated == 24
        z = (
            torch.zeros(2, 3, device="cuda") + (y @ y.t()).sum() + torch.tensor(1.0)
        )  # a scalar of the host may
        assert gpu.waits == [], gpu.waits
        with pytest.raises(RuntimeError, match="same device"):
            torch.tensor(1.0).add_(y.sum())
        assert torch.equal(z.cpu(), torch.zeros(2, 3) + (x @ x.t()).sum() + 1)
        assert [wait.reason for wait in gpu.waits] == ["a copy to the host"]
        del y, z
        assert gpu.allocated == 0


@pytest.mark.parametrize(
    ("reason", "use"),
    [
        ("aten._local_scalar_dense.default", lambda x: x.sum().item()),
        ("aten._local_scalar_dense.default", lambda x: bool(x.sum() > 0)),
        ("aten.nonzero.default", lambda x: x.nonzero()),
        ("aten.equal.default", lambda x: torch.equal(x, x)),
        ("aten.multinomial.default", lambda x: torch.multinomial(x, 1)),
        ("tolist", lambda x: x.tolist()),
        ("a mask as index", lambda x: x[x > 0]),
        ("an index on the host", lambda x: x[torch.tensor([0, 1])]),
        ("a pageable copy to the GPU", lambda x: torch.ones(3).to("cuda", non_blocking=True)),
        ("a pageable copy to the GPU", lambda x: torch.tensor([1.0, 2.0], device="cuda")),
        ("a copy to the host", lambda x: x.to("cpu")),
        ("copy_ between host and GPU", lambda x: torch.ones(3).copy_(x)),
        ("torch.cuda.synchronize", lambda x: torch.cuda.synchronize()),
    ],
)
def test_it_notes_what_the_host_waits_for(reason, use):
    with pretended() as gpu:
        x = torch.ones(3, device="cuda")
        assert gpu.waits == [], gpu.waits
        use(x)
        assert reason in [wait.reason for wait in gpu.waits]
        assert gpu.waits[0].where.startswith("test_gpu.py:")


@pytest.mark.parametrize(
    ("words", "use"),
    [
        ("same device", lambda x: x + torch.ones(3)),
        ("same device", lambda x: torch.cat((x, torch.ones(3)))),
        ("same device", lambda x: x + torch.ones(3, device="cuda:1")),
        (
            "on cpu or on the same device",
            lambda x: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")],
        ),
        ("generator", lambda x: x.exponential_(generator=torch.Generator())),
        ("generator", lambda x: torch.ones(3).exponential_(generator=torch.Generator("cuda"))),
        ("out of memory", lambda x: torch.empty(2 * GB, device="cuda")),
        ("device ordinal", lambda x: x.to("cuda:7")),
        ("numpy", lambda x: x.numpy()),
    ],
)
def test_it_refuses_what_cuda_refuses(words, use):
    with pretended(count=2, free=7 * GB), pytest.raises((RuntimeError, TypeError), match=words):
        use(torch.ones(3, device="cuda"))


def test_a_copy_is_nonsense_until_its_event():
    with pretended() as gpu:
        read = devices.copy_to_host(torch.tensor([1.0, 2.0], device="cuda"))
        (copy, _), *_ = gpu.on_the_way
        assert copy.tolist() == [NONSENSE, NONSENSE]
        assert read() == [1.0, 2.0]


def test_nccl_takes_neither_the_hosts_tensors_nor_strides():
    with pretended(), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        dist.init_process_group(
            "nccl", device_id=torch.device("cuda", 0), init_method=address, rank=0, world_size=1
        )
        try:
            dist.all_reduce(torch.ones(2, 3, device="cuda"))
            with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
                dist.all_reduce(torch.ones(2, 3))
            with pytest.raises(ValueError, match="contiguous"):
                dist.all_reduce(torch.ones(2, 3, device="cuda").t())
        finally:
            dist.destroy_process_group()


# -----------------------------------------------------------------------------
# one GPU


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"dtype": "float16", "recompute": True},
        {"dtype": "bfloat16", "optimizer": "muon", "compile": True},
    ],
    ids=str,
)
def test_a_run_has_the_losses_of_the_cpu_and_waits_once_a_step(changes, config, tmp_path, monkeypatch):
    """And the same losses again when it is resumed. The memory is free at the end."""
    config, reasons = replace(config, **changes), []
    expected = train(config)
    step = Report.step
    on_gpu = replace(config, device="cuda", log_dir=tmp_path / "gpu")
    with pretended(compiles=True) as gpu:

        def watched(*arguments):
            reasons.append(list(gpu.waits))
            step(*arguments)
            gpu.waits.clear()

        monkeypatch.setattr(Report, "step", watched)
        assert train(on_gpu) == expected
        assert gpu.fractions == pytest.approx([0.93 * 79 / 80, 1.0], rel=1e-3)  # on trial, and then
        for plain in (reasons[1], reasons[3]):  # the other steps follow an evaluation
            assert [wait.reason for wait in plain] == A_PLAIN_STEP, plain
        gc.collect()
        assert gpu.allocated == 0
        shutil.rmtree(tmp_path / "gpu/checkpoint_00004")
        assert train(replace(on_gpu, resume=True)) == expected


def test_the_loss_in_chunks_never_waits():
    torch.manual_seed(0)
    model, (x, y) = GPT(SMALL).pad_vocabulary(), torch.randint(0, 257, (2, 4, 16))
    model.loss_chunks = 4
    model(x, y).backward()
    expected = model.lm_head.weight.grad
    model.zero_grad()
    with pretended() as gpu:
        model, (x, y) = model.to("cuda"), devices.to_device(torch.device("cuda"), x, y)
        gpu.waits.clear()
        model(x, y).backward()
        assert gpu.waits == [], gpu.waits
        torch.testing.assert_close(model.lm_head.weight.grad.cpu(), expected)


def test_memory_decides_the_micro_batch(config, tmp_path, monkeypatch):
    """It is the largest one whose trial fits into the free memory, less a reserve."""
    said: list[str] = []
    monkeypatch.setattr(Report, "show", lambda _, text: said.append(text))
    flags = {"device": "cuda", "micro_batch_size": None, "max_steps": 1, "val_every": 0, "hellaswag_every": 0}
    peaks = {}
    for rows in (2, 4):
        with pretended() as gpu:
            train(replace(config, **flags | {"micro_batch_size": rows}, log_dir=tmp_path / f"{rows}"))
            peaks[rows] = gpu.peak
    assert 1.2 * peaks[2] < peaks[4]
    for free, rows in ((1.1 * peaks[4], 4), (1.1 * peaks[2], 2)):
        said.clear()
        with pretended(free=free / 0.93):
            train(replace(config, **flags, log_dir=tmp_path / f"{free}"))
        assert f"micro-batches of {rows} rows" in "".join(said)
        assert ("a micro-batch of 4 rows: OutOfMemoryError: CUDA out of memory" in "".join(said)) == (
            rows == 2
        )


def test_memory_that_runs_out_later_ends_in_one_line(config, tmp_path, monkeypatch):
    with pretended() as gpu:
        monkeypatch.setattr(Report, "step", lambda *_: setattr(gpu, "free", 0))
        with pytest.raises(RunFault, match=r"out of memory .*--resume looks for a micro-batch that fits now"):
            train(replace(config, device="cuda", log_dir=tmp_path / "gpu"))


def test_a_step_that_is_not_finite_is_left_out(config, tmp_path, monkeypatch):
    """As on the CPU: in float16, the gradients of the second step overflow, and the scale is halved."""
    forward, steps = GPT.forward, []

    def overflows(self, idx, targets=None, caches=None):
        loss = forward(self, idx, targets, caches)
        steps.append(self.training)
        return loss + 1e6 * (loss - loss.detach()) if self.training and sum(steps) == 4 else loss

    def started(self, *arguments, start=Report.start, **options):
        start(self, *arguments, **options)
        steps.clear()  # trials don't count

    monkeypatch.setattr(GPT, "forward", overflows)
    monkeypatch.setattr(Report, "start", started)
    logs = []
    for device in ("cpu", "cuda"):
        flags = {"device": device, "dtype": "float16", "hellaswag_every": 0, "val_every": 0}
        with pretended() as gpu:
            train(replace(config, **flags, log_dir=tmp_path / device))
            assert gpu.waits or device == "cpu"
        logs.append((tmp_path / device / "log.txt").read_text())
    assert "1 norm nan" in logs[0]
    assert logs[0] == logs[1]


def test_a_stop_is_saved_and_resumed(config, tmp_path, monkeypatch):
    expected, step = train(config), Report.step

    def stopped(self, number, *others):
        step(self, number, *others)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    on_gpu = replace(config, device="cuda", log_dir=tmp_path / "gpu")
    with pretended():
        with monkeypatch.context() as patch:
            patch.setattr(Report, "step", stopped)
            train(on_gpu)
        assert (tmp_path / "gpu/checkpoint_00003").exists()
        assert train(replace(on_gpu, resume=True)) == expected


def test_muon_goes_on_where_no_optimizer_is_fused():
    """As on a Mac, where PyTorch loads `step` to the CPU."""
    with pretended():
        torch.manual_seed(0)
        model = GPT(SMALL).to("cuda")

        def step(optimizer):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        def not_fused():
            return Muon(muon_groups(model, 0.1, 2.0), lr=0.01, fused=False, foreach=False)

        step(saved := not_fused())
        resumed = not_fused()
        resumed.load_state_dict(devices.to_host(saved.state_dict()))
        step(resumed)
        matrix = model.transformer.h[0].mlp.c_fc.weight
        assert resumed.state[matrix]["step"].item() == 2


# -----------------------------------------------------------------------------
# sampling and scoring


@pytest.mark.parametrize("compile", [False, True])
def test_sampling_never_waits(compile):
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(0, 257, (3, 9))
    expected = torch.cat((idx, *stream(model, idx, 80, temperature=0)), dim=1)
    with pretended(compiles=True) as gpu:
        model, idx = model.to("cuda"), idx.to("cuda")
        gpu.waits.clear()
        found = torch.cat((idx, *stream(model, idx, 80, temperature=0, compile=compile)), dim=1)
        list(stream(model, idx, 40, seed=1, top_p=0.9, compile=compile))
        assert gpu.waits == [], gpu.waits
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("protocol", ["tutorial", "harness"])
def test_scoring_never_waits(protocol):
    items = [replace(item, harness_ctx=f"Sport: {item.ctx}") for item in ITEMS]
    torch.manual_seed(0)
    model, encoding = GPT(SMALL), get_encoding("bytes")
    rendered = [fit(render(item, encoding, protocol), 64, protocol) for item in items]
    expected = [
        score_batch(model, batch, limits_for(model)) for batch in batches(rendered, limits_for(model))
    ]
    with pretended() as gpu:
        model = model.to("cuda")
        gpu.waits.clear()
        limits = limits_for(model)
        found = [score_batch(model, batch, limits) for batch in batches(rendered, limits)]
        assert gpu.waits == [], gpu.waits
        torch.testing.assert_close(torch.cat(found).cpu(), torch.cat(expected))


def test_the_scripts_print_what_they_print_on_a_cpu(config, tmp_path):
    train(config)
    commands = [
        ("sample.py", "--model", config.log_dir, "--prompt", "1 green", "--max_new_tokens", 20, "--seed", 1),
        ("hellaswag.py", "--model", config.log_dir, "--data", config.hellaswag_data, "--dtype", "float32"),
    ]
    for command in commands:
        expected = call(*command, "--device", "cpu").stdout
        with pretended():
            assert call(*command, "--device", "cuda").stdout == expected
    with pretended():
        call("plot.py", "positions", config.log_dir, "--out", tmp_path / "positions.png")


def test_the_benchmarks_measure():
    """Parts of `python -m benchmarks.gpu`, in miniature."""
    sizes = {"device": "cuda", "n_layer": 2, "n_embd": 64, "n": 1}
    training = benchmarks.training.Config(**sizes, batch_size=1, micro_steps=1, sequence_length=16)
    sampling = benchmarks.sampling.Config(**sizes, new_tokens=3, batch_sizes=(1,))
    with pretended(compiles=True):
        facts = benchmarks.gpu.gather_facts("cuda", 64)
        assert (facts["memory"], facts["dtype"]) == (80 * GB, "bfloat16")
        for way in ("matmul", "ours compiled"):
            assert benchmarks.training.measure(way, training, seconds=1.0)["step_seconds"]
        assert benchmarks.sampling.measure(sampling)


GPUS = {"PYTHONPATH": f"{ROOT / 'tests/gpus'}{os.pathsep}{ROOT}"}


@pytest.mark.slow
def test_the_benchmarks_run_as_one_command(config, tmp_path):
    """Parts b, c and d: nothing fails."""
    done = run("-m", "benchmarks.gpu", "--tiny", "--device=cuda", "--parts", "b", "c", "d",
               f"--data_dir={config.data_dir[0]}", f"--hellaswag_data={config.hellaswag_data}",
               f"--out={tmp_path / 'out'}", env={**GPUS, "PRETENDED_GPUS": "1"}, timeout=600)  # fmt: skip
    assert "failed" not in done.stdout, done.stdout
    (file,) = (tmp_path / "out").glob("*_tiny.json")
    assert json.loads(file.read_text())["parts"].keys() == {"b", "c", "d"}


def test_what_a_check_measures(tmp_path):
    with pretended(count=2, free=60 * GB):
        world = World(device=torch.device("cuda", 0))
        found = measure_machine(world, tmp_path / "log", tmp_path / "log/trial")
    (process,) = found["processes"]
    assert (process["device"], process["memory"]) == ("NVIDIA H100 80GB HBM3", 80 * GB)
    assert (process["used"], process["idle"]) == (20 * GB, 1)
    assert found["links"] is None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_check(processes, config, tmp_path):
    names = ("n_layer", "n_head", "n_embd", "sequence_length", "total_batch_size", "device")
    small = replace(config, device="cuda")
    flags = [f"--{name}={getattr(small, name)}" for name in names]
    flags += [f"--data_dir={config.data_dir[0]}", "--hellaswag_every=0", "--sample_every=0"]
    command = ("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'log'}", "--check")
    launch = run if processes == 1 else functools.partial(torchrun, processes)
    done = launch(*command, env={**GPUS, "PRETENDED_GPUS": str(processes)}, timeout=600)
    assert f"NVIDIA H100 80GB HBM3; {processes} process" in done.stdout
    assert "read back, resumed: the same digits" in done.stdout
    assert ("GB/s (bus bandwidth" in done.stdout) == (processes == 2)
    assert not (tmp_path / "log").exists()


# -----------------------------------------------------------------------------
# two GPUs


def work(rank: int, config: TrainConfig, port: int, count: int) -> None:
    """One of two processes, each with a GPU if `count` is not 0."""
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(config.log_dir.with_name(f"said{rank}"), "w")  # noqa: SIM115
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    try:
        if not count:
            train_gpt2.main(config)
        with pretended(count=count, compiles=True) as gpu:
            step = Report.step

            def watched(*arguments):
                print("waits of a step:", *(f"{wait.reason} ({wait.where})," for wait in gpu.waits))
                step(*arguments)
                gpu.waits.clear()

            Report.step = watched
            train_gpt2.main(config)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def two_processes(config: TrainConfig, count: int = 2) -> Any:
    """The log of a run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(rank, config, port, count)) for rank in range(2)]
    for process in both:
        process.start()
    deadline = time.monotonic() + 200
    while any(process.is_alive() for process in both) and time.monotonic() < deadline:
        both[0].join(0.1)
        if any(process.exitcode for process in both):  # the other one may wait for it
            break
    for process in both:
        process.join(1)
        process.kill()
        process.join()
    said = [config.log_dir.with_name(f"said{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in both] == [0, 0], "\n".join(said)
    return read_log(config.log_dir / "log.txt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"dtype": "bfloat16", "optimizer": "muon"},
        pytest.param({"shard": True}, marks=pytest.mark.slow),
        pytest.param({"shard": True, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"shard": True, "optimizer": "muon"},
    ],
    ids=str,
)
def test_two_gpus_exchange_what_nccl_can(changes, config, tmp_path):
    """Their losses are those of two processes on a CPU, resumed as well, and each waits once a step. With
    --shard in bfloat16, a GPU gets its weights in bfloat16, a CPU in float32."""
    config = replace(config, **changes)
    expected = two_processes(config, count=0)
    on_gpus = replace(config, device="cuda", log_dir=tmp_path / "gpu")
    both = two_processes(on_gpus)
    if changes == {"shard": True, "dtype": "bfloat16"}:
        assert [v for _, v in both["train"]] == pytest.approx([v for _, v in expected["train"]], abs=2e-3)
    else:
        assert both == expected
    for rank in range(2):
        waits = [line for line in (tmp_path / f"said{rank}").read_text().splitlines() if "waits of" in line]
        assert waits[1].count(",") == waits[3].count(",") == 1, waits
    shutil.rmtree(tmp_path / "gpu/checkpoint_00004")
    assert two_processes(replace(on_gpus, resume=True)) == both
