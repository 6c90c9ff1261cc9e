"""What the device can do and what fits on it: choices, the search for a micro-batch, the loss in chunks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call
from test_recovery import faulty
from torch.nn.attention import SDPBackend

import device
import train_gpt2
from device import (
    choose_attention,
    choose_dtype,
    fast_attention,
    is_out_of_memory,
    keep_freed_memory,
    memory_limit,
    peak_flops,
)
from plot import read_log, read_run
from shards import InputError
from train_gpt2 import (
    GPT,
    GPTConfig,
    Layout,
    TrainConfig,
    check_memory,
    find_micro_batch_size,
    micro_batch_sizes,
    prepare_model,
)

CPU = Layout(0, 1, torch.device("cpu"))
SMALL = GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=48)
RUN = (*TINY, "--max_steps=4", "--val_every=2", "--sample_every=4")


# ------------------------------------------------------------------ the micro-batch


def test_the_batch_is_divided_or_refused_with_numbers_that_work():
    config = TrainConfig()
    assert micro_batch_sizes(replace(config, micro_batch_size=64), GPTConfig(), CPU) == [64]
    assert micro_batch_sizes(config, GPTConfig(), CPU) == [4, 2, 1]
    cuda = replace(CPU, device=torch.device("cuda"))
    assert micro_batch_sizes(config, GPTConfig(), cuda) == [64, 32, 16, 8, 4, 2, 1]
    assert micro_batch_sizes(replace(config, total_batch_size=12 * 1024), GPTConfig(), cuda) == [
        12,
        6,
        4,
        3,
        2,
        1,
    ]
    assert micro_batch_sizes(config, GPTConfig(), replace(CPU, world_size=512)) == [1]
    # a row of 1,024 tokens may take 2.5 GB on a CPU; with 16 bytes per parameter, 2 GB, two fit into 8 GB
    assert micro_batch_sizes(replace(config, memory_limit_gb=8), GPTConfig(), CPU) == [2, 1]
    assert micro_batch_sizes(replace(config, memory_limit_gb=2), GPTConfig(), CPU) == [1]
    with pytest.raises(
        InputError, match=r"--micro_batch_size 60 does not divide the 512 rows .* 32, 64, 128"
    ):
        micro_batch_sizes(replace(config, micro_batch_size=60), GPTConfig(), CPU)
    with pytest.raises(InputError, match=r"--total_batch_size 500000 .*; 499712 can"):
        micro_batch_sizes(replace(config, total_batch_size=500_000), GPTConfig(), CPU)
    with pytest.raises(InputError, match="3 processes; 525312 can"):
        micro_batch_sizes(config, GPTConfig(), replace(CPU, world_size=3))
    assert 525312 % (3 * 1024) == 0


@pytest.mark.parametrize(
    ("plain", "chunked", "found", "tries"),
    [
        (100, 100, (64, 1), 1),  # all fits
        (16, 100, (16, 1), 3),  # enough rows: no chunks
        (4, 16, (16, 8), 8),
        (4, 4, (4, 1), 10),  # chunks don't help
        (0, 1, (1, 8), 14),
    ],
)
def test_the_most_rows_that_fit_are_found_from_large_to_small(plain, chunked, found, tries):
    tried = []

    def fits(rows, chunks):
        tried.append((rows, chunks))
        return rows <= (plain if chunks == 1 else chunked)

    assert find_micro_batch_size([64, 32, 16, 8, 4, 2, 1], fits, enough=8) == found
    assert len(tried) == tries


def test_nothing_fits():
    with pytest.raises(InputError, match=r"out of memory with a micro-batch of 1 rows; .*--recompute"):
        find_micro_batch_size([2, 1], lambda *_: False, enough=8)


@pytest.mark.parametrize(
    ("faults", "rows", "says"),
    [
        pytest.param("oom=2", 2, "1 process x 4 micro-steps", marks=pytest.mark.slow),
        ("oom=1:4", 4, "the loss in 8 chunks"),
    ],
)
def test_out_of_memory_leads_to_a_smaller_micro_batch_and_the_same_losses(
    faults, rows, says, tmp_path, text_shards
):
    flags = (*RUN, f"--data_dir={text_shards}")
    done = faulty(faults, *flags, f"--log_dir={tmp_path / 'small'}")
    assert "a micro-batch of 8 rows: CUDA out of memory." in done.stdout
    assert f"micro-batches of {rows} rows" in done.stdout
    assert says in done.stdout
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'large'}", "--micro_batch_size=8")
    small, large = (read_log(tmp_path / name / "log.txt") for name in ("small", "large"))
    for kind in ("train", "val"):
        for (_, a), (_, b) in zip(small[kind], large[kind], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_all_processes_take_what_fits_on_the_smallest(tmp_path, text_shards):
    from conftest import torchrun

    flags = (*RUN, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")
    done = faulty("oom=1 oom_rank=1", *flags, launch=lambda *a, **k: torchrun(2, *a, **k))
    assert "256 tokens a step = 1 rows x 32 tokens x 2 processes x 4 micro-steps" in done.stdout


@pytest.mark.slow
def test_nothing_fits_is_one_line(tmp_path, text_shards):
    done = faulty("oom=0", *RUN, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out of memory with a micro-batch of 1 rows")
    assert done.stderr.count("\n") == 1


def test_out_of_memory_later_names_the_flags_to_go_on_with(tmp_path, text_shards):
    """And the run, when it is over, knows that it was interrupted."""
    flags = (*RUN, "--checkpoint_every=2", "--dollars_per_hour=1e6")
    flags = (*flags, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")
    done = faulty("oom_step=3", *flags, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory, which another program may have taken")
    assert "--resume" in done.stderr
    assert "--micro_batch_size" in done.stderr
    assert done.stderr.count("\n") == 1
    done = call("train_gpt2.py", *flags, "--resume")
    result = read_run(tmp_path / "log")["result"]
    assert result["interruptions"] == 1
    assert result["tokens"] == 4 * 256
    assert result["validation_loss"] == read_log(tmp_path / "log/log.txt")["val"][-1][1]
    assert result["dollars"] == pytest.approx(1e6 * (result["training_hours"] + result["other_hours"]))
    assert "interruptions:   1" in done.stdout
    assert "cost:        $1,000,000.00 an hour, $" in done.stdout
    assert "OpenAI" not in done.stdout
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'undisturbed'}")
    ends = [tmp_path / name / "checkpoint_00004/model.safetensors" for name in ("log", "undisturbed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_the_search_changes_nothing(tmp_path, text_shards):
    """The weights after a run whose micro-batch was found are those of a run that was told."""
    for name, flags in (("found", ()), ("told", ("--micro_batch_size=8",))):
        call("train_gpt2.py", *RUN, *flags, f"--data_dir={text_shards}", f"--log_dir={tmp_path / name}")
    ends = [tmp_path / name / "checkpoint_00004/model.safetensors" for name in ("found", "told")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


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


# ------------------------------------------------------------------ memory


def test_recomputed_blocks_attend_in_the_same_way(monkeypatch, text_shards, tmp_path):
    """Another attention than PyTorch's first choice, in the forward pass, must be that of the backward pass
    too."""
    monkeypatch.setattr(device, "choose_attention", lambda _: [SDPBackend.MATH])
    config = TrainConfig(
        data_dir=text_shards, log_dir=tmp_path / "log", n_layer=2, n_head=2, n_embd=32, sequence_length=32,
        total_batch_size=256, max_steps=2, warmup_steps=2, val_every=0, hellaswag_every=0, sample_every=0,
        device="cpu", recompute=True, checkpoint_every=0,
    )  # fmt: skip
    train_gpt2.main(config)
    assert len(read_log(tmp_path / "log/log.txt")["train"]) == 2


def test_the_warm_up_needs_what_a_step_needs_and_leaves_nothing():
    """The moments are there in its second pass, and not even an overflow reaches the weights."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("inf")  # the loss is NaN, and every gradient
    before = {name: p.clone() for name, p in model.named_parameters()}
    states = []

    def watched(idx, targets):
        states.append(sum(len(optimizer.state) for optimizer in made))
        return model(idx, targets)

    made = []
    configure = train_gpt2.configure_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "configure_optimizer", lambda *a: made.append(configure(*a)) or made[-1])
        train_gpt2.warm_up(watched, model, TrainConfig(sequence_length=16), 2, CPU)
    assert states[1] == len(before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_and_recomputed_blocks_have_the_plain_gradients(dtype):
    torch.manual_seed(0)
    x, y = torch.randint(0, 300, (2, 3, 50))
    y[0, :7] = -100  # these don't count
    gradients, losses = [], []
    for chunks, recompute in ((1, False), (8, False), (8, True), (1, True)):
        torch.manual_seed(1)
        model = GPT(SMALL).pad_vocabulary()
        model.loss_chunks, model.recompute = chunks, recompute
        autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        with autocast:
            logits, loss = model(x, y)
        assert (logits is None) == (chunks > 1)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        losses.append(loss.item())
        with torch.no_grad(), autocast:
            assert model(x, y)[1].item() == pytest.approx(losses[0], abs=1e-5)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], atol=tolerance * gradient.abs().max().item()), name


def test_a_model_that_can_not_fit_is_refused_before_it_is_made(tmp_path, text_shards):
    done = call("train_gpt2.py", f"--data_dir={text_shards}", "--device=cpu", "--hellaswag_every=0",
                "--model=gpt2-xl", "--memory_limit_gb=8", f"--log_dir={tmp_path / 'log'}",
                check=False)  # fmt: skip
    assert done.returncode == 2
    # 48 layers of width 1600 with 257 bytes: 4 float32 numbers per parameter
    n = (257 + 1024) * 1600 + 48 * (12 * 1600**2 + 13 * 1600) + 2 * 1600
    assert f"{n:,} parameters needs {16 * n / 2**30:.2f} GB" in done.stderr
    assert "has 8.00 GB for it" in done.stderr
    assert not (tmp_path / "log").exists()
    with pytest.raises(InputError, match=r"1,557,611,200 parameters needs 23.21 GB .* 5.80 GB each"):
        check_memory(TrainConfig(memory_limit_gb=20), GPTConfig(**train_gpt2.PRESETS["gpt2-xl"]), CPU)


def test_the_limit_of_memory():
    assert memory_limit(torch.device("cpu"), 1.5) == 1.5 * 2**30
    if limit := memory_limit(torch.device("cpu"), None):
        assert 2**28 < limit < 2**50
    keep_freed_memory()


def test_systems_that_lack_what_linux_has(monkeypatch):
    """Windows has no sysconf, macOS no glibc."""
    monkeypatch.delattr(device.os, "sysconf")
    assert memory_limit(torch.device("cpu"), None) is None
    assert check_memory(TrainConfig(), GPTConfig(), CPU).startswith("1.85 GB for weights")
    monkeypatch.setattr(device.sys, "platform", "darwin")
    monkeypatch.setattr(device.ctypes, "CDLL", None)  # not to be called
    keep_freed_memory()


# ------------------------------------------------------------------ speed


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    return torch.device("cuda")


def test_precision_and_attention_by_device(monkeypatch):
    for capability, dtype, first in (
        ((9, 0), torch.bfloat16, "CUDNN_ATTENTION"),
        ((8, 9), torch.bfloat16, "FLASH_ATTENTION"),
        ((8, 0), torch.bfloat16, "FLASH_ATTENTION"),
        ((7, 5), torch.float16, "FLASH_ATTENTION"),
    ):
        device = gpu(monkeypatch, capability)
        assert choose_dtype("auto", device, 768) == dtype
        assert choose_attention(device)[0].name == first
        assert choose_attention(device)[-1].name == "MATH"
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
        ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165.2),
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
        for shape in train_gpt2.PRESETS.values():
            config = GPTConfig(**shape)
            assert sum(p.numel() for p in GPT(config).parameters()) == config.n_parameters


def test_losses_do_not_depend_on_the_attention():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(0, 300, (2, 65))
    with fast_attention(torch.device("cpu")):
        fast = model(idx[:, :-1], idx[:, 1:])[1]
    assert fast.item() == pytest.approx(model(idx[:, :-1], idx[:, 1:])[1].item(), abs=1e-6)


# ------------------------------------------------------------------ compilation


def compiled_run(monkeypatch, backend, text_shards, log_dir, *flags):
    """A run with torch.compile, by this backend; returns what it said."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = torch.compile
    monkeypatch.setattr(train_gpt2, "choose_compile", lambda *_: (True, "on"))
    monkeypatch.setattr(torch, "compile", lambda model, **k: compile_(model, backend=backend, **k))
    said = []
    monkeypatch.setattr(train_gpt2.Progress, "say", lambda _, text: said.append(text))
    config = TrainConfig(
        data_dir=text_shards, log_dir=log_dir, n_layer=2, n_head=2, n_embd=32, sequence_length=32,
        total_batch_size=256, max_steps=5, warmup_steps=2, val_every=2, val_tokens=1056, sample_every=2,
        hellaswag_every=0, device="cpu",
    )  # fmt: skip
    train_gpt2.main(replace(config, **dict(flags)))
    return "\n".join(said)


def test_nothing_is_compiled_again_after_the_warm_up(monkeypatch, text_shards, tmp_path):
    prepare = prepare_model

    def then_no_more(*arguments):
        prepared = prepare(*arguments)
        torch.compiler.set_stance("fail_on_recompile")
        return prepared

    monkeypatch.setattr(train_gpt2, "prepare_model", then_no_more)
    try:
        said = compiled_run(monkeypatch, "eager", text_shards, tmp_path / "log", ("micro_batch_size", 2))
    finally:
        torch.compiler.set_stance("default")
    assert "torch.compile on" in said
    assert "done: 5 steps" in said
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 2  # training, and validation without gradients
    assert not counted["graph_break"]


@pytest.mark.slow
def test_what_is_trained_is_compiled_after_many_sizes_that_did_not_fit(monkeypatch):
    """PyTorch compiles a function for 8 shapes, then silently no more: a size that fails must not count."""
    torch._dynamo.reset()
    compile_, warm, ran = torch.compile, train_gpt2.warm_up, []

    def backend(graph, _):
        def run_graph(*inputs):
            ran.append(inputs)
            return graph(*inputs)

        return run_graph

    def small_memory(model, raw_model, config, rows, layout):
        warm(model, raw_model, config, rows, layout)
        if rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_gpt2, "choose_compile", lambda *_: (True, "on"))
    monkeypatch.setattr(train_gpt2, "warm_up", small_memory)
    monkeypatch.setattr(train_gpt2, "ENOUGH_TOKENS", 1)  # no need for chunks
    monkeypatch.setattr(torch, "compile", lambda model, **k: compile_(model, backend=backend, **k))
    config = TrainConfig(sequence_length=16, total_batch_size=16 * 12)
    model, rows, _ = prepare_model(
        GPT(replace(SMALL, n_layer=1)), config, [12, 6, 4, 3, 2, 1], CPU, lambda _: None
    )
    assert rows == 1
    ran.clear()
    idx = torch.zeros(1, 16, dtype=torch.long)
    model(idx, idx.clone())
    assert ran


def test_training_goes_on_where_compilation_fails(monkeypatch, text_shards, tmp_path):
    def broken(*_):
        raise OSError("no space for the compiler")

    said = compiled_run(monkeypatch, broken, text_shards, tmp_path / "log")
    assert said.count("torch.compile failed, training goes on without it (BackendCompilerFailed") == 1
    assert "torch.compile off: it failed" in said
    assert "done: 5 steps" in said


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
