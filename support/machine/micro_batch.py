"""
Find the largest micro-batch (rows at once) that fits into memory, by running real steps before training.

The tokens of a step stay as the recipe sets them: a smaller micro-batch only means more micro-steps.
"""

import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from support.cli import InputError, plural
from support.machine.device import (
    GB,
    choose_compile,
    device_name,
    fast_attention,
    head_room,
    is_out_of_memory,
    memory_limit,
)
from support.machine.processes import World
from support.machine.sharding import alone, division_of, sync_gradients

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LOSS_CHUNKS = 32  # when memory is short, logits exist for one chunk of a micro-batch at a time
ENOUGH_TOKENS = 2**13  # tokens from which a larger micro-batch gains less than chunks would cost
MOST_TOKENS = {"cuda": 2**16, "mps": 2**14, "cpu": 2**12}  # per micro-batch, at most


class Architecture(Protocol):
    """The sizes of a model, as in GPTConfig."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_parameters(self) -> int: ...


class Plan(NamedTuple):
    """What the search may try."""

    sizes: list[int]  # rows per micro-batch, largest first
    sequence_length: int
    memory_limit_gb: float | None
    memory: str  # a description of what the model needs
    model: Architecture
    recompute: bool = False
    shares: int = 1  # processes among which the model is divided
    first: tuple[int, int] | None = None  # rows and chunks that fitted before an interruption

    def gpu_bytes(self, rows: int, chunks: int) -> float:
        """What a step keeps in a GPU's memory at the least: weights, gradients and moments, and for each
        token, in every layer, 37 bytes per channel (with --recompute 4), and its logits in 16 bits.

        Read from the code that PyTorch 2.13 generates for a compiled step in bfloat16.
        """
        blocks = (4 if self.recompute else 37) * self.model.n_layer * self.model.n_embd
        per_token = blocks + 2 * self.model.vocab_size / chunks
        states = 16 * self.model.n_parameters / self.shares
        if self.shares > 1:  # the embedding and its gradient, gathered
            states += 8 * self.model.vocab_size * self.model.n_embd
        return states + rows * self.sequence_length * per_token


def plan_micro_batch(
    total_batch_size: int,
    sequence_length: int,
    micro_batch_size: int | None,
    memory_limit_gb: float | None,
    recompute: bool,
    model: Architecture,
    world: World,
    shares: int = 1,
) -> Plan:
    """Plan the search for steps of `total_batch_size` tokens in rows of `sequence_length`. Raises InputError
    if the batch can't be divided, the model can't fit, or the processes differ."""
    sizes = micro_batch_sizes(
        total_batch_size, sequence_length, micro_batch_size, memory_limit_gb, model, world
    )
    world.require_same(micro_batch_sizes=tuple(sizes))
    memory = check_memory(model, memory_limit_gb, world, shares)
    return Plan(sizes, sequence_length, memory_limit_gb, memory, model, recompute, shares)


def micro_batch_sizes(
    total_batch_size: int,
    sequence_length: int,
    micro_batch_size: int | None,
    memory_limit_gb: float | None,
    model: Architecture,
    world: World,
) -> list[int]:
    """The micro-batch sizes to try, in rows per process, largest first; only `micro_batch_size` if it is
    given. On CPU and MPS, a full memory raises no error but slows the computer down or kills the process, so
    a cautious estimate excludes sizes that are too large.

    Raises InputError, with numbers that work, if the batch can't be divided.
    """
    T, W = sequence_length, world.size
    if total_batch_size % (T * W):
        raise InputError(
            f"--total_batch_size {total_batch_size} can't be divided into rows of {T} tokens for "
            f"{plural(W, 'process')}; {max(1, round(total_batch_size / (T * W))) * T * W} can"
        )
    rows = total_batch_size // (T * W)  # per process and step
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    if micro_batch_size is not None:
        if micro_batch_size not in divisors:
            raise InputError(
                f"--micro_batch_size {micro_batch_size} does not divide the {rows} rows that each "
                f"process has in a step; these do: {', '.join(map(str, reversed(divisors)))}"
            )
        return [micro_batch_size]
    sizes = [n for n in divisors if n * T <= MOST_TOKENS[world.device.type]] or [1]
    limit = None if world.device.type == "cuda" else memory_limit(world.device, memory_limit_gb)
    if limit is not None:
        # In float32, per position: three copies of the logits and 17 vectors of n_embd per layer. Doubled,
        # because the C library keeps freed memory.
        per_row = 2 * 4 * T * (3 * model.vocab_size + 17 * model.n_layer * model.n_embd)
        room = limit - 16 * model.n_parameters
        sizes = [n for n in sizes if n * per_row <= room] or [1]
    return sizes


def check_memory(model: Architecture, memory_limit_gb: float | None, world: World, shares: int = 1) -> str:
    """Describe the memory for weights, gradients and AdamW's moments. InputError if they alone can't fit."""
    each = 4 * model.n_parameters / GB  # float32
    own = 4 * each / shares
    need = f"{own:.2f} GB for weights, gradients and the optimizer's two moments"
    if shares > 1:
        need += f", {4 * each:.2f} GB divided among {shares} processes"
    limits = world.from_all(memory_limit(world.device, memory_limit_gb))
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and own * GB > limit:
        advice = "choose a smaller --model"
        if world.device.type != "cpu":  # on a CPU, dividing does not help: the processes share one memory
            enough = math.ceil(4 * each * GB / (limit / 2))  # shares that leave half of the memory free
            advice += (
                f", or divide it among {enough} such devices: torchrun --nproc_per_node={enough} and --shard"
            )
        raise InputError(
            f"a model of {model.n_parameters:,} parameters needs {need}, {each / shares:.2f} GB each; "
            f"{device_name(world.device)} has {limit / GB:.2f} GB for it: {advice}"
        )
    return need


def find_micro_batch_size(
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


class Fit(NamedTuple):
    """The result of the search."""

    model: nn.Module  # ready to train: compiled, wrapped
    rows: int  # per micro-batch and process
    loss_chunks: int
    seconds: float | None  # per micro-step; None if nothing had to be tried
    compile_note: str  # whether the model is compiled and, if not, why


class Chunked(Protocol):
    """The model to train: a GPT, which computes its loss in `loss_chunks` chunks."""

    loss_chunks: int


def wrap_model(raw_model: Any, compiled: bool, world: World) -> nn.Module:
    """The same weights, compiled if asked to, and wrapped if there are several processes."""
    model: nn.Module = raw_model
    if division := division_of(raw_model):
        for block in division.blocks:  # without the hooks that gather its weights
            block.__dict__.pop("forward", None)
            if compiled:
                block.forward = torch.compile(block.forward, dynamic=False)
        return model
    if compiled:
        # One graph for the whole model: gradients are exchanged once in a step, too seldom to break the graph
        # for overlap. Each size of micro-batch is compiled for itself: faster than one graph for all.
        torch._dynamo.config.optimize_ddp = False
        model = cast(nn.Module, torch.compile(raw_model, dynamic=False))
    if world.size > 1:  # also gives every process the main one's weights
        gpus = [world.device.index] if world.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=gpus, gradient_as_bucket_view=True)
    return model


def fit_to_device(
    plan: Plan,
    raw_model: Chunked,
    compile: bool,
    autocast: torch.autocast,
    world: World,
    print: Callable[[str], None],
    make_optimizer: Callable[[], torch.optim.Optimizer],
) -> Fit:
    """Compile the model if possible, find the micro-batch, and set the model's `loss_chunks`.

    Args:
        raw_model: the plain model.
        compile: whether to compile, where that works; if it fails, training continues without it.
        make_optimizer: makes one with a learning rate of 0, so that trial steps don't change the weights.

    Raises InputError if nothing fits.
    """
    compiled, note = choose_compile(compile, world.device)
    started = time.perf_counter()
    model = wrap_model(raw_model, compiled, world)
    if compiled:
        try:
            fit = search(plan, model, raw_model, True, autocast, world, print, make_optimizer)
        except CompilationFault as fault:
            print(f"torch.compile failed, training continues without it ({fault})")
            compiled, note = False, f"off: it failed ({fault})"
            del model  # also frees the gradient buffers of its wrapper
            free_memory(world.device)
            model = wrap_model(raw_model, False, world)
    if not compiled:
        if len(plan.sizes) == 1 and world.device.type != "cuda":
            return Fit(model, plan.sizes[0], 1, None, note)  # nothing to search
        fit = search(plan, model, raw_model, False, autocast, world, print, make_optimizer)
    # if the GPUs differ, the smallest decides
    all_rows, all_chunks, all_seconds = zip(*world.from_all(fit), strict=True)
    rows, chunks = min(all_rows), max(all_chunks)
    raw_model.loss_chunks = chunks
    print(
        f"warm-up: {time.perf_counter() - started:.1f} s, micro-batches of {plural(rows, 'row')}"
        + (f", the loss in {chunks} chunks" if chunks > 1 else "")
    )
    return Fit(model, rows, chunks, max(all_seconds), note)


class CompilationFault(Exception):
    """torch.compile failed in one of the processes."""


def search(
    plan: Plan,
    model: nn.Module,
    raw_model: Chunked,
    compiled: bool,
    autocast: torch.autocast,
    world: World,
    print: Callable[[str], None],
    make_optimizer: Callable[[], torch.optim.Optimizer],
) -> tuple[int, int, float]:
    """The rows that fit here, the chunks of their loss, and the seconds per micro-step.

    In every process, raises InputError if nothing fits in one of them, or CompilationFault if the compiler
    fails in one.
    """
    limit = memory_limit(world.device, plan.memory_limit_gb)
    enough = max(1, ENOUGH_TOKENS // plan.sequence_length)
    seconds = 0.0

    def fits(rows: int, chunks: int) -> bool:
        nonlocal seconds
        if world.device.type == "cuda" and limit is not None and plan.gpu_bytes(rows, chunks) > limit:
            return False  # without compiling it first
        reason = None
        try:
            # each process for itself
            with head_room(world.device, limit, plan.memory_limit_gb), alone(model):
                raw_model.loss_chunks = chunks
                optimizer = make_optimizer()
                seconds = try_step(model, optimizer, rows, plan.sequence_length, autocast, world.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:100]
        finally:
            model.zero_grad(set_to_none=True)
        if reason:
            in_chunks = ", loss in chunks" if chunks > 1 else ""
            print(f"a micro-batch of {plural(rows, 'row')}{in_chunks}: {reason}")
            free_memory(world.device)
            if compiled:
                torch.compiler.reset()  # a function is compiled for a limited number of shapes
        return reason is None

    largest = plan.first[0] if plan.first else plan.sizes[0]
    print(f"warm-up: trying a micro-batch of {plural(largest, 'row')}")
    found = 0, 0
    own_fault: InputError | CompilationFault | None = None
    try:
        found = find_micro_batch_size(plan.sizes, fits, enough, plan.first)
    except InputError as error:
        own_fault = error
    except Exception as error:  # any compiler error; uncompiled, a real fault recurs
        if not compiled:
            raise
        own_fault = CompilationFault(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
    faults = [fault for fault in world.from_all(own_fault) if fault]
    if faults:  # raised in every process, so that none waits for another; bad input first
        raise min(faults, key=lambda fault: not isinstance(fault, InputError))
    return *found, seconds


def try_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: int,
    sequence_length: int,
    autocast: torch.autocast,
    device: torch.device,
) -> float:
    """Run a step and a validation batch, to compile and allocate all that they need. The optimizer's learning
    rate is 0, so the weights don't change. Returns the seconds per micro-step."""
    x, y = torch.zeros((2, rows, sequence_length), dtype=torch.int64, device=device)
    seconds = 0.0
    with fast_attention(device):
        # In the end, gradients and moments are in memory; a divided model's whole gradients, too.
        divided = division_of(model) is not None
        for last in (True, False, True) if divided else (True, True):
            if divided:
                sync_gradients(model, last)
            start = time.perf_counter()
            with autocast:
                loss = model(x, y)
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
            for group in optimizer.param_groups if last else ():
                for parameter in group["params"]:
                    # An overflow would still reach the weights. A copy that trains alone has no gradients.
                    grad = parameter.grad
                    parameter.grad = torch.zeros_like(parameter) if grad is None else grad.zero_()
            if last:
                optimizer.step()
        with torch.no_grad(), autocast:
            model(x, y).item()
    return seconds


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
