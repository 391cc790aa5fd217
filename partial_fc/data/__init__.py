"""Data sets of any format, the order of the sample stream, augmentation, streams of decoded batches, and tools.

A file imports only from files before it, in the order of ``tests/test_layers.py``.
"""

from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.dali import DaliStream, dali_available, open_stream
from partial_fc.data.decode import decode_image, decode_images
from partial_fc.data.faults import FAULT_KINDS
from partial_fc.data.order import (
    BalancedOrder,
    ClassIndex,
    IdentityOrder,
    Order,
    SampleOrder,
    WeightedOrder,
    local_positions,
)
from partial_fc.data.sources import Sources
from partial_fc.data.stream import Batch, PythonStream, SampleStream
from partial_fc.data.table import Progress

__all__ = [
    "FAULT_KINDS",
    "Archive",
    "Augmentation",
    "BalancedOrder",
    "Batch",
    "ClassIndex",
    "DaliStream",
    "IdentityOrder",
    "Order",
    "Progress",
    "PythonStream",
    "SampleOrder",
    "SampleStream",
    "Sources",
    "WeightedOrder",
    "dali_available",
    "decode_image",
    "decode_images",
    "local_positions",
    "open_archive",
    "open_stream",
]
