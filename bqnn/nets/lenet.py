"""The LeNet for MNIST and other small images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bqnn.layers.markers import DropoutSite, Enter
from bqnn.nets.heads import Heads
from bqnn.nets.pictures import image_shape


class LeNet(nn.Sequential):
    """Two 5x5 convolutions with max-pooling, one hidden layer: [B, C, H, W] -> [B, sum(heads)].

    At 1x28x28 this is the MNIST network of Ferianc et al. (2021); smaller pictures keep its
    layers and get a smaller hidden layer's input. No biases. Dropout takes whole channels before
    the second convolution and single features before the linear layers.
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
