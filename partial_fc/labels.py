"""A batch's labels on their way to the head: gathered early, checked, on host and device without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.errors import LabelError, NonFiniteError
from partial_fc.sampling import SampledClasses
from partial_fc.step import row_of


@dataclass
class Prepared:
    """Labels gathered early, and what follows from them.

    Attributes:
        given: what the caller passed.
        sizes: rows of each rank.
        unchecked: ``[B]`` global labels as they came.
        labels: ``[B]`` on the device of the weight, 0 where one is out of range.
        bad: 0-dim bool, whether one is; None where that was raised at once.
        on_host: ``labels`` on the host, from which classes are sampled; None where nothing is sampled.
        arrived: recorded once ``on_host`` is filled; None: it is.
        trains: whether ``sampled`` was made for a training step.
        sampled: the classes to walk; None: all, or not sampled yet.
    """

    given: Tensor
    sizes: list[int]
    unchecked: Tensor
    labels: Tensor
    bad: Tensor | None
    on_host: Tensor | None
    arrived: torch.cuda.Event | None
    trains: bool
    sampled: SampledClasses | None = None


class DeferredCheck:
    """A failure that the device found, to be read without stalling it: flags are copied while it works on.

    Args:
        bad_labels: 0-dim bool.
        failed: 0-dim bool.
        reasons: what to look at after a failure; each raises where it finds the reason.
    """

    def __init__(self, bad_labels: Tensor, failed: Tensor, reasons: Sequence[Callable[[], None]]) -> None:
        flags = torch.stack([bad_labels, failed])
        self._reasons = reasons
        self._copied = None
        if flags.is_cuda:
            self._flags = torch.empty(2, dtype=torch.bool, device="cpu", pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags

    def check(self) -> None:
        """Wait until the flags are there, and raise."""
        if self._copied is not None:
            self._copied.synchronize()
        if any(self._flags.tolist()):
            for look in self._reasons:
                look()
            raise NonFiniteError(
                "the loss of the last step isn't finite although all embeddings are: expected finite class centres "
                "(nothing was trained on this batch; go back to an earlier saved model)"
            )


def raise_labels(gathered: Tensor, sizes: Sequence[int], num_classes: int) -> None:
    """Raise a LabelError where a label ``[B]`` is outside ``[0, num_classes)``."""
    outside = ((gathered < 0) | (gathered >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise LabelError(
            f"label {int(gathered[row])} in {row_of(sizes, row)} is outside [0, {num_classes}): expected a class id "
            "of the head (raise num_classes, or look at the data set's labels)"
        )


def to_host(labels: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The labels on the host, and what tells that they have arrived; nothing waits."""
    if not labels.is_cuda:
        return labels, None
    there = torch.empty(labels.shape, dtype=labels.dtype, device="cpu", pin_memory=True)
    there.copy_(labels, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host doesn't wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
