"""Backbones: images ``[b, 3, H, W]`` to embeddings ``[b, d]``. They import torch only."""

from partial_fc.models.iresnet import IResNet, iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from partial_fc.models.mobilefacenet import MobileFaceNet, mobilefacenet
from partial_fc.models.small import SmallNet

__all__ = [
    "IResNet",
    "MobileFaceNet",
    "SmallNet",
    "iresnet18",
    "iresnet34",
    "iresnet50",
    "iresnet100",
    "iresnet200",
    "mobilefacenet",
]
