"""A bank of draws: predictions are bit-equal to those that make their draws."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bqnn.inference.predict import Bank, predictive, predictive_sets
from bqnn.layers.draws import Drawn
from tests.inference.test_threads import assert_as_serial, make
from tests.quant.conftest import inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")


@pytest.mark.parametrize("numeric", ["float", "simulated", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_predictions_with_a_bank_are_those_without(method: str, numeric: str) -> None:
    net, x = make(method, "lenet", numeric), inputs("lenet")
    bank = Bank(net, 2, seed=5)
    for seed, num_samples in ((5, 1), (5, 2), (6, 2)):
        expected = predictive(net, x, num_samples, seed=seed)
        for _ in range(2):
            (got,) = predictive_sets(net, [x], num_samples, seed=seed, bank=bank)
            assert torch.equal(got, expected)
    if method != "sghmc":  # which has two members
        (more,) = predictive_sets(net, [x], 3, seed=5, bank=bank)
        assert torch.equal(more, predictive(net, x, 3, seed=5))


def test_a_bank_makes_each_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make("bbb", "mlp", "int8"), inputs("mlp")
    kinds = {type(module) for module in net.modules() if isinstance(module, Drawn)}
    made = []
    for kind in kinds:
        draw = kind.make_draw

        def counted(self: Drawn, index: int, draw: Callable[[Drawn, int], object] = draw) -> object:
            made.append(index)
            return draw(self, index)

        monkeypatch.setattr(kind, "make_draw", counted)
    bank = Bank(net, 4)
    layers = len(made) // 4
    assert made == [index for index in range(4) for _ in range(layers)]
    for _ in range(3):
        predictive_sets(net, [x], 4, bank=bank)
    assert len(made) == 4 * layers > 0


@pytest.mark.parametrize("method", ["bbb", "mcdropout"])
def test_threads_share_a_bank(method: str) -> None:
    net, x = make(method, "mlp", "int8"), inputs("mlp")
    bank = Bank(net, 3)

    def of(seed: int) -> Callable[[], Tensor]:
        return lambda: predictive_sets(net, [x], 3, seed=seed, bank=bank)[0]

    assert_as_serial([of(seed) for seed in [0, 0, 0, 1] * 4])


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Bank: .* training mode; call eval\(\) on it first"):
        Bank(make("bbb", "mlp", "float").train(), 2)
