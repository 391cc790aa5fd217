"""IResNet, the residual networks that face recognition trains: ArcFace's "R18" ... "R200" at 112 x 112.

He et al., "Deep Residual Learning" (CVPR 2016) with the changes of Deng et al., "ArcFace" (CVPR 2019, section 3.1;
`arcface_torch` is the published PyTorch form): a stem of stride 1, a block BN-Conv-BN-PReLU-Conv-BN with the stride in
its second convolution, nothing after the addition, and BN-Dropout-FC-BN ("option E") instead of a pooling.

Parameters have the names and shapes of `arcface_torch`, so that its weights load with ``load_state_dict``. As
published, the last BatchNorm has no trainable scale (its weight stays 1), and the layer that makes the embedding runs
in float32 under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STRIDE = 16
"""Pixels of the image for one cell of the last feature map."""


class IResNetBlock(nn.Module):
    """Residual block ``x + BN(Conv(PReLU(BN(Conv(BN(x))))))``; the second convolution has the stride.

    Where the shape changes, the shortcut is a strided 1x1 convolution and BatchNorm.

    Args:
        in_channels: channels of the input, float ``[b, in_channels, h, w]``.
        out_channels: channels of the output, ``[b, out_channels, ceil(h / stride), ceil(w / stride)]``.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, in_channels, h, w]`` to ``[b, out_channels, ceil(h / stride), ceil(w / stride)]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(out)) + shortcut


class IResNet(nn.Module):
    """The network: stem, four stages of 64, 128, 256 and 512 channels at half the resolution each, embedding layer.

    Args:
        blocks: blocks of each of the four stages.
        embedding_size: d, the size of the embedding.
        image_size: height and width of the images in pixels, a multiple of 16: the embedding layer has a weight for
            every cell of the last feature map.
        dropout: probability of the dropout before the embedding layer; `arcface_torch` trains with 0.
        checkpoint_blocks: recompute each block in the backward instead of keeping its activations: about a third more
            computing for a fraction of the memory. Running statistics of BatchNorm move twice a step then, as with any
            recomputed BatchNorm; their limit is the same.

    Raises:
        ValueError: for an image size, number of blocks, embedding size or dropout that can't be built.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        embedding_size: int = 512,
        image_size: int = 112,
        dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks is {list(blocks)}: IResNet has four stages of at least one block each")
        cells = feature_cells(image_size)
        check_embedding(embedding_size, dropout)
        self.embedding_size, self.image_size = embedding_size, image_size
        self.checkpoint_blocks = checkpoint_blocks
        self.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = _stage(64, 64, blocks[0])
        self.layer2 = _stage(64, 128, blocks[1])
        self.layer3 = _stage(128, 256, blocks[2])
        self.layer4 = _stage(256, 512, blocks[3])
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512 * cells * cells, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float ``[b, 3, image_size, image_size]``, to embeddings ``[b, d]`` (not normalised)."""
        check_images(x, self.image_size)
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                recompute = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        with full_precision(x):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    first = IResNetBlock(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(IResNetBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def feature_cells(image_size: int) -> int:
    """Side of the last feature map, ``image_size / 16``; ValueError where that is no whole number above 0."""
    if image_size < STRIDE or image_size % STRIDE:
        nearest = max(STRIDE, round(image_size / STRIDE) * STRIDE)
        raise ValueError(
            f"image_size is {image_size}: it has to be a multiple of {STRIDE} pixels, for example {nearest}"
        )
    return image_size // STRIDE


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of ``x``; nothing to do where that device has none (meta)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_embedding(embedding_size: int, dropout: float = 0.0) -> None:
    """Raise ValueError for an embedding size below 1 or a dropout outside ``[0, 1)``."""
    if embedding_size < 1:
        raise ValueError(f"embedding_size is {embedding_size}: it has to be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}: it's a probability, at least 0 and below 1")


def check_images(x: Tensor, image_size: int) -> None:
    """Raise ValueError where ``x`` isn't ``[b, 3, image_size, image_size]``."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"images have shape {list(x.shape)}, this backbone was built for [b, 3, {image_size}, {image_size}]: "
            "set its image_size to that of the data"
        )


def iresnet18(
    embedding_size: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_blocks: bool = False
) -> IResNet:
    """IResNet-18: 24.03 M parameters and 2.61 G multiply-adds at the defaults. Arguments as of `IResNet`."""
    return _build((2, 2, 2, 2), embedding_size, image_size, dropout, checkpoint_blocks)


def iresnet34(
    embedding_size: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_blocks: bool = False
) -> IResNet:
    """IResNet-34: 34.14 M parameters and 4.46 G multiply-adds at the defaults. Arguments as of `IResNet`."""
    return _build((3, 4, 6, 3), embedding_size, image_size, dropout, checkpoint_blocks)


def iresnet50(
    embedding_size: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_blocks: bool = False
) -> IResNet:
    """IResNet-50: 43.59 M parameters and 6.31 G multiply-adds at the defaults. Arguments as of `IResNet`."""
    return _build((3, 4, 14, 3), embedding_size, image_size, dropout, checkpoint_blocks)


def iresnet100(
    embedding_size: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_blocks: bool = False
) -> IResNet:
    """IResNet-100: 65.16 M parameters and 12.09 G multiply-adds at the defaults. Arguments as of `IResNet`."""
    return _build((3, 13, 30, 3), embedding_size, image_size, dropout, checkpoint_blocks)


def iresnet200(
    embedding_size: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_blocks: bool = False
) -> IResNet:
    """IResNet-200: 118.83 M parameters and 23.42 G multiply-adds at the defaults. Arguments as of `IResNet`."""
    return _build((6, 26, 60, 6), embedding_size, image_size, dropout, checkpoint_blocks)


def _build(
    blocks: Sequence[int], embedding_size: int, image_size: int, dropout: float, checkpoint_blocks: bool
) -> IResNet:
    return IResNet(
        blocks,
        embedding_size=embedding_size,
        image_size=image_size,
        dropout=dropout,
        checkpoint_blocks=checkpoint_blocks,
    )
