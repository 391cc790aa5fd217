"""Training and classification with very many classes: a sharded margin softmax with support-vector guidance."""

from partial_fc import optim
from partial_fc.emphasis import Curricular, Plain, SupportVectors
from partial_fc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LabelError,
    NonFiniteError,
    PartialFCError,
)
from partial_fc.head import HeadStats, PartialFC
from partial_fc.margins import ArcFace, CombinedMargin, CosFace, NormFace, SphereFace
from partial_fc.mining import FocalLoss, HardMining
from partial_fc.norm_margins import AdaFace, MagFace

__version__ = "0.1.0"

__all__ = [
    "AdaFace",
    "ArcFace",
    "CheckpointError",
    "CombinedMargin",
    "ConfigError",
    "CosFace",
    "Curricular",
    "DataError",
    "FocalLoss",
    "HardMining",
    "HeadStats",
    "LabelError",
    "MagFace",
    "NonFiniteError",
    "NormFace",
    "PartialFC",
    "PartialFCError",
    "Plain",
    "SphereFace",
    "SupportVectors",
    "optim",
]
