"""Inputs that are not finite raise the same error in float, simulated and int8."""

import copy
import math

import pytest
import torch
from torch import nn

from bqnn.inference.predict import predictive, predictive_sets
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.markers import Enter, Leave
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Enter(), nn.Linear(4, 3), Leave()).eval()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_pixel_gives_the_same_error(bad: float) -> None:
    x = torch.randn(6, 4)
    simulated = calibrate(prepare(fuse(net()), QuantSpec()), [x])
    integer = convert(copy.deepcopy(simulated), "fbgemm")
    x[2, 1] = x[4, 0] = bad
    messages = set()
    for each in (net(), simulated, integer):
        with pytest.raises(ValueError, match=r"^2 of the 6 rows .* first row 2 ") as error:
            predictive(each, x, 1)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_the_set_is_named_and_whole_numbers_pass() -> None:
    good, bad = torch.ones(3, 4), torch.full((2, 4), math.nan)
    with pytest.raises(ValueError, match="2 of the 2 rows of inputs of set 1 contain"):
        predictive_sets(net(), [good, bad], 1)
    refuse_non_finite(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    refuse_non_finite(torch.zeros(0, 4))


def test_calibration_refuses_them() -> None:
    with pytest.raises(ValueError, match="1 of the 2 rows"):
        calibrate(prepare(fuse(net()), QuantSpec()), [torch.tensor([[1.0] * 4, [math.nan] * 4])])
