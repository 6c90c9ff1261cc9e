"""
How fast GPT-2 trains: tokens per second of whole steps (forward, backward, clip, AdamW), ours beside the
plain way of the tutorial and the installed transformers, and beside what the device's matrix units can do.

    python -m benchmarks.training [--n 5] [--device cuda --batch_size 16 --sequence_length 1024]
    python -m benchmarks.training --peer "python ../nanoGPT/train.py --max_iters=20"   # prints its tokens/s

Every way lives in a process of its own, as it would alone; they take turns, so that a noisy machine treats
all alike. "tutorial" is its eager loop written out: no compilation, AdamW without fusion on a CPU, PyTorch's
defaults for everything else.
"""

import json
import multiprocessing
import platform
import re
import resource
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.device import choose_device, choose_dtype, device_name, fast_attention, keep_freed_memory
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import transformers
import tyro
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Time training steps."""

    n: int = 5  # rounds
    steps: int = 1  # of each way in a round
    ways: tuple[str, ...] = ("tutorial", "ours", "ours compiled", "transformers", "transformers compiled")
    peer: tuple[str, ...] = ()  # commands to run in every round, whose output holds tokens/s or tok/sec
    n_layer: int = 12
    batch_size: int = 4  # rows of a step
    sequence_length: int = 256  # tokens in a row
    device: str = "cpu"
    dtype: str = "auto"
    out: Path | None = None  # write the figures here as JSON


def make_step(way: str, config: Config) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    torch.manual_seed(0)
    device = choose_device(config.device)
    shape = GPTConfig(n_layer=config.n_layer)
    dtype = choose_dtype(config.dtype, device, shape.n_embd)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    x, y = torch.randint(0, shape.vocab_size, (2, config.batch_size, config.sequence_length), device=device)
    if way.startswith("transformers"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=config.n_layer, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        )
    else:
        model = GPT(shape).pad_vocabulary()
    model = model.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    optimizer = configure_optimizer(model, TrainConfig())
    if way == "tutorial" and device.type == "cpu":
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=6e-4, betas=(0.9, 0.95), fused=False)
    if way.startswith("ours") and device.type == "cpu":
        keep_freed_memory()
    run = torch.compile(model, dynamic=False) if way.endswith("compiled") else model

    def loss_of() -> torch.Tensor:
        if way.startswith("ours"):
            with fast_attention(device), autocast:
                return run(x, y)
        with autocast:
            if way == "tutorial":
                logits = model.lm_head(model.hidden_states(x))
                return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
            return run(x, labels=x).loss

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def matmul_step(config: Config) -> Callable[[], float]:
    """A function that multiplies matrices of an MLP's shapes and returns the FLOP it did."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, 768)
    rows = config.batch_size * config.sequence_length
    a, b = torch.randn(rows, 768, device=device), torch.randn(768, 3072, device=device)
    a, b, count = a.to(dtype), b.to(dtype), 20
    out = a @ b

    def step() -> float:
        for _ in range(count):
            torch.mm(a, b, out=out)
        out[0, 0].item()
        return count * 2 * rows * 768 * 3072

    return step


def worker(way: str, config: Config, pipe: Any) -> None:
    """Warm up, say how long that took, then train whenever asked."""
    start = time.perf_counter()
    step = matmul_step(config) if way == "matmul" else make_step(way, config)
    step(), step()
    pipe.send(time.perf_counter() - start)
    while pipe.recv():
        seconds, value = [], 0.0
        for _ in range(config.steps):
            start = time.perf_counter()
            value = step()
            seconds.append(time.perf_counter() - start)
        if config.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds, value, peak))


def peer_rate(command: str) -> float:
    """The median of the tokens/s that a command prints."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    number, unit = r"([\d,]+(?:\.\d+)?)", r"(?:tok/sec|tok/s|tokens/sec|tokens/s)"
    found = re.findall(rf"{unit}:\s*{number}|{number}\s*{unit}(?![\w:])", done.stdout + done.stderr)
    if not found:
        raise SystemExit(f"{command!r} printed no tokens/s")
    return statistics.median(float((a or b).replace(",", "")) for a, b in found)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(config: Config) -> None:
    tokens = config.batch_size * config.sequence_length
    work = GPTConfig(n_layer=config.n_layer).flops_per_token(config.sequence_length)
    name = device_name(choose_device(config.device))
    print(f"{name}, PyTorch {torch.__version__}, transformers {transformers.__version__}, {config.dtype}; "
          f"{config.n_layer} layers, {config.batch_size} x {config.sequence_length} tokens a step, "
          f"n = {config.n} x {config.steps}")  # fmt: skip
    context = multiprocessing.get_context("spawn")
    pipes, cold, peaks = {}, {}, {}
    for way in (*config.ways, "matmul"):
        pipes[way], end = context.Pipe()
        context.Process(target=worker, args=(way, config, end), daemon=True).start()
        cold[way] = pipes[way].recv()
    rates: dict[str, list[float]] = {way: [] for way in (*config.ways, *config.peer, "matmul")}
    steps: dict[str, list[float]] = {way: [] for way in config.ways}
    for _ in range(config.n):
        for way in config.ways:
            pipes[way].send(True)
            seconds, _, peaks[way] = pipes[way].recv()
            steps[way] += seconds
            rates[way].append(tokens * len(seconds) / sum(seconds))
        for command in config.peer:
            rates[command].append(peer_rate(command))
        pipes["matmul"].send(True)
        seconds, flop, _ = pipes["matmul"].recv()
        rates["matmul"].append(flop * len(seconds) / sum(seconds) / work)
    for pipe in pipes.values():
        pipe.send(False)
    for way, values in rates.items():
        first = rates[config.ways[0]]
        ratio = spread([a / b for a, b in zip(values, first, strict=True)], ".2f")
        line = f"{way:24} {spread(values, '8.0f')} tokens/s, {ratio} x {config.ways[0]}"
        if way in peaks:
            line += f", peak {peaks[way] / 2**30:.2f} GB, first two steps {cold[way]:.0f} s"
        print(line)
    print("(matmul: the tokens/s of a step that were nothing but its matrix products, at the measured rate)")
    if config.out:
        results = {
            "device": name, "machine": platform.machine(), "torch": torch.__version__,
            "transformers": transformers.__version__, "dtype": config.dtype, "n": config.n,
            "n_layer": config.n_layer, "batch_size": config.batch_size,
            "sequence_length": config.sequence_length, "tokens_per_second": rates, "step_seconds": steps,
            "peak_bytes": peaks, "warm_up_seconds": cold,
        }  # fmt: skip
        config.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
