"""Data sets in memory, built by name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows, TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.csv_table import CSVData
from bqnn.data.digits import DigitsData
from bqnn.data.image_folder import ImageFolderData
from bqnn.data.loader import TensorLoader
from bqnn.data.mnist import MNISTData
from bqnn.data.synthetic import SyntheticData
from bqnn.data.uci import UCIData
from bqnn.text import short

__all__ = ["DATASETS", "Rows", "TensorData", "TensorLoader", "build_data"]

DATASETS: dict[str, Callable[..., TensorData]] = {
    "synthetic": SyntheticData,
    "uci": UCIData,
    "table": CSVData,
    "digits": DigitsData,
    "mnist": MNISTData,
    "cifar10": CIFAR10Data,
    "images": ImageFolderData,
}


def build_data(dataset: str, *, data_dir: str, seed: int, options: dict[str, object]) -> TensorData:
    """Create a data set by name, without reading it.

    Args:
        dataset: A key of `DATASETS`.
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        options: The other arguments of the data set, by name.

    Raises:
        ValueError: The data set or an option is unknown, or a required option is missing. The
            message lists the known ones.

    Example:
        >>> data = build_data("digits", data_dir="data", seed=0, options={"batch_size": 32})
        >>> data.batch_size
        32
    """
    if dataset not in DATASETS:
        raise ArgumentError(
            f"dataset={short(dataset)}: unknown data set; choose one of {', '.join(DATASETS)}",
            "dataset",
        )
    parameters = signature(DATASETS[dataset]).parameters.values()
    known = {p.name: p for p in parameters if p.name not in ("data_dir", "seed")}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ArgumentError(
            f"{', '.join(unknown)}: unknown option of the data set {dataset}; choose from "
            f"{', '.join(known)}",
            *unknown,
        )
    missing = sorted(n for n, p in known.items() if p.default is p.empty and n not in options)
    if missing:
        raise ArgumentError(
            f"{', '.join(missing)}: required by the data set {dataset}; add it", *missing
        )
    return DATASETS[dataset](data_dir=data_dir, seed=seed, **options)
