"""The processes of a run: how they start, communicate, stop and exit."""

import contextlib
import gc
import os
import re
import signal
import socket
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from support.cli import CommandError, InputError, RunFault, brief, in_words, with_remedy
from support.machine.device import choose_device, is_out_of_memory, keep_freed_memory, memory_limit, type_of
from support.machine.page_cache import read_into_cache

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
# What errors of a GPU, its driver or its libraries say, Triton's among them.
GPU_FAULT = r"Triton Error \[|\b(CUDA|cuDNN|CUBLAS|HIP)( \w+)? error|NVIDIA driver|CUDA GPUs"
# The environment variable that says which phase of a check (support/run/check.py) a process belongs to.
CHECK_PHASE = "GPT2_CHECK_PHASE"
CPU = torch.device("cpu")
# It gathers one tensor from each process; PyTorch 2.13 has renamed it.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them: its rank, their number, its device, their store."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    store: "dist.Store | None" = None  # entries that all processes see; None if there is one process

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and saves for all."""
        return self.rank == 0

    @property
    def collective_device(self) -> torch.device:
        """The device for tensors exchanged between processes: the GPU for NCCL, the CPU for gloo."""
        return self.device if self.device.type == "cuda" else CPU

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make()` in the main process; return its result in every one. Its CommandError is raised in
        every one, and its OSError too, as a RunFault."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            outcome = attempt(make)
        if self.size > 1:
            dist.broadcast_object_list(outcome, device=self.collective_device)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def on_each_host(self, do: Callable[[], object]) -> None:
        """Call `do()` in one process of each host; all wait for them, and raise what one has raised."""
        fault = attempt(do)[1] if os.environ.get("LOCAL_RANK", "0") == "0" else None
        for other in filter(None, self.from_all(fault)):
            raise other

    def from_all(self, value: T) -> list[T]:
        """Every process's `value`, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def memory_limit(self, limit_gb: float | None) -> float | None:
        """The bytes that every process may use, see `memory_limit`; None if no system reports any."""
        limits = self.from_all(memory_limit(self.device, limit_gb))
        return min((limit for limit in limits if limit), default=None)

    def require_same(self, **settings: object) -> None:
        """Raises InputError unless every process has the same settings."""
        everyone = self.from_all(settings)
        for name in dict.fromkeys(name for of in everyone for name in of):
            values = [of.get(name) for of in everyone]
            if values.count(values[0]) < len(values):
                raise InputError(f"the processes differ in {name}: {', '.join(map(str, values))}")

    def seed(self, seed: int, step: int) -> None:
        """Seed PyTorch's generators with (seed, step, rank): there is no state to save."""
        (number,) = np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(number))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every process's `values`, in every process; gloo has no average."""
        if self.size > 1:
            values = values.to(self.collective_device)
            dist.all_reduce(values)
        return values

    def read_ahead(self, files: Sequence[Path]) -> None:
        """`read_into_cache`, in one process of each host."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            read_into_cache(files)

    def disconnect(self) -> None:
        """Wait for all processes, so that none leaves while another still communicates; then close the
        connections."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def exit(self, status: int) -> None:
        """End this process with this exit status."""
        if self.size > 1:
            # While Python shuts down, a thread of the process group may still be alive, and C++ then aborts
            # a finished run. So with several processes, each exits at once.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def attempt(make: Callable[[], T]) -> list[Any]:
    """`make()`'s value and None, or None and its CommandError; an OSError becomes a RunFault."""
    try:
        return [make(), None]
    except CommandError as error:
        return [None, error]
    except OSError as error:
        return [None, RunFault(with_remedy(error))]


def start_processes(wanted: str, timeout_minutes: float) -> World:
    """This process's World, on the `wanted` device, from torchrun's environment variables if they are set.

    Raises InputError if the device is not available, or if the variables can't be meant; RunFault if the
    processes don't find one another.
    """
    rank, local_rank, world_size = read_layout()
    device = choose_device(wanted)
    backend = type_of(device).backend
    if backend is None and world_size > 1:
        raise InputError(f"several processes can't share {device.type.upper()}; use one, or --device cpu")
    if backend == "nccl" and world_size > 1 and not dist.is_nccl_available():
        raise InputError("this PyTorch has no NCCL, which several GPUs need; use one, or --device cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
                "lower --nproc_per_node",
                this_process_only=local_rank == torch.cuda.device_count(),
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    store = None
    if world_size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        with meeting(rank, timeout):
            store = find_store(rank, world_size, timeout)
            # After a restart (`torchrun --max_restarts`), or in a check's next phase, the store still holds
            # the addresses of dead processes, and gloo may wait for them.
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # Each host counts its restarts: docs/recipes.md.
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            if CHECK_PHASE in os.environ:
                store = dist.PrefixStore(os.environ[CHECK_PHASE], store)
            gpu = device if backend == "nccl" else None  # else NCCL's barrier has to guess it
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu
            )
    return World(rank, world_size, device, store)


def find_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store through which `size` processes meet: torchrun's or, without torchrun, one that the process of
    rank 0 holds. Raises RunFault if they don't find one another."""
    with meeting(rank, timeout):
        return next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]


def read_layout() -> tuple[int, int, int]:
    """This process's RANK and LOCAL_RANK, and WORLD_SIZE, as torchrun sets them; 0, 0 and 1 without it.

    Raises InputError, naming the variable, if one is no number, contradicts another, or is missing: variables
    may be left over from another job, or set by hand.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}

    def check(right: bool, fault: str) -> None:
        if not right:
            raise InputError(
                f"environment variables: {fault}; start several processes with torchrun, which sets them "
                f"all; for one process: unset {' '.join(given)}",
                this_process_only=True,
            )

    for name, text in given.items():
        check(text.isdecimal(), f"{name} is {text!r}, not a number")
    size = int(given.get("WORLD_SIZE", 1))
    here = int(given.get("LOCAL_WORLD_SIZE", size))
    rank, local_rank = int(given.get("RANK", 0)), int(given.get("LOCAL_RANK", 0))
    of_size = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in given else "WORLD_SIZE is not set"
    check(rank < size, f"RANK is {rank}, but {of_size}")
    check(here <= size, f"LOCAL_WORLD_SIZE is {here}, but {of_size}")
    check(
        local_rank < here,
        f"LOCAL_RANK is {local_rank}, but "
        + (f"LOCAL_WORLD_SIZE is {here}" if "LOCAL_WORLD_SIZE" in given else of_size),
    )
    if size > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            check(bool(os.environ.get(name)), f"WORLD_SIZE is {size}, but {name} is not set")
        port = os.environ["MASTER_PORT"]
        check(port.isdecimal() and 0 < int(port) < 2**16, f"MASTER_PORT is {port!r}, not a port")
    return rank, local_rank, size


@contextlib.contextmanager
def meeting(rank: int, timeout: timedelta) -> Iterator[None]:
    """Inside, the processes find one another. Turns what can go wrong there into a RunFault. All but the main
    process first wait until something listens at the address: PyTorch's own attempt ends in pages of its log,
    without the reason."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    started = time.monotonic()
    try:
        while rank > 0:
            try:
                socket.create_connection(place, timeout=5).close()
                break
            except socket.gaierror as error:
                raise RunFault(
                    f"MASTER_ADDR is {place[0]!r}, a name that does not resolve ({in_words(error)})",
                    this_process_only=True,
                ) from error
            except OSError as error:
                if time.monotonic() - started > timeout.total_seconds():
                    raise dist.DistError(in_words(error)) from error
                time.sleep(0.2)
        yield
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RunFault(
                f"port {place[1]} (MASTER_PORT) is in use by another program or run; set another one",
                this_process_only=True,
            ) from error
        if not lost_contact(error):
            raise
        raise RunFault(
            f"never connected: of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), not all came to "
            f"{place[0]}:{place[1]} (MASTER_ADDR, MASTER_PORT) within {timeout.total_seconds() / 60:.3g} "
            "minutes (--timeout_minutes); start them all, and see that the network lets them through "
            f"({brief(error)})",
            this_process_only=True,
        ) from error


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is an error of gloo, of NCCL, or of the store through which the processes meet."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextlib.contextmanager
def faults_in_one_line(resumes: bool = False) -> Iterator[None]:
    """Turn a full memory, a GPU's fault, and gloo's or NCCL's errors when another process is lost, into a
    RunFault. What to do then depends on whether the script can resume."""
    again = "continue with --resume" if resumes else "run it again"
    try:
        yield
    except RuntimeError as error:
        said = brief(error)
        if is_out_of_memory(error):
            fault = (
                "out of memory (another program may have taken it); the same command with --resume looks for "
                "a micro-batch that fits now, --micro_batch_size N sets a smaller one; the tokens of every "
                "step stay the same"
            )
            if not resumes:
                fault = "out of memory; --dtype bfloat16 needs less of a GPU, and --device cpu none"
        elif lost_contact(error):
            fault = f"lost contact with another process, which died or was cut off; {again}"
        elif isinstance(error, torch.AcceleratorError) or re.search(GPU_FAULT, str(error)):
            fault = (
                f"the GPU or its driver failed; see what nvidia-smi says, then {again}. If the GPU is a "
                "vGPU, set PYTORCH_ALLOC_CONF=expandable_segments:False first"
            )
        else:
            raise
        raise RunFault(f"{fault} ({said})", this_process_only=True) from error


def leave_terminal() -> None:
    """The terminal is gone: writing to it is an error, and so is writing to `tee`, which has ended with it.
    From now on, what is meant for them goes nowhere. Files stay."""
    with open(os.devnull, "wb") as nowhere:
        for descriptor in (1, 2):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere.fileno(), descriptor)


class Stopped(BaseException):
    """Raised at a safe place to stop, after a signal."""


# Requests to stop: by a person, a closed terminal, a batch system near a limit. Windows has only two of them.
STOP_SIGNALS = [
    number
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if (number := getattr(signal, name, None))
]


class StopSignals:
    """Ends the training loop, a `with` block of this object, after one of STOP_SIGNALS to any process: before
    the next micro-step, batch of an evaluation or token of a sample, in all processes at the same place.
    Weights change only at the end of a step, so they are those of the last finished step.

    Another SIGINT exits at once, as does any signal before the first step, when there is nothing new to save.
    What is ignored at the start, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.in_steps = False  # whether the first step has begun
        self.received = 0  # the signal's number; 0: none
        self.at = 0.0
        self.stopped = False  # whether a signal has ended the block, here or in another process
        self.store: dist.Store | None = None  # where several processes agree
        self.key = ""  # its entry: "go N" when a process has passed the N-th place, "stop N" if none shall
        self.agreed = 0  # places that this process has passed
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.stopped = kind is Stopped
        return self.stopped

    def begin_steps(self, world: World) -> None:
        """Begin the first step in all processes together; from now on, signals wait for a safe place."""
        if not self.in_steps:
            self.store, self.key = world.store, world.from_main(lambda: self.new_entry(world.store))
            self.in_steps = True
            gc.collect()
            gc.freeze()  # objects alive now stay to the end: exempt them from garbage collection

    def new_entry(self, store: "dist.Store | None") -> str:
        """The name of a new entry in the store; it may hold those of earlier attempts."""
        name = f"stop {uuid.uuid4()}"
        if store:
            store.set(name, "go 0")
        return name

    def check(self, all_meet: bool = True) -> None:
        """Raises Stopped after a signal to any process: in all of them, at the same place.

        With `all_meet`, every process calls this, before it communicates. These places are numbered. The
        first process at place N writes "go N + 1" into the store: all will pass it. A process with a signal
        turns "go M", which is as far as any may go so far, into "stop M". Each goes on until it has passed M
        places. In between, where not all meet, a process only looks, and writes after a signal.
        """
        if not self.store:
            if self.received:
                raise Stopped
            return
        here, further = f"go {self.agreed}", f"go {self.agreed + 1}"
        wanted = further if all_meet and not self.received else here
        said = self.store.compare_set(self.key, here, wanted).decode()
        while self.received and said.startswith("go"):
            said = self.store.compare_set(self.key, said, said.replace("go", "stop")).decode()
        if said == f"stop {self.agreed}":
            raise Stopped
        self.agreed += all_meet

    def checked(
        self, on_part: Callable[[int, int], None] = lambda done, total: None
    ) -> Callable[[int, int], None]:
        """`on_part(done, total)` of an evaluation, with a check before each part; at its end, all meet."""

        def check_and_tell(done: int, total: int) -> None:
            self.check(all_meet=done == total)
            on_part(done, total)

        return check_and_tell

    def handle(self, number: int, _frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if not self.in_steps:
            self.print("stopped before the first step, nothing is lost")
            os._exit(128 + number)
        if not self.received:
            self.received, self.at = number, time.monotonic()
            self.print("stopping: the last finished step is saved; Ctrl-C again ends at once")
        # torchrun forwards a Ctrl-C that the terminal has already sent to us: not a second one
        elif number == signal.SIGINT and time.monotonic() - self.at > 0.5:
            self.print("ended at once; --resume continues from the last checkpoint, if there is one")
            os._exit(128 + number)

    def print(self, text: str) -> None:
        if self.is_main:
            with contextlib.suppress(OSError):  # Ctrl-C ends `tee` too
                os.write(2, f"\n{text}\n".encode())  # the signal may have interrupted a print
