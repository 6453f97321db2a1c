"""The methods pass the contract of methods."""

from functools import partial
from typing import Any

import torch

from bqnn.methods import METHODS
from bqnn.testing import MethodContract
from tests.small_methods import OPTIONS, made


class TestPointwise(MethodContract):
    method = METHODS["pointwise"]
    options = OPTIONS["pointwise"]
    trains_at_random = False


class TestBayesByBackprop(MethodContract):
    method = METHODS["bbb"]
    options = OPTIONS["bbb"]


class TestMCDropout(MethodContract):
    method = METHODS["mcdropout"]
    options = OPTIONS["mcdropout"]


class TestSGHMC(MethodContract):
    method = METHODS["sghmc"]
    options = OPTIONS["sghmc"]


class TestSWAG(MethodContract):
    method = METHODS["swag"]
    options = OPTIONS["swag"]
    trains_at_random = False


class TestLaplace(MethodContract):
    method = METHODS["laplace"]
    options = OPTIONS["laplace"]
    trains_at_random = False


class TestSGHMCWithChains(MethodContract):
    method = partial(made, "sghmc")
    options = OPTIONS["sghmc"] | {"chain_epochs": 1, "num_members": 4}


class TestSGHMCWithCycles(MethodContract):
    method = METHODS["sghmc"]
    options = OPTIONS["sghmc"] | {"cycle_epochs": 2, "exploration": 0.4, "optimize_epochs": 1}


class TestDeepEnsemble(MethodContract):
    method = partial(made, "ensemble")
    options = OPTIONS["ensemble"]
    trains_at_random = False


def test_methods_make_as_many_draws_as_they_say() -> None:
    contracts: list[type[MethodContract]] = [
        *(TestPointwise, TestBayesByBackprop, TestMCDropout, TestSGHMC, TestSWAG, TestLaplace),
        TestDeepEnsemble,
    ]
    counts = [len(_draws(contract())) for contract in contracts]
    assert counts == [1, 20, 20, 2, 20, 20, 3]


def _draws(contract: Any) -> torch.Tensor:
    draws: torch.Tensor = contract.trained().predictive(contract.rows().inputs)
    return draws
