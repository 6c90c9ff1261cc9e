"""
A model divided among the processes (--shard), by PyTorch's fully_shard, known as FSDP2.

Each process keeps a share of weights, gradients and moments. A block's weights are gathered when they are
needed, forward and backward, and given up again; its gradients are averaged and divided. The mathematics is
that of DDP. So a model can be trained that no card holds alone, for the price of communication. Several hosts
of equally many processes have a copy each (known as hybrid sharding, HSDP).
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from support.cli import InputError
from support.machine.device import autocast_to
from support.machine.processes import World

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    # At run time they are imported where they are used: they take most of a second, and few runs need them.
    from train_gpt2 import GPT, GPTConfig, TrainConfig

    from torch.distributed.fsdp import FSDPModule

# Unsharded gradients are kept between micro-steps where they take at most this share of the memory.
UNSHARDED_GRADIENTS = 0.25


def count_shards(config: "TrainConfig", world: World) -> int:
    """The number of processes among which each copy of the model is divided: those of a host if all hosts
    have equally many and more than one, otherwise all; 1 without --shard. Raises InputError where --shard
    can't work."""
    if not config.shard:
        return 1
    if world.size == 1:
        raise InputError("--shard divides the model among several processes: start them with torchrun")
    on_hosts = set(world.from_all(int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    return world.size if len(on_hosts) > 1 or on_hosts == {1} else on_hosts.pop()


def gradient_bytes(model_config: "GPTConfig") -> int:
    """Of all gradients, unsharded, in float32."""
    return 4 * model_config.n_parameters


def are_large(gradients: float, limit: float | None) -> bool:
    """Whether unsharded gradients of so many bytes take too much of the memory, `limit`, to be kept between
    micro-steps."""
    return gradients > UNSHARDED_GRADIENTS * (limit or 0.0)


def weights_on_main_only(shard: bool, world: World) -> contextlib.AbstractContextManager[Any]:
    """A context in which, with --shard, models made by other processes than the main one have no weights."""
    return torch.device("meta") if shard and not world.is_main else contextlib.nullcontext()


class ShardedModel(nn.Module):
    """A divided GPT with the switch that DistributedDataParallel has."""

    def __init__(self, raw_model: "GPT", compiled: bool):
        super().__init__()
        self.raw_model = raw_model
        if compiled:
            # Only what a block computes is compiled, and the loss, not the hooks that gather their weights.
            for block in raw_model.transformer.h:
                block.forward = torch.compile(block.forward, dynamic=False)
            raw_model.loss = torch.compile(raw_model.loss, dynamic=False)  # type: ignore[method-assign]

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.raw_model(idx, targets)

    def set_sync(self, sync: bool) -> None:
        """Whether the backward pass averages the gradients among the processes.

        Without it, each process adds up its own gradients, unsharded, over the micro-steps. Where these would
        take more than UNSHARDED_GRADIENTS of the memory, they are averaged and sharded in every micro-step,
        but only among the processes that share a copy.
        """
        model: Any = self.raw_model
        model.set_requires_gradient_sync(sync or model.gradients_are_large)
        model.set_requires_all_reduce(sync)  # among the copies

    require_backward_grad_sync = property(fset=set_sync)


def divide(unsharded: "GPT", config: "TrainConfig", world: World, dtype: torch.dtype) -> "GPT":
    """The same GPT, divided among the processes.

    Args:
        unsharded: on the host. Only the main process's weights count; every other process gets its shards of
            them, tensor by tensor, so its own may be on the meta device, which has none.
        dtype: of the matrix products. In bfloat16 the blocks' weights travel so, too, on a GPU (a CPU's layer
            norm takes no such mixture); gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model: Any = type(unsharded)(unsharded.config).pad_vocabulary()
    # Several hosts have a copy each: the fast connections within a host carry the weights.
    shards = count_shards(config, world)
    sizes = {"shards": shards} if shards == world.size else {"copies": world.size // shards, "shards": shards}
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():  # new ones have PyTorch's own timeout
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=config.timeout_minutes), group)
    narrow = torch.bfloat16 if dtype == torch.bfloat16 and world.device.type != "cpu" else None
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest, with wte and lm_head, which share their weight, stays gathered from forward to backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # In the backward pass, each gathers the weights of the one before ahead. By default FSDP would take the
    # order of all forward passes since the last step, and processes may have scored unequally many items.
    blocks = list(model.transformer.h)
    for module, before in zip((*blocks, model), (model, *blocks), strict=True):
        module.set_modules_to_backward_prefetch([before])
    model.to_empty(device=world.device)
    limit = world.memory_limit(config.memory_limit_gb)
    model.gradients_are_large = are_large(gradient_bytes(model.config), limit)
    weights = unsharded.state_dict() if world.is_main else {}
    with torch.no_grad(), autocast_to(world.device, dtype):
        for name, parameter in model.named_parameters():
            parameter.copy_(shard_tensor(weights.get(name), parameter))
        # FSDP takes what computes first for the whole, and refuses the rest later: the whole computes first,
        # since a sample or a score, which calls its parts, may come before the first step.
        model(torch.zeros(1, 1, dtype=torch.int64, device=world.device))
        model.reshard()
    return model


def divided_modules(model: nn.Module) -> "list[FSDPModule]":
    """What is gathered, one at a time: the GPT without its blocks, then each block; empty if not divided."""
    return [cast("FSDPModule", module) for module in model.modules() if hasattr(module, "unshard")]


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, a divided model is unsharded in every process, which can use it without the others: to score
    and to sample, where each does something else. It is not compiled there."""
    modules = divided_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with torch.compiler.set_stance("force_eager") if modules else contextlib.nullcontext():
            yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not modules[0], recurse=False)
            module.reshard()


# -----------------------------------------------------------------------------
# tensors, unsharded and sharded


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together if it is sharded; every process has to call it."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, some of the first dimension; of a tensor that is not sharded, all of it."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def processes_with_shards(tensor: torch.Tensor) -> "dist.ProcessGroup | None":
    """The processes that together have the tensor, in the order of its shards; None if it is not sharded."""
    return cast(Any, tensor).device_mesh.get_group("shards") if is_sharded(tensor) else None


def shard_tensor(tensor: torch.Tensor | None, like: Any) -> torch.Tensor:
    """The main process's tensor, sharded as `like` is; the other processes give None."""
    from torch.distributed.tensor import distribute_tensor

    given = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor.detach()
    return distribute_tensor(given, like.device_mesh, like.placements)


def collect(value: Any, keep: bool) -> Any:
    """`to_host` of tensors that are sharded, put together one by one; every process has to call it. Only a
    process with `keep` keeps them; the others get None."""

    def copy(tensor: torch.Tensor) -> torch.Tensor | None:
        whole = full_tensor(tensor.detach())
        return whole.to("cpu", copy=True) if keep else None

    return tree_map_only(torch.Tensor, copy, value)


def shard_states(
    optimizer: torch.optim.Optimizer, states: dict[int, dict[str, torch.Tensor]], world: World
) -> None:
    """Give every process its shards of the optimizer's state, which the main process has as a state
    dictionary has it. Scalars, such as the number of steps, go to all as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scalars = world.from_main(lambda: tree_map_only(torch.Tensor, lambda t: None if t.dim() else t, states))
    for i, state in scalars.items():
        for name, scalar in state.items():
            whole = states[i][name] if world.is_main else None
            optimizer.state[parameters[i]][name] = (
                shard_tensor(whole, parameters[i]) if scalar is None else scalar.to(world.device)
            )
