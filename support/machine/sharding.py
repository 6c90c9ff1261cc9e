"""
A model divided among the processes (--shard), by PyTorch's fully_shard, known as FSDP2.

Each process keeps a share of weights, gradients and moments. A block's weights are gathered when they are
needed, forward and backward, and given up again; its gradients are averaged and divided. The mathematics is
that of DDP. So a model can be trained that no card holds alone, for the price of communication. With several
hosts, each has a copy (known as hybrid sharding, HSDP).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from support.cli import InputError, in_words
from support.machine.device import memory_limit
from support.machine.processes import World, all_gather, reduce_scatter

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:  # imported where they are used: they take most of a second, and few runs need them
    from torch.distributed.fsdp import FSDPModule

WHOLE_GRADIENTS = 0.25  # of the memory may be taken by gradients that are not divided yet


def count_shares(shard: bool, optimizer: str, world: World) -> int:
    """Among how many processes each copy of the model is divided: those of a host if all hosts have equally
    many and more than one, otherwise all; 1 without --shard. Raises InputError where --shard can't work."""
    if not shard:
        return 1
    if world.size == 1:
        raise InputError("--shard divides the model among several processes: start them with torchrun")
    if optimizer == "muon":
        raise InputError("--shard with --optimizer muon: Muon needs whole matrices; use --optimizer adamw")
    on_hosts = set(world.from_all(int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    return world.size if len(on_hosts) > 1 or on_hosts == {1} else on_hosts.pop()


@dataclass
class Division:
    """How a model is divided."""

    blocks: list[nn.Module]  # gathered one at a time
    model: nn.Module  # what is not in them is gathered for the whole of a micro-step
    exchange_always: bool  # average gradients in every micro-step, not in a step's last only
    together: "Together"

    @property
    def parts(self) -> "list[FSDPModule]":
        return [cast("FSDPModule", part) for part in (self.model, *self.blocks)]


def division_of(model: object) -> Division | None:
    """How the model is divided; None if it is not."""
    return getattr(model, "division", None)


def divide(
    model: Any,
    weights: dict[str, torch.Tensor] | None,
    world: World,
    shares: int,
    dtype: torch.dtype,
    memory_limit_gb: float | None,
) -> None:
    """Divide a GPT that has no weights yet (it is on the meta device), and give it `weights`.

    Args:
        weights: in the main process, a whole state dictionary on the host; None in the others, which get
            their shares of it tensor by tensor.
        shares: among how many processes; where there are more, each such group has a copy.
        dtype: of the matrix products. In bfloat16 weights travel so, too; gradients are summed in float32.
        memory_limit_gb: as in TrainConfig.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Several hosts have a copy each: the fast connections within a host carry the weights.
    sizes = {"shares": shares} if shares == world.size else {"copies": world.size // shares, "shares": shares}
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    narrow = torch.bfloat16 if dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    blocks = list(model.transformer.h)  # gathered one at a time
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the rest, with wte and lm_head, which share their weight, stays gathered from forward to backward
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("hidden_states", "head"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device=world.device)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    limits = [limit for limit in world.from_all(memory_limit(world.device, memory_limit_gb)) if limit]
    exchange_always = gradients > WHOLE_GRADIENTS * min(limits, default=0.0)
    division = Division(blocks, model, exchange_always, Together())
    object.__setattr__(model, "division", division)  # not a submodule
    for part in division.parts:
        part.set_custom_all_gather(Gather(division.together))  # type: ignore[arg-type]
        part.set_custom_reduce_scatter(Scatter(division.together))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(share_out(weights[name] if weights else None, parameter))


# -----------------------------------------------------------------------------
# tensors, whole and divided


def is_divided(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together if it is divided; every process has to call it."""
    return cast(Any, tensor).full_tensor() if is_divided(tensor) else tensor


def share_out(tensor: torch.Tensor | None, like: Any) -> torch.Tensor:
    """The main process's tensor, divided among the processes as `like` is; the others give None."""
    from torch.distributed.tensor import distribute_tensor

    given = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor.detach()
    return distribute_tensor(given, like.device_mesh, like.placements)


def collect(value: Any, keep: bool) -> Any:
    """A copy in host memory of a tensor, or of all tensors in dictionaries, lists and tuples, put together
    one by one; every process has to call it. Only a process with `keep` keeps it; the others get None."""
    if isinstance(value, torch.Tensor):
        tensor = whole(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: collect(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(collect(item, keep) for item in value)
    return value


def share_out_states(
    optimizer: torch.optim.Optimizer, states: dict[int, dict[str, torch.Tensor]], world: World
) -> None:
    """Give every process its share of the optimizer's state, which the main process has as a state dictionary
    has it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names_of = world.from_main(lambda: [list(states[i]) for i in range(len(parameters))])
    for i, (parameter, names) in enumerate(zip(parameters, names_of, strict=True)):
        for name in names:
            value = states[i][name] if world.is_main else None
            if name == "step":
                step = world.from_main(lambda value=value: value)  # type: ignore[misc]
                optimizer.state[parameter][name] = step.to(world.device)
            else:
                optimizer.state[parameter][name] = share_out(value, parameter)


@contextlib.contextmanager
def gathered(model: object) -> Iterator[None]:
    """Inside, a divided model is whole in every process, which can use it without the others: to score and to
    sample, where each does something else. It is not compiled there."""
    division = division_of(model)
    if division is None:
        yield
        return
    for part in division.parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    with torch.compiler.set_stance("force_eager"):
        yield
    for part in division.parts:
        part.set_reshard_after_forward(part in division.blocks, recurse=False)
        part.reshard()


# -----------------------------------------------------------------------------
# gradients, and communication


def sync_gradients(model: Any, last: bool) -> None:
    """Say, before a micro-step, whether it is the step's last: only then the processes average their
    gradients. DDP reads its flag in the forward pass.

    A divided model keeps whole gradients until then. Where they would take more than WHOLE_GRADIENTS of the
    memory, it averages and divides them in every micro-step, but within a host only.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif division := division_of(model):
        model.set_requires_gradient_sync(last or division.exchange_always)
        model.set_requires_all_reduce(last and division.together.really)  # among the copies


@contextlib.contextmanager
def alone(model: Any) -> Iterator[None]:
    """Inside, this process trains without the others, with meaningless gradients: to find out what fits. An
    exception leaves the model usable.

    Raises:
        InputError: after an exception in a divided model, with a PyTorch that can't mend it.
    """
    division = division_of(model)
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False
    if division is None:
        yield
        return
    division.together.really = False
    try:
        yield
    except Exception as error:
        if not hasattr(model, "reset_iter_state"):  # new in PyTorch 2.13
            reason = in_words(error).splitlines()[0][:150]
            raise InputError(
                f"a trial step failed ({reason}), and PyTorch {torch.__version__} can't go on after that "
                "with --shard: a smaller --micro_batch_size, --no_compile or PyTorch 2.13 may help"
            ) from error
        model.reset_iter_state()
        raise
    finally:
        division.together.really = True
        for part in division.parts:
            part.reshard()  # forget what was not really gathered


@dataclass
class Together:
    """Whether the processes really communicate, or each only takes the memory and time for it."""

    really: bool = True


@dataclass
class Communication:
    """What fully_shard calls to communicate."""

    together: Together

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)


class Gather(Communication):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self.together.really:
            return all_gather(output_tensor, input_tensor, group, async_op)
        output_tensor.view(group.size(), -1).copy_(input_tensor.clone())  # the input lies within the output
        return None


class Scatter(Communication):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self.together.really:
            return reduce_scatter(output_tensor, input_tensor, op, group, async_op)
        output_tensor.zero_()  # nothing that the next real step could inherit
        return None
