"""
Where the time of a training step goes: each part alone, forward and backward, in the shapes of the step.

    python -m benchmarks.parts [--n 5] [--device cuda --batch_size 16 --sequence_length 1024]

The parts take turns. Their sum need not be the step: alone, a part finds warmer caches.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training import spread
from support.data.shards import load_shards
from support.machine.device import (
    choose_device,
    choose_dtype,
    device_name,
    keep_freed_memory,
    prefer_fast_attention,
    to_device,
)
from train_gpt2 import GPT, GPTConfig, TokenLoader, TrainConfig, configure_optimizer

import numpy as np
import torch
import tyro


@dataclass(frozen=True)
class Config:
    """Time the parts of a training step."""

    n: int = 5  # rounds
    n_layer: int = 12
    batch_size: int = 4  # rows of a step
    sequence_length: int = 256  # tokens in a row
    device: str = "cpu"
    dtype: str = "auto"
    out: Path | None = None  # write the figures here as JSON


def main(config: Config) -> None:
    device, shape = choose_device(config.device), GPTConfig(n_layer=config.n_layer)
    dtype = choose_dtype(config.dtype, device, shape.n_embd)
    B, T, C = config.batch_size, config.sequence_length, shape.n_embd
    prefer_fast_attention(device)
    if device.type == "cpu":
        keep_freed_memory()
    model = GPT(shape).pad_vocabulary().to(device)
    optimizer = configure_optimizer(model, TrainConfig())
    folder = Path(tempfile.mkdtemp())
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 10_000_000, dtype=np.uint16)
    for name in ("edufineweb_val_000000", "edufineweb_train_000001"):
        np.save(folder / f"{name}.npy", tokens)
    loader = TokenLoader(load_shards(folder), "train", TrainConfig(sequence_length=T, total_batch_size=B * T))
    x, y = to_device(device, *loader.batch(0, 0, B))
    stream = torch.randn(B, T, C, device=device, requires_grad=True)
    block, steps = model.transformer.h[0], iter(range(10**9))

    def both_ways(part: Callable[[], torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = part()
        out.backward(torch.ones_like(out))

    def whole() -> None:
        both_ways(lambda: model(x, y))
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def head_and_loss() -> torch.Tensor:
        logits = model.head(stream)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    L = config.n_layer
    parts: dict[str, tuple[int, Callable[[], object]]] = {  # how often it comes in a step, and once of it
        "whole step": (1, whole),
        "attention": (L, lambda: both_ways(lambda: block.attn(stream))),
        "MLP": (L, lambda: both_ways(lambda: block.mlp(stream))),
        "norms": (2 * L + 1, lambda: both_ways(lambda: block.ln_1(stream))),
        "embeddings": (1, lambda: both_ways(lambda: model.transformer.wte(x))),
        "head and loss": (1, lambda: both_ways(head_and_loss)),
        "clip": (1, clip),
        "optimizer": (1, optimizer.step),
        "loader": (1, lambda: to_device(device, *loader.batch(next(steps), 0, B))),
    }
    print(
        f"{device_name(device)}, PyTorch {torch.__version__}, {dtype}; {L} layers, {B} x {T} tokens, "
        f"n = {config.n}"
    )
    milliseconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(config.n + 1):
        both_ways(lambda: model(x, y))  # gradients to clip and to step with
        for name, (count, once) in parts.items():
            wait(device)
            start = time.perf_counter()
            once()
            wait(device)
            milliseconds[name].append(1000 * count * (time.perf_counter() - start))
    milliseconds = {name: values[1:] for name, values in milliseconds.items()}  # the first round warms up
    for name, values in milliseconds.items():
        share = [a / b for a, b in zip(values, milliseconds["whole step"], strict=True)]
        print(f"{name:14} {spread(values, '9.2f')} ms, {statistics.median(share):7.2%} of the step")
    if config.out:
        facts = {
            "device": device_name(device),
            "torch": torch.__version__,
            "dtype": str(dtype),
            "n": config.n,
            "n_layer": L,
            "batch_size": B,
            "sequence_length": T,
            "milliseconds": milliseconds,
        }
        config.out.write_text(json.dumps(facts, indent=1) + "\n")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
