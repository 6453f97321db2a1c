"""Networks of every method are equal after torch.compile and torch.export."""

import copy
from collections.abc import Callable
from contextvars import ContextVar

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import JointPosterior, kl_divergence, to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import LeNet
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec


def _traces_context_variables() -> bool:
    """Whether this torch can compile a read of a ContextVar, as random layers do."""
    variable: ContextVar[int] = ContextVar("variable", default=1)
    try:
        torch.compile(lambda x: x + variable.get(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not _traces_context_variables(),
    reason="torch.compile of this torch cannot trace ContextVar.get (2.9 cannot, 2.14 can)",
)

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
RANDOM = ("bbb", "mcdropout")
NUM_MEMBERS = 10  # more than torch compiles one function for
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),  # compiles C++ for a minute
]
IMAGES = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)


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
    run(IMAGES).square().sum().backward()
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
    expected = predictive(net, IMAGES, num_samples)
    torch.testing.assert_close(predictive(compiled, IMAGES, num_samples), expected)
    with torch.no_grad(), held_draw(net, 1):
        held = [compiled(IMAGES) for _ in range(2)]
    assert torch.equal(held[0], held[1]) == (method != "mcdropout")  # whose masks are per pass


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", RANDOM)
def test_a_compiled_network_left_alone_makes_a_draw_per_call(method: str, context: type) -> None:
    compiled = torch.compile(make(method).eval(), backend="aot_eager", fullgraph=True)
    with context():
        assert not torch.equal(compiled(IMAGES), compiled(IMAGES))


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


@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout"])
def test_simulated_networks_refuse_to_be_traced(method: str) -> None:
    net = calibrate(prepare(fuse(make(method)), QuantSpec()), [IMAGES])
    for trace in (
        lambda: torch.compile(net, backend="eager")(IMAGES),
        lambda: torch.compile(net, backend="eager", fullgraph=True)(IMAGES),
        lambda: torch.export.export(net, (IMAGES,), strict=False),
        lambda: torch.export.export(net, (IMAGES,), strict=True),
    ):
        torch.compiler.reset()
        with pytest.raises(Exception, match="a quantized network cannot be traced"):
            trace()
    assert net(IMAGES).isfinite().all()


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
    program = torch.export.export(net, (IMAGES,), strict=strict, dynamic_shapes=dynamic).module()
    outputs = [program(IMAGES) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1]) == (method not in RANDOM)
    assert program(IMAGES[:3]).shape == (3, 3)
    if method == "pointwise":
        torch.testing.assert_close(outputs[0], net(IMAGES))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("method", RANDOM)
def test_export_freezes_no_draw_that_is_held(method: str, strict: bool) -> None:
    net = make(method).eval()
    with torch.no_grad(), held_draw(net, 0):
        program = torch.export.export(net, (IMAGES,), strict=strict).module()
        assert not torch.equal(program(IMAGES), program(IMAGES))


@pytest.mark.parametrize("method", METHODS[:3])
def test_integer_networks_compile_and_refuse_to_be_exported(method: str) -> None:
    spec = QuantSpec()
    net = convert(calibrate(prepare(fuse(make(method)), spec), [IMAGES]), spec.engine)
    compiled = torch.compile(net, backend="aot_eager")
    assert torch.equal(predictive(compiled, IMAGES, 3), predictive(net, IMAGES, 3))
    with pytest.raises(TypeError, match="a quantized network cannot be traced"):
        torch.export.export(net, (IMAGES,), strict=False)


def test_copies_of_a_network_share_no_draw() -> None:
    net = make("bbb").eval()
    with torch.no_grad(), held_draw(net, 0):
        mine = net(IMAGES)
        assert not torch.equal(copy.deepcopy(net)(IMAGES), mine)
