"""The search for a micro-batch, the refusal of what cannot fit, and compilation."""

from dataclasses import replace
from types import SimpleNamespace

import train_gpt2
from conftest import CPU, SMALL, TINY, call, faulty
from support.cli import InputError
from support.machine import device, micro_batch
from support.machine.micro_batch import (
    Trials,
    check_memory,
    find_micro_batch,
    least_bytes,
    micro_batch_sizes,
    most_rows,
    try_step,
)
from support.machine.processes import World
from support.run.curves import read_log, read_run
from train_gpt2 import GPT, GPTConfig, TrainConfig

import pytest
import torch

RUN = (*TINY, "--max_steps=4", "--val_every=2", "--sample_every=4")
FLOAT32 = device.autocast_to(CPU.device, torch.float32)


def sizes_of(flags, world):
    return micro_batch_sizes(TrainConfig(**flags), GPTConfig(), world)


def test_the_batch_is_divided_or_refused_with_numbers_that_work():
    assert sizes_of({"micro_batch_size": 64}, CPU) == [64]
    assert sizes_of({}, CPU) == [4, 2, 1]
    cuda = replace(CPU, device=torch.device("cuda"))
    assert sizes_of({}, cuda) == [64, 32, 16, 8, 4, 2, 1]
    assert sizes_of({"total_batch_size": 12 * 1024}, cuda) == [12, 6, 4, 3, 2, 1]
    assert sizes_of({}, replace(CPU, size=512)) == [1]
    # a row of 1,024 tokens may take 2.5 GB on a CPU; with 16 bytes per parameter, 2 GB, two fit into 8 GB
    assert sizes_of({"memory_limit_gb": 8}, CPU) == [2, 1]
    assert sizes_of({"memory_limit_gb": 2}, CPU) == [1]
    with pytest.raises(
        InputError, match=r"--micro_batch_size 60 does not divide the 512 rows .* 32, 64, 128"
    ):
        sizes_of({"micro_batch_size": 60}, CPU)
    with pytest.raises(InputError, match=r"--total_batch_size 500000 .*; 499712 can"):
        sizes_of({"total_batch_size": 500_000}, CPU)
    with pytest.raises(InputError, match="3 processes; 2 processes can divide it; a new run can take 525312"):
        sizes_of({}, replace(CPU, size=3))
    assert 525312 % (3 * 1024) == 0


@pytest.mark.parametrize(
    ("plain", "chunked", "found", "tries"),
    [
        (100, 100, (64, 1), 1),  # all fits
        (16, 100, (16, 1), 3),  # enough rows: no chunks
        (4, 16, (16, 32), 8),
        (4, 4, (4, 1), 10),  # chunks don't help
        (0, 1, (1, 32), 14),
    ],
)
def test_the_most_rows_that_fit_are_found_from_large_to_small(plain, chunked, found, tries):
    tried = []

    def fits(rows, chunks):
        tried.append((rows, chunks))
        return rows <= (plain if chunks == 1 else chunked)

    assert most_rows([64, 32, 16, 8, 4, 2, 1], fits, enough=8) == found
    assert len(tried) == tries


def test_what_fitted_before_is_tried_first():
    tried = []

    def fits(rows, chunks):
        tried.append((rows, chunks))
        return rows <= 4

    assert most_rows([64, 32, 16, 8, 4, 2, 1], fits, 8, first=(4, 8)) == (4, 8)
    assert tried == [(4, 8)]
    tried.clear()  # memory became scarce: the search begins anew
    assert most_rows([64, 32, 16, 8, 4, 2, 1], fits, 2, first=(8, 1)) == (4, 1)
    assert tried[0] == (8, 1)
    assert most_rows([2, 1], fits, 1, first=(4, 1)) == (2, 1)  # another batch: not among the sizes


def test_what_a_step_keeps_on_a_gpu():
    """Beside the peak of the backward pass in PyTorch's generated code for 12 layers, weights, gradients and
    moments left out: 6.98 GiB with 16 rows, 3.64 with 8."""
    config, shape = TrainConfig(), GPTConfig()
    fixed = 16 * shape.n_parameters
    for rows, peak in ((16, 6.98), (8, 3.64)):
        computed = (least_bytes(config, shape, rows, 1) - fixed) / 2**30
        assert peak - 0.4 < computed < peak  # at the least: what surely can't fit is not compiled
    plain = least_bytes(config, shape, 16, 1)
    assert least_bytes(config, shape, 16, 8) < plain - 1.3 * 2**30  # the logits
    assert least_bytes(replace(config, recompute=True), shape, 16, 1) < 0.55 * plain


def test_nothing_fits():
    with pytest.raises(InputError, match=r"out of memory with a micro-batch of 1 row; .*--recompute"):
        most_rows([2, 1], lambda *_: False, enough=8)


@pytest.mark.parametrize(
    ("faults", "rows", "says"),
    [
        pytest.param("oom=2", 2, "1 process x 4 micro-steps", marks=pytest.mark.slow),
        ("oom=1:4", 4, "the loss in 32 chunks"),
    ],
)
def test_out_of_memory_leads_to_a_smaller_micro_batch_and_the_same_losses(
    faults, rows, says, tmp_path, text_shards
):
    flags = (*RUN, f"--data_dir={text_shards}")
    done = faulty(faults, *flags, f"--log_dir={tmp_path / 'small'}")
    assert "a micro-batch of 8 rows: OutOfMemoryError: CUDA out of memory." in done.stdout
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
    assert "256 tokens a step = 1 row x 32 tokens x 2 processes x 4 micro-steps" in done.stdout


@pytest.mark.slow
def test_nothing_fits_is_one_line(tmp_path, text_shards):
    done = faulty("oom=0", *RUN, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out of memory with a micro-batch of 1 row")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_resumed_run_tries_first_what_fitted_before(tmp_path, text_shards):
    """8 rows are too many, 4 fit with the loss in chunks: the second time nothing else is tried."""
    flags = (*RUN, "--checkpoint_every=2", f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")
    first = faulty("oom=1:4 oom_step=3", *flags, check=False)
    assert "a micro-batch of 8 rows: OutOfMemoryError: CUDA out of memory." in first.stdout
    again = faulty("oom=1:4", *flags, "--resume")
    assert "warm-up: trying a micro-batch of 4 rows" in again.stdout
    assert "out of memory" not in again.stdout.lower()
    assert "micro-batches of 4 rows, the loss in 32 chunks, as before" in again.stdout
    other = faulty("oom=8", *flags, "--recompute", "--resume")  # finished: nothing is tried
    assert "is finished" in other.stdout


@pytest.mark.slow
def test_out_of_memory_later_names_the_flags_to_go_on_with(tmp_path, text_shards):
    """And the run, when it is over, knows that it was interrupted."""
    flags = (*RUN, "--checkpoint_every=2", "--dollars_per_hour=1e6")
    flags = (*flags, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")
    done = faulty("oom_step=3", *flags, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory (another program may have taken it)")
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


def test_the_trial_needs_what_a_step_needs_and_leaves_nothing(monkeypatch):
    """Memory for two moments of every parameter, gradients, the validation in its own mode; not even an
    overflow reaches the weights."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("inf")  # the loss is NaN, and every gradient
    before = {name: p.clone() for name, p in model.named_parameters()}
    made, modes, zeros_like = [], [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t: made.append(t.numel()) or zeros_like(t))
    model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    assert 0 < try_step(model, 2, 16, FLOAT32, CPU.device) < 60
    assert sum(made) == 2 * sum(p.numel() for p in model.parameters())
    assert modes == [(True, True), (True, True), (False, False)]
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


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
        check_memory(TrainConfig(memory_limit_gb=20), GPTConfig(**train_gpt2.MODEL_SHAPES["gpt2-xl"]), CPU)


# ------------------------------------------------------------------ compilation


@pytest.fixture
def compiler(monkeypatch):
    """A function that makes torch.compile work on a CPU, by this backend. A stance is undone in the end."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = torch.compile

    def use(backend):
        monkeypatch.setattr(device, "choose_compile", lambda *_: (True, "on"))
        monkeypatch.setattr(torch, "compile", lambda model, **k: compile_(model, backend=backend, **k))

    yield use
    torch.compiler.set_stance("default")


def compiled_run(monkeypatch, text_shards, log_dir, **changes):
    """A run; returns what it said."""
    said = []
    for name in ("print", "show"):  # events, and the tables
        monkeypatch.setattr(train_gpt2.Report, name, lambda _, text: said.append(text))
    config = TrainConfig(
        data_dir=(text_shards,),
        log_dir=log_dir,
        n_layer=2,
        n_head=2,
        n_embd=32,
        sequence_length=32,
        total_batch_size=256,
        max_steps=5,
        warmup_steps=2,
        val_every=2,
        val_tokens=1056,
        sample_every=2,
        hellaswag_every=0,
        device="cpu",
    )
    train_gpt2.main(replace(config, **changes))
    return "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_is_compiled_again_after_the_warm_up(rows, compiler, monkeypatch, text_shards, tmp_path):
    """Neither by changes between training and evaluation, nor by the strides of a single row."""
    find = micro_batch.find_micro_batch

    def then_no_more(*arguments, **options):
        found = find(*arguments, **options)
        torch.compiler.set_stance("fail_on_recompile")
        return found

    monkeypatch.setattr(micro_batch, "find_micro_batch", then_no_more)
    compiler("eager")
    said = compiled_run(monkeypatch, text_shards, tmp_path / "log", micro_batch_size=rows)
    assert "torch.compile on" in said
    assert "done: 5 steps" in said
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 2  # training, and validation without gradients
    assert not counted["graph_break"]


@pytest.mark.slow
def test_what_is_trained_is_compiled_after_many_sizes_that_did_not_fit(compiler, monkeypatch):
    """PyTorch compiles a function for 8 shapes, then silently no more: a size that fails must not count."""
    warm, ran = try_step, []

    def backend(graph, _):
        def run_graph(*inputs):
            ran.append(inputs)
            return graph(*inputs)

        return run_graph

    def small_memory(model, rows, *others):
        seconds = warm(model, rows, *others)
        if rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return seconds

    monkeypatch.setattr(micro_batch, "try_step", small_memory)
    monkeypatch.setattr(micro_batch, "ENOUGH_TOKENS", 1)  # no need for chunks
    compiler(backend)
    model = torch.compile(GPT(replace(SMALL, n_layer=1)), dynamic=False)
    config = TrainConfig(sequence_length=16, total_batch_size=12 * 16)
    assert find_micro_batch(model, config, CPU, FLOAT32, lambda _: None).rows == 1
    ran.clear()
    idx = torch.zeros(1, 16, dtype=torch.long)
    model(idx, idx.clone())
    assert ran


def test_of_unlike_devices_the_smallest_decides(monkeypatch):
    """In the other process two rows fit, with the loss in chunks; and its step is slower."""
    model, said = GPT(replace(SMALL, n_layer=1)), []

    def from_all(_, own):
        if not isinstance(own, tuple):
            return [own, own]
        rows = tried[-1]
        return [own, (9.0, None if rows <= 2 and model.loss_chunks > 1 else f"{rows} are too many")]

    def step(model, rows, *others):
        tried.append(rows)
        return try_step(model, rows, *others)

    tried = []
    monkeypatch.setattr(micro_batch, "try_step", step)
    monkeypatch.setattr(World, "from_all", from_all)
    fit = find_micro_batch(
        model, TrainConfig(sequence_length=16, total_batch_size=64), CPU, FLOAT32, said.append
    )
    assert (fit.rows, fit.loss_chunks, fit.seconds) == (2, micro_batch.LOSS_CHUNKS, 9.0)
    assert tried == [4, 2, 1, 4, 2]
    assert "a micro-batch of 4 rows: 4 are too many" in said


def test_the_smallest_memory_counts(monkeypatch):
    monkeypatch.setattr(World, "from_all", lambda _, own: [own, 5.0, None])
    assert CPU.memory_limit(8.0) == 5.0


def test_what_can_not_fit_is_not_tried(monkeypatch):
    """16 rows keep 6.6 GB beside the 1.9 GB of states: on a card of 8 GB, no step is spent on them."""
    monkeypatch.setattr(micro_batch, "try_step", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(World, "memory_limit", lambda *_: 8 * 2**30)
    world, inside = replace(CPU, device=torch.device("cuda")), SimpleNamespace(config=GPTConfig())
    trials = Trials(None, inside, TrainConfig(), world, FLOAT32, print=print, compiled=False)
    assert not trials.fit(16, 1)


def test_a_size_is_tried_again_without_the_compiler_that_failed(monkeypatch):
    tried, said = [], []

    def step(model, rows, *_):
        tried.append(rows)
        if len(tried) == 1:
            raise OSError("no space for the compiler")
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.5

    monkeypatch.setattr(micro_batch, "try_step", step)
    monkeypatch.setattr(device, "choose_compile", lambda *_: (True, "on"))
    model, config = GPT(replace(SMALL, n_layer=1)), TrainConfig(sequence_length=2**12, total_batch_size=2**14)
    monkeypatch.setattr(device, "DEVICES", {"cpu": replace(device.DEVICES["cpu"], most_tokens=2**14)})
    try:
        fit = find_micro_batch(model, replace(config, memory_limit_gb=64.0), CPU, FLOAT32, said.append)
    finally:
        torch.compiler.set_stance("default")
    assert (tried, fit.rows, fit.seconds) == ([4, 4, 2], 2, 0.5)
    assert fit.compiler_fault == "OSError: no space for the compiler"
    assert sum("torch.compile failed" in line for line in said) == 1


def test_training_goes_on_where_compilation_fails(compiler, monkeypatch, text_shards, tmp_path):
    """With the model that main made: nothing is built anew."""

    def broken(*_):
        raise OSError("no space for the compiler")

    compiler(broken)
    said = compiled_run(monkeypatch, text_shards, tmp_path / "log")
    assert said.count("torch.compile failed, training continues without it (BackendCompilerFailed") == 1
    assert "torch.compile off: it failed" in said
    assert "done: 5 steps" in said
    torch.compiler.set_stance("default")
    monkeypatch.undo()
    call("train_gpt2.py", *TINY, "--max_steps=5", "--val_every=2", "--val_tokens=1056", "--sample_every=0",
         f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'plain'}", "--max_lr=6e-4")  # fmt: skip
    assert read_log(tmp_path / "log/log.txt") == read_log(tmp_path / "plain/log.txt")
