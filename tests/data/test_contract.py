"""All data sets pass the contract of data sets."""

from pathlib import Path
from typing import Any

import pytest

from bqnn.data import TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.digits import DigitsData
from bqnn.data.image_folder import ImageFolderData
from bqnn.data.mnist import FashionMNISTData, MNISTData
from bqnn.data.synthetic import SyntheticData
from bqnn.data.uci import UCIData
from bqnn.testing import DataContract
from tests.data.test_images import write_images, write_mnist
from tests.data.test_uci import write_table


class InFolder(DataContract):
    """The contract for a data set with files in a folder."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.write()

    def write(self) -> None:
        raise NotImplementedError


class TestSynthetic(DataContract):
    def make(self, **options: Any) -> TensorData:
        return SyntheticData(**options)


class TestDigits(DataContract):
    def make(self, **options: Any) -> TensorData:
        return DigitsData(**options)


class TestUCI(InFolder):
    def write(self) -> None:
        write_table(self.folder)

    def make(self, **options: Any) -> TensorData:
        return UCIData("t", data_dir=str(self.folder), **options)


class TestMNIST(InFolder):
    has_unique_rows = False

    def write(self) -> None:
        write_mnist(self.folder)

    def make(self, **options: Any) -> TensorData:
        return MNISTData(data_dir=str(self.folder), **options)


class TestFashionMNIST(InFolder):
    has_unique_rows = False

    def write(self) -> None:
        write_mnist(self.folder, "FashionMNIST")

    def make(self, **options: Any) -> TensorData:
        return FashionMNISTData(data_dir=str(self.folder), **options)


class TestImageFolder(InFolder):
    has_unique_rows = False  # the two parts have equal images

    def write(self) -> None:
        write_images(self.folder)

    def make(self, **options: Any) -> TensorData:
        return ImageFolderData(str(self.folder), crop_padding=1, flip=True, **options)


class TestCIFAR10(InFolder):
    has_unique_rows = False

    def write(self) -> None:
        write_images(self.folder / "cifar10", size=(32, 32))

    def make(self, **options: Any) -> TensorData:
        return CIFAR10Data("folder", data_dir=str(self.folder), **options)
