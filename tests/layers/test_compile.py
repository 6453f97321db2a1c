"""Networks of every method are equal after torch.compile and torch.export."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import JointPosterior, kl_divergence
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout
from tests.layers.networks import (
    BACKENDS,
    COMPILED_METHODS,
    COMPILED_NETS,
    EXPORTED,
    IMAGES,
    NETS,
    NUM_MEMBERS,
    RANDOM,
    TRACES_RANDOM,
    gradients,
    make,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize(("name", "backend"), COMPILED_NETS)
@pytest.mark.parametrize("method", COMPILED_METHODS)
def test_a_compiled_network_learns(method: str, name: str, backend: str) -> None:
    net = make(method, name).train()
    expected = gradients(net, net)
    got = gradients(net, torch.compile(net, backend=backend, fullgraph=True))
    assert len(got) == len(expected) > 0
    if method in RANDOM and (backend == "inductor" or method == "mcdropout"):
        assert all(grad.isfinite().all() and grad.any() for grad in got)  # from other numbers
    else:
        torch.testing.assert_close(got, expected)


@TRACES_RANDOM
@pytest.mark.parametrize("compiles", ["step", "network"])
def test_a_step_with_a_joint_posterior_compiles(compiles: str) -> None:
    net = make("bbb").train()

    def step(run: nn.Module) -> Tensor:
        with JointPosterior(net) as posterior:
            nll = run(IMAGES).square().sum()
        return nll + posterior.kl()

    def gradients_of(step: Callable[[nn.Module], Tensor], run: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(step(run), list(net.parameters())))

    expected = gradients_of(step, net)
    if compiles == "step":
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        got = [gradients_of(compiled, net) for _ in range(2)]
    else:
        run = torch.compile(net, backend="aot_eager", fullgraph=True)
        got = [gradients_of(step, run) for _ in range(2)]
    torch.testing.assert_close(got, [expected, expected])


@TRACES_RANDOM
@pytest.mark.parametrize("wants_gradients", [True, False])
def test_the_kl_compiles_with_and_without_gradients(wants_gradients: bool) -> None:
    net = make("bbb").requires_grad_(wants_gradients)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            compiled = torch.compile(kl_divergence, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(net), kl_divergence(net))


@pytest.mark.parametrize(("name", "backend"), COMPILED_NETS)
@pytest.mark.parametrize("method", COMPILED_METHODS)
def test_a_compiled_network_makes_the_same_draws(method: str, name: str, backend: str) -> None:
    net = make(method, name).eval()
    compiled = torch.compile(net, backend=backend)
    num_samples = NUM_MEMBERS
    expected = predictive(net, IMAGES, num_samples)
    torch.testing.assert_close(predictive(compiled, IMAGES, num_samples), expected)
    with torch.no_grad(), held_draw(net, 1):
        held = [compiled(IMAGES) for _ in range(2)]
    assert torch.equal(held[0], held[1]) == (method != "mcdropout")  # whose masks are per pass


@TRACES_RANDOM
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", RANDOM)
def test_a_compiled_network_left_alone_makes_a_draw_per_call(method: str, context: type) -> None:
    compiled = torch.compile(make(method).eval(), backend="aot_eager", fullgraph=True)
    with context():
        assert not torch.equal(compiled(IMAGES), compiled(IMAGES))


@TRACES_RANDOM
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [1e-300, 1e-9, 1e-6, 0.25, 0.999999])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_dropout_drops_by_its_rate(rate: float, training: bool, backend: str) -> None:
    torch.manual_seed(0)
    num_values = 2**22
    dropout = torch.compile(MCDropout(rate).train(training), backend=backend, fullgraph=True)
    out = dropout(torch.ones(num_values // 64, 64))
    kept = out[out != 0]
    expected = num_values * min(rate, 1 - rate)
    rare = num_values - len(kept) if rate < 0.5 else len(kept)
    assert abs(rare - expected) < 5 * expected**0.5 + 1
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


@pytest.mark.parametrize(("strict", "method"), EXPORTED)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_an_exported_network_is_as_random_as_it_was(
    method: str, name: str, training: bool, strict: bool
) -> None:
    if method == "sghmc" and strict and not training:
        pytest.skip("which member answers is decided outside of a graph; strict=False takes one")
    net = make(method, name).train(training)
    dynamic = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(net, (IMAGES,), strict=strict, dynamic_shapes=dynamic).module()
    outputs = [program(IMAGES) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1]) == (method not in RANDOM)
    assert program(IMAGES[:3]).shape == (3, 3)
    if method == "pointwise":
        torch.testing.assert_close(outputs[0], net(IMAGES))


@pytest.mark.parametrize(
    ("strict", "method"), [case for case in EXPORTED if case.values[1] in RANDOM]
)
def test_export_freezes_no_draw_that_is_held(method: str, strict: bool) -> None:
    net = make(method).eval()
    with torch.no_grad(), held_draw(net, 0):
        program = torch.export.export(net, (IMAGES,), strict=strict).module()
        assert not torch.equal(program(IMAGES), program(IMAGES))


def test_copies_of_a_network_share_no_draw() -> None:
    net = make("bbb").eval()
    with torch.no_grad(), held_draw(net, 0):
        mine = net(IMAGES)
        assert not torch.equal(copy.deepcopy(net)(IMAGES), mine)
