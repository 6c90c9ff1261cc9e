"""The log, read whatever its lines are; pictures, with published lines only where the comparison is fair."""

import itertools
import json
import math
import random

from conftest import call, run
from support.cli import InputError
from support.run import curves
from train_gpt2 import GPT, GPTConfig

import pytest

BATCH = 524_288


def make_run(
    folder,
    encoding="gpt2",
    dataset="HuggingFaceFW/fineweb-edu",
    items=10_042,
    val_tokens=10_485_760,
    sequence_length=1024,
    more=(),
):
    """A run's folder, without checkpoints; `more` lines end its log."""
    folder.mkdir()
    events = [f"{step} train {10 - step / 10}" for step in range(50)]
    for step in (0, 25, 50):
        events += [f"{step} val {9 - step / 10}", f"{step} hella 0.26"]
    (folder / "log.txt").write_text("\n".join([*events, *more]) + "\n")
    facts = {
        "encoding": encoding,
        "data": {"dataset": dataset},
        "hellaswag_items": items,
        "val_tokens": val_tokens,
        "train_config": {"total_batch_size": BATCH, "sequence_length": sequence_length},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def write_log(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


# ------------------------------------------------------------------ the log


def test_any_value_is_an_event(tmp_path):
    lines = [
        b"0 val 10.9",
        b"0 ema 0.12",
        b"7 train/lr 6e-4",
        b"8 a.b-c -1",
        "9 größe 2".encode(),
        b"9 _ 3\r",
    ]
    assert curves.read_log(write_log(tmp_path, *lines) / "log.txt") == {
        "train": [],
        "val": [(0, 10.9)],
        "hella": [],
        "ema": [(0, 0.12)],
        "train/lr": [(7, 6e-4)],
        "a.b-c": [(8, -1.0)],
        "größe": [(9, 2.0)],
        "_": [(9, 3.0)],
    }


NO_EVENTS = (
    *(b"", b"hello", b"1 train", b"1 train 2 3", b"1 train x", b"1 2 3", b"1 /x 2"),
    *(b"one train 2", b"1.5 train 2", b"-1 train 2", b"9999999999999 train 2"),
    *(b"1 tr\xe4in 2", b"\0\0\x001 train 2", "\N{BYTE ORDER MARK}1 train 2".encode()),
)


@pytest.mark.parametrize("line", NO_EVENTS)
def test_a_line_that_is_no_event_is_skipped_and_counted(line, tmp_path):
    log = write_log(tmp_path, b"0 train 5", line, b"2 train 4") / "log.txt"
    with open(log, "ab") as file:
        file.write(b"3 tra")
    events, notes = curves.load_log(log)
    assert events == {"train": [(0, 5.0), (2, 4.0)], "val": [], "hella": []}
    assert notes == [f"the curves leave out 1 unreadable line of {log}"]


def test_the_later_line_counts_and_steps_are_in_order(tmp_path):
    lines = (b"5 val 3", b"0 val 9", b"5 ema 1", b"5 val 2", b"0 val nan", b"3 val 4", b"5 ema inf")
    log = write_log(tmp_path, *lines) / "log.txt"
    events, notes = curves.load_log(log)
    assert events == {"train": [], "val": [(3, 4.0), (5, 2.0)], "hella": []}
    assert notes == [
        f"the curves leave out 2 non-finite values of {log}",
        f"{log} repeats 3 values; the later line counts",
    ]


def test_the_events_are_what_a_dictionary_of_the_last_values_says(tmp_path):
    rng, expected = random.Random(0), {"val": {}, "hella": {}}
    lines = []
    for _ in range(500):
        step, kind, value = rng.randrange(50), rng.choice(("train", "ema", "lr")), rng.random()
        lines.append(f"{step} {kind} {value}".encode())
        expected.setdefault(kind, {})[step] = value
    points = {kind: [(step, values[step]) for step in sorted(values)] for kind, values in expected.items()}
    assert curves.read_log(write_log(tmp_path, *lines) / "log.txt") == points


def test_a_run_still_going_is_read(tmp_path):
    folder = make_run(tmp_path / "going")
    with open(folder / "log.txt", "a") as file:
        file.write("50 train 4.9")  # copied in the middle of a line, which may go on: 4.95
    assert len(curves.read_log(folder / "log.txt")["train"]) == 50


@pytest.mark.parametrize("text", ["{", "[]", "\xe4"])
def test_a_damaged_run_json_is_named(tmp_path, text):
    folder = make_run(tmp_path / "a_run")
    (folder / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        curves.draw_runs([folder], tmp_path / "x.png")


# ------------------------------------------------------------------ the picture


@pytest.fixture
def draw(monkeypatch):
    """A function that draws runs: the panels by their title, and the notes."""
    drawn = []
    monkeypatch.setattr(curves, "save_picture", lambda figure, out: drawn.append(figure))

    def draw_runs(*folders):
        notes = curves.draw_runs(folders, "x.png")
        drawn[-1].draw_without_rendering()
        return {axis.get_title(): axis for axis in drawn[-1].axes}, notes

    return draw_runs


LOSS, HELLA = "loss, nats per token", "HellaSwag accuracy"


def texts(axis):
    return [text.get_text() for text in axis.texts]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_a_name_that_means_something_to_matplotlib_stands_in_the_legend(tmp_path, draw):
    panels, _ = draw(make_run(tmp_path / "_old"), make_run(tmp_path / "$a$"))
    assert [text.split(",")[0] for text in legend(panels[LOSS])[:2]] == ["run _old", r"\$a\$"]
    assert r"\$a\$" in panels[LOSS].figure.get_supxlabel()


def test_published_lines_stand_beside_comparable_runs_only(tmp_path, draw):
    fair = make_run(tmp_path / "fair")
    panels, notes = draw(fair)
    assert notes == []
    assert texts(panels[LOSS]) == ["OpenAI's GPT-2 (124M): 3.292"]
    assert "GPT-3 Small (125M): 0.337" in texts(panels[HELLA])
    assert [text.xy[0] for text in panels[LOSS].texts] == [1]  # at the end, the curve lies below
    assert [text.xy[0] for text in panels[HELLA].texts] == [0, 0, 1]
    panels, _ = draw(make_run(tmp_path / "other_data", dataset=None))
    assert not texts(panels[LOSS])
    assert "OpenAI's GPT-2 (124M): 0.2955" in texts(panels[HELLA])  # the same items, whatever the model read
    panels, _ = draw(fair, make_run(tmp_path / "few", items=3243))
    assert texts(panels[HELLA]) == ["chance: 0.25"]
    for name, changes in (("few_tokens", {"val_tokens": 8192}), ("short_rows", {"sequence_length": 256})):
        assert not texts(draw(make_run(tmp_path / name, **changes))[0][LOSS])
    panels, _ = draw(make_run(tmp_path / "bytes", encoding="bytes"))
    assert not any("OpenAI" in text for axis in panels.values() for text in texts(axis))


def test_the_usual_kinds_have_one_panel_or_two(tmp_path, draw):
    panels, _ = draw(make_run(tmp_path / "a_run"))
    assert list(panels) == [LOSS, HELLA]
    assert legend(panels[LOSS]) == ["training", "validation: 4.000"]
    assert legend(panels[HELLA]) == ["0.260 ± 0.004, 10,042 items"]
    raw, smoothed, validation, _ = panels[LOSS].lines
    assert list(raw.get_xdata()) == [BATCH * (step + 1) for step in range(50)]  # after the step
    assert list(raw.get_ydata()) == [10 - step / 10 for step in range(50)]
    assert list(smoothed.get_ydata()) == pytest.approx(list(raw.get_ydata()))  # too few to smooth
    assert list(validation.get_xydata().flat) == [0, 9, 25 * BATCH, 6.5, 50 * BATCH, 4]
    assert panels[LOSS].get_xlabel() == "tokens trained on"
    width, height = panels[LOSS].get_figure().get_size_inches()
    assert (width, height) == (13, 5.5)
    panels, _ = draw(write_log(tmp_path / "a_log", b"0 val 3"))
    assert list(panels) == [LOSS]
    assert panels[LOSS].get_xlabel() == "steps trained on"
    assert tuple(panels[LOSS].get_figure().get_size_inches()) == (8, 5.5)


def test_a_run_beside_one_of_the_tutorials_is_drawn_over_steps(tmp_path, draw):
    """...which does not record how many tokens they have."""
    panels, notes = draw(
        make_run(tmp_path / "ours"), write_log(tmp_path / "tutorial", b"0 val 9", b"50 val 4")
    )
    assert panels[LOSS].get_xlabel() == "steps trained on"
    ours, tutorials = [line.get_xdata() for line in panels[LOSS].lines if line.get_marker() == "o"]
    assert list(ours) == [0, 25, 50]
    assert list(tutorials) == [0, 50]
    assert notes == ["the curves are over steps, since not every run records how many tokens a step has"]


def test_scores_on_other_items_have_no_band(tmp_path, draw):
    """--hellaswag_limit was changed at step 25: the standard error of the score before that is not known."""
    folder = make_run(tmp_path / "a_run")
    for since, first in ((0, 0), (25, 25 * BATCH)):
        facts = json.loads((folder / "run.json").read_text()) | {"hella_since": since}
        (folder / "run.json").write_text(json.dumps(facts))
        panels, _ = draw(folder)
        (band,) = panels[HELLA].collections
        assert band.get_paths()[0].vertices[:, 0].min() == first
        (line,) = [line for line in panels[HELLA].lines if line.get_marker() == "o"]
        assert len(line.get_xdata()) == 3


def test_the_axis_fits_what_follows_the_first_fall(tmp_path, draw):
    """...of 2% of the run."""
    losses = [b"%d train %d" % (step, 9 if step < 2 else 4 - (step > 40)) for step in range(101)]
    panels, _ = draw(write_log(tmp_path / "a_log", *losses))
    assert panels[LOSS].get_ylim() == pytest.approx((2.93, 4.07))


@pytest.mark.filterwarnings("error")
def test_the_first_picture_of_a_run_has_room(tmp_path, draw):
    """OpenAI's loss lies far below: its label would take the panel's place."""
    panels, _ = draw(make_run(tmp_path / "a_run"))
    before = panels[LOSS].get_position().bounds
    log = tmp_path / "a_run/log.txt"
    log.write_text("0 val 10.98\n0 hella 0.26\n")
    panels, _ = draw(tmp_path / "a_run")
    assert panels[LOSS].get_position().bounds == pytest.approx(before, abs=0.05)


@pytest.mark.filterwarnings("error")
def test_any_other_kind_has_a_panel_of_its_own(tmp_path, draw):
    """...of the values in the log, over the same tokens as the losses; none covers another."""
    dense = [(step, math.sin(step) + step / 40) for step in range(400)]
    more = [f"{step} ema {value}" for step, value in dense] + ["7 b/acc -3", "25 b/acc 1e-9", "9 once 0"]
    a, b = make_run(tmp_path / "a", more=more), make_run(tmp_path / "b", more=["30 ema 9"])
    panels, notes = draw(a)
    assert (list(panels), notes) == ([LOSS, HELLA, "ema", "b/acc", "once"], [])
    raw, smoothed = panels["ema"].lines
    assert [tuple(point) for point in raw.get_xydata()] == [(BATCH * step, value) for step, value in dense]
    assert list(smoothed.get_ydata()) == curves.smooth([value for _, value in dense], 5)
    assert legend(panels["ema"]) == [f"{dense[-1][1]:.4g}"]
    assert [tuple(point) for point in panels["b/acc"].lines[0].get_xydata()] == [
        (7 * BATCH, -3),
        (25 * BATCH, 1e-9),
    ]
    assert panels["once"].lines[1].get_marker() == "."  # a line of one point can't be seen
    assert len({axis.get_xlim() for title, axis in panels.items() if title != HELLA}) == 1
    boxes = [axis.get_tightbbox() for axis in panels.values()]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    together, _ = draw(a, b)
    assert list(together) == list(panels)
    assert legend(together["ema"]) == [
        f"{dense[-1][1]:.4g}",
        "9",
    ]  # the colors are those of the losses' legend
    colors = [line.get_color() for line in together["ema"].lines]
    assert colors == ["C0", "C0", "C1", "C1"]


@pytest.mark.filterwarnings("error")
def test_seven_more_kinds_have_four_rows(tmp_path, draw):
    panels, _ = draw(write_log(tmp_path / "a_log", b"0 val 3", *(b"%d kind_%d 1" % (i, i) for i in range(7))))
    assert list(panels)[1:] == [f"kind_{i}" for i in range(7)]
    boxes = [axis.get_tightbbox() for axis in panels.values()]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert len({round(box.x0) for box in boxes[1:]}) == 2
    assert panels[LOSS].get_figure().get_size_inches()[1] == 5.5 + 4 * 2.4


def test_rate_and_norm_have_names_and_a_new_plan_has_no_panel(tmp_path, draw):
    run = make_run(tmp_path / "a", more=["0 lr 1e-3", "0 norm 2", "8 max_steps 40", "8 cooldown 0.5"])
    panels, notes = draw(run)
    assert (list(panels), notes) == ([LOSS, HELLA, "learning rate", "gradient norm"], [])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"schedule": "trapezoid", "max_steps": 10_000, "cooldown": 0.4},
         "constant until step 6,000, then down to 0 at step 10,000"),
        ({"schedule": "cosine", "max_steps": 19_073}, "a cosine down to a tenth at step 19,073"),
        ({"schedule": "trapezoid", "max_steps": None, "cooldown": 0.4}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_plan_in_words(config, words):
    assert curves.plan_of(config) == words


def test_smoothing_is_a_running_mean():
    assert curves.smooth([1, 2, 6, 4, 0], 2) == [1, 3, 2.6, 3, 10 / 3]
    assert curves.smooth([5, 1], 0) == [5, 1]
    assert curves.smooth([], 3) == []


def test_the_standard_error_of_an_accuracy():
    assert curves.standard_error(0.3, 10_042) == pytest.approx(0.00457, abs=1e-5)
    assert curves.standard_error(0.3, None) == 0
    assert curves.standard_error(3.5, 10) == 0  # somebody's value of another kind


def test_the_caption_says_what_made_the_curves():
    result = {"training_hours": 2.4, "other_hours": 0.1}
    run = {"parameters": 124_439_808, "device": "NVIDIA A100", "world_size": 8, "result": result}
    assert curves.caption("a_run", run) == "a_run, 124.4M parameters, 8 x NVIDIA A100, 2.5 hours"
    assert curves.caption("a_run", {}) == "a_run"


# ------------------------------------------------------------------ the command


def test_runs_are_drawn_together_and_the_tutorials_logs_too(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "run.json").unlink()  # the tutorial leaves only a log
    done = run("plot.py", "run", a, b, f"--out={tmp_path / 'both.png'}")
    assert "drew" in done.stdout
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_leaves_the_runs_own_pictures(tmp_path, monkeypatch):
    """...and says when losses are per byte and per token."""
    monkeypatch.chdir(tmp_path)
    tokens, in_bytes = make_run(tmp_path / "a"), make_run(tmp_path / "b", encoding="bytes")
    done = call("plot.py", "run", tokens, in_bytes)
    assert (tmp_path / "runs.png").exists()
    assert not (tokens / "loss.png").exists()
    assert done.stderr == "note: these losses can't be compared, some are per byte and some per token\n"
    assert call("plot.py", "run", tokens).stderr == ""
    assert (tokens / "loss.png").exists()


def test_what_a_picture_leaves_out_is_said(tmp_path):
    folder = make_run(tmp_path / "a_run", more=["hello", "250 lr", "7 ema nan"])
    done = call("plot.py", "run", folder)
    log = folder / "log.txt"
    assert done.stderr == f"note: the curves leave out 2 unreadable lines and 1 non-finite value of {log}\n"
    assert (folder / "loss.png").exists()


def test_a_log_without_events_is_refused(tmp_path):
    empty, nan = write_log(tmp_path / "empty"), write_log(tmp_path / "nan", b"0 val nan", b"0 hella inf")
    done = call("plot.py", "run", empty, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {empty / 'log.txt'} holds no events yet\n")
    done = call("plot.py", "run", make_run(tmp_path / "a_run"), nan, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {nan / 'log.txt'} holds no events yet; the curves leave out 2 non")


def test_what_is_no_run_and_no_picture_is_named(tmp_path):
    make_run(tmp_path / "a_run")
    with pytest.raises(InputError, match=r"holds no run.*did you mean .*a_run\?"):
        curves.draw_runs([tmp_path], tmp_path / "x.png")
    for out in ("x.docx", "nowhere/x.png"):
        with pytest.raises(InputError, match=out.split("/")[0]):
            curves.draw_runs([tmp_path / "a_run"], tmp_path / out)


def test_positions(tmp_path):
    config = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=16, encoding="bytes")
    model = tmp_path / r"$\a$"  # would be read as mathematics, and is none
    GPT(config).save_pretrained(model)
    call("plot.py", "positions", model, "--out", tmp_path / "wpe.png")
    assert (tmp_path / "wpe.png").read_bytes().startswith(b"\x89PNG")


def test_a_backend_that_matplotlib_does_not_have(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    done = run("plot.py", "run", tmp_path, check=False, env={"MPLBACKEND": "foo"})
    assert done.stderr == "error: MPLBACKEND is 'foo', which is no backend of matplotlib; unset it\n"
