"""A loaded model predicts rows in the units of the data, as an evaluation does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import bqnn
from bqnn.checkpoints.model import Model
from bqnn.checkpoints.recipe import build
from bqnn.data import DigitsData
from bqnn.inference.answers import ClassificationAnswer, RegressionAnswer
from bqnn.inference.calibration import DeviationScaling
from tests.running import ROOT

TABLE = {
    "likelihood": "regression",
    "target_mean": 200.0,
    "target_std": 50.0,
    "input_shape": [2],
    "input_mean": [80.0, 3.0],
    "input_std": [20.0, 1.0],
    "num_train": 100,
}
IMAGES = {
    "likelihood": "classification",
    "class_names": ["cat", "dog", "owl"],
    "input_shape": [3, 4, 4],
    "input_scale": 255.0,
    "input_mean": [0.5, 0.25, 0.0],
    "input_std": [0.5, 1.0, 2.0],
    "num_train": 100,
}
BBB: dict[str, Any] = {"prior_std": 0.3, "init_rho": -2.0, "beta": 1.0}
MCDROPOUT: dict[str, Any] = {"rate": 0.5, "drop_before_output": True}


def model_of(facts: dict[str, Any], method: str = "bbb", **options: Any) -> Model:
    options = {**{"bbb": BBB, "mcdropout": MCDROPOUT}.get(method, {}), **options}
    recipe = {
        "version": 1,
        "stage": "float",
        "seed": 3,
        "method": {"name": method, "optimizer": {"name": "adam"}, **options},
        "net": {"name": "mlp", "hidden_features": [8]},
        "task": {"name": "mine", "dataset": "uci"},
        "facts": facts,
    }
    return Model(build(recipe).eval())


def flats() -> np.ndarray:
    return np.random.default_rng(0).normal([80, 3], [20, 1], (50, 2))


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)


def classify(model: Model, rows: object, **options: Any) -> ClassificationAnswer:
    answer = model.predict(rows, **options)
    assert isinstance(answer, ClassificationAnswer)
    return answer


def regress(model: Model, rows: object, **options: Any) -> RegressionAnswer:
    answer = model.predict(rows, **options)
    assert isinstance(answer, RegressionAnswer)
    return answer


def equal(answer: Any, other: Any) -> bool:
    return all(
        np.array_equal(value, vars(other)[name])
        for name, value in vars(answer).items()
        if name != "class_names"
    )


@pytest.mark.parametrize("name", ["bbb_0", "mcdropout_0", "sghmc_0", "pointwise_0"])
def test_raw_digits_give_the_predictions_of_the_evaluation(trained: Path, name: str) -> None:
    data = DigitsData()
    data.setup()
    kept = np.load(trained / name / "predictions.npz")
    answer = classify(bqnn.load(trained / name), data.test.inputs.numpy())
    logits = torch.from_numpy(kept["samples"]).double()
    assert np.array_equal(answer.samples, logits.softmax(-1))
    assert np.array_equal(answer.labels, logits.softmax(-1).mean(0).argmax(-1))
    assert answer.class_names == tuple("0123456789")


def test_an_int8_model_in_a_new_process_warns_of_nothing(quantized: Path) -> None:
    """torch warns of quantized types; the first use is where a filter would come too late."""
    code = (
        f"import bqnn; bqnn.load({str(quantized)!r}, numeric='int8').predict([[[[0.0] * 8] * 8]])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_int8_model_predicts_as_the_quantization_reported(quantized: Path) -> None:
    data = DigitsData()
    data.setup()
    kept = np.load(quantized / "predictions.npz")
    answer = classify(bqnn.load(quantized / "checkpoint.ckpt", "int8"), data.test.inputs)
    logits = torch.from_numpy(kept["samples"]).double()
    assert isinstance(answer.samples, Tensor)
    assert torch.equal(answer.samples, logits.softmax(-1))


def test_a_table_is_standardized_and_the_answer_is_in_original_units() -> None:
    model, rows = model_of(TABLE), flats()
    inputs = torch.from_numpy((rows - [80, 3]) / [20, 1]).float()
    draws = model.method.predictive(inputs, 7).double()
    answer = regress(model, rows, num_samples=7)
    assert np.allclose(answer.samples, 200 + 50 * draws[..., 0], rtol=1e-12)
    assert np.allclose(answer.mean, answer.samples.mean(0), rtol=1e-12)
    noise = 50 * draws[..., 1].exp().mean(0).sqrt()
    assert np.allclose(answer.aleatoric, noise, rtol=1e-12)
    assert np.allclose(answer.epistemic, np.std(answer.samples, 0), rtol=1e-6)
    assert np.allclose(answer.std, np.hypot(answer.aleatoric, answer.epistemic), rtol=1e-12)


def test_pixels_are_scaled_and_normalized_per_channel() -> None:
    model, rows = model_of(IMAGES), images()
    mean, std = (torch.tensor(IMAGES[key]).view(3, 1, 1) for key in ("input_mean", "input_std"))
    inputs = (torch.from_numpy(rows).float() / 255 - mean) / std
    probabilities = model.method.predictive(inputs, 5).double().softmax(-1)
    answer = classify(model, rows, num_samples=5)
    assert np.array_equal(answer.samples, probabilities)
    assert np.allclose(answer.probabilities, probabilities.mean(0))
    parts = np.add(answer.aleatoric, answer.mutual_information)
    assert np.allclose(answer.entropy, parts, rtol=1e-12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows.tolist(),
        lambda rows: rows.astype(np.int32),
        lambda rows: rows.astype(">f4"),
        lambda rows: rows.astype(np.float16),
        lambda rows: rows.astype(np.uint64),
        lambda rows: rows[::-1][::-1],
        lambda rows: np.asfortranarray(rows),
        lambda rows: np.broadcast_to(rows, rows.shape),  # read-only
        lambda rows: [torch.from_numpy(row) for row in rows],
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_type_of_the_rows_does_not_matter(convert: Any) -> None:
    model, rows = model_of(IMAGES), images()
    assert equal(model.predict(convert(rows)), model.predict(rows))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float64, torch.bfloat16])
def test_tensors_give_tensors(dtype: torch.dtype) -> None:
    model, rows = model_of(IMAGES), images()
    answer = classify(model, torch.from_numpy(rows).to(dtype))
    assert isinstance(answer.probabilities, Tensor)
    assert isinstance(answer.labels, Tensor)
    assert equal(answer.numpy(), model.predict(rows))


@pytest.mark.filterwarnings("error")
def test_a_data_frame_is_a_table() -> None:
    model, rows = model_of(TABLE), flats()
    frame = pd.DataFrame(rows, columns=["area", "rooms"])
    assert equal(model.predict(frame), model.predict(rows))


COLUMNS = {
    **TABLE,
    "input_shape": [3],
    "input_mean": [80.0, 0.0, 0.0],
    "input_std": [20.0, 1.0, 1.0],
    "feature_names": ["area", "city"],
    "feature_categories": [[], ["Aalst", "Ghent"]],
    "target_name": "price",
}


def test_the_columns_of_a_csv_file_are_found_by_name_and_encoded() -> None:
    model = model_of(COLUMNS)
    encoded = model.predict([[70, 0, 1], [90.5, 1, 0]])
    frame = pd.DataFrame({"city": ["Ghent", "Aalst"], "price": [0, 0], "area": [70, 90.5]})
    assert equal(model.predict(frame), encoded)
    assert equal(model.predict({"area": [70, 90.5], "city": ("Ghent", "Aalst")}), encoded)
    assert equal(model.predict(dict(frame)), encoded)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"area": [70.0]}, "no column 'city'"),
        ({"area": [70, 80], "city": ["Ghent"]}, "the columns have 1 to 2 values"),
        ({"area": 70, "city": "Ghent"}, "column 'area' is 70; give a list"),
        ({"area": [70], "city": "Ghent"}, "column 'city' is 'Ghent'; give a list"),
        ({"area": ["large"], "city": ["Ghent"]}, "row 0.*column 'area'.*give a number"),
        ({"area": [None], "city": ["Ghent"]}, "row 0.*column 'area'"),
        ({"area": [], "city": []}, "give at least one row"),
        ([[70, 1]], "or give a DataFrame with the columns 'area', 'city'"),
    ],
)
def test_wrong_columns_are_refused_with_a_remedy(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model_of(COLUMNS).predict(rows)
    assert "\n" not in str(caught.value)


def test_equal_calls_give_equal_answers_and_seeds_other_draws() -> None:
    model, rows = model_of(TABLE), flats()
    assert equal(model.predict(rows), model.predict(rows, seed=3))  # the seed of the training
    assert not np.allclose(regress(model, rows).samples, regress(model, rows, seed=4).samples)
    state = torch.get_rng_state()
    model.predict(rows)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout"])
def test_a_prepared_model_gives_the_same_answers(method: str) -> None:
    model, prepared = (model_of(TABLE, method) for _ in range(2))
    prepared.method.load_state_dict(model.method.state_dict())
    assert prepared.prepare(4, seed=9) is prepared
    for options in ({"num_samples": 4, "seed": 9}, {"num_samples": 6, "seed": 9}, {"seed": 2}):
        expected, got = (each.predict(flats(), **options) for each in (model, prepared))
        assert np.array_equal(got.samples, expected.samples)


def test_a_model_is_prepared_for_its_own_draws_by_default() -> None:
    model = model_of(TABLE).prepare()
    assert model._bank is not None
    assert model._bank.covers(model.method.num_samples, model.method.seed)
    bads: tuple[Any, ...] = (0, 1.5, "many")
    for bad in bads:
        with pytest.raises((TypeError, ValueError), match="num_samples"):
            model.prepare(bad)


def test_a_row_has_the_same_answer_alone_and_in_batches() -> None:
    model, rows = model_of(TABLE), flats()
    whole, batches = regress(model, rows), regress(model, rows, batch_size=7)
    alone = regress(model, rows[30:31])
    assert np.allclose(batches.samples, whole.samples, rtol=1e-5)
    assert np.allclose(alone.samples[:, 0], whole.samples[:, 30], rtol=1e-5)


BAD_IMAGES = [
    (lambda x: x[0], r"rows of shape \[3, 4, 4\]: expected \[N, 3, 4, 4\]; .*rows\[None\]"),
    (lambda x: x.transpose(0, 2, 3, 1), "move the channels to the front"),
    (lambda x: x[:, :1], r"rows of shape \[20, 1, 4, 4\]: .*the size of the training"),
    (lambda x: x[:0], "give at least one row"),
    (lambda x: x / 255, r"row 0 .* are floats up to .*the model expects 0 to 255; multiply"),
    (lambda x: x.astype(int) * 2, r"a pixel is \d+; give pixels from 0 to 255"),
    (lambda x: x.astype(int) - 255, r"a pixel is -\d+; give pixels from 0"),
    (lambda x: np.where(x > 200, np.nan, x), r"rows of the input contain NaN .*first row 0"),
    (lambda x: np.ma.masked_array(x, x > 3), "some values are masked"),
]
BAD_TYPES: list[tuple[Any, str]] = [
    (lambda x: x.astype(str), "rows of strings: expected numbers"),
    (lambda x: x.astype(bool), "rows of booleans"),
    (lambda x: x.astype(complex), "rows of complex numbers"),
    (lambda x: x.astype(object), "rows of mixed or missing values"),
    (lambda x: x.astype("M8[s]"), "rows of dates"),
    (lambda x: "cat.png", r"rows of 'cat\.png'"),
    (lambda x: None, "rows of None"),
    (lambda x: {"pixels": x}, "rows of a dict of 1"),
    (lambda x: torch.zeros(2, 3, 4, 4, device="meta"), "give a dense tensor"),
    (lambda x: torch.from_numpy(x).to_sparse(), "give a dense tensor"),
    (lambda x: torch.from_numpy(x).bool(), "give a dense tensor"),
]


@pytest.mark.parametrize(("change", "message"), BAD_IMAGES)
def test_wrong_images_are_refused_with_a_remedy(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model_of(IMAGES).predict(change(images()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), BAD_TYPES)
def test_rows_without_numbers_are_a_type_error(change: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        model_of(IMAGES).predict(change(images()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2, 3]], r"rows of shape \[1, 3\]: expected \[N, 2\]; give the 2 features"),
        ([1, 2], r"rows\[None\]"),
        ([[1, 2], [3]], "give each row the same number of values"),
        ([], r"rows of shape \[0\]"),
        (7, r"rows of shape \[\]"),
        ([[1, float("inf")]], "first row 0"),
        ([[1e300, 1]], "so far from the training rows"),
    ],
)
def test_wrong_tables_are_refused_with_a_remedy(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(TABLE).predict(rows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_samples": 0}, ValueError),
        ({"num_samples": "3"}, TypeError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**70}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": 2.5}, TypeError),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=f"^{name}="):
        model_of(TABLE).predict(flats(), **options)


def test_a_list_of_dictionaries_is_named() -> None:
    rows = [{"area": 1.0, "city": "a"}]
    with pytest.raises(TypeError, match=r"a list of dictionaries; give an array with the numbers"):
        model_of(TABLE).predict(rows)
    facts = {**TABLE, "feature_names": ["area", "city"], "feature_categories": [[], []]}
    with pytest.raises(TypeError, match=r"a list of dictionaries; give one dictionary of columns"):
        model_of(facts).predict(rows)


def test_a_checkpoint_without_normalization_loads_and_says_why_it_cannot_predict() -> None:
    old = {k: v for k, v in IMAGES.items() if k not in ("input_scale", "input_mean", "input_std")}
    model = model_of(old)
    assert model.method.predictive(torch.zeros(2, 3, 4, 4), 2).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"how its inputs .* by an earlier version; train it ag"):
        model.predict(images())
    model.recipe["task"]["_target_"] = "my_data.Own"
    with pytest.raises(ValueError, match=r"its data set normalizes them without input_mean"):
        model.predict(images())


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint\.ckpt"):
        bqnn.load(tmp_path)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_rows_stop_early_with_the_answer_of_their_draws(is_prepared: bool) -> None:
    model = model_of(TABLE, init_rho=-4.0)
    if is_prepared:
        model.prepare(8)
    answer = regress(model, flats(), max_samples=8, tolerance=0.3)
    counts = set(answer.num_samples.tolist())
    assert counts <= {2, 4, 8}
    assert len(counts) > 1
    for count in counts:
        rows, plain = answer.num_samples == count, regress(model, flats(), num_samples=count)
        assert np.allclose(answer.std[rows], plain.std[rows], rtol=1e-4)
        assert np.allclose(answer.samples[:count, rows], plain.samples[:, rows], rtol=1e-4)
        assert np.isnan(answer.samples[count:, rows]).all()


def test_rows_without_tolerance_make_all_draws() -> None:
    answer = classify(model_of(IMAGES), images(), num_samples=3)
    assert answer.num_samples.tolist() == [3] * 20
    none = classify(model_of(IMAGES), images(), max_samples=3, tolerance=0.0)
    assert equal(none, answer)
    assert classify(model_of(IMAGES), images(), max_samples=1, tolerance=1.0).samples.shape[0] == 1


def test_a_calibrated_model_stops_early() -> None:
    model = model_of(TABLE)
    model.method.calibration = DeviationScaling(2.0)
    answer = regress(model, flats(), max_samples=8, tolerance=0.3)
    for count in set(answer.num_samples.tolist()):
        rows, plain = answer.num_samples == count, regress(model, flats(), num_samples=count)
        assert np.allclose(answer.std[rows], plain.std[rows], rtol=1e-4)


def test_an_ensemble_names_max_samples(trained: Path) -> None:
    model, rows = bqnn.load(trained / "sghmc_0"), np.zeros((1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^max_samples=9: this ensemble has . members"):
        model.predict(rows, max_samples=9, tolerance=0.1)
    assert classify(model, rows, tolerance=0.1).num_samples[0] <= 3


@pytest.mark.parametrize("facts", [TABLE, IMAGES])
@pytest.mark.parametrize("method", ["bbb", "mcdropout"])
def test_a_single_pass_predicts_as_draws_do(facts: dict[str, Any], method: str) -> None:
    model, rows = model_of(facts, method), flats() if facts is TABLE else images(200)
    model.prepare_moments(rows)
    once, drawn = model.predict(rows, predictive="moments"), model.predict(rows, 200)
    assert len(once.samples) == 100
    assert model.predict(rows, 7, predictive="moments").samples.shape[0] == 7
    if isinstance(once, RegressionAnswer):
        assert isinstance(drawn, RegressionAnswer)
        assert np.corrcoef(once.mean, drawn.mean)[0, 1] > 0.9
        epistemic = [float(np.mean(np.square(a.epistemic))) for a in (once, drawn)]
        assert epistemic[0] == pytest.approx(epistemic[1], rel=0.5)
    else:
        assert isinstance(drawn, ClassificationAnswer)
        information = [float(np.mean(a.mutual_information)) for a in (once, drawn)]
        information = [float(a.mutual_information.mean()) for a in (once, drawn)]
        assert information[0] == pytest.approx(information[1], rel=0.5)


def test_a_single_pass_without_a_factor_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(TABLE)
    first = regress(model, flats(), predictive="moments")
    assert "without prepare_moments(rows): mutual information" in caplog.text
    assert equal(regress(model, flats(), predictive="moments"), first)
    assert caplog.text.count("prepare_moments") == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"max_samples": 20}, ValueError, "max_samples=20 without tolerance"),
        ({"num_samples": 5, "tolerance": 0.1}, ValueError, "num_samples=5 with tolerance"),
        ({"tolerance": -1}, ValueError, "tolerance=-1: choose 0 or more"),
        ({"tolerance": float("nan")}, ValueError, "tolerance=nan: choose 0 or more"),
        ({"tolerance": "0.1"}, TypeError, "tolerance='0.1' is not a number"),
        ({"tolerance": 0.1, "max_samples": 0}, ValueError, "max_samples=0: choose 1 or more"),
        ({"tolerance": 0.1, "max_samples": 2.5}, TypeError, "max_samples=2.5 is not a whole"),
        ({"predictive": "moment"}, ValueError, "predictive='moment': choose draws or moments"),
        ({"predictive": None}, ValueError, "predictive=None: choose draws or moments"),
        ({"predictive": "moments", "num_samples": 0}, ValueError, "num_samples=0: choose 1"),
        ({"predictive": "moments", "tolerance": 0.1}, ValueError, "makes one pass, which cannot"),
    ],
)
def test_wrong_ways_to_predict_are_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as refusal:
        model_of(TABLE).predict(flats(), **arguments)
    assert "\n" not in str(refusal.value)


def test_a_pointwise_network_has_no_moments() -> None:
    with pytest.raises(ValueError, match="the network has no random weights and no dropout"):
        model_of(TABLE, "pointwise").predict(flats(), predictive="moments")
