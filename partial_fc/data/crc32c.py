"""CRC-32C (Castagnoli) in numpy: of many pieces of bytes side by side, since byte after byte Python is too slow.

The state of a CRC is linear over GF(2) in what it started from and in the bytes read. So the bytes of one piece needn't
be read one after the other: the state after them is the sum (xor) of the states after its parts, each moved past the
bytes behind it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_MASK_DELTA = 0xA282EAD8
_POLYNOMIAL = 0x82F63B78  # of CRC-32C, the lowest bit first
# Pieces are cut into lanes of this many bytes, whose checksums are computed side by side.
_LANE = 512
_LANES = 1 << 13


def crc_of_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32C of rows of bytes.

    Args:
        rows: uint8 ``[n, 2 k]``, contiguous.

    Returns:
        uint32 ``[n]``.
    """
    return ~_read(np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32), rows)


def crc_of_pieces(data: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """CRC-32C of pieces of an array.

    Args:
        data: uint8 ``[size]``.
        offsets: int64 ``[n]``, of the pieces' first bytes.
        lengths: int64 ``[n]``, in bytes.

    Returns:
        uint32 ``[n]``.
    """
    if not len(offsets):
        return np.zeros(0, dtype=np.uint32)
    lanes = -(-lengths // _LANE)
    ends = np.cumsum(lanes)
    crc = np.empty(int(ends[-1]), dtype=np.uint32)
    for first in range(0, len(crc), _LANES):
        last = min(first + _LANES, len(crc))
        # Filled up with zeros before a piece's first byte, which change nothing.
        block = np.zeros((last - first) * _LANE, dtype=np.uint8)
        for row in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends - lanes, last))):
            end = (int(ends[row]) - first) * _LANE
            start = end - int(lengths[row])
            low, high = max(start, 0), min(end, len(block))
            begin = int(offsets[row]) - start
            block[low:high] = data[begin + low : begin + high]
        crc[first:last] = _read(np.zeros(last - first, dtype=np.uint32), block.reshape(-1, _LANE))
    behind = np.repeat(ends, lanes) - np.arange(len(crc)) - 1
    _shift(crc, behind * _LANE)
    sums = np.full(len(offsets), 0xFFFFFFFF, dtype=np.uint32)
    _shift(sums, lengths)
    if (filled := np.flatnonzero(lanes)).size:
        sums[filled] ^= np.bitwise_xor.reduceat(crc, (ends - lanes)[filled])
    return ~sums


def masked(crc: np.ndarray) -> np.ndarray:
    """Checksums, uint32 ``[n]``, as TFRecord files have them: rotated right by 15 bits, plus 0xa282ead8."""
    return ((crc >> 15) | (crc << 17)) + np.uint32(_MASK_DELTA)


def _read(state: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The states after rows of bytes of even length, side by side.

    Args:
        state: uint32 ``[n]``, to start from.
        rows: uint8 ``[n, 2 k]``.

    Returns:
        uint32 ``[n]``.
    """
    table = _pair_table()
    for pair in np.ascontiguousarray(rows.view("<u2").T):
        state = table[(state & 0xFFFF) ^ pair] ^ (state >> 16)
    return state


@cache
def _byte_table() -> np.ndarray:
    """What a byte does to the state, uint32 ``[256]``."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


@cache
def _pair_table() -> np.ndarray:
    """What two bytes do to the state, uint32 ``[65536]``."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        table = _byte_table()[table & 0xFF] ^ (table >> 8)
    return table


@cache
def _move_table(power: int) -> np.ndarray:
    """What ``2**power`` zero bytes make of the state, by each of its bytes: uint32 ``[4, 256]``."""
    if power:
        return _move(_move_table(power - 1), _move_table(power - 1))
    table = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], dtype=np.uint32)
    return _byte_table()[table & 0xFF] ^ (table >> 8)


def _move(crc: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[0][crc & 0xFF] ^ table[1][(crc >> 8) & 0xFF] ^ table[2][(crc >> 16) & 0xFF] ^ table[3][crc >> 24]


def _shift(crc: np.ndarray, count: np.ndarray) -> None:
    """Move states, uint32 ``[n]``, in place past so many zero bytes, int64 ``[n]``."""
    for power in range(int(count.max(initial=0)).bit_length()):
        rows = np.flatnonzero(count >> power & 1)
        crc[rows] = _move(crc[rows], _move_table(power))
