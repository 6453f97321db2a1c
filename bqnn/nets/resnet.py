"""The ResNet-18 for CIFAR-10."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from bqnn.layers.markers import Add, DropoutSite, Enter, Pool
from bqnn.nets.heads import Heads
from bqnn.nets.pictures import image_shape


class ResNet(nn.Sequential):
    """Four stages of basic blocks on small images: [B, C, H, W] -> [B, sum(heads)].

    `width` is the number of channels of the first stage; each stage doubles it. 24 is the
    CIFAR-10 network of Ferianc et al. (2021), 64 the standard ResNet-18 (He et al., 2016).
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
    """Two 3x3 convolutions and a shortcut around them, a 1x1 convolution where shapes differ."""

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
