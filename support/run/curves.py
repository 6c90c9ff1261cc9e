"""Read and plot a run's log, with published values where the comparison is fair."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from support.cli import InputError, in_words, plural
from support.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # (step, value), in the order of the steps

USUAL_KINDS = ("train", "val", "hella")  # the kinds of events that every run logs
# A line of log.txt: step, kind, value. Any name in Python may be a kind. A step has at most 12 digits: times
# a batch, it still fits 64 bits.
EVENT = re.compile(r"\s*([0-9]{1,12})\s+([^\W\d][\w./-]*)\s+(\S+)\s*")
MOST_PANELS = 6  # in a picture, for kinds that are not usual

# Published values, plotted only beside comparable runs.
GPT2_VAL_LOSS = 3.2924  # OpenAI's 124M on FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = 0.2955  # OpenAI's 124M, acc_norm, tutorial protocol (build-nanogpt, hellaswag.py)
GPT3_HELLASWAG = 0.337  # GPT-3 Small (GPT-3 paper, table H.1)
ALL_HELLASWAG_ITEMS = 10_042
GPT2_VAL_LOSS_CONFIG = "sample-10BT"  # FineWeb-Edu's: the validation shard of another one is another text
GPT2, GPT3 = "OpenAI's GPT-2 (124M)", "GPT-3 of the same size"  # labels

# -----------------------------------------------------------------------------
# a run's files


class Log:
    """The events in the lines of a log.txt, and how many lines are none."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {kind: {} for kind in USUAL_KINDS}  # by kind and step
        self.unreadable = 0  # lines that are not events

    def add(self, lines: bytes) -> None:
        """Read lines, without an incomplete one at the end. An event replaces an earlier one of the same step
        and kind."""
        for line in lines.split(b"\n")[:-1]:
            try:
                step, kind, value = read_event(line)
                self.values.setdefault(kind, {})[step] = value
            except ValueError:
                self.unreadable += 1

    @property
    def events(self) -> dict[str, Points]:
        """The finite values by kind, in the order of their steps: "train", "val" and "hella" always, any
        other kind if it has values."""
        points = {
            kind: sorted((step, value) for step, value in values.items() if math.isfinite(value))
            for kind, values in self.values.items()
        }
        return {kind: found for kind, found in points.items() if found or kind in USUAL_KINDS}

    def left_out(self, name: str) -> list[str]:
        """A sentence on what `events` lacks of the log called `name`; none if it lacks nothing."""
        values = itertools.chain.from_iterable(by_step.values() for by_step in self.values.values())
        not_finite = sum(not math.isfinite(value) for value in values)
        counts = {"unreadable line": self.unreadable, "non-finite value": not_finite}
        parts = [plural(n, noun) for noun, n in counts.items() if n]
        return [f"the curves leave out {' and '.join(parts)} of {name}"] if parts else []


def read_event(line: bytes) -> tuple[int, str, float]:
    """The step, the kind and the value in a line of log.txt. Raises ValueError for any other line."""
    match = EVENT.fullmatch(line.decode("utf-8"))
    if match is None:
        raise ValueError(f"not an event: {line!r}")
    step, kind, value = match.groups()
    return int(step), kind, float(value)


def load_log(file: Path) -> Log:
    """Read a log.txt; an incomplete last line, as in the log of a run in progress, is ignored. Raises
    InputError, with the runs that lie deeper, if there is no such file."""
    log = Log()
    try:
        log.add(file.read_bytes())
    except OSError as error:
        folder = file.parent
        runs = [path for path in sorted(folder.glob("*")) if (path / file.name).exists()]
        hint = f"; did you mean {' or '.join(map(str, runs[:3]))}?" if runs else ""
        raise InputError(f"{folder} holds no run ({in_words(error)}){hint}") from error
    return log


def read_log(file: Path) -> dict[str, Points]:
    """The events of a log.txt by kind, see `Log.events`. Raises InputError if there is no such file."""
    return load_log(file).events


def read_run(folder: Path) -> dict[str, Any]:
    """The contents of a run's run.json; empty if it has none (the tutorial's runs). Raises InputError if it
    is damaged."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("not an object")
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'}: damaged ({error})") from error
    return run


def read_status(folder: Path) -> dict[str, Any]:
    """The contents of a run's status.json; empty if it has none or it is damaged."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and isinstance(status.get("events"), list) else {}


# -----------------------------------------------------------------------------
# published values


def comparable_loss(run: dict[str, Any]) -> bool:
    """Whether a run's loss is comparable with OpenAI's: same data, same tokens. `run` is its run.json; before
    version 1.1 it did not tell the dataset's config."""
    data = {"config": GPT2_VAL_LOSS_CONFIG, **run.get("data", {})}
    same = (data.get("dataset"), data["config"]) == ("HuggingFaceFW/fineweb-edu", GPT2_VAL_LOSS_CONFIG)
    return run.get("encoding") == "gpt2" and same


def comparable_hellaswag(run: dict[str, Any]) -> bool:
    """Whether a run's HellaSwag scores are comparable with OpenAI's: same tokens, all items."""
    return run.get("encoding") == "gpt2" and run.get("hellaswag_items") == ALL_HELLASWAG_ITEMS


def published_values(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    """The published values that all these runs can be compared with, as (label, value), for "loss" and
    "hella". `runs` are their run.json."""
    hella = [(GPT2, GPT2_HELLASWAG), (GPT3, GPT3_HELLASWAG)]
    return {
        "loss": [(GPT2, GPT2_VAL_LOSS)] if all(map(comparable_loss, runs)) else [],
        "hella": [*(hella if all(map(comparable_hellaswag, runs)) else []), ("chance", 0.25)],
    }


def standard_error(accuracy: float, n: int | None) -> float:
    """The standard error of an accuracy, from 0 to 1, on n items; 0 if n is unknown."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / n) if n else 0.0


# -----------------------------------------------------------------------------
# the picture


class DrawnRun(NamedTuple):
    """A run in a picture."""

    folder: Path
    events: dict[str, Points]  # its log
    facts: dict[str, Any]  # its run.json
    color: str
    label: str  # begins the labels of its curves: its name and a comma, or nothing if it is alone

    def tokens(self, steps: Sequence[int]) -> list[int]:
        """The tokens trained on before these steps; the steps themselves, if a batch's size is unknown."""
        batch = self.facts.get("train_config", {}).get("total_batch_size") or 1
        return [step * batch for step in steps]


def draw_runs(folders: Sequence[Path], out: Path, refuse_empty: bool = False) -> list[str]:
    """Plot the runs in `folders` to the image file `out`. Returns notes for the reader, a sentence each.

    Raises InputError for a folder without a run, a damaged run.json, an `out` that can't be written, and
    with `refuse_empty` for a log without events.
    """
    from matplotlib.figure import Figure

    runs, notes = load_runs(folders, refuse_empty)
    units = sorted({"byte" if run.facts.get("encoding") == "bytes" else "token" for run in runs})
    if len(units) > 1:
        notes.append("these losses can't be compared, some are per byte and some per token")
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.events if kind not in USUAL_KINDS))
    if left_over := kinds[MOST_PANELS:]:
        notes.append(f"the picture has room for {MOST_PANELS} more kinds; it lacks {', '.join(left_over)}")
        kinds = kinds[:MOST_PANELS]
    has_scores = any(run.events["hella"] for run in runs)
    columns = min(len(kinds), 3 if has_scores else 2)  # of small panels, one for each of the kinds
    rows = math.ceil(len(kinds) / max(columns, 1))

    figure = Figure(figsize=(13 if has_scores else 8, 5.5 + 2.4 * rows), dpi=120, layout="constrained")
    above = below = figure
    if kinds:
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(5.5, 2.4 * rows))
    large = above.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    draw_losses(large[0], runs)
    large[0].set_title(f"loss, nats per {' or '.join(units)}", fontsize=15)
    if has_scores:
        draw_scores(large[1], runs)
        large[1].set_title("HellaSwag accuracy", fontsize=15)
    for axis in large:
        finish(axis, runs, 12)
    for i, kind in enumerate(kinds, 1):
        axis = below.add_subplot(rows, columns, i, sharex=large[0])
        for run in runs:
            draw_curve(axis, run, kind)
        axis.set_title(kind, fontsize=12)
        finish(axis, runs, 9)
    captions = [caption(run.folder, run.facts) for run in runs]
    below.supxlabel("\n".join(captions), fontsize=10, color="dimgray")
    save_picture(figure, out)
    return notes


def load_runs(folders: Sequence[Path], refuse_empty: bool) -> tuple[list[DrawnRun], list[str]]:
    """The runs in `folders`, and notes on lines that no curve shows. Raises InputError, see `draw_runs`."""
    runs, notes = [], []
    for i, folder in enumerate(folders):
        file = folder / "log.txt"
        log = load_log(file)
        events = log.events
        left_out = log.left_out(str(file))
        if refuse_empty and not any(events.values()):
            raise InputError("; ".join([f"{file} holds no events yet", *left_out]))
        label = f"{folder.resolve().name}, " if len(folders) > 1 else ""
        runs.append(DrawnRun(folder, events, read_run(folder), f"C{i}", label))
        notes += left_out
    return runs, notes


def draw_losses(axis: "Axes", runs: Sequence[DrawnRun]) -> None:
    """Plot the training losses, and the validation losses with markers, beside OpenAI's."""
    late = []
    for run in runs:
        draw_curve(axis, run, "train")
        if run.events["val"]:
            steps, losses = zip(*run.events["val"], strict=True)
            label = f"{run.label}validation: {losses[-1]:.3f}"
            (line,) = axis.plot(run.tokens(steps), losses, "o-", color=run.color, linewidth=1.2, label=label)
            line.set(markersize=6, markeredgecolor="black", markeredgewidth=0.8)
        points = [*run.events["train"], *run.events["val"]]
        last_step = max((step for step, _ in points), default=0)
        late += [loss for step, loss in points if step >= last_step / 50]
    for label, value in published_values([run.facts for run in runs])["loss"]:
        draw_published(axis, value, label)
    if late:  # the axis fits the losses after the first 2% of the run: before that, they only fall
        margin = 0.05 * (max(late) - min(late)) + 0.02
        axis.set_ylim(min(late) - margin, max(late) + margin)


def draw_scores(axis: "Axes", runs: Sequence[DrawnRun]) -> None:
    """Plot HellaSwag's acc_norm beside published scores, with a standard-error band where the number of items
    is known."""
    for run in runs:
        if not run.events["hella"]:
            continue
        steps, scores = zip(*run.events["hella"], strict=True)
        n = run.facts.get("hellaswag_items")
        tokens = run.tokens(steps)
        errors = [standard_error(score, n) for score in scores]
        label = f"{run.label}{scores[-1]:.3f}" + (f" ± {errors[-1]:.3f}, {n:,} items" if n else "")
        axis.plot(tokens, scores, "o-", color=run.color, markersize=5, linewidth=2, label=label)
        low = [score - error for score, error in zip(scores, errors, strict=True)]
        high = [score + error for score, error in zip(scores, errors, strict=True)]
        axis.fill_between(tokens, low, high, color=run.color, alpha=0.15, linewidth=0)
    for label, value in published_values([run.facts for run in runs])["hella"]:
        draw_published(axis, value, label, "right" if label == "chance" else "left")


def draw_curve(axis: "Axes", run: DrawnRun, kind: str) -> None:
    """Plot the values of a kind, smoothed over 1/40 of the run, with the raw curve behind it. The label of
    the training loss is its name; that of any other kind, whose panel has its name, is the last value."""
    if kind not in run.events or not run.events[kind]:
        return
    steps, values = zip(*run.events[kind], strict=True)
    if kind == "train":
        tokens = run.tokens([step + 1 for step in steps])  # a training loss is logged after its step
        label, marker = f"{run.label}training", ""
    else:
        tokens = run.tokens(steps)
        label, marker = f"{values[-1]:.4g}", "." if len(steps) <= 100 else ""
    axis.plot(tokens, values, color=run.color, alpha=0.18, linewidth=0.7)
    smoothed = smooth(values, len(values) // 80)
    axis.plot(tokens, smoothed, color=run.color, linewidth=2, alpha=0.7, label=label, marker=marker)


def smooth(values: Sequence[float], span: int) -> list[float]:
    """A moving average over `span` values on each side. At the start, where values fall fast, the window
    shrinks on both sides; at the end, only on the right."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        first, end = i - min(span, i), min(len(values), i + min(span, i) + 1)
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def draw_published(axis: "Axes", value: float, label: str, side: str = "right") -> None:
    """Draw a horizontal line, labelled on the side where no curve is."""
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
        fontsize=12,
        annotation_clip=True,  # none outside of the panel: the layout would make room for it
    )


def finish(axis: "Axes", runs: Sequence[DrawnRun], size: int) -> None:
    """Add what all panels have: the unit below, a grid, a legend. `size` is that of the text, in points."""
    from matplotlib.ticker import EngFormatter

    units = {"tokens" if "train_config" in run.facts else "steps" for run in runs}
    axis.set_xlabel(" / ".join(sorted(units)) + " trained on", fontsize=size + 1)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M, 10G
    axis.tick_params(labelsize=size)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=size, framealpha=0.8, edgecolor="none")


def caption(folder: Path, run: dict[str, Any]) -> str:
    """A run's name, size, hardware and, once it is finished, duration."""
    facts = [folder.resolve().name]
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
