"""Convolutions for which oneDNN would write past a buffer get safe arguments."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bqnn.layers import safe_convolutions
from bqnn.layers.bayes import local_reparametrization
from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.layers.safe_convolutions import (
    corrupts_memory,
    guard_backward,
    safe_convolution_backward,
)
from bqnn.quant.fuse import fuse
from bqnn.quant.simulated import prepare
from bqnn.quant.spec import QuantSpec
from tests import narrow_convolutions

ROOT = Path(__file__).resolve().parents[2]
LAST = torch.channels_last


class Calls:
    """Records calls of `convolution_backward`, and the arguments that torch's kernel gets."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.given: list[Any] = []

    def backward(self, original: Callable[..., Any], *arguments: Any) -> Any:
        def kernel(*passed: Any) -> Any:
            self.given.append(passed)
            return original(*passed)

        self.asked.append(arguments)
        return safe_convolution_backward(kernel, *arguments)


def is_dangerous(call: Any) -> bool:
    """Return whether these arguments of `convolution_backward` may corrupt memory."""
    return corrupts_memory(call[2], call[4], call[5], call[9])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()
    guard_backward()
    monkeypatch.setattr(safe_convolutions, "safe_convolution_backward", seen.backward)
    return seen


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_narrow_convolutions_train_right_on_every_kind_of_cpu(isa):
    # glibc then ends a process whose heap was written over; anywhere else these mean nothing.
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    env = {**os.environ, **checks, "ONEDNN_MAX_CPU_ISA": isa}
    if isa == "AVX2":
        env["ATEN_CPU_CAPABILITY"] = "avx2"
    command = [sys.executable, "-m", narrow_convolutions.__name__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trains right") == len(narrow_convolutions.CASES)


def test_importing_bqnn_leaves_torch_as_it_is():
    code = """
import bqnn.methods, bqnn.quant.callback
from bqnn.layers import safe_convolutions
print(safe_convolutions._guard.cache_info().currsize)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr[-2000:]


@pytest.mark.parametrize(("name", "net"), narrow_convolutions.CASES)
def test_no_method_gives_torch_a_dangerous_convolution(name, net, calls):
    model = narrow_convolutions.method(name, net)
    narrow_convolutions.loss(model, *narrow_convolutions.batch()).backward()
    assert calls.given
    assert not any(map(is_dangerous, calls.given))


@pytest.mark.parametrize("net", narrow_convolutions.NETS)
def test_these_networks_are_in_danger(net, calls):
    x, _ = narrow_convolutions.batch()
    net().train()(x).square().sum().backward()
    assert any(map(is_dangerous, calls.asked))


def test_the_simulation_of_a_narrow_network_asks_for_no_dangerous_convolution(calls):
    net = prepare(fuse(narrow_convolutions.narrow_resnet().train()), QuantSpec()).train()
    x, _ = narrow_convolutions.batch()
    net(x.to(memory_format=LAST)).square().sum().backward()
    assert calls.asked
    assert not any(map(is_dangerous, calls.asked))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"channels": 1}, True),
        ({"channels": 15}, True),
        ({"channels": 16}, False),
        ({"stride": (1, 2)}, True),
        ({"stride": (2, 1)}, True),
        ({"stride": (3, 3)}, True),
        ({"stride": (1, 1)}, False),
        ({"kernel": (1, 3)}, False),
        ({"kernel": (3, 3)}, False),
        ({"kernel": (1,), "stride": (2,)}, True),
        ({"groups": 2}, False),
        ({"padding": (0, 1)}, False),
        ({"kernel": (1, 1, 1), "stride": (2, 2, 2)}, False),
        ({"device": "meta"}, False),
    ],
    ids=str,
)
def test_convolutions_that_may_corrupt_memory_are_recognized(changes, expected):
    case: dict[str, Any] = {"channels": 7, "kernel": (1, 1), "stride": (2, 2), "padding": (0, 0)}
    case |= {"groups": 1, "device": "cpu", **changes}
    weight = torch.empty(24, case["channels"], *case["kernel"], device=case["device"])
    assert corrupts_memory(weight, case["stride"], case["padding"], case["groups"]) is expected


def test_networks_of_usual_widths_are_computed_as_torch_does(calls):
    wide = torch.randn(2, 24, 8, 8).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(48, 24, 1, 1, requires_grad=True)
    linear_map(wide, weight, None, Geometry((2, 2), (0, 0), (1, 1), 1)).sum().backward()
    ((*_, stride, _, _, _, _, _, _),) = calls.given
    assert stride == [2, 2]
    assert calls.given == calls.asked


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [(8, 12), (7, 5)])
def test_a_safe_convolution_has_the_outputs_and_gradients_of_an_unsafe_one(stride, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    geometry = Geometry(stride, (0, 0), (1, 1), 1)
    noiseless = torch.full_like(weight, 1e-40)
    outs = [
        F.conv2d(x, weight, bias, stride),
        linear_map(x, weight, bias, geometry),
        local_reparametrization(x, weight, noiseless, bias, geometry),
    ]
    expected, *others = [
        (out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))) for out in outs
    ]
    for tensors in others:
        for tensor, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda x, w, b: F.conv2d(x, w, b, 2),
    "valid": lambda x, w, b: F.conv2d(x, w, b, 2, "valid"),
    "no batch": lambda x, w, b: F.conv2d(x[0], w, b, [1, 2]),
    "padded": lambda x, w, b: F.conv2d(x, w, b, 2, 1),
    "grouped": lambda x, w, b: F.conv2d(torch.cat([x, x], 1), w, b, 2, groups=2),
    "one dimension": lambda x, w, b: F.conv1d(x[..., 0], w[..., 0], b, 2),
    "three dimensions": lambda x, w, b: F.conv3d(x[..., None], w[..., None], b, 2),
    "transposed": lambda x, w, b: F.conv_transpose2d(x, w[:3], b[:3], 2, 0, 1),
    "transposed, one dimension": lambda x, w, b: F.conv_transpose1d(
        x[..., 0], w[:3, :, 0], b[:3], 3, output_padding=2
    ),
    "transposed, padded far": lambda x, w, b: F.conv_transpose2d(
        x, w[:3], b[:3], 2, output_padding=(3, 1), dilation=4
    ),
    "transposed, no batch": lambda x, w, b: F.conv_transpose2d(x[0], w[:3], b[:3], 2),
    "operator": lambda x, w, b: torch.ops.aten.conv2d(x, w, b, [2, 2]),
    "convolution": lambda x, w, b: torch.convolution(
        x, w, b, (2, 1), (0, 0), (1, 1), False, (0, 0), 1
    ),
    "checkpoint": lambda x, w, b: checkpoint(F.conv2d, x, w, b, 2, use_reentrant=False),
    "vmap": lambda x, w, b: torch.func.vmap(lambda row: F.conv2d(row[None], w, b, 2))(x),
    "networks": lambda x, w, b: torch.func.vmap(lambda scale: F.conv2d(x, w * scale, b, 2))(b),
}
DANGEROUS = CALLS.keys() - {"padded", "grouped", "three dimensions"}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_right_and_safe_whatever_the_call(name, calls):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 4), torch.randn(4, 3, 1, 1), torch.randn(4)]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    CALLS[name](*tensors).square().sum().backward()
    assert any(map(is_dangerous, calls.asked)) == (name in DANGEROUS)
    assert calls.given
    assert not any(map(is_dangerous, calls.given))
    assert torch.autograd.gradcheck(CALLS[name], tensors)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for_are_computed(mask, transposed):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 4).double(), torch.randn(3, 3, 1, 1).double()
    geometry = ([2, 2], [0, 0], [1, 1], transposed, [0, 0], 1)
    grad = torch.randn_like(torch.convolution(x, weight, None, *geometry))
    arguments = (grad, x, weight, [3], *geometry, mask)
    kernel = torch.ops.aten.convolution_backward
    expected, seen = kernel(*arguments), safe_convolution_backward(kernel, *arguments)
    for wanted, got, is_wanted in zip(expected, seen, mask, strict=True):
        assert (got is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(got, wanted)


def test_a_gradient_is_differentiated_again():
    guard_backward()
    x = torch.randn(1, 2, 3, 4).double().requires_grad_()
    weight = torch.randn(2, 2, 1, 1).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: F.conv2d(x, w, None, 2).square(), (x, weight))


def test_a_compiled_layer_is_safe(calls):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 1, stride=2)
    x = torch.randn(2, 3, 8, 8)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    calls.asked.clear()
    torch.compile(layer, backend="aot_eager")(x).square().sum().backward()
    assert any(map(is_dangerous, calls.asked))
    assert not any(map(is_dangerous, calls.given))
    torch.testing.assert_close(layer.weight.grad, expected)
