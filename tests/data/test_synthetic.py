"""Synthetic data, and the behavior of all data sets."""

import json

import pytest
import torch
from pytorch_lightning import LightningModule

from bqnn.data import DATASETS, build_data
from bqnn.data.synthetic import SyntheticData
from tests.bare_trainer import bare_trainer


def read(**options: object) -> SyntheticData:
    data = SyntheticData(**options)
    data.prepare_data()
    data.setup()
    return data


def original_inputs(data: SyntheticData, standardized: torch.Tensor) -> torch.Tensor:
    return standardized.double() * data.input_std + data.input_mean


def test_inputs_leave_the_gap_open():
    data = read(num_train=1000)
    x = original_inputs(data, data.train.inputs).abs()
    assert x.min() >= 1 - 1e-5
    assert x.max() <= 4 + 1e-5


@pytest.mark.parametrize("function", ["gap", "linear"])
def test_residuals_have_the_known_noise(function):
    data = read(function=function, num_train=20_000, validation_share=0.0)
    x = original_inputs(data, data.train.inputs).squeeze(1)
    y = data.train.targets.double() * data.target_std + data.target_mean
    mean, std = data.truth(x)
    residual = (y - mean) / std
    assert residual.mean().abs() < 0.03
    assert (residual.std() - 1).abs() < 0.03


def test_linear_function_is_two_x_plus_eight():
    mean, std = SyntheticData("linear").truth(torch.tensor([-1.0, 0.0, 3.0]))
    assert mean.tolist() == [6, 8, 14]
    assert std.tolist() == [1, 1, 1]


def test_grid_is_in_original_units_and_standardizes_like_the_rows():
    data = read()
    grid = data.grid(7)
    assert grid.flatten().tolist() == [-6, -4, -2, 0, 2, 4, 6]
    torch.testing.assert_close(original_inputs(data, data.standardize(grid)), grid)
    assert data.standardize(grid).dtype == torch.float32


def test_the_data_seed_alone_fixes_the_rows():
    first, second = read(seed=1, validation_share=0.0), read(seed=2, validation_share=0.0)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.targets, second.test.targets)
    other = read(seed=1, validation_share=0.0, data_seed=1)
    assert not torch.equal(first.train.inputs, other.train.inputs)


def test_train_rows_have_mean_zero_and_std_one():
    train = read().train
    for values in (train.inputs.squeeze(1), train.targets):
        torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0))


def all_rows(data: SyntheticData) -> tuple[set[float], set[float]]:
    """Return training and validation inputs in original units, rounded."""
    assert data.val is not None
    train, val = (
        {round(x, 4) for x in original_inputs(data, rows.inputs).flatten().tolist()}
        for rows in (data.train, data.val)
    )
    return train, val


def test_validation_rows_are_taken_out_of_the_training_part():
    data = read(num_train=100, validation_share=0.2)
    train, val = all_rows(data)
    everything = read(num_train=100, validation_share=0.0)
    whole = original_inputs(everything, everything.train.inputs).flatten()
    assert (len(data.train), len(data.val), len(data.test)) == (80, 20, 200)
    assert not train & val
    held = torch.tensor(sorted(train | val), dtype=torch.float64)
    torch.testing.assert_close(held, whole.sort().values, atol=1e-4, rtol=0)


def test_a_share_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="none of the 1 rows"):
        read(num_train=1, validation_share=0.5)


@pytest.mark.parametrize(
    "options", [{"function": "cubic"}, {"num_train": 0}, {"num_test": 0}], ids=str
)
def test_an_impossible_option_is_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SyntheticData(**options)


def test_facts_survive_json():
    data = read(num_train=50)
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["likelihood"] == "regression"
    assert facts["input_shape"] == [1]
    assert facts["num_train"] == len(data.train) == 40


class Recorder(LightningModule):
    """Records the targets of each epoch without training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[float]] = []
        self.inputs: dict[str, torch.Tensor] = {}

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1] += batch[1].tolist()
        self.inputs["train"] = batch[0]
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.inputs["val"] = batch[0]

    def test_step(self, batch, batch_idx):
        self.inputs["test"] = batch[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Marked(SyntheticData):
    """Marks inputs with the hooks that they went through."""

    def normalize(self, inputs):
        return inputs * 0 + 2 * (inputs == -1) + 3

    def augment(self, inputs):
        return inputs * 0 - 1


def test_lightning_trains_each_epoch_in_its_own_order_and_augments_training_alone(tmp_path):
    data, model = Marked(batch_size=64), Recorder()
    trainer = bare_trainer(2, num_sanity_val_steps=0, default_root_dir=tmp_path)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    first, second = model.epochs
    assert sorted(first) == sorted(second) == sorted(data.train.targets.tolist())
    assert first != second
    assert {name: set(x.flatten().tolist()) for name, x in model.inputs.items()} == {
        "train": {5.0},  # augmented, then normalized
        "val": {3.0},
        "test": {3.0},
    }
    assert len(model.inputs["val"]) == len(data.val)
    assert len(model.inputs["test"]) == len(data.test)


def test_data_sets_are_built_by_name():
    data = build_data(
        "synthetic", data_dir="data", seed=7, options={"function": "linear", "num_train": 30}
    )
    assert isinstance(data, SyntheticData)
    assert (data.seed, data.function, data.num_train) == (7, "linear", 30)
    images = {"digits", "mnist", "fashion_mnist", "cifar10", "images"}
    assert set(DATASETS) == {"synthetic", "uci", "table", *images}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("svhn", {}, "dataset='svhn'.*synthetic, uci"),
        ("synthetic", {"rows": 3}, "rows: unknown option of the data set synthetic.*num_train"),
        ("uci", {"seed": 3, "table": "yacht"}, "seed: unknown option"),
        ("uci", {}, "table: required by the data set uci"),
    ],
)
def test_unknown_names_and_options_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        build_data(dataset, data_dir="data", seed=0, options=options)
