"""
Let's reproduce GPT-2 (124M).

One process:             python train_gpt2.py
One node, 8 GPUs:        torchrun --standalone --nproc_per_node=8 train_gpt2.py
No GPU, three minutes:   python train_gpt2.py --demo
After an interruption:   the same command with --resume

The recipe is the one of the lecture: GPT-2's architecture, GPT-3's schedule, 10 billion tokens of
FineWeb-Edu, 524,288 of them a step. The defaults below are that recipe; each is a flag.

This file, top to bottom: configuration, model, optimisation, data, evaluation, run plumbing, main. Beside it:
fineweb.py writes the token shards, shards.py reads them and holds the encodings, device.py knows what the
device can do, processes.py starts, stops and joins processes, hellaswag.py scores a model, sample.py lets it
write, plot.py draws the curves, report.py is what a run says, run_folder.py keeps what it leaves on disk.
"""

import functools
import gc
import json
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hellaswag
from device import (
    GB,
    choose_compile,
    choose_dtype,
    device_name,
    fast_attention,
    head_room,
    is_out_of_memory,
    keep_freed_memory,
    memory_limit,
    to_device,
)
from fineweb import write_demo_shards
from processes import Layout, StopSignals, agree, faults_in_one_line, leave, start_processes
from report import Progress, check_tracker, closing_table, gather_facts, plural, readable, result_of
from run_folder import RunFolder, list_checkpoints
from shards import (
    END_OF_TEXT,
    CommandError,
    InputError,
    RunFault,
    Shards,
    get_encoding,
    hub_errors,
    load_shards,
    run_command,
    to_json,
)

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class GPTConfig:
    """The architecture; it goes into the checkpoint. The defaults are GPT-2 (124M)."""

    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50257  # 50,000 BPE merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # width of the residual stream
    encoding: str = "gpt2"  # what the token ids stand for, see shards.get_encoding

    def __post_init__(self) -> None:
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise InputError(f"every size of a model must be at least 1: {self}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} can't be divided among n_head {self.n_head} heads")

    @property
    def n_parameters(self) -> int:
        """Trainable numbers: 124,439,808 for GPT-2 (124M)."""
        C = self.n_embd
        block = 12 * C**2 + 13 * C  # attention 4 C x C, MLP 8 C x C, their biases, two norms
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C

    def flops_per_token(self, sequence_length: int) -> int:
        """Work of a training step per token (PaLM paper, appendix B): 2 operations per parameter forward and
        4 backward, and 12 per layer, channel and position for attention's two products. Causality, which
        spares half of those, is not counted."""
        return 6 * self.n_parameters + 12 * self.n_layer * self.n_embd * sequence_length


# Table 2 of the GPT-2 paper; there its smallest model is called 117M.
PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass(frozen=True)
class TrainConfig:
    """Train GPT-2 on token shards. The defaults reproduce GPT-2 (124M) on FineWeb-Edu."""

    # -- the run
    demo: bool = False  # a small GPT on the prose of Python's own documentation, minutes on a CPU
    data_dir: Path = Path("edu_fineweb10B")  # token shards, as fineweb.py writes them
    log_dir: Path = Path("log")  # the run's folder: log, picture, checkpoints
    resume: bool = False  # go on from the newest checkpoint in log_dir; start if there is none
    verify: bool = False  # read every shard at the start and compare it with the sum in shards.json

    # -- the model
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # shape of the model
    init_from: str | None = None  # start from these weights: a Hub name (gpt2) or a checkpoint folder
    n_layer: int | None = None  # layers, if other than the model's
    n_head: int | None = None  # attention heads, if other than the model's
    n_embd: int | None = None  # width, if other than the model's
    sequence_length: int = 1024  # tokens in a row of the batch; the new model's block size

    # -- the recipe
    total_batch_size: int = 524_288  # tokens per step, 2**19: about 0.5M (GPT-3 paper, table 2.1)
    max_steps: int = 19_073  # updates: one epoch of 10 billion tokens at 2**19 a step
    warmup_steps: int = 715  # steps until max_lr: 375 million tokens (GPT-3 paper, appendix B)
    max_lr: float = 6e-4  # peak learning rate (GPT-3 paper, table 2.1, "Small")
    weight_decay: float = 0.1  # on matrices only (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # largest global gradient norm, 0: any (GPT-3 paper, appendix B)
    seed: int = 1337  # of the initial weights and the order of the data
    shuffle: bool = True  # visit shards and windows in random order, else as they lie

    # -- measuring and saving; an interval of 0: never
    val_every: int = 250  # steps between validation losses
    val_tokens: int = 10_485_760  # tokens of the validation split to measure on: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag scores
    hellaswag_data: Path | None = None  # a local HellaSwag .jsonl; default: from the Hub
    hellaswag_limit: int | None = None  # score so many items, spread over all; default: all
    sample_every: int = 250  # steps between samples
    checkpoint_every: int = 1000  # steps between checkpoints (at least every 15 minutes); the last two stay
    keep_every: int = 5000  # steps between checkpoints that are kept for good

    # -- the machine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best of them that is there
    compile: bool = True  # use torch.compile where it works: CUDA with a C compiler
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the most that fit
    memory_limit_gb: float | None = None  # take at most so many GB (2**30 bytes) of a GPU; default: all
    recompute: bool = False  # compute the blocks again in the backward pass: less memory, more time
    timeout_minutes: float = 10.0  # give up on another process that does not answer for so long

    # -- what it says
    tracker: Literal["wandb", "trackio"] | None = None  # send the values there too; pip install it first
    dollars_per_hour: float | None = None  # price of the machine, for the cost at the start and the end
    describe: bool = False  # list the model's tensors, as in the state dictionary, and stop


def check_config(config: TrainConfig) -> None:
    """Raises InputError for a number that can't be meant."""
    positive = {"n_layer", "n_head", "n_embd", "sequence_length", "total_batch_size", "micro_batch_size"}
    positive |= {"val_tokens", "timeout_minutes", "hellaswag_limit", "memory_limit_gb"}
    for name, value in asdict(config).items():
        if not isinstance(value, int | float):
            continue
        if not (value > 0 if name in positive else value >= 0):  # written so that nan fails too
            raise InputError(f"--{name} {value}: must be {'more than' if name in positive else 'at least'} 0")


# What --demo changes; any flag still overrides it.
DEMO = TrainConfig(
    demo=True, data_dir=Path("demo_data"), log_dir=Path("log/demo"),
    n_layer=2, n_head=4, n_embd=192, sequence_length=128,
    total_batch_size=2048, max_steps=1000, warmup_steps=100, max_lr=4e-3,
    val_every=200, val_tokens=65_536, hellaswag_every=0, sample_every=200, checkpoint_every=500,
    dtype="float32", compile=False,
)  # fmt: skip

MIN_LR_RATIO = 0.1  # the schedule ends at a tenth of its peak (GPT-3 paper, appendix B)
PROMPT = "Hello, I'm a language model,"
PAD_VOCAB_TO = 128  # 50,257 -> 50,304 rows: matrix units want whole tiles
LOSS_CHUNKS = 8  # where memory is short, the logits of a micro-batch exist an eighth at a time
ENOUGH_TOKENS = 2**13  # a micro-batch of so many is not worth chunks to make it larger
MOST_TOKENS = {"cuda": 2**16, "mps": 2**14, "cpu": 2**12}  # of a micro-batch, at most

# -----------------------------------------------------------------------------
# model; the names are those of OpenAI's checkpoint


class KVCache:
    """For reading and writing after training, which never uses it; skip it at first. The keys and values of
    what one layer's attention has read, so that they are computed once: for text that is written token by
    token, or goes on in several ways. Space for `length` tokens."""

    def __init__(self, length: int):
        self.length, self.n_read = length, 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add those of T more tokens, (B, nh, T, hs); returns those of all that were read."""
        if self.n_read == 0:
            shape = (*k.shape[:2], self.length, k.size(3))
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.n_read = self.n_read, self.n_read + k.size(2)
        if self.n_read > self.length:
            raise ValueError(f"a cache for {self.length} tokens is given {self.n_read}")
        self.keys[:, :, start : self.n_read] = k
        self.values[:, :, start : self.n_read] = v
        return self.keys[:, :, : self.n_read], self.values[:, :, : self.n_read]

    def select(self, rows: torch.Tensor, length: int) -> "KVCache":
        """The rows with these indices, each as often as it is named, with space for `length` tokens: what was
        read goes on in several ways."""
        copy = KVCache(length)
        copy.append(*(t[rows, :, : self.n_read] for t in (self.keys, self.values)))
        return copy


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v)
        )  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        if k.size(2) == T:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # the queries are the last T of all positions; a single one sees everything
            seen = None
            if T > 1:
                seen = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads' outputs side by side
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # erf was slow in 2018; the weights have grown up with tanh
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention is where tokens communicate, the MLP is where each one thinks; both only add to the residual
    stream. The norms stand before them (GPT-2 paper, section 2.3): gradients flow back along it unchanged."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, with OpenAI's names for its parts."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.loss_chunks = 1  # how it computes, not what: see chunked_loss, and TrainConfig.recompute
        self.recompute = False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tied: tokens of like meaning want like vectors coming in and like logits going out; 38M parameters
        # saved.
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        # Each of the 2 * n_layer additions to the residual stream adds variance; this keeps it from growing
        # with depth (GPT-2 paper, section 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, caches: list[KVCache] | None = None
    ):
        """The logits of the next token at every position and, given targets, their mean cross-entropy.

        Args:
            idx: (B, T) int64 token ids, T at most block_size.
            targets: (B, T) int64, the token after each position; -100 where none counts.
            caches: of `new_caches`, to go on after what they have read; then idx holds only what is new.

        Returns:
            logits (B, T, vocab_size) and the loss in nats, a scalar, or None without targets. With
            `loss_chunks` above 1 and targets, the logits are None: they never exist as a whole.

        Raises:
            ValueError: the sequence is longer than block_size.
        """
        hidden = self.hidden_states(idx, caches)
        if targets is not None and self.loss_chunks > 1:
            return None, self.chunked_loss(hidden, targets)
        logits = self.head(hidden)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def hidden_states(self, idx: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """The residual stream after the last block and its norm: (B, T) token ids to (B, T, n_embd)."""
        start = caches[0].n_read if caches else 0
        end = start + idx.size(1)
        if self.config.block_size < end:
            raise ValueError(
                f"a sequence of {end} tokens is longer than the model's block size, {self.config.block_size}"
            )
        pos = torch.arange(start, end, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        for i, block in enumerate(self.transformer.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def new_caches(self, length: int) -> list[KVCache]:
        """A cache for each layer, with space for `length` tokens."""
        return [KVCache(length) for _ in self.transformer.h]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size). Rows that only pad the vocabulary are cut
        off here, so they never enter a softmax, get no gradient, are never sampled, and stay zero."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def chunked_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of hidden states (B, T, n_embd) and targets (B, T), for little memory: a
        row of 1,024 tokens has 206 MB of float32 logits, several times over with their gradients. Here they
        exist for one chunk at a time, in the backward pass once more."""

        def summed(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(hidden), targets, reduction="sum")

        chunks = zip(
            hidden.flatten(0, 1).chunk(self.loss_chunks),
            targets.flatten().chunk(self.loss_chunks),
            strict=True,
        )
        total = sum(checkpoint(summed, h, t, use_reentrant=False) for h, t in chunks)
        return total / (targets != -100).sum()

    def pad_vocabulary(self, multiple: int = PAD_VOCAB_TO) -> "GPT":
        """Round the rows of the tied embedding up to a multiple, with zeros, for speed; the model stays the
        same function. Call it before the optimizer is made. Returns the model."""
        weight = self.transformer.wte.weight
        rows = -(-self.config.vocab_size // multiple) * multiple
        padded = torch.zeros(rows, weight.size(1), dtype=weight.dtype, device=weight.device)
        padded[: self.config.vocab_size] = weight.detach()[: self.config.vocab_size]
        self.transformer.wte.weight = self.lm_head.weight = nn.Parameter(padded)
        self.transformer.wte.num_embeddings = self.lm_head.out_features = rows
        return self

    @torch.no_grad()
    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue each row of `idx`, one token after another.

        Args:
            idx: (B, T) int64, T at least 1.
            temperature, top_k, top_p: see `choose_token`.
            seed: same seed, same text; None draws from PyTorch's global generator.

        Yields:
            (B, 1) int64: the next token of each row, max_new_tokens times. A text longer than block_size is
            continued from its last block_size tokens; since all their positions change with every token,
            nothing can be kept then, and each costs as much as reading the whole window.
        """
        generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
        block_size = self.config.block_size
        text = unread = idx[:, -block_size:]
        caches = self.new_caches(min(text.size(1) + max_new_tokens, block_size))
        for _ in range(max_new_tokens):
            if caches[0].n_read + unread.size(1) <= block_size:
                last = self.hidden_states(unread, caches)[:, -1]  # (B, C)
            else:
                last = self.hidden_states(text[:, -block_size:])[:, -1]
            unread = choose_token(self.head(last).float(), temperature, top_k, top_p, generator)
            text = torch.cat((text, unread), dim=1)
            yield unread

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """`idx` and what `stream` continues it by: (B, T + max_new_tokens) int64."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **options)), dim=1)

    # The folder that Hugging Face's GPT2LMHeadModel reads and writes. Its linear layers are OpenAI's
    # "Conv1D", whose weight is the transpose of nn.Linear's.
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """The model in a folder (a checkpoint, a run's folder, or any Hugging Face GPT-2) or on the Hub by
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name. Reads safetensors; a pickle is never opened.

        Raises InputError when there is no such model, it is not a GPT-2, or its tensors don't fit its config.
        """
        config_file, weights_file = find_model(name_or_folder)
        config = read_config(config_file)
        model = cls(config)
        try:
            loaded = safetensors.torch.load_file(weights_file)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{weights_file}: not a sound safetensors file ({error})") from error
        # OpenAI's own files lack the prefix; masks stored by old versions are no weights; the head is tied
        loaded = {
            "transformer." + key.removeprefix("transformer."): tensor
            for key, tensor in loaded.items()
            if not key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))
        }
        own = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
        if different := sorted(own.keys() ^ loaded.keys()):
            raise InputError(f"{weights_file}: tensors missing or too many: {', '.join(different[:5])}")
        with torch.no_grad():
            for key, tensor in loaded.items():
                tensor = tensor.t() if key.endswith(cls.TRANSPOSED) else tensor
                if own[key].shape != tensor.shape:
                    raise InputError(
                        f"{weights_file}: {key} is {list(tensor.shape)}, "
                        f"its config.json means {list(own[key].shape)}"
                    )
                own[key].copy_(tensor)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face GPT2LMHeadModel folder: config.json, generation_config.json,
        model.safetensors (float32, without padding) and, for the gpt2 encoding, the tokenizer's files."""
        folder, config = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            key: tensor.detach().float().cpu()
            for key, tensor in self.state_dict().items()
            if key != "lm_head.weight"
        }
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: config.vocab_size]
        state = {
            key: (tensor.t() if key.endswith(self.TRANSPOSED) else tensor).contiguous()
            for key, tensor in state.items()
        }
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        end_of_text = config.vocab_size - 1  # the last id in both encodings
        special_tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        texts = {"config.json": to_json({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
            "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
            "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "scale_attn_weights": True,
            "tie_word_embeddings": True, "torch_dtype": "float32", **special_tokens,
            "encoding": config.encoding,
        })}  # fmt: skip
        texts["generation_config.json"] = to_json({**special_tokens, "_from_model_config": True})
        if config.encoding == "gpt2":
            texts |= tokenizer_files(config.block_size)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def choose_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the next token of each row: (B, vocab_size) float32 to (B, 1) int64.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens; None: among all.
        top_p: draw among the fewest tokens that have this probability together (nucleus sampling: Holtzman et
            al., "The Curious Case of Neural Text Degeneration", section 3.1); 1: among all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # 0 at most: no overflow
    tokens = None
    if top_k is not None or top_p < 1:
        logits, tokens = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # most likely first
    probabilities = F.softmax(logits, dim=-1)
    if top_p < 1:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before have together
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return choice if tokens is None else tokens.gather(-1, choice)


def find_model(name_or_folder: str | Path) -> tuple[Path, Path]:
    """config.json and model.safetensors of a model: in a folder, in a run's newest checkpoint, or from the
    Hub."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            if checkpoints := list_checkpoints(folder):
                folder = checkpoints[-1]
            elif runs := [path for path in sorted(folder.iterdir()) if list_checkpoints(path)]:
                raise InputError(f"{folder} is not a model; did you mean {' or '.join(map(str, runs[:3]))}?")
            elif (folder / "log.txt").exists():
                raise InputError(f"{folder} is a run without a checkpoint: there is no model in it")
        for file in (folder / "config.json", folder / "model.safetensors"):
            if not file.exists():
                raise InputError(f"{folder} is not a model: it has no {file.name}")
        return folder / "config.json", folder / "model.safetensors"
    name = str(name_or_folder)
    if name.startswith((".", "/", "~", "log/")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name}")
    if folder.exists():
        raise InputError(f"{name} is a file; a model is a folder, or a name on the Hub")
    return download_model(name)


@functools.cache
def download_model(name: str) -> tuple[Path, Path]:
    """config.json and model.safetensors of a model on the Hub, fetched if they are not here yet."""
    from huggingface_hub import hf_hub_download

    repository = f"openai-community/{name}" if name in PRESETS else name
    if os.environ.get("RANK", "0") == "0":
        print(f"looking for {repository} on the Hugging Face Hub", file=sys.stderr)
    run = Path("log", name)
    hint = f" (did you mean {run}?)" if list_checkpoints(run) else ""
    with hub_errors(f"the model {name!r}, which is no folder here either{hint},"):
        config_file, weights_file = (
            Path(hf_hub_download(repository, file)) for file in ("config.json", "model.safetensors")
        )
    return config_file, weights_file


def read_config(file: Path) -> GPTConfig:
    """The architecture that a Hugging Face config.json describes; InputError if it is not a GPT-2's."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        sizes = {"block_size": "n_positions"} | {
            name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
        }
        config = GPTConfig(**{ours: operator.index(stored[theirs]) for ours, theirs in sizes.items()},
                           encoding=stored.get("encoding", "gpt2"))  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: not the configuration of a GPT-2 ({type(error).__name__}: {error})"
        ) from error
    fixed = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for key, value in fixed.items():
        if stored.get(key, value) not in (value, 4 * config.n_embd if key == "n_inner" else value):
            raise InputError(f"{file}: {key} is {stored[key]!r}, a GPT-2 has {value!r}")
    return config


def check_vocabulary(config: GPTConfig, encoding: tiktoken.Encoding) -> None:
    """Raises InputError unless the model's ids are the encoding's."""
    if config.vocab_size != encoding.n_vocab:
        raise InputError(
            f"the model has {config.vocab_size} tokens, its encoding {encoding.name!r} {encoding.n_vocab}"
        )


@functools.cache
def tokenizer_files(model_max_length: int) -> dict[str, str]:
    """GPT-2's tokenizer as the files, name to text, that `AutoTokenizer.from_pretrained` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = get_encoding("gpt2")._mergeable_ranks  # bytes of a token to its id: the order of merging
    letters = bytes_to_unicode()  # these files are text: a letter for each byte

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # merge as the encoder does, all but the last time: that one made this token
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((written(parts[0]), written(parts[1])))
    tokenizer = Tokenizer(
        models.BPE(vocab={written(token): rank for token, rank in ranks.items()}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its pattern is GPT-2's
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model_max_length, **special_tokens,
                "add_prefix_space": False, "clean_up_tokenization_spaces": False}  # fmt: skip
    stored = json.loads(tokenizer.to_str())
    stored["model"]["merges"] = [" ".join(pair) for pair in merges]  # old releases know no other spelling
    return {"tokenizer.json": to_json(stored), "tokenizer_config.json": to_json(settings)}


# -----------------------------------------------------------------------------
# optimisation


def configure_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with betas 0.9, 0.95 and eps 1e-8 (GPT-3 paper, appendix B). Matrices and embeddings decay;
    biases and norms, whose size carries meaning, don't."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # fused: one kernel for all tensors instead of several for each
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate at `step`: linear warm-up, then a cosine down to a tenth at max_steps, then constant."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps  # the first step already learns
    if step >= config.max_steps:
        return config.max_lr * MIN_LR_RATIO
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)  # 0 to 1
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 to 0
    return config.max_lr * (MIN_LR_RATIO + (1.0 - MIN_LR_RATIO) * cosine)


# -----------------------------------------------------------------------------
# data


class TokenLoader:
    """Rows of `sequence_length` tokens and their targets, in an order that depends on (seed, step) alone.

    A window is `sequence_length + 1` consecutive tokens of one shard, starting at a multiple of
    `sequence_length`. Epoch e visits the shards, and each shard's windows, in orders drawn from (seed, e) and
    (seed, e, shard). Step s takes the next `rows_per_step` windows after those of step s - 1; they are dealt
    out by micro-step, then by rank, so a step has the same tokens whatever the number of processes and the
    size of the micro-batch. There is no state: any step can be asked for.
    """

    def __init__(
        self,
        shards: Shards,
        split: str,
        *,
        sequence_length: int,
        batch_size: int = 1,
        rows_per_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        vocab_size: int = 2**16,
    ):
        self.files, self.tokens = shards.files[split], shards.tokens[split]
        self.T, self.B, self.rows_per_step = sequence_length, batch_size, rows_per_step
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.vocab_size = seed, shuffle, vocab_size
        self.windows_of = [max(0, len(tokens) - 1) // self.T for tokens in self.tokens]  # per shard
        self.n_windows = sum(self.windows_of)  # per epoch
        if self.n_windows == 0:
            raise InputError(
                f"{shards.folder}: no shard of the {split} split has {self.T + 1} tokens, which one row of "
                f"--sequence_length {self.T} needs"
            )
        # an order is made once and used for a whole epoch, or a whole shard: two, for a step across the
        # border
        self.shard_order = functools.lru_cache(2)(self.shard_order)
        self.window_order = functools.lru_cache(2)(self.window_order)

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and how many windows the shards up to and with each of them hold."""
        order = np.arange(len(self.tokens))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return order, np.cumsum(np.take(self.windows_of, order))

    def window_order(self, epoch: int, shard: int) -> np.ndarray:
        order = np.arange(self.windows_of[shard])
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch, shard)).permutation(order)
        return order

    def locate(self, index: int) -> tuple[int, int]:
        """Window `index` of the run (epochs follow one another): its shard, and the offset where it
        starts."""
        epoch, index = divmod(index, self.n_windows)
        order, ends = self.shard_order(epoch)
        i = int(np.searchsorted(ends, index, side="right"))
        shard = int(order[i])
        window = index - int(ends[i - 1] if i else 0)
        return shard, int(self.window_order(epoch, shard)[window]) * self.T

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows first .. first + count - 1 of the run as inputs and targets, (count, T) int64 each.

        Raises InputError, naming shard and offset, for a token id outside the vocabulary.
        """
        rows = np.empty((count, self.T + 1), dtype=np.int64)
        for row, index in zip(rows, range(first, first + count), strict=True):
            shard, start = self.locate(index)
            row[:] = self.tokens[shard][start : start + self.T + 1]
            if row.max() >= self.vocab_size:
                offset = start + int(row.argmax())
                raise InputError(
                    f"{self.files[shard]}: token id {row.max()} at offset {offset}, outside the "
                    f"vocabulary of {self.vocab_size}; the shard is damaged or of another encoding",
                    alone=True,
                )
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets, (B, T) int64 each, in one micro-step of one step."""
        first = (micro_step * self.world_size + self.rank) * self.B
        return self.windows(step * self.rows_per_step + first, self.B)


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def estimate_val_loss(
    model: nn.Module,
    loader: TokenLoader,
    n_windows: int,
    layout: Layout,
    autocast: torch.autocast,
    doing: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss, nats per token, over the first `n_windows` windows of the validation split, divided among
    the ranks; `doing` is told how far it is. The last batch is filled up with targets that don't count:
    shapes stay fixed for the compiled model."""
    losses = [torch.zeros((), device=layout.device)]
    stride = layout.world_size * loader.B
    for first in range(layout.rank * loader.B, n_windows, stride):
        doing(first // stride, -(-n_windows // stride))
        count = min(loader.B, n_windows - first)
        x, y = loader.windows(first, count)
        if count < loader.B:
            x, y = F.pad(x, (0, 0, 0, loader.B - count)), F.pad(y, (0, 0, 0, loader.B - count), value=-100)
        x, y = to_device(layout.device, x, y)
        with fast_attention(layout.device), autocast:
            _, loss = model(x, y)
        losses.append(loss.float() * count)
    total = torch.stack(losses).cpu().double().sum().to(layout.collective_device)
    if layout.world_size > 1:
        dist.all_reduce(total)
    return total.item() / n_windows


def write_samples(
    raw_model: GPT,
    encoding: tiktoken.Encoding,
    device: torch.device,
    autocast: torch.autocast,
    count: int = 4,
    max_new_tokens: int = 32,
) -> list[str]:
    """Continuations of "Hello, I'm a language model,", the same draws every time."""
    if encoding.name == "bytes":  # one longer text: a GPT-2 token is about four bytes of English
        count, max_new_tokens = 1, 8 * max_new_tokens
    prompt = encoding.encode_ordinary(PROMPT)[-raw_model.config.block_size :]
    idx = torch.tensor([prompt] * count, device=device)
    with autocast:
        rows = raw_model.generate(idx, max_new_tokens, seed=42).tolist()
    return [encoding.decode(row) for row in rows]


# -----------------------------------------------------------------------------
# run plumbing: the micro-batch, compilation, the recipe


def micro_batch_sizes(config: TrainConfig, model_config: GPTConfig, layout: Layout) -> list[int]:
    """The rows per forward pass and process that may be tried, most first; just one if the flag names it.
    Where a full memory raises no error but slows the computer down, or ends the process, a cautious sum
    leaves out what is too large.

    Raises InputError, with numbers that work, if the batch can't be divided.
    """
    T, W = config.sequence_length, layout.world_size
    if config.total_batch_size % (T * W):
        raise InputError(
            f"--total_batch_size {config.total_batch_size} can't be divided into rows of {T} tokens for {W} "
            f"processes; {max(1, round(config.total_batch_size / (T * W))) * T * W} can"
        )
    rows = config.total_batch_size // (T * W)  # of one process, one step
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    if config.micro_batch_size is None:
        sizes = [n for n in divisors if n * T <= MOST_TOKENS[layout.device.type]] or [1]
        on_cuda = layout.device.type == "cuda"
        limit = None if on_cuda else memory_limit(layout.device, config.memory_limit_gb)
        if limit is not None:
            # float32: the logits three times over, and per layer what some 17 vectors of n_embd take; all
            # that twice, for what the C library keeps
            per_row = 8 * T * (3 * model_config.vocab_size + 17 * model_config.n_layer * model_config.n_embd)
            room = limit - 16 * model_config.n_parameters
            sizes = [n for n in sizes if n * per_row <= room] or [1]
        return sizes
    if config.micro_batch_size not in divisors:
        raise InputError(
            f"--micro_batch_size {config.micro_batch_size} does not divide the {rows} rows that each "
            f"process has in a step; these do: {', '.join(map(str, reversed(divisors)))}"
        )
    return [config.micro_batch_size]


def check_memory(config: TrainConfig, model_config: GPTConfig, layout: Layout) -> str:
    """What weights, gradients and AdamW's two moments take, in words; InputError if they alone can't fit."""
    each = 4 * model_config.n_parameters / GB  # float32
    need = f"{4 * each:.2f} GB for weights, gradients and the optimizer's two moments"
    limits = layout.from_all(memory_limit(layout.device, config.memory_limit_gb))
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and 4 * each * GB > limit:
        raise InputError(
            f"a model of {model_config.n_parameters:,} parameters needs {need}, {each:.2f} GB each; "
            f"{device_name(layout.device)} has {limit / GB:.2f} GB for it: choose a smaller --model"
        )
    return need


def find_micro_batch_size(sizes: list[int], fits: Callable[[int, int], bool], enough: int) -> tuple[int, int]:
    """The most rows that fit, and in how many chunks their loss is computed.

    Chunks cost some time, so they are tried only where a micro-batch without them is smaller than `enough`
    rows. Raises InputError if nothing fits.

    Args:
        sizes: rows to try, most first.
        fits: (rows, chunks) -> whether a step works with them.
    """
    rows = next((size for size in sizes if fits(size, 1)), 0)
    if rows < min(enough, sizes[0]):
        chunked = next((size for size in sizes if size > rows and fits(size, LOSS_CHUNKS)), 0)
        if chunked:
            return chunked, LOSS_CHUNKS
        if rows:
            fits(rows, 1)  # again: what was compiled for it went with the failures that came after
    if not rows:
        raise InputError(
            f"out of memory with a micro-batch of {sizes[-1]} rows; a smaller --micro_batch_size, "
            "--recompute, a shorter --sequence_length or a smaller --model takes less"
        )
    return rows, 1


def warm_up(model: nn.Module, raw_model: GPT, config: TrainConfig, rows: int, layout: Layout) -> None:
    """Two micro-steps, an update and a validation batch in the sizes of a real step: they compile, and
    allocate, what a real step will. The learning rate is 0: the weights stay as they are."""
    x, y = torch.zeros((2, rows, config.sequence_length), dtype=torch.int64, device=layout.device)
    optimizer = configure_optimizer(raw_model, replace(config, max_lr=0.0))
    dtype = choose_dtype(config.dtype, layout.device, raw_model.config.n_embd)
    autocast = torch.autocast(layout.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with fast_attention(layout.device):
        for _ in range(2):  # the second time with gradients to add to, and the optimizer's moments there
            with autocast:
                _, loss = model(x, y)
            loss.backward()
            for parameter in raw_model.parameters():
                parameter.grad.zero_()  # an overflow would reach the weights even so
            optimizer.step()
        with torch.no_grad(), autocast:
            model(x, y)[1].item()


def prepare_model(
    raw_model: GPT, config: TrainConfig, sizes: list[int], layout: Layout, say: Callable[[str], None]
) -> tuple[nn.Module, int, str]:
    """The model compiled where that works, and wrapped if there are several processes; the rows of a
    micro-batch, found by trying; and a word on compilation."""

    def fits(rows: int, chunks: int) -> bool:
        raw_model.loss_chunks = chunks
        reason = None
        with head_room(layout.device, limit, config.memory_limit_gb):
            try:
                warm_up(model, raw_model, config, rows, layout)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0][:100]
            finally:
                raw_model.zero_grad(set_to_none=True)
        if reason:
            say(f"a micro-batch of {rows} rows{', loss in chunks' if chunks > 1 else ''}: {reason}")
            free_memory()
            if compiled:
                torch.compiler.reset()  # a function is compiled for so many shapes only
        return reason is None

    def free_memory() -> None:
        gc.collect()
        if layout.device.type == "cuda":
            torch.cuda.empty_cache()

    limit = memory_limit(layout.device, config.memory_limit_gb)
    use_compile, note = choose_compile(config.compile, layout.device)
    for compiled in (True, False) if use_compile else (False,):
        start = time.perf_counter()
        # each size of micro-batch is compiled for itself; a graph for any size would be slower. One graph for
        # the whole model: gradients are exchanged once in a step, too seldom to break it for the sake of
        # overlap.
        if compiled:
            torch._dynamo.config.optimize_ddp = False
        model: nn.Module = torch.compile(raw_model, dynamic=False) if compiled else raw_model
        if layout.world_size > 1:  # also gives every process the main one's weights
            gpus = [layout.device.index] if layout.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=gpus, gradient_as_bucket_view=True)
            model.require_backward_grad_sync = False  # each process tries for itself
        if len(sizes) == 1 and not compiled and layout.device.type != "cuda":
            return model, sizes[0], note  # nothing to find out
        say(f"warm-up: a step with a micro-batch of {plural(sizes[0], 'row', 's')}, the largest to try")
        found, fault = (0, 0), None
        try:
            found = find_micro_batch_size(sizes, fits, max(1, ENOUGH_TOKENS // config.sequence_length))
        except InputError as error:
            fault = error
        except Exception as error:  # whatever the compiler does not like; uncompiled, a true fault comes back
            if not compiled:
                raise
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        faults = [fault for fault in layout.from_all(fault) if fault]
        for fault in faults:
            if isinstance(fault, InputError):  # in every process, so that none waits for another
                raise fault
        if not faults:
            break
        note = f"off: it failed ({faults[0]})"
        say(f"torch.compile failed, training goes on without it ({faults[0]})")
        model = raw_model  # the wrapper goes, and the space for exchanging gradients with it
        free_memory()
    # of unlike GPUs, the smallest decides
    rows, chunks = zip(*layout.from_all(found), strict=True)
    raw_model.loss_chunks = max(chunks)
    say(f"warm-up: {time.perf_counter() - start:.1f} s, micro-batches of {plural(min(rows), 'row', 's')}"
        + (f", the loss in {raw_model.loss_chunks} chunks" if raw_model.loss_chunks > 1 else ""))  # fmt: skip
    return model, min(rows), note


def choose_model_config(config: TrainConfig, encoding: tiktoken.Encoding) -> GPTConfig:
    """The architecture that the flags ask for. InputError where they contradict --init_from or the data."""
    given = {name: value for name in ("n_layer", "n_head", "n_embd") if (value := getattr(config, name))}
    if config.init_from is None:
        shape = {**PRESETS[config.model], **given}
        return GPTConfig(config.sequence_length, encoding.n_vocab, encoding=encoding.name, **shape)
    loaded = read_config(find_model(config.init_from)[0])
    if config.model != TrainConfig.model:
        given |= PRESETS[config.model]
    for name, value in given.items():
        if value != getattr(loaded, name):
            raise InputError(f"--{name} {value}: --init_from {config.init_from} has {getattr(loaded, name)}")
    if loaded.encoding != encoding.name:
        raise InputError(
            f"--init_from {config.init_from} speaks the encoding {loaded.encoding!r}, the data in "
            f"{config.data_dir} {encoding.name!r}"
        )
    check_vocabulary(loaded, encoding)
    if config.sequence_length > loaded.block_size:
        raise InputError(
            f"--sequence_length {config.sequence_length} is longer than the block size of "
            f"--init_from {config.init_from}, {loaded.block_size}"
        )
    return loaded


def list_tensors(config: TrainConfig) -> str:
    """The state dictionary of the model, as a table: names, shapes, numbers."""
    if config.init_from:
        model = GPT.from_pretrained(config.init_from)
    else:
        model = GPT(choose_model_config(config, get_encoding("bytes" if config.demo else "gpt2")))
    rows = [
        f"{name:36} {list(tensor.shape)!s:16} {tensor.numel():>12,}"
        for name, tensor in model.state_dict().items()
    ]
    return "\n".join(
        [*rows, f"{model.config.n_parameters:,} parameters; lm_head.weight is transformer.wte.weight"]
    )


def recipe(config: TrainConfig, model_config: GPTConfig, shards: Shards) -> dict[str, Any]:
    """All that decides the run's numbers, as plain values. What is missing here (processes, micro-batch,
    precision, intervals) may differ when a run is resumed."""
    names = (
        "init_from", "sequence_length", "total_batch_size", "max_steps", "warmup_steps", "max_lr",
        "weight_decay", "grad_clip", "val_tokens", "seed", "shuffle",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in names},
        **asdict(model_config),
        "data": shards.fingerprint,
    }


def load_hellaswag(config: TrainConfig) -> list[hellaswag.Item]:
    """The items to score. Without them training goes on, which is said once; a local file that was asked for
    must be there."""
    if not config.hellaswag_every:
        return []
    try:
        return hellaswag.load_items(config.hellaswag_data, config.hellaswag_limit, "--hellaswag_data")
    except CommandError as error:
        if config.hellaswag_data is not None:
            raise
        print(f"training without HellaSwag: {error}")
        return []


def restore(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, trainer: dict[str, Any], layout: Layout
) -> None:
    """Put back what a checkpoint's `trainer` holds. Only the main process has read it: the others get the
    optimizer's moments over the network, so hosts need no disk in common."""
    if layout.is_main:
        optimizer.load_state_dict(trainer["optimizer"])
    if scaler_state := layout.from_main(lambda: trainer["scaler"]):  # empty if it was not needed then
        scaler.load_state_dict(scaler_state)
    torch.set_rng_state(layout.from_main(lambda: trainer["rng"]))
    if layout.world_size == 1:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        state.setdefault("step", torch.zeros((), device=parameter.device))
        for name in ("step", "exp_avg", "exp_avg_sq"):
            dist.broadcast(state.setdefault(name, torch.zeros_like(parameter)), src=0)


def non_finite_fault(step: int, loss: torch.Tensor, norm: float, layout: Layout) -> RunFault:
    """Says which rank's loss is not finite, asked only once something is known not to be, or else the
    norm."""
    losses = [loss.cpu()]
    if layout.world_size > 1:
        losses = [torch.zeros_like(loss) for _ in range(layout.world_size)]
        dist.all_gather(losses, loss)
    what = f"the gradient norm is {norm}, the losses are finite"
    for rank, value in enumerate(losses):
        if not torch.isfinite(value):
            what = f"the loss of rank {rank} is {value.item()}"
            break
    return RunFault(
        f"step {step}: {what}; the weights were not updated and the last checkpoint is intact. Resume with "
        "--dtype float32 to see if the precision is to blame; otherwise the learning rate is too high"
    )


# -----------------------------------------------------------------------------
# main


@faults_in_one_line()
def main(config: TrainConfig) -> None:
    check_config(config)
    if config.describe:
        print(list_tensors(config))
        return
    started = time.perf_counter()
    layout = start_processes(config.device, config.timeout_minutes)
    device, W, T = layout.device, layout.world_size, config.sequence_length

    # Everything that can be wrong with the input is found before work begins.
    if config.demo and config.data_dir == DEMO.data_dir:  # another folder holds one's own text
        layout.from_main(lambda: write_demo_shards(config.data_dir))
    shards = load_shards(config.data_dir, config.verify)
    encoding = get_encoding(shards.encoding)
    model_config = choose_model_config(config, encoding)
    dtype = choose_dtype(config.dtype, device, model_config.n_embd)
    sizes = micro_batch_sizes(config, model_config, layout)
    memory = check_memory(config, model_config, layout)
    agree(layout, data=shards.fingerprint, dtype=str(dtype), micro_batch_sizes=tuple(sizes))
    train_loader = TokenLoader(
        shards, "train", sequence_length=T, rows_per_step=config.total_batch_size // T,
        rank=layout.rank, world_size=W, seed=config.seed, shuffle=config.shuffle, vocab_size=encoding.n_vocab,
    )  # fmt: skip
    val_loader = TokenLoader(shards, "val", sequence_length=T, shuffle=False, vocab_size=encoding.n_vocab)
    val_windows = min(max(1, config.val_tokens // T), val_loader.n_windows)
    hellaswag_items = layout.from_main(lambda: load_hellaswag(config))

    progress = Progress(config, layout)
    folder = RunFolder(config.log_dir, layout.is_main, progress.say)
    this_recipe = recipe(config, model_config, shards)
    layout.from_main(lambda: check_tracker(config.tracker))
    first_step = layout.from_main(lambda: folder.open(config.resume, this_recipe))
    if 0 < first_step == config.max_steps:
        progress.say(f"{config.log_dir} is finished: its model is {folder.checkpoint}")
        return
    stop = StopSignals(layout.is_main)

    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    elif device.type == "cpu":
        keep_freed_memory()
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # raw_model is the plain module: HellaSwag, samples and checkpoints, whose shapes vary, use it. model is
    # the same weights compiled and wrapped: training and validation, whose shapes are fixed, use that.
    weights = folder.checkpoint or config.init_from
    raw_model = (GPT.from_pretrained(weights) if weights else GPT(model_config)).pad_vocabulary().to(device)
    raw_model.recompute = config.recompute
    model, B, compile_note = prepare_model(raw_model, config, sizes, layout, progress.say)
    train_loader.B = val_loader.B = B
    grad_accum_steps = config.total_batch_size // (B * T * W)
    optimizer = configure_optimizer(raw_model, config)
    if first_step > 0:
        restore(optimizer, scaler, folder.trainer, layout)
        progress.say(f"resuming at step {first_step} from {folder.checkpoint}")
    folder.cut_log(first_step)
    facts = gather_facts(
        config, raw_model, shards, layout, dtype=dtype, compile_note=compile_note, memory=memory,
        micro_batch_size=B, val_tokens=val_windows * T, hellaswag_items=len(hellaswag_items),
    )  # fmt: skip
    spent = {"training": 0.0, "other": 0.0, "tokens": 0, **folder.trainer.get("spent", {})}  # seconds, tokens
    spent["other"] += time.perf_counter() - started
    facts |= {"run_id": folder.run_id, "interruptions": folder.interruptions}
    facts["dollars_so_far"] = (config.dollars_per_hour or 0) * (spent["training"] + spent["other"]) / 3600
    folder.describe(facts)
    progress.start(first_step, facts, raw_model.config.flops_per_token(T))

    def due(every: int) -> bool:
        return every > 0 and not stopping and (step % every == 0 or last_step)

    batch = to_device(device, *train_loader.batch(first_step, 0))
    stopping, train_loss, val_loss, score = False, math.nan, math.nan, None
    gc.collect()
    gc.freeze()  # what lives now lives to the end: the garbage collector need not look at it again and again
    for step in range(first_step, config.max_steps + 1):
        start = time.perf_counter()
        last_step = step == config.max_steps
        if last_step:  # a signal during the last update: there is nothing to stop but the final evaluation
            stopping = False
        if due(config.val_every):
            doing = functools.partial(progress.doing, f"step {step}: validation")
            val_loss = estimate_val_loss(model, val_loader, val_windows, layout, autocast, doing)
            progress.measured(step, {"val/loss": val_loss},
                              f"validation loss {val_loss:.4f} on {val_windows * T:,} tokens")  # fmt: skip
            folder.event(step, "val", f"{val_loss:.4f}")
        if due(config.hellaswag_every) and hellaswag_items:
            with autocast:
                doing = functools.partial(progress.doing, f"step {step}: HellaSwag")
                score = hellaswag.evaluate(raw_model, hellaswag_items, encoding, layout.rank, W, doing=doing)
            progress.measured(step, {"hellaswag/acc_norm": score.acc_norm}, f"HellaSwag {score}")
            folder.event(step, "hella", f"{score.acc_norm:.4f}")
        if due(config.sample_every) and layout.is_main:
            for text in write_samples(raw_model, encoding, device, autocast):
                progress.say(f"step {step}: sample: {readable(text)}")
        if due(config.val_every):
            folder.draw()
        just_resumed = step == first_step and not last_step
        if (
            (due(config.checkpoint_every) or stopping or folder.overdue(config))
            and layout.is_main
            and not just_resumed
        ):
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "loss": train_loss,
                     "rng": torch.get_rng_state(), "recipe": this_recipe, "spent": spent}  # fmt: skip
            folder.save(step, raw_model, state, config.keep_every)
        spent["other"] += time.perf_counter() - start
        if last_step or stopping:
            break

        if step == first_step:
            layout.from_all(None)  # all processes together: from here on a signal waits for the end of a step
            stop.in_steps = True

        # ------------------------------ TRAINING ------------------------------
        start = time.perf_counter()
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            progress.micro_step(step, micro_step, grad_accum_steps)
            if W > 1:
                # The processes average their gradients during backward, but only the last time. The flag is
                # read in the forward pass, so it is set before it.
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = batch
            with fast_attention(device):
                with autocast:
                    _, loss = model(x, y)
                loss = loss / grad_accum_steps  # gradients add up over micro-steps; the loss is a mean
                loss_sum += loss.detach()
                scaler.scale(loss).backward()
            # while a GPU is busy with what was asked of it, the next rows are copied there
            following = (step, micro_step + 1) if micro_step + 1 < grad_accum_steps else (step + 1, 0)
            if following[0] < config.max_steps:
                batch = to_device(device, *train_loader.batch(*following))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        shared = torch.stack((loss_sum, torch.full((), float(stop.received > 0), device=device)))
        if W > 1:
            dist.all_reduce(shared)  # a sum, then divided: gloo has no average
        # the step's one wait for the device
        train_loss, stopping, norm = torch.cat((shared / W, norm.view(1))).tolist()
        # before the update; a scaler skips it by itself when only the gradients overflow
        scaler_copes = scaler.is_enabled() and (math.isfinite(norm) or scaler.get_scale() > 1)
        if not math.isfinite(train_loss) or not (math.isfinite(norm) or scaler_copes):
            raise non_finite_fault(step, loss_sum, norm, layout)
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        # ----------------- everything that follows is diagnostics --------------

        spent["training"] += seconds
        spent["tokens"] += config.total_batch_size
        folder.event(step, "train", f"{train_loss:.6f}")
        progress.step(step, train_loss, lr, norm, seconds)
    progress.close()
    if stopping or config.checkpoint_every:
        layout.from_main(lambda: folder.require(step))
    if W > 1:
        dist.barrier()  # nobody leaves while another still talks
        dist.destroy_process_group()
    if stopping:
        progress.say(f"stopped at step {step}, state saved; the same command with --resume goes on")
        leave(128 + (stop.received or signal.SIGTERM), W)
    facts["result"] = result_of(config, facts, step, spent, val_loss, score)
    folder.describe(facts)
    folder.draw()  # with the time in its caption
    table = closing_table(config, facts, facts["result"])
    progress.say(f"done: {step:,} steps; the run is in {config.log_dir}\n{table}")
    leave(0, W)


if __name__ == "__main__":
    run_command(main, TrainConfig, default=DEMO if "--demo" in sys.argv else None)
