"""
How fast GPT-2 (124M) writes, beside the installed transformers with its own cache: same weights, same dtype,
same prompt, the most likely token each time. Whether they write the same text is seen in float32: in 16 bits,
the logits of a random model tie.

    python -m benchmarks.sampling [--n 5] [--device cuda] [--out results.json]

"generate" is GPT.generate. On a GPU, "compiled" replays CUDA graphs.
"""

import functools
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.machine.device import choose_compile, choose_device, device_name
from train_gpt2 import GPT, GPTConfig

import torch
import tyro


@dataclass(frozen=True)
class Config:
    """Time sampling."""

    n: int = 5  # rounds
    batch_sizes: tuple[int, ...] = (1, 8)
    new_tokens: int = 200
    n_layer: int = 12
    n_embd: int = 768  # width; a head has 64 of it
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None  # write the figures here as JSON


def measure(config: Config) -> dict[str, Any]:
    """Print the figures and return them, raw."""
    import transformers

    torch.manual_seed(0)
    dtype, device = getattr(torch, config.dtype), choose_device(config.device)
    sizes = {"n_layer": config.n_layer, "n_head": config.n_embd // 64, "n_embd": config.n_embd}
    model = GPT(GPTConfig(encoding="bytes", **sizes)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval().to(device)
        model = GPT.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    model = model.to(device)
    print(f"{device_name(device)}, PyTorch {torch.__version__}, transformers {transformers.__version__}, "
          f"{config.dtype}, n = {config.n}")  # fmt: skip
    results = {}
    for batch_size in config.batch_sizes:
        prompt = torch.randint(0, 50257, (batch_size, 16), device=device)
        write = functools.partial(GPT.generate, idx=prompt, max_new_tokens=config.new_tokens, temperature=0)
        ways = {"generate": functools.partial(write, model)}
        if choose_compile(True, device)[0]:
            ways["compiled"] = functools.partial(write, model, compile=True)
        options = {"max_new_tokens": config.new_tokens, "do_sample": False, "use_cache": True}
        ways["transformers"] = functools.partial(theirs.generate, prompt, **options)
        texts = [way().cpu() for way in ways.values()]
        same = all(torch.equal(text, texts[-1]) for text in texts)
        for one in (model, theirs):
            one.to(dtype)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(config.n + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way().cpu()  # waits for the device
                seconds = time.perf_counter() - start
                rates[name].append(batch_size * config.new_tokens / seconds)
        rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
        for one in (model, theirs):
            one.float()
        for name, values in rates.items():
            ratios = [ours / theirs for ours, theirs in zip(values, rates["transformers"], strict=True)]
            line = f"batch {batch_size}, {name:12} {statistics.median(values):7.1f} tokens/s "
            line += (
                f"({min(values):.1f} to {max(values):.1f}), {statistics.median(ratios):.2f} x transformers "
            )
            print(line + f"({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"batch {batch_size}: {'the same' if same else 'NOT the same'} text in float32")
        results[batch_size] = {"tokens_per_second": rates, "same_text": same}
    return {
        "device": device_name(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": config.dtype,
        "n": config.n,
        "new_tokens": config.new_tokens,
        "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
        "by_batch_size": results,
    }


def main(config: Config) -> None:
    result = measure(config)
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
