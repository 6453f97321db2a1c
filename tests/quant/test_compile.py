"""Simulated and int8 networks of every method after torch.compile and torch.export."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.predict import predictive
from bqnn.layers.draws import held_draw
from bqnn.quant.engines import engine
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import SimulatedLayer, calibrate, freeze, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from tests.layers.networks import (
    COMPILED_METHODS,
    COMPILED_NETS,
    EXPORTED,
    IMAGES,
    NETS,
    NUM_MEMBERS,
    RANDOM,
    gradients,
    make,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")
INTEGER_METHODS = [(method, "lenet") for method in COMPILED_METHODS[:3]]


def simulated(method: str, name: str = "lenet") -> nn.Module:
    return calibrate(prepare(fuse(make(method, name).eval()), QuantSpec()), [IMAGES]).eval()


def assert_equal_but_for_ties(found: Tensor, expected: Tensor, net: nn.Module) -> None:
    """Floats of a trace and exact sums can round to different sides of a tie."""
    step = max(float(m.output_quant.scale) for m in net.modules() if isinstance(m, SimulatedLayer))
    differences = (found - expected).abs()
    assert (differences > 1e-5).float().mean() < 0.1
    assert differences.max() < 4.5 * step


@pytest.mark.parametrize(("name", "backend"), COMPILED_NETS)
@pytest.mark.parametrize("method", COMPILED_METHODS)
def test_a_compiled_simulation_makes_the_same_draws(method: str, name: str, backend: str) -> None:
    net = simulated(method, name)
    compiled = torch.compile(net, backend=backend)
    expected = predictive(net, IMAGES, NUM_MEMBERS)
    assert_equal_but_for_ties(predictive(compiled, IMAGES, NUM_MEMBERS), expected, net)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", COMPILED_METHODS[:3])
def test_a_simulation_is_one_graph(method: str, context: type) -> None:
    net = simulated(method)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with context():
        outputs = [compiled(IMAGES) for _ in range(2)]
    assert torch.equal(*outputs) == (method not in RANDOM)


@pytest.mark.parametrize("are_frozen", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", COMPILED_METHODS)
def test_a_compiled_simulation_learns(method: str, are_frozen: bool) -> None:
    net = simulated(method, "mlp").train()
    freeze(net, are_frozen)
    same = copy.deepcopy(net)
    expected = gradients(net, net)
    # The search for ranges depends on data, which no graph holds.
    got = gradients(same, torch.compile(same, backend="aot_eager", fullgraph=are_frozen))
    assert len(got) == len(expected) > 0
    if method == "mcdropout":
        assert all(grad.isfinite().all() and grad.any() for grad in got)  # from other masks
    else:
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(list(same.buffers()), list(net.buffers()))


@pytest.mark.parametrize(("strict", "method"), EXPORTED)
@pytest.mark.parametrize("name", NETS)
def test_an_exported_simulation_is_as_random_as_it_was(
    method: str, name: str, strict: bool
) -> None:
    if method == "sghmc" and strict:
        pytest.skip("which member answers is decided outside of a graph; strict=False takes one")
    net = simulated(method, name)
    dynamic = ({0: torch.export.Dim("rows")},)
    with torch.no_grad(), held_draw(net, 0):
        expected = net(IMAGES)
        program = torch.export.export(net, (IMAGES,), strict=strict, dynamic_shapes=dynamic)
        outputs = [program.module()(IMAGES) for _ in range(2)]
        assert program.module()(IMAGES[:3]).shape == (3, 3)
    assert torch.equal(*outputs) == (method not in RANDOM)
    if method not in RANDOM:
        assert_equal_but_for_ties(outputs[0], expected, net)


def test_a_part_of_a_simulation_is_not_compiled() -> None:
    net = simulated("pointwise")
    layer = next(m for m in net.modules() if isinstance(m, SimulatedLayer))
    layer.forward = torch.compile(layer.forward, backend="eager")  # type: ignore[method-assign]
    with torch.no_grad(), pytest.raises(Exception, match="nor a part of a simulated one"):
        net(IMAGES)


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize(("method", "name"), [("pointwise", "resnet"), *INTEGER_METHODS])
def test_integer_networks_compile_and_refuse_to_be_exported(
    method: str, name: str, engine_name: str
) -> None:
    if engine(engine_name).missing() is not None:
        pytest.skip(f"engine={engine_name}: {engine(engine_name).missing()}")
    spec = QuantSpec(engine=engine_name)
    net = convert(calibrate(prepare(fuse(make(method, name)), spec), [IMAGES]))
    compiled = torch.compile(net, backend="aot_eager")
    assert torch.equal(predictive(compiled, IMAGES, 3), predictive(net, IMAGES, 3))
    with pytest.raises(TypeError, match="an int8 network cannot be traced"):
        torch.export.export(net, (IMAGES,), strict=False)
