"""Data sets in memory, built by name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows, TensorData
from bqnn.data.cifar10 import CIFAR10Data
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
    "digits": DigitsData,
    "mnist": MNISTData,
    "cifar10": CIFAR10Data,
    "images": ImageFolderData,
}


def build_data(dataset: str, *, data_dir: str, seed: int, options: dict[str, object]) -> TensorData:
    """Create the named data set without reading it; `options` are its keyword arguments.

    Raises ValueError for an unknown data set or option, listing the known ones.
    """
    if dataset not in DATASETS:
        raise ArgumentError(
            f"dataset={short(dataset)}: no such data set; choose one of {', '.join(DATASETS)}",
            "dataset",
        )
    parameters = signature(DATASETS[dataset]).parameters.values()
    known = {p.name: p for p in parameters if p.name not in ("data_dir", "seed")}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ArgumentError(
            f"{', '.join(unknown)}: no option of data set {dataset}; it has {', '.join(known)}",
            *unknown,
        )
    missing = sorted(n for n, p in known.items() if p.default is p.empty and n not in options)
    if missing:
        raise ArgumentError(
            f"{', '.join(missing)}: data set {dataset} needs this option; add it", *missing
        )
    return DATASETS[dataset](data_dir=data_dir, seed=seed, **options)
