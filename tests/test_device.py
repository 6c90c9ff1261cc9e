"""What the device can do: precision, attention, compilation, memory."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import train_gpt2
from conftest import CPU, TINY, call, make_shards, run
from support.cli import InputError, parse
from support.machine import device
from support.machine.device import (
    choose_dtype,
    free_host_memory,
    is_out_of_memory,
    keep_freed_memory,
    memory_limit,
    peak_flops,
    prefer_fast_attention,
    varying_shapes,
)
from support.machine.micro_batch import check_memory
from support.run.curves import read_run
from train_gpt2 import GPT, GPTConfig, TrainConfig

import pytest
import torch


def test_a_full_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    windows = "DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes"
    assert is_out_of_memory(RuntimeError(windows))
    assert is_out_of_memory(RuntimeError("Invalid buffer size: 9.00 GB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_limit_of_memory(monkeypatch):
    assert memory_limit(torch.device("cpu"), 1.5) == 1.5 * 2**30
    if limit := memory_limit(torch.device("cpu"), None):
        assert 2**28 < limit < 2**50
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of torchrun: its processes share the computer's memory
        assert memory_limit(torch.device("cpu"), None) == pytest.approx(limit / 4)
    keep_freed_memory()


def test_a_trial_leaves_some_memory_of_a_gpu_free(monkeypatch):
    """Of 80 GB, 60 are free and 10 are this process's: the cap is 93% of 70, or of what is given."""
    caps, cuda = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * 2**30)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share))
    for limit_gb, expected in ((None, [0.93 * 70 / 80, 1.0]), (40.0, [0.93 * 40 / 80, 40 / 80])):
        with device.head_room(cuda, limit_gb):
            assert len(caps) == 1
        assert caps == pytest.approx(expected)
        caps.clear()
    with device.head_room(CPU.device, 40.0):
        assert not caps


def test_free_host_memory_counts_every_limit(tmp_path):
    """Bytes, from meminfo in kB; the page cache of a control group can be taken too."""
    assert free_host_memory(tmp_path) == 0  # no Linux
    job = tmp_path / "sys/fs/cgroup/slurm/job"
    for folder, texts in {
        tmp_path / "proc": {"meminfo": "MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    5000 kB\n"},
        tmp_path / "proc/self": {"cgroup": "1:cpu:/\n0::/slurm/job/step\n"},
        job / "step": {"memory.max": "max\n", "memory.current": "7\n", "memory.stat": "anon 1\nfile 2\n"},
    }.items():
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    assert free_host_memory(tmp_path) == 5000 * 1024
    stat = "anon 600\nfile 95\nshmem 5\ninactive_file 50\nactive_file 40"  # tmpfs is in "file"
    for name, text in {"max": "1000", "current": "700", "stat": stat}.items():
        (job / f"memory.{name}").write_text(f"{text}\n")
    assert free_host_memory(tmp_path) == 390


V1 = 9223372036854771712  # version 1 has no word for "no limit"


@pytest.mark.parametrize(
    ("groups", "folder"),
    [
        ("12:cpuset:/\n4:memory:/docker/ab\n0::/\n", "memory/docker/ab"),
        ("4:memory:/docker/ab\n", "memory"),  # inside of a container, which sees its own group as the root
        ("3:cpu,memory:/slurm/job\n", "memory/slurm"),  # a limit of the group above
    ],
)
def test_control_groups_of_version_1(groups, folder, tmp_path, monkeypatch):
    """Free is the limit less what is in use, without the page cache; the limit bounds the total too."""
    files = {
        "proc/meminfo": "MemAvailable:    5000 kB\n",
        "proc/self/cgroup": groups,
        f"sys/fs/cgroup/{folder}/memory.limit_in_bytes": "1000\n",
        f"sys/fs/cgroup/{folder}/memory.usage_in_bytes": "700\n",
        f"sys/fs/cgroup/{folder}/memory.stat": "active_file 9\ntotal_inactive_file 50\ntotal_active_file 40",
    }
    if folder != "memory":
        files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = f"{V1}\n"
        files["sys/fs/cgroup/memory/memory.usage_in_bytes"] = "10000000\n"
        files["sys/fs/cgroup/memory/memory.stat"] = "total_inactive_file 1\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_memory(tmp_path) == 390
    limits = device.group_limits(tmp_path)
    assert sorted(limits) == sorted({(1000, 610), *([(V1, 9999999)] if folder != "memory" else [])})
    monkeypatch.setattr(device, "group_limits", lambda: limits)
    assert memory_limit(torch.device("cpu"), None) == 900


def test_no_control_groups_no_limit(tmp_path):
    assert device.group_limits(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_free_host_memory_of_this_machine():
    assert 0 < free_host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_systems_that_lack_what_linux_has(monkeypatch):
    """Windows has no sysconf, macOS no glibc."""
    monkeypatch.delattr(device.os, "sysconf")
    assert memory_limit(torch.device("cpu"), None) is None
    assert check_memory(TrainConfig(), GPTConfig(), CPU).startswith("1.85 GB for weights")
    monkeypatch.setattr(device.sys, "platform", "darwin")
    monkeypatch.setattr(device.ctypes, "CDLL", None)  # not to be called
    keep_freed_memory()


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    return torch.device("cuda")


def test_precision_and_attention_by_device(monkeypatch):
    for capability, dtype, cudnn in (
        ((10, 0), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, True),
        ((8, 9), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, False),
        ((7, 5), torch.float16, False),
    ):
        device = gpu(monkeypatch, capability)
        assert choose_dtype("auto", device, 768) == dtype
        prefer_fast_attention(device)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    cpu = torch.device("cpu")
    for able, width, dtype in (
        ({"avx512_bf16": True}, 768, torch.bfloat16),
        ({"avx512_bf16": True}, 192, torch.float32),
        ({"avx512_bf16": False}, 768, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert choose_dtype("auto", cpu, width) == dtype
    assert choose_dtype("float16", cpu, 64) == torch.float16
    assert choose_dtype("auto", torch.device("mps"), 768) == torch.float32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 SUPER", 71), ("NVIDIA L4", 121), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA A10G", None), ("cpu (x86_64, 2 cores)", None),
    ],
)  # fmt: skip
def test_the_peak_rate_is_known_by_exact_name_only(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_work_per_token():
    """857 MFLOP for the 124M model at T = 1024."""
    assert GPTConfig().flops_per_token(1024) == pytest.approx(857e6, rel=5e-3)
    with torch.device("meta"):
        for shape in train_gpt2.MODEL_SHAPES.values():
            config = GPTConfig(**shape)
            assert sum(p.numel() for p in GPT(config).parameters()) == config.n_parameters


def test_the_table_says_which_attention_is_taken():
    assert device.attention_name(CPU.device, torch.float32, 32) == "flash_attention"


def test_another_kind_of_device_is_a_row(monkeypatch, text_shards, tmp_path):
    """A toy that is a CPU with another name: the flag, the search and the processes take it from DEVICES."""
    toy = device.DeviceType("cpu", lambda: True, most_tokens=64, backend="gloo", fused=True)
    monkeypatch.setattr(device, "DEVICES", {"toy": toy, **device.DEVICES})
    assert device.choose_device("auto").type == "cpu"
    config = TrainConfig(
        data_dir=(text_shards,),
        log_dir=tmp_path / "log",
        device="toy",
        n_layer=1,
        n_head=1,
        n_embd=16,
        sequence_length=32,
        total_batch_size=256,
        max_steps=1,
        hellaswag_every=0,
        sample_every=0,
    )
    train_gpt2.main(config)
    assert read_run(tmp_path / "log")["micro_batch_size"] == 2  # rows of 32 tokens: 64 at most
    assert device.DeviceName == Literal["auto", "cuda", "mps", "cpu"]  # the flag is made of the table


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Writes a program of this name, which the PATH finds first; PyTorch finds no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write(says, status=0):
        program = tmp_path / "bin/nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
        program.chmod(0o755)

    return write


LISTED = "GPU 0: NVIDIA H200 (UUID: GPU-7c1f9d3e)"
FAILED = "NVIDIA-SMI has failed because it couldn t communicate with the NVIDIA driver."


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
@pytest.mark.parametrize(
    ("says", "status", "vendor", "meant"),
    [
        (LISTED, 0, None, True),
        (f"A warning.\n{LISTED}\nGPU 1: Tesla T4", 0, None, True),
        ("No devices were found", 6, "0x8086", False),  # a host where clusters are only logged into
        (FAILED, 9, None, False),
        (FAILED, 9, "0x10de", True),  # a driver that is not loaded
    ],
)
def test_a_gpu_is_meant_where_its_program_or_the_bus_lists_one(
    says, status, vendor, meant, nvidia_smi, tmp_path
):
    (tmp_path / "sys/bus/pci/devices/0000:41:00.0").mkdir(parents=True)
    if vendor:
        (tmp_path / "sys/bus/pci/devices/0000:41:00.0/vendor").write_text(f"{vendor}\n")
    nvidia_smi(says, status)
    assert device.nvidia_gpu_is_meant(tmp_path) == meant


def test_the_bus_alone_means_no_gpu(tmp_path, monkeypatch):
    """A laptop whose card draws the screen, without NVIDIA's driver; a container without the host's GPUs."""
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0/vendor").write_text("0x10de\n")
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert not device.nvidia_gpu_is_meant(tmp_path)


UNEXPECTED = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? "
)


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
@pytest.mark.parametrize(
    ("cuda", "visible", "said", "why"),
    [
        (None, None, None, "is a build without CUDA; https://pytorch.org/get-started/locally has"),
        ("13.0", "", "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES is ''; unset it"),
        ("13.0", "9", "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES is '9'; unset it"),
        ("13.0", None, "No CUDA GPUs are available", "No CUDA GPUs are available; see what nvidia-smi says"),
        ("13.0", "0", "The NVIDIA driver on your system is too old (found version 11040)", r"11040\); see"),
        ("13.0", None, "Found no NVIDIA driver on your system.", "NVIDIA driver on your system.; see"),
        ("13.0", None, UNEXPECTED + "Error 803: no such driver", "Error 803: no such driver; see"),
        ("13.0", None, UNEXPECTED + "Error 802: system not yet initialized", "; start nvidia-fabricmanager"),
    ],
)
def test_why_there_is_no_gpu_is_said_instead_of_training_on_the_cpu(
    cuda, visible, said, why, nvidia_smi, monkeypatch
):
    def init():
        raise RuntimeError(said)

    nvidia_smi(LISTED)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match=f"^--device {name}: .*{why}"):
            device.choose_device(name)
    assert device.choose_device("cpu").type == "cpu"


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_every_script_stops_in_one_line_where_a_gpu_is_meant(nvidia_smi, text_shards, tmp_path):
    nvidia_smi(LISTED)
    GPT(GPTConfig(16, 300, 1, 1, 16)).save_pretrained(tmp_path / "model")
    training = ("train_gpt2.py", *TINY, "--device=auto", f"--data_dir={text_shards}")
    training = (*training, f"--log_dir={tmp_path / 'log'}")
    model = f"--model={tmp_path / 'model'}"
    for command in (training, ("sample.py", model), ("hellaswag.py", model, "--data=x.jsonl")):
        done = call(*command, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: --device auto: this machine has an NVIDIA GPU, but PyTorch")
        assert done.stderr.endswith("; --device cpu does without it\n")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_where_compilation_is_not_tried(monkeypatch):
    assert device.choose_compile(False, torch.device("cuda")) == (False, "off")
    assert not device.choose_compile(True, torch.device("cpu"))[0]
    cuda = gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert device.choose_compile(True, cuda) == (False, "off: no C compiler")
    monkeypatch.setattr(device.shutil, "which", lambda _: "/usr/bin/cc")
    monkeypatch.setattr(device, "Path", lambda *_: SimpleNamespace(exists=lambda: True))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    assert device.choose_compile(True, cuda) == (False, "off: no Triton for this device")


MEMORY_OF_EVALUATION = """
import sys
import hellaswag
from hellaswag import Item, evaluate
from pathlib import Path
from support.machine.device import autocast_to, keep_freed_memory
from support.data.encodings import get_encoding
from support.machine.processes import World
from support.data.shards import load_shards
from train_gpt2 import GPT, GPTConfig, TokenLoader, TrainConfig, estimate_val_loss
import torch

used = []
def look(done, total):
    used.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**30)

keep_freed_memory()
world = World()
model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64)).pad_vocabulary()
if sys.argv[2] == "validation":
    loader = TokenLoader(load_shards(Path(sys.argv[1])), "val", TrainConfig(sequence_length=64))
    x, y = loader.windows(0, 16)
    for _ in range(2):
        model(x, y).backward()
    estimate_val_loss(model, loader, 16, autocast_to(world.device, torch.float32), look)
    print(*(used[i] for i in (4, len(used) // 2, -1)))
else:
    hellaswag.LIMITS["cpu"] = hellaswag.Limits(1000, 8, 2, 500)
    items = [Item(i, "x " * (i % 37), ("a b c d e f g " * 3,) * 4, 0) for i in range(200)]
    evaluate(model, items, get_encoding("gpt2"), on_part=look)
    print(*(used[i] for i in (4, len(used) // 2, -1)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("what", ["validation", "HellaSwag"])
def test_an_evaluation_takes_no_more_memory_at_its_end_than_at_its_beginning(what, tmp_path):
    """What is freed is kept for the next batch. A small tensor kept from each batch used to split it up: a
    validation grew by 5 GB in 200 batches."""
    make_shards(tmp_path, [16 * 64 * 14 + 1, 1000], vocab_size=50_257)
    for line in run("-c", MEMORY_OF_EVALUATION, tmp_path, what).stdout.splitlines():
        early, middle, late = map(float, line.split())
        assert late < early + 0.2
        assert middle < early + 0.2


def test_cudnns_attention_is_off_where_shapes_vary(tmp_path, monkeypatch, text_shards):
    """Seen from every attention of a run: on in training and validation, off in sampling and scoring."""
    item = {"ind": 1, "ctx": "c", "endings": ["a", "b", "c", "d"], "label": 1}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    monkeypatch.setattr(train_gpt2.devices, "prefer_fast_attention", lambda _: set_cudnn(True))
    set_cudnn, seen, where = torch.backends.cuda.enable_cudnn_sdp, {}, ["training"]
    attend = torch.nn.functional.scaled_dot_product_attention

    def look(*arguments, **options):
        seen.setdefault(where[-1], set()).add(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    def within(name, function):
        def wrapped(*arguments, **options):
            where.append(name)
            try:
                return function(*arguments, **options)
            finally:
                where.pop()

        return wrapped

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    sampling = train_gpt2.sampling
    monkeypatch.setattr(sampling, "write_samples", within("sampling", sampling.write_samples))
    for name in ("score_hellaswag", "estimate_val_loss"):
        monkeypatch.setattr(train_gpt2, name, within(name, getattr(train_gpt2, name)))
    flags = (f"--data_dir={text_shards}", f"--hellaswag_data={tmp_path / 'items.jsonl'}")
    flags = (*TINY, *flags, f"--log_dir={tmp_path / 'log'}", "--max_steps=1")
    config = parse(TrainConfig, {}, list(flags))
    train_gpt2.main(replace(config, hellaswag_every=1))
    on, off = {True}, {False}
    assert seen == {"training": on, "estimate_val_loss": on, "score_hellaswag": off, "sampling": off}
    set_cudnn(False)
    with varying_shapes():
        pass
    assert not torch.backends.cuda.cudnn_sdp_enabled()
