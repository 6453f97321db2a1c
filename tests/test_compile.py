"""torch.compile and torch.export: what they make of a network of any method is that network."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import JointPosterior, kl_divergence, to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import LeNet
from bqnn.predict import predictive

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
RANDOM = ("bbb", "mcdropout")
NUM_MEMBERS = 10  # more than torch compiles one function for
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),  # compiles C++ for a minute
]
PICTURES = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def make(method: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = LeNet([1, 8, 8], [3], channels=[4, 6], hidden_features=16)
    if method == "bbb":
        return to_bayes(net, prior_std=1.0, init_rho=-3.0)
    if method == "mcdropout":
        return to_mcdropout(net, rate=0.3)
    if method == "sghmc":
        net = Ensemble(net, NUM_MEMBERS)
        for _ in range(NUM_MEMBERS):
            for param in net.current.parameters():
                param.data.add_(0.1 * torch.randn_like(param))
            net.collect()
    return net


def gradients(net: nn.Module, run: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    net.zero_grad()
    run(PICTURES).square().sum().backward()
    return [param.grad for param in net.parameters() if param.grad is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_network_learns(method: str, backend: str) -> None:
    net = make(method).train()
    expected = gradients(net, net)
    got = gradients(net, torch.compile(net, backend=backend, fullgraph=True))
    assert len(got) == len(expected) > 0
    if method in RANDOM and (backend == "inductor" or method == "mcdropout"):
        assert all(grad.isfinite().all() and grad.any() for grad in got)  # from other numbers
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiles", ["step", "network"])
def test_a_step_with_a_joint_posterior_compiles(compiles: str) -> None:
    net = make("bbb").train()

    def step(run: nn.Module) -> Tensor:
        with JointPosterior(net) as posterior:
            nll = run(PICTURES).square().sum()
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


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_the_kl_compiles_with_and_without_gradients(wants_gradients: bool) -> None:
    net = make("bbb").requires_grad_(wants_gradients)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            compiled = torch.compile(kl_divergence, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(net), kl_divergence(net))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_network_makes_the_same_draws(method: str, backend: str) -> None:
    net = make(method).eval()
    compiled = torch.compile(net, backend=backend)
    num_samples = NUM_MEMBERS
    expected = predictive(net, PICTURES, num_samples)
    torch.testing.assert_close(predictive(compiled, PICTURES, num_samples), expected)
    with torch.no_grad(), held_draw(net, 1):
        held = [compiled(PICTURES) for _ in range(2)]
    assert torch.equal(held[0], held[1]) == (method != "mcdropout")  # whose masks are per pass


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", RANDOM)
def test_a_compiled_network_left_alone_makes_a_draw_per_call(method: str, context: type) -> None:
    compiled = torch.compile(make(method).eval(), backend="aot_eager", fullgraph=True)
    with context():
        assert not torch.equal(compiled(PICTURES), compiled(PICTURES))


def test_compiled_dropout_drops_by_its_rate() -> None:
    x = torch.ones(1000, 100)
    for mode in (True, False):
        dropout = torch.compile(MCDropout(0.25).train(mode), backend="aot_eager", fullgraph=True)
        out = dropout(x)
        assert set(out.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
        # 5 standard errors over 100,000 coins
        assert abs((out == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 100_000) ** 0.5


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_exported_network_is_as_random_as_it_was(
    method: str, training: bool, strict: bool
) -> None:
    if method == "sghmc" and strict and not training:
        pytest.skip("which member answers is decided outside of a graph; strict=False takes one")
    net = make(method).train(training)
    dynamic = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(net, (PICTURES,), strict=strict, dynamic_shapes=dynamic).module()
    outputs = [program(PICTURES) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1]) == (method not in RANDOM)
    assert program(PICTURES[:3]).shape == (3, 3)
    if method == "pointwise":
        torch.testing.assert_close(outputs[0], net(PICTURES))


def test_copies_of_a_network_share_no_draw() -> None:
    net = make("bbb").eval()
    with torch.no_grad(), held_draw(net, 0):
        mine = net(PICTURES)
        assert not torch.equal(copy.deepcopy(net)(PICTURES), mine)
