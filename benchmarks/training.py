"""
How fast GPT-2 trains: tokens per second of whole steps (forward, backward, clip, AdamW), ours beside the
plain way of the tutorial and the installed transformers, and beside what the device's matrix units can do.

    python -m benchmarks.training [--n 5] [--device cuda --batch_size 16 --sequence_length 1024]
    python -m benchmarks.training --peer "python ../nanoGPT/train.py --max_iters=20"   # prints its tokens/s

Every way lives in a process of its own, as it would alone; they take turns, so that a noisy machine treats
all alike. "tutorial" is its eager loop written out: no compilation, AdamW without fusion on a CPU, PyTorch's
defaults for everything else.
"""

import importlib.metadata
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

from support.machine.device import (
    autocast_to,
    choose_device,
    choose_dtype,
    device_name,
    keep_freed_memory,
    peak_flops,
    prefer_fast_attention,
    to_device,
)
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import torch._functorch.config
import tyro
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Time training steps."""

    n: int = 5  # rounds
    steps: int = 1  # of each way in a round
    ways: tuple[str, ...] = ("tutorial", "ours", "ours compiled", "transformers", "transformers compiled")
    peer: tuple[str, ...] = ()  # commands to run in every round, whose output holds tokens/s or tok/sec
    n_layer: int = 12
    n_embd: int = 768  # width; a head has 64 of it
    batch_size: int = 4  # rows of a micro-step
    micro_steps: int = 1  # of a step
    sequence_length: int = 256  # tokens in a row
    device: str = "cpu"
    dtype: str = "auto"
    backend: str = "inductor"  # of torch.compile
    loss_chunks: int = 1  # see support/model/loss.py; this and the next two: ours alone
    recompute: bool = False  # compute the blocks again in the backward pass
    memory_budget: float = 1.0  # share of the activations that compiled code keeps; 0: as if all recomputed
    out: Path | None = None  # write the figures here as JSON

    @property
    def shape(self) -> GPTConfig:
        return GPTConfig(n_layer=self.n_layer, n_head=self.n_embd // 64, n_embd=self.n_embd)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_steps * self.batch_size * self.sequence_length


class TutorialGPT(GPT):
    """The tutorial's forward pass: logits and loss come back, the loss from all columns."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.lm_head(self.hidden_states(idx))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def make_model(way: str, config: Config) -> nn.Module:
    """The model of a way, with random weights."""
    if way.startswith("transformers"):
        import transformers

        options = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        sizes = {"n_layer": config.n_layer, "n_head": config.shape.n_head, "n_embd": config.n_embd}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options, use_cache=False))
    model = (TutorialGPT if way.startswith("tutorial") else GPT)(config.shape).pad_vocabulary()
    if way.startswith("ours"):
        model.loss_chunks, model.recompute = config.loss_chunks, config.recompute
        torch._functorch.config.activation_memory_budget = config.memory_budget
    return model


def make_step(way: str, config: Config) -> Callable[[], float]:
    """A function that trains one step and returns its loss: micro-steps, clipping, AdamW, one wait for the
    device."""
    torch.manual_seed(0)
    device = choose_device(config.device)
    ours = way.startswith("ours")
    autocast = autocast_to(device, choose_dtype(config.dtype, device, config.n_embd))
    # 1 / rank, as words in a text: few tokens come often, and their gradients collide
    uniform = torch.rand(2, config.batch_size, config.sequence_length)
    batch = [(config.shape.vocab_size**u).long() for u in uniform]
    model = make_model(way, config).to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if ours:  # a peer gets PyTorch's defaults
        prefer_fast_attention(device)
        if device.type == "cpu":
            keep_freed_memory()
    optimizer = configure_optimizer(model, TrainConfig())
    if way.startswith("tutorial") and device.type == "cpu":
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=6e-4, betas=(0.9, 0.95), fused=False)
    compiled = way.endswith("compiled")
    run = torch.compile(model, dynamic=False, backend=config.backend) if compiled else model

    def micro_step() -> torch.Tensor:
        """Forward and backward; returns this micro-step's share of the loss."""
        x, y = to_device(device, *batch) if ours else [t.to(device) for t in batch]
        with autocast:
            if ours:
                loss = run(x, y)
            elif way.startswith("tutorial"):
                _, loss = run(x, y)
            else:
                loss = run(x, labels=x).loss
        loss = loss / config.micro_steps
        loss.backward()
        return loss.detach()

    def step() -> float:
        loss_sum = torch.zeros((), device=device)
        for _ in range(config.micro_steps):
            loss_sum += micro_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum.item()  # waits for the device

    return step


def measure(way: str, config: Config, seconds: float) -> dict[str, Any]:
    """Two steps to warm up, then `config.n` timed ones; fewer if they take longer than `seconds`, but three.
    Meant for a process of its own, whose memory is nobody else's."""
    start = time.perf_counter()
    step = matmul_step(config) if way == "matmul" else make_step(way, config)
    step(), step()
    warm_up = time.perf_counter() - start
    if config.device == "cuda":
        torch.cuda.empty_cache()  # compilation may have taken more than training does
        torch.cuda.reset_peak_memory_stats()
        step()
    times: list[float] = []
    value = 0.0
    while len(times) < config.n and (len(times) < 3 or sum(times) < seconds):
        start = time.perf_counter()
        value = step()  # ends with a wait for the device
        times.append(time.perf_counter() - start)
    result = {"way": way, "rows": config.batch_size, "micro_steps": config.micro_steps, "n": len(times),
              "step_seconds": times, "warm_up_seconds": warm_up}  # fmt: skip
    if way == "matmul":
        return result | {"flop_per_second": value / statistics.median(times)}
    rates = [config.tokens / t for t in times]
    peak = peak_flops(device_name(torch.device(config.device)))
    work = config.shape.flops_per_token(config.sequence_length)
    median = statistics.median(rates)
    result |= {"loss": value, "tokens_per_second": median, "least": min(rates), "most": max(rates),
               "mfu": median * work / peak if peak else None, "loss_chunks": config.loss_chunks,
               "recompute": config.recompute, "memory_budget": config.memory_budget}  # fmt: skip
    return result


def matmul_step(config: Config) -> Callable[[], float]:
    """A function that multiplies matrices of an MLP's shapes and returns the FLOP it did."""
    device, C = choose_device(config.device), config.n_embd
    dtype = choose_dtype(config.dtype, device, C)
    rows = config.batch_size * config.sequence_length
    a, b = torch.randn(rows, C, device=device), torch.randn(C, 4 * C, device=device)
    a, b, count = a.to(dtype), b.to(dtype), 20
    out = a @ b

    def step() -> float:
        for _ in range(count):
            torch.mm(a, b, out=out)
        out[0, 0].item()
        return count * 2 * rows * 4 * C**2

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
    work = config.shape.flops_per_token(config.sequence_length)
    name = device_name(choose_device(config.device))
    version = importlib.metadata.version("transformers")
    print(f"{name}, PyTorch {torch.__version__}, transformers {version}, {config.dtype}; "
          f"{config.n_layer} layers, {config.micro_steps} x {config.batch_size} x {config.sequence_length} "
          f"tokens a step, n = {config.n} x {config.steps}")  # fmt: skip
    context = multiprocessing.get_context("spawn")
    pipes, cold, peaks = {}, {}, {}
    for way in (*config.ways, "matmul"):
        pipes[way], end = context.Pipe()
        context.Process(target=worker, args=(way, config, end), daemon=True).start()
        end.close()  # so that a worker's death ends the wait
        cold[way] = pipes[way].recv()
    rates: dict[str, list[float]] = {way: [] for way in (*config.ways, *config.peer, "matmul")}
    steps: dict[str, list[float]] = {way: [] for way in config.ways}
    for _ in range(config.n):
        for way in config.ways:
            pipes[way].send(True)
            seconds, _, peaks[way] = pipes[way].recv()
            steps[way] += seconds
            rates[way].append(config.tokens * len(seconds) / sum(seconds))
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
            "transformers": version, "dtype": config.dtype, "n": config.n,
            "n_layer": config.n_layer, "batch_size": config.batch_size,
            "sequence_length": config.sequence_length, "tokens_per_second": rates, "step_seconds": steps,
            "peak_bytes": peaks, "warm_up_seconds": cold,
        }  # fmt: skip
        config.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
