"""Early stop: settled rows make no more draws, and other rows make the draws of all rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.calibration import DeviationScaling
from bqnn.inference.early_stop import check_early_stop, numbers_of_draws
from bqnn.inference.functional import half_width
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.predict import Bank, predictive, predictive_until_settled
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.ensemble import Ensemble
from bqnn.quant.engines import engine
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from tests.inference.test_threads import assert_as_serial, make
from tests.quant.conftest import float_net, inputs

MAX_SAMPLES, BATCH_SIZE, NUM_ROWS = 5, 20, 50
CLASSES = Classification(["a", "b", "c"])


def network(method: str, numeric: str, net: str = "lenet", engine: str = "fbgemm") -> nn.Module:
    """Make a network; that of sghmc has five members."""
    if method != "sghmc":
        return make(method, net, numeric, engine)
    made: nn.Module = Ensemble.of([_noisy(float_net("pointwise", net), i) for i in range(5)]).eval()
    if numeric == "float":
        return made
    made = calibrate(prepare(fuse(made), QuantSpec(engine=engine)), [inputs(net)])
    return made if numeric == "simulated" else convert(made, engine)


def _noisy(net: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for param in net.parameters():
        param.data.mul_(1 + 0.1 * torch.randn_like(param))
    return net


def by_output(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Settle rows by the size of their first output: some at each look, and all of one batch."""

    def is_settled(draws: Tensor) -> Tensor:
        size = draws.mean(0)[:, 0]
        return size > size.median() if len(draws) == 2 else size > size.quantile(0.2)

    return is_settled


def check_draws(net: nn.Module, x: Tensor, numeric: str, bank: Bank | None = None) -> Tensor:
    """Check draws against those of all rows, and return the number of draws of each row."""
    expected = predictive(net, x, MAX_SAMPLES, seed=1, batch_size=BATCH_SIZE)
    options = {"seed": 1, "batch_size": BATCH_SIZE, "bank": bank}
    (found,) = predictive_until_settled(net, [x], MAX_SAMPLES, by_output(x), **options)
    made = torch.arange(MAX_SAMPLES)[:, None] < found.num_samples
    assert found.samples[~made].isnan().all()
    if numeric == "float":  # fewer rows may be rounded otherwise
        assert torch.allclose(found.samples[made], expected[made], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found.samples[made], expected[made])
    return found.num_samples


@pytest.mark.parametrize("numeric", ["float", "simulated", "int8"])
@pytest.mark.parametrize("method", ["bbb", "mcdropout", "sghmc"])
def test_the_draws_are_those_of_all_rows(method: str, numeric: str) -> None:
    net, x = network(method, numeric), inputs("lenet", NUM_ROWS)
    counts = check_draws(net, x, numeric)
    assert {2, 4, 5} == set(counts.tolist())
    assert torch.equal(check_draws(net, x, numeric, Bank(net, MAX_SAMPLES, seed=1)), counts)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_makes_the_draws_of_all_rows(name: str) -> None:
    if reason := engine(name).missing():
        pytest.skip(reason)
    check_draws(network("mcdropout", "int8", "mlp", name), inputs("mlp", NUM_ROWS), "int8")


def test_masks_stay_the_same_behind_a_batch_that_has_settled() -> None:
    net, x = network("mcdropout", "simulated", "mlp"), inputs("mlp", 60)
    expected = predictive(net, x, 8, batch_size=20)

    def all_but_the_last_batch(draws: Tensor) -> Tensor:
        return torch.arange(draws.shape[1]) < draws.shape[1] - 20

    (found,) = predictive_until_settled(net, [x], 8, all_but_the_last_batch, batch_size=20)
    assert found.num_samples.tolist() == [2] * 40 + [8] * 20
    assert torch.equal(found.samples[:, 40:], expected[:, 40:])


def test_sets_have_the_draws_that_each_has_alone() -> None:
    net = network("mcdropout", "simulated", "mlp")
    sets = [inputs("mlp", 50), inputs("mlp", 30) + 1]
    together = predictive_until_settled(net, sets, 8, by_output(sets[0]))
    for x, found in zip(sets, together, strict=True):
        (alone,) = predictive_until_settled(net, [x], 8, by_output(x))
        assert torch.equal(found.samples.nan_to_num(), alone.samples.nan_to_num())
        assert torch.equal(found.num_samples, alone.num_samples)


def test_threads_stop_early_as_serial_calls_do() -> None:
    net, x = network("mcdropout", "int8", "mlp"), inputs("mlp", NUM_ROWS)

    def of(seed: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            (found,) = predictive_until_settled(net, [x], 5, by_output(x), seed=seed)
            return found.samples.nan_to_num()

        return call

    assert_as_serial([of(seed) for seed in [0, 1] * 8])


def test_draws_are_judged_after_2_4_8() -> None:
    assert [list(numbers_of_draws(n)) for n in (1, 2, 3, 8)] == [[1], [2], [2, 3], [2, 4, 8]]


def test_half_width_is_that_of_students_interval() -> None:
    from scipy import stats

    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert half_width(values[:, None]).item() == pytest.approx((high - low) / 2)


def logits(*probabilities: list[float]) -> Tensor:
    """Return draws of one row [S, 1, C]."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[:, None]


def test_a_class_settles_by_entropy_and_by_decision() -> None:
    sure = logits([0.98, 0.01, 0.01], [0.98, 0.01, 0.01])
    assert CLASSES.is_settled(sure, 0.0).item()
    close = logits([0.98, 0.01, 0.01], [0.97, 0.02, 0.01])
    assert [CLASSES.is_settled(close, t).item() for t in (0.0, 0.01, 1.0)] == [False, False, True]
    undecided = logits([0.5, 0.4, 0.1], [0.4, 0.5, 0.1])  # with equal entropies
    assert not CLASSES.is_settled(undecided, 10.0).item()


def test_the_entropys_interval_is_right_to_first_order() -> None:
    torch.manual_seed(0)
    draws = torch.randn(20, 4000, 3) * 0.2 + torch.tensor([1.0, 0.0, -1.0])
    spread = CLASSES.summary(draws)["entropy"].std().item()  # over 4000 means of 20 draws
    tolerances = [2.093 * factor * spread for factor in (0.6, 1.6)]
    shares = [CLASSES.is_settled(draws, t).double().mean().item() for t in tolerances]
    assert shares[0] < 0.05 < 0.95 < shares[1]


def test_a_regression_settles_relative_to_its_deviation() -> None:
    likelihood = Regression(target_mean=0.0, target_std=1.0)
    means = torch.tensor([1.0, 1.1, 0.9, 1.0])
    narrow = torch.stack([means, torch.full((4,), -4.0)], -1)[:, None]
    wide = torch.stack([means, torch.full((4,), 4.0)], -1)[:, None]
    assert not likelihood.is_settled(narrow, 0.05).item()
    assert likelihood.is_settled(wide, 0.05).item()
    changing = torch.stack([means, torch.tensor([4.0, 0.0, 4.0, 0.0])], -1)[:, None]
    assert not likelihood.is_settled(changing, 0.05).item()


@pytest.mark.parametrize("likelihood", [CLASSES, Regression(3.0, 2.0)], ids=["classes", "table"])
def test_a_row_has_the_answer_of_its_draws(likelihood: Classification | Regression) -> None:
    torch.manual_seed(0)
    draws = torch.randn(5, 30, likelihood.num_outputs)
    counts = torch.arange(30) % 5 + 1
    early = draws.masked_fill((torch.arange(5)[:, None] >= counts)[..., None], torch.nan)
    answer = likelihood.answer(early, counts)
    assert torch.equal(answer.num_samples, counts)
    for count in range(1, 6):
        rows = counts == count
        plain = vars(likelihood.answer(draws[:count]))
        for name, value in vars(answer).items():
            if name == "samples":
                assert torch.equal(value[:count, rows], plain[name][:, rows])
                assert value[count:, rows].isnan().all()
            elif name != "class_names":
                assert torch.equal(value[rows], plain[name][rows]), name


def test_metrics_are_those_of_each_rows_draws() -> None:
    torch.manual_seed(0)
    draws, targets = torch.randn(5, 30, 3), torch.randint(3, (30,))
    counts = torch.full((30,), 2)
    early = draws.masked_fill((torch.arange(5)[:, None] >= counts)[..., None], torch.nan)
    found = score(Prediction(CLASSES, early, targets, counts))
    assert found == score(Prediction(CLASSES, draws[:2], targets))


def test_a_calibration_uses_the_draws_that_a_row_made() -> None:
    torch.manual_seed(0)
    draws, counts = torch.randn(4, 6, 2), torch.tensor([2, 4, 2, 4, 3, 3])
    calibration = DeviationScaling(2.0)
    found = calibration.by_count(draws, counts)
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(found[:count, row], calibration(draws[:count])[:, row])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((None, 20, None), ValueError, "max_samples=20 without tolerance: .* give tolerance"),
        ((20, None, 0.1), ValueError, "num_samples=20 with tolerance: .* give max_samples"),
        ((None, 20, -1), ValueError, "tolerance=-1: choose 0 or more"),
        ((None, 20, float("nan")), ValueError, "tolerance=nan: choose 0 or more"),
        ((None, 20, "0.1"), TypeError, "tolerance='0.1' is not a number: choose 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[object, object, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check_early_stop(*arguments)
