"""Pictures, and the published lines only where a comparison is fair."""

import json
from pathlib import Path

from conftest import call, run
from support.cli import InputError
from support.run import curves
from train_gpt2 import GPT, GPTConfig

import matplotlib.figure
import pytest


def make_run(folder, encoding="gpt2", dataset="HuggingFaceFW/fineweb-edu", items=10_042):
    folder.mkdir()
    events = [f"{step} train {10 - step / 10}" for step in range(50)]
    events += [
        f"{step} {kind} {value}"
        for step in (0, 25, 50)
        for kind, value in (("val", 9 - step / 10), ("hella", 0.26))
    ]
    (folder / "log.txt").write_text("\n".join(events) + "\n")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "encoding": encoding,
                "data": {"dataset": dataset},
                "hellaswag_items": items,
                "train_config": {"total_batch_size": 524288},
            }
        )
    )
    return folder


def labels(monkeypatch, folders, out):
    drawn = []
    monkeypatch.setattr(curves, "save_picture", lambda figure, _: drawn.append(figure))
    curves.draw_runs(folders, out)
    assert isinstance(drawn[0], matplotlib.figure.Figure)
    return [[text.get_text() for text in axis.texts] for axis in drawn[0].axes], drawn[0]


def test_published_lines_stand_beside_comparable_runs_only(tmp_path, monkeypatch):
    fair = make_run(tmp_path / "fair")
    (loss, hella), figure = labels(monkeypatch, [fair], tmp_path / "x.png")
    assert "OpenAI's GPT-2 (124M): 3.292" in loss
    assert "GPT-3 of the same size: 0.337" in hella
    assert figure.axes[0].get_xlabel() == "tokens trained on"
    assert figure.axes[0].lines[-2].get_xdata()[-1] == 50 * 524288
    other_data = make_run(tmp_path / "other_data", dataset=None)
    (loss, hella), _ = labels(monkeypatch, [other_data], tmp_path / "x.png")
    assert not loss
    assert "OpenAI's GPT-2 (124M): 0.2955" in hella  # the items are the same, whatever the model read
    few_items = make_run(tmp_path / "few", items=3243)
    (loss, hella), _ = labels(monkeypatch, [fair, few_items], tmp_path / "x.png")
    assert hella == ["chance: 0.25"]
    in_bytes = make_run(tmp_path / "bytes", encoding="bytes")
    (loss, hella), _ = labels(monkeypatch, [in_bytes], tmp_path / "x.png")
    assert not any("OpenAI" in label for label in loss + hella)


def test_runs_are_drawn_together_and_the_tutorials_logs_too(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "run.json").unlink()  # the tutorial leaves only a log
    done = run("plot.py", "run", a, b, "--out", tmp_path / "both.png")
    assert "drew" in done.stdout
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    call("plot.py", "run", a)
    assert (a / "loss.png").exists()


def test_a_comparison_leaves_the_runs_own_pictures(tmp_path, monkeypatch):
    """...and says when losses are per byte and per token."""
    monkeypatch.chdir(tmp_path)
    tokens, in_bytes = make_run(tmp_path / "a"), make_run(tmp_path / "b", encoding="bytes")
    done = call("plot.py", "run", tokens, in_bytes)
    assert Path("runs.png").exists()
    assert not (tokens / "loss.png").exists()
    assert "these losses can't be compared" in done.stderr
    assert call("plot.py", "run", tokens, tokens).stderr == ""


def test_positions(tmp_path):
    GPT(
        GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=16, encoding="bytes")
    ).save_pretrained(tmp_path / "model")
    call("plot.py", "positions", tmp_path / "model", "--out", tmp_path / "wpe.png")
    assert (tmp_path / "wpe.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_is_a_running_mean():
    assert curves.smooth([1, 2, 6, 4, 0], 2) == [1, 3, 2.6, 3, 10 / 3]
    assert curves.smooth([5, 1], 0) == [5, 1]
    assert curves.smooth([], 3) == []


def test_a_run_still_going_is_drawn(tmp_path):
    run = make_run(tmp_path / "going")
    with open(run / "log.txt", "a") as file:
        file.write("50 tra")  # copied in the middle of a line
    assert len(curves.read_log(run / "log.txt")["train"]) == 50
    call("plot.py", "run", run)


def test_the_caption_says_what_made_the_curves(tmp_path):
    run = {"parameters": 124_439_808, "device": "NVIDIA A100", "world_size": 8,
           "result": {"training_hours": 2.4, "other_hours": 0.1}}  # fmt: skip
    assert curves.caption(tmp_path / "a_run", run) == "a_run, 124.4M parameters, 8 x NVIDIA A100, 2.5 hours"
    assert curves.caption(tmp_path / "a_run", {}) == "a_run"


def test_a_bad_log_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        curves.draw_runs([tmp_path], tmp_path / "x.png")
    (tmp_path / "log.txt").write_text("0 val 10.9\nhello\n")
    with pytest.raises(InputError, match=r"log\.txt, line 2"):
        curves.draw_runs([tmp_path], tmp_path / "x.png")
    done = call("plot.py", "run", tmp_path, "--out=x.docx", check=False)
    assert done.returncode == 2
