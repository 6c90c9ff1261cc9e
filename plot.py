"""
Pictures of runs and of models.

    python plot.py run log                                # the curves of a run, drawn to log/loss.png
    python plot.py run log other_log --out both.png       # several runs together
    python plot.py positions gpt2 --out wpe.png           # the position embeddings of a model
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from shards import InputError, run_command

# Published values, drawn only beside runs that can be compared with them.
GPT2_VAL_LOSS = 3.2924  # OpenAI's 124M on FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = 0.2955  # OpenAI's 124M, acc_norm, tutorial protocol (build-nanogpt, hellaswag.py)
GPT3_HELLASWAG = 0.337  # GPT-3 Small (GPT-3 paper, table H.1)
ALL_HELLASWAG_ITEMS = 10_042


@dataclass(frozen=True)
class Run:
    """Draw training loss, validation loss and HellaSwag of one or several runs over tokens."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, as train_gpt2.py leaves them
    out: Path | None = None  # the picture; default: loss.png in the first folder


@dataclass(frozen=True)
class Positions:
    """Draw the position embeddings of a model: the matrix as an image, three of its channels as curves."""

    model: Annotated[str, tyro.conf.Positional]  # a Hub name, a checkpoint folder, or a run's folder
    out: Path = Path("wpe.png")  # the picture


def read_log(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The events of a log.txt by kind ("train", "val", "hella"): (step, value) pairs in order."""
    events: dict[str, list[tuple[int, float]]] = {"train": [], "val": [], "hella": []}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file}: not the log of a run ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            step, kind, value = line.split()
            events[kind].append((int(step), float(value)))
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}, line {number}: not 'STEP train|val|hella VALUE'") from error
    return events


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run; empty for runs without one (the tutorial's)."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'}: damaged ({error})") from error


def smooth(values: list[float], span: int) -> list[float]:
    """Running mean over the last `span` values."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - span] if i >= span else 0.0)
        out.append(total / min(i + 1, span))
    return out


def draw_runs(folders: list[Path], out: Path) -> None:
    """Draw the runs in `folders` into the picture `out`. Raises InputError for a folder that holds no run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    runs = [(folder, read_log(folder / "log.txt"), read_run(folder)) for folder in folders]
    scores = any(events["hella"] for _, events, _ in runs)
    figure = Figure(figsize=(12 if scores else 7.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    loss_axis, hella_axis = axes[0], axes[-1]
    units = set()
    for i, (folder, events, run) in enumerate(runs):
        tokens_per_step = run.get("train_config", {}).get("total_batch_size")
        units.add("tokens" if tokens_per_step else "steps")
        scale = tokens_per_step or 1
        color, name = f"C{i}", folder.resolve().name
        if events["train"]:
            steps, losses = zip(*events["train"], strict=True)
            x = [(step + 1) * scale for step in steps]
            loss_axis.plot(x, losses, color=color, alpha=0.2, linewidth=0.7)
            loss_axis.plot(
                x,
                smooth(losses, max(1, len(losses) // 40)),
                color=color,
                linewidth=1.2,
                alpha=0.8,
                label=f"{name}: training",
            )
        if events["val"]:
            steps, losses = zip(*events["val"], strict=True)
            loss_axis.plot(
                [step * scale for step in steps],
                losses,
                "o-",
                color=color,
                markersize=4,
                linewidth=1.8,
                markeredgecolor="black",
                markeredgewidth=0.6,
                label=f"{name}: validation, {losses[-1]:.3f} at the end",
            )
        if events["hella"]:
            steps, values = zip(*events["hella"], strict=True)
            n = run.get("hellaswag_items")
            hella_axis.plot(
                [step * scale for step in steps],
                values,
                "o-",
                color=color,
                markersize=4,
                label=f"{name}: {values[-1]:.3f}" + (f" ({n:,} items)" if n else ""),
            )
            if n:
                error = [math.sqrt(value * (1 - value) / n) for value in values]
                hella_axis.fill_between(
                    [step * scale for step in steps],
                    [v - e for v, e in zip(values, error, strict=True)],
                    [v + e for v, e in zip(values, error, strict=True)],
                    color=color,
                    alpha=0.15,
                )
    # OpenAI's numbers stand beside runs on the same data, in the same tokens, on the same items
    encodings = {run.get("encoding") for _, _, run in runs}
    datasets = {run.get("data", {}).get("dataset") for _, _, run in runs}
    if encodings == {"gpt2"} and datasets == {"HuggingFaceFW/fineweb-edu"}:
        loss_axis.axhline(
            GPT2_VAL_LOSS, color="firebrick", linestyle="--", linewidth=1, label="OpenAI GPT-2 (124M)"
        )
    if scores:
        if encodings == {"gpt2"} and {run.get("hellaswag_items") for _, _, run in runs} == {
            ALL_HELLASWAG_ITEMS
        }:
            hella_axis.axhline(
                GPT2_HELLASWAG, color="firebrick", linestyle="--", linewidth=1, label="OpenAI GPT-2 (124M)"
            )
            hella_axis.axhline(
                GPT3_HELLASWAG, color="seagreen", linestyle="--", linewidth=1, label="OpenAI GPT-3 (124M)"
            )
        hella_axis.axhline(0.25, color="gray", linestyle=":", linewidth=1, label="chance")
        hella_axis.set(title="HellaSwag", ylabel="accuracy (acc_norm)")
    # the axis spans the validation losses, from the start to the lowest value of all
    starts = [events["val"][0][1] for _, events, _ in runs if events["val"]]
    values = [v for _, events, _ in runs for _, v in events["train"] + events["val"] if math.isfinite(v)]
    if starts and values and math.isfinite(max(starts)):
        margin = 0.05 * (max(starts) - min(values)) + 0.05
        loss_axis.set_ylim(min(values) - margin, max(starts) + margin)
    loss_axis.set(title="Loss", ylabel="nats per " + ("byte" if encodings == {"bytes"} else "token"))
    for axis in axes:
        axis.set_xlabel(" / ".join(sorted(units)) + " trained on")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M, 10G
        axis.grid(alpha=0.25)
        if axis.has_data():
            axis.legend(fontsize=9)
    save(figure, out)


def draw_positions(weights: Any, out: Path, name: str) -> None:
    """Draw a position embedding matrix, (block_size, n_embd), into the picture `out`."""
    from matplotlib.figure import Figure

    positions, channels = weights.shape
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    image, curves = figure.subplots(1, 2)
    image.imshow(weights, cmap="gray", aspect="auto", interpolation="nearest")
    image.set(title=f"position embeddings of {name}", xlabel="channel", ylabel="position")
    for channel in [c for c in (150, 200, 250) if c < channels] or range(min(3, channels)):
        curves.plot(range(positions), weights[:, channel], linewidth=0.9, label=f"channel {channel}")
    curves.set(title="three channels", xlabel="position", ylabel="value")
    curves.grid(alpha=0.25)
    curves.legend(fontsize=9)
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    if out.suffix.lower() not in (".png", ".svg", ".pdf", ".jpg"):
        raise InputError(f"--out {out}: name a .png, .svg, .pdf or .jpg file")
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format=out.suffix[1:].lower())
    temporary.replace(out)  # whoever looks at the picture sees a whole one


def main(config: Run | Positions) -> None:
    if isinstance(config, Run):
        if not config.folders:
            raise InputError("name at least one run folder")
        out = config.out or config.folders[0] / "loss.png"
        draw_runs(list(config.folders), out)
    else:
        from train_gpt2 import GPT

        out = config.out
        model = GPT.from_pretrained(config.model)
        draw_positions(model.transformer.wpe.weight.detach().numpy(), out, config.model)
    print(f"drew {out}")


if __name__ == "__main__":
    run_command(main, Run | Positions)
