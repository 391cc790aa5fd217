"""Training and classification with very many classes: a sharded margin softmax with support-vector guidance."""

from partial_fc import optim
from partial_fc.emphasis import Plain, SupportVectors
from partial_fc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LabelError,
    NonFiniteError,
    PartialFCError,
)
from partial_fc.head import HeadStats, PartialFC
from partial_fc.margins import ArcFace, CombinedMargin, CosFace, NormFace

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "CheckpointError",
    "CombinedMargin",
    "ConfigError",
    "CosFace",
    "DataError",
    "HeadStats",
    "LabelError",
    "NonFiniteError",
    "NormFace",
    "PartialFC",
    "PartialFCError",
    "Plain",
    "SupportVectors",
    "optim",
]
