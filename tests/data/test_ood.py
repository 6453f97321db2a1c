"""Out-of-distribution sets."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from bqnn.data import build_data, download
from bqnn.data.base import TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.mnist import FashionMNISTData, MNISTData
from bqnn.data.ood import fashion_mnist, mnist, ood_sets, svhn
from tests.data.test_images import write_mnist

DATA_DIR = os.environ.get("BQNN_DATA_DIR", "")


def ready(dataset: str, data_dir: str = "", **options: object) -> TensorData:
    data = build_data(dataset, data_dir=data_dir, seed=0, options=options)
    data.prepare_data()
    data.setup()
    return data


def test_images_have_noise_and_negatives():
    data = ready("digits")
    sets = ood_sets(data, None)
    assert list(sets) == ["uniform", "inverted"]
    noise, no_targets = sets["uniform"]
    assert no_targets is None
    assert noise.shape == data.test.inputs.shape
    assert noise.unique().tolist() == list(range(17))
    assert noise.float().mean() == pytest.approx(8, abs=0.1)
    negatives, targets = sets["inverted"]
    assert torch.equal(negatives + data.test.inputs, torch.full_like(negatives, 16))
    assert torch.equal(targets, data.test.targets)


def test_rows_out_of_range_are_so_in_every_input_by_half_the_range_at_most():
    data = ready("synthetic", function="linear")
    rows, no_targets = ood_sets(data, ["out_of_range"])["out_of_range"]
    assert no_targets is None
    low, high = data.train.inputs.amin(0), data.train.inputs.amax(0)
    assert len(rows) == len(data.test)
    assert ((rows <= low) | (rows >= high)).all()
    assert (rows >= low - (high - low) / 2).all()
    assert (rows <= high + (high - low) / 2).all()
    assert 0.4 < (rows >= high).float().mean() < 0.6


def test_equal_sets_each_time_and_none_that_the_task_lacks():
    data = ready("digits")
    first, second = (ood_sets(data, ["uniform"])["uniform"][0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="no set 'svhn' for this task; choose from uniform, inv"):
        ood_sets(data, ["svhn"])
    assert ood_sets(data, []) == {}


def test_svhn_is_checked_read_and_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "test_32x32.mat"
    images = np.arange(32 * 32 * 3 * 2).reshape(32, 32, 3, 2).astype(np.uint8)
    scipy.io.savemat(path, {"X": images, "y": np.array([[10], [3]])})
    md5 = torchvision.datasets.utils.calculate_md5(str(path))
    entry = ["", path.name, md5]
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", entry)
    inputs, targets = svhn(CIFAR10Data(data_dir=str(tmp_path)))
    assert targets.tolist() == [0, 3]  # the file writes 0 as 10
    assert np.array_equal(inputs[1].permute(1, 2, 0), images[..., 1])


def test_data_that_cannot_be_had_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(download, "urlopen", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"https://.*test_32x32.mat .*no network.*; copy it"
    ):
        svhn(CIFAR10Data(data_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"https://.*no network.*FashionMNIST/raw"):
        fashion_mnist(MNISTData(data_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"https://.*no network.*MNIST/raw"):
        mnist(FashionMNISTData(data_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_digits_and_clothes_are_unfamiliar_to_each_other(tmp_path: Path):
    write_mnist(tmp_path)
    folder = write_mnist(tmp_path, "FashionMNIST")
    for part in ("train", "t10k"):
        path = folder / f"{part}-images-idx3-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:16] + bytes(len(content) - 16))  # all black
    for task, other, is_black in (
        ("mnist", "fashion_mnist", True),
        ("fashion_mnist", "mnist", False),
    ):
        data = ready(task, str(tmp_path))
        sets = ood_sets(data, None)
        assert list(sets) == [other, "uniform", "inverted"]
        images, targets = sets[other]
        assert bool((images == 0).all()) == is_black
        assert targets is not None
        assert targets.tolist() == [0, 1, 2, 3, 4]
        assert images.shape == data.test.inputs.shape


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "test_32x32.mat").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"test_32x32.mat is damaged .*; delete it"):
        svhn(CIFAR10Data(data_dir=str(tmp_path)))


@pytest.mark.skipif(not DATA_DIR, reason="BQNN_DATA_DIR is not set")
def test_fashion_mnist():
    data = ready("mnist", DATA_DIR)
    images, targets = ood_sets(data, ["fashion_mnist"])["fashion_mnist"]
    assert images.shape == data.test.inputs.shape
    assert targets.bincount().tolist() == [1000] * 10
    assert not torch.equal(images, data.test.inputs)
