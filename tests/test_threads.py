"""Predictions from many threads on one model are what serial calls give, bit for bit."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import LeNet
from bqnn.predict import predictive, predictive_sets
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec

NUM_THREADS = 8
METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
X = torch.linspace(-1, 1, 9 * 64).view(9, 1, 8, 8)


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = LeNet([1, 8, 8], [4], channels=(6, 8), hidden_features=20)
    if method == "bbb":
        net = to_bayes(net, prior_std=1.0, init_rho=-2.0)
    elif method == "mcdropout":
        net = to_mcdropout(net, rate=0.3)
    elif method == "sghmc":
        net = Ensemble(net, 6)
        for _ in range(6):
            for parameter in net.current.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            net.collect()
    return net.eval()


def quantized(method: str, engine: str = "fbgemm") -> nn.Module:
    net = prepare(fuse(network(method)), QuantSpec(weight_bits=4, engine=engine))
    return calibrate(net, [X])


MADE: dict[str, Callable[[str], nn.Module]] = {
    "float": network,
    "simulated": quantized,
    "int8": lambda method: convert(quantized(method), "fbgemm"),
}


def in_threads(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Make the calls at the same time, as many threads at work as calls."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Tensor]) -> Tensor:
        start.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("numeric", MADE)
@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_predict_what_one_does(method: str, numeric: str) -> None:
    net = MADE[numeric](method)
    num_samples = [1] * NUM_THREADS if method == "pointwise" else [2, 3, 4, 5, 6, 2, 3, 4]
    rows = [X, X[:1], X[2:], X + 0.1, X, X[:5], -X, X]

    def call(number: int) -> Callable[[], Tensor]:
        def predict() -> Tensor:
            arguments = {"seed": number % 3, "batch_size": 2 + number % 4}
            return predictive(net, rows[number], num_samples[number], **arguments)

        return predict

    calls = [call(number) for number in range(NUM_THREADS)]
    expected = [predict() for predict in calls]
    for _ in range(3):
        for got, alone in zip(in_threads(calls), expected, strict=True):
            assert torch.equal(got, alone)


def test_a_training_and_other_models_beside_it_change_no_prediction() -> None:
    nets = [MADE[numeric](method) for method in ("bbb", "mcdropout") for numeric in MADE]
    calls = [lambda net=net: predictive(net, X, 3) for net in nets]
    expected = [predict() for predict in calls]
    trained = network("bbb").train()

    def train() -> Tensor:
        for _ in range(20):
            trained(X).square().mean().backward()
            torch.manual_seed(1)  # whoever uses torch's global generator
        return torch.zeros(())

    got = in_threads([*calls, train])
    for one, alone in zip(got, expected, strict=False):
        assert torch.equal(one, alone)


def test_two_engines_pack_at_the_same_time() -> None:
    engines = [e for e in ("fbgemm", "x86") if e in torch.backends.quantized.supported_engines]
    nets = [convert(quantized("bbb", engine), engine) for engine in engines for _ in range(2)]
    calls = [lambda net=net: predictive(net, X, 10) for net in nets]
    expected = [predict() for predict in calls]
    before = torch.backends.quantized.engine
    for got, alone in zip(in_threads(calls), expected, strict=True):
        assert torch.equal(got, alone)
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("method", METHODS)
def test_a_prediction_neither_reads_nor_moves_the_global_random_state(method: str) -> None:
    net = network(method)
    torch.manual_seed(1)
    first = predictive(net, X, 3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(predictive(net, X, 3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_held_by_one_thread_is_not_seen_by_another() -> None:
    net = network("bbb")
    with torch.no_grad(), held_draw(net, 0):
        held = net(X)
        with ThreadPoolExecutor(1) as pool:
            assert not torch.equal(pool.submit(net, X).result(), held)
        assert torch.equal(net(X), held)


def test_dropout_masks_of_a_set_do_not_depend_on_the_sets_before_it() -> None:
    net = network("mcdropout")
    together = predictive_sets(net, [X, -X, X[:3]], 3)
    assert torch.equal(together[1], predictive(net, -X, 3))


def test_a_draw_is_the_same_network_in_every_layout() -> None:
    net = network("bbb")
    expected = predictive(net, X, 3)
    got = predictive(net.to(memory_format=torch.channels_last), X, 3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # sums in another order
