"""Convolutions in whose backward pass oneDNN writes past a buffer are not left to it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import narrow_convolutions
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.bayes import local_reparametrization
from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.layers.safe_convolutions import SafeConvolutions, corrupts_memory, has_narrow_kernels
from bqnn.nets import LeNet, ResNet
from bqnn.quant.fuse import fuse
from bqnn.quant.simulated import prepare
from bqnn.quant.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
LAST = torch.channels_last


def dangerous(out: Tensor) -> list[Any]:
    """The convolutions in the graph that ends in `out` whose gradient may corrupt memory."""
    return [
        case for case in recorded(out) if corrupts_memory(case[0], *map(tuple, case[1:3]), case[3])
    ]


def recorded(out: Tensor) -> Iterator[tuple[Tensor, Any, Any, int]]:
    """Weight, stride, padding and groups of each convolution that torch has recorded."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "ConvolutionBackward0":
            saved = node._saved_weight, node._saved_stride, node._saved_padding
            yield *saved, node._saved_groups
        waiting += [following for following, _ in node.next_functions]


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_narrow_convolutions_train_right_on_every_kind_of_cpu(isa):
    # glibc then ends a process whose heap was written over; anywhere else these mean nothing.
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    env = {**os.environ, **checks, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-m", f"tests.{narrow_convolutions.__name__}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trains right") == len(narrow_convolutions.CASES)


@pytest.mark.parametrize(("name", "net"), narrow_convolutions.CASES)
def test_no_method_records_a_dangerous_convolution(name, net):
    model = narrow_convolutions.method(name, net)
    assert not dangerous(narrow_convolutions.loss(model, *narrow_convolutions.batch()))


@pytest.mark.parametrize("net", narrow_convolutions.NETS)
def test_without_the_mode_these_networks_are_in_danger(net):
    x, _ = narrow_convolutions.batch()
    assert dangerous(net().train()(x))


def test_the_simulation_of_a_narrow_network_records_no_dangerous_convolution():
    net = prepare(fuse(narrow_convolutions.narrow_resnet().train()), QuantSpec()).train()
    x, _ = narrow_convolutions.batch()
    assert not dangerous(net(x.to(memory_format=LAST)))


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
def test_what_may_corrupt_memory(changes, expected):
    case: dict[str, Any] = {"channels": 7, "kernel": (1, 1), "stride": (2, 2), "padding": (0, 0)}
    case |= {"groups": 1, "device": "cpu", **changes}
    weight = torch.empty(24, case["channels"], *case["kernel"], device=case["device"])
    assert corrupts_memory(weight, case["stride"], case["padding"], case["groups"]) is expected


def test_networks_of_usual_widths_are_computed_as_torch_does():
    for net in (ResNet([3, 32, 32], [10], width=24), LeNet([1, 28, 28], [10])):
        assert not has_narrow_kernels(net)
    wide = torch.randn(2, 24, 8, 8).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(48, 24, 1, 1, requires_grad=True)
    out = linear_map(wide, weight, None, Geometry((2, 2), (0, 0), (1, 1), 1))
    assert [tuple(stride) for _, stride, _, _ in recorded(out)] == [(2, 2)]


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
    "by keyword": lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, stride=2),
    "valid": lambda x, w, b: F.conv2d(x, w, b, 2, "valid"),
    "same": lambda x, w, b: F.conv2d(x, w, b, 1, "same"),
    "padded": lambda x, w, b: F.conv2d(x, w, b, 2, 1),
    "no batch": lambda x, w, b: F.conv2d(x[0], w, b, [1, 2]),
    "grouped": lambda x, w, b: F.conv2d(torch.cat([x, x], 1), w, b, 2, groups=2),
    "one dimension": lambda x, w, b: F.conv1d(x[..., 0], w[..., 0], b, 2),
    "three dimensions": lambda x, w, b: F.conv3d(x[..., None], w[..., None], b, 2),
    "transposed": lambda x, w, b: F.conv_transpose2d(x, w[:3], b[:3], 2, 0, 1),
    "transposed by keyword": lambda x, w, b: F.conv_transpose2d(
        x[:, :2], weight=w[:2], stride=2, output_padding=(1, 0)
    ),
    "transposed, no batch": lambda x, w, b: F.conv_transpose2d(x[0], w[:3], b[:3], 2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_mode_computes_what_torch_does_whatever_the_call(call):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 6, 6), torch.randn(4, 3, 1, 1), torch.randn(4)]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    results = []
    for context in (nullcontext(), SafeConvolutions()):
        with context:
            out = call(*tensors)
        assert not dangerous(out) or not results
        gradients = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
        results.append([out, *(gradient for gradient in gradients if gradient is not None)])
    for expected, seen in zip(*results, strict=True):
        torch.testing.assert_close(seen, expected)


def test_a_compiled_layer_computes_the_same_in_the_mode():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 1, stride=2)
    x = torch.randn(2, 3, 8, 8)
    with SafeConvolutions():
        out = torch.compile(layer, backend="eager")(x)
    torch.testing.assert_close(out, layer(x))
