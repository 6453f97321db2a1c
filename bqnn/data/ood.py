"""Out-of-distribution inputs: other data sets, noise, negatives, rows out of range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bqnn.data.base import TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.download import fetch
from bqnn.data.images import ImageData
from bqnn.data.mnist import FashionMNISTData, MNISTData, fetch_missing, read_part
from bqnn.data.tables import TableData
from bqnn.files import written_beside
from bqnn.text import short

OODSet = tuple[Tensor, Tensor | None]  # inputs, and targets or None


def ood_sets(data: TensorData, names: Sequence[str] | None) -> dict[str, OODSet]:
    """Make out-of-distribution sets for a data set.

    Inputs have the format of `data.test`. Other data sets are downloaded to `data_dir` if they are
    missing.

    Args:
        data: The data set, after `setup`.
        names: The names of the sets, or None for all.

    Returns:
        Inputs [N, ...], and targets [N] or None, by name.

    Raises:
        ValueError: A name is unknown.

    Examples:
        >>> from bqnn.data.digits import DigitsData
        >>> data = DigitsData()
        >>> data.setup()
        >>> list(ood_sets(data, names=None))
        ['uniform', 'inverted']
    """
    makers: dict[str, Callable[[Any], OODSet]] = {}
    for kind, of_kind in _MAKERS.items():
        if isinstance(data, kind):
            makers |= of_kind
    for name in names or ():
        if name not in makers:
            raise ValueError(
                f"suite.ood: no set {short(name)} for this task; choose from {', '.join(makers)}"
            )
    return {name: makers[name](data) for name in (makers if names is None else names)}


def fashion_mnist(data: MNISTData) -> OODSet:
    """Return the test images of FashionMNIST (Xiao et al. 2017) and their class indices."""
    rows = read_part(fetch_missing("FashionMNIST", data.data_dir), "t10k")
    return rows.inputs, rows.targets


def mnist(data: FashionMNISTData) -> OODSet:
    """Return the test images of MNIST (LeCun et al. 1998) and their digits."""
    rows = read_part(fetch_missing("MNIST", data.data_dir), "t10k")
    return rows.inputs, rows.targets


def svhn(data: CIFAR10Data) -> OODSet:
    """Return the test images of SVHN (Netzer et al. 2011), house numbers, and their digits."""
    from torchvision.datasets import SVHN

    address, name, md5 = SVHN.split_list["test"]
    path = data.data_dir / name
    if not path.is_file():
        address = address.replace("http://", "https://")
        remedy = f"copy it to {path}, or omit this set, as in suite.ood=[uniform,inverted]"
        content = fetch(address, md5, remedy, kind="md5", largest=2**27)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(content)
    try:
        part = SVHN(str(data.data_dir), split="test")
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to download it again") from error
    return torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels).long()


def uniform_noise(data: ImageData) -> OODSet:
    """Return images of uniform noise, as many as test images, without targets."""
    generator = torch.Generator().manual_seed(0)
    shape = data.test.inputs.shape
    return torch.randint(data.white + 1, shape, dtype=torch.uint8, generator=generator), None


def inverted(data: ImageData) -> OODSet:
    """Return the negatives of the test images and their class indices."""
    return data.white - data.test.inputs, data.test.targets


def out_of_range(data: TableData) -> OODSet:
    """Return rows outside the training range in every input, by up to half of that range.

    The side and the distance are uniformly random for each input of each row. Rows have no targets.
    """
    generator = torch.Generator().manual_seed(0)
    shape = data.test.inputs.shape
    low, high = data.train.inputs.amin(0), data.train.inputs.amax(0)
    distance = torch.rand(shape, generator=generator) / 2 * (high - low)
    is_above = torch.rand(shape, generator=generator) < 0.5
    return torch.where(is_above, high + distance, low - distance), None


_MAKERS: dict[type[TensorData], dict[str, Callable[[Any], OODSet]]] = {
    MNISTData: {"fashion_mnist": fashion_mnist},
    FashionMNISTData: {"mnist": mnist},
    CIFAR10Data: {"svhn": svhn},
    ImageData: {"uniform": uniform_noise, "inverted": inverted},
    TableData: {"out_of_range": out_of_range},
}
