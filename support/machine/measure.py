"""What a machine is and can do: its devices, the links between them, its memory, the disk of a run."""

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from support.files import make_folder, try_to_save
from support.machine import device as devices
from support.machine.processes import World

import torch
import torch.distributed as dist

DISK_BYTES = 2**28  # written to measure a disk
# All-reduced to measure links; on GPUs, as much as the gradients of GPT-2 (124M) in float32.
GRADIENT_BYTES = {"cuda": 4 * 124_439_808, "cpu": 2**26}


def measure_machine(world: World, log_dir: Path, folder: Path) -> dict[str, Any]:
    """All that this file measures, as plain values in bytes and bytes/s. Makes `folder`, inside `log_dir`.

    Raises InputError, in every process, where no checkpoint can be saved.
    """
    disk = world.from_main(lambda: measure_disk(log_dir, folder))
    return {"processes": world.from_all(describe_device(world)), "links": measure_links(world), **disk}


def describe_device(world: World) -> dict[str, Any]:
    """This process's device and free host memory; of a GPU, also the driver, its memory and how much
    of it is in use, and how many GPUs of the host have no process."""
    found: dict[str, Any] = {
        "device": devices.device_name(world.device),
        "host_memory": devices.free_host_memory(),
    }
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        found |= {
            "driver": driver_version(),
            "memory": total,
            "used": total - free,
            "idle": torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
        }
    return found


def driver_version() -> str:
    """The NVIDIA driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return said.split("\n")[0].strip()
    return "unknown"


def measure_links(world: World) -> float | None:
    """The bus bandwidth of an all-reduce in bytes/s, as nccl-tests define it: 2 (n - 1) / n times the
    tensor's bytes, a second. Median of five; None for one process."""
    if world.size == 1:
        return None
    n_bytes = GRADIENT_BYTES[world.collective_device.type]
    gradients = torch.zeros(n_bytes // 4, device=world.collective_device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        dist.all_reduce(gradients)
        gradients[0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    typical = statistics.median(seconds[1:])  # the first one connects
    return 2 * (world.size - 1) / world.size * n_bytes / typical


def measure_disk(log_dir: Path, folder: Path) -> dict[str, float]:
    """Make `folder`, inside `log_dir`. Returns the disk's free bytes, and the bytes/s of writing and flushing
    a file. Raises InputError where no checkpoint can be saved."""
    make_folder(log_dir, "--log_dir")
    try_to_save(log_dir, "--log_dir")
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    block = os.urandom(2**22)  # some file systems compress zeros
    n_blocks = min(DISK_BYTES, free // 4) // len(block)
    file, started = folder / "disk", time.perf_counter()
    with open(file, "wb") as opened:
        for _ in range(n_blocks):
            opened.write(block)
        opened.flush()
        os.fsync(opened.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return {"disk_free": free, "disk_speed": n_blocks * len(block) / seconds}
