"""When a step must not update the weights."""

import math

from conftest import CPU
from support.cli import RunFault
from support.machine.divergence import check_finite

import pytest
import torch


def check(loss, norm, scale=None):
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    if scale is not None:
        scaler.scale(torch.ones(()))  # the scale exists once it has been used
    check_finite(7, loss, norm, scaler, CPU, own_loss=torch.tensor(loss))


def test_a_finite_step_passes():
    check(2.5, 0.7)
    check(2.5, 0.7, scale=65536.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [None, 1.0, 65536.0])
def test_a_broken_loss_is_a_fault_whatever_the_scale(loss, scale):
    with pytest.raises(RunFault, match=f"step 7: the loss of rank 0 is {loss}; the weights were not updated"):
        check(loss, math.nan, scale)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_scaler_copes_with_an_overflow_until_its_scale_is_1(norm):
    check(2.5, norm, scale=65536.0)
    check(2.5, norm, scale=2.0)
    for scale in (1.0, None):
        with pytest.raises(RunFault, match=f"step 7: the gradient norm is {norm}, the losses are finite"):
            check(2.5, norm, scale)
