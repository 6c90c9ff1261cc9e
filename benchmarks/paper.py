"""
Where the time of 250 steps of the default recipe would go on GPUs that are not here: computed, but for what a
CPU does, which is measured. Prints Markdown.

    python -m benchmarks.paper [--n 5]
"""

import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.training import spread
from hellaswag import N_VALIDATION
from support.cli import InputError
from support.machine.device import GB, HEAD_ROOM, peak_flops
from support.machine.micro_batch import CAUTION, ENOUGH_TOKENS, least_bytes_sharded, most_rows
from support.run.curves import draw_runs
from train_gpt2 import MODEL_SHAPES, GPTConfig, TrainConfig

import tyro


@dataclass(frozen=True)
class Config:
    """Compute where the time goes."""

    n: int = 5  # drawings of the picture


@dataclass(frozen=True)
class Machine:
    name: str
    card: str  # as torch.cuda calls it
    n_gpus: int
    tokens_per_second: float  # of one GPU that trains the 124M model on rows of 1,024; reported by others
    source: str
    hellaswag_tokens: int  # read by the busiest process for COUNTED items, padding included


MACHINES = (
    Machine("8 x H100", "NVIDIA H100 80GB HBM3", 8, 10e9 / (45 * 60) / 8,
            "KellerJordan/modded-nanogpt, README: with llm.c, 10 billion tokens took 8 of them 45 minutes",
            73_211),
    Machine("1 x RTX 4090", "NVIDIA GeForce RTX 4090", 1, 220_700 / 2,
            "tylerromero.com, NanoGPT Speedrun Living Worklog: with llm.c's PyTorch trainer, 2 of them did "
            "220,700 tokens/s", 432_867),
)  # fmt: skip
COUNTED = 3_243  # HellaSwag items, those from ActivityNet, whose passes were counted with a GPU's limits
TOKENIZING = 58e-6  # seconds for an item, one thread of an x86_64 CPU, n = 5
UNCOMPILED = (
    0.5  # of the training's FLOP/s is assumed for HellaSwag: the model is not compiled, its rows are short
)
COPY = 16e9  # bytes/s assumed from a GPU to the host: half the nominal rate of PCIe 4.0 with 16 lanes
STEPS = TrainConfig.val_every
SIZES = [64, 32, 16, 8, 4, 2, 1]  # rows to try


def drawing_seconds(n: int) -> list[float]:
    """Seconds of CPU time for each of n pictures of a whole run; a first one warms up."""
    config = TrainConfig()
    lines = [f"{step} train {3 + math.exp(-step / 1000)}\n" for step in range(config.max_steps)]
    for step in range(0, config.max_steps, STEPS):
        lines += [f"{step} val {3 + math.exp(-step / 1000)}\n", f"{step} hella 0.3\n"]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "log.txt").write_text("".join(lines), encoding="utf-8")
        for _ in range(n + 1):
            start = time.process_time()
            draw_runs([Path(folder)], Path(folder, "loss.png"))
            seconds.append(time.process_time() - start)
    return seconds[1:]


def parts(machine: Machine, drawing: float) -> dict[str, float]:
    """Seconds per 250 steps. Every process trains, validates and scores its share; one alone copies and
    draws, and the others wait."""
    config, shape = TrainConfig(), GPTConfig()
    rate = machine.tokens_per_second
    items = N_VALIDATION / COUNTED
    forward = 1 / 3  # of a training step's FLOP: 2 of 6 for each parameter
    scoring = items * machine.hellaswag_tokens * forward / (UNCOMPILED * rate)
    tokenizing = N_VALIDATION * TOKENIZING / machine.n_gpus
    state = 3 * 4 * shape.n_parameters  # bytes: float32 weights and AdamW's two moments
    return {
        "training": STEPS * config.total_batch_size / (machine.n_gpus * rate),
        "validation": forward * config.val_tokens / (machine.n_gpus * rate),
        "HellaSwag": scoring + tokenizing,
        "copying a checkpoint": STEPS / config.checkpoint_every * state / COPY,
        "drawing": drawing,
    }


def table(drawing: float) -> str:
    """A row for each part, two columns for each machine, and what is not training in the last row."""
    columns = [parts(machine, drawing) for machine in MACHINES]
    head = ["part", *(f"{machine.name}, {unit}" for machine in MACHINES for unit in ("seconds", "share"))]
    rows = [head, ["---"] * len(head)]
    for part in columns[0]:
        cells = [(f"{column[part]:,.2f}", f"{column[part] / sum(column.values()):.1%}") for column in columns]
        rows.append([part, *(cell for pair in cells for cell in pair)])
    others = [sum(column.values()) - column["training"] for column in columns]
    cells = [(f"{other:,.2f}", f"{other / sum(column.values()):.1%}")
             for other, column in zip(others, columns, strict=True)]  # fmt: skip
    rows.append(["all but training", *(cell for pair in cells for cell in pair)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def exchanges(card: float, recompute: bool, processes: int = 8) -> list[list[str]]:
    """gpt2-xl divided among cards of so many GB, in steps of the default recipe: for gradients divided in a
    step's last micro-step and in each, the rows that fit, and the GB that a process receives in a step."""
    config, shape = TrainConfig(recompute=recompute), GPTConfig(**MODEL_SHAPES["gpt2-xl"])
    limit = (1 - HEAD_ROOM) / CAUTION * (card - 0.5) * GB  # the driver takes 0.5 GB
    whole = 4 * shape.n_parameters  # bytes of gradients in float32
    rest = shape.vocab_size * shape.n_embd  # about all parameters outside the blocks
    passes = 2 * 2 * (shape.n_parameters - rest) + 2 * rest  # in 16 bits: blocks forward and backward

    def fits(kept: float, rows: int, chunks: int) -> bool:
        return least_bytes_sharded(config, shape, rows, chunks, shards=processes, kept=kept) <= limit

    rows = []
    for always in (False, True):
        try:
            most, _ = most_rows(SIZES, partial(fits, 0 if always else whole), ENOUGH_TOKENS // 1024)
        except InputError:
            rows.append(["none", "", ""])
            continue
        micro_steps = config.total_batch_size // (most * 1024 * processes)
        received = micro_steps * passes + (micro_steps if always else 1) * whole
        received *= (processes - 1) / processes
        rows.append([str(most), str(micro_steps), f"{received / GB:,.0f}"])
    return rows


def sharding_table() -> str:
    head = ["card, GB", "", "gradients divided", "rows", "micro-steps", "GB received in a step"]
    rows = [head, ["---"] * len(head)]
    for card in (16, 24, 40, 80):
        for recompute in (False, True):
            ways = zip(("in the last", "in each"), exchanges(card, recompute), strict=True)
            flag = "`--recompute`" if recompute else ""
            rows += [[str(card), flag, way, *cells] for way, cells in ways]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(config: Config) -> None:
    drawing = drawing_seconds(config.n)
    print(f"drawing: {spread(drawing, '.2f')} s, n = {config.n}\n\n{table(statistics.median(drawing))}")
    for machine in MACHINES:
        work = machine.tokens_per_second * GPTConfig().flops_per_token(1024)
        mfu = work / (peak_flops(machine.card) or math.nan)
        rate = f"{machine.tokens_per_second:,.0f} tokens/s a GPU, MFU {mfu:.0%}"
        print(f"\n{machine.name}: {rate} ({machine.source})")
    print(f"\ngpt2-xl divided among 8\n\n{sharding_table()}")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
