"""
Find the largest micro-batch (rows at once) that fits into memory, by running real steps before training. With
--shard, it is computed.

The tokens of a step stay as the recipe sets them: a smaller micro-batch only means more micro-steps.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from support.cli import InputError, brief, plural
from support.machine import device as devices
from support.machine.device import GB, HEAD_ROOM, device_name, head_room, is_out_of_memory, type_of
from support.machine.processes import World
from support.machine.sharding import ShardedModel, count_shards, gradient_bytes

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from train_gpt2 import GPTConfig, TrainConfig

LOSS_CHUNKS = 32  # Where memory is short, logits exist for one chunk of a micro-batch at a time.
ENOUGH_TOKENS = 2**13  # From here on, a larger micro-batch gains less than chunks would cost.
CAUTION = 1.1  # A sum of what a step keeps falls short of its peak; measured in generated code, by up to 10%.


class Fit(NamedTuple):
    """What the search found."""

    rows: int  # per micro-batch and process
    loss_chunks: int
    seconds: float | None  # per micro-step; None if nothing was tried
    compiler_fault: str | None  # why training goes on without the compiler
    memory: str  # what the model needs, in words


# -----------------------------------------------------------------------------
# before the model is made: what can be wrong with the flags


def check_batch(config: "TrainConfig", model_config: "GPTConfig", world: World) -> None:
    """Raises InputError if the batch can't be divided, the model can't fit, or the processes differ."""
    world.require_same(micro_batch_sizes=tuple(micro_batch_sizes(config, model_config, world)))
    check_memory(config, model_config, world)


def micro_batch_sizes(config: "TrainConfig", model_config: "GPTConfig", world: World) -> list[int]:
    """The micro-batch sizes to try, in rows per process, largest first; only --micro_batch_size if it is
    given. On a CPU or a Mac, a full memory slows the computer down or kills the process before any error,
    so a cautious estimate excludes sizes that are too large. Raises InputError, with numbers that work, if
    the batch can't be divided."""
    T, W = config.sequence_length, world.size
    if config.total_batch_size % (T * W):
        tokens = max(1, round(config.total_batch_size / (T * W))) * T * W
        fewer = next((n for n in range(W, 0, -1) if config.total_batch_size % (T * n) == 0), 0)
        advice = f"{plural(fewer, 'process')} can divide it; a new run can take {tokens}"
        raise InputError(
            f"--total_batch_size {config.total_batch_size} can't be divided into rows of {T} tokens for "
            f"{plural(W, 'process')}; {advice if fewer else f'{tokens} can'}"
        )
    rows = config.total_batch_size // (T * W)  # per process and step
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    if config.micro_batch_size is not None:
        if config.micro_batch_size not in divisors:
            raise InputError(
                f"--micro_batch_size {config.micro_batch_size} does not divide the {rows} rows that each "
                f"process has in a step; these do: {', '.join(map(str, reversed(divisors)))}"
            )
        return [config.micro_batch_size]
    sizes = [n for n in divisors if n * T <= type_of(world.device).most_tokens] or [1]
    on_gpu = world.device.type == "cuda"
    limit = None if on_gpu else devices.memory_limit(world.device, config.memory_limit_gb)
    if limit is not None:
        # In float32, per position: three copies of the logits and 17 vectors of n_embd per layer. Doubled,
        # because the C library keeps freed memory.
        per_row = 2 * 4 * T * (3 * model_config.vocab_size + 17 * model_config.n_layer * model_config.n_embd)
        room = limit - 16 * model_config.n_parameters
        sizes = [n for n in sizes if n * per_row <= room] or [1]
    return sizes


def block_matrices(model_config: "GPTConfig") -> int:
    """How many numbers the blocks' matrices have: attention 4 C x C, MLP 8 C x C."""
    return 12 * model_config.n_layer * model_config.n_embd**2


def state_bytes(config: "TrainConfig", model_config: "GPTConfig") -> int:
    """Bytes for weights, gradients and the optimizer's state, in float32: AdamW keeps two moments of each
    parameter, Muon one of each of the blocks' matrices."""
    numbers = 4 * model_config.n_parameters
    if config.optimizer == "muon":
        numbers -= block_matrices(model_config)
    return 4 * numbers


def check_memory(config: "TrainConfig", model_config: "GPTConfig", world: World) -> str:
    """Describe the memory for weights, gradients and the optimizer's state. InputError if they alone can't
    fit."""
    shards = count_shards(config, world)
    total = state_bytes(config, model_config)
    own = total / shards
    adamw = config.optimizer == "adamw"
    state = "two moments" if adamw else "state"
    need = f"{own / GB:.2f} GB for weights, gradients and the optimizer's {state}"
    if shards > 1:
        need += f", {total / GB:.2f} GB divided among {shards} processes"
    limit = world.memory_limit(config.memory_limit_gb)
    on_gpu = world.device.type == "cuda"
    room = limit and (1 - HEAD_ROOM if on_gpu else 1) * limit
    if room is not None and own > room:
        advice = "choose a smaller --model"
        rows = config.total_batch_size // config.sequence_length
        half = math.ceil(total / (room / 2))  # so many shards leave half of the memory free
        enough = next((n for n in range(half, rows + 1) if rows % n == 0), None)
        if on_gpu and enough:  # elsewhere, several processes share one memory, or there is one only
            launch = f"torchrun --nproc_per_node={enough} and --shard"
            advice += f", or divide it among {enough} such devices: {launch}"
        each = f", {own / 4 / GB:.2f} GB each" if adamw else ""
        raise InputError(
            f"a model of {model_config.n_parameters:,} parameters needs {need}{each}; "
            f"{device_name(world.device)} has {room / GB:.2f} GB for it: {advice}"
        )
    return need


def bytes_a_token(
    config: "TrainConfig", model_config: "GPTConfig", chunks: int, compiled: bool, dtype: torch.dtype
) -> float:
    """What a training step keeps of a token on a GPU: in every layer, 37 bytes per channel (64 in float32, 4
    with --recompute), and its logits in the `dtype` of the products. Those in 16 bits are read from the code
    that PyTorch 2.13 generates for a compiled step; in float32, what is 2 bytes there takes 4. Without the
    compiler, a logit takes 12 bytes: in float32 as it is, its softmax, and its gradient."""
    in_float32 = dtype == torch.float32
    per_channel = 4 if config.recompute else 64 if in_float32 else 37
    per_logit = 12 if not compiled else 4 if in_float32 else 2
    blocks = per_channel * model_config.n_layer * model_config.n_embd
    return blocks + per_logit * model_config.vocab_size / chunks


def least_bytes(config: "TrainConfig", model_config: "GPTConfig", rows: int, chunks: int) -> float:
    """What a step keeps in a GPU's memory at the least: weights, gradients and the optimizer's state, and
    what it keeps of its tokens if it is compiled and in 16 bits."""
    per_token = bytes_a_token(config, model_config, chunks, compiled=True, dtype=torch.bfloat16)
    return state_bytes(config, model_config) + rows * config.sequence_length * per_token


def least_bytes_sharded(
    config: "TrainConfig",
    model_config: "GPTConfig",
    rows: int,
    chunks: int,
    *,
    shards: int,
    kept: float = 0.0,
    compiled: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """`least_bytes` of a divided model: its shards, and the most that a training step, an update or a
    validation needs beside them.

    Args:
        shards: among how many processes the model is divided.
        kept: bytes of unsharded gradients that stay between micro-steps.
        compiled: whether training is; validation is not, since it gathers the whole model.
        dtype: of the products. In bfloat16, the blocks' weights are gathered in bfloat16; in float16,
            autocast keeps a copy of all weights in 16 bits.
    """
    tokens = rows * config.sequence_length
    embedding = 4 * model_config.vocab_size * model_config.n_embd
    copies = 2 * model_config.n_parameters if dtype == torch.float16 else 0
    per_token = bytes_a_token(config, model_config, chunks, compiled, dtype)
    training = copies + 2 * embedding + kept + tokens * per_token  # the embedding has a gradient, too
    # A logit as the products leave it, in float32, and its log-softmax.
    per_logit = 8 if dtype == torch.float32 else 10
    blocks = (2 if dtype == torch.bfloat16 else 4) * (model_config.n_parameters - embedding / 4)
    validation = copies + embedding + blocks + tokens * per_logit * model_config.vocab_size / chunks
    # Muon's update, after the backward pass: the matrices of one shape, a third of all, as averages in
    # float32 and in six tensors of the products' type, which is float32 unless that is bfloat16.
    per_number = 4 + 6 * (2 if dtype == torch.bfloat16 else 4)
    update = per_number * block_matrices(model_config) / 3 / shards if config.optimizer == "muon" else 0
    return state_bytes(config, model_config) / shards + max(training, validation, update)


# -----------------------------------------------------------------------------
# the search


def find_micro_batch(
    model: nn.Module,
    config: "TrainConfig",
    world: World,
    autocast: torch.autocast,
    print: Callable[[str], None],
    first: tuple[int, int] | None = None,
) -> Fit:
    """The most rows that fit into the memory of every process; InputError if none do. If the compiler fails
    in one of the processes, all go on without it.

    Args:
        model: ready to be trained: compiled, wrapped. It stays as it is, but for `loss_chunks` of the GPT
            inside, which the caller sets.
        first: rows and chunks of the loss from the run so far, kept if they fit: others would change its last
            bits. With --shard, the same sum finds them again.
    """
    started = time.perf_counter()
    raw_model: Any = next(module for module in model.modules() if hasattr(type(module), "loss_chunks"))
    compiled, _ = devices.choose_compile(config.compile, world.device)
    trials = Trials(model, raw_model, config, world, autocast, print=print, compiled=compiled)
    sizes = micro_batch_sizes(config, raw_model.config, world)
    enough = max(1, ENOUGH_TOKENS // config.sequence_length)
    sharded = isinstance(model, ShardedModel)
    if sharded:
        devices.cap_memory(world.device, config.memory_limit_gb)  # as the trials of an undivided model do
        if compiled:
            trials.stop_compiling_after(trials.try_a_block())
    if len(sizes) == 1 and (sharded or (not compiled and world.device.type != "cuda")):
        rows = sizes[0]  # nothing to search
        chunks = 1 if trials.should_fit(rows, 1) else LOSS_CHUNKS
    elif sharded:  # no process can try without the others
        rows, chunks = most_rows(sizes, trials.should_fit, enough)
    else:
        print(f"warm-up: trying a micro-batch of {plural(first[0] if first else sizes[0], 'row')}")
        rows, chunks = most_rows(sizes, trials.fit, enough, first)
        in_chunks = f", the loss in {chunks} chunks" if chunks > 1 else ""
        as_before = ", as before" if (rows, chunks) == first else ""
        seconds = time.perf_counter() - started
        print(f"warm-up: {seconds:.1f} s, micro-batches of {plural(rows, 'row')}{in_chunks}{as_before}")
    memory = check_memory(config, raw_model.config, world)
    return Fit(rows, chunks, trials.seconds, trials.compiler_fault, memory)


def most_rows(
    sizes: list[int], fits: Callable[[int, int], bool], enough: int, first: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The most rows that fit, and the number of chunks for their loss; InputError if none do. Chunks cost
    some time, so they are tried only if fewer than `enough` rows fit without them.

    Args:
        sizes: rows to try, largest first.
        fits: (rows, chunks) -> whether a step with them fits.
        first: rows and chunks to try before all others, and to keep if they fit.
    """
    if first and first[0] in sizes and fits(*first):
        return first
    rows = next((size for size in sizes if fits(size, 1)), 0)
    if rows < min(enough, sizes[0]):
        chunked = next((size for size in sizes if size > rows and fits(size, LOSS_CHUNKS)), 0)
        if chunked:
            return chunked, LOSS_CHUNKS
        if rows:
            fits(rows, 1)  # again: later failures discarded what was compiled for it
    if not rows:
        smaller = "a smaller --micro_batch_size, " if sizes[-1] > 1 else ""
        raise InputError(
            f"out of memory with a micro-batch of {plural(sizes[-1], 'row')}; {smaller}--recompute, a "
            "shorter --sequence_length or a smaller --model takes less"
        )
    return rows, 1


@dataclass
class Trials:
    """Steps on trial, in all processes together: what fails in one has failed in all."""

    model: nn.Module
    raw_model: Any
    config: "TrainConfig"
    world: World
    autocast: torch.autocast
    print: Callable[[str], None]
    compiled: bool
    compiler_fault: str | None = None
    seconds: float | None = None  # of the last micro-step, in the slowest process

    def should_fit(self, rows: int, chunks: int, share: float = (1 - HEAD_ROOM) / CAUTION) -> bool:
        """Whether what a step keeps fits into a share of each GPU; other devices have cautious sizes."""
        limit = self.world.memory_limit(self.config.memory_limit_gb)
        if self.world.device.type != "cuda" or limit is None:
            return True
        shards, model_config = count_shards(self.config, self.world), self.raw_model.config
        if shards == 1:  # a trial will tell
            return least_bytes(self.config, model_config, rows, chunks) <= share * limit
        least = least_bytes_sharded(
            self.config,
            model_config,
            rows,
            chunks,
            shards=shards,
            kept=0 if self.raw_model.gradients_are_large else gradient_bytes(model_config),
            compiled=self.compiled,
            dtype=devices.choose_dtype(self.config.dtype, self.world.device, model_config.n_embd),
        )
        return least <= share * limit

    def fit(self, rows: int, chunks: int) -> bool:
        """Whether a step with these rows, and their loss in these chunks, fits into every memory."""
        if not self.should_fit(rows, chunks, share=1.0):
            return False  # without compiling it first
        device = self.world.device
        self.raw_model.loss_chunks = chunks
        seconds, full, fault = 0.0, None, None
        try:
            with head_room(device, self.config.memory_limit_gb):
                seconds = try_step(self.model, rows, self.config.sequence_length, self.autocast, device)
        except Exception as error:
            if is_out_of_memory(error):
                full = brief(error)
            elif self.compiled:  # any compiler error; uncompiled, a real fault recurs
                fault = brief(error)
            else:
                raise
        finally:
            self.model.zero_grad(set_to_none=True)
        if self.compiled and self.stop_compiling_after(fault):
            return self.fit(rows, chunks)
        all_seconds, all_full = zip(*self.world.from_all((seconds, full)), strict=True)
        self.seconds = max(all_seconds)
        if full := next(filter(None, all_full), None):
            in_chunks = ", loss in chunks" if chunks > 1 else ""
            self.print(f"a micro-batch of {plural(rows, 'row')}{in_chunks}: {full}")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if self.compiled:
                torch.compiler.reset()  # a function is compiled for a limited number of shapes
        return full is None

    def try_a_block(self) -> str | None:
        """Compile and run a block of a divided model, and the loss, in this process alone; returns the
        compiler's fault. In a step, a process whose compiler fails would leave the others waiting."""
        config = replace(self.raw_model.config, n_layer=1)
        with self.world.device:
            model = type(self.raw_model)(config).pad_vocabulary()  # FSDP's classes make plain models
            x = torch.zeros(1, self.config.sequence_length, config.n_embd, requires_grad=True)
            y = torch.zeros(1, self.config.sequence_length, dtype=torch.int64)
        try:
            with self.autocast:
                x = torch.compile(model.transformer.h[0], dynamic=False)(x)
                torch.compile(model.loss, dynamic=False)(x, y).backward()
        except Exception as error:  # whatever the compiler raises
            return brief(error)
        return None

    def stop_compiling_after(self, own_fault: str | None) -> bool:
        """If the compiler has failed in one process, compiled modules run in all as if they were not."""
        self.compiler_fault = next(filter(None, self.world.from_all(own_fault)), None)
        if self.compiler_fault:
            self.print(f"torch.compile failed, training continues without it ({self.compiler_fault})")
            torch.compiler.set_stance("force_eager")
            self.compiled = False
        return not self.compiled


def try_step(
    model: nn.Module, rows: int, sequence_length: int, autocast: torch.autocast, device: torch.device
) -> float:
    """Run two micro-steps and a validation batch, without communication, with all that they need in memory:
    weights, gradients and AdamW's two moments. Returns the seconds of the second."""
    x, y = torch.zeros((2, rows, sequence_length), dtype=torch.int64, device=device)
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    seconds = 0.0
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False  # each process tries for itself
    for _ in range(2):  # the second time, gradients are in memory
        start = time.perf_counter()
        with autocast:
            loss = model(x, y)
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad(), autocast:
        model(x, y).item()
    model.train()
    del moments
    return seconds
