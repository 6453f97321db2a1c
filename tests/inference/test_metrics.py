"""Metrics equal their formulas over all rows for any batches, and work with torchmetrics."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric, MetricCollection

from bqnn.inference.functional import (
    adaptive_calibration_error,
    brier_score,
    entropy,
    expected_distance,
    gaussian_nll,
    log_mean_exp,
)
from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.inference.metrics import (
    AdaptiveCalibrationError,
    CalibrationError,
    CategoricalNLL,
    ContinuousRankedProbabilityScore,
    GaussianMixtureNLL,
    GaussianNLL,
    IntervalCoverage,
    IntervalScore,
    NotFiniteError,
    RootMeanSquaredError,
    RootMeanVariance,
)
from tests.bare_trainer import bare_trainer

LETTERS = Classification("abcd")
HOUSES = Regression(target_mean=22.5, target_std=9.2)


def classified(num_samples: int = 5, num_rows: int = 103) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_samples, num_rows, 4, generator=generator)
    return logits, torch.randint(4, (num_rows,), generator=generator)


def regressed(num_samples: int = 5, num_rows: int = 103) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num_samples, num_rows, 2, generator=generator)
    return samples, torch.randn(num_rows, generator=generator)


def expected_of_classes(samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compute the formulas of docs/metrics.md over all rows at once."""
    logits = samples.double()
    probabilities = logits.softmax(-1)
    mean = probabilities.mean(0)
    index = targets.expand(logits.shape[:-1]).unsqueeze(-1)
    log_likelihood = logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
    aleatoric = entropy(probabilities).mean(0)
    return {
        "error": (mean.argmax(-1) != targets).double().mean(),
        "nll": -log_mean_exp(log_likelihood).mean(),
        "brier": brier_score(mean, targets).mean(),
        "ape": entropy(mean).mean(),
        "mi": (entropy(mean) - aleatoric).clamp_min(0).mean(),
        "aleatoric": aleatoric.mean(),
    }


def expected_of_numbers(samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    means, log_variances = samples.double().unbind(-1)
    targets, std = targets.double(), torch.tensor(9.2, dtype=torch.float64)
    mean, variances = means.mean(0), log_variances.exp()
    aleatoric, epistemic = variances.mean(0), means.var(0, correction=0)
    variance = aleatoric + epistemic
    half_width = torch.special.ndtri(torch.tensor(0.975, dtype=torch.float64)) * variance.sqrt()
    rmse = (targets - mean).square().mean().sqrt()
    nll = gaussian_nll(mean, variance.log(), targets).mean()
    densities = -gaussian_nll(means, log_variances, targets)
    return {
        "rmse": rmse * std,
        "nll": nll + std.log(),
        "nll_mixture": -log_mean_exp(densities).mean() + std.log(),
        "coverage95": ((targets - mean).abs() <= half_width).double().mean(),
        "rmse_standardized": rmse,
        "nll_standardized": nll,
        "std": std * ((std * variance.sqrt() / std).square().mean().sqrt()),
        "aleatoric_std": std * ((std * aleatoric.sqrt() / std).square().mean().sqrt()),
        "epistemic_std": std * ((std * epistemic.sqrt() / std).square().mean().sqrt()),
        "crps": std * mixture_crps(means, variances, targets).mean(),
        "interval_score95": std * interval_score(half_width, targets - mean, 0.05).mean(),
    }


def mixture_crps(means: Tensor, variances: Tensor, targets: Tensor) -> Tensor:
    """E|x - y| - E|x - x'| / 2, over all pairs of draws."""
    pairs = expected_distance(means[:, None] - means, variances[:, None] + variances)
    return expected_distance(means - targets, variances).mean(0) - pairs.mean((0, 1)) / 2


def interval_score(half_width: Tensor, residual: Tensor, alpha: float) -> Tensor:
    below, above = -half_width - residual, residual - half_width
    return 2 * half_width + 2 / alpha * (below.clamp_min(0) + above.clamp_min(0))


BOTH = pytest.mark.parametrize(
    ("likelihood", "samples", "targets", "formulas"),
    [(LETTERS, *classified(), expected_of_classes), (HOUSES, *regressed(), expected_of_numbers)],
)
Formulas = Callable[[Tensor, Tensor], dict[str, Tensor]]


def collections(likelihood: Likelihood) -> list[MetricCollection]:
    return [likelihood.metrics(), likelihood.uncertainty()]


def values(collection: MetricCollection) -> dict[str, float]:
    return {name: value.item() for name, value in collection.compute().items()}


@BOTH
def test_one_batch_gives_the_formulas_bit_for_bit(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    expected = formulas(samples, targets)
    for collection in collections(likelihood):
        collection.update(samples, targets)
        for name, value in collection.compute().items():
            assert value.dtype == torch.float64
            if name in ("crps", "interval_score95"):  # their terms are summed in another order
                assert value.item() == pytest.approx(expected[name].item(), rel=1e-12), name
            elif not name.startswith("ece"):
                assert value.item() == expected[name].item(), name


@BOTH
def test_batches_of_any_size_count_as_one_set_of_rows(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    for collection, whole in zip(collections(likelihood), collections(likelihood), strict=True):
        whole.update(samples, targets)
        for batch, truth in zip(samples.split(20, dim=1), targets.split(20), strict=True):
            collection.update(batch, truth)
        assert values(collection) == pytest.approx(values(whole), rel=1e-12, abs=1e-14)
        collection.reset()
        collection.update(samples, targets)
        assert values(collection) == values(whole)


@BOTH
def test_forward_gives_the_batch_and_keeps_all_rows(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    collection, whole, second = (likelihood.metrics() for _ in range(3))
    whole.update(samples, targets)
    second.update(samples[:, 50:], targets[50:])
    collection(samples[:, :50], targets[:50])
    batch = collection(samples[:, 50:], targets[50:])
    assert {name: value.item() for name, value in batch.items()} == values(second)
    assert values(collection) == pytest.approx(values(whole), rel=1e-12)


@BOTH
def test_metrics_can_be_pickled_and_copied(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    collection = likelihood.metrics()
    collection.update(samples, targets)
    for copy in (pickle.loads(pickle.dumps(collection)), collection.clone(prefix="val/")):
        assert list(values(copy).values()) == list(values(collection).values())
    assert list(copy.compute()) == [f"val/{name}" for name in collection]


@BOTH
def test_a_cast_of_the_module_leaves_states_in_float64(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    module = nn.ModuleDict({"metrics": likelihood.metrics()}).to(torch.bfloat16).half()
    module["metrics"].update(samples, targets)
    whole = likelihood.metrics()
    whole.update(samples, targets)
    assert values(module["metrics"]) == values(whole)


@BOTH
def test_sums_of_processes_are_the_metrics_of_all_rows(
    likelihood: Likelihood, samples: Tensor, targets: Tensor, formulas: Formulas
) -> None:
    """torchmetrics reduces the states of all processes by each state's function."""
    parts = [likelihood.metrics() for _ in range(3)]
    whole = likelihood.metrics()
    whole.update(samples, targets)
    for part, rows in zip(parts, torch.arange(103).tensor_split(3), strict=True):
        part.update(samples[:, rows], targets[rows])
    for name in whole:
        metric: Metric = parts[0][name]
        for state, reduce in metric._reductions.items():
            states = [getattr(part[name], state) for part in parts]
            is_list = isinstance(states[0], list)  # torchmetrics passes its tensors one by one
            gathered = [torch.cat(each) for each in states] if is_list else torch.stack(states)
            assert callable(reduce)
            setattr(metric, state, reduce(gathered))
    assert values(parts[0]) == pytest.approx(values(whole), rel=1e-12)


def test_metrics_that_agree_on_the_first_batch_stay_apart_in_any_collection() -> None:
    """A MetricCollection shares the states of metrics whose states are equal after a batch."""
    same, targets = regressed(num_samples=1)
    other, _ = regressed(num_samples=3)
    collection = MetricCollection([GaussianNLL(), GaussianMixtureNLL()])
    collection.update(same, targets)
    collection.update(other, targets)
    for alone in (GaussianNLL(), GaussianMixtureNLL()):
        alone.update(same, targets)
        alone.update(other, targets)
        assert collection[type(alone).__name__].compute() == alone.compute()
    covered = MetricCollection({"low": IntervalCoverage(0.5), "high": IntervalCoverage(0.95)})
    covered.update(torch.zeros(1, 4, 2), torch.zeros(4))
    covered.update(torch.zeros(1, 4, 2), torch.ones(4))
    assert values(covered) == {"low": 0.5, "high": 1.0}


def test_the_squared_error_is_that_of_torchmetrics() -> None:
    samples, targets = regressed()
    ours = RootMeanSquaredError()
    theirs = MeanSquaredError(squared=False).set_dtype(torch.float64)
    ours.update(samples, targets)
    theirs.update(samples.double()[..., 0].mean(0), targets.double())
    assert ours.compute() == theirs.compute()


def test_crps_of_one_gaussian_is_its_closed_form_and_of_many_an_integral() -> None:
    """CRPS of N(m, s^2) by Gneiting & Raftery (2007); of a mixture, its definition."""
    normal = torch.distributions.Normal(torch.tensor(1.0).double(), torch.tensor(2.0).double())
    log_variance, y = 2 * math.log(2.0), torch.tensor(4.0).double()
    metric = ContinuousRankedProbabilityScore()
    metric.update(torch.tensor([[[1.0, log_variance]]], dtype=torch.float64), y[None])
    z = (y - 1) / 2
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = 2 * (z * (2 * normal.cdf(y) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-12)

    samples, targets = regressed(num_rows=4)
    x = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    for row in range(4):
        means, log_variances = samples[:, row].double().unbind(-1)
        z = (x - means[:, None]) / (log_variances[:, None] / 2).exp()
        squares = (torch.special.ndtr(z).mean(0) - (x >= targets[row]).double()).square()
        metric.reset()
        metric.update(samples[:, row : row + 1], targets[row : row + 1])
        assert metric.compute().item() == pytest.approx(torch.trapezoid(squares, x).item(), 1e-4)


def test_crps_of_certain_draws_is_the_absolute_error_less_their_disagreement() -> None:
    certain = torch.tensor([[[0.0, -60.0]], [[2.0, -60.0]]])  # a half each on 0 and on 2
    metric = ContinuousRankedProbabilityScore(target_std=3.0)
    metric.update(certain, torch.tensor([5.0]))
    assert metric.compute().item() == pytest.approx(3 * (4.0 - 1.0 / 2))


def test_interval_score_is_least_for_the_true_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(20_000, generator=generator)
    scores = []
    for std in (0.7, 1.0, 1.4):
        metric = IntervalScore(0.9)
        draws = torch.tensor([0.0, 2 * math.log(std)]).expand(1, len(targets), 2)
        metric.update(draws, targets)
        scores.append(metric.compute().item())
    half = 1.6448536
    exact = 2 * half + 2 * (2 / 0.1) * (math.exp(-(half**2) / 2) / 2.5066283 - 0.05 * half)
    assert scores[1] == min(scores) == pytest.approx(exact, rel=0.01)


def test_adaptive_calibration_error_of_a_case_counted_by_hand() -> None:
    """Bins of 2, 2 and 1 of five rows; the two rows of 0.8 lie in two bins."""
    confidences = torch.tensor([0.95, 0.8, 0.6, 0.8, 0.7])
    correct = torch.tensor([True, False, True, True, False])
    logits = torch.stack([confidences, 1 - confidences], -1).log()
    expected = (abs(0.4 - 0.7) + abs(-0.3 - 0.3) + 0.05) / 5
    for order in torch.arange(5), torch.tensor([3, 1, 0, 4, 2]):
        metric = AdaptiveCalibrationError(3)
        for rows in order.split(2):
            metric.update(logits[None, rows], (~correct[rows]).long())
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    for num_bins in (5, 50):  # a bin per row, but for the rows of equal confidence
        error = adaptive_calibration_error(confidences, correct, num_bins).item()
        assert error == pytest.approx((0.4 + 0.7 + 0.3 + 0.3 + 0.05) / 5)


def test_adaptive_calibration_error_is_ece_if_all_rows_are_in_one_bin() -> None:
    samples, targets = classified()
    one, equal_width = AdaptiveCalibrationError(1), CalibrationError(1)
    one.update(samples, targets)
    equal_width.update(samples, targets)
    assert one.compute().item() == pytest.approx(equal_width.compute().item(), rel=1e-12)


def test_rows_that_are_not_finite_are_counted_and_the_first_metric_is_named() -> None:
    samples, targets = torch.zeros(2, 3, 2), torch.zeros(3)
    samples[:, 1, 1] = 1000.0  # a log variance
    collection = Regression(0.0, 1.0).metrics()
    collection.update(torch.zeros(2, 4, 2), torch.zeros(4))
    collection.update(samples, targets)
    with pytest.raises(NotFiniteError, match=r"^nll: 1 of 7 rows are not finite") as caught:
        collection.finite_numbers()
    assert caught.value.metrics["rmse"] == 0
    assert caught.value.metrics == pytest.approx(collection.numbers(), abs=0, rel=0, nan_ok=True)


WITH_TARGETS = [
    *(CategoricalNLL(), CalibrationError(), AdaptiveCalibrationError()),
    *(RootMeanSquaredError(), ContinuousRankedProbabilityScore(), IntervalScore()),
]


@pytest.mark.parametrize("metric", WITH_TARGETS)
def test_metrics_that_compare_with_targets_ask_for_them(metric: Metric) -> None:
    with pytest.raises(ValueError, match="targets=None: "):
        metric.update(torch.zeros(2, 3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationError(num_bins=0), "num_bins=0"),
        (lambda: AdaptiveCalibrationError(num_bins=0), "num_bins=0"),
        (lambda: IntervalCoverage(level=95), "level=95"),
        (lambda: IntervalScore(level=0.0), "level=0.0"),
        (lambda: ContinuousRankedProbabilityScore(target_std=-1.0), "target_std=-1.0"),
        (lambda: RootMeanSquaredError(target_std=0.0), "target_std=0.0"),
        (lambda: RootMeanVariance(part="total"), "part='total'"),
    ],
)
def test_arguments_that_make_no_metric_are_refused(
    make: Callable[[], Metric], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Classifier(LightningModule):
    """A module of another program, which draws by dropout and logs metrics with torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.nll = CategoricalNLL()
        self.metrics = LETTERS.metrics().clone(prefix="test/")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        draws = torch.stack([self.net(scale * inputs) for scale in (0.5, 1.0, 2.0)])
        self.nll.update(draws, targets)
        self.metrics.update(draws, targets)
        self.log("nll", self.nll)
        self.log_dict(self.metrics)


def test_a_lightning_module_of_someone_else_logs_them() -> None:
    torch.manual_seed(0)
    module, inputs, targets = Classifier(), torch.randn(30, 4), torch.arange(30) % 4
    rows = TensorDataset(inputs, targets)
    (logged,) = bare_trainer(1).test(module, DataLoader(rows, batch_size=7), verbose=False)
    with torch.no_grad():
        draws = torch.stack([module.net(scale * inputs) for scale in (0.5, 1.0, 2.0)])
    expected = LETTERS.metrics()
    expected.update(draws, targets)
    assert logged["nll"] == logged["test/nll"]
    for name, value in values(expected).items():
        assert logged[f"test/{name}"] == pytest.approx(value, rel=1e-6)
