"""How the classes are split over the ranks: the DTensor ``Shard(0)`` convention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassShards:
    """Class ``j`` belongs to rank ``j // ceil(C / W)``; the last ranks may own fewer classes, or none.

    Attributes:
        num_classes: C, the number of classes over all ranks.
        world_size: W.
    """

    num_classes: int
    world_size: int

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")

    @property
    def rows_per_rank(self) -> int:
        """Classes of a full shard: ceil(C / W)."""
        return -(-self.num_classes // self.world_size)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Global class ids ``[start, end)`` of a rank's shard; ``start == end`` where the shard is empty."""
        start = min(rank * self.rows_per_rank, self.num_classes)
        return start, min(start + self.rows_per_rank, self.num_classes)
