"""The LeNet for MNIST and other small images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bqnn.layers.markers import DropoutSite, Enter
from bqnn.nets.heads import Heads
from bqnn.nets.image_shape import image_shape


class LeNet(nn.Sequential):
    """Two 5x5 convolutions with max-pooling and a hidden layer: [B, C, H, W] -> [B, sum(heads)].

    With 1x28x28 inputs it is the MNIST network of Ferianc et al. (2021). Layers have no biases. MC
    dropout drops channels before the second convolution, and features before the linear layers.

    Args:
        input_shape: Channels, height and width, with at least 4x4 pixels.
        heads: The number of outputs of each head.
        channels: The numbers of channels of the two convolutions.
        hidden_features: The size of the hidden layer.

    Raises:
        ValueError: The input shape is not that of an image, or too small.

    Examples:
        >>> import torch
        >>> net = LeNet([1, 28, 28], heads=[10])
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        heads: Sequence[int],
        *,
        channels: Sequence[int] = (20, 50),
        hidden_features: int = 500,
    ) -> None:
        in_channels, height, width = image_shape(input_shape, smallest=4)
        first, second = channels
        features = nn.Sequential(
            Enter(),
            nn.Conv2d(in_channels, first, 5, padding=2, bias=False),
            nn.MaxPool2d(2),
            DropoutSite(),
            nn.Conv2d(first, second, 5, padding=2, bias=False),
            nn.MaxPool2d(2),
            nn.Flatten(),
            DropoutSite(),
            nn.Linear(second * (height // 4) * (width // 4), hidden_features, bias=False),
            nn.ReLU(),
        )
        site = DropoutSite(before_output=True)
        output = Heads(hidden_features, heads, bias=False)
        super().__init__(OrderedDict(features=features, site=site, output=output))
