"""When a step must not update the weights."""

import math

from conftest import CPU
from support.cli import RunFault
from support.machine.divergence import check_finite

import pytest
import torch


def check(loss, norm, scale=None, dtype=torch.bfloat16):
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    if scale is not None:
        scaler.scale(torch.ones(()))  # the scale exists once it has been used
    check_finite(7, loss, norm, scaler, CPU, own_loss=torch.tensor(loss), dtype=dtype)


def test_a_finite_step_passes():
    check(2.5, 0.7)
    check(2.5, 0.7, scale=65536.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [None, 1.0, 65536.0])
def test_a_broken_loss_is_a_fault_whatever_the_scale(loss, scale):
    with pytest.raises(RunFault, match=f"step 7: the loss of rank 0 is {loss}; the weights were not updated"):
        check(loss, math.nan, scale)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "add --resume --dtype float32; if not, a new run needs a lower --max_lr"),
        (torch.float32, r"what is saved is intact\. A new run needs a lower --max_lr"),
    ],
)
def test_the_advice_is_not_what_was_done(dtype, advice):
    with pytest.raises(RunFault, match=f"{advice}$"):
        check(math.nan, math.nan, dtype=dtype)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_scaler_copes_with_an_overflow_until_its_scale_is_1(norm):
    check(2.5, norm, scale=65536.0)
    check(2.5, norm, scale=2.0)
    for scale in (1.0, None):
        with pytest.raises(RunFault, match=f"step 7: the gradient norm is {norm}, the losses are finite"):
            check(2.5, norm, scale)
