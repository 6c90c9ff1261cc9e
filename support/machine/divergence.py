"""What happens when the loss or the gradient norm is not finite: no update, and the run stops."""

import math

from support.cli import RunFault
from support.machine.processes import World

import torch
import torch.distributed as dist


def step_if_finite(optimizer: torch.optim.Optimizer, values: torch.Tensor) -> None:
    """Let the optimizer step if all values (loss and gradient norm) are finite.

    The device decides by itself, so the host need not wait for the values: fused optimizers, and Muon, leave
    weights and moments alone where their `found_inf` is 1. Others wait.
    """
    finite = torch.isfinite(values).all()
    if optimizer.defaults["fused"]:
        optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


def check_finite(
    step: int, loss: float, norm: float, own_loss: torch.Tensor, scaler: torch.amp.GradScaler, world: World
) -> None:
    """Raises RunFault, in every process, if a step's loss or gradient norm is not finite.

    float16 gradients overflow occasionally. The scaler, which multiplies the loss to lift small gradients
    into float16's range, then skips the step and halves its scale. Only at a scale of 1 is an overflow a
    fault.

    Args:
        loss: the mean over all processes.
        own_loss: this process's loss, a scalar.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1:
        return
    losses = [own_loss.cpu()]
    if world.size > 1:
        gathered = [torch.zeros_like(own_loss) for _ in range(world.size)]
        dist.all_gather(gathered, own_loss)
        losses = gathered
    what = f"the gradient norm is {norm}, the losses are finite"
    for rank, value in reversed(list(enumerate(losses))):
        if not torch.isfinite(value):
            what = f"the loss of rank {rank} is {value.item()}"
    raise RunFault(
        f"step {step}: {what}; the weights were not updated, and earlier checkpoints are intact. To see if "
        "the precision is to blame, add --resume --dtype float32; if not, a new run needs a lower --max_lr"
    )
