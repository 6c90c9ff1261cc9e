"""
A GPU that is not there. Its tensors compute on the CPU, with the same bits, but say that they are on "cuda",
refuse to meet the host's, take a limited memory, and note whatever makes the host wait for them. Processes
exchange them by NCCL's rules, while gloo does the work.

    with pretended_gpu() as gpu:  # torch.cuda.is_available() is true in here
        train_gpt2.main(config)
        assert gpu.waits == []

A program of several processes gets its GPUs by variables: PYTHONPATH=tests/gpus PRETENDED_GPUS=2.

What it can't show: speed, compiled code, CUDA's own kernels and the memory they need, DDP's C++, streams (all
are one here).
"""

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
HOST = torch.device("cpu")
GB = 2**30
NONSENSE = -77  # what a copy holds until it has arrived
# The result of these depends on values, which a GPU has to tell the host.
NEEDS_A_VALUE = {
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten.multinomial.default, aten._unique2.default),
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
HERE = Path(__file__).parent


class Wait(NamedTuple):
    """The host waited for a GPU: for what, and in which line of ours."""

    reason: str
    where: str


class PretendedGPU:
    """This process's GPUs, as a test sees them."""

    def __init__(self, count: int, capability: tuple[int, int], free: float):
        self.count, self.capability, self.free = count, capability, free
        self.card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * GB, major=capability[0],
                                    minor=capability[1], multi_processor_count=132)  # fmt: skip
        self.current = 0  # as in CUDA, the first one until set_device
        self.fraction = 1.0  # of the memory, that this process may take
        self.fractions: list[float] = []  # all that were set
        self.waits: list[Wait] = []
        self.on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host: where, and what
        self.holders: Counter[int] = Counter()  # a storage's address -> how many tensors hold it
        self.sizes: dict[int, int] = {}  # a storage's address -> bytes
        self.allocated = self.peak = 0  # bytes
        self.talks_of_objects = False  # PyTorch itself moves Python objects between host and GPU

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.current)

    def wait(self, reason: str) -> None:
        """The host waits for all that the GPU was given, as it does for a value."""
        self.waits.append(Wait(reason, line_of_ours()))
        self.arrive(list(self.on_the_way))

    def arrive(self, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for arriving, values in copies:
            arriving.copy_(values)
        arrived = {id(arriving) for arriving, _ in copies}
        self.on_the_way = [copy for copy in self.on_the_way if id(copy[0]) not in arrived]

    def index_of(self, told: Any) -> int:
        """The GPU that "cuda", "cuda:1" or a torch.device names."""
        index = torch.device(told).index
        index = self.current if index is None else index
        if index >= self.count:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return index

    def hold(self, tensor: "OnGPU") -> None:
        """Count the memory of a new tensor, until it is gone. Raises OutOfMemoryError."""
        storage = tensor.values.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.sizes:
            room = min(self.fraction * self.card.total_memory, self.free)
            if self.allocated + size > room:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes, {room - self.allocated:.0f} left"
                )
            self.sizes[address] = size
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        tensor.hold = Hold(self, address)


class Hold:
    """A tensor's hold on its memory."""

    def __init__(self, gpu: PretendedGPU, address: int):
        self.gpu, self.address = gpu, address
        gpu.holders[address] += 1

    def __del__(self) -> None:
        self.gpu.holders[self.address] -= 1
        if not self.gpu.holders[self.address]:
            del self.gpu.holders[self.address]
            self.gpu.allocated -= self.gpu.sizes.pop(self.address)


gpu = PretendedGPU(1, (9, 0), 79 * GB)  # `pretended_gpu` replaces it


def line_of_ours() -> str:
    """The innermost line that is neither PyTorch's nor this file's, as train_gpt2.py:700."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or not is_ours(frame.f_code.co_filename)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_ours(filename: str) -> bool:
    return filename.startswith(str(HERE.parent)) and "site-packages" not in filename


# -----------------------------------------------------------------------------
# tensors


class OnGPU(torch.Tensor):
    """A tensor on a GPU. Autograd, which has no GPU here, takes it for one of the CPU's."""

    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, index: int) -> "OnGPU":
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=HOST,
        )  # fmt: skip

    def __init__(self, values: torch.Tensor, index: int):
        self.values, self.index = values, index
        gpu.hold(self)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()  # which FSDP gives back and takes again

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """To the host as well: for C++, the tensor is already there."""
        told = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **told)
        if device is None or device.type == "cuda":
            return super().to(*args, **kwargs)
        return copy_to_host(self.detach().values, dtype, device, non_blocking)

    def cpu(self) -> torch.Tensor:
        return self.to(HOST)

    def __repr__(self) -> str:
        return f"{self.values}, on {self.device}"

    def tolist(self) -> Any:
        gpu.wait("tolist")
        return self.detach().values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values"], self.index

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, torch.Tensor], index: Any, *_: Any) -> "OnGPU":
        return cls(tensors["values"], index)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        tensors = list(tensors_in((args, kwargs.values())))
        places = {t.index for t in tensors if isinstance(t, OnGPU)}
        if name.startswith("c10d."):
            check_by_nccls_rules(tensors)
        else:
            check_by_cudas_rules(function, args, kwargs, tensors)
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device: {function}, {places}")
        if function in NEEDS_A_VALUE:
            gpu.wait(name)
        out = function(*on_cpu(args), **on_cpu(kwargs))
        if name.startswith("c10d."):
            return out
        out = on_gpu(out, *places)
        if function._schema.is_mutable:  # what is changed in place is returned itself
            return return_and_correct_aliasing(function, args, kwargs, out)
        return out


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Iterable) and not isinstance(value, str):
            yield from tensors_in(value)


def changed(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """All tensors changed, in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: changed(change, one) for name, one in value.items()}
    return type(value)([changed(change, one) for one in value]) if type(value) in (tuple, list) else value


def on_cpu(value: Any) -> Any:
    return changed(lambda tensor: tensor.values if isinstance(tensor, OnGPU) else tensor, value)


def on_gpu(value: Any, index: int) -> Any:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if hasattr(tensor, "_local_tensor"):  # a DTensor
            tensor._local_tensor = move(tensor._local_tensor)
        return OnGPU(tensor, index) if type(tensor) is torch.Tensor else tensor

    return changed(move, value)


def check_by_cudas_rules(function, args, kwargs, tensors) -> None:
    """Raises where CUDA would; notes where the host would wait. The host's scalars may meet a GPU's
    tensors, but not take them in."""
    changed_in_place = tensors[:1] if function._schema.name.endswith("_") else []
    of_host = [t for t in tensors if t.dim() and not isinstance(t, OnGPU)]
    of_host += [t for t in changed_in_place if not isinstance(t, OnGPU)]
    if function is aten.copy_.default:
        if any(not isinstance(t, OnGPU) for t in tensors):
            gpu.wait("copy_ between host and GPU")
    elif function in INDEXING:
        indices = list(tensors_in(args[1]))
        others = [t for t in tensors if not any(t is i for i in indices)]
        if any(not isinstance(t, OnGPU) for t in others if t.dim()):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        if any(not isinstance(t, OnGPU) for t in indices):
            gpu.wait("an index on the host")
        if any(t.dtype == torch.bool for t in indices):
            gpu.wait("a mask as index")
    elif of_host:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function}")


def check_by_nccls_rules(tensors) -> None:
    """Those of ProcessGroupNCCL."""
    for tensor in tensors:
        if not isinstance(tensor, OnGPU):
            raise RuntimeError("No backend type associated with device type cpu")
        if tensor.index != gpu.current:
            raise RuntimeError(f"NCCL: a tensor of GPU {tensor.index} in the process of GPU {gpu.current}")
        if not tensor.values.is_contiguous():
            raise ValueError("Tensors must be contiguous")


class Dispatch(TorchDispatchMode):
    """Sees every operation before the tensors do: those that are told a device, copies to a GPU, and
    collectives of the host's tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), str(function)
        if name.startswith("c10d.") and not name.startswith("c10d.barrier") and not gpu.talks_of_objects:
            check_by_nccls_rules(tensors_in((args, kwargs.values())))
        if function is aten._to_copy.default and not hasattr(args[0], "_local_tensor"):  # a DTensor's follow
            return copy(*args, **kwargs)
        if not is_gpu(kwargs.get("device")):
            return function(*args, **kwargs)
        index, kwargs["device"] = gpu.index_of(kwargs["device"]), HOST
        return on_gpu(function(*on_cpu(args), **kwargs), index)


def is_gpu(value: Any) -> bool:
    return str(value).partition(":")[0] == "cuda"


def with_index(value: Any) -> Any:
    """ "cuda" is this process's GPU."""
    return (
        torch.device("cuda", gpu.index_of(value))
        if isinstance(value, str | torch.device) and is_gpu(value)
        else value
    )


def copy(tensor, *, device=None, dtype=None, non_blocking=False, **_):
    """What Tensor.to does if it has to, but for the way to the host."""
    here, values = isinstance(tensor, OnGPU), on_cpu(tensor).to(dtype or tensor.dtype, copy=True)
    if not here and not is_gpu(device):
        return values.to(device)
    index = tensor.index if device is None else gpu.index_of(device)
    if here and index != tensor.index:
        gpu.wait("a copy from one GPU to another")
    elif not here and not (non_blocking and getattr(tensor, "is_pinned_here", False)):
        gpu.wait("a pageable copy to the GPU")
    return OnGPU(values, index)


def copy_to_host(values, dtype, device, non_blocking):
    """Nonsense, until what it waits for has arrived."""
    values = values.to(device, dtype or values.dtype, copy=True)
    if not non_blocking:
        gpu.wait("a copy to the host")
        return values
    arriving = torch.full_like(values, NONSENSE)
    gpu.on_the_way.append((arriving, values))
    return arriving


class GeneratorOnGPU(torch.Generator):
    device = property(lambda self: gpu.device)


class Functions(TorchFunctionMode):
    """Sees what Python calls, for what is lost on the way to an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.device:
            args, kwargs = tuple(map(with_index, args)), {k: with_index(v) for k, v in kwargs.items()}
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if function is F.layer_norm and torch.is_autocast_enabled("cuda"):  # in float32, on a GPU
            args, kwargs = changed(torch.Tensor.float, (args, kwargs))
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and is_gpu(kwargs.get("device")):
            gpu.wait("a pageable copy to the GPU")
            return on_gpu(function(*args, **kwargs | {"device": HOST}), kwargs["device"].index)
        if generator := kwargs.get("generator"):
            told = is_gpu(kwargs.get("device")) or isinstance(args[0], OnGPU)
            if told != isinstance(generator, GeneratorOnGPU):
                raise RuntimeError(f"Expected another device type for generator than {generator.device}")
        return function(*args, **kwargs)


class Event:
    """What is on its way to the host is nonsense until an event behind it has been waited for."""

    def __init__(self, **_: Any):
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self, stream: Any = None) -> None:
        self.before = list(gpu.on_the_way)

    def wait(self, stream: Any = None) -> None:
        """Of a stream, not of the host."""

    def synchronize(self) -> None:
        gpu.waits.append(Wait("event", line_of_ours()))
        gpu.arrive(self.before)


class Stream:
    """All streams are one here: what they are given is done at once."""

    def __init__(self, *_: Any, **__: Any):
        self.device = gpu.device

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def is_capturing(self) -> bool:
        return False  # a CUDA graph

    def synchronize(self) -> None:
        gpu.wait("a stream")


class DDP(torch.nn.Module):
    """Stands for DistributedDataParallel, whose C++ would take the tensors for the CPU's."""

    def __init__(self, module, device_ids, gradient_as_bucket_view):
        super().__init__()
        assert device_ids == [gpu.current]
        assert gradient_as_bucket_view
        self.module, self.require_backward_grad_sync = module, True
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), 0)
            parameter.register_post_accumulate_grad_hook(self.average)

    def forward(self, *args):
        self.exchanges = self.require_backward_grad_sync
        return self.module(*args)

    def average(self, parameter):
        if self.exchanges:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


# -----------------------------------------------------------------------------
# torch.cuda and torch.distributed


def of_one_gpu(answer):
    """A function of torch.cuda that takes a GPU, or none; `answer` is called with its index."""
    return lambda device=None: answer(gpu.current if device is None else index_of(device))


def index_of(device: Any) -> int:
    if isinstance(device, int):
        return device
    assert is_gpu(device), f"torch.cuda is given {device}"
    return gpu.index_of(device)


def set_device(device: Any) -> None:
    gpu.current = index_of(device)


def set_fraction(fraction: float, device: Any = None) -> None:
    assert isinstance(fraction, float)
    assert 0 <= fraction <= 1
    index_of(device)
    gpu.fraction = fraction
    gpu.fractions.append(fraction)


@contextlib.contextmanager
def pretended_gpu(count=1, free=79 * GB, capability=(9, 0), compiles=False):
    """Inside, torch.cuda is available, with `count` GPUs of which `free` bytes are free.

    With `compiles`, what torch.compile needs is there, but it returns the function as it is.
    """
    global gpu
    before, gpu = gpu, PretendedGPU(count, capability, free)
    init, group_tensors = dist.init_process_group, torch.optim.Optimizer._group_tensors_by_device_and_dtype
    enabled, dtype_of, generator = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.Generator
    gather_objects, broadcast_objects = dist.all_gather_object, dist.broadcast_object_list
    autocast, real_ddp = torch.autocast, torch.nn.parallel.DistributedDataParallel
    find_spec = importlib.util.find_spec

    def cpus(device_type: str) -> str:
        return "cpu" if device_type == "cuda" else device_type

    class Generator:  # a class: annotations mention it
        def __new__(cls, device="cpu"):
            return GeneratorOnGPU() if is_gpu(device) else generator()

    class Autocast(autocast):
        def __init__(self, device_type, *args, **options):
            super().__init__(cpus(device_type), *args, **options)

    def init_process_group(backend, *, device_id=None, **options):
        assert backend == "nccl"
        assert device_id == gpu.device, f"NCCL is told {device_id}, the current GPU is {gpu.device}"
        init("gloo", **options)
        from torch.distributed.tensor import DTensor  # takes a second

        place = property(lambda self: self._local_tensor.device)  # C++ says where it takes them to be
        stack.enter_context(mock.patch.object(DTensor, "device", place, create=True))

    @contextlib.contextmanager
    def objects():
        gpu.talks_of_objects = True
        try:
            gpu.wait("Python objects")
            yield
        finally:
            gpu.talks_of_objects = False

    def all_gather_object(values, value, group=None):
        with objects():
            gather_objects(values, value, group)

    def broadcast_object_list(values, src=0, group=None, device=None):
        assert device is None or gpu.index_of(device) == gpu.current
        with objects():
            broadcast_objects(values, src, group)

    def by_device(lists, with_indices=False):
        groups = {}
        for (_, dtype), found in group_tensors(lists, with_indices).items():
            first = next(t for tensors in found[0] for t in tensors if t is not None)
            groups[(first.device, dtype)] = found
        return groups

    changes: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
            "device_count": lambda: gpu.count, "current_device": lambda: gpu.current,
            "set_device": set_device, "empty_cache": lambda: None, "Event": Event, "Stream": Stream,
            "is_current_stream_capturing": lambda: False, "current_stream": lambda device=None: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
            "get_device_name": of_one_gpu(lambda _: gpu.card.name),
            "get_device_properties": of_one_gpu(lambda _: gpu.card),
            "get_device_capability": of_one_gpu(lambda _: gpu.capability),
            "memory_reserved": of_one_gpu(lambda _: gpu.allocated),
            "memory_allocated": of_one_gpu(lambda _: gpu.allocated),
            "max_memory_allocated": of_one_gpu(lambda _: gpu.peak),
            "max_memory_reserved": of_one_gpu(lambda _: gpu.peak),
            "mem_get_info": of_one_gpu(lambda _: (int(gpu.free - gpu.allocated), gpu.card.total_memory)),
            "reset_peak_memory_stats": of_one_gpu(lambda _: setattr(gpu, "peak", gpu.allocated)),
            "set_per_process_memory_fraction": set_fraction,
            "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        },
        torch.accelerator: {
            "current_stream": lambda device=None: Stream(), "current_device_index": lambda: gpu.current,
            "empty_host_cache": lambda: None,
        },
        torch: {
            "Generator": Generator,
            "autocast": Autocast,
            "is_autocast_enabled": lambda device_type="cpu": enabled(cpus(device_type)),
            "get_autocast_dtype": lambda device_type: dtype_of(cpus(device_type)),
        },
        dist: {
            "init_process_group": init_process_group, "is_nccl_available": lambda: True,
            "all_gather_object": all_gather_object,
            "broadcast_object_list": broadcast_object_list,
        },
        functional: {"_maybe_wrap_tensor": functional.wait_tensor},  # a wrapper in C++ would lose the GPU
        torch.nn.utils.clip_grad: {"_group_tensors_by_device_and_dtype": by_device},
        torch.optim.Optimizer: {"_group_tensors_by_device_and_dtype": staticmethod(by_device)},
    }  # fmt: skip
    if compiles:
        changes[torch]["compile"] = lambda function=None, **_: function
        changes[importlib.util] = {"find_spec": lambda name: name == "triton" or find_spec(name)}
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps tied weights tied
    try:
        with contextlib.ExitStack() as stack:
            for where, names in changes.items():
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(where, name, value))
            for module in list(sys.modules.values()):  # PyTorch's own, and those that took it from there
                if vars(module).get("DistributedDataParallel") is real_ddp:
                    stack.enter_context(mock.patch.object(module, "DistributedDataParallel", DDP))
            stack.enter_context(Dispatch())
            stack.enter_context(Functions())
            yield gpu
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        gpu = before
