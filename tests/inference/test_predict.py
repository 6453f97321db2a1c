"""Monte-Carlo prediction: values, seeds, and the state that it leaves unchanged."""

import pytest
import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, ArgumentTypeError
from bqnn.inference import predict
from bqnn.inference.predict import predictive, predictive_sets
from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import Drawn, evaluation_coins, evaluation_noise, held_draw
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import MLP, LeNet, ResNet
from bqnn.seeds import Stream, stream_seed


class Counter(Drawn):
    """Multiplies by the index of the held draw, and counts the draws."""

    def __init__(self) -> None:
        super().__init__()
        self.num_draws = 0

    def make_draw(self, index: int) -> int:
        self.num_draws += 1
        return index

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held()


def bayes_net() -> nn.Module:
    torch.manual_seed(0)
    return to_bayes(LeNet([1, 8, 8], [3]), prior_std=1.0, init_rho=-3.0).eval()


def dropout_net() -> nn.Module:
    torch.manual_seed(0)
    return to_mcdropout(MLP([4], [1, 1]), rate=0.3).eval()


IMAGES = torch.linspace(-1, 1, 7 * 64).view(7, 1, 8, 8)
TABLE = torch.linspace(-1, 1, 28).view(7, 4)
RANDOM = [
    pytest.param(bayes_net, IMAGES, id="bbb"),
    pytest.param(dropout_net, TABLE, id="mcdropout"),
]


def test_draws_are_stacked_in_front_in_the_order_of_their_index():
    x = torch.arange(6.0).view(3, 2)
    draws = predictive(Counter().eval(), x, 4, batch_size=2)
    assert torch.equal(draws, torch.stack([0 * x, 1 * x, 2 * x, 3 * x]))


def test_a_draw_is_made_once_for_all_batches_and_released():
    net = Counter().eval()
    predictive(net, torch.ones(10, 1), 3, batch_size=2)
    assert net.num_draws == 3
    assert net.held() is None


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_share_the_weights_of_a_draw(batch_size):
    whole = predictive(bayes_net(), IMAGES, 3)
    parts = predictive(bayes_net(), IMAGES, 3, batch_size=batch_size)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(("net", "x"), RANDOM)
def test_draws_depend_on_the_seed_alone(net, x):
    net = net()
    first = predictive(net, x, 3, seed=4)
    torch.randn(10)
    net(x)
    assert torch.equal(predictive(net, x, 3, seed=4), first)
    assert torch.equal(predictive(net, x, 2, seed=4), first[:2])
    # neighbouring seeds share no draw
    others = predictive(net, x, 3, seed=5)
    assert not any(torch.equal(one, other) for one in first for other in others)


@pytest.mark.parametrize(("net", "x"), RANDOM)
def test_draws_of_one_seed_differ(net, x):
    draws = predictive(net(), x, 5)
    for one in range(5):
        for other in range(one):
            assert not torch.equal(draws[one], draws[other])


@pytest.mark.parametrize(("net", "x"), RANDOM)
def test_the_global_random_state_is_neither_used_nor_changed(net, x):
    net = net()
    before = torch.get_rng_state()
    first = predictive(net, x, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    assert torch.equal(predictive(net, x, 3), first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_the_same_network_in_every_layout_and_type(layout, dtype):
    net = bayes_net()
    with held_draw(net, 0, torch.Generator().manual_seed(1)):
        expected = [layer.held() for layer in net.modules() if isinstance(layer, Drawn)]
    net.to(dtype=dtype).to(memory_format=layout)
    with held_draw(net, 0, torch.Generator().manual_seed(1)):
        weights = [layer.held() for layer in net.modules() if isinstance(layer, Drawn)]
    assert len(weights) > 2
    for got, wanted in zip(weights, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=1e-6)


def test_noise_of_an_evaluation_is_drawn_on_the_cpu_whatever_the_device():
    x = torch.empty(3, 5, device="meta")
    drawn = []

    class Watched(Drawn):
        def make_draw(self, index: int) -> int:
            drawn.extend([evaluation_noise(x), evaluation_coins(x, 0.5)])
            return index

    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with held_draw(Watched(), 0, generator):
        assert [each.device.type for each in drawn] == ["meta", "meta"]
        assert not torch.equal(generator.get_state(), before)


def test_batch_norm_learns_nothing_from_a_prediction_and_no_gradient_is_kept():
    net = to_bayes(ResNet([3, 8, 8], [2], width=4), 1.0, -3.0).eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    draws = predictive(net, torch.randn(6, 3, 8, 8), 2)
    assert not draws.requires_grad
    assert before
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_draws_of_an_ensemble_are_its_members_newest_first():
    net = nn.Linear(1, 1, bias=False)
    ensemble = Ensemble(net, num_members=3)
    for factor in (2.0, 3.0, 4.0):
        nn.init.constant_(net.weight, factor)
        ensemble.collect()
    x = torch.tensor([[1.0], [10.0]])
    draws = predictive(ensemble.eval(), x, 3, batch_size=1)
    assert draws.squeeze(-1).tolist() == [[4, 40], [3, 30], [2, 20]]
    with pytest.raises(ValueError, match="ask for at most 3 samples"):
        predictive(ensemble, x, 4)


def test_a_network_in_training_and_no_draws_are_refused():
    with pytest.raises(ValueError, match="in training mode"):
        predictive(bayes_net().train(), IMAGES, 1)
    with pytest.raises(ValueError, match="num_samples=0"):
        predictive(bayes_net(), IMAGES, 0)


def test_passes_are_equal_while_a_draw_is_held_and_differ_after():
    net = bayes_net()
    with torch.no_grad():
        with held_draw(net, 0):
            held = net(IMAGES)
            assert torch.equal(net(IMAGES), held)
        assert not torch.equal(net(IMAGES), held)
        with held_draw(net, 1):
            assert not torch.equal(net(IMAGES), held)


def test_a_draw_is_released_when_a_pass_fails():
    net = bayes_net()
    with pytest.raises(RuntimeError), held_draw(net, 0):
        net(torch.ones(2, 5))
    with torch.no_grad():
        assert not torch.equal(net(IMAGES), net(IMAGES))


def test_a_held_draw_is_the_mean_plus_sigma_times_noise():
    net = to_bayes(nn.Sequential(nn.Linear(400, 300, bias=False)), 1.0, -1.0).eval()
    layer = net[0]
    with torch.no_grad(), held_draw(net, 0):
        weights = net(torch.eye(400)).t()
        scores = (weights - layer.mean) / nn.functional.softplus(layer.rho)
    # 5 standard errors over 120,000 weights
    assert abs(scores.mean()) < 5 / 120_000**0.5
    assert abs(scores.var() - 1) < 5 * (2 / 120_000) ** 0.5


@pytest.mark.parametrize("kept", [True, False])
def test_layers_before_the_first_random_layer_run_once(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    first = nn.Linear(4, 8)
    first.register_forward_hook(lambda *_: calls.append(1))
    net = nn.Sequential(nn.Sequential(first, nn.ReLU()), MCDropout(0.5), nn.Linear(8, 2)).eval()
    x = torch.randn(10, 4)
    expected = []
    for index in range(3):
        seed = stream_seed(0, Stream.EVALUATION_MASKS, index)
        with held_draw(net, index, torch.Generator().manual_seed(seed)):
            expected.append(torch.cat([net(rows) for rows in x.split(4)]).detach())
    calls.clear()
    monkeypatch.setattr(predict, "MAX_KEPT_BYTES", 1000 if kept else 300)
    samples = predictive(net, x, 3, batch_size=4)
    assert torch.equal(samples, torch.stack(expected))
    assert len(calls) == (3 if kept else 10)  # of three batches; or once more than the nine passes


def ensemble() -> nn.Module:
    torch.manual_seed(0)
    net = Ensemble(MLP([4], [2]), 3)
    for _ in range(3):
        net.current.load_state_dict(MLP([4], [2]).state_dict())
        net.collect()
    return net.eval()


@pytest.mark.parametrize(("net", "x"), [*RANDOM, pytest.param(ensemble, TABLE, id="sghmc")])
def test_many_sets_get_the_draws_that_each_gets_alone(net, x):
    sets = [x, x[:3], x + 1]
    together = predictive_sets(net(), sets, 3, prepare=lambda rows: 2 * rows, batch_size=2)
    for each, samples in zip(sets, together, strict=True):
        assert torch.equal(samples, predictive(net(), 2 * each, 3, batch_size=2))


def test_a_draw_is_made_once_for_all_sets():
    net = Counter().eval()
    predictive_sets(net, [torch.ones(10, 1)] * 17, 3, batch_size=2)
    assert net.num_draws == 3


def test_what_a_container_does_when_it_is_called_is_kept():
    class Doubling(nn.Sequential):
        def __call__(self, x):
            return 2 * super().__call__(x)

    net = nn.Sequential(Doubling(nn.Linear(3, 4)), MCDropout(0)).eval()
    x = torch.randn(2, 3)
    assert torch.equal(predictive(net, x, 2)[1], net(x))


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(4, 2), make

    def forward(self, x):
        return self.make(self.layer(x))


@pytest.mark.parametrize("make", [lambda out: (out, out), lambda out: {"logits": out}])
def test_outputs_that_are_not_one_tensor_are_refused(make):
    with pytest.raises(ArgumentTypeError, match=r"^net: its forward returns a (tuple|dict), and"):
        predictive(Outputs(make).eval(), TABLE, 1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"x": TABLE.numpy()}, ArgumentTypeError, "^x=.* is not a tensor .*torch.as_tensor"),
        ({"x": TABLE.tolist()}, ArgumentTypeError, "^x=.* is not a tensor"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, ArgumentTypeError, "^x has dtype torch.int64"),
        ({"batch_size": 0}, ArgumentError, "^batch_size=0: "),
        ({"batch_size": 2.5}, ArgumentTypeError, "^batch_size=2.5 is not a whole number"),
        ({"seed": "a"}, ArgumentTypeError, "^seed='a' is not a whole number"),
        ({"seed": -1}, ArgumentError, "^seed=-1: choose 0 to"),
    ],
)
def test_arguments_are_checked(options, kind, message):
    with pytest.raises(kind, match=message) as error:
        predictive(dropout_net(), **{"x": TABLE, "num_samples": 2, **options})
    assert "\n" not in str(error.value)
