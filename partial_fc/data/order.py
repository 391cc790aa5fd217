"""Which sample stands at which position of the endless training stream, and which positions a rank takes.

Position p is sample ``perm(seed, p // N)[p % N]`` of N, with a keyed permutation evaluated per index: nothing is stored
or shuffled, an epoch holds every sample exactly once, and resuming needs one integer. The world size has no part in it.
"""

from __future__ import annotations

import numpy as np

from partial_fc.errors import ConfigError
from partial_fc.permutation import KeyedPermutation, hash64

# Keeps this stream of keys apart from the others that are made from the same seed.
_STREAM_TAG = 0x0DE5


class SampleOrder:
    """The order of the endless sample stream: a function of (seed, position).

    Args:
        num_samples: N, samples in the data set.
        seed: any integer.

    Raises:
        ConfigError: ``num_samples`` is less than 1.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"an order needs 1 sample or more, got num_samples={num_samples}: check data.path")
        self.num_samples = num_samples
        self.seed = seed

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Samples at these positions.

        Args:
            positions: int64 array ``[n]``, values from 0; they may span any number of epochs.

        Returns:
            int64 array ``[n]``, values in ``[0, num_samples)``.

        Raises:
            ConfigError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ConfigError(f"a position of the sample stream is 0 or more, got {positions.min()}")
        epochs, index = np.divmod(positions, self.num_samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            permutation = KeyedPermutation(self.num_samples, hash64(self.seed, _STREAM_TAG, epoch))
            ids[rows] = permutation(index[rows])
        return ids


def local_positions(start: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of a rank in the global batch ``[start, start + B)``: its rows ``[rB//W, (r+1)B//W)``.

    Args:
        start: position of the global batch's first sample, 0 or more.
        batch_size: B, the global batch.
        rank: r, in ``[0, W)``.
        world_size: W.

    Returns:
        int64 array ``[b]``; the ranks' arrays, joined in rank order, are ``start, ..., start + B - 1``.

    Raises:
        ConfigError: B is less than W (a rank would get no row), or an argument is out of its range.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}")
    if batch_size < world_size:
        raise ConfigError(
            f"a global batch of {batch_size} can't be split over {world_size} ranks, each needs a row: "
            f"set train.batch_size to {world_size} or more, or start fewer processes"
        )
    if start < 0:
        raise ConfigError(f"a position of the sample stream is 0 or more, got {start}")
    first, last = rank * batch_size // world_size, (rank + 1) * batch_size // world_size
    return np.arange(start + first, start + last, dtype=np.int64)
