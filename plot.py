"""
Plot the curves of runs, or the position embeddings of a model; watch a run in a browser.

    python plot.py run log                                # a run's curves, to log/loss.png
    python plot.py run log other_log --out both.png       # several runs together
    python plot.py positions gpt2 --out wpe.png           # the position embeddings of a model
    python plot.py watch log                              # a run's page, at http://127.0.0.1:8124
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from support.cli import InputError, run_command
from support.run.curves import as_text, draw_runs, new_figure, save_picture
from support.run.watch import serve

import numpy as np
import tyro


@dataclass(frozen=True)
class Run:
    """Draw what one or several runs have logged over tokens: losses, HellaSwag and all that you add."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, as train_gpt2.py leaves them
    out: Path | None = None  # the picture; default: loss.png in the run's folder, runs.png here for several


@dataclass(frozen=True)
class Positions:
    """Draw the position embeddings of a model: the matrix as an image, three of its channels as curves."""

    model: Annotated[str, tyro.conf.Positional]  # a Hub name, a checkpoint or run folder, or a .pt file
    out: Path = Path("wpe.png")  # the picture


@dataclass(frozen=True)
class Watch:
    """Show a run in this machine's browser: curves, speed, time and money left, samples and events."""

    folder: Annotated[Path, tyro.conf.Positional]  # a run's folder, or a copy of it
    port: int = 8124  # of the page's address, http://127.0.0.1:PORT; 0: any that is free


def draw_positions(weights: np.ndarray, out: Path, name: str) -> None:
    """Plot a position embedding matrix, (block_size, n_embd), to the image file `out`."""
    positions, channels = weights.shape
    figure = new_figure(figsize=(12, 5), dpi=120, layout="constrained")
    image, curves = figure.subplots(1, 2)
    image.imshow(weights, cmap="gray", aspect="auto", interpolation="nearest")
    image.set(title=f"position embeddings of {as_text(name)}", xlabel="channel", ylabel="position")
    for channel in sorted({c * channels // 768 for c in (150, 200, 250)}):  # the lecture's, for any width
        curves.plot(range(positions), weights[:, channel], linewidth=0.9, label=f"channel {channel}")
    curves.set(title="three channels", xlabel="position", ylabel="value")
    curves.grid(alpha=0.25)
    curves.legend(fontsize=9)
    save_picture(figure, out)


def main(config: Run | Positions | Watch) -> None:
    if isinstance(config, Watch):
        serve(config.folder, config.port)
        return
    if isinstance(config, Run):
        if not config.folders:
            raise InputError("name at least one run folder")
        out = config.out or (config.folders[0] / "loss.png" if len(config.folders) == 1 else Path("runs.png"))
        for note in draw_runs(config.folders, out):
            print(f"note: {note}", file=sys.stderr)
    else:
        from train_gpt2 import GPT

        out = config.out
        model = GPT.from_pretrained(config.model)
        draw_positions(model.transformer.wpe.weight.detach().numpy(), out, config.model)
    print(f"drew {out}")


if __name__ == "__main__":
    run_command(main, Run | Positions | Watch, usual_flag="run")
