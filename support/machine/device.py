"""What the device can do: precision, attention, compiler, peak rate, copies and memory."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.cli import InputError, brief

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

GB = 2**30  # bytes, as GPU makers count
HEAD_ROOM = 0.07  # share of memory kept free for fragmentation, communication and evaluation


@dataclass(frozen=True)
class DeviceType:
    """A kind of device, and what differs between kinds beyond PyTorch's own names."""

    torch_type: str  # what torch.device calls it
    is_available: Callable[[], bool]
    most_tokens: int  # of a micro-batch: more gains nothing
    backend: str | None  # of torch.distributed; None: one process only
    fused: bool  # whether fused optimizers there skip an update if `found_inf` says so; MPS's ignore it


# The first available one is what --device auto takes. Another kind of device is another row.
DEVICES = {
    "cuda": DeviceType("cuda", lambda: torch.cuda.is_available(), 2**16, "nccl", True),
    "mps": DeviceType("mps", lambda: torch.backends.mps.is_available(), 2**14, None, False),
    "cpu": DeviceType("cpu", lambda: True, 2**12, "gloo", True),
}
if TYPE_CHECKING:
    DeviceName = str
else:
    DeviceName = Literal[("auto", *DEVICES)]  # the values of --device

# Dense bfloat16 (before Ampere: float16) TFLOP/s of the tensor cores with float32 accumulation. Sources:
# NVIDIA's data sheets for data-centre cards; for GeForce, appendix A of the GA102, Ada and RTX Blackwell
# white papers or, for cards they omit, their rule of 512 (Ada) operations per multiprocessor and clock.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "A100": 312, "A40": 149.7, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX A6000": 154.8,
    "V100": 125, "V100 PCIe": 112, "T4": 65,
    "RTX 3070": 40.6, "RTX 3080": 59.5, "RTX 3090": 71,
    "RTX 4070": 58.3, "RTX 4070 SUPER": 71, "RTX 4080": 97.5, "RTX 4090": 165.2,
    "RTX 5070": 61.7, "RTX 5070 Ti": 87.9, "RTX 5080": 112.6, "RTX 5090": 209.5,
}  # fmt: skip

# Of Linux's control groups, version 2 and 1: the line of /proc/self/cgroup that names this process's group,
# where the groups lie, their files of limit and use, and the lines of memory.stat that count the page cache.
CONTROL_GROUPS: tuple[tuple[bytes, str, str, str, bytes], ...] = (
    (rb"^0::/(.*)", "sys/fs/cgroup", "memory.max", "memory.current", rb"^(?:in)?active_file (\d+)"),
    (
        rb"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        rb"^total_(?:in)?active_file (\d+)",
    ),
)


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`, or for "auto" the best available. Raises InputError if there is no such
    device, or if "auto" would mean the CPU of a machine whose NVIDIA GPU is meant."""
    if name == "auto":
        name = next(name for name, kind in DEVICES.items() if kind.is_available())
        if name == "cpu" and nvidia_gpu_is_meant():
            raise InputError(
                f"--device auto: this machine has an NVIDIA GPU, but PyTorch finds none: {why_no_cuda()}; "
                "--device cpu does without it"
            )
    if not DEVICES[name].is_available():
        why = why_no_cuda() if name == "cuda" else f"PyTorch {torch.__version__} finds no such device"
        raise InputError(f"--device {name}: {why}")
    return torch.device(DEVICES[name].torch_type)


def nvidia_gpu_is_meant(root: Path = Path("/")) -> bool:
    """Whether a user of this machine expects an NVIDIA GPU: nvidia-smi, a part of the driver, is on the PATH,
    and it or, where the driver fails, Linux's list of PCI devices has one. The driver's other files are no
    evidence: containers without a GPU see the host's. Neither are several processes: CPUs train so, too."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listed = b""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run([program, "-L"], capture_output=True, timeout=60, check=False).stdout
    vendors = [file.read_bytes().strip() for file in root.glob("sys/bus/pci/devices/*/vendor")]
    return re.search(rb"^GPU \d+:", listed, re.MULTILINE) is not None or b"0x10de" in vendors


def why_no_cuda() -> str:
    """Why PyTorch finds no NVIDIA GPU, and what to do about it."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is a build without CUDA; https://pytorch.org/get-started/locally "
            "has the command for one with it"
        )
    said = ""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError of many kinds
        words = re.search(r"Error \d+: .*", str(error))  # CUDA's own stand behind a long sentence of PyTorch
        said = words[0] if words else brief(error)
    if said.startswith("Error 802"):  # cudaErrorSystemNotReady: a node with NVSwitch, not ready yet
        return f"{said}; start nvidia-fabricmanager, of the driver's version"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "No CUDA GPUs" in said:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or let it name a GPU"
    return f"{said}; see what nvidia-smi says; a newer driver or a restart may help"


def type_of(device: torch.device) -> DeviceType:
    """The row of DEVICES for this device."""
    return next(kind for kind in DEVICES.values() if kind.torch_type == device.type)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def card_name(name: str) -> str | None:
    """The row of PEAK_TFLOPS for the device that torch.cuda calls `name`; None if it is not in the table."""
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    card = re.sub(r"([- ](SXM\d?|PCIe|PCIE|\d+GB|HBM\w+))+$", "", name)
    if card + " PCIe" in PEAK_TFLOPS and "PCIE" in name.upper():
        card += " PCIe"
    return card if card in PEAK_TFLOPS else None


def peak_flops(name: str) -> float | None:
    """The peak FLOP/s of the device that torch.cuda calls `name`; None if it is not in the table."""
    card = card_name(name)
    return PEAK_TFLOPS[card] * 1e12 if card else None


# -----------------------------------------------------------------------------
# speed


def choose_dtype(name: str, device: torch.device, n_embd: int) -> torch.dtype:
    """The dtype of matrix products: `name`, or for "auto" bfloat16 on GPUs that support it (Ampere and
    later), float16 on older GPUs, float32 elsewhere. A CPU uses bfloat16 if it has instructions for it and
    the model is wide enough to gain from them."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = n_embd >= 768 and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products use `dtype`; the weights stay float32 (mixed precision)."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def choose_compile(wanted: bool, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and the reason."""
    if not wanted:
        return False, "off"
    if device.type == "cpu":
        return False, "off: on a CPU it gains nothing"  # benchmarks/training.py, on two cores with AVX2
    if device.type != "cuda":
        return False, "off: only for CUDA"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return False, "off: no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "off: no Python headers (python3-dev)"
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return False, "off: no Triton for this device"
    return True, "on"


def prefer_fast_attention(device: torch.device) -> None:
    """Let F.scaled_dot_product_attention take the fastest kernel for shapes that stay the same.

    On the H100 and B200 that is cuDNN's, 1.7 to 2.3 times as fast as flash attention 2; where cuDNN's is
    enabled, PyTorch takes it first there. Elsewhere flash attention is faster, and PyTorch's first choice.
    """
    data_centre = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    torch.backends.cuda.enable_cudnn_sdp(data_centre)


def varying_shapes() -> contextlib.AbstractContextManager[Any]:
    """A context in which attention does without cuDNN's kernel. cuDNN makes a new plan for every shape, and
    sampling and scoring have hundreds of shapes."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention_name(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The kernel that F.scaled_dot_product_attention takes, as PyTorch calls it."""
    q = torch.zeros((1, 1, 16, head_size), dtype=dtype, device=device)
    try:
        return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower()
    except Exception:  # PyTorch's own function, without promise
        return "PyTorch's choice"


# -----------------------------------------------------------------------------
# copies and memory


def to_device(device: torch.device, *values: torch.Tensor | np.ndarray) -> list[torch.Tensor]:
    """Copy values to the device; to a GPU asynchronously, from pinned memory."""
    tensors = [torch.as_tensor(value) for value in values]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def copy_to_host(values: torch.Tensor) -> Callable[[], list[Any]]:
    """Begin to copy values from the device; returns a function that waits for them. A GPU that is given more
    work in between does it while the host waits."""
    if values.device.type != "cuda":
        return values.tolist
    copy, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> list[Any]:
        arrived.synchronize()
        return copy.tolist()

    return read


def to_host(value: Any) -> Any:
    """A copy in host memory of a tensor, or of all tensors in dictionaries, lists and tuples."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)


def release_pinned_memory(device: torch.device) -> None:
    """Give pinned host memory that is free back to the system. To time its kernels, the compiler may copy the
    largest tensors there, gigabytes in each process, and PyTorch would keep that memory."""
    if device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # PyTorch 2.13 has it
        torch.accelerator.empty_host_cache()


def keep_freed_memory() -> None:
    """Make the C library, glibc, keep freed memory for the next step. By default it returns large tensors to
    the system and requests them again, page by page: a good part of a training step on a CPU."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX, see mallopt(3)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def memory_limit(device: torch.device, limit_gb: float | None) -> float | None:
    """The bytes that this process may use: a GPU's free memory, or its share of most of a computer's or a
    container's; at most `limit_gb`. None if the system does not report it."""
    size: float | None = None
    if device.type == "cuda":
        size = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    elif device.type == "mps":  # of the memory that it shares with the CPU, what Metal recommends
        size = torch.mps.recommended_max_memory()
    elif hasattr(os, "sysconf"):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # they share it
        total = min(
            [
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
                *(limit for limit, _ in group_limits()),
            ]
        )
        size = 0.9 * total / processes
    return min((limit for limit in (size, limit_gb and limit_gb * GB) if limit), default=None)


def free_host_memory(root: Path = Path("/")) -> int:
    """The bytes of host memory that this process can still take; 0 if the system does not report it, as
    Linux does in proc(5)."""
    try:
        (free,) = re.findall(rb"MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_bytes())
    except (OSError, ValueError):
        return 0
    return max(0, min([1024 * int(free), *(limit - used for limit, used in group_limits(root))]))


def group_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """The control groups with a limit that this process is in, those of a container or a batch job: each
    one's limit, and how much is in use, without the page cache, which gives way; bytes."""
    try:
        own_groups = (root / "proc/self/cgroup").read_bytes()
    except OSError:  # not Linux
        return []
    limits = []
    for line, mount, *files, cached in CONTROL_GROUPS:
        for name in re.findall(line, own_groups, re.MULTILINE):
            group = root / mount / os.fsdecode(name)
            for folder in [group, *group.parents]:
                with contextlib.suppress(OSError, ValueError):  # no such folder; "max" is no limit
                    limit, used = (int((folder / file).read_bytes()) for file in files)
                    cache = re.findall(cached, (folder / "memory.stat").read_bytes(), re.MULTILINE)
                    limits.append((limit, used - sum(map(int, cache))))
    return limits


def cap_memory(device: torch.device, limit_gb: float | None) -> None:
    """Let PyTorch take `limit_gb` of a GPU's memory, or all of it; other devices have no such limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = min(total, limit_gb * GB) if limit_gb else total
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)


@contextlib.contextmanager
def head_room(device: torch.device, limit_gb: float | None) -> Iterator[None]:
    """Inside, cap a GPU's memory slightly below its `memory_limit`; then restore all of it, or `limit_gb`."""
    limit = memory_limit(device, limit_gb)
    if limit:
        cap_memory(device, (1 - HEAD_ROOM) * limit / GB)
    try:
        yield
    finally:
        cap_memory(device, limit_gb)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Only CUDA's error has a class of its own, so the message decides."""
    words = ("out of memory", "Invalid buffer size", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
