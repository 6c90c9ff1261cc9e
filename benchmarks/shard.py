"""
A model divided among processes (--shard) beside DDP, on one machine's CPU: bytes in each process, and speed.

    python -m benchmarks.shard [--n 5] [--processes 2] [--out results.json]

The ways take turns, each in processes of its own. Processes that share a CPU share its memory too: the ratios
tell something of the price of communication, nothing of the speed of GPUs.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.training import spread
from support.machine.device import choose_device, device_name
from support.machine.processes import start_processes
from support.machine.sharding import ShardedModel, divide
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import torch
import tyro
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

MICRO_STEPS = 2  # in a step


@dataclass(frozen=True)
class Config:
    """Measure --shard beside DDP."""

    n: int = 5  # rounds
    processes: int = 2
    steps: int = 5  # that are timed, after two that are not
    n_layer: int = 4
    n_embd: int = 256
    rows: int = 2  # of 128 tokens, per micro-step and process
    out: Path | None = None  # write the figures here as JSON
    way: Literal["ddp", "shard"] | None = None  # be one of the processes that are measured


def own_bytes(tensors: list[torch.Tensor]) -> int:
    """The bytes that this process holds of them."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def train(config: Config) -> None:
    """One of the processes; the main one prints the figures of all."""
    world = start_processes("cpu", 10.0)
    shape = GPTConfig(128, 8192, config.n_layer, 4, config.n_embd)
    train_config = TrainConfig(sequence_length=128, shard=config.way == "shard")
    torch.manual_seed(train_config.seed)
    raw_model = GPT(shape).pad_vocabulary()
    model: Any
    if train_config.shard:
        raw_model = divide(raw_model, train_config, world, torch.float32)
        model = ShardedModel(raw_model, compiled=False)
    else:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    optimizer = configure_optimizer(raw_model, train_config)
    x, y = torch.randint(shape.vocab_size, (2, config.rows, 128))
    seconds = []
    for _ in range(2 + config.steps):
        world.from_all(None)  # all begin together
        start = time.perf_counter()
        for micro_step in range(MICRO_STEPS):
            model.require_backward_grad_sync = micro_step == MICRO_STEPS - 1
            model(x, y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad(set_to_none=False)
    parameters = list(raw_model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    figures = {
        "seconds": sorted(seconds[2:])[config.steps // 2],
        "bytes": own_bytes([*parameters, *gradients, *moments]),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # Linux counts in KiB
    }
    everyone = world.from_all(figures)
    if world.is_main:
        print(json.dumps(everyone))
    world.disconnect()
    world.exit(0)


def measure(way: str, config: Config) -> list[dict[str, float]]:
    """The figures of each process of a fresh run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={config.processes}", "-m", "benchmarks.shard", f"--way={way}"]  # fmt: skip
    command += [f"--{name}={getattr(config, name)}" for name in ("steps", "n_layer", "n_embd", "rows")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(config: Config) -> None:
    if config.way:
        train(config)
        return
    ways = ("ddp", "shard")
    rounds = [{way: measure(way, config) for way in ways} for _ in range(config.n)]
    whole = rounds[0]["ddp"][0]["bytes"]
    name = device_name(choose_device("cpu"))
    print(f"{name}, PyTorch {torch.__version__}, {config.processes} processes, n = {config.n}")
    for way in ways:
        rates = [1 / max(process["seconds"] for process in figures[way]) for figures in rounds]
        shares = ", ".join(f"{process['bytes'] / 1e6:.1f}" for process in rounds[0][way])
        peaks = [max(process["peak_bytes"] for process in figures[way]) / 2**30 for figures in rounds]
        peak = spread(peaks, ".2f")
        print(f"{way:6} {spread(rates, '.2f')} steps/s, {shares} MB of states, peak {peak} GB")
    share = max(process["bytes"] for process in rounds[0]["shard"]) / whole
    ratios = [max(p["seconds"] for p in figures["ddp"]) / max(p["seconds"] for p in figures["shard"])
              for figures in rounds]  # fmt: skip
    print(f"divided: {share:.1%} of the bytes at {spread(ratios, '.2f')} x the rate of DDP")
    if config.out:
        facts = {"device": name, "torch": torch.__version__, "n": config.n, "processes": config.processes,
                 "steps": config.steps, "n_layer": config.n_layer, "n_embd": config.n_embd,
                 "rows": config.rows, "rounds": rounds}  # fmt: skip
        config.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
