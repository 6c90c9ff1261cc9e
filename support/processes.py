"""The processes of a run: which of how many this is; how they start, meet, stop and end."""

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from support.cli import CommandError, InputError, RunFault
from support.device import choose_device, is_out_of_memory, set_up_for_training

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them: its rank, how many there are, the device it has."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0  # the one that talks, samples and saves for all

    @property
    def collective_device(self) -> torch.device:
        """Where tensors that travel between processes live: NCCL wants the GPU, gloo the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make()` returns in the main process, in every process; or its CommandError, raised in every
        process."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except CommandError as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, device=self.collective_device)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def from_all(self, value: T) -> list[T]:
        """Every process's `value`, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_same(self, **settings: object) -> None:
        """Raises InputError unless every process came to the same settings."""
        for name, value in settings.items():
            values = self.from_all(value)
            if len(set(values)) > 1:
                raise InputError(f"the processes differ in {name}: {', '.join(map(str, values))}")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every process's `values`, in every process; gloo has no average."""
        if self.size > 1:
            values = values.to(self.collective_device)
            dist.all_reduce(values)
        return values

    def disconnect(self) -> None:
        """Wait until all processes are here, so that nobody leaves while another still talks; then close the
        connections."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def exit(self, status: int) -> None:
        """End this process with this exit status."""
        if self.size == 1:
            if status:
                sys.exit(status)
            return
        # While Python takes itself apart, a thread of the process group may still live, and C++ then aborts a
        # run that is finished. So one of several processes leaves at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_processes(wanted: str, timeout_minutes: float) -> World:
    """The world of this process, on the device that is wanted, from torchrun's environment variables if
    there are any.

    Raises InputError when the device asked for is not there.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = choose_device(wanted)
    if device.type == "mps" and world_size > 1:
        raise InputError("several processes can't share MPS; use one, or --device cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
                "lower --nproc_per_node",
                this_process_only=local_rank == torch.cuda.device_count(),
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    set_up_for_training(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # After `torchrun --max_restarts` the store still holds the addresses of the processes that died,
            # and gloo may wait for them. (Several hosts count restarts each for itself: see the README.)
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return World(rank, world_size, device)


@contextlib.contextmanager
def faults_in_one_line() -> Iterator[None]:
    """Turns what gloo or NCCL say when another process is gone, and a full memory, into a RunFault."""
    try:
        yield
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [""])[0]
        if is_out_of_memory(error):
            raise RunFault(
                "out of memory, which another program may have taken; the same command with --resume finds "
                "the micro-batch that fits now, --micro_batch_size N sets one; the tokens of every step stay "
                f"the same ({first_line[:150]})",
                this_process_only=True,
            ) from error
        if not isinstance(error, dist.DistError) and "gloo" not in first_line.lower():
            raise
        raise RunFault(
            "lost contact with another process, which died or was cut off; go on with --resume "
            f"({first_line[:150]})",
            this_process_only=True,
        ) from error


class StopSignals:
    """SIGTERM and SIGINT wait until the step is finished and saved. A SIGINT after that ends at once, and so
    does any signal before the first step, when there is nothing new to save."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.in_steps = False  # whether the first step has begun
        self.received = 0  # the signal's number
        self.at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def begin_steps(self, world: World) -> None:
        """All processes begin the first step together; from here on a signal waits for the end of a step."""
        if not self.in_steps:
            world.from_all(None)
            self.in_steps = True
            gc.collect()
            gc.freeze()  # what lives now lives to the end: the garbage collector need not look at it again

    def handle(self, number: int, _frame: Any) -> None:
        if not self.in_steps:
            self.print("stopped before the first step, nothing is lost")
            os._exit(128 + number)
        if not self.received:
            self.received, self.at = number, time.monotonic()
            self.print("stopping when this step is finished and saved; Ctrl-C again ends at once")
        # torchrun passes Ctrl-C on to processes that the terminal has told already: not a second one
        elif number == signal.SIGINT and time.monotonic() - self.at > 0.5:
            self.print("ended at once; --resume goes on from the last checkpoint, if there is one")
            os._exit(128 + number)

    def print(self, text: str) -> None:
        if self.is_main:
            os.write(2, f"\n{text}\n".encode())  # Python's print may be interrupted in its own middle
