"""
What a run says of itself: the table at its start, a line or a bar while it trains, the facts in run.json.
"""

import math
import sys
import time
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from device import choose_attention, device_name, peak_flops
from run_folder import versions


def gather_facts(
    config: Any, model: Any, shards: Any, layout: Any, *, dtype: Any, compile_note: str,
    memory: str, micro_batch_size: int, val_tokens: int, hellaswag_items: int,
) -> dict[str, Any]:  # fmt: skip
    """What run.json records: all that a reader needs to know, or to repeat the run."""
    return {
        "train_config": asdict(config),
        "model_config": asdict(model.config),
        "parameters": model.config.n_parameters,
        "encoding": shards.encoding,
        "data": {
            "dataset": shards.dataset,
            "fingerprint": shards.fingerprint,
            "train_tokens": shards.count("train"),
            "train_shards": len(shards.files["train"]),
        },
        "device": device_name(layout.device),
        "world_size": layout.world_size,
        "precision": f"{str(dtype).removeprefix('torch.')}, torch.compile {compile_note}",
        "attention": "the first that works of "
        + ", ".join(backend.name.lower() for backend in choose_attention(layout.device)),
        "memory": memory + (", the blocks recomputed" if model.recompute else ""),
        "micro_batch_size": micro_batch_size,
        "loss_chunks": model.loss_chunks,
        "grad_accum_steps": config.total_batch_size
        // (micro_batch_size * config.sequence_length * layout.world_size),
        "val_tokens": val_tokens,
        "hellaswag_items": hellaswag_items,
        "versions": versions(),
    }


def describe(config: Any, facts: dict[str, Any]) -> str:
    """What a person about to spend 50 hours wants to know, as a table."""
    tokens, data, model = config.max_steps * config.total_batch_size, facts["data"], facts["model_config"]
    rows = {
        "device": f"{facts['device']}; processes: {facts['world_size']}",
        "precision": facts["precision"],
        "attention": facts["attention"],
        "memory": facts["memory"],
        "model": f"{facts['parameters']:,} parameters: {model['n_layer']} layers, {model['n_head']} heads, "
        f"width {model['n_embd']}, block size {model['block_size']}, vocabulary {model['vocab_size']:,} "
        f"({model['encoding']})",
        "data": f"{config.data_dir}: {data['train_tokens']:,} training tokens, {data['train_shards']} shards",
        "training": f"{config.max_steps:,} steps, {tokens:,} tokens, "
        f"{tokens / data['train_tokens']:.2f} epochs",
        "batch": f"{config.total_batch_size:,} tokens a step = {facts['micro_batch_size']} rows x "
        f"{config.sequence_length} tokens x {facts['world_size']} processes x {facts['grad_accum_steps']} "
        "micro-steps",
        "validation": f"{facts['val_tokens']:,} tokens every {config.val_every} steps",
        "HellaSwag": f"{facts['hellaswag_items']:,} items every {config.hellaswag_every} steps",
        "run folder": str(config.log_dir),
    }
    if not config.val_every:
        rows["validation"] = "off"
    if not facts["hellaswag_items"]:
        rows["HellaSwag"] = "off"
    if config.warmup_steps >= config.max_steps:
        rows["note"] = f"the warm-up ({config.warmup_steps} steps) is as long as the run; see --warmup_steps"
    return "\n".join(f"{name + ':':12} {value}" for name, value in rows.items())


class Progress:
    """The main process's voice: on a terminal a bar, elsewhere the tutorial's lines, at most one a second."""

    def __init__(self, config: Any, layout: Any):
        self.config, self.is_main = config, layout.is_main
        self.on_terminal = sys.stderr.isatty()
        self.peak = peak_flops(device_name(layout.device))  # of each device; None where it is not known
        self.world_size = layout.world_size
        self.last_line = -math.inf
        self.first_steps: list[float] = []  # seconds

    def start(self, first_step: int, description: str, flops_per_token: int) -> None:
        self.flops_per_token = flops_per_token
        self.say(description)
        silent = not (self.is_main and self.on_terminal)
        self.bar = tqdm(total=self.config.max_steps, initial=first_step, unit="step", disable=silent,
                        dynamic_ncols=True)  # fmt: skip

    def say(self, text: str) -> None:
        """One event, above the bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        """One training step, in nats and seconds."""
        if not self.is_main:
            return
        rate = self.config.total_batch_size / seconds
        mfu = rate * self.flops_per_token / (self.peak * self.world_size) if self.peak else None
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, norm {norm:.2f}, {rate:,.0f} tokens/s"
                                 + (f", MFU {mfu:.1%}" if mfu else ""))  # fmt: skip
        self.bar.update()
        if not self.on_terminal and time.monotonic() - self.last_line >= 1:
            self.last_line = time.monotonic()
            self.say(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                     f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.2f}"
                     + (f" | mfu: {mfu:.1%}" if mfu else ""))  # fmt: skip
        self.first_steps.append(seconds)
        if len(self.first_steps) == 5:  # the first is slower: it compiles, and allocates
            hours = min(self.first_steps) * (self.config.max_steps - step - 1) / 3600
            self.say(f"training will take about {hours:.2g} hours ({min(self.first_steps):.2f} s a step)")
