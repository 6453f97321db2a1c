"""Predictions in concurrent threads are bit-equal to those of serial calls."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import JointPosterior, kl_divergence
from bqnn.layers.draws import held_draw
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from tests.quant.conftest import float_net, inputs
from tests.small_methods import image_method

NUM_THREADS = 8
METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")


def make(method: str, net: str, numeric: str, engine: str = "fbgemm") -> nn.Module:
    made = float_net(method, net)
    if numeric == "float":
        return made
    made = calibrate(prepare(fuse(made), QuantSpec(engine=engine)), [inputs(net)])
    return made if numeric == "simulated" else convert(made, engine)


def at_once(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the results of calls in eight threads that start together."""
    start = threading.Barrier(NUM_THREADS)

    def run(number: int) -> list[Tensor]:
        start.wait(timeout=60)
        return [call() for call in calls[number::NUM_THREADS]]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        parts = list(pool.map(run, range(NUM_THREADS)))
    return [parts[index % NUM_THREADS][index // NUM_THREADS] for index in range(len(calls))]


def assert_as_serial(calls: list[Callable[[], Tensor]]) -> None:
    expected = [call() for call in calls]
    for got, wanted in zip(at_once(calls), expected, strict=True):
        assert torch.equal(got, wanted)


def calls_of(net: nn.Module, x: Tensor, num_samples: int, count: int) -> list[Callable[[], Tensor]]:
    """Create predictions with different seeds, draws and batches, and different durations."""

    def call(index: int) -> Callable[[], Tensor]:
        samples, batch_size = 1 + index % num_samples, (5, 16, 64)[index % 3]
        return lambda: predictive(net, x, samples, seed=index % 4, batch_size=batch_size)

    return [call(index) for index in range(count)]


@pytest.mark.parametrize("numeric", ["float", "simulated", "int8"])
@pytest.mark.parametrize("net", ["mlp", "lenet"])
@pytest.mark.parametrize("method", METHODS)
def test_one_network_predicts_for_many_threads(method: str, net: str, numeric: str) -> None:
    made = make(method, net, numeric)
    num_samples = 2 if method == "sghmc" else 4
    assert_as_serial(calls_of(made, inputs(net), num_samples, count=32))


@pytest.mark.parametrize("name", METHODS)
def test_one_model_predicts_for_many_threads(name: str) -> None:
    model = image_method(name, num_samples=1 if name == "sghmc" else 20).eval()
    x = torch.linspace(-1, 1, 16 * 64).view(16, 1, 8, 8)

    def call(rows: int) -> Callable[[], Tensor]:
        return lambda: model.predictive(x[:rows])

    assert_as_serial([call(1 + index % 16) for index in range(32)])


@pytest.mark.parametrize("numeric", ["float", "simulated", "int8"])
def test_networks_of_all_methods_predict_at_once(numeric: str) -> None:
    calls = []
    for method in METHODS:
        calls += calls_of(make(method, "mlp", numeric), inputs("mlp"), 2, count=8)
    assert_as_serial(calls)


def test_int8_networks_of_different_engines_predict_at_once() -> None:
    before = torch.backends.quantized.engine
    calls = []
    for engine in ENGINES:
        calls += calls_of(make("bbb", "lenet", "int8", engine), inputs("lenet"), 3, count=8)
    assert_as_serial(calls)
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("method", METHODS)
def test_training_another_network_meanwhile_changes_nothing(method: str) -> None:
    made, x = make(method, "mlp", "float"), inputs("mlp")
    calls = calls_of(made, x, 2, count=32)
    expected = [call() for call in calls]
    trained = float_net("bbb", "mlp").train()
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            with JointPosterior(trained) as posterior:
                loss = trained(x).square().sum() + posterior.kl()
            loss.backward()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        results = at_once(calls)
    finally:
        stop.set()
        trainer.join(timeout=60)
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_seeded_training_is_not_disturbed_by_predictions() -> None:
    net, x = float_net("bbb", "mlp"), inputs("mlp")
    trained = copy.deepcopy(net).train()

    def losses() -> Tensor:
        torch.manual_seed(5)
        return torch.stack([trained(x).square().sum().detach() for _ in range(50)])

    expected = losses()
    stop = threading.Event()

    def predict() -> None:
        while not stop.is_set():
            predictive(net, x, 3)

    predictor = threading.Thread(target=predict)
    predictor.start()
    try:
        assert torch.equal(losses(), expected)
    finally:
        stop.set()
        predictor.join(timeout=60)


def test_a_draw_is_held_for_the_thread_that_holds_it() -> None:
    net, x = float_net("bbb", "mlp"), inputs("mlp")
    with torch.no_grad(), held_draw(net, 0), ThreadPoolExecutor(1) as other:
        mine = net(x)
        assert not torch.equal(other.submit(net, x).result(), mine)
        assert torch.equal(net(x), mine)


def test_a_joint_posterior_is_seen_by_the_thread_that_made_it() -> None:
    net = float_net("bbb", "mlp")
    layer = next(module for module in net.modules() if hasattr(module, "rho"))
    with JointPosterior(net), ThreadPoolExecutor(1) as other:
        before = layer.sigma
        with torch.no_grad():
            layer.rho.add_(1.0)
        assert torch.equal(layer.sigma, before)
        assert (other.submit(lambda: layer.sigma).result() > before).all()
    assert kl_divergence(net).isfinite()
