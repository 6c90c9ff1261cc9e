"""What a run says of itself: bar, lines, tracker, warning, closing table."""

import contextlib
import importlib.machinery
import json
import sqlite3
import sys
import threading
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

from conftest import CPU, TINY, call, run, run_folder
from hellaswag import Score
from support import cli
from support.data.encodings import get_encoding
from support.data.shards import Shards
from support.run import report
from support.run.curves import read_log
from train_gpt2 import TrainConfig, choose_model_config, get_lr

import pytest

NO_SHARDS = Shards(Path(), {}, {}, "gpt2", {}, "")
RUN = (*TINY, "--max_steps=6", "--val_every=3", "--sample_every=0")
FAIR = {
    "device": "a GPU",
    "precision": "bfloat16, torch.compile on",
    "run_id": "1234",
    "interruptions": 2,
    "encoding": "gpt2",
    "data": {"dataset": "HuggingFaceFW/fineweb-edu"},
    "hellaswag_items": 10_042,
    "default_recipe": True,
    "optimizer": "AdamW",
    "changed": None,
    "flops_per_token": 500_000,
    "val_tokens": 10_485_760,
}


def facts_of(**changes):
    """Facts of a run of the default configuration with these changes."""
    return {**FAIR, "train_config": asdict(replace(TrainConfig(), **changes))}


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """A function that makes a Report which has begun; `said` is what it printed."""
    monkeypatch.setattr(report, "opening_table", lambda *_: "the table")
    monkeypatch.setattr(report.devices, "peak_flops", lambda _: 1e9)

    def make(facts=None, on_terminal=False, trainer=None, interruptions=0, **changes):
        config = replace(TrainConfig(), log_dir=tmp_path, **changes)
        made = report.Report(config, CPU)
        made.on_terminal, made.said = on_terminal, []
        monkeypatch.setattr(made, "show", made.said.append)
        run = run_folder(tmp_path)
        run.trainer, run.interruptions = trainer or {}, interruptions
        monkeypatch.setattr(report, "facts_of", lambda *_, **__: facts_of(**changes) | (facts or {}))
        made.start(run, None, None, None, None, n_items=0)
        return made

    return make


def test_lines_have_the_tutorials_format_and_mfu(begin):
    lines = begin(total_batch_size=1000)
    lines.step(0, 4.0, 1e-3, 1.0, seconds=2.0)
    assert lines.said[-1] == (
        "step     0 | loss: 4.000000 | lr 1.0000e-03 | norm: 1.0000 | dt: 2000.00ms | tok/sec: 500.00 "
        "| mfu: 25.0%"
    )
    for step in range(1, 6):
        lines.step(step, 4.0, 1e-3, 1.0, seconds=3600 / 100)
    assert "training will take about 10 h 36 min (2.00 s a step)" in lines.said
    lines.close("")


def test_mfu_is_of_all_devices(begin):
    lines = begin(total_batch_size=1000)
    lines.world_size = 2
    lines.step(0, 4.0, 1e-3, 1.0, seconds=2.0)
    assert lines.said[-1].endswith("| tok/sec: 500.00 | mfu: 12.5%")


def test_time_and_tokens_of_all_parts_of_a_run_add_up(begin, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    before = {"training": 100.0, "other": 10.0, "tokens": 5000}
    resumed = begin(trainer={"spent": before}, total_batch_size=1000)
    now += 30  # of which two steps take 16
    for step in (5, 6):
        resumed.step(step, 4.0, 1e-3, 1.0, seconds=8.0)
    assert resumed.spent == {"training": 116.0, "other": 24.0, "tokens": 7000, "dollars": None}
    resumed.close("")


def test_each_part_of_a_run_has_its_price_and_lost_work_has_one_too(begin, monkeypatch):
    """An hour at $14 was saved, another 36 minutes were lost in a crash; then two hours at $1."""
    now = 1000.0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    saved = {"training": 3000.0, "other": 600.0, "tokens": 5000, "dollars": 14.0}
    status = {"events": [], "training_seconds": 5000.0, "other_seconds": 760.0, "dollars": 22.4}
    monkeypatch.setattr(report.curves, "read_status", lambda _: status)
    resumed = begin(trainer={"spent": saved}, interruptions=1, dollars_per_hour=1.0)
    now += 7200
    expected = {"training": 3000.0, "other": 2760.0 + 7200.0, "tokens": 5000, "dollars": 22.4 + 2.0}
    assert resumed.spent == pytest.approx(expected)
    resumed.close("")


def test_the_bar_shows_what_one_waits_for(begin, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    bar = begin(
        on_terminal=True, max_steps=1000, val_every=250, total_batch_size=524_288, dollars_per_hour=0.5
    )
    for step in range(5):
        bar.step(step, 3.21, 6e-4, 0.312, seconds=7.2)
    shown = bar.bar.postfix
    for part in ("loss 3.210", "lr 6.0e-04", "72,818 tok/s", "evaluation in 29 min", "left 1 h 59 min"):
        assert part in shown
    assert "training will take about 1 h 59 min, $0.99 (7.20 s a step)" in bar.said
    bar.close("")


def test_on_a_narrow_terminal_the_bar_keeps_what_matters(begin, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = begin(on_terminal=True, max_steps=19_073, total_batch_size=524_288)
    bar.step(14_700, 3.21, 6e-4, 0.312, seconds=7.2)
    shown = bar.bar.postfix
    for part in ("loss 3.210 lr 6.0e-04 norm 0.31", "73k tok/s", "left 8 h 45 min"):
        assert part in shown
    assert "evaluation" not in shown
    assert len(str(bar.bar).replace("1/19073", "14701/19073")) - 9 <= 80  # the bar shrinks from 10 to 1
    bar.close("")


def test_what_takes_long_gives_signs_of_life(begin, monkeypatch):
    """An evaluation of two minutes in a file has a line a minute; a long step says what the run will take."""
    now = 1000.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    lines = begin(max_steps=19_073)
    for done in range(4):
        lines.sign_of_life("validation", done, 4)
        now += 40
    assert lines.said[1:] == ["validation 2/4, 80 s left"]
    for done in range(3):
        lines.micro_step(0, done, 512)
        now += 40
    assert lines.said[2:] == [
        "training will take about 4,521 days (5 h 41 min a step)",
        "step 0: micro-step 2/512, 5 h 40 min left",
    ]


def table_of(max_steps, train_tokens, first_step=0, schedule="cosine", **facts):
    model = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), 1)
    words = dict.fromkeys(("device", "precision", "attention", "memory"), "")
    numbers = dict.fromkeys(("parameters", "world_size", "micro_batch_size", "val_tokens"), 1)
    config = TrainConfig(max_steps=max_steps, warmup_steps=10, schedule=schedule)
    made = {**FAIR, **words, **numbers, "hellaswag_items": 0,
            "grad_accum_steps": 512, "model_config": {**model, "encoding": "gpt2"},
            "data": {"train_tokens": train_tokens, "train_shards": 1},
            "warm_up_step_seconds": None}  # fmt: skip
    return report.opening_table(made | facts, config, 0.0, first_step)


def test_what_may_surprise_is_noted():
    assert "note:" not in table_of(100, 10_000_000)
    assert "more than 20 epochs" in table_of(100, 2_000_000)
    assert "less than 1,000,000 tokens" in table_of(20, 999_999)
    mix = {"train_tokens": 10**10, "train_shards": 2, "parts": {"a": 0.5, "b": 0.5}, "epochs_a_token": {
        "a": 0.5 / 10**6, "b": 0.5 / (10**10 - 10**6)}}  # fmt: skip
    assert "up to 26.21 epochs" in table_of(100, 0, data=mix)
    assert "more than 20 epochs" in table_of(100, 0, data=mix)
    assert "the warm-up takes 10 steps, and after 9 the rate falls or the run ends" in table_of(9, 10**7)
    assert "note:" not in table_of(0, 10**7)
    assert "the warm-up takes 10 steps, and after 8 the rate" in table_of(20, 10**7, 0, "trapezoid")
    assert "note:" not in table_of(25, 10**7, 0, "trapezoid")


def test_a_run_that_a_cpu_can_not_finish_says_so_at_once():
    hopeless = table_of(19_073, 10**10, warm_up_step_seconds=20_000.0, device="cpu (x86_64, 2 cores)")
    assert "about 4,415 days of training, plus evaluation (estimated from the warm-up); on a CPU" in hopeless
    assert "time:" not in table_of(100, 10**7)
    assert "about 33 min" in table_of(100, 10**7, 80, warm_up_step_seconds=100.0)  # 20 steps are left


def test_a_table_has_the_rows_with_a_value():
    rows = {"one": "eins zwei drei", "two": None, "three": "vier"}
    assert report.table(rows, 7) == "one:   eins zwei drei\nthree: vier"
    assert report.table(rows, 7, width=16) == "one:   eins zwei\n       drei\nthree: vier"


def test_a_models_text_is_readable():
    text = "One\r\ntwo\t\u00a0\x1b[0m, ¿tres?"
    assert cli.printable(text) == "One\n    two  \ufffd[0m, ¿tres?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (100, "1 min 40 s"), (600, "10 min"), (3600, "1 h 00 min"), (48 * 3600 + 61, "48 h 01 min"),
     (62 * 86400, "62 days")],
)  # fmt: skip
def test_durations(seconds, text):
    assert cli.duration(seconds) == text


def test_one_is_not_many():
    counted = [cli.plural(n, noun) for n, noun in ((1, "row"), (2, "row"), (0, "step"), (1, "process"))]
    assert counted == ["1 row", "2 rows", "0 steps", "1 process"]
    assert cli.plural(1000, "process") == "1,000 processes"


@pytest.mark.parametrize(
    ("changes", "facts", "step", "loss", "warns"),
    [
        ({}, {}, 1000, 4.88, True),
        ({}, {}, 250, 6.4, True),
        ({}, {}, 1000, 4.17, False),
        ({}, {}, 500, 9.0, False),  # no mark is known there
        ({}, {"default_recipe": False}, 1000, 4.88, False),
        ({}, {"data": {"dataset": None}}, 1000, 4.88, False),  # other data
        ({}, {"data": {**FAIR["data"], "config": "sample-10BT"}}, 1000, 4.88, True),
        ({}, {"data": {**FAIR["data"], "config": "sample-100BT"}}, 1000, 4.88, False),
        ({}, {"encoding": "bytes"}, 1000, 4.88, False),
    ],
)
def test_an_unhealthy_loss_is_said_once(begin, changes, facts, step, loss, warns):
    lines = begin(facts, **changes)
    for _ in range(2):
        lines.validation(step, loss)
    assert sum("WARNING: healthy runs" in text for text in lines.said) == warns
    lines.close("")


def test_the_closing_table_compares_where_it_is_fair():
    facts = facts_of(dollars_per_hour=2.0)
    spent = {"training": 9 * 3600.0, "other": 3600.0, "tokens": 9_999_745_024, "dollars": 20.0}
    score = Score(10_042, 0.29, 0.305, 0, [])
    facts["result"] = result = report.result_of(facts, 19_073, spent, 3.0512, score)
    table = report.closing_table(facts)
    assert "3.0512 (OpenAI's GPT-2 (124M) 3.2924, healthy runs 3.02 to 3.09)" in table
    assert (
        "0.3050 +- 0.0046 on 10,042 items (OpenAI's GPT-2 (124M) 0.2955, healthy runs .300 to .313)" in table
    )
    assert "9,999,745,024" in table
    assert "9 h 00 min of training, 1 h 00 min of evaluation, saving and start-up" in table
    assert "308,634 tokens/s" in table
    assert "$20.00" in table
    assert "interruptions:   2" in table
    other_recipe = facts | {"default_recipe": False}
    assert "3.0512 (OpenAI's GPT-2 (124M) 3.2924)" in report.closing_table(other_recipe)
    assert "OpenAI" not in report.closing_table(facts | {"encoding": "bytes"})
    other_data = report.closing_table(facts | {"data": {"dataset": None}})
    assert "3.0512\n" in other_data
    assert "on 10,042 items (OpenAI's GPT-2 (124M) 0.2955)" in other_data
    assert json.loads(json.dumps(result)) == result
    best = {"best_checkpoint": "checkpoint_15000", "best_validation_loss": 3.04}
    table = report.closing_table(facts | {"result": result | best})
    assert "best checkpoint: checkpoint_15000, validation loss 3.0400" in table
    nothing = report.result_of(facts, 5, spent, float("nan"), None)
    assert "validation" not in report.closing_table(facts | {"result": nothing})


def test_a_thread_may_print_too(capsys, monkeypatch):
    """Whole lines, though the stream is slow."""
    lines = report.Report(TrainConfig(), CPU)
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (time.sleep(0.0005), write(text)))

    def say(text):
        for _ in range(20):
            lines.print(text)

    threads = [threading.Thread(target=say, args=text) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(capsys.readouterr().out.splitlines()) == 20 * ["a"] + 20 * ["b"]


@pytest.mark.parametrize(
    ("changes", "default"),
    [
        ({}, True),
        ({"seed": 7, "shuffle": False, "val_tokens": 1000, "device": "cpu", "model": "gpt2"}, True),
        ({"max_lr": 1e-3}, False),
        ({"optimizer": "muon"}, False),
        ({"model": "gpt2-medium"}, False),
        ({"n_layer": 6}, False),
    ],
)
def test_which_runs_compare_with_published_ones(changes, default, tmp_path):
    run = run_folder(tmp_path, **changes)
    run.open(choose_model_config(run.config, get_encoding("gpt2")), NO_SHARDS, get_lr)
    assert report.is_default_recipe(run) == default


# ------------------------------------------------------------------ trackers


def test_a_tracker_gets_the_values(tmp_path, text_shards, monkeypatch):
    """By the part of the interface that wandb and trackio share."""
    calls = []
    wandb = types.ModuleType("wandb", "")
    wandb.__spec__ = types.SimpleNamespace(name="wandb", origin="wandb.py")
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
    steps = [values for _, values in calls[1:-1] if "train/loss" in values]
    events = read_log(tmp_path / "a_run/log.txt")
    assert [values["train/loss"] for values in steps] == pytest.approx(
        [x for _, x in events["train"]], abs=1e-6
    )
    assert all(values.keys() >= {"train/lr", "train/norm", "tokens_per_second"} for values in steps)
    assert events.keys() == {"train", "val", "hella", "lr", "norm"}  # the rate goes to the tracker alone


def test_a_tracker_that_fails_is_not_worth_a_run(tmp_path, text_shards, monkeypatch):
    wandb = types.ModuleType("wandb", "")
    wandb.__spec__ = types.SimpleNamespace(name="wandb", origin="wandb.py")
    wandb.init = lambda **_: None

    def log(*_, **__):
        raise ConnectionError("no route to host")

    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    done = call(
        "train_gpt2.py", *RUN, "--tracker=wandb", f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}"
    )
    assert done.stdout.count("--tracker wandb failed, training continues without it: no route to host") == 1
    assert "done: 6 steps" in done.stdout


def test_a_tracker_that_is_not_installed_is_named(tmp_path, text_shards, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(report.InputError, match="--tracker wandb: it is not installed; pip install wandb"):
        report.check_tracker("wandb")
    report.check_tracker(None)
    (tmp_path / "wandb").mkdir()  # which wandb leaves behind; Python takes any folder for a package
    found = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    assert found is not None
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: found)
    with pytest.raises(report.InputError, match="it is not installed"):
        report.check_tracker("wandb")


def test_with_trackio_itself(tmp_path, text_shards):
    pytest.importorskip("trackio", reason="optional: pip install trackio")
    flags = ("--tracker=trackio", f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'a_run'}")
    run("train_gpt2.py", *RUN, *flags, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio/gpt2.db")) as database:
        rows = database.execute("select step, metrics from metrics where run_name like 'a_run-%'").fetchall()
    logged = [(step, json.loads(values)) for step, values in rows]
    for kind, name in (("train", "train/loss"), ("val", "val/loss")):
        expected = read_log(tmp_path / "a_run/log.txt")[kind]
        assert [(step, values[name]) for step, values in logged if name in values] == [
            (step, pytest.approx(value, abs=1e-4)) for step, value in expected
        ]
