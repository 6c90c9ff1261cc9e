"""
How fast HellaSwag is scored, beside the tutorial's way: one item at a time, its four rows filled up to one
length, the logits of every position. Same model, same dtype, same items; also whether both predict the same.

    python -m benchmarks.hellaswag --model log --data hellaswag_val.jsonl [--n 3] [--limit 200] [--all]

Each round times both ways on --limit items spread over the file. --all scores every item once in both ways
and compares predictions and losses.
"""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hellaswag import Item, evaluate, load_items
from support.data.encodings import get_encoding
from support.machine.device import choose_device, device_name
from train_gpt2 import GPT, GPTConfig

import torch
import tyro
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Time HellaSwag."""

    model: str | None = None  # as hellaswag.py takes it; default: random weights
    n_layer: int = 12  # of the model with random weights
    n_embd: int = 768  # its width; a head has 64 of it
    data: Path | None = None  # items as JSON lines; default: from the Hub
    n: int = 3  # rounds
    limit: int = 200  # items a round
    all: bool = False  # also compare all items once
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None  # write the figures here as JSON


@torch.no_grad()
def one_at_a_time(model: GPT, items: list[Item]) -> list[list[float]]:
    """The tutorial's way; returns the summed loss of each item's endings."""
    encoding, device = get_encoding("gpt2"), next(model.parameters()).device
    losses = []
    for item in items:
        context = encoding.encode_ordinary(item.ctx)
        rows = [context + encoding.encode_ordinary(" " + ending) for ending in item.endings]
        tokens = torch.zeros((4, max(map(len, rows))), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(context) : len(row)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens)
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        losses.append((loss.view(4, -1) * mask[:, 1:]).sum(dim=1).tolist())
    return losses


def measure(config: Config) -> dict[str, Any]:
    """Print the figures and return them, raw."""
    torch.manual_seed(0)
    device = choose_device(config.device)
    shape = GPTConfig(n_layer=config.n_layer, n_head=config.n_embd // 64, n_embd=config.n_embd)
    model = (GPT.from_pretrained(config.model) if config.model else GPT(shape)).to(device)
    items, encoding = load_items(config.data), get_encoding("gpt2")
    some = load_items(config.data, config.limit)
    dtype = getattr(torch, config.dtype)
    result = {
        "device": device_name(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": config.dtype,
        "model": f"{model.config.n_parameters / 1e6:.1f}M",
        "n": config.n,
        "items": len(some),
    }
    print(", ".join(f"{name} {value}" for name, value in result.items()))
    seconds: dict[str, list[float]] = {"ours": [], "one at a time": []}
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for _ in range(config.n + 1):
            start = time.perf_counter()
            evaluate(model, some, encoding)
            middle = time.perf_counter()
            one_at_a_time(model, some)
            seconds["ours"].append(middle - start)
            seconds["one at a time"].append(time.perf_counter() - middle)
        seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
        for name, values in seconds.items():
            rate = len(some) / statistics.median(values)
            print(f"{name:14} {rate:7.1f} items/s, {min(values):.2f} to {max(values):.2f} s")
        print(f"ours is {statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})")
        result |= {"seconds": seconds, "ratio": statistics.median(ratios)}
        if config.all:
            start = time.perf_counter()
            score = evaluate(model, items, encoding)
            result["all_seconds"] = time.perf_counter() - start
            middle = time.perf_counter()
            theirs = one_at_a_time(model, items)
            result["all_seconds_one_at_a_time"] = time.perf_counter() - middle
            pairs = list(zip(score.predictions, theirs, strict=True))
            lengths = [[len(encoding.encode_ordinary(" " + e)) for e in item.endings] for item in items]
            differences = [
                abs(a - b) for ours, sums in pairs for a, b in zip(ours["loss_sum"], sums, strict=True)
            ]
            different = 0
            for (ours, sums), length in zip(pairs, lengths, strict=True):
                means = [loss / n for loss, n in zip(sums, length, strict=True)]
                different += ours["pred"] != sums.index(min(sums)) or ours["pred_norm"] != means.index(
                    min(means)
                )
            result |= {
                "all_items": len(items),
                "different": different,
                "largest_difference": max(differences),
            }
            print(f"all {len(items):,} items in {result['all_seconds']:.1f} s, one at a time in "
                  f"{result['all_seconds_one_at_a_time']:.1f} s: {score}")  # fmt: skip
            print(f"{different} predictions differ, losses by {max(differences):.1e} nats at most")
    return result


def main(config: Config) -> None:
    result = measure(config)
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
