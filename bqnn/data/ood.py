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
from bqnn.data.mnist import MNISTData, fetch_missing, read_part
from bqnn.data.tables import TableData
from bqnn.files import written_beside
from bqnn.text import short

# The authors' repository; torchvision's mirror has no https.
FASHION_MNIST = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
)

Unfamiliar = tuple[Tensor, Tensor | None]  # inputs, and targets where there are any


def unfamiliar_sets(data: TensorData, names: Sequence[str] | None) -> dict[str, Unfamiliar]:
    """Make the named sets, or all sets for this kind of data.

    They are as raw as `data.test`. Other data is downloaded to `data_dir` where it is missing.
    ValueError: no set has that name.
    """
    makers: dict[str, Callable[[Any], Unfamiliar]] = {}
    for kind, of_kind in _MAKERS.items():
        if isinstance(data, kind):
            makers |= of_kind
    for name in names or ():
        if name not in makers:
            raise ValueError(
                f"suite.ood: no set {short(name)} for this task; there are {', '.join(makers)}"
            )
    return {name: makers[name](data) for name in (makers if names is None else names)}


def fashion_mnist(data: MNISTData) -> Unfamiliar:
    """The test images of FashionMNIST (Xiao et al. 2017) and the numbers of their classes."""
    from torchvision.datasets import FashionMNIST

    folder = data.data_dir / "FashionMNIST" / "raw"
    fetch_missing(FashionMNIST, folder, FASHION_MNIST)
    rows = read_part(folder, "t10k")
    return rows.inputs, rows.targets


def svhn(data: CIFAR10Data) -> Unfamiliar:
    """The test images of SVHN (Netzer et al. 2011), house numbers, and their digits."""
    from torchvision.datasets import SVHN

    address, name, md5 = SVHN.split_list["test"]
    path = data.data_dir / name
    if not path.is_file():
        address = address.replace("http://", "https://")
        remedy = f"put it at {path}, or leave the set out, as in suite.ood=[uniform,inverted]"
        content = fetch(address, md5, remedy, kind="md5", largest=2**27)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(content)
    try:
        part = SVHN(str(data.data_dir), split="test")
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
    return torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels).long()


def uniform_noise(data: ImageData) -> Unfamiliar:
    """Images of uniform noise, as many as test images, without classes."""
    generator = torch.Generator().manual_seed(0)
    shape = data.test.inputs.shape
    return torch.randint(data.white + 1, shape, dtype=torch.uint8, generator=generator), None


def inverted(data: ImageData) -> Unfamiliar:
    """The negatives of the test images, with their classes."""
    return data.white - data.test.inputs, data.test.targets


def out_of_range(data: TableData) -> Unfamiliar:
    """Rows that lie outside the training range in every input, by up to half of that range.

    On which side and how far is drawn uniformly for each input of each row. There is no target.
    """
    generator = torch.Generator().manual_seed(0)
    shape = data.test.inputs.shape
    low, high = data.train.inputs.amin(0), data.train.inputs.amax(0)
    distance = torch.rand(shape, generator=generator) / 2 * (high - low)
    is_above = torch.rand(shape, generator=generator) < 0.5
    return torch.where(is_above, high + distance, low - distance), None


_MAKERS: dict[type[TensorData], dict[str, Callable[[Any], Unfamiliar]]] = {
    MNISTData: {"fashion_mnist": fashion_mnist},
    CIFAR10Data: {"svhn": svhn},
    ImageData: {"uniform": uniform_noise, "inverted": inverted},
    TableData: {"out_of_range": out_of_range},
}
