"""The facts of a data set contain its normalization: raw rows become its batch inputs."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from bqnn.data import DigitsData, TensorData
from bqnn.data.image_folder import ImageFolderData
from bqnn.data.normalization import Normalization
from bqnn.data.synthetic import SyntheticData


def stored(data: TensorData) -> Normalization:
    found = Normalization.from_facts(json.loads(json.dumps(data.facts())))
    assert found is not None
    return found


def test_digits_are_scaled() -> None:
    data = DigitsData()
    data.setup()
    rows = data.test.inputs
    assert torch.equal(stored(data)(rows), data.normalize(rows))
    assert torch.equal(stored(data)(rows.double()), data.normalize(rows))


def test_images_are_normalized_per_channel(tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for row, pixels in enumerate(colors):
            folder = tmp_path / part / str(row % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{row}.png")
    data = ImageFolderData(str(tmp_path), mean=[0.1, 0.2, 0.3], std=[1, 2, 3], validation_share=0)
    data.setup()
    rows = data.test.inputs
    assert torch.equal(stored(data)(rows), data.normalize(rows))


def test_tables_are_standardized_in_float64() -> None:
    data = SyntheticData()
    data.setup()
    rows = data.grid()
    assert torch.equal(stored(data)(rows), data.standardize(rows))
    assert stored(data)(rows).dtype == torch.float32


def test_facts_without_a_mean_have_no_normalization() -> None:
    assert Normalization.from_facts({"input_shape": [3]}) is None


class Own(TensorData):
    """A data set of a user, with inputs [2, 3]."""

    more: ClassVar[dict[str, object]] = {}

    def facts(self) -> dict[str, object]:
        return {"likelihood": "regression", "input_shape": [2, 3], "num_train": 4, **self.more}


class Scaled(Own):
    def normalize(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs / 2


class Described(Own):
    more: ClassVar[dict[str, object]] = {"input_mean": [1.0, 2.0], "input_std": [1.0, 2.0]}


def facts_of(kind: type[Own]) -> dict[str, object]:
    data = kind(data_dir="data", seed=0, batch_size=2, validation_share=0.0)
    return data.recipe_facts()


def test_a_data_set_that_does_not_normalize_has_the_identity() -> None:
    normalization = Normalization.from_facts(facts_of(Own))
    rows = torch.randn(5, 2, 3)
    assert normalization is not None
    assert torch.equal(normalization(rows), rows)
    assert "input_mean" not in facts_of(Scaled)
    described = Normalization.from_facts(facts_of(Described))
    assert described == Normalization([1.0, 2.0], [1.0, 2.0])
    channels = [(rows[:, 0] - 1), (rows[:, 1] - 2) / 2]
    torch.testing.assert_close(described(rows), torch.stack(channels, 1))
