"""When the loss or the gradient norm is not finite, the run stops."""

import math

from support.cli import RunFault
from support.machine.processes import World

import torch


def check_finite(
    step: int,
    loss: float,
    norm: float,
    scaler: torch.amp.GradScaler,
    world: World,
    *,
    own_loss: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Raises RunFault, in every process, if a step's loss or gradient norm is not finite.

    float16 gradients overflow now and then. The scaler, which multiplies the loss to lift small gradients
    into float16's range, then halves its scale, and the step is skipped. Only at a scale of 1 is an overflow
    a fault.

    Args:
        loss: the mean over all processes.
        own_loss: this process's loss, a scalar.
        dtype: of the matrix products.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1:
        return
    what = f"the gradient norm is {norm}, the losses are finite"
    for rank, value in reversed(list(enumerate(world.from_all(own_loss.item())))):
        if not math.isfinite(value):
            what = f"the loss of rank {rank} is {value}"
    advice = "A new run needs a lower --max_lr"
    if dtype != torch.float32:
        advice = "To see if the precision is to blame, add --resume --dtype float32; if not, a" + advice[1:]
    raise RunFault(
        f"step {step}: {what}; the weights were not updated, and what is saved is intact. {advice}"
    )
