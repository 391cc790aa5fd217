"""MobileFaceNet: a face network of 2 M parameters for phones and for cheap experiments.

Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices" (CCBR 2018), in
the doubled-width form that `arcface_torch` publishes as ``get_mbf``: inverted residual blocks with PReLU, and a global
depthwise convolution (one weight for every cell and channel) instead of a pooling. Parameters have the names and shapes
of `arcface_torch`, so that its weights load with ``load_state_dict``.
"""

from __future__ import annotations

from torch import Tensor, nn

from partial_fc.models.iresnet import check_embedding, check_images, feature_cells, full_precision


class ConvUnit(nn.Module):
    """Convolution, BatchNorm and, unless ``linear``, PReLU, on float ``[b, in_channels, h, w]``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        if not linear:
            self.layers.append(nn.PReLU(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, in_channels, h, w]`` to ``[b, out_channels, h', w']``."""
        return self.layers(x)


class InvertedBlock(nn.Module):
    """Inverted residual: 1x1 to ``expanded`` channels, 3x3 depthwise, linear 1x1 to ``out_channels``.

    With stride 1 the input is added to the result (then ``in_channels`` equals ``out_channels``).
    """

    def __init__(self, in_channels: int, out_channels: int, expanded: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1
        self.layers = nn.Sequential(
            ConvUnit(in_channels, expanded),
            ConvUnit(expanded, expanded, 3, stride=stride, padding=1, groups=expanded),
            ConvUnit(expanded, out_channels, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, in_channels, h, w]`` to ``[b, out_channels, ceil(h / stride), ceil(w / stride)]``."""
        return self.layers(x) + x if self.residual else self.layers(x)


class InvertedStage(nn.Module):
    """``blocks`` inverted residual blocks that keep the shape ``[b, channels, h, w]``."""

    def __init__(self, channels: int, expanded: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(InvertedBlock(channels, channels, expanded) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, channels, h, w]`` to the same shape."""
        return self.layers(x)


class EmbeddingLayer(nn.Module):
    """Global depthwise convolution, linear layer, BatchNorm: ``[b, 512, cells, cells]`` to ``[b, embedding_size]``."""

    def __init__(self, cells: int, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvUnit(512, 512, cells, groups=512, linear=True),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 512, cells, cells]`` to ``[b, embedding_size]``."""
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """MobileFaceNet as `arcface_torch`'s ``get_mbf``: 2.06 M parameters, 0.44 G multiply-adds at the defaults.

    Under autocast the last 1x1 convolution and the embedding layer run in float32, as in the published form.

    Args:
        embedding_size: d, the size of the embedding.
        image_size: height and width of the images in pixels, a multiple of 16.

    Raises:
        ValueError: for an image size or an embedding size that can't be built.
    """

    def __init__(self, embedding_size: int = 512, image_size: int = 112) -> None:
        super().__init__()
        cells = feature_cells(image_size)
        check_embedding(embedding_size)
        self.embedding_size, self.image_size = embedding_size, image_size
        self.layers = nn.ModuleList(
            [
                ConvUnit(3, 128, 3, stride=2, padding=1),
                # The published doubling of the width left this at 64 groups: two channels a group, not depthwise.
                ConvUnit(128, 128, 3, padding=1, groups=64),
                InvertedBlock(128, 128, 128, stride=2),
                InvertedStage(128, 128, blocks=4),
                InvertedBlock(128, 256, 256, stride=2),
                InvertedStage(256, 256, blocks=6),
                InvertedBlock(256, 256, 512, stride=2),
                InvertedStage(256, 256, blocks=2),
            ]
        )
        self.conv_sep = ConvUnit(256, 512)
        self.features = EmbeddingLayer(cells, embedding_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images, float ``[b, 3, image_size, image_size]``, to embeddings ``[b, d]`` (not normalised)."""
        check_images(x, self.image_size)
        for layer in self.layers:
            x = layer(x)
        with full_precision(x):
            return self.features(self.conv_sep(x.to(next(self.conv_sep.parameters()).dtype)))


def mobilefacenet(embedding_size: int = 512, image_size: int = 112) -> MobileFaceNet:
    """MobileFaceNet with ``embedding_size`` outputs, for images of ``image_size`` pixels. See `MobileFaceNet`."""
    return MobileFaceNet(embedding_size, image_size)
