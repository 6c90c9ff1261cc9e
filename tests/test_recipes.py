"""The comparison of recipes plans its runs by what it has measured, and computes the shares of tokens."""

import itertools
import json
import math
from dataclasses import replace

from benchmarks import optimizers, recipes, variants
from benchmarks.recipes import (
    GRID,
    SIZES,
    Config,
    Run,
    of_all_seeds,
    settled,
    table,
    table_of_sweeps,
    table_of_variants,
    wanted,
    wanted_batches,
    wanted_sweeps,
    wanted_variants,
)
from conftest import TINY
from conftest import run as run_script
from support.machine.processes import World
from support.model.muon import Muon, muon_groups
from train_gpt2 import FAST, GPT, GPTConfig, get_lr

import pytest
import torch

CPU = World(0, 1, torch.device("cpu"))

BEST = {"1M": {"AdamW": 4e-3, "Muon": 3.2e-2}, "3M": {"AdamW": 8.7e-4, "Muon": 2.8e-2}}


def pretend(run):
    """A result: log-linear in the steps, so that Muon needs half of the tokens, with a valley in the rate."""
    best = BEST.get(run.size, {}).get(run.way, run.rate)
    floor = {"tutorial": 2.4, "AdamW": 1.5 + 0.4 * math.log(2)}.get(run.way, 1.5)
    loss = floor + 0.1 * math.log(run.rate / best) ** 2 + 0.4 * math.log(1000 / run.steps)
    loss += 0.001 * recipes.SEEDS.index(run.seed)
    words = run.changes.replace("--", "").split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name in GRID:  # the larger, the better
            loss -= 0.01 * (GRID[name].index(float(value)) - GRID[name].index(recipes.DEFAULT[run.way][name]))
    loss -= 0.4 * math.log(1 / 0.9) * (run.way == "nesterov")
    return {**run._asdict(), "loss": loss, "curve": [(0, 5.5), (run.steps, loss)], "tokens": 4096 * run.steps,
            "parameters": 1e6}  # fmt: skip


def run_of(result):
    return Run(**{name: result[name] for name in Run._fields})


def carry_all_out(results, order, wanted=lambda results, size: wanted(results, size, 1000)):
    while todo := [run for size in SIZES for run in wanted(results, size) if run.name not in results]:
        order.append(todo[0])
        results[todo[0].name] = pretend(todo[0])
    return results


def test_sweeps_go_past_their_ends_and_the_next_size_waits_for_them():
    order = []
    results = carry_all_out({}, order)
    assert settled(results, "1M", "AdamW", 500) == 4e-3
    assert settled(results, "1M", "Muon", 500) == 3.2e-2  # twice the sweep's last: found, and looked beyond
    assert Run("1M", "Muon", 6.4e-2, 1337, 500) in order
    assert settled(results, "3M", "AdamW", 500) == pytest.approx(8.7e-4, rel=0.03)
    assert settled(results, "3M", "Muon", 500) == pytest.approx(2.8e-2, rel=0.03)  # 3.2e-2 (192/256)^1/2
    first = min(i for i, run in enumerate(order) if run.size == "3M")
    assert order.index(Run("1M", "Muon", 6.4e-2, 1337, 500)) < first
    for size, n in (("1M", 3), ("3M", 3), ("10M", 1)):
        assert [len(of_all_seeds(results, size, way, 1000)) for way in ("AdamW", "Muon")] == [n, n]
    assert len({run.name for run in order}) == len(order)


def test_no_size_begins_with_a_rate_that_is_not_settled():
    results = {}
    for rate in (2e-3, 4e-3):  # the third of the sweep is still running
        run = Run("1M", "AdamW", rate, 1337, 500)
        results[run.name] = pretend(run)
    assert not [run for run in wanted(results, "3M", 1000) if run.way != "tutorial"]
    assert not wanted_variants(results, "1M", ("zero",))


def test_the_share_is_the_one_that_the_losses_were_made_with(monkeypatch):
    """Muon at half the steps ends where AdamW does; the other seeds' losses are a little higher."""
    monkeypatch.setattr(recipes, "CHOSEN", dict.fromkeys(recipes.CHOSEN, ""))
    lines = table(carry_all_out({}, []), 1000)
    shares = [line.split("|")[6].strip() for line in lines if " AdamW " in line]
    assert shares == ["50% (50% to 50%)", "50% (50% to 50%)", "50%"]


def test_every_variant_has_its_flags_and_a_baseline():
    results = carry_all_out({}, [], wanted_sweeps)
    runs = wanted_variants(results, "1M", recipes.VARIANTS)
    assert len(runs) == 3 * (1 + len(recipes.VARIANTS))
    for run in runs:
        words = run.command(Config())
        flags = dict(itertools.pairwise(words))
        steps, batch = int(flags["--max_steps"]), int(flags["--total_batch_size"])
        assert steps * batch == 500 * 4096
        assert (words[1:4] == ["-m", "benchmarks.variants", run.way]) == (run.way != "Muon")


def test_a_field_is_swept_around_the_smaller_sizes_best():
    """At the second size, the best is still the last value, so the sweep has to go on to the end of it."""
    results = carry_all_out({}, [], lambda results, size: wanted_sweeps(results, size) * (size != "10M"))
    for size, way in itertools.product(("1M", "3M"), ("AdamW", "Muon")):
        rate = settled(results, size, way, 500)
        values = {
            run.changes for run in map(run_of, results.values()) if run[:5] == (size, way, rate, 1337, 500)
        }
        expected = {"", *(f"--cooldown {of}" for of in ("0.2", "0.4", "0.8", "1")[2 * (size == "3M") :])}
        expected |= {f"--weight_decay {of}" for of in ("0", "0.03", "0.3")[2 * (size == "3M") :]}
        if way == "Muon":
            expected |= {
                f"--adamw_lr_ratio {of}" for of in (("4", "8") if size == "3M" else ("0.5", "1", "4", "8"))
            }
        assert values >= expected
        assert ("--weight_decay 0.03" in values) == (size == "1M")
        assert Run(size, way, rate, 1337, 1000, "--weight_decay 0.3").name in results
    lines = "\n".join(table_of_sweeps(results))
    assert "| 1M | Muon | 500 | cooldown | 0.2: " in lines
    assert "| 3M | AdamW | 1000 | weight_decay | 0: " in lines


def test_batches_have_as_many_tokens_in_all():
    results = carry_all_out({}, [], wanted_sweeps)
    runs = wanted_batches(results, "3M")
    assert len(runs) == len({run.name for run in runs}) == 16
    for run in runs:
        flags = dict(itertools.pairwise(run.command(Config())))
        assert int(flags["--max_steps"]) * int(flags["--total_batch_size"]) == 500 * 4096
        assert int(flags["--warmup_steps"]) * int(flags["--total_batch_size"]) == 100 * 4096


def test_a_variants_gain_is_in_tokens():
    """It ends where Muon would with 1 / 0.9 times the tokens: 10% fewer will do."""
    results = carry_all_out({}, [], wanted_sweeps)
    for run in wanted_variants(results, "1M", ("nesterov",)):
        results[run.name] = pretend(run)
    (line,) = [line for line in table_of_variants(results) if "nesterov" in line]
    assert line.endswith("| 3 | -0.0421 (-0.0421 to -0.0421) | 10.0% (10.0% to 10.0%) |")


# ------------------------------------------------------------------ the variants


def make(variant, steps):
    """A tiny model and its optimizer, Muon or a variant of it, at the beginning of a run of `steps`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=16))
    variants.Variant.steps = steps
    return model, variant(muon_groups(model, 0.1, 2.0), CPU, lr=0.02, betas=(0.9, 0.95))


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


def take_step(model, optimizer, grads):
    for parameter, gradient in zip(model.parameters(), grads, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one, other, tolerance=1e-7):
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(one, other, strict=True))


def test_the_momentum_warms_up():
    model, optimizer = make(variants.MomentumWarmUp, 100)
    used = []
    for step in range(12):
        take_step(model, optimizer, gradients(model, step))
        used.append(optimizer.momentum)
    assert used[:2] == pytest.approx([0.85, 0.86])
    assert used[10:] == pytest.approx([0.95] * 2)


def test_cautious_decay_spares_weights_that_the_update_makes_larger():
    (model, plain), (other, cautious) = make(Muon, 10), make(variants.CautiousDecay, 10)
    matrices = {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_step(model, plain, gradients(model, 0))
    take_step(other, cautious, gradients(other, 0))
    weights = dict(other.named_parameters())
    for name, decayed in model.named_parameters():
        old = before[name]
        undecayed = decayed + 0.02 * 0.1 * old if name in matrices else decayed
        shrinks = (undecayed - old) * old < 0
        assert torch.allclose(weights[name], torch.where(shrinks, decayed, undecayed), rtol=0, atol=1e-7)


def test_the_last_weights_become_the_mean_of_the_last_twentieth():
    (model, plain), (other, averaging) = make(Muon, 60), make(variants.Average, 60)
    history = [take_step(model, plain, gradients(model, step)) for step in range(60)]
    for step in range(60):
        last = take_step(other, averaging, gradients(other, step))
        if step < 59:
            assert same(last, history[step])
    mean = [torch.stack(weights).mean(dim=0) for weights in zip(*history[57:], strict=True)]
    assert same(last, mean, 1e-6)
    assert not same(last, history[59], 1e-4)


def test_late_batches_are_the_mean_of_two():
    (model, plain), (other, later) = make(Muon, 10), make(variants.LargerBatchesLater, 10)
    for step in range(4):  # 40% of the steps
        assert same(take_step(model, plain, gradients(model, step)),
                    take_step(other, later, gradients(other, step)))  # fmt: skip
    for step in (4, 6, 8):
        pair = [gradients(model, step), gradients(model, step + 1)]
        before = [parameter.detach().clone() for parameter in other.parameters()]
        assert same(take_step(other, later, pair[0]), before)
        mean = [(a + b) / 2 for a, b in zip(*pair, strict=True)]
        assert same(take_step(model, plain, mean), take_step(other, later, pair[1]), 1e-6)


def test_weights_go_on_along_the_mean_of_their_steps():
    """By hand, with Muon's own steps: theta + beta m is where a step begins; m averages whole changes."""
    (model, plain), (other, nesterov) = make(Muon, 100), make(variants.EMANesterov, 100)
    theta = [parameter.detach().clone() for parameter in model.parameters()]
    m = [torch.zeros_like(weight) for weight in theta]
    beta = 0.0
    for step in range(90):
        for group in (*plain.param_groups, *nesterov.param_groups):
            group["lr"] = 0.02 * min(1, (100 - step) / 60)
        grads = gradients(model, step)
        for parameter, weight, mean in zip(model.parameters(), theta, m, strict=True):
            parameter.data = weight + beta * mean
        after = take_step(model, plain, grads)
        m = [mean + (new - old - mean) / 3.2 for mean, new, old in zip(m, after, theta, strict=True)]
        theta = after
        beta = 0.6 * min(1, (100 - step) / 60) if 16 <= step + 1 < 77 else 0.0
        begins = [weight + beta * mean for weight, mean in zip(theta, m, strict=True)]
        assert same(take_step(other, nesterov, grads), begins, 1e-5), step
        assert (beta > 0) != same(begins, theta)


def test_neurons_get_the_same_share_of_an_update():
    """By hand, from Muon's own updates, with no decay: the rows of c_fc, the columns of the MLP's c_proj."""
    (model, plain), (other, normuon) = make(Muon, 10), make(variants.NorMuon, 10)
    plain.param_groups[0]["weight_decay"] = normuon.param_groups[0]["weight_decay"] = 0.0
    names = ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight")
    index = [[name for name, _ in model.named_parameters()].index(name) for name in names]
    mean = [0.0, 0.0]
    begin = [parameter.detach().clone() for parameter in model.parameters()]
    before, last = begin, begin
    for step in range(3):
        grads = gradients(model, step)
        weights, others = take_step(model, plain, grads), take_step(other, normuon, grads)
        for i, (at, dim) in enumerate(zip(index, (1, 0), strict=True)):
            update, normalized = weights[at] - before[at], others[at] - last[at]
            mean[i] = 0.95 * mean[i] + 0.05 * update.square().mean(dim=dim, keepdim=True)
            expected = update / mean[i].sqrt()
            expected *= update.norm() / expected.norm()
            assert torch.allclose(normalized, expected, rtol=1e-3, atol=1e-6)
            assert not torch.allclose(normalized, update, rtol=1e-2, atol=1e-5)
        before, last = weights, others


def test_the_power_bends_the_cooldown_alone():
    config = replace(FAST, max_steps=1000, warmup_steps=100, max_lr=1.0, cooldown=0.6)
    for step in range(1000):
        line = get_lr(step, config)
        expected = line if step <= 400 else line**1.2
        assert variants.power_cooldown(step, config) == pytest.approx(expected), step


def test_the_last_matrices_begin_at_zero():
    model, _ = make(Muon, 1)
    zero = {name for name, p in variants.zero_projections(model).named_parameters() if not p.any()}
    assert {f"transformer.h.0.{part}.c_proj.weight" for part in ("attn", "mlp")} <= zero
    assert "transformer.h.0.mlp.c_fc.weight" not in zero


@pytest.mark.slow
@pytest.mark.parametrize("variant", [way for way in recipes.VARIANTS if way != "halves"])  # that is a flag
def test_variants_change_what_is_learned(variant, text_shards, tmp_path):
    losses = []
    for script in (["train_gpt2.py"], ["-m", "benchmarks.variants", variant]):
        folder = tmp_path / script[-1]
        flags = [*TINY, "--optimizer=muon", "--schedule=trapezoid", "--max_lr=8e-3", "--max_steps=40",
                 f"--data_dir={text_shards}", f"--log_dir={folder}", "--checkpoint_every=0"]  # fmt: skip
        run_script(*script, *flags)
        losses.append((folder / "log.txt").read_text().split()[-1])
    assert losses[0] != losses[1]


def test_adamw_and_muon_take_turns(monkeypatch, tmp_path, capsys):
    tiny = {"tiny": {"n_layer": 1, "n_head": 2, "n_embd": 32}}
    monkeypatch.setattr(optimizers, "SIZES", tiny)
    monkeypatch.setattr(optimizers, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(optimizers.torch, "set_num_threads", lambda count: None)
    make_step, rate, turns = optimizers.make_step, optimizers.rate, []
    named = {}

    def make_and_name(size, name):
        step = make_step(size, name)
        named[step] = name
        return step

    def rate_and_note(step, seconds):
        turns.append(named[step])
        return rate(step, seconds)

    monkeypatch.setattr(optimizers, "make_step", make_and_name)
    monkeypatch.setattr(optimizers, "rate", rate_and_note)
    optimizers.main(optimizers.Config(n=3, seconds=0.01, out=tmp_path / "record.json"))
    measured = json.loads((tmp_path / "record.json").read_text())["models"]["tiny"]
    assert measured["ratios"] == [m / a for a, m in zip(measured["adamw"], measured["muon"], strict=True)]
    assert len(measured["ratios"]) == 3
    assert turns == ["muon", "adamw", "adamw", "muon", "muon", "adamw"]
    assert "| tiny |" in capsys.readouterr().out
