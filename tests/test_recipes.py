"""The comparison of recipes plans its runs by what it has measured, and computes the shares of tokens."""

import itertools
import json
import math

from benchmarks import optimizers, recipes
from benchmarks.recipes import SIZES, Config, Run, of_all_seeds, settled, table, wanted, wanted_variants
from conftest import TINY
from conftest import run as run_script

import pytest

BEST = {"1M": {"AdamW": 4e-3, "Muon": 3.2e-2}, "3M": {"AdamW": 8.7e-4, "Muon": 2.8e-2}}


def pretend(run):
    """A result: log-linear in the steps, so that Muon needs half of the tokens, with a valley in the rate."""
    best = BEST.get(run.size, {}).get(run.way, run.rate)
    floor = {"tutorial": 2.4, "AdamW": 1.5 + 0.4 * math.log(2), "Muon": 1.5}[run.way]
    loss = floor + 0.1 * math.log(run.rate / best) ** 2 + 0.4 * math.log(1000 / run.steps)
    loss += 0.001 * recipes.SEEDS.index(run.seed)
    return {**run._asdict(), "loss": loss, "curve": [(0, 5.5), (run.steps, loss)], "tokens": 4096 * run.steps,
            "parameters": 1e6, "tokens_per_second": 2e4}  # fmt: skip


def carry_all_out(results, order):
    while todo := [run for size in SIZES for run in wanted(results, size, 1000) if run.name not in results]:
        order.append(todo[0])
        results[todo[0].name] = pretend(todo[0])
    return results


def test_sweeps_go_past_their_ends_and_the_next_size_waits_for_them():
    order = []
    results = carry_all_out({}, order)
    assert settled(results, "1M", "AdamW", 1000) == 4e-3
    assert settled(results, "1M", "Muon", 1000) == 3.2e-2  # twice the sweep's last: found, and looked beyond
    assert Run("1M", "Muon", 6.4e-2, 1337, 1000) in order
    assert settled(results, "3M", "AdamW", 1000) == pytest.approx(8.7e-4, rel=0.03)
    assert settled(results, "3M", "Muon", 1000) == pytest.approx(2.8e-2, rel=0.03)  # 3.2e-2 (192/256)^1/2
    first = min(i for i, run in enumerate(order) if run.size == "3M")
    assert order.index(Run("1M", "Muon", 6.4e-2, 1337, 1000)) < first
    for size, n in (("1M", 3), ("3M", 3), ("10M", 1)):
        assert [len(of_all_seeds(results, size, way, 1000)) for way in ("AdamW", "Muon")] == [n, n]
    assert len({run.name for run in order}) == len(order)


def test_no_size_begins_with_a_rate_that_is_not_settled():
    results = {}
    for rate in (2e-3, 4e-3):  # the third of the sweep is still running
        run = Run("1M", "AdamW", rate, 1337, 1000)
        results[run.name] = pretend(run)
    assert not [run for run in wanted(results, "3M", 1000) if run.way != "tutorial"]
    assert not wanted_variants(results, "1M", 1000)


def test_the_share_is_the_one_that_the_losses_were_made_with():
    """Muon at half the steps ends where AdamW does; the other seeds' losses are a little higher."""
    lines = table(carry_all_out({}, []), 1000)
    shares = [line.split("|")[6].strip() for line in lines if " AdamW " in line]
    assert shares == ["50% (50% to 50%)", "50% (50% to 50%)", "50%"]


def test_every_variant_has_its_flags_and_a_baseline():
    results = carry_all_out({}, [])
    runs = wanted_variants(results, "1M", 1000)
    assert len(runs) == 3 * (1 + len(recipes.VARIANTS))
    for run in runs:
        words = run.command(Config())
        flags = dict(itertools.pairwise(words))
        steps, batch = int(flags["--max_steps"]), int(flags["--total_batch_size"])
        assert steps * batch == 500 * 4096
        assert (words[1:4] == ["-m", "benchmarks.variants", run.way]) == (run.way != "Muon")


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
    monkeypatch.setattr(optimizers, "set_up_for_training", lambda device: None)
    monkeypatch.setattr(optimizers.torch, "set_num_threads", lambda count: None)
    optimizers.main(optimizers.Config(n=3, seconds=0.01, out=tmp_path / "record.json"))
    measured = json.loads((tmp_path / "record.json").read_text())["models"]["tiny"]
    assert measured["ratios"] == [m / a for a, m in zip(measured["adamw"], measured["muon"], strict=True)]
    assert len(measured["ratios"]) == 3
    assert "| tiny |" in capsys.readouterr().out
