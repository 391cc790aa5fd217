"""Evaluation: verification of pairs of images that no training has seen."""

from __future__ import annotations

from partial_fc.evaluate.bins import Pairs, read_pairs, write_pairs
from partial_fc.evaluate.runner import embed_images, evaluate_pairs
from partial_fc.evaluate.verification import FALSE_ACCEPT_RATES, VerificationResult, verification

__all__ = [
    "FALSE_ACCEPT_RATES",
    "Pairs",
    "VerificationResult",
    "embed_images",
    "evaluate_pairs",
    "read_pairs",
    "verification",
    "write_pairs",
]
