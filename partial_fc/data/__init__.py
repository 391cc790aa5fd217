"""Data sets, the order of the sample stream, augmentation, and the streams of decoded batches.

A file imports only from files before it: order, readers, augment, decode, stream, dali, prepare, and the makers of
procedural data.
"""

from partial_fc.data.augment import Augmentation
from partial_fc.data.dali import DaliStream, dali_available, open_stream
from partial_fc.data.decode import decode_image, decode_images
from partial_fc.data.order import SampleOrder, local_positions
from partial_fc.data.readers import RecordReader
from partial_fc.data.stream import Batch, PythonStream, SampleStream

__all__ = [
    "Augmentation",
    "Batch",
    "DaliStream",
    "PythonStream",
    "RecordReader",
    "SampleOrder",
    "SampleStream",
    "dali_available",
    "decode_image",
    "decode_images",
    "local_positions",
    "open_stream",
]
