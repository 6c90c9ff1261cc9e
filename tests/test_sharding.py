"""A model divided among the processes: the losses of DDP, the same checkpoint, to and fro."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

from conftest import CPU, ROOT, TINY, call, run, torchrun
from support.cli import InputError
from support.files import sha256
from support.machine import micro_batch, sharding
from support.machine.micro_batch import Trials, check_memory, least_bytes_sharded, most_rows
from support.machine.processes import World
from support.model import muon
from support.model.huggingface import list_checkpoints
from support.run.curves import read_log, read_run
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SMALL = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32)
CONFIG = TrainConfig(shard=True, max_lr=1e-2)
LAST_DIGIT = 1.01e-6  # log.txt has six
OPTIMIZERS = {"adamw": LAST_DIGIT, "muon": 1e-5}  # how far 20 losses may differ from those with copies
FLAGS = (*TINY, "--max_steps=20", "--val_every=10", "--sample_every=10", "--checkpoint_every=10")


def train(processes, flags, folder, *more, faults="", **options):
    env = {"FAULTS": faults, "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests/faults.py"
    return torchrun(processes, script, *flags, f"--log_dir={folder}", *more, env=env, **options)


@pytest.fixture
def flags(text_shards):
    return (*FLAGS, f"--data_dir={text_shards}")


def losses(folder, kind="train"):
    return [loss for _, loss in read_log(folder / "log.txt")[kind]]


ROWS = torch.randint(0, 97, (4, 8, 17), generator=torch.Generator().manual_seed(0))  # of four steps


def train_here(model, optimizer, rows):
    """A step on each of `rows`, (steps, B, T + 1); returns the losses."""
    found = []
    for step in rows:
        loss = model(step[:, :-1], step[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def whole_model(shape=SMALL):
    torch.manual_seed(CONFIG.seed)
    return GPT(shape).pad_vocabulary()


def divided_work(rank, world_size, folder):
    """One of the processes: its part of the rows, its share of the model."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    world = World(rank, world_size, torch.device("cpu"))
    with sharding.weights_on_main_only(True, world):
        model = whole_model()
    model = sharding.divide(model, CONFIG, world, torch.float32)
    with torch.no_grad(), sharding.gathered(model):  # a sample before the first step, as --val_every 0 has it
        model.hidden_states(ROWS[0, 0, None, :-1])
    optimizer = configure_optimizer(model, CONFIG)
    found = train_here(model, optimizer, ROWS.chunk(world_size, dim=1)[rank])
    weights = {name: sharding.full_tensor(p.detach()) for name, p in model.named_parameters()}
    kept, count = sharding.collect((weights, 7), keep=world.is_main)
    assert count == 7
    assert all(
        torch.equal(kept[name], weights[name]) if rank == 0 else kept[name] is None for name in weights
    )
    assert not model.gradients_are_large
    sharding.divide(whole_model(), CONFIG, world, torch.bfloat16)  # what a CPU with units for it computes in
    scarce = sharding.divide(whole_model(), replace(CONFIG, memory_limit_gb=1e-6), world, torch.float32)
    assert scarce.gradients_are_large
    states = [t for state in optimizer.state.values() for t in state.values() if sharding.is_sharded(t)]
    own = sum(t.to_local().nbytes for t in (*model.parameters(), *states))
    torch.save((found, weights, own), folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_few_steps_are_those_of_one_process(processes, tmp_path):
    """Losses and weights of four steps beside one process with the whole model and all rows."""
    mp.start_processes(divided_work, (processes, tmp_path), nprocs=processes, start_method="fork")
    model = whole_model()
    expected = train_here(model, configure_optimizer(model, CONFIG), ROWS)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(processes)]
    means = [sum(found) / processes for found in zip(*(found for found, _, _ in ranks), strict=True)]
    assert means == pytest.approx(expected, abs=1e-6)
    for _, weights, own in ranks:
        for name, parameter in model.named_parameters():
            if not name.endswith("c_attn.bias"):  # the keys' has no gradient but noise, which AdamW lifts
                assert torch.allclose(weights[name], parameter, atol=1e-4), name
        assert own == pytest.approx(3 * 4 * sum(p.numel() for p in model.parameters()) / processes, rel=0.1)


# ------------------------------------------------------------------ Muon

MUON = replace(CONFIG, optimizer="muon")
# On 4 processes, matrices of 6 rows lie in shards of 2, 2, 2 and 0; queries, keys and values, of 6 each, in
# shards of 5, 5, 5 and 3. There are 8 square matrices, 2 tall ones and 2 wide ones.
UNEVEN = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=6)


def muon_work(rank, world_size, folder):
    """One of the processes: trains, with a step that is not finite; the state makes a round trip."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size
    )
    world = World(rank, world_size, CPU.device)
    largest, alone, exchange = {}, muon.orthogonalize, dist.all_to_all_single

    def counted(matrices):
        largest[matrices.shape[1:]] = len(matrices)
        return alone(matrices)

    def exchange_as_nccl(output, given, *splits, group):
        assert output.is_contiguous()
        assert given.is_contiguous()
        exchange(output, given, *splits, group=group)

    muon.orthogonalize, dist.all_to_all_single = counted, exchange_as_nccl
    model = sharding.divide(whole_model(UNEVEN), MUON, world, torch.float32)
    optimizer = configure_optimizer(model, MUON, world)
    found = train_here(model, optimizer, ROWS[:2].chunk(world_size, dim=1)[rank])
    before = sharding.collect((dict(model.named_parameters()), optimizer.state_dict()["state"]), keep=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.zero_grad()
    after = sharding.collect((dict(model.named_parameters()), optimizer.state_dict()["state"]), keep=True)
    optimizer = configure_optimizer(model, MUON, world)
    sharding.shard_states(optimizer, copy.deepcopy(after[1]) if world.is_main else {}, world)
    again = sharding.collect(optimizer.state_dict()["state"], keep=True)
    found += train_here(model, optimizer, ROWS[2:].chunk(world_size, dim=1)[rank])
    end = sharding.collect(dict(model.named_parameters()), keep=True)
    states = [t for state in optimizer.state.values() for t in state.values() if sharding.is_sharded(t)]
    own = sum(t.to_local().nbytes for t in states)
    torch.save((found, before, after, again, end, own, largest), folder / f"rank{rank}")
    dist.destroy_process_group()


def test_muon_has_the_losses_of_one_process_with_shards_that_end_anywhere(tmp_path):
    """Four steps on four processes; each has its share of the momentum, and orthogonalizes its own matrices
    only. A step that is not finite leaves all as it was, and so does a checkpoint."""
    mp.start_processes(muon_work, (4, tmp_path), nprocs=4, start_method="fork")
    model = whole_model(UNEVEN)
    optimizer = configure_optimizer(model, MUON)
    expected = train_here(model, optimizer, ROWS)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=False) for rank in range(4)]
    means = [sum(found) / 4 for found in zip(*(found for found, *_ in ranks), strict=True)]
    assert means == pytest.approx(expected, abs=1e-6)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    for rank, (_, before, after, again, end, own, largest) in enumerate(ranks):
        for (name, weight), start in zip(before[0].items(), after[0].values(), strict=True):
            assert torch.equal(weight, start), name
        for i, state in before[1].items():
            assert all(torch.equal(t, after[1][i][name]) for name, t in state.items())
            assert all(torch.equal(t, again[i][name]) for name, t in state.items())
        for name, parameter in model.named_parameters():
            if not name.endswith("c_attn.bias"):  # the keys' has no gradient but noise, which AdamW lifts
                assert torch.allclose(end[name], parameter, atol=1e-4), name
        assert own < moments / 4 * 1.2
        assert largest == {(6, 6): 2, (24, 6): int(rank < 2), (6, 24): int(rank < 2)}


@pytest.mark.slow
def test_a_divided_run_has_the_losses_of_one_process(flags, tmp_path):
    """A shorter version of the next one: losses, the validation, and each process's share of the bytes. The
    shortest is test_gpu.py's."""
    flags = (*flags, "--max_steps=4", "--val_every=2", "--checkpoint_every=0", "--sample_every=0")
    divided = train(2, flags, tmp_path / "shard", "--shard", faults=f"bytes={tmp_path / 'bytes'}")
    assert "divided among" in divided.stdout
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'one'}")
    assert losses(tmp_path / "shard") == pytest.approx(losses(tmp_path / "one"), abs=3e-6)
    assert losses(tmp_path / "shard", "val") == pytest.approx(losses(tmp_path / "one", "val"), abs=1e-4)
    whole = 4 * 4 * read_run(tmp_path / "one")["parameters"]  # weights, gradients, two moments
    for rank in range(2):
        assert int((tmp_path / f"bytes{rank}").read_text()) == pytest.approx(whole / 2, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("processes", [2, 4])
def test_it_trains_as_ddp_does(processes, optimizer, flags, tmp_path):
    """20 losses within 1e-6 (with Muon 1e-5), validation and samples, the checkpoint's files and tensors, and
    each process holds its share of the bytes; then SIGKILL's effect: what was lost is trained again to the
    same bits."""
    flags = (*flags, f"--optimizer={optimizer}", f"--micro_batch_size={4 // processes}")
    ddp, shard = tmp_path / "ddp", tmp_path / "shard"
    plain = train(processes, flags, ddp, faults=f"bytes={ddp}.bytes")
    divided = train(processes, flags, shard, "--shard", faults=f"bytes={shard}.bytes")
    assert "divided among" in divided.stdout
    assert losses(shard) == pytest.approx(losses(ddp), abs=OPTIMIZERS[optimizer])
    assert losses(shard, "val") == pytest.approx(losses(ddp, "val"), abs=1e-4)
    said = [[line for line in done.stdout.split("\n") if "sample:" in line] for done in (plain, divided)]
    assert said[0] == said[1] != []
    whole_bytes = int((tmp_path / "ddp.bytes0").read_text())
    for rank in range(processes):
        share = int((tmp_path / f"shard.bytes{rank}").read_text())
        assert share == pytest.approx(whole_bytes / processes, rel=0.1)
    last = [list_checkpoints(folder)[-1] for folder in (ddp, shard)]
    files = [{file.name for file in folder.iterdir()} for folder in last]
    assert files[0] == files[1]
    states = [torch.load(folder / "trainer.pt")["optimizer"]["state"] for folder in last]
    for i, state in states[0].items():
        for name, tensor in state.items():
            assert torch.allclose(states[1][i][name], tensor, atol=1e-6), name

    whole = sha256(last[1] / "model.safetensors"), (shard / "log.txt").read_bytes()
    shutil.rmtree(last[1])
    train(processes, flags, shard, "--shard", "--resume")
    assert (sha256(last[1] / "model.safetensors"), (shard / "log.txt").read_bytes()) == whole


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("first", "second"), [("divided", "whole"), ("whole", "divided")])
def test_a_run_goes_on_the_other_way(first, second, optimizer, flags, tmp_path):
    """Begun divided among two, continued whole in one process; and back."""
    flags = (*flags, f"--optimizer={optimizer}")

    def go(way, *more):
        arguments = (*flags, "--micro_batch_size=2", f"--log_dir={tmp_path}", *more)
        if way == "whole":
            run("train_gpt2.py", *arguments)
        else:
            torchrun(2, "train_gpt2.py", *arguments, "--shard")

    go(first)
    before = losses(tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    go(second, "--resume")
    assert losses(tmp_path) == pytest.approx(before, abs=1e-5)


@pytest.fixture
def short(flags):
    """A run of 20 steps, and no more."""
    return (*flags, "--checkpoint_every=0", "--sample_every=0")


@pytest.mark.slow
def test_hosts_divide_the_gradients_always_or_at_the_end(short, tmp_path):
    """Two processes on each of two hosts, with a copy for each host: the losses of rows that are given."""
    given = train(4, short, tmp_path / "given", "--shard", "--micro_batch_size=1")
    assert "micro-batches of" not in given.stdout
    for way, faults in (("end", "hosts=2"), ("always", "hosts=2 unsharded_gradients=0")):
        train(4, short, tmp_path / way, "--shard", "--micro_batch_size=1", faults=faults)
        assert losses(tmp_path / way) == pytest.approx(losses(tmp_path / "given"), abs=LAST_DIGIT)


def test_the_micro_batch_is_computed(monkeypatch):
    """gpt2-xl in bfloat16 on 8 cards: the most rows whose sum, with some caution, fits into a card; with the
    loss in chunks where few fit."""
    config = TrainConfig(shard=True, total_batch_size=8 * 16 * 1024, dtype="bfloat16")
    xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    world = Hosts(0, 8, torch.device("cuda"))
    object.__setattr__(world, "local", [8] * 8)
    raw_model = SimpleNamespace(config=xl, gradients_are_large=False)
    trials = Trials(None, raw_model, config, world, None, print=print, compiled=True)
    least = partial(least_bytes_sharded, shards=8)
    sizes = [16, 8, 4, 2, 1]
    # On 24 GB, the unsharded gradients stay between micro-steps; on 16 GB, they are too large.
    whole = 4 * xl.n_parameters
    for gigabytes, fit, kept in ((80, (16, 1), whole), (24, (4, 32), whole), (16, (2, 1), 0)):
        monkeypatch.setattr(World, "memory_limit", lambda *_, size=gigabytes: size * 2**30)
        raw_model.gradients_are_large = kept == 0
        assert most_rows(sizes, trials.should_fit, 8) == fit
        rows, chunks = fit
        assert least(config, xl, rows, chunks, kept=kept) < 0.93 * gigabytes * 2**30
    # Without the compiler, logits take six times the memory: 9 GB instead of 1.5 for 16 rows.
    monkeypatch.setattr(World, "memory_limit", lambda *_: 40 * 2**30)
    raw_model.gradients_are_large = False
    assert most_rows(sizes, trials.should_fit, 8) == (8, 1)
    assert not replace(trials, compiled=False).should_fit(8, 1)
    in_two_ways = [least(config, xl, 16, 1, compiled=way) for way in (False, True)]
    assert in_two_ways[0] - in_two_ways[1] == 10 * 16 * 1024 * 50_257
    # Muon's states are smaller; among 4, its update takes less than a row of activations, among 2, more than
    # one computed again, and than a validation.
    muons = replace(config, optimizer="muon")
    spared = 4 * 12 * 48 * 1600**2 / 4
    assert least(config, xl, 1, 1, shards=4) - least(muons, xl, 1, 1, shards=4) == spared
    config, muons = replace(config, recompute=True), replace(muons, recompute=True)
    assert 0 < least(config, xl, 1, 1, shards=2) - least(muons, xl, 1, 1, shards=2) < 2 * spared
    monkeypatch.setattr(World, "memory_limit", lambda *_: 6 * 2**30)
    with pytest.raises(InputError, match="out of memory with a micro-batch of 1 row"):
        most_rows(sizes, trials.should_fit, 8)


def test_rows_that_are_asked_for_may_need_the_loss_in_chunks(monkeypatch):
    """Nothing is searched, yet 4 rows with a whole loss don't fit into 24 GB."""
    config = TrainConfig(shard=True, total_batch_size=8 * 16 * 1024, micro_batch_size=4, dtype="bfloat16")
    world = Hosts(0, 8, torch.device("cuda"))
    object.__setattr__(world, "local", [8] * 8)
    monkeypatch.setattr(micro_batch.devices, "cap_memory", lambda *_: None)
    monkeypatch.setattr(micro_batch.devices, "choose_compile", lambda *_: (False, "off"))
    with torch.device("meta"):
        raw_model = GPT(GPTConfig(n_layer=48, n_head=25, n_embd=1600))
    raw_model.gradients_are_large = False
    for gigabytes, chunks in ((24, 32), (80, 1)):
        monkeypatch.setattr(World, "memory_limit", lambda *_, size=gigabytes: size * 2**30)
        model = sharding.ShardedModel(raw_model, compiled=False)
        fit = micro_batch.find_micro_batch(model, config, world, None, print)
        assert (fit.rows, fit.loss_chunks) == (4, chunks)


def timeout_work(rank, world_size, folder):
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    world = Hosts(rank, world_size, torch.device("cpu"))
    object.__setattr__(world, "local", [2] * 4)
    model = sharding.divide(whole_model(), replace(CONFIG, timeout_minutes=7), world, torch.float32)
    (mesh,) = {p.device_mesh for p in model.parameters()}
    for group in mesh.get_all_groups():
        assert group.size() == 2
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7)
    dist.destroy_process_group()


def test_the_groups_of_each_host_have_the_timeout_too(tmp_path):
    mp.start_processes(timeout_work, (4, tmp_path), nprocs=4, start_method="fork")


def test_what_a_divided_model_keeps_depends_on_its_dtype():
    """gpt2-xl on 8 cards, 16 rows: in float32, the numbers of 16 bits take twice as much."""
    config, xl = TrainConfig(shard=True), GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    tokens, layers = 16 * 1024, 48 * 1600
    wide, narrow = (
        least_bytes_sharded(config, xl, 16, 1, shards=8, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    # A block keeps x, both norms, 3 of attention, its output, the middle of the stream, 4 + 4 of the MLP.
    assert 4 * (1 + 2 + 3 + 1 + 1 + 4 + 4) == 64
    assert wide - narrow == tokens * ((64 - 37) * layers + 2 * 50_257)


def test_validation_of_a_divided_model_counts():
    """It gathers the whole model. With 8 rows on each of 4 cards of 16 GB in float16, all computed again,
    training's step fits and the validation would not."""
    config, xl = TrainConfig(shard=True, recompute=True), GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    states, logits = 4 * xl.n_parameters, 8 * 1024 * 10 * 50_257
    needed = least_bytes_sharded(config, xl, 8, 1, shards=4, dtype=torch.float16)
    assert needed == states + (4 + 2) * xl.n_parameters + logits  # weights, and autocast's copies
    in_bfloat16 = least_bytes_sharded(config, xl, 8, 1, shards=4)
    gathered = 2 * xl.n_parameters + 2 * 50_257 * 1600  # the blocks in bfloat16, the embedding in float32
    assert in_bfloat16 == states + gathered + logits


@pytest.mark.parametrize("large", [False, True])
def test_when_gradients_are_averaged(large):
    """In a step's last backward pass; within a host always, where the gradients are large."""

    class Divided(torch.nn.Module):
        gradients_are_large = large

        def set_requires_gradient_sync(self, sync):
            set_to.append(sync)

        set_requires_all_reduce = set_requires_gradient_sync

    set_to, model = [], sharding.ShardedModel(Divided(), compiled=False)
    model.require_backward_grad_sync = False
    model.require_backward_grad_sync = True
    assert set_to == [large, False, True, True]


@pytest.mark.slow
def test_gradients_exchanged_always_or_at_the_end(short, tmp_path):
    """Where memory is short, gradients are divided in every micro-step: the same losses."""
    flags = (*short, "--micro_batch_size=1", "--shard")
    train(2, flags, tmp_path / "end")
    train(2, flags, tmp_path / "always", faults="unsharded_gradients=0")
    assert losses(tmp_path / "always") == pytest.approx(losses(tmp_path / "end"), abs=LAST_DIGIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "optimizer"),
    [("hosts=2", "adamw"), ("hosts=2 unsharded_gradients=0", "adamw"), ("hosts=2", "muon")],
)
def test_a_copy_on_each_host(faults, optimizer, flags, tmp_path):
    """Four processes as if on two hosts: each host has a copy of the model, divided among its two."""
    flags = (*flags, f"--optimizer={optimizer}", "--micro_batch_size=1")
    ddp, copies = tmp_path / "ddp", tmp_path / "copies"
    train(4, flags, ddp)
    done = train(4, flags, copies, "--shard", faults=f"{faults} bytes={copies}.bytes")
    assert "divided among 2 processes" in done.stdout
    assert losses(copies) == pytest.approx(losses(ddp), abs=OPTIMIZERS[optimizer])
    train(2, flags, tmp_path / "two", "--shard", faults=f"bytes={tmp_path / 'two.bytes'}")
    assert (tmp_path / "copies.bytes3").read_text() == (tmp_path / "two.bytes1").read_text()
    last = list_checkpoints(copies)[-1]
    whole = sha256(last / "model.safetensors"), (copies / "log.txt").read_bytes()
    shutil.rmtree(last)
    train(4, flags, copies, "--shard", "--resume", faults=faults)
    assert (sha256(last / "model.safetensors"), (copies / "log.txt").read_bytes()) == whole


# ------------------------------------------------------------------ compiled


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--recompute",)])
def test_compiled_blocks(more, flags, tmp_path):
    """With a backend that needs no C compiler: the same losses; validation and samples work."""
    flags = (*flags, "--micro_batch_size=2", "--n_layer=10", "--shard", *more)
    train(2, flags, tmp_path / "plain")
    done = train(2, flags, tmp_path / "compiled", faults="backend=aot_eager")
    assert "torch.compile on" in done.stdout
    for kind in ("train", "val"):
        plain, compiled = (losses(tmp_path / way, kind) for way in ("plain", "compiled"))
        assert compiled == pytest.approx(plain, abs=LAST_DIGIT)


@pytest.mark.slow
def test_processes_score_unequally_many_items(flags, tmp_path):
    """One item for two processes, and no samples: the backward pass that follows gathers in one order."""
    item = {"ind": 0, "ctx": "a b c", "endings": ["d e", "f g", "h", "i"], "label": 0}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    flags = (*flags, "--max_steps=3", "--val_every=0", "--sample_every=0", "--micro_batch_size=1")
    train(2, flags, tmp_path / "plain", "--shard")
    scored = f"--hellaswag_data={tmp_path / 'items.jsonl'}", "--hellaswag_every=1", "--timeout_minutes=0.5"
    train(2, flags, tmp_path / "scored", "--shard", *scored)
    assert losses(tmp_path / "scored") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_processes_validate_on_unequal_numbers_of_batches(flags, tmp_path):
    """Seven windows for two processes: an evaluation's batches don't communicate."""
    flags = (*flags, "--max_steps=2", "--val_every=1", "--val_tokens=224", "--micro_batch_size=1")
    train(2, flags, tmp_path / "divided", "--shard", "--timeout_minutes=0.5")
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'one'}")
    divided, one = losses(tmp_path / "divided", "val"), losses(tmp_path / "one", "val")
    assert divided == pytest.approx(one, abs=1e-4)
    assert len(one) == 3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "backend_rank=1"])
def test_compilation_fails_and_training_goes_on(where, short, tmp_path):
    """Everywhere, or in one process only."""
    flags = (*short, "--micro_batch_size=2", "--shard")
    train(2, flags, tmp_path / "plain")
    done = train(2, flags, tmp_path / "failed", faults=f"backend=fails {where}")
    assert "torch.compile failed, training continues without it" in done.stdout
    assert losses(tmp_path / "failed") == losses(tmp_path / "plain")


# ------------------------------------------------------------------ faults


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float16_skips_the_same_steps(optimizer, flags, tmp_path):
    """A gradient that overflows in one process's share is skipped by all; the end has DDP's losses."""
    flags = (*flags, f"--optimizer={optimizer}", "--micro_batch_size=2", "--dtype=float16")
    flags = (*flags, "--checkpoint_every=12")
    for way, more in (("ddp", ()), ("shard", ("--shard",))):
        train(2, flags, tmp_path / way, *more, faults=f"scale={2.0**26}")
    states = [torch.load(tmp_path / way / "checkpoint_00020/trainer.pt") for way in ("ddp", "shard")]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert states[1]["scaler"]["scale"] < 2.0**26
    assert 5 < states[1]["optimizer"]["state"][0]["step"] < 20
    assert losses(tmp_path / "shard") == pytest.approx(losses(tmp_path / "ddp"), abs=2e-3)
    end = tmp_path / "shard/checkpoint_00020"
    whole = sha256(end / "model.safetensors"), (tmp_path / "shard/log.txt").read_bytes()
    shutil.rmtree(end)
    train(2, flags, tmp_path / "shard", "--shard", "--resume")
    assert (sha256(end / "model.safetensors"), (tmp_path / "shard/log.txt").read_bytes()) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "optimizer"), [(0, "adamw"), (1, "adamw"), (1, "muon")])
def test_a_process_out_of_memory_ends_all(rank, optimizer, short, tmp_path):
    """One line from each process, and none waits."""
    started = time.monotonic()
    flags = (*short, f"--optimizer={optimizer}", "--micro_batch_size=2", "--shard", "--timeout_minutes=0.5")
    done = train(2, flags, tmp_path, faults=f"oom_step=6 oom_rank={rank}", check=False)
    assert done.returncode != 0
    assert time.monotonic() - started < 90
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert sum("out of memory" in line for line in errors) == 1
    assert sum("lost contact with another process" in line for line in errors) <= 1
    assert len(errors) <= 2
    assert "rank0]: Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_of_two_is_killed_and_the_run_goes_on(optimizer, flags, tmp_path):
    flags = (
        *flags,
        f"--optimizer={optimizer}",
        "--micro_batch_size=2",
        "--checkpoint_every=5",
        "--shard",
        "--timeout_minutes=0.5",
    )
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", tmp_path / "steps"
    train(2, flags, whole)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher = subprocess.Popen(
        [*command, ROOT / "tests/faults.py", *flags, f"--log_dir={killed}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
             "FAULTS": f"slow=0.1 step_file={steps}"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (steps.exists() and int(steps.read_text() or 0) >= 8):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(launcher.pid)],
        text=True, capture_output=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    os.kill(int([line for line in children if "faults.py" in line][1].split()[0]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=90)
    assert launcher.returncode != 0
    assert "lost contact with another process" in err
    done = train(2, flags, killed, "--resume")
    assert "resuming at step 5" in done.stdout
    assert (killed / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()


# ------------------------------------------------------------------ what is refused


class Hosts(World):
    """As seen by a process whose hosts run so many processes each."""

    def from_all(self, value):
        return self.local


def test_what_is_refused():
    one, two = (Hosts(0, n, torch.device("cpu")) for n in (1, 2))
    object.__setattr__(two, "local", [2, 2])
    with pytest.raises(InputError, match="start them with torchrun"):
        sharding.count_shards(CONFIG, one)
    assert sharding.count_shards(TrainConfig(), two) == 1
    assert sharding.count_shards(CONFIG, two) == 2


@pytest.mark.parametrize(("local", "shares"), [([4] * 4, 4), ([2] * 4, 2), ([1] * 4, 4), ([3, 3, 3, 1], 4)])
def test_a_model_is_divided_within_hosts(local, shares):
    """Hosts with one process each share one copy; so do hosts that differ."""
    world = Hosts(0, 4, torch.device("cpu"))
    object.__setattr__(world, "local", local)
    assert sharding.count_shards(CONFIG, world) == shares


def test_what_cannot_fit_says_what_would(monkeypatch):
    """GPT-2 XL: 23.2 GB of states; on cards of 22 GB, three leave half of each free, and four divide the
    batch, too. On a CPU, dividing would not help: the processes share its memory."""
    xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    with pytest.raises(InputError, match=r"GB for it: choose a smaller --model$"):
        check_memory(TrainConfig(memory_limit_gb=22.0), xl, CPU)
    monkeypatch.setattr(World, "memory_limit", lambda *_: 22.0 * 2**30)
    monkeypatch.setattr(micro_batch, "device_name", lambda _: "a card")
    with pytest.raises(InputError, match=r"divide it among 4 such devices: torchrun --nproc_per_node=4"):
        check_memory(TrainConfig(memory_limit_gb=22.0), xl, World(0, 1, torch.device("cuda")))
    with pytest.raises(InputError, match=r"choose a smaller --model$"):  # a Mac's GPU can't be shared
        check_memory(TrainConfig(memory_limit_gb=22.0), xl, World(0, 1, torch.device("mps")))
    eight = Hosts(0, 8, torch.device("cpu"))
    object.__setattr__(eight, "local", [8] * 8)
    assert "2.90 GB for weights" in check_memory(CONFIG, xl, eight)
    # With Muon, 12 bytes for each number of the blocks' matrices, 16 for each of the rest.
    assert "2.21 GB for weights, gradients and the optimizer's state" in check_memory(MUON, xl, eight)
    monkeypatch.setattr(World, "memory_limit", lambda *_: 17.0 * 2**30)
    with pytest.raises(InputError, match=r"17.72 GB .* optimizer's state; .* 4 such devices"):
        check_memory(replace(MUON, shard=False), xl, World(0, 1, torch.device("cuda")))
    # 7% of a GPU stay free: 17.72 GB don't fit into 18.5.
    monkeypatch.setattr(World, "memory_limit", lambda *_: 18.5 * 2**30)
    with pytest.raises(InputError, match=r"has 17.20 GB for it: .* among 4 such devices"):
        check_memory(replace(MUON, shard=False), xl, World(0, 1, torch.device("cuda")))
    assert "17.72 GB" in check_memory(replace(MUON, shard=False), xl, World(0, 1, torch.device("cpu")))
    one_row = replace(MUON, shard=False, total_batch_size=1024)  # nothing to divide
    with pytest.raises(InputError, match=r"17.20 GB for it: choose a smaller --model$"):
        check_memory(one_row, xl, World(0, 1, torch.device("cuda")))


def test_alone_it_needs_torchrun(flags, tmp_path):
    done = call("train_gpt2.py", *flags, "--shard", f"--log_dir={tmp_path}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --shard divides the model among several processes")
