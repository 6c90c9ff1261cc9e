"""What a run says of itself: bar, lines, tracker, warning, closing table."""

import contextlib
import json
import sqlite3
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, call, run

import plot
import report
from hellaswag import Score
from train_gpt2 import Layout, TrainConfig

CPU = Layout(0, 1, torch.device("cpu"))
RUN = (*TINY, "--max_steps=6", "--val_every=3", "--sample_every=0")
FAIR = {
    "precision": "bfloat16, torch.compile on",
    "run_id": "1234",
    "interruptions": 2,
    "encoding": "gpt2",
    "data": {"dataset": "HuggingFaceFW/fineweb-edu"},
    "hellaswag_items": 10_042,
}


@pytest.fixture
def progress(monkeypatch):
    monkeypatch.setattr(report, "describe", lambda *_: "the table")
    monkeypatch.setattr(report, "peak_flops", lambda _: 1e9)
    said = []
    monkeypatch.setattr(report.Progress, "say", lambda _, text: said.append(text))

    def make(**changes):
        made = report.Progress(replace(TrainConfig(), **changes), CPU)
        made.said = said
        return made

    return make


def test_lines_have_the_tutorials_format_and_mfu(progress):
    lines = progress(total_batch_size=1000)
    lines.start(0, FAIR, flops_per_token=500_000)
    lines.step(0, 4.0, 1e-3, 1.0, seconds=2.0)
    assert lines.said[-1] == (
        "step     0 | loss: 4.000000 | lr 1.0000e-03 | norm: 1.0000 | dt: 2000.00ms | tok/sec: 500.00 "
        "| mfu: 25.0%"
    )
    for step in range(1, 6):
        lines.step(step, 4.0, 1e-3, 1.0, seconds=3600 / 100)
    assert "training will take about 10 h 36 min (2.00 s a step)" in lines.said
    lines.close()


def test_the_bar_shows_what_one_waits_for(progress, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    bar = progress(max_steps=1000, val_every=250, total_batch_size=524_288, dollars_per_hour=0.5)
    bar.on_terminal = True
    bar.start(0, FAIR, flops_per_token=500_000)
    for step in range(5):
        bar.step(step, 3.21, 6e-4, 0.312, seconds=7.2)
    shown = bar.bar.postfix
    assert shown.startswith("loss 3.210 lr 6.0e-04 norm 0.31 72,818 tok/s MFU")
    assert shown.endswith("| evaluation in 29 min | left 1 h 59 min")
    assert "training will take about 1 h 59 min, $0.99 (7.20 s a step)" in bar.said
    bar.close()


def test_on_a_narrow_terminal_the_bar_keeps_loss_speed_and_time(progress, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = progress(max_steps=19_073, total_batch_size=524_288)
    bar.on_terminal = True
    bar.start(0, FAIR, flops_per_token=500_000)
    bar.step(14_700, 3.21, 6e-4, 0.312, seconds=7.2)
    line = bar.bar.postfix
    assert line == "loss 3.210 72,818 tok/s MFU 3641% | left 8 h 45 min"
    bar.close()


def test_what_takes_long_gives_signs_of_life(progress, monkeypatch):
    """An evaluation of two minutes in a file has a line a minute; a long step says what the run will take."""
    now = 1000.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    lines = progress(max_steps=19_073)
    for done in range(4):
        lines.doing("step 0: validation", done, 4)
        now += 40
    assert lines.said == ["step 0: validation 2/4, 80 s left"]
    for done in range(3):
        lines.micro_step(0, done, 512)
        now += 40
    assert lines.said[1:] == [
        "training will take about 4,521 days (5 h 41 min a step)",
        "step 0: micro-step 2/512, 5 h 40 min left",
    ]


def test_many_epochs_are_noted():
    config = TrainConfig(max_steps=100, warmup_steps=10)
    facts = {**dict.fromkeys(("device", "precision", "attention", "memory"), ""), "parameters": 1,
             "model_config": dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), 1)
             | {"encoding": "gpt2"}, "world_size": 1, "micro_batch_size": 1, "grad_accum_steps": 512,
             "val_tokens": 1, "hellaswag_items": 0}  # fmt: skip
    few, many = ({**facts, "data": {"train_tokens": n, "train_shards": 1}} for n in (10_000_000, 2_000_000))
    assert "note:" not in report.describe(config, few)
    assert "more than 20 epochs" in report.describe(config, many)


def test_a_models_text_is_readable():
    text = "One\r\ntwo\t\u00a0\x1b[0m, ¿tres?"
    assert report.readable(text) == "One\n    two  \ufffd[0m, ¿tres?"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "3 s"), (100, "1 min 40 s"), (600, "10 min"), (3600, "1 h 00 min"), (48 * 3600 + 61, "48 h 01 min"),
     (62 * 86400, "62 days")],
)  # fmt: skip
def test_durations(seconds, words):
    assert report.duration(seconds) == words


@pytest.mark.parametrize(
    ("changes", "facts", "step", "loss", "warns"),
    [
        ({}, {}, 1000, 4.88, True),
        ({}, {}, 250, 6.4, True),
        ({}, {}, 1000, 4.17, False),
        ({}, {}, 500, 9.0, False),  # no mark is known there
        ({"max_lr": 1e-3}, {}, 1000, 4.88, False),  # another recipe
        ({"n_layer": 6}, {}, 1000, 4.88, False),
        ({"log_dir": Path("elsewhere"), "seed": 1}, {}, 1000, 4.88, True),
        ({}, {"data": {"dataset": None}}, 1000, 4.88, False),  # other data
        ({}, {"encoding": "bytes"}, 1000, 4.88, False),
    ],
)
def test_an_unhealthy_loss_is_said_once(progress, changes, facts, step, loss, warns):
    lines = progress(**changes)
    lines.start(0, FAIR | facts, flops_per_token=1)
    for _ in range(2):
        lines.measured(step, {"val/loss": loss}, f"validation loss {loss}")
    assert sum("WARNING: healthy runs" in text for text in lines.said) == warns
    lines.close()


def test_the_closing_table_compares_where_it_is_fair():
    config = TrainConfig(dollars_per_hour=2.0)
    spent = {"training": 9 * 3600.0, "other": 3600.0, "tokens": 9_999_745_024}
    score = Score(10_042, 0.29, 0.305, 0, [])
    result = report.result_of(config, FAIR, 19_073, spent, 3.0512, score)
    table = report.closing_table(config, FAIR, result)
    assert "3.0512 (OpenAI's GPT-2 3.2924, healthy runs 3.02 to 3.09)" in table
    assert "0.3050 +- 0.0046 on 10,042 items (OpenAI's GPT-2 0.2955, healthy runs .300 to .313)" in table
    assert "9,999,745,024" in table
    assert "9 h 00 min of training, 1 h 00 min of everything else" in table
    assert "308,634 tokens/s" in table
    assert "$20.00" in table
    assert "interruptions:   2" in table
    other_recipe = report.closing_table(replace(config, max_steps=200), FAIR, result)
    assert "3.0512 (OpenAI's GPT-2 3.2924)" in other_recipe
    elsewhere = report.closing_table(config, FAIR | {"encoding": "bytes"}, result)
    assert "OpenAI" not in elsewhere
    assert json.loads(json.dumps(result)) == result
    nothing = report.result_of(TrainConfig(), FAIR, 5, spent, float("nan"), None)
    assert "validation" not in report.closing_table(config, FAIR, nothing)


# ------------------------------------------------------------------ trackers


def test_a_tracker_gets_the_values(tmp_path, text_shards, monkeypatch):
    """By the part of the interface that wandb and trackio share."""
    calls = []
    wandb = types.ModuleType("wandb", "")
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    wandb.init = lambda **options: calls.append(("init", options))
    wandb.log = lambda values, step: calls.append((step, values))
    wandb.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    call(
        "train_gpt2.py",
        *RUN,
        "--tracker=wandb",
        f"--data_dir={text_shards}",
        f"--log_dir={tmp_path / 'a_run'}",
    )
    assert calls[0][0] == "init"
    assert calls[0][1]["name"] == f"a_run-{calls[0][1]['id']}"
    assert calls[0][1]["config"]["train_config"]["max_steps"] == 6
    assert calls[-1][0] == "finish"
    logged = [(step, kind.split("/")[0]) for step, values in calls[1:-1] for kind in values]
    assert [step for step, kind in logged if kind == "val"] == [0, 3, 6]
    assert sorted({step for step, kind in logged if kind == "train"}) == [0, 1, 2, 3, 4, 5]
    losses = [values["train/loss"] for _, values in calls[1:-1] if "train/loss" in values]
    in_log = [loss for _, loss in plot.read_log(tmp_path / "a_run/log.txt")["train"]]
    assert losses == pytest.approx(in_log, abs=1e-6)


def test_a_tracker_that_fails_is_not_worth_a_run(tmp_path, text_shards, monkeypatch):
    wandb = types.ModuleType("wandb", "")
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    wandb.init = lambda **_: None

    def log(*_, **__):
        raise ConnectionError("no route to host")

    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    done = call(
        "train_gpt2.py", *RUN, "--tracker=wandb", f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}"
    )
    assert done.stdout.count("--tracker wandb failed, training goes on without it: no route to host") == 1
    assert "done: 6 steps" in done.stdout


def test_a_tracker_that_is_not_installed_is_named(tmp_path, text_shards, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(report.InputError, match="--tracker wandb: it is not installed; pip install wandb"):
        report.check_tracker("wandb")
    report.check_tracker(None)


def test_with_trackio_itself(tmp_path, text_shards):
    pytest.importorskip("trackio", reason="optional: pip install trackio")
    flags = ("--tracker=trackio", f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'a_run'}")
    run("train_gpt2.py", *RUN, *flags, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio/gpt2.db")) as database:
        rows = database.execute("select step, metrics from metrics where run_name like 'a_run-%'").fetchall()
    logged = [(step, json.loads(values)) for step, values in rows]
    for kind, name in (("train", "train/loss"), ("val", "val/loss")):
        expected = plot.read_log(tmp_path / "a_run/log.txt")[kind]
        assert [(step, values[name]) for step, values in logged if name in values] == [
            (step, pytest.approx(value, abs=1e-4)) for step, value in expected
        ]
