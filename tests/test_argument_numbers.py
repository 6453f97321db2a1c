"""Constructors refuse invalid numbers in one line with the reason and a remedy."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bqnn.arguments import real_number, whole_number
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.predict import predictive
from bqnn.layers.bayes import BayesLinear, to_bayes
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import DropoutSite
from bqnn.methods import METHODS
from bqnn.optim import SGHMC
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec

ADAM = {"name": "adam", "lr": 1e-3}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), DropoutSite(), nn.Linear(3, 2))


def method(name: str, **options: Any) -> nn.Module:
    given = {"num_train": 10, "seed": 0, "optimizer": ADAM, **options}
    return METHODS[name](net(), Classification(["a", "b"]), **given)


def sampler(**options: Any) -> SGHMC:
    return SGHMC(net().parameters(), **{"num_train": 10, "num_burn_in_steps": 0, **options})


def bbb(**options: Any) -> nn.Module:
    return method("bbb", **{"prior_std": 1.0, "init_rho": -5.0, "beta": 1.0, **options})


def sghmc(**options: Any) -> nn.Module:
    return method("sghmc", **{"burn_in": 0, "collect_every": 1, "num_members": 2, **options})


def override(bits: Any) -> QuantSpec:
    return QuantSpec(overrides=({"layer": "*", "weight_bits": bits},))


# What makes something of a number, and what the number is called.
REALS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "MCDropout": ("rate", MCDropout),
    "to_mcdropout": ("rate", lambda value: to_mcdropout(net(), value)),
    "prior_std": ("prior_std", lambda value: to_bayes(net(), value, -5.0)),
    "init_rho": ("init_rho", lambda value: to_bayes(net(), 1.0, value)),
    "beta": ("beta", lambda value: bbb(beta=value)),
    "init_delta": ("init_delta", lambda value: bbb(init_delta=value)),
    "target_mean": ("target_mean", lambda value: Regression(value, 1.0)),
    "target_std": ("target_std", lambda value: Regression(0.0, value)),
    "noise_range": ("noise_range", lambda value: QuantSpec(noise_range=value)),
    "lr": ("lr", lambda value: sampler(lr=value)),
    "lr of a group": (
        "lr",
        lambda value: SGHMC(
            [{"params": list(net().parameters()), "lr": value}], num_train=1, num_burn_in_steps=0
        ),
    ),
    "friction": ("friction", lambda value: sampler(friction=value)),
    "temperature": ("temperature", lambda value: sampler(temperature=value)),
    "prior_shape": ("prior_shape", lambda value: sampler(prior_shape=value)),
    "prior_rate": ("prior_rate", lambda value: sampler(prior_rate=value)),
}
WHOLES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_members": ("num_members", lambda value: Ensemble(net(), value)),
    "weight_bits": ("weight_bits", lambda value: QuantSpec(weight_bits=value)),
    "activation_bits": ("activation_bits", lambda value: QuantSpec(activation_bits=value)),
    "noise_bits": ("noise_bits", lambda value: QuantSpec(noise_bits=value)),
    "overrides": ("weight_bits", override),
    "freeze_epochs": (
        "freeze_epochs",
        lambda value: QuantizationCallback(QuantSpec(), freeze_epochs=value),
    ),
    "num_train": ("num_train", lambda value: sampler(num_train=value)),
    "burn-in": ("num_burn_in_steps", lambda value: sampler(num_burn_in_steps=value)),
    "resample_momentum": ("resample_momentum", lambda value: sampler(resample_momentum=value)),
    "resample_prior": ("resample_prior", lambda value: sampler(resample_prior=value)),
    "num_samples": ("num_samples", lambda value: method("pointwise", num_samples=value)),
    "val_samples": ("val_samples", lambda value: method("pointwise", val_samples=value)),
    "rows": ("num_train", lambda value: method("pointwise", num_train=value)),
    "seed": ("seed", lambda value: method("pointwise", seed=value)),
    "warmup_epochs": ("warmup_epochs", lambda value: bbb(warmup_epochs=value)),
    "burn_in": ("burn_in", lambda value: sghmc(burn_in=value)),
    "collect_every": ("collect_every", lambda value: sghmc(collect_every=value)),
    "draws": ("num_samples", lambda value: predictive(net().eval(), torch.ones(1, 2), value)),
}
NO_NUMBERS: list[object] = [
    "0.1",
    "5",
    None,
    True,
    False,
    [0.1],
    {},
    1j,
    b"1",
    torch.tensor(0.5),
    np.bool_(True),
]
OUT_OF_RANGE = [math.nan, math.inf, -math.inf, 10**400, -(10**400), np.float64("nan")]


def said(error: pytest.ExceptionInfo[Exception], name: str, kind: str) -> None:
    message = str(error.value)
    assert message.startswith(f"{name}=")
    assert kind in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("value", "make"),
    [
        (value, make)
        for value in NO_NUMBERS
        for make in REALS | WHOLES
        if (value, make) != (None, "to_mcdropout")  # the network's own rates
    ],
    ids=repr,
)
def test_other_values_than_numbers_are_refused(value, make):
    name, call = (REALS | WHOLES)[make]
    with pytest.raises(TypeError) as error:
        call(value)
    said(error, name, "is not a ")


@pytest.mark.parametrize("make", REALS)
@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=repr)
def test_numbers_that_no_float_can_hold_are_refused(make, value):
    name, call = REALS[make]
    with pytest.raises(ValueError, match=": ") as error:
        call(value)
    said(error, name, "")


@pytest.mark.parametrize("make", WHOLES)
@pytest.mark.parametrize("value", [4.0, 4.5, math.nan, math.inf, np.float32(4), Fraction(9, 2)])
def test_counts_are_whole_numbers(make, value):
    name, call = WHOLES[make]
    with pytest.raises(TypeError) as error:
        call(value)
    said(error, name, "is not a whole number")


@pytest.mark.parametrize("make", WHOLES)
def test_counts_are_not_negative(make):
    name, call = WHOLES[make]
    with pytest.raises(ValueError, match="=-1: ") as error:
        call(-1)
    said(error, name, "")


def test_numbers_of_numpy_are_numbers():
    assert MCDropout(np.float32(0.25)).rate == 0.25
    assert QuantSpec(weight_bits=np.int64(4)).to_dict() == QuantSpec(weight_bits=4).to_dict()
    assert type(QuantSpec(weight_bits=np.int64(4)).weight_bits) is int
    assert Ensemble(net(), np.int8(3)).num_members == 3
    layer = nn.Linear(2, 2)
    assert BayesLinear.like(layer, prior_std=np.float64(2), init_rho=np.int64(-5)).prior_std == 2.0


def test_numbers_come_back_in_pythons_types():
    for value in (1, 1.0, np.float16(1), np.int8(1), Fraction(1)):
        assert type(real_number("a", value, "why")) is float
    assert type(whole_number("a", np.uint8(200), "why", 0)) is int
    with pytest.raises(ValueError, match=r"^a=200: why$"):
        whole_number("a", np.uint8(200), "why", 0, 100)


def test_a_configuration_with_a_wrong_kind_is_a_value_error():
    with pytest.raises(ValueError, match=r"^weight_bits='8' is not a whole number: "):
        QuantSpec.from_dict({"weight_bits": "8"})
