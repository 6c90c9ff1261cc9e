"""
Let's reproduce GPT-2 (124M).

One process:             python train_gpt2.py
One node, 8 GPUs:        torchrun --standalone --nproc_per_node=8 train_gpt2.py
No GPU, three minutes:   python train_gpt2.py --demo
After an interruption:   the same command with --resume

The recipe is the one of the lecture: GPT-2's architecture, GPT-3's schedule, 10 billion tokens of
FineWeb-Edu, 524,288 of them a step. The defaults below are that recipe; each is a flag.

This file, top to bottom: configuration, model, optimisation, data, evaluation, main. fineweb.py writes the
token shards that it reads; hellaswag.py scores the model, sample.py lets it write, plot.py draws its curves.
What they all lean on is in support/, one idea a file; you can read this one without it.
"""

import functools
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

# Our own imports come before torch's: support/__init__.py sets two variables that torch reads.
from hellaswag import Item, evaluate, items_for_training
from support.cli import InputError, check_numbers, run_command
from support.data.demo import write_demo_shards
from support.data.encodings import get_encoding
from support.data.shards import Shards, load_shards, read_record
from support.machine.device import choose_dtype, fast_attention, mixed_precision, start_reading, to_device
from support.machine.divergence import check_finite, step_if_finite
from support.machine.micro_batch import fit_to_device, plan_micro_batch
from support.machine.processes import StopSignals, World, faults_in_one_line, start_processes
from support.machine.sharding import count_shares, divide, gathered, sync_gradients, whole
from support.model.huggingface import Sizes, find_model, read_sizes, read_tensors, write_model
from support.model.kv_cache import KVCache
from support.model.loss import next_token_loss
from support.model.muon import Muon, muon_groups
from support.model.sampling import stream, write_samples
from support.run.folder import RunFolder, recipe_of
from support.run.report import Progress, gather_facts, tensor_table

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch.nn import functional as F
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
    def sizes(self) -> Sizes:
        """These fields, for the checkpoint's config.json."""
        return Sizes(block_size=self.block_size, vocab_size=self.vocab_size, n_layer=self.n_layer,
                     n_head=self.n_head, n_embd=self.n_embd, encoding=self.encoding)  # fmt: skip

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
    "demo": {"n_layer": 2, "n_head": 4, "n_embd": 192},  # 1M with bytes; not in the paper
}


@dataclass(frozen=True)
class TrainConfig:
    """Train GPT-2 on token shards. The defaults reproduce GPT-2 (124M) on FineWeb-Edu."""

    # -- the run
    demo: bool = False  # a small GPT on the text of Python's own documentation: minutes on a CPU
    data_dir: Path = Path("edu_fineweb10B")  # token shards, as fineweb.py writes them
    log_dir: Path = Path("log")  # the run's folder: log, picture, checkpoints
    resume: bool = False  # continue from the newest checkpoint in log_dir; start if there is none
    verify: bool = False  # read every shard at the start and compare its checksum with shards.json

    # -- the model
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = "gpt2"  # shape of the model
    init_from: str | None = None  # start from these weights: a Hub name (gpt2) or a checkpoint folder
    n_layer: int | None = None  # layers, if other than the model's
    n_head: int | None = None  # attention heads, if other than the model's
    n_embd: int | None = None  # width, if other than the model's
    sequence_length: int = 1024  # tokens in a row of the batch; the new model's block size

    # -- the recipe
    recipe: Literal["tutorial", "fast"] = "tutorial"  # fast: Muon, a trapezoid, fewer tokens
    total_batch_size: int = 524_288  # tokens per step, 2**19: about 0.5M (GPT-3 paper, table 2.1)
    max_steps: int = 19_073  # updates: one epoch of 10 billion tokens at 2**19 a step
    warmup_steps: int = 715  # steps until max_lr: 375 million tokens (GPT-3 paper, appendix B)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, see support/model/muon.py
    max_lr: float = 6e-4  # peak learning rate (GPT-3 paper, table 2.1, "Small")
    adamw_lr_ratio: float = 2.0  # with muon: AdamW's rate, for all but the blocks' matrices, over max_lr
    schedule: Literal["cosine", "trapezoid"] = "cosine"  # of the learning rate, see get_lr
    cooldown: float = 0.6  # with trapezoid: the share of the steps in which the rate falls to 0
    weight_decay: float = 0.1  # on matrices only (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping (GPT-3 paper, appendix B)
    seed: int = 1337  # of the initial weights and the order of the data
    shuffle: bool = True  # visit shards and windows in random order, otherwise in file order

    # -- measuring and saving; an interval of 0: never
    val_every: int = 250  # steps between validation losses
    val_tokens: int = 10_485_760  # tokens of the validation split to measure on: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag scores
    hellaswag_data: Path | None = None  # a local HellaSwag .jsonl; default: from the Hub
    hellaswag_limit: int | None = None  # score only this many items, evenly spaced; default: all
    sample_every: int = 250  # steps between samples
    checkpoint_every: int = 1000  # steps between checkpoints; 15 minutes at most. The last two are kept
    keep_every: int = 5000  # steps between checkpoints that are kept for good

    # -- the machine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best available
    compile: bool = True  # use torch.compile where it works: CUDA with a C compiler
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the most that fit
    memory_limit_gb: float | None = None  # take at most this many GB (2**30 bytes) of a GPU; default: all
    shard: bool = False  # divide the model among a host's processes, for one too large for a card; AdamW only
    recompute: bool = False  # compute the blocks again in the backward pass: less memory, more time
    timeout_minutes: float = 10.0  # give up on another process that does not answer for this long

    # -- what it says
    tracker: Literal["wandb", "trackio"] | None = None  # send the values there too; pip install it first
    dollars_per_hour: float | None = None  # price of the machine, for the cost at the start and the end
    describe: bool = False  # list the model's tensors, as in the state dictionary, and stop

    def due(self, every: int, step: int) -> bool:
        """Whether what is done every `every` steps is due at `step`; at the last step, everything is due."""
        return every > 0 and (step % every == 0 or step == self.max_steps)


# Numbers that must be more than 0; for the others 0 will do.
POSITIVE = {"n_layer", "n_head", "n_embd", "sequence_length", "total_batch_size", "adamw_lr_ratio",
            "cooldown", "micro_batch_size", "val_tokens", "hellaswag_limit", "memory_limit_gb",
            "timeout_minutes"}  # fmt: skip

MIN_LR_RATIO = 0.1  # the schedule ends at a tenth of its peak (GPT-3 paper, appendix B)
PAD_VOCAB_TO = 128  # 50,257 -> 50,304 rows: matrix units want whole tiles

# What --recipe fast and --demo change; any flag still overrides it. The rates of fast are others', the rest
# is ours (docs/fast.md); none of it is measured with the 124M model yet.
FAST = TrainConfig(
    recipe="fast", optimizer="muon", schedule="trapezoid", max_lr=1.8e-3, warmup_steps=100, max_steps=7_630
)
DEMO = replace(
    FAST, demo=True, data_dir=Path("demo_data"), log_dir=Path("log/demo"), model="demo",
    sequence_length=128, total_batch_size=2048, max_steps=1000, max_lr=6e-3,
    val_every=200, val_tokens=65_536, hellaswag_every=0, sample_every=200, checkpoint_every=500,
    dtype="float32", compile=False,
)  # fmt: skip


def preset(arguments: list[str]) -> TrainConfig:
    """The defaults that --demo and --recipe set."""
    words = " ".join(arguments).replace("=", " ")
    if "--demo" not in words:
        return FAST if "--recipe fast" in words else TrainConfig()
    slow = replace(DEMO, recipe="tutorial", optimizer="adamw", schedule="cosine", max_lr=4e-3)
    return slow if "--recipe tutorial" in words else DEMO


def choose_model_config(config: TrainConfig, encoding: tiktoken.Encoding) -> GPTConfig:
    """The architecture that the flags ask for. InputError where they contradict --init_from or the data."""
    given = {name: value for name in ("n_layer", "n_head", "n_embd") if (value := getattr(config, name))}
    if config.init_from is None:
        shape = {**PRESETS[config.model], **given}
        return GPTConfig(config.sequence_length, encoding.n_vocab, encoding=encoding.name, **shape)
    loaded = GPTConfig(**read_sizes(find_model(config.init_from)[0]))
    if config.model != TrainConfig.model:  # another than the default
        given = {**PRESETS[config.model], **given}
    for name, value in given.items():
        if value != getattr(loaded, name):
            flag = f"--{name} {value}" if getattr(config, name) else f"--model {config.model}, {name} {value}"
            raise InputError(f"{flag}: --init_from {config.init_from} has {getattr(loaded, name)}")
    if loaded.encoding != encoding.name:
        raise InputError(
            f"--init_from {config.init_from} uses the encoding {loaded.encoding!r}, the data in "
            f"{config.data_dir} {encoding.name!r}"
        )
    get_encoding(loaded.encoding, loaded.vocab_size)  # raises InputError if they don't fit together
    if config.sequence_length > loaded.block_size:
        raise InputError(
            f"--sequence_length {config.sequence_length} is longer than the block size of "
            f"--init_from {config.init_from}, {loaded.block_size}"
        )
    return loaded


# -----------------------------------------------------------------------------
# model; the names are those of OpenAI's checkpoint


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
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # not in training
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


class Transformer(nn.ModuleDict):
    """Everything but the head, under OpenAI's names. (The types are for the type checker.)"""

    wte: nn.Embedding  # of tokens, (vocab_size, n_embd)
    wpe: nn.Embedding  # of positions, (block_size, n_embd)
    h: nn.ModuleList  # the blocks
    ln_f: nn.LayerNorm


class GPT(nn.Module):
    """GPT-2, with OpenAI's names for its parts."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.loss_chunks = 1  # changes how the loss is computed, not its value: support/model/loss.py
        self.recompute = False  # see TrainConfig.recompute
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
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
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, caches: list[KVCache] | None = None
    ) -> torch.Tensor:
        """Given targets, the loss: the mean cross-entropy in nats, a scalar. Without, the logits of the next
        token at every position, (B, T, vocab_size).

        Training gets the loss alone: logits that are returned must be kept, and get a gradient of zeros.

        Args:
            idx: (B, T) int64 token ids, T at most block_size.
            targets: (B, T) int64, the token after each position; -100 where none counts.
            caches: from `new_caches`; they hold what was read before, and idx only the tokens after it.

        Raises:
            ValueError: the sequence is longer than block_size.
        """
        hidden = self.hidden_states(idx, caches)
        if targets is None:
            return self.head(hidden)
        return next_token_loss(self.lm_head, hidden, targets, self.config.vocab_size, self.loss_chunks)

    def hidden_states(self, idx: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
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

    def new_caches(self, length: int) -> list[KVCache]:
        """A cache for each layer, with space for `length` tokens."""
        return [KVCache(length) for _ in self.transformer.h]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size). Rows that only pad the vocabulary are cut
        off, here and in the loss: they enter no softmax, get no gradient, are never sampled and stay zero."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def pad_vocabulary(self, multiple: int = PAD_VOCAB_TO) -> "GPT":
        """Round the rows of the tied embedding up to a multiple, with zeros, for speed; the model stays the
        same function. Call it before the optimizer is made. Returns the model."""
        weight = self.transformer.wte.weight
        rows = math.ceil(self.config.vocab_size / multiple) * multiple
        padded = torch.zeros(rows, weight.size(1), dtype=weight.dtype, device=weight.device)
        padded[: self.config.vocab_size] = weight.detach()[: self.config.vocab_size]
        self.transformer.wte.weight = self.lm_head.weight = nn.Parameter(padded)
        self.transformer.wte.num_embeddings = self.lm_head.out_features = rows
        return self

    # OpenAI's linear layers are "Conv1D", whose weight is the transpose of nn.Linear's.
    TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """The model in a folder (a checkpoint, a run's folder, or any Hugging Face GPT-2) or on the Hub by
        name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name.

        Raises InputError when there is no such model, it is not a GPT-2, or its tensors don't fit its config.
        """
        config_file, weights_file = find_model(name_or_folder)
        model = cls(GPTConfig(**read_sizes(config_file)))
        tensors = read_tensors(weights_file)
        own = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        if different := sorted(own.keys() ^ tensors.keys()):
            raise InputError(f"{weights_file}: tensors missing or too many: {', '.join(different[:5])}")
        for name, tensor in tensors.items():
            tensor = tensor.t() if name.endswith(cls.TRANSPOSED) else tensor
            shape, expected = list(tensor.shape), list(own[name].shape)
            if shape != expected:
                raise InputError(f"{weights_file}: {name} is {shape}, its config.json means {expected}")
            own[name].copy_(tensor)  # a state dictionary shares the model's memory
        return model

    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the model, or a copy of its `weights`, as a folder for Hugging Face's GPT2LMHeadModel:
        float32, without the rows that pad the vocabulary, and for the gpt2 encoding with its tokenizer."""
        tensors = {}
        for name, tensor in (weights or dict(self.named_parameters())).items():  # the tied matrix comes once
            if name == "transformer.wte.weight":
                tensor = tensor[: self.config.vocab_size]
            tensor = tensor.t() if name.endswith(self.TRANSPOSED) else tensor
            tensors[name] = tensor.detach().float().cpu().contiguous()
        write_model(Path(folder), self.config.sizes, tensors)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """Continue each row of `idx`, (B, T): returns (B, T + max_new_tokens) int64. Each new token is drawn
        from the model's probabilities for it; support/model/sampling.py has the loop, and explains the
        `options` temperature, top_k, top_p, seed and compile."""
        return torch.cat((idx, *stream(self, idx, max_new_tokens, **options)), dim=1)


# -----------------------------------------------------------------------------
# optimisation


def configure_optimizer(
    model: nn.Module, config: TrainConfig, world: World | None = None, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """AdamW with betas 0.9, 0.95 and eps 1e-8 (GPT-3 paper, appendix B). Matrices and embeddings decay;
    biases and norms, whose scale matters, don't. With --optimizer muon, Muon trains the blocks' matrices and
    only they decay; the `world` shares its work, in bfloat16 if training's `dtype` is that, or float32."""
    parameters = list(model.parameters())
    # fused: one kernel for all tensors instead of several for each
    fused = parameters[0].device.type in ("cuda", "cpu")
    if config.optimizer == "muon":
        groups = muon_groups(model, config.weight_decay, config.adamw_lr_ratio)
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return Muon(groups, world, dtype, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate at `step`: linear warm-up; then a cosine down to a tenth at max_steps, or a trapezoid:
    constant, then down to 0 in a straight line over the share `cooldown` of all steps."""
    lr = config.max_lr * (step + 1) / config.warmup_steps if step < config.warmup_steps else config.max_lr
    if config.schedule == "trapezoid":
        left = max(0, config.max_steps - step) / (config.cooldown * config.max_steps)
        return min(lr, config.max_lr * left) if left < 1 else lr
    if step < config.warmup_steps:
        return lr
    if step >= config.max_steps:
        return config.max_lr * MIN_LR_RATIO
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)  # 0 to 1
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 to 0
    return config.max_lr * (MIN_LR_RATIO + (1.0 - MIN_LR_RATIO) * cosine)


# -----------------------------------------------------------------------------
# data


@functools.lru_cache(maxsize=8)  # an order serves a whole epoch, or a whole shard
def permutation(n: int, *seed: int) -> np.ndarray:
    """The numbers 0 .. n - 1 in the random order that `seed` stands for."""
    return np.random.default_rng(seed).permutation(np.arange(n))


@dataclass
class TokenLoader:
    """Rows of `sequence_length` tokens and their targets, in an order that depends on (seed, step) alone.

    A window is `sequence_length + 1` consecutive tokens of one shard, starting at a multiple of
    `sequence_length`. Epoch e visits the shards, and each shard's windows, in orders drawn from (seed, e) and
    (seed, e, shard). Step s takes the next `rows_per_step` windows after those of step s - 1; they are dealt
    out by micro-step, then by rank. With 8 rows a step, 2 processes and micro-batches of 2 rows, step 0 is

        micro-step 0: rank 0 takes windows 0 1, rank 1 takes 2 3
        micro-step 1: rank 0 takes windows 4 5, rank 1 takes 6 7

    So a step has the same tokens whatever the number of processes and the size of the micro-batch. There is
    no state to save: any step can be asked for. Raises InputError if no shard has a window.
    """

    shards: Shards
    split: str  # "train" or "val"
    sequence_length: int
    batch_size: int = 1  # rows of a micro-batch
    rows_per_step: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    vocab_size: int = 2**16  # larger ids are errors

    def __post_init__(self) -> None:
        self.tokens = self.shards.tokens[self.split]
        lengths = np.array([len(tokens) for tokens in self.tokens])
        self.windows_of = np.maximum(0, lengths - 1) // self.sequence_length  # per shard
        self.n_windows = int(self.windows_of.sum())  # per epoch
        if self.n_windows == 0:
            raise InputError(
                f"{self.shards.folder}: no shard of the {self.split} split has {self.sequence_length + 1} "
                f"tokens, which one row of --sequence_length {self.sequence_length} needs"
            )

    def order(self, n: int, *place: int) -> np.ndarray:
        """The order of an epoch's shards, or of the windows in one of its shards."""
        return permutation(n, self.seed, *place) if self.shuffle else np.arange(n)

    def locate(self, index: int) -> tuple[int, int]:
        """Window `index` of the run (epochs follow one another): its shard, and the offset where it
        starts."""
        epoch, index = divmod(index, self.n_windows)
        shards = self.order(len(self.tokens), epoch)
        ends = np.cumsum(self.windows_of[shards])  # windows up to the end of each shard, in this order
        i = int(np.searchsorted(ends, index, side="right"))
        shard = int(shards[i])
        n = int(self.windows_of[shard])
        first = int(ends[i]) - n  # windows in the shards before
        window = self.order(n, epoch, shard)[index - first]
        return shard, int(window) * self.sequence_length

    def windows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows first .. first + count - 1 of the run as inputs and targets, (count, T) int64 each.

        Raises InputError, naming shard and offset, for a token id outside the vocabulary.
        """
        rows = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row, index in zip(rows, range(first, first + count), strict=True):
            shard, start = self.locate(index)
            row[:] = self.tokens[shard][start : start + self.sequence_length + 1]
            if row.max() >= self.vocab_size:
                offset = start + int(row.argmax())
                file = self.shards.files[self.split][shard]
                raise InputError(
                    f"{file}: token id {row.max()} at offset {offset}, outside the vocabulary of "
                    f"{self.vocab_size}; the shard is damaged or of another encoding",
                    this_process_only=True,  # the other ranks read other windows
                )
        batch = torch.from_numpy(rows)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets in one micro-step of one step: (batch_size, sequence_length) int64
        each."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        return self.windows(step * self.rows_per_step + first, self.batch_size)


def open_data(
    config: TrainConfig, world: World
) -> tuple[Shards, tiktoken.Encoding, TokenLoader, TokenLoader, list[Item]]:
    """The shards in --data_dir, their encoding, the loaders of their training and validation split, and
    HellaSwag's items."""
    if config.demo and config.data_dir == DEMO.data_dir:  # another folder holds one's own text
        world.from_main(lambda: write_demo_shards(config.data_dir))
    shards, T = load_shards(config.data_dir, config.verify), config.sequence_length
    encoding = get_encoding(shards.encoding)
    train = TokenLoader(
        shards, "train", sequence_length=T, rows_per_step=config.total_batch_size // T, rank=world.rank,
        world_size=world.size, seed=config.seed, shuffle=config.shuffle, vocab_size=encoding.n_vocab,
    )  # fmt: skip
    val = TokenLoader(shards, "val", sequence_length=T, shuffle=False, vocab_size=encoding.n_vocab)
    val.n_windows = min(max(1, config.val_tokens // T), val.n_windows)  # always the first ones
    every, file, limit = config.hellaswag_every, config.hellaswag_data, config.hellaswag_limit
    items = world.from_main(lambda: items_for_training(every, file, limit))
    return shards, encoding, train, val, items


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def estimate_val_loss(
    model: nn.Module,
    loader: TokenLoader,
    world: World,
    autocast: torch.autocast,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss, nats per token, over all windows of `loader`, divided among the ranks. `on_part` is told of
    each batch. The last batch is filled up with targets that don't count: shapes stay fixed for the compiled
    model."""
    stride = world.size * loader.batch_size
    n_batches = math.ceil(loader.n_windows / stride)
    losses = torch.zeros(n_batches, device=world.device)  # a small tensor per batch would fragment the memory
    with gathered(model), fast_attention(world.device), autocast:
        for i, first in enumerate(range(world.rank * loader.batch_size, loader.n_windows, stride)):
            on_part(i, n_batches)
            count = min(loader.batch_size, loader.n_windows - first)
            x, y = loader.windows(first, count)
            missing = loader.batch_size - count
            x, y = F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-100)
            x, y = to_device(world.device, x, y)
            losses[i] = model(x, y).float() * count
    return world.sum(losses.cpu().double().sum()).item() / loader.n_windows


# -----------------------------------------------------------------------------
# main


def make_model(
    config: TrainConfig, model_config: GPTConfig, weights: Path | str | None, world: World, shares: int,
    dtype: torch.dtype,
) -> GPT:  # fmt: skip
    """The model with these weights, or with random ones, ready to be trained; divided if it is to be."""

    def make_whole() -> GPT:
        torch.manual_seed(config.seed)
        return (GPT.from_pretrained(weights) if weights else GPT(model_config)).pad_vocabulary()

    if shares > 1:
        with torch.device("meta"):
            model = GPT(model_config).pad_vocabulary()
        weights_of_all = make_whole().state_dict() if world.is_main else None
        divide(model, weights_of_all, world, shares, dtype, config.memory_limit_gb)
    else:
        model = make_whole().to(world.device)
    model.recompute = config.recompute
    return model


def list_tensors(config: TrainConfig) -> str:
    """The state dictionary of the model that the flags describe, as a table."""
    if config.init_from:
        return tensor_table(GPT.from_pretrained(config.init_from).state_dict())
    usual, record = "bytes" if config.demo else "gpt2", config.data_dir / "shards.json"
    name = read_record(record)["encoding"] if record.is_file() else usual
    return tensor_table(GPT(choose_model_config(config, get_encoding(name))).state_dict())


@faults_in_one_line()
def main(config: TrainConfig) -> None:
    check_numbers(config, POSITIVE, at_most_1={"cooldown"})
    if config.describe:
        print(list_tensors(config))
        return
    world = start_processes(config.device, config.timeout_minutes)
    device, W, T = world.device, world.size, config.sequence_length
    progress = Progress(world, config.tracker)

    # Everything that can be wrong with the input is found before work begins.
    shards, encoding, train_loader, val_loader, items = open_data(config, world)
    model_config = choose_model_config(config, encoding)
    dtype = choose_dtype(config.dtype, device, model_config.n_embd)
    world.require_same(data=shards.fingerprint, dtype=str(dtype), shard=config.shard)
    shares = count_shares(config.shard, config.optimizer, world)
    plan = plan_micro_batch(config.total_batch_size, T, config.micro_batch_size, config.memory_limit_gb,
                            config.recompute, model_config, world, shares)  # fmt: skip
    run = RunFolder(config.log_dir, world.is_main, progress.print, config.keep_every)
    first_step = world.from_main(lambda: run.open(config.resume, recipe_of(config, model_config, shards)))
    if 0 < first_step == config.max_steps:
        progress.print(f"{config.log_dir} is finished: its model is {run.checkpoint}")
        world.disconnect()
        return world.exit(0)
    plan = plan._replace(first=world.from_main(lambda: run.fitted_before(asdict(config), world)))
    stop = StopSignals(world.is_main)

    # raw_model is the plain module: HellaSwag, samples and checkpoints, whose shapes vary, use it. model is
    # the same weights compiled and wrapped: training and validation, whose shapes are fixed, use that.
    raw_model = make_model(config, model_config, run.checkpoint or config.init_from, world, shares, dtype)
    autocast, scaler = mixed_precision(device, dtype)
    fit = fit_to_device(
        plan, raw_model, config.compile, autocast, world, progress.print,
        lambda: configure_optimizer(raw_model, replace(config, max_lr=0.0), None, dtype),  # learns nothing
    )  # fmt: skip
    model, B = fit.model, fit.rows
    train_loader.batch_size = val_loader.batch_size = B
    grad_accum_steps = config.total_batch_size // (B * T * W)
    optimizer = configure_optimizer(raw_model, config, world, dtype)
    run.restore(optimizer, scaler, first_step, world)
    facts = gather_facts(config, TrainConfig(), model_config, shards, world, plan, fit, dtype,
                         val_tokens=val_loader.n_windows * T, hellaswag_items=len(items))  # fmt: skip
    progress.start(first_step, facts, run)

    x, y = to_device(device, *train_loader.batch(first_step, 0))
    stopping, overdue, train_loss, val_loss, score = False, False, math.nan, math.nan, None
    for step in range(first_step, config.max_steps + 1):
        last_step = step == config.max_steps
        stopping = stopping and not last_step  # a signal in the last step: only the end is left
        if not stopping:
            if config.due(config.val_every, step):
                val_loss = estimate_val_loss(model, val_loader, world, autocast, progress.of("validation"))
                progress.validation(step, val_loss)
            if config.due(config.hellaswag_every, step) and items:
                with autocast:
                    score = evaluate(raw_model, items, encoding, world, on_part=progress.of("HellaSwag"))
                progress.hellaswag(step, score)
            if config.due(config.sample_every, step):
                progress.samples(step, write_samples(raw_model, encoding, autocast))
            if config.due(config.val_every, step):
                run.draw()
        save = config.due(config.checkpoint_every, step) or (config.checkpoint_every and overdue)
        if stopping or (save and (step > first_step or last_step)):  # not what was loaded a moment ago
            run.save(step, raw_model, optimizer, scaler, {"loss": train_loss, "spent": progress.spent})
        if last_step or stopping:
            break
        stop.begin_steps(world)

        # ------------------------------ TRAINING ------------------------------
        start = time.perf_counter()
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            progress.micro_step(step, micro_step, grad_accum_steps)
            # The processes average their gradients during backward, but only in the last micro-step.
            sync_gradients(model, micro_step == grad_accum_steps - 1)
            with fast_attention(device):
                with autocast:
                    loss = model(x, y)
                loss = loss / grad_accum_steps  # gradients add up over micro-steps; the loss is a mean
                loss_sum += loss.detach()
                scaler.scale(loss).backward()
            # While a GPU is busy with what was asked of it, the next rows are copied there.
            next_step, next_micro_step = divmod(step * grad_accum_steps + micro_step + 1, grad_accum_steps)
            if next_step < config.max_steps:
                x, y = to_device(device, *train_loader.batch(next_step, next_micro_step))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        flags = [loss_sum.new_full((), flag) for flag in (stop.received > 0, run.overdue())]  # any's is all's
        means = world.sum(torch.stack((loss_sum, *flags))) / W
        values = torch.cat((means, whole(norm).view(1)))
        read_values = start_reading(values)
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        step_if_finite(optimizer, values)
        optimizer.zero_grad(set_to_none=W == 1)  # DDP's gradients are views of its buffers: they stay
        # The host waits once in a step, here, while a GPU is busy with the update.
        train_loss, stopping, overdue, grad_norm = read_values()
        check_finite(step, train_loss, grad_norm, loss_sum, scaler, world)
        scaler.update()
        # ----------------- everything that follows is diagnostics --------------

        progress.step(step, train_loss, lr, grad_norm, time.perf_counter() - start)
    if stopping or config.checkpoint_every:
        world.from_main(lambda: run.require(step))
    world.disconnect()
    if stopping:
        progress.close(f"stopped at step {step}, state saved; run the same command with --resume to continue")
        world.exit(128 + (stop.received or signal.SIGTERM))
    progress.finish(step, val_loss, score)
    world.exit(0)


if __name__ == "__main__":
    run_command(main, TrainConfig, default=preset(sys.argv))
