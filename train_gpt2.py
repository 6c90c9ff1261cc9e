"""
Let's reproduce GPT-2 (124M).

One process:             python train_gpt2.py
One node, 8 GPUs:        torchrun --standalone --nproc_per_node=8 train_gpt2.py
No GPU, three minutes:   python train_gpt2.py --demo
Before a long run:       the same command with --check
After an interruption:   the same command with --resume

The recipe is the one of the lecture: GPT-2's architecture, GPT-3's schedule, 10 billion tokens of
FineWeb-Edu, 524,288 of them a step. The defaults below are that recipe; each is a flag.

This file, top to bottom: configuration, model, optimization, data, evaluation, main. fineweb.py writes the
token shards that it reads; hellaswag.py scores the model, sample.py lets it write, plot.py draws its curves.
What else can happen (too little memory, a lost process, a full disk, a foreign file) is dealt with in the
four folders of support/: data, model, machine, run. You can read this file without them.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

# Our own imports come before torch's: support/__init__.py sets variables that torch reads.
from hellaswag import evaluate as score_hellaswag
from hellaswag import items_for_training
from support import cli
from support.cli import InputError
from support.data.demo import write_demo_shards
from support.data.encodings import get_encoding
from support.data.shards import Shards, encoding_of, load_mix
from support.machine import device as devices
from support.machine import micro_batch, sharding
from support.machine.divergence import check_finite
from support.machine.processes import StopSignals, World, faults_in_one_line, start_processes
from support.model import huggingface, muon, sampling
from support.model.loss import chunked_cross_entropy, masked_cross_entropy
from support.run import check
from support.run.folder import RunFolder
from support.run.report import Report

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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
    encoding: str = "gpt2"  # what the token ids stand for, see support/data/encodings.py

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
MODEL_SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
    "demo": {"n_layer": 2, "n_head": 4, "n_embd": 192},  # 1M with bytes; not in the paper
}


ModelName = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"]


@dataclass(frozen=True)
class TrainConfig:
    """Train GPT-2 on token shards. The defaults reproduce GPT-2 (124M) on FineWeb-Edu."""

    # Each field is a flag. A number must be at least 0. The types of `cli` ask for more: PositiveInt,
    # PositiveFloat, and Share, which is above 0 and at most 1.

    # -- the run
    demo: bool = False  # a small GPT on the text of Python's own documentation: minutes on a CPU
    data_dir: tuple[Path, ...] = (Path("edu_fineweb10B"),)
    """token shards, as fineweb.py writes them; several are mixed, by size or by shares: A:0.3 B:0.7"""
    log_dir: Path = Path("log")  # the run's folder: log, picture, checkpoints
    resume: bool = False  # continue from the newest checkpoint in log_dir; start if there is none
    verify: bool = False  # read every shard at the start and compare its checksum with shards.json
    check: bool = False  # try everything on this machine: measure it, train five steps, resume; then stop

    # -- the model
    model: ModelName | None = None  # shape of the new model; default: gpt2
    init_from: str | None = None  # start from these weights: a Hub name (gpt2), a folder, a file (ckpt.pt)
    n_layer: cli.PositiveInt | None = None  # layers, if other than the model's
    n_head: cli.PositiveInt | None = None  # attention heads, if other than the model's
    n_embd: cli.PositiveInt | None = None  # width, if other than the model's
    sequence_length: cli.PositiveInt = 1024  # tokens in a row of the batch; the new model's block size

    # -- the recipe
    recipe: Literal["tutorial", "fast"] = "tutorial"  # fast: Muon, a trapezoid, fewer tokens
    total_batch_size: cli.PositiveInt = 524_288  # tokens per step, 2**19: about 0.5M (GPT-3 paper, table 2.1)
    max_steps: int = 19_073  # updates: one epoch of 10 billion tokens at 2**19 a step
    warmup_steps: int = 715  # steps until max_lr: 375 million tokens (GPT-3 paper, appendix B)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices (support/model/muon.py)
    momentum: cli.Momentum | None = None  # Muon's, default 0.95; AdamW's beta1, default 0.9
    max_lr: float = 6e-4  # peak learning rate (GPT-3 paper, table 2.1, "Small")
    adamw_lr_ratio: cli.PositiveFloat = 2.0  # with muon, AdamW trains the rest at this multiple of the rate
    schedule: Literal["cosine", "trapezoid"] = "cosine"  # course of the learning rate, see get_lr
    cooldown: cli.Share = 0.6  # share of the steps in which a trapezoid falls to 0
    weight_decay: float = 0.1  # on matrices only (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping (GPT-3 paper, appendix B)
    seed: cli.Seed = 1337  # decides the initial weights and the order of the data
    shuffle: bool = True  # visit shards and windows in random order, otherwise in file order

    # -- measuring and saving; an interval of 0: never
    val_every: int = 250  # steps between validation losses
    val_tokens: cli.PositiveInt = 10_485_760  # tokens of the validation split to measure on: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag scores
    hellaswag_data: Path | None = None  # local HellaSwag items, .jsonl or .parquet; default: from the Hub
    hellaswag_limit: cli.PositiveInt | None = None  # score only this many items, evenly spaced; default: all
    sample_every: int = 250  # steps between samples
    checkpoint_every: int = 1000  # steps between checkpoints, at most 15 minutes; the last two and best stay
    keep_every: int = 5000  # checkpoints at multiples of this are kept for good

    # -- the machine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    device: devices.DeviceName = "auto"  # auto: the best available
    compile: bool = True  # use torch.compile where it works: CUDA with a C compiler
    micro_batch_size: cli.PositiveInt | None = None  # rows per forward pass; default: the most that fit
    memory_limit_gb: cli.PositiveFloat | None = None  # GB (2**30 bytes) to take of a GPU; default: all
    shard: bool = False  # divide a model too large for a card among the processes of a host
    recompute: bool = False  # compute the blocks again in the backward pass: less memory, more time
    timeout_minutes: cli.PositiveFloat = 10.0  # give up on another process that does not answer for this long

    # -- what it says
    tracker: Literal["wandb", "trackio"] | None = None  # send the values there too; pip install it first
    dollars_per_hour: float | None = None  # price of the machine, for the cost at the start and the end
    describe: bool = False  # list the model's tensors, as in the state dictionary, and stop

    def due(self, every: int, step: int) -> bool:
        """Whether what is done every `every` steps is due at `step`; at the last step, everything is due."""
        return every > 0 and (step % every == 0 or step == self.max_steps)

    def common_fields(self) -> dict[str, Any]:
        """The fields in which all processes have to agree: each host has a command of its own."""
        return {name: value for name, value in asdict(self).items() if name not in OF_A_HOST}

    def recipe_fields(self) -> dict[str, Any]:
        """The fields that decide a run's numbers: all but those of MAY_CHANGE. --resume compares them."""
        values = {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


# The fields that may differ when a run is resumed. A new field may not, unless you list it here.
MAY_CHANGE = {
    # How often a run is measured and saved, and what it says, changes none of its losses.
    *("val_every", "val_tokens", "hellaswag_every", "hellaswag_data", "hellaswag_limit", "sample_every"),
    *("checkpoint_every", "keep_every", "verify", "check", "tracker", "dollars_per_hour"),
    *("describe", "log_dir", "resume"),
    # Another machine sees the same tokens in every step; its losses are equal within the precision.
    *("device", "dtype", "compile", "micro_batch_size", "memory_limit_gb", "shard", "recompute"),
    "timeout_minutes",
    # These decide other things, which are compared: the shards, the model's configuration, other fields.
    *("data_dir", "model", "n_layer", "n_head", "n_embd", "demo", "recipe"),
}

# The fields in which hosts may differ, as long as they come to the same shards, dtype and so on.
OF_A_HOST = {
    *("data_dir", "log_dir", "resume", "verify", "hellaswag_data", "tracker", "dollars_per_hour"),
    *("dtype", "device", "compile", "micro_batch_size", "memory_limit_gb", "timeout_minutes"),
}

MIN_LR_RATIO = 0.1  # the schedule ends at a tenth of its peak (GPT-3 paper, appendix B)
PAD_VOCAB_TO = 128  # 50,257 -> 50,304 rows: a GPU multiplies matrices tile by tile, and wants whole ones

# What --recipe fast and --demo change; any flag still overrides it. FAST's peak rates are modded-nanogpt's,
# the rest is our choice (docs/fast.md); none of it is measured with the 124M model yet.
FAST = TrainConfig(
    recipe="fast", optimizer="muon", schedule="trapezoid", max_lr=1.8e-3, warmup_steps=100, max_steps=7_630
)
DEMO = replace(
    FAST,
    demo=True,
    data_dir=(Path("demo_data"),),
    log_dir=Path("log/demo"),
    model="demo",
    sequence_length=128,
    total_batch_size=2048,
    max_steps=1000,
    momentum=0.9,
    max_lr=6e-3,
    val_every=200,
    val_tokens=65_536,
    hellaswag_every=0,
    sample_every=200,
    checkpoint_every=500,
    dtype="float32",
    compile=False,
)
DEMO_TUTORIAL = replace(DEMO, recipe="tutorial", optimizer="adamw", schedule="cosine", max_lr=4e-3)


def choose_defaults(arguments: list[str]) -> TrainConfig:
    """The defaults of all flags, as --demo and --recipe in the command line choose them. The other flags are
    parsed afterwards, since their --help and their values depend on these defaults."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--demo", action="store_true")
    flags.add_argument("--recipe", nargs="?")
    try:
        given, _ = flags.parse_known_args(arguments)
    except argparse.ArgumentError:  # --demo=true: tyro says what is wrong
        return TrainConfig()
    if given.demo:
        return DEMO_TUTORIAL if given.recipe == "tutorial" else DEMO
    return FAST if given.recipe == "fast" else TrainConfig()


def choose_model_config(config: TrainConfig, encoding: tiktoken.Encoding) -> GPTConfig:
    """The architecture that the flags ask for. InputError where they contradict --init_from or the data."""
    # A field of GPTConfig that is a flag too (n_layer, or one of yours) takes the value of the flag.
    flags = {field.name: getattr(config, field.name, None) for field in fields(GPTConfig)}
    given = {name: value for name, value in flags.items() if value is not None}
    shape = MODEL_SHAPES[config.model or "gpt2"]
    named = None if config.demo and config.model == DEMO.model else config.model
    if config.init_from is None:
        return GPTConfig(
            config.sequence_length, encoding.n_vocab, encoding=encoding.name, **{**shape, **given}
        )
    config_file, _ = huggingface.find_model(config.init_from)
    loaded = GPTConfig(**huggingface.read_config(config_file, GPTConfig))
    for name in shape:
        value = flags[name] or (shape[name] if named else getattr(loaded, name))
        if value != getattr(loaded, name):
            flag = f"--{name} {value}" if flags[name] else f"--model {config.model}, {name} {value}"
            raise InputError(f"{flag}: --init_from {config.init_from} has {getattr(loaded, name)}")
    if loaded.encoding != encoding.name:
        raise InputError(
            f"--init_from {config.init_from} uses the encoding {loaded.encoding!r}, the data in "
            f"{' '.join(map(str, config.data_dir))} {encoding.name!r}"
        )
    get_encoding(loaded.encoding, loaded.vocab_size)  # raises InputError if they don't fit together
    if config.sequence_length > loaded.block_size:
        raise InputError(
            f"--sequence_length {config.sequence_length} is longer than the block size of "
            f"--init_from {config.init_from}, {loaded.block_size}"
        )
    return replace(loaded, **given)


# -----------------------------------------------------------------------------
# model; the names are those of OpenAI's checkpoint


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: sampling.KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # sampling and scoring
            y = cache.attend(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads' outputs side by side
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # as in OpenAI's code: exact GELU was slow in 2018
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention is where tokens communicate, the MLP is where each one thinks. Both only add to the residual
    stream, along which gradients flow back unchanged, since the norms stand before attention and MLP, not on
    the stream (GPT-2 paper, section 2.3)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: sampling.KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, with OpenAI's names for its parts."""

    # main sets these two. They are not in GPTConfig: they change the memory of training, not the model.
    loss_chunks = 1  # the loss is computed in so many chunks of tokens
    recompute = False  # the backward pass computes the blocks again instead of keeping what they computed

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # a vector for each token
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # a vector for each position
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        }
        self.transformer = cast(Any, nn.ModuleDict(modules))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tied: tokens of similar meaning should have similar vectors coming in and similar logits going out.
        # It also saves 39M parameters.
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
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        caches: list[sampling.KVCache] | None = None,
    ) -> torch.Tensor:
        """Given targets, the loss: the mean cross-entropy in nats, a scalar. Without, the logits of the next
        token at every position, (B, T, vocab_size).

        Training gets the loss alone. If the logits were returned too, a tensor of (B, T, 50304) would have to
        be kept, and autograd would make another one for its gradient: zeros.

        Args:
            idx: (B, T) int64 token ids, T at most block_size.
            targets: (B, T) int64, the token after each position; -100 where none counts.
            caches: from `new_caches`; they hold what was read before, and idx only the tokens after it.

        Raises:
            ValueError: the sequence is longer than block_size.
        """
        x = self.hidden_states(idx, caches)
        return self.head(x) if targets is None else self.loss(x, targets)

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of `forward` from the hidden states, (B, T, n_embd), and the targets, (B, T)."""
        x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        vocab_size = self.config.vocab_size
        if self.loss_chunks > 1:  # memory is short: the same loss, with the logits of some tokens at a time
            return chunked_cross_entropy(x, self.lm_head.weight, targets, vocab_size, self.loss_chunks)
        if torch.compiler.is_compiling():  # the same, in a form that compiles to fewer passes over the logits
            return masked_cross_entropy(self.lm_head(x), targets, vocab_size)
        logits = self.lm_head(x)[:, :vocab_size].float()  # autocast would let a GPU compute in 16 bits
        return F.cross_entropy(logits, targets)

    def hidden_states(self, idx: torch.Tensor, caches: list[sampling.KVCache] | None = None) -> torch.Tensor:
        """The residual stream after the last block and its norm: (B, T) token ids to (B, T, n_embd)."""
        T, block_size = idx.size(1), self.config.block_size
        longest = caches[0].length if caches else T
        if longest > block_size:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the model's block size, {block_size}"
            )
        pos = caches[0].positions(T, idx.device) if caches else torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        for i, block in enumerate(self.transformer.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def new_caches(self, length: int) -> list[sampling.KVCache]:
        """A cache for each layer, with space for `length` tokens."""
        return [sampling.KVCache(length) for _ in self.transformer.h]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size). Rows that only pad the vocabulary are cut
        off, here and in the loss: they enter no softmax, get no gradient, are never sampled and stay zero."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def pad_vocabulary(self, multiple: int = PAD_VOCAB_TO) -> "GPT":
        """Round the rows of the tied embedding up to a multiple, with zeros, for speed; the model stays the
        same function. Call it before the optimizer is made. Returns the model."""
        weight: torch.Tensor = self.transformer.wte.weight
        rows = math.ceil(self.config.vocab_size / multiple) * multiple
        padded = torch.zeros(rows, weight.size(1), dtype=weight.dtype, device=weight.device)
        padded[: self.config.vocab_size] = weight.detach()[: self.config.vocab_size]
        self.transformer.wte.weight = self.lm_head.weight = nn.Parameter(padded)
        self.transformer.wte.num_embeddings = self.lm_head.out_features = rows
        return self

    # OpenAI's linear layers are "Conv1D", whose weight is the transpose of nn.Linear's.
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, config: GPTConfig | None = None) -> "GPT":
        """The model in a folder (a checkpoint, a run's folder, or any Hugging Face GPT-2), in a file that the
        tutorial's script or nanoGPT saved, or on the Hub by name: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
        owner/name. With a `config`, the weights go into a model of that configuration.

        Raises InputError when there is no such model, it is not a GPT-2, or its tensors don't fit its config.
        """
        config_file, weights_file = huggingface.find_model(name_or_folder)
        model = cls(config or GPTConfig(**huggingface.read_config(config_file, GPTConfig)))
        huggingface.check_change(config_file, model.change_from_gpt2())
        tensors = huggingface.read_tensors(weights_file, model.config.vocab_size)
        own = dict(model.named_parameters())  # the tied matrix comes once
        if different := sorted(own.keys() ^ tensors.keys()):
            raise InputError(f"{weights_file}: tensors missing or too many: {', '.join(different[:5])}")
        for name, tensor in tensors.items():
            tensor = tensor.t() if name.endswith(cls.TRANSPOSED) else tensor
            shape, expected = list(tensor.shape), list(own[name].shape)
            if shape != expected:
                raise InputError(f"{weights_file}: {name} is {shape}, its config.json means {expected}")
            own[name].data.copy_(tensor)
        return model

    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the model, or a copy of its `weights`, as a folder for Hugging Face's GPT2LMHeadModel:
        float32, without the rows that pad the vocabulary, and with its tokenizer."""
        tensors = {}
        for name, tensor in (weights or dict(self.named_parameters())).items():  # the tied matrix comes once
            if name == "transformer.wte.weight":
                tensor = tensor[: self.config.vocab_size]
            tensor = tensor.t() if name.endswith(self.TRANSPOSED) else tensor
            tensors[name] = tensor.detach().float().cpu().contiguous()
        huggingface.write_model(Path(folder), self.config, tensors, self.change_from_gpt2())

    def change_from_gpt2(self) -> str | None:
        """What makes this another model than GPT-2, if you have changed the code above; None otherwise. A
        tiny model with random weights is compared with GPT-2's formulas."""
        return huggingface.change_from_gpt2(GPT, self.config)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """Continue each row of `idx`, (B, T): returns (B, T + max_new_tokens) int64. Each new token is drawn
        from the model's probabilities for it, and is -1 where those are not finite. The loop is in
        support/model/sampling.py, with the `options` temperature, top_k, top_p, seed and compile."""
        return torch.cat((idx, *sampling.stream(self, idx, max_new_tokens, **options)), dim=1)


# -----------------------------------------------------------------------------
# optimization


def configure_optimizer(
    model: nn.Module, config: TrainConfig, world: World | None = None, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW with betas 0.9, 0.95 and eps 1e-8 (GPT-3 paper, appendix B); --momentum replaces the first beta.
    Matrices and embeddings decay; biases and norms, whose scale matters, don't.

    With --optimizer muon, Muon trains the blocks' matrices, and only these decay. The processes of `world`
    share its work. Its products are in bfloat16 if training's `dtype` is, otherwise in float32."""
    parameters = list(model.parameters())
    # Fused: one kernel for all tensors instead of several for each.
    fused = devices.type_of(parameters[0].device).fused
    if config.optimizer == "muon":
        momentum = 0.95 if config.momentum is None else config.momentum
        groups = muon.muon_groups(model, config.weight_decay, config.adamw_lr_ratio)
        products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        options = {"lr": config.max_lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": fused}
        return muon.Muon(groups, world, products, momentum, **options)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1 = 0.9 if config.momentum is None else config.momentum
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(beta1, 0.95), eps=1e-8, fused=fused)


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate at `step`: linear warm-up; then a cosine down to a tenth at max_steps, or a trapezoid:
    constant, then down to 0 in a straight line over the share `cooldown` of all steps."""
    # 1) linear warm-up over warmup_steps
    lr = config.max_lr
    if step < config.warmup_steps:
        lr = config.max_lr * (step + 1) / config.warmup_steps
    # 2) with a trapezoid: constant, then a straight line down to 0 at max_steps
    if config.schedule == "trapezoid":
        steps_left = max(0, config.max_steps - step)
        to_go = steps_left / (config.cooldown * config.max_steps)  # 1 to 0 in the cooldown
        return min(lr, config.max_lr * to_go) if to_go < 1 else lr
    # 3) with a cosine: down to a tenth at max_steps, and constant after that
    if step < config.warmup_steps:
        return lr
    if step >= config.max_steps:
        return config.max_lr * MIN_LR_RATIO
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)  # 0 to 1
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 to 0
    return config.max_lr * (MIN_LR_RATIO + (1.0 - MIN_LR_RATIO) * cosine)


# -----------------------------------------------------------------------------
# data


class TokenLoader:
    """Rows of `sequence_length` tokens and their targets, in an order that depends on (seed, step) alone.

    A window is `sequence_length + 1` consecutive tokens of one shard. Their order is support/data/order.py's:
    random over many shards. Step s takes the next windows after those of step s - 1, as many as it has rows;
    they are dealt out by micro-step, then by rank. With 8 rows a step, 2 processes and micro-batches of 2
    rows, step 0 is

        micro-step 0: rank 0 takes windows 0 1, rank 1 takes 2 3
        micro-step 1: rank 0 takes windows 4 5, rank 1 takes 6 7

    So a step has the same tokens whatever the number of processes and the size of the micro-batch. There is
    no state to save: any step can be asked for.

    Validation is always the first --val_tokens of its split, in file order.
    """

    def __init__(self, shards: Shards, split: str, config: TrainConfig, world: World | None = None):
        """Raises InputError if no shard of the split ("train" or "val") has a window."""
        self.tokens, self.files = shards.tokens[split], shards.files[split]
        self.sequence_length = T = config.sequence_length
        self.rows_per_step = config.total_batch_size // T
        self.world = world or World()
        self.vocab_size = get_encoding(shards.encoding).n_vocab
        seed = config.seed if config.shuffle and split == "train" else None
        self.order = shards.order(split, T, self.rows_per_step, seed)
        self.n_windows = self.order.n_windows  # in an epoch
        if split == "val":
            self.n_windows = min(max(1, config.val_tokens // T), self.n_windows)

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows first .. first + count - 1 of the run as inputs and targets, (count, T) int64 each.

        Raises InputError, naming shard and offset, for a token id outside the vocabulary.
        """
        rows = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row, index in zip(rows, range(first, first + count), strict=True):
            shard, start = self.order.locate(index)
            row[:] = self.tokens[shard][start : start + self.sequence_length + 1]
            if row.max() >= self.vocab_size:
                offset = start + int(row.argmax())
                file = self.files[shard]
                raise InputError(
                    f"{file}: token id {row.max()} at offset {offset}, outside the vocabulary of "
                    f"{self.vocab_size}; the shard is damaged or of another encoding",
                    this_process_only=True,  # the other ranks read other windows
                )
        x, y = rows[:, :-1].copy(), rows[:, 1:].copy()  # contiguous: other strides would be compiled again
        return torch.from_numpy(x), torch.from_numpy(y)

    def batch(self, step: int, micro_step: int, B: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's B rows in one micro-step of one step: inputs and targets, (B, T) int64 each."""
        first = (micro_step * self.world.size + self.world.rank) * B
        return self.windows(step * self.rows_per_step + first, B)

    def batches(self, step: int, B: int) -> Iterator[list[torch.Tensor]]:
        """This rank's inputs and targets, (B, T) each, one micro-step after another from `step` on, without
        end; each is on its way to the device when it is returned."""
        while True:
            for group in self.order.begun_by(step):  # a thread reads its shards into memory
                self.world.read_ahead([self.files[shard] for shard in group])
            for micro_step in range(self.rows_per_step // (B * self.world.size)):
                yield devices.to_device(self.world.device, *self.batch(step, micro_step, B))
            step += 1


def open_shards(config: TrainConfig, world: World) -> Shards:
    """The shards in --data_dir; the demo writes its own first."""
    if config.demo and config.data_dir == DEMO.data_dir:  # another folder holds one's own text
        world.on_each_host(lambda: write_demo_shards(*config.data_dir))
    return load_mix(config.data_dir, config.verify)


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def estimate_val_loss(
    model: nn.Module,
    loader: TokenLoader,
    B: int,
    autocast: torch.autocast,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss, nats per token, over all windows of `loader`, divided among the ranks in batches of B rows.
    `on_part(done, total)` runs before each batch and at the end. The last batch is filled up with targets
    that don't count: shapes stay fixed for the compiled model."""
    world, n_windows = loader.world, loader.n_windows
    firsts = range(world.rank * B, n_windows, world.size * B)
    n_batches = math.ceil(n_windows / (world.size * B))
    losses = torch.zeros(n_batches, device=world.device)  # a small tensor per batch would fragment the memory
    with sharding.gathered(model), autocast:
        for i, first in enumerate(firsts):
            on_part(i, n_batches)
            count = min(B, n_windows - first)
            x, y = loader.windows(first, count)
            x, y = F.pad(x, (0, 0, 0, B - count)), F.pad(y, (0, 0, 0, B - count), value=-100)
            x, y = devices.to_device(world.device, x, y)
            losses[i] = model(x, y).float() * count  # the mean over the rows that count becomes their sum
    on_part(n_batches, n_batches)
    return world.sum(losses.cpu().double().sum()).item() / n_windows


def list_tensors(config: TrainConfig) -> str:
    """The state dictionary of the model that the flags describe, as a table."""
    if config.init_from:
        return huggingface.tensor_table(GPT.from_pretrained(config.init_from).state_dict())
    name = next(map(encoding_of, config.data_dir), None) or ("bytes" if config.demo else "gpt2")
    return huggingface.tensor_table(GPT(choose_model_config(config, get_encoding(name))).state_dict())


# -----------------------------------------------------------------------------
# main


@faults_in_one_line(resumes=True)
def main(config: TrainConfig) -> None:
    cli.check_numbers(config)
    if config.describe:
        print(list_tensors(config))
        return
    if config.check:  # the script runs as a child of itself; only a child goes on, with fewer steps
        config = check.rehearse(config, get_lr)
    world = start_processes(config.device, config.timeout_minutes)
    world.require_same(**config.common_fields())
    device, W, T = world.device, world.size, config.sequence_length
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it
    devices.prefer_fast_attention(device)
    report = Report(config, world)

    # Everything that can be wrong with the input is found before work begins.
    shards = open_shards(config, world)
    encoding = get_encoding(shards.encoding)
    train_loader = TokenLoader(shards, "train", config, world)
    val_loaders = [TokenLoader(part, "val", config, world) for part in shards.parts or [shards]]
    hellaswag_items = world.from_main(lambda: items_for_training(config))
    model_config = choose_model_config(config, encoding)
    dtype = devices.choose_dtype(config.dtype, device, model_config.n_embd)
    use_compile, _ = devices.choose_compile(config.compile, device)
    world.require_same(data=shards.fingerprint, dtype=str(dtype), compile=use_compile)
    micro_batch.check_batch(config, model_config, world)
    run = RunFolder(config, world, report.print)
    first_step = run.open(model_config, shards, get_lr)  # 0, or where the run was interrupted
    if first_step == config.max_steps and world.from_main(lambda: "result" in run.before):
        report.print(f"{config.log_dir} is finished: its model is {run.checkpoint}")
        world.disconnect()
        return world.exit(0)
    stop = StopSignals(world.is_main)

    # Only the main process knows the checkpoint; it gives the others their weights below. With --shard, the
    # others make a model without weights, and all functions of `sharding` do nothing without --shard.
    torch.manual_seed(config.seed)
    weights_from = run.checkpoint or config.init_from
    with sharding.weights_on_main_only(config.shard, world):
        raw_model = GPT.from_pretrained(weights_from, model_config) if weights_from else GPT(model_config)
    raw_model.pad_vocabulary()  # from here on, wte has rows that no token uses

    # raw_model is the plain module, for HellaSwag and samples, whose shapes vary, and for checkpoints. model
    # is the same weights compiled and wrapped, for training and validation, whose shapes are fixed.
    model: Any = raw_model
    if config.shard:  # each process keeps a share of the model
        raw_model = sharding.divide(raw_model, config, world, dtype)
        model = sharding.ShardedModel(raw_model, use_compile)
    else:
        raw_model.to(device)
        if use_compile:
            # The graph would be cut, so that DDP exchanges gradients early: once a step, that gains little.
            torch._dynamo.config.optimize_ddp = False
            model = torch.compile(raw_model, dynamic=False)
        if W > 1:  # each process keeps a copy of the model
            gpu = [device.index] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=gpu, gradient_as_bucket_view=True)
    raw_model.recompute = config.recompute
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    # float16 loses small gradients; the scaler multiplies the loss to keep them, and does nothing otherwise.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Trial steps find the largest micro-batch that fits. A resumed run keeps its own, if that still fits.
    found_before = run.fitted_before()
    fit = micro_batch.find_micro_batch(model, config, world, autocast, report.print, first=found_before)
    B, raw_model.loss_chunks = fit.rows, fit.loss_chunks
    grad_accum_steps = config.total_batch_size // (B * T * W)
    optimizer: Any = configure_optimizer(raw_model, config, world, dtype)
    fused = optimizer.defaults.get("fused")
    run.restore(optimizer, scaler)
    report.start(run, raw_model, optimizer, fit, val_loaders, n_items=len(hellaswag_items))

    batches = train_loader.batches(first_step, B)
    x, y = next(batches)
    train_loss = val_loss = math.nan
    score = None
    save_overdue = False
    saved = first_step or None  # the step of the newest checkpoint
    with stop:  # a signal ends this block before the next micro-step or batch; the last step done is saved
        for step in range(first_step, config.max_steps + 1):  # `step` updates are done when its turn begins
            last_step = step == config.max_steps

            # ----------------------------- EVALUATION -----------------------------
            model.eval()
            if config.due(config.val_every, step):
                on_part = stop.checked(report.progress_of("validation"))
                losses = [estimate_val_loss(model, loader, B, autocast, on_part) for loader in val_loaders]
                val_loss = float(np.dot(losses, shards.proportions()))
                report.validation(step, val_loss, dict(zip(shards.names(), losses, strict=True)))
            if config.due(config.hellaswag_every, step) and hellaswag_items:
                on_part = stop.checked(report.progress_of("HellaSwag"))
                with autocast:
                    score = score_hellaswag(raw_model, hellaswag_items, encoding, world, on_part=on_part)
                report.hellaswag(step, score)
            if config.due(config.sample_every, step):
                report.samples(step, sampling.write_samples(raw_model, encoding, autocast, stop.checked()))
            if config.due(config.val_every, step):
                run.draw()  # with the score that was just measured
            save_due = save_overdue or config.due(config.checkpoint_every, step)
            if save_due and step != saved and (step > 0 or last_step):  # a run of no steps is saved, too
                run.save(step, raw_model, optimizer, scaler, loss=train_loss, spent=report.spent)
                saved = step
            if last_step:
                break

            # ------------------------------ TRAINING ------------------------------
            stop.begin_steps(world)  # acts once: a signal before the first step ends the run at once
            started = time.perf_counter()
            model.train()
            world.seed(config.seed, step)  # what is random, such as dropout, resumes like the tokens
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                stop.check()  # ends the loop over the steps after a signal to any process
                report.micro_step(step, micro_step, grad_accum_steps)
                if W > 1:
                    # The processes average their gradients in the step's last backward pass only, unless
                    # --shard lacks the memory for that. DDP reads this flag in the forward pass.
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                with autocast:
                    loss = model(x, y)
                loss = loss / grad_accum_steps  # gradients add up over micro-steps, and the loss is a mean
                loss_sum += loss.detach()
                x, y = next(batches)  # fetched now, while a GPU is busy with the forward pass
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
            lr = get_lr(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)  # Muon's groups differ in their rate

            # All that the host wants to know of this step is one tensor: the loss, whether a save is overdue,
            # and the norm. Its copy begins here and is read after the update.
            save_flag = loss_sum.new_full((), run.overdue())
            sums = torch.stack((loss_sum, save_flag))
            if W > 1:
                dist.all_reduce(sums)
            values = torch.cat((sums / W, sharding.full_tensor(norm).view(1)))
            read_values = devices.copy_to_host(values)

            # An update that is not finite is left out. This is scaler.step(optimizer) without its wait:
            # PyTorch's fused optimizers, and Muon, skip an update for which the tensor found_inf is 1.
            finite = torch.isfinite(values).all()
            if fused:
                optimizer.found_inf = 1 - finite.float()
                optimizer.step()
            elif finite:  # here the host waits
                optimizer.step()
            optimizer.zero_grad(set_to_none=(W == 1 or config.shard))  # DDP's are views of its buffers

            # With a fused optimizer, this is the step's only host-device sync. Meanwhile a GPU is busy with
            # the update, which counts in the time of the next step.
            train_loss, overdue, grad_norm = read_values()
            save_overdue = overdue > 0 and config.checkpoint_every > 0
            check_finite(step, train_loss, grad_norm, scaler, world, own_loss=loss_sum, dtype=dtype)
            scaler.update()
            # ------------- the step is done; the rest of the loop reports it -------------

            report.step(step, train_loss, lr, grad_norm, time.perf_counter() - started)

    # -------------------------------- THE END ---------------------------------
    if stop.stopped and step not in (0, saved):  # the gradients of a step begun are dropped
        run.save(step, raw_model, optimizer, scaler, loss=train_loss, spent=report.spent)
        saved = step
    if step == saved:
        run.wait_for_save(step)
    world.disconnect()
    if stop.stopped:
        kept = "state saved" if step else "nothing to save yet"
        report.close(f"stopped at step {step}, {kept}; run the same command with --resume to continue")
        world.exit(128 + (stop.received or signal.SIGTERM))  # another process may have got the signal
    report.finish(step, val_loss, score)
    world.exit(0)


if __name__ == "__main__":
    cli.run_command(main, TrainConfig, default=choose_defaults(sys.argv))
