"""Read and plot a run's log, with published values where the comparison is fair."""

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from support.cli import InputError, in_words, plural
from support.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # (step, value), by step

USUAL_KINDS = ("train", "val", "hella")  # These kinds of events share the large panels.
TITLES = {"lr": "learning rate", "norm": "gradient norm"}  # of small panels; any other kind is its own title
NOT_DRAWN = ("max_steps", "cooldown")  # A run whose length was changed logs its new plan.
# A line of log.txt: step, kind, value. Any name in Python may be a kind. A step of at most 12 digits, times a
# batch, fits 64 bits.
EVENT = re.compile(r"\s*([0-9]{1,12})\s+([^\W\d][\w./-]*)\s+(\S+)\s*")

# Published values, plotted only beside comparable runs.
# OpenAI's 124M on so many tokens of FineWeb-Edu's validation shard, in rows of so many (build-nanogpt,
# play.ipynb).
GPT2_VAL_LOSS, VAL_TOKENS, VAL_ROW = 3.2924, 10_485_760, 1024
GPT2_HELLASWAG = 0.2955  # OpenAI's 124M, acc_norm, tutorial protocol (build-nanogpt, hellaswag.py)
GPT3_HELLASWAG = 0.337  # GPT-3 Small (GPT-3 paper, table H.1)
ALL_HELLASWAG_ITEMS = 10_042
GPT2_VAL_LOSS_CONFIG = "sample-10BT"  # another config of FineWeb-Edu has another validation shard
GPT2, GPT3 = "OpenAI's GPT-2 (124M)", "GPT-3 Small (125M)"  # labels of published values

# -----------------------------------------------------------------------------
# a run's files


def read_event(line: bytes) -> tuple[int, str, float] | None:
    """The step, the kind and the value in a line of log.txt; None for any other line."""
    try:
        match = EVENT.fullmatch(line.decode("utf-8"))
        return (int(match[1]), match[2], float(match[3])) if match else None
    except ValueError:  # not UTF-8, or not a number
        return None


def load_log(file: Path) -> tuple[dict[str, Points], list[str]]:
    """The events of a log.txt: finite values by kind, in the order of their steps; and notes if some lines
    are left out or replaced. "train", "val" and "hella" are always among the kinds.

    A later line replaces an earlier one of the same step and kind. An incomplete last line is ignored: the
    run may be writing it. Raises InputError, with the runs that lie deeper, if there is no such file.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        runs = [path for path in sorted(file.parent.glob("*")) if (path / file.name).exists()]
        hint = f"; did you mean {' or '.join(map(str, runs[:3]))}?" if runs else ""
        raise InputError(f"{file.parent} holds no run ({in_words(error)}){hint}") from error
    found = [read_event(line) for line in lines]
    last = {(step, kind): value for step, kind, value in filter(None, found)}
    events: dict[str, Points] = {kind: [] for kind in USUAL_KINDS}
    for (step, kind), value in sorted(last.items(), key=lambda item: item[0][0]):
        if math.isfinite(value):
            events.setdefault(kind, []).append((step, value))
    not_finite = len(last) - sum(map(len, events.values()))
    counts = {"unreadable line": found.count(None), "non-finite value": not_finite}
    parts = [plural(n, noun) for noun, n in counts.items() if n]
    notes = [f"the curves leave out {' and '.join(parts)} of {file}"] if parts else []
    if again := len(found) - found.count(None) - len(last):
        notes.append(f"{file} repeats {plural(again, 'value')}; the later line counts")
    return events, notes


def read_log(file: Path) -> dict[str, Points]:
    """The events of a log.txt by kind, see `load_log`."""
    return load_log(file)[0]


def read_run(folder: Path) -> dict[str, Any]:
    """The contents of a run's run.json; empty if it has none (the tutorial's runs). Raises InputError if it
    is damaged, OSError if it can't be read."""
    file = folder / "run.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from error
    return run


def read_status(folder: Path) -> dict[str, Any]:
    """The contents of a run's status.json; empty if it has none or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        if isinstance(status, dict) and isinstance(status.get("events"), list):
            return status
    return {}


def epochs(run: dict[str, Any], tokens: float) -> float:
    """How often a run has read its training data after so many tokens; of a mix, the part that it reads most
    often. `run` is a run.json."""
    parts: dict[str, float] = run["data"].get("epochs_a_token", {})
    return tokens * max(parts.values(), default=1 / run["data"]["train_tokens"])


def measured_alike(run: dict[str, Any], events: dict[str, Points], kind: str) -> dict[int, float]:
    """The values of a log's "val" or "hella" by step, without those before --val_tokens or --hellaswag_limit
    was changed. `run` is a run.json."""
    since = run.get(f"{kind}_since", 0)
    return {step: value for step, value in events[kind] if step >= since}


def unit_of(run: dict[str, Any]) -> str:
    """What a loss is per. `run` is a run.json."""
    return "byte" if run.get("encoding") == "bytes" else "token"


# -----------------------------------------------------------------------------
# published values


def comparable_loss(run: dict[str, Any]) -> bool:
    """Whether a run's loss is comparable with OpenAI's: same data, same tokens, rows as long. `run` is its
    run.json; before version 1.1 it did not tell the dataset's config."""
    data = {"config": GPT2_VAL_LOSS_CONFIG, **run.get("data", {})}
    same_data = (data.get("dataset"), data["config"]) == ("HuggingFaceFW/fineweb-edu", GPT2_VAL_LOSS_CONFIG)
    row = run.get("train_config", {}).get("sequence_length", VAL_ROW)
    same_rows = (run.get("val_tokens", VAL_TOKENS), row) == (VAL_TOKENS, VAL_ROW)
    return run.get("encoding") == "gpt2" and same_data and same_rows


def comparable_hellaswag(run: dict[str, Any]) -> bool:
    """Whether a run's HellaSwag scores are comparable with OpenAI's: same tokens, all items."""
    return run.get("encoding") == "gpt2" and run.get("hellaswag_items") == ALL_HELLASWAG_ITEMS


def published_values(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, float, str]]]:
    """The published values that all these runs can be compared with, for "val" and "hella": label, value,
    and the side of a picture where no curve is. `runs` are their run.json."""
    hella = [(GPT2, GPT2_HELLASWAG, "left"), (GPT3, GPT3_HELLASWAG, "left")]
    return {
        "val": [(GPT2, GPT2_VAL_LOSS, "right")] if all(map(comparable_loss, runs)) else [],
        "hella": [*(hella if all(map(comparable_hellaswag, runs)) else []), ("chance", 0.25, "right")],
    }


def standard_error(accuracy: float, n: int | None) -> float:
    """The standard error of an accuracy, from 0 to 1, on n items; 0 if n is unknown."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / n) if n else 0.0


# -----------------------------------------------------------------------------
# the picture


class DrawnRun(NamedTuple):
    """A run in a picture."""

    folder: Path
    events: dict[str, Points]  # log.txt
    facts: dict[str, Any]  # run.json
    color: str
    label: str  # how curves' labels begin: the run's name and a comma, or nothing for a run alone
    batch: int | None  # tokens of a step; None: the axis counts steps

    def curve(self, kind: str) -> tuple[list[int], list[float]]:
        """The tokens, or steps, trained on before each value of a kind; and the values."""
        points = self.events.get(kind, [])
        shift = kind == "train"  # a training loss is logged after its step
        return [(step + shift) * (self.batch or 1) for step, _ in points], [value for _, value in points]

    def late_losses(self) -> list[float]:
        """The losses after the first 2% of the run, which the axis fits: before that, they only fall."""
        points = [*self.events["train"], *self.events["val"]]
        last_step = max((step for step, _ in points), default=0)
        return [loss for step, loss in points if step >= last_step / 50]


def new_figure(**options: Any) -> "Figure":
    """A figure. Raises InputError if the environment names a backend that matplotlib does not have."""
    try:
        from matplotlib.figure import Figure
    except ValueError as error:
        name = os.environ.get("MPLBACKEND")
        raise InputError(f"MPLBACKEND is {name!r}, which is no backend of matplotlib; unset it") from error
    return Figure(**options)


def draw_runs(folders: Sequence[Path], out: Path) -> list[str]:
    """Plot the runs in `folders` to the image file `out`. Returns notes for the reader, a sentence each.

    Raises InputError for a folder without a run, a log without events, a damaged run.json, and an `out` that
    can't be written.
    """
    runs, notes = [], []
    facts = [read_run(folder) for folder in folders]
    batches = [run.get("train_config", {}).get("total_batch_size") for run in facts]
    in_tokens = all(batches)  # the tutorial's runs don't record it
    for i, folder in enumerate(folders):
        events, left_out = load_log(folder / "log.txt")
        if not any(events.values()):
            raise InputError("; ".join([f"{folder / 'log.txt'} holds no events yet", *left_out]))
        name = name_of(folder)
        # matplotlib leaves out a label with a leading "_".
        label = f"{'run ' * name.startswith('_')}{name}, " if len(folders) > 1 else ""
        batch = batches[i] if in_tokens else None
        runs.append(DrawnRun(folder, events, facts[i], f"C{i}", label=label, batch=batch))
        notes += left_out
    if any(batches) and not in_tokens:
        notes.append("the curves are over steps, since not every run records how many tokens a step has")
    units = sorted({unit_of(run.facts) for run in runs})
    if len(units) > 1:
        notes.append("these losses can't be compared, some are per byte and some per token")
    logged = dict.fromkeys(kind for run in runs for kind in run.events)
    kinds = [kind for kind in logged if kind not in USUAL_KINDS + NOT_DRAWN]
    has_scores = any(run.events["hella"] for run in runs)
    columns = max(1, min(len(kinds), 3 if has_scores else 2))  # small panels side by side, one for a kind
    rows = math.ceil(len(kinds) / columns)

    figure = new_figure(figsize=(13 if has_scores else 8, 5.5 + 2.4 * rows), dpi=120, layout="constrained")
    grid = figure.add_gridspec(1 + rows, 6, height_ratios=[5.5, *rows * [2.4]])
    losses = figure.add_subplot(grid[0, : 3 if has_scores else 6])
    draw_panel(losses, runs, f"loss, nats per {' or '.join(units)}", ["train", "val"])
    if late := [loss for run in runs for loss in run.late_losses()]:
        margin = 0.05 * (max(late) - min(late)) + 0.02
        losses.set_ylim(min(late) - margin, max(late) + margin)
    if has_scores:
        draw_panel(figure.add_subplot(grid[0, 3:]), runs, "HellaSwag accuracy", ["hella"])
    width = 6 // columns
    for i, kind in enumerate(kinds):
        row, left = 1 + i // columns, width * (i % columns)
        axis = figure.add_subplot(grid[row, left : left + width], sharex=losses)
        draw_panel(axis, runs, TITLES.get(kind, kind), [kind], text=9)
    captions = [caption(name_of(run.folder), run.facts) for run in runs]
    figure.supxlabel("\n".join(captions), fontsize=10, color="dimgray")
    save_picture(figure, out)
    return notes


def name_of(folder: Path) -> str:
    """A folder's name for a picture."""
    return as_text(folder.resolve().name)


def as_text(name: str) -> str:
    """A name for a picture: matplotlib reads mathematics between two "$"."""
    return name.replace("$", r"\$")


def draw_panel(
    axis: "Axes", runs: Sequence[DrawnRun], title: str, kinds: Sequence[str], text: int = 12
) -> None:
    """Plot some kinds of all runs, beside published values. `text` is its size in points."""
    from matplotlib.ticker import EngFormatter

    published = published_values([run.facts for run in runs])
    for kind in kinds:
        for run in runs:
            draw_curve(axis, run, kind)
        for label, value, side in published.get(kind, []):
            color = {GPT2: "firebrick", GPT3: "seagreen"}.get(label, "gray")
            axis.axhline(value, color=color, linestyle="--", linewidth=1.4)
            axis.annotate(
                f"{label}: {value:.4g}",
                (side == "right", value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha=side,
                color=color,
                fontsize=text,
                annotation_clip=True,  # The layout would make room for a label outside of the panel.
            )
    axis.set_title(title, fontsize=text + 3)
    axis.set_xlabel(f"{'tokens' if runs[0].batch else 'steps'} trained on", fontsize=text + 1)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M, 10G
    axis.tick_params(labelsize=text)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=text, framealpha=0.8, edgecolor="none")


def draw_curve(axis: "Axes", run: DrawnRun, kind: str) -> None:
    """Plot the values of a kind: evaluations with markers, HellaSwag's scores also with a band of their
    standard error; anything else smoothed over 1/40 of the run, with the raw curve behind it."""
    tokens, values = run.curve(kind)
    if not values:
        return
    n = run.facts.get("hellaswag_items") if kind == "hella" else None
    error = standard_error(values[-1], n)
    labels = {
        "train": f"{run.label}training",
        "val": f"{run.label}validation: {values[-1]:.3f}",
        "hella": f"{run.label}{values[-1]:.3f}" + (f" ± {error:.3f}, {n:,} items" if n else ""),
    }
    label = labels.get(kind, f"{values[-1]:.4g}")
    if kind in ("val", "hella"):
        axis.plot(tokens, values, "o-", color=run.color, markeredgecolor="black", label=label)
    else:
        marker = "." if kind != "train" and len(values) <= 100 else ""
        axis.plot(tokens, values, color=run.color, alpha=0.18, linewidth=0.7)
        smoothed = smooth(values, len(values) // 80)
        axis.plot(tokens, smoothed, color=run.color, linewidth=2, alpha=0.7, label=label, marker=marker)
    if n:
        alike = len(measured_alike(run.facts, run.events, kind))
        tokens, values = tokens[len(tokens) - alike :], values[len(values) - alike :]
        low, high = ([value + sign * standard_error(value, n) for value in values] for sign in (-1, 1))
        axis.fill_between(tokens, low, high, color=run.color, alpha=0.15, linewidth=0)


def smooth(values: Sequence[float], span: int) -> list[float]:
    """A moving average over `span` values on each side. At the start, where values fall fast, the window
    shrinks on both sides; at the end, only on the right."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        first, end = i - min(span, i), min(len(values), i + min(span, i) + 1)
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def plan_of(config: dict[str, Any]) -> str | None:
    """A train_config's course of the learning rate, in words; None if there is none."""
    try:
        end = config["max_steps"]
        if config["schedule"] == "cosine":
            return f"a cosine down to a tenth at step {end:,}"
        falls = round((1 - config["cooldown"]) * end)
        return f"constant until step {falls:,}, then down to 0 at step {end:,}"
    except (KeyError, TypeError):
        return None


def caption(name: str, run: dict[str, Any]) -> str:
    """A run's name, size, hardware and, once it is finished, duration."""
    facts = [name] if name else []
    if "parameters" in run:
        facts.append(f"{run['parameters'] / 1e6:,.1f}M parameters")
    if "device" in run:
        processes = f"{run['world_size']} x " if run.get("world_size", 1) > 1 else ""
        facts.append(f"{processes}{run['device']}")
    if result := run.get("result"):
        hours = result["training_hours"] + result["other_hours"]
        facts.append(f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes")
    return ", ".join(facts)


def save_picture(figure: "Figure", out: Path) -> None:
    """Write `figure` to `out`, completely or not at all. Raises InputError for an unknown file type or a
    folder that can't be written to."""
    kind = out.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf", "jpg"):
        raise InputError(f"--out {out}: name a .png, .svg, .pdf or .jpg file")
    try:
        write_file(out, lambda file: figure.savefig(file, format=kind))
    except OSError as error:
        where = "" if out.parent.is_dir() else f" (there is no folder {out.parent})"
        raise InputError(f"{in_words(error)}{where}") from error
