"""The ResNet-18 for CIFAR-10."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from bqnn.layers.markers import Add, DropoutSite, Enter, Pool
from bqnn.nets.heads import Heads
from bqnn.nets.image_shape import image_shape


class ResNet(nn.Sequential):
    """ResNet for small images, with four stages of basic blocks: [B, C, H, W] -> [B, sum(heads)].

    Width 24 is the CIFAR-10 network of Ferianc et al. (2021), and width 64 the standard ResNet-18
    (He et al. 2016).

    Args:
        input_shape: Channels, height and width, with at least 8x8 pixels.
        heads: The number of outputs of each head.
        width: The number of channels of the first stage; each stage doubles it.
        blocks_per_stage: The number of blocks in each stage.

    Raises:
        ValueError: The input shape is not that of an image, or too small.

    Examples:
        >>> import torch
        >>> net = ResNet([3, 32, 32], heads=[10], width=4)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        heads: Sequence[int],
        *,
        width: int = 24,
        blocks_per_stage: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        in_channels, _, _ = image_shape(input_shape, smallest=8)
        stem = nn.Sequential(
            Enter(),
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks_per_stage):
            for index in range(count):
                out_channels = width * 2**stage
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(channels, out_channels, stride))
                channels = out_channels
        super().__init__(
            OrderedDict(
                stem=stem,
                blocks=nn.Sequential(*blocks),
                pool=Pool(),
                site=DropoutSite(before_output=True),
                output=Heads(channels, heads, bias=False),
            )
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: [B, C, H, W] -> [B, C', H / stride, W / stride].

    The shortcut is a 1x1 convolution if the shapes of inputs and outputs differ.

    Args:
        in_channels: The number of input channels C.
        out_channels: The number of output channels C'.
        stride: The stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            DropoutSite(),
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            DropoutSite(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                DropoutSite(),
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.residual(x), self.shortcut(x))
