"""A small residual network for CPUs: demonstrations, tests, and sets of simple images such as characters.

Depthwise convolutions save multiply-adds, but on a CPU they are bound by memory: at 112 x 112 a net of inverted
residual blocks with fewer multiply-adds took 1.4 times as long for forward and backward as one of plain 3x3
convolutions. So this is a narrow ResNet (He et al., CVPR 2016) that goes to a quarter of the resolution at once, in the
channels-last layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_fc.models.iresnet import check_embedding, check_images, feature_cells, full_precision


class SmallBlock(nn.Module):
    """Residual block ``ReLU(x + BN(Conv(ReLU(BN(Conv(x))))))`` on float ``[b, channels, h, w]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels, channels)
        self.second = _conv_bn(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, channels, h, w]`` to the same shape."""
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class SmallNet(nn.Module):
    """Two strided convolutions, then three stages of one residual block, and a linear layer with BatchNorm.

    Channels and side of the feature maps at 112 x 112: ``width / 2`` at 56, ``width`` at 28, ``2 width`` at 14,
    ``4 width`` at 7. At the defaults 0.88 M parameters and 32 M multiply-adds; one core of a 2020s server trains about
    200 images a second.

    Args:
        embedding_size: d, the size of the embedding.
        image_size: height and width of the images in pixels, a multiple of 16.
        width: channels of the first residual stage, even.
        dropout: probability of the dropout before the embedding layer.

    Raises:
        ValueError: for an image size, an embedding size, a width or a dropout that can't be built.
    """

    def __init__(self, embedding_size: int = 128, image_size: int = 112, width: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        cells = feature_cells(image_size)
        check_embedding(embedding_size, dropout)
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}: it has to be an even number of channels, at least 2")
        self.embedding_size, self.image_size = embedding_size, image_size
        self.stem = nn.ModuleList([_conv_bn(3, width // 2, stride=2), _conv_bn(width // 2, width, stride=2)])
        self.reduce = nn.ModuleList([_conv_bn(width, 2 * width, stride=2), _conv_bn(2 * width, 4 * width, stride=2)])
        self.blocks = nn.ModuleList([SmallBlock(width), SmallBlock(2 * width), SmallBlock(4 * width)])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width * cells * cells, embedding_size, bias=False)
        self.features = nn.BatchNorm1d(embedding_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float ``[b, 3, image_size, image_size]``, to embeddings ``[b, d]`` (not normalised)."""
        check_images(x, self.image_size)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.stem:
            x = functional.relu(layer(x))
        x = self.blocks[0](x)
        for layer, block in zip(self.reduce, self.blocks[1:], strict=True):
            x = block(functional.relu(layer(x)))
        x = self.dropout(torch.flatten(x, 1))
        with full_precision(x):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))


def _conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
