"""
Find the largest micro-batch (rows at once) that fits into memory, by running real steps before training.

The tokens of a step stay as the recipe sets them: a smaller micro-batch only means more micro-steps.
"""

import gc
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from support.cli import InputError, in_words, plural
from support.machine.device import (
    GB,
    HEAD_ROOM,
    device_name,
    head_room,
    is_out_of_memory,
    memory_limit,
    type_of,
)
from support.machine.processes import World
from support.machine.sharding import ShardedModel, count_shards

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from train_gpt2 import GPT, GPTConfig, TrainConfig

LOSS_CHUNKS = 32  # Where memory is short, logits exist for one chunk of a micro-batch at a time.
ENOUGH_TOKENS = 2**13  # From here on, a larger micro-batch gains less than chunks would cost.
CAUTION = 1.1  # A sum of what a step keeps falls short of its peak; measured in generated code, by up to 10%.


class Fit(NamedTuple):
    """What the search found."""

    rows: int  # per micro-batch and process
    loss_chunks: int = 1
    seconds: float | None = None  # per micro-step; None if nothing was tried
    compiler_fault: str | None = None  # why training goes on without the compiler
    memory: str = ""  # what the model needs, in words


# -----------------------------------------------------------------------------
# before the model is made: what can be wrong with the flags


def check_batch(config: "TrainConfig", model_config: "GPTConfig", world: World) -> None:
    """Raises InputError if the batch can't be divided, the model can't fit, or the processes differ."""
    world.require_same(micro_batch_sizes=tuple(micro_batch_sizes(config, model_config, world)))
    check_memory(config, model_config, world)


def micro_batch_sizes(config: "TrainConfig", model_config: "GPTConfig", world: World) -> list[int]:
    """The micro-batch sizes to try, in rows per process, largest first; only --micro_batch_size if it is
    given. On CPU and MPS, a full memory raises no error but slows the computer down or kills the process, so
    a cautious estimate excludes sizes that are too large.

    Raises InputError, with numbers that work, if the batch can't be divided.
    """
    T, W = config.sequence_length, world.size
    if config.total_batch_size % (T * W):
        raise InputError(
            f"--total_batch_size {config.total_batch_size} can't be divided into rows of {T} tokens for "
            f"{plural(W, 'process')}; {max(1, round(config.total_batch_size / (T * W))) * T * W} can"
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
    limit = None if world.device.type == "cuda" else memory_limit(world.device, config.memory_limit_gb)
    if limit is not None:
        # In float32, per position: three copies of the logits and 17 vectors of n_embd per layer. Doubled,
        # because the C library keeps freed memory.
        per_row = 2 * 4 * T * (3 * model_config.vocab_size + 17 * model_config.n_layer * model_config.n_embd)
        room = limit - 16 * model_config.n_parameters
        sizes = [n for n in sizes if n * per_row <= room] or [1]
    return sizes


def check_memory(config: "TrainConfig", model_config: "GPTConfig", world: World) -> str:
    """Describe the memory for weights, gradients and AdamW's moments. InputError if they alone can't fit."""
    shards = count_shards(config, world)
    each = 4 * model_config.n_parameters / GB  # float32
    own = 4 * each / shards
    need = f"{own:.2f} GB for weights, gradients and the optimizer's two moments"
    if shards > 1:
        need += f", {4 * each:.2f} GB divided among {shards} processes"
    limit = smallest_limit(config, world)
    if limit is not None and own * GB > limit:
        advice = "choose a smaller --model"
        if world.device.type != "cpu":  # on a CPU, dividing does not help: the processes share one memory
            enough = math.ceil(4 * each * GB / (limit / 2))  # shards that leave half of the memory free
            advice += (
                f", or divide it among {enough} such devices: torchrun --nproc_per_node={enough} and --shard"
            )
        raise InputError(
            f"a model of {model_config.n_parameters:,} parameters needs {need}, {each / shards:.2f} GB each; "
            f"{device_name(world.device)} has {limit / GB:.2f} GB for it: {advice}"
        )
    return need


def smallest_limit(config: "TrainConfig", world: World) -> float | None:
    """The bytes that every process may use; None if no system reports any."""
    limits = world.from_all(memory_limit(world.device, config.memory_limit_gb))
    return min((limit for limit in limits if limit is not None), default=None)


def least_bytes(
    config: "TrainConfig", model_config: "GPTConfig", rows: int, chunks: int, shards: int = 1
) -> float:
    """What a step keeps in a GPU's memory at the least: weights, gradients and moments, and for each token,
    in every layer, 37 bytes per channel (with --recompute 4), and its logits in 16 bits.

    Read from the code that PyTorch 2.13 generates for a compiled step in bfloat16.
    """
    blocks = (4 if config.recompute else 37) * model_config.n_layer * model_config.n_embd
    per_token = blocks + 2 * model_config.vocab_size / chunks
    states = 16 * model_config.n_parameters / shards
    if shards > 1:  # the embedding and its gradient, gathered
        states += 8 * model_config.vocab_size * model_config.n_embd
    return states + rows * config.sequence_length * per_token


# -----------------------------------------------------------------------------
# the search


def most_rows(
    sizes: list[int], fits: Callable[[int, int], bool], enough: int, first: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The most rows that fit, and the number of chunks for their loss.

    Chunks cost some time, so they are tried only if fewer than `enough` rows fit without them. Raises
    InputError if nothing fits.

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


def find_micro_batch(
    model: nn.Module,
    config: "TrainConfig",
    world: World,
    autocast: torch.autocast,
    print: Callable[[str], None],
    first: tuple[int, int] | None = None,
) -> Fit:
    """The most rows that fit into the memory of every process.

    If the compiler fails in one of the processes, all go on without it.

    Args:
        model: ready to be trained: compiled, wrapped. It stays as it is, but for `loss_chunks` of the GPT
            inside, which the caller sets.
        first: rows and chunks of the loss to try before all others.

    Raises InputError if nothing fits.
    """
    started = time.perf_counter()
    compiled, fault = is_compiled(model), None
    if isinstance(model, ShardedModel):
        fit = computed_fit(model.raw_model.config, config, world)
        own_fault = try_a_block(model, config, world, autocast) if compiled else None
        if fault := next(filter(None, world.from_all(own_fault)), None):
            stop_compiling(fault, print)
    else:
        try:
            fit = tried_fit(model, config, world, autocast, print, first=first, compiled=compiled)
        except CompilerFault as error:
            fault = str(error)
            stop_compiling(fault, print)
            fit = tried_fit(model, config, world, autocast, print, first=first, compiled=False)
    if fit.seconds is not None:
        print(
            f"warm-up: {time.perf_counter() - started:.1f} s, micro-batches of {plural(fit.rows, 'row')}"
            + (f", the loss in {fit.loss_chunks} chunks" if fit.loss_chunks > 1 else "")
        )
    memory = check_memory(config, unwrap(model).config, world)
    return fit._replace(compiler_fault=fault, memory=memory)


def stop_compiling(fault: str, print: Callable[[str], None]) -> None:
    """From now on, compiled modules run as if they were not."""
    print(f"torch.compile failed, training continues without it ({fault})")
    torch.compiler.set_stance("force_eager")


def unwrap(model: nn.Module) -> "GPT":
    """The plain GPT inside."""
    inside: Any = model
    for wrapper in ("module", "_orig_mod", "raw_model"):  # DistributedDataParallel, torch.compile, sharded
        inside = getattr(inside, wrapper, inside)
    return inside


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has had this model, or its blocks."""
    if isinstance(model, ShardedModel):
        return model.compiled
    return hasattr(getattr(model, "module", model), "_orig_mod")


class CompilerFault(Exception):
    """torch.compile failed in one of the processes."""


def tried_fit(
    model: nn.Module,
    config: "TrainConfig",
    world: World,
    autocast: torch.autocast,
    print: Callable[[str], None],
    *,
    first: tuple[int, int] | None,
    compiled: bool,
) -> Fit:
    """The fit, by steps on trial.

    In every process, raises InputError if nothing fits in one of them, or CompilerFault if the compiler fails
    in one.
    """
    raw_model, device, T = unwrap(model), world.device, config.sequence_length
    sizes = micro_batch_sizes(config, raw_model.config, world)
    if len(sizes) == 1 and device.type != "cuda" and not compiled:
        return Fit(sizes[0])  # nothing to search
    limit = memory_limit(device, config.memory_limit_gb)
    seconds = 0.0

    def fits(rows: int, chunks: int) -> bool:
        nonlocal seconds
        surely_needed = least_bytes(config, raw_model.config, rows, chunks)
        if device.type == "cuda" and limit is not None and surely_needed > limit:
            return False  # without compiling it first
        reason = None
        try:
            with head_room(device, limit, config.memory_limit_gb):
                raw_model.loss_chunks = chunks
                seconds = try_step(model, rows, T, autocast, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = in_words(error).splitlines()[0][:100]
        finally:
            model.zero_grad(set_to_none=True)
        if reason:
            in_chunks = ", loss in chunks" if chunks > 1 else ""
            print(f"a micro-batch of {plural(rows, 'row')}{in_chunks}: {reason}")
            free_memory(device)
            if compiled:
                torch.compiler.reset()  # a function is compiled for a limited number of shapes
        return reason is None

    print(f"warm-up: trying a micro-batch of {plural(first[0] if first else sizes[0], 'row')}")
    found = 0, 0
    own_fault: InputError | CompilerFault | None = None
    try:
        found = most_rows(sizes, fits, max(1, ENOUGH_TOKENS // T), first)
    except InputError as error:
        own_fault = error
    except Exception as error:  # any compiler error; uncompiled, a real fault recurs
        if not compiled:
            raise
        own_fault = CompilerFault(fault_line(error))
    faults = [fault for fault in world.from_all(own_fault) if fault]
    if faults:  # raised in every process, so that none waits for another; bad input first
        raise min(faults, key=lambda fault: not isinstance(fault, InputError))
    # If the GPUs differ, the smallest decides.
    all_rows, all_chunks, all_seconds = zip(*world.from_all((*found, seconds)), strict=True)
    return Fit(min(all_rows), max(all_chunks), max(all_seconds))


def try_step(
    model: nn.Module, rows: int, sequence_length: int, autocast: torch.autocast, device: torch.device
) -> float:
    """Run two micro-steps and a validation batch, without communication, to compile and allocate all that
    they need beside weights, gradients and AdamW's two moments. Returns the seconds of the second."""
    x, y = torch.zeros((2, rows, sequence_length), dtype=torch.int64, device=device)
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    seconds = 0.0
    for _ in range(2):  # the second time, gradients are in memory
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = False  # each process tries for itself
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


def computed_fit(model_config: "GPTConfig", config: "TrainConfig", world: World) -> Fit:
    """The fit of a divided model, whose processes can't try for themselves: by the sum of what a step keeps.
    On a CPU, the sizes are cautious already."""
    sizes = micro_batch_sizes(config, model_config, world)
    limit, shards = smallest_limit(config, world), count_shards(config, world)

    def fits(rows: int, chunks: int) -> bool:
        if world.device.type != "cuda" or limit is None or len(sizes) == 1:
            return True
        needed = CAUTION * least_bytes(config, model_config, rows, chunks, shards)
        return needed <= (1 - HEAD_ROOM) * limit

    return Fit(*most_rows(sizes, fits, max(1, ENOUGH_TOKENS // config.sequence_length)))


def try_a_block(
    model: ShardedModel, config: "TrainConfig", world: World, autocast: torch.autocast
) -> str | None:
    """Compile one block of a divided model in this process alone, and run it; returns the compiler's fault,
    if it has one. Within a step, a process whose compiler fails would leave the others waiting."""
    model_config = model.raw_model.config
    with torch.device("meta"):
        block = model.division.block_type(model_config)
    block = block.to_empty(device=world.device)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.zeros(1, config.sequence_length, model_config.n_embd, device=world.device, requires_grad=True)
    try:
        with autocast:
            torch.compile(block, dynamic=False)(x).sum().backward()
    except Exception as error:  # whatever the compiler raises
        return fault_line(error)
    return None


def fault_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
