"""Weights in the layout that a CPU's matrix library prefers, for the few rows of sampling and scoring."""

import copy
from timeit import timeit
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with its weight in the layout that oneDNN, PyTorch's CPU matrix library, prefers.

    On some processors it is several times as fast for the one or eight rows of a decoding step, on others it
    is slower; for training's thousands of rows it gains nothing. See `packing_pays`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", scalars=[], algorithm="")


def pack_for_cpu(module: Module, names: tuple[str, ...] = ("c_attn", "c_proj", "c_fc", "lm_head")) -> Module:
    """The same function, with PackedLinear for the linear layers of these names. Everything else is shared
    with the module, which stays as it is."""
    twin = copy.copy(module)
    twin._modules = {
        name: PackedLinear(child)
        if name in names and isinstance(child, nn.Linear)
        else child and pack_for_cpu(child, names)
        for name, child in module._modules.items()
    }
    return twin


def packing_pays(linear: nn.Linear, rows: int, times: int) -> bool:
    """Whether packing this layer takes less time than it saves: it will read `rows` rows `times` times.

    A trial decides, in milliseconds. Only float32 on a CPU can be packed.
    """
    on_cpu = linear.weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    can_pack = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (on_cpu and can_pack and linear.weight.dtype == torch.float32):
        return False
    x = torch.ones(rows, linear.in_features)
    packed = PackedLinear(linear)
    seconds_to_pack = timeit(lambda: PackedLinear(linear), number=1)
    plain = packed_too = float("inf")
    for _ in range(5):  # They take turns, so that a busy machine treats both alike.
        plain = min(plain, timeit(lambda: linear(x), number=1))
        packed_too = min(packed_too, timeit(lambda: packed(x), number=1))
    return (plain - packed_too) * times > seconds_to_pack
