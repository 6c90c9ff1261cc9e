"""Read and plot a run's log, with published values where the comparison is fair."""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.cli import InputError, in_words
from support.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # (step, value), in order

# Published values, plotted only beside comparable runs.
GPT2_VAL_LOSS = 3.2924  # OpenAI's 124M on FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = 0.2955  # OpenAI's 124M, acc_norm, tutorial protocol (build-nanogpt, hellaswag.py)
GPT3_HELLASWAG = 0.337  # GPT-3 Small (GPT-3 paper, table H.1)
ALL_HELLASWAG_ITEMS = 10_042
GPT2_VAL_LOSS_CONFIG = "sample-10BT"  # FineWeb-Edu's: the validation shard of another one is another text
GPT2, GPT3 = "OpenAI's GPT-2 (124M)", "GPT-3 of the same size"  # labels


def read_log(file: Path) -> dict[str, Points]:
    """The events of a log.txt by kind ("train", "val", "hella"): (step, value) pairs in order. An incomplete
    last line, as in the log of a run in progress, is ignored."""
    events: dict[str, Points] = {"train": [], "val": [], "hella": []}
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        folder = file.parent
        runs = [path for path in sorted(folder.glob("*")) if (path / file.name).exists()]
        hint = f"; did you mean {' or '.join(map(str, runs[:3]))}?" if runs else ""
        raise InputError(f"{folder} holds no run ({in_words(error)}){hint}") from error
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            kind, point = read_event(line)
            events[kind].append(point)
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}, line {number}: not 'STEP train|val|hella VALUE'") from error
    return events


def read_event(line: str) -> tuple[str, tuple[int, float]]:
    """The kind of event in a line of log.txt, and its (step, value). Raises ValueError for another line."""
    step, kind, value = line.split()
    return kind, (int(step), float(value))


def read_run(folder: Path) -> dict[str, Any]:
    """The contents of a run's run.json; empty if it has none (the tutorial's runs)."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'}: damaged ({error})") from error


def read_status(folder: Path) -> dict[str, Any]:
    """The contents of a run's status.json, see `Progress`; empty if it has none or it is damaged."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and isinstance(status.get("events"), list) else {}


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


def smooth(values: Sequence[float], span: int) -> list[float]:
    """A moving average over `span` values on each side. At the start, where values fall fast, the window
    shrinks on both sides; at the end, only on the right."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        first, end = i - min(span, i), min(len(values), i + min(span, i) + 1)
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def draw_runs(folders: list[Path], out: Path) -> None:
    """Plot the runs in `folders` to the image file `out`. Raises InputError for a folder without a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    runs = [(folder, read_log(folder / "log.txt"), read_run(folder)) for folder in folders]
    scores = any(events["hella"] for _, events, _ in runs)
    figure = Figure(figsize=(13 if scores else 8, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    loss_axis, hella_axis = axes[0], axes[-1]
    for i, (folder, events, run) in enumerate(runs):
        scale = run.get("train_config", {}).get("total_batch_size") or 1  # tokens per step
        name = f"{folder.resolve().name}, " if len(runs) > 1 else ""
        draw_losses(loss_axis, events, scale, f"C{i}", name)
        if events["hella"]:
            draw_scores(hella_axis, events["hella"], scale, f"C{i}", name, run.get("hellaswag_items"))
    lines = published_values([run for _, _, run in runs])
    for label, value in lines["loss"]:
        published(loss_axis, value, label)
    if scores:
        for label, value in lines["hella"]:
            published(hella_axis, value, label, "right" if label == "chance" else "left")
        hella_axis.set_title("HellaSwag accuracy", fontsize=15)
    # fit the axis to the losses after the first 2% of the run; before that, they only fall
    late = []
    for _, events, _ in runs:
        points = [*events["train"], *events["val"]]
        first = max((step for step, _ in points), default=0) / 50
        late += [loss for step, loss in points if step >= first and math.isfinite(loss)]
    if late:
        margin = 0.05 * (max(late) - min(late)) + 0.02
        loss_axis.set_ylim(min(late) - margin, max(late) + margin)
    per = {"byte" if run.get("encoding") == "bytes" else "token" for _, _, run in runs}
    loss_axis.set_title(f"loss, nats per {' or '.join(sorted(per))}", fontsize=15)
    if len(per) > 1:
        print("note: these losses can't be compared, some are per byte and some per token", file=sys.stderr)
    units = {"tokens" if "train_config" in run else "steps" for _, _, run in runs}
    for axis in axes:
        axis.set_xlabel(" / ".join(sorted(units)) + " trained on", fontsize=13)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M, 10G
        axis.tick_params(labelsize=12)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=12, frameon=False)
    figure.supxlabel("\n".join(caption(folder, run) for folder, _, run in runs), fontsize=10, color="dimgray")
    save_picture(figure, out)


def draw_losses(axis: "Axes", events: dict[str, Points], scale: int, color: str, name: str) -> None:
    """Plot training loss, smoothed over 1/40 of the run, with the raw curve behind it, and validation loss
    with markers."""
    if events["train"]:
        steps, losses = zip(*events["train"], strict=True)
        tokens = [(step + 1) * scale for step in steps]
        smoothed = smooth(losses, len(losses) // 80)
        axis.plot(tokens, losses, color=color, alpha=0.18, linewidth=0.7)
        axis.plot(tokens, smoothed, color=color, linewidth=2, alpha=0.7, label=f"{name}training")
    if events["val"]:
        steps, losses = zip(*events["val"], strict=True)
        tokens = [step * scale for step in steps]
        label = f"{name}validation: {losses[-1]:.3f}"
        axis.plot(tokens, losses, color=color, linewidth=1.2, label=label,
                  marker="o", markersize=6, markeredgecolor="black", markeredgewidth=0.8)  # fmt: skip


def draw_scores(axis: "Axes", scores: Points, scale: int, color: str, name: str, n: int | None) -> None:
    """Plot HellaSwag's acc_norm, with a standard-error band if the number of items is known."""
    steps, values = zip(*scores, strict=True)
    tokens = [step * scale for step in steps]
    error = [math.sqrt(value * (1 - value) / n) if n else 0.0 for value in values]
    label = f"{name}{values[-1]:.3f}" + (f" ± {error[-1]:.3f}, {n:,} items" if n else "")
    axis.plot(tokens, values, "o-", color=color, markersize=5, linewidth=2, label=label)
    low, high = ([v + sign * e for v, e in zip(values, error, strict=True)] for sign in (-1, 1))
    axis.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)


def published(axis: "Axes", value: float, label: str, side: str = "right") -> None:
    """Draw a horizontal line, labelled on the side where no curve is."""
    color = {GPT2: "firebrick", GPT3: "seagreen"}.get(label, "gray")
    axis.axhline(value, color=color, linestyle="--", linewidth=1.4)
    axis.annotate(f"{label}: {value:.4g}", (side == "right", value), xytext=(0, 3),
                  xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha=side, color=color, fontsize=12)  # fmt: skip


def caption(folder: Path, run: dict[str, Any]) -> str:
    """A run's name, size, hardware and, once it is finished, duration."""
    facts = [folder.resolve().name]
    if "parameters" in run:
        facts.append(f"{run['parameters'] / 1e6:,.1f}M parameters")
    if "device" in run:
        facts.append(
            f"{run['world_size']} x {run['device']}" if run.get("world_size", 1) > 1 else run["device"]
        )
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
