"""Data sets in memory, built by name."""

from __future__ import annotations

from collections.abc import Callable

from bqnn.arguments import ArgumentError, keywords, required
from bqnn.data.base import Rows, TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.csv_table import CSVData
from bqnn.data.digits import DigitsData
from bqnn.data.image_folder import ImageFolderData
from bqnn.data.loader import TensorLoader
from bqnn.data.mnist import FashionMNISTData, MNISTData
from bqnn.data.synthetic import SyntheticData
from bqnn.data.uci import UCIData
from bqnn.plugins import find_class

__all__ = ["DATASETS", "Rows", "TensorData", "TensorLoader", "build_data"]

DATASETS: dict[str, Callable[..., TensorData]] = {
    "synthetic": SyntheticData,
    "uci": UCIData,
    "table": CSVData,
    "digits": DigitsData,
    "mnist": MNISTData,
    "fashion_mnist": FashionMNISTData,
    "cifar10": CIFAR10Data,
    "images": ImageFolderData,
}


def build_data(
    dataset: str,
    *,
    data_dir: str,
    seed: int,
    options: dict[str, object],
    target: str | None = None,
) -> TensorData:
    """Create a data set by name, without reading it.

    Args:
        dataset: A key of `DATASETS`, or the name of an entry point of another package.
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        options: The other arguments of the data set, by name.
        target: The path of the class of a data set in another package; `dataset` is then a label.

    Raises:
        ValueError: The data set or an option is unknown, or a required option is missing. The
            message lists the known ones.

    Examples:
        >>> data = build_data("digits", data_dir="data", seed=0, options={"batch_size": 32})
        >>> data.batch_size
        32
    """
    named = {"dataset": dataset} | ({} if target is None else {"_target_": target})
    made = find_class("task", named, DATASETS, TensorData)
    known = keywords(made) - {"data_dir", "seed"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ArgumentError(
            f"{', '.join(unknown)}: unknown option of the data set {dataset}; choose from "
            f"{', '.join(sorted(known))}",
            *unknown,
        )
    missing = sorted(required(made) - {"data_dir", "seed"} - options.keys())
    if missing:
        raise ArgumentError(
            f"{', '.join(missing)}: required by the data set {dataset}; add it", *missing
        )
    data: TensorData = made(data_dir=data_dir, seed=seed, **options)
    return data
