"""Embedding the images of a verification set with all ranks at once, and scoring its pairs.

Legend: m images, d embedding size, W ranks. Images are embedded in fixed batches of ``batch_size``, which don't
depend on W; each rank takes consecutive whole batches. So the embeddings are the same, bit for bit, at any W, on
equal machines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from partial_fc import errors
from partial_fc.errors import ConfigError, DataError, NonFiniteError, PartialFCError
from partial_fc.evaluate.bins import Pairs, read_pairs
from partial_fc.evaluate.verification import FALSE_ACCEPT_RATES, VerificationResult, verification

Decode = Callable[[Sequence[bytes]], Tensor]
T = TypeVar("T")


def evaluate_pairs(
    backbone: nn.Module,
    pairs: Pairs | str | os.PathLike[str],
    *,
    decode: Decode,
    batch_size: int = 128,
    folds: int = 10,
    false_accept_rates: Sequence[float] = FALSE_ACCEPT_RATES,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    flip: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> VerificationResult:
    """Embed the distinct images of a verification set on all ranks and score its pairs. A collective call.

    Args:
        backbone: see :func:`embed_images`, as all arguments that are not named here.
        pairs: a set that was read, the same on all ranks; or the path of a ``.bin``, which each rank reads.
        decode: encoded images -> float32 ``[n, 3, H, W]``.
        batch_size: images in a forward.
        folds: see :func:`~partial_fc.evaluate.verification.verification`.
        false_accept_rates: likewise.
        rank: see :func:`embed_images`.
        world_size: likewise.
        process_group: likewise.
        device: likewise.
        flip: likewise.
        autocast_dtype: likewise.

    Returns:
        The same result on every rank.

    Raises:
        PartialFCError: as :func:`read_pairs`, :func:`embed_images` and ``verification``; the same on every rank.
    """
    if isinstance(pairs, Pairs):
        loaded, name = pairs, ""
    else:
        path, ranks = pairs, _Ranks(rank, world_size, process_group, torch.device(device))
        # One rank may lack the file, or hold another one.
        loaded, _ = ranks.together(lambda: read_pairs(path), lambda found: (len(found), len(found.images)))
        name = f"{path}: "
    try:
        embeddings = embed_images(
            backbone,
            loaded.images,
            decode=decode,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            process_group=process_group,
            device=device,
            flip=flip,
            autocast_dtype=autocast_dtype,
        )
        return verification(embeddings.numpy(), loaded.left, loaded.right, loaded.same, folds, false_accept_rates)
    except PartialFCError as error:
        raise type(error)(f"{name}{error}") from error


def embed_images(
    backbone: nn.Module,
    images: Sequence[bytes],
    *,
    decode: Decode,
    batch_size: int = 128,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    flip: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed images, each rank a share of them. A collective call of all ranks of the group.

    The embedding of an image x is f(x) + f(mirrored x), or f(x) without ``flip``, divided by its norm. The backbone
    is in eval mode for the time of the call, and all ranks use the buffers (BatchNorm statistics) of rank 0, which
    are those that a saved model holds: otherwise embeddings of different ranks would come from different models. Mode
    and buffers are put back. A ``DistributedDataParallel`` wrapper is passed by, because its first forward broadcasts
    buffers and a rank may have nothing to embed.

    A rank that fails doesn't leave the others waiting: all ranks learn of it before embeddings are exchanged, and
    raise.

    Args:
        backbone: float ``[n, 3, H, W]`` -> ``[n, d]``, on ``device``; the same weights on every rank.
        images: the m encoded images, the same on every rank.
        decode: encoded images -> float32 ``[n, 3, H, W]``, for instance ``decode_images`` with its size given.
        batch_size: images in a forward, the same on every rank; for even shares well below m / W.
        rank: this process in the group; default: as the group says. Only a check: another number is an error.
        world_size: number of ranks; likewise.
        process_group: the ranks that share the work; default: the default group where there is one, else one process.
        device: where the backbone is.
        flip: add the embedding of the mirrored image.
        autocast_dtype: bfloat16 or float16 for the forward; None: the backbone's own type.

    Returns:
        float32 ``[m, d]`` on the CPU, rows of norm 1, the same on every rank.

    Raises:
        DataError: where an image can't be decoded.
        NonFiniteError: where an embedding has a NaN or an infinity.
        ConfigError: for arguments that can't be used or differ between the ranks.
        RuntimeError: where a rank fails in another way; its own error with one process.
    """
    device = torch.device(device)
    ranks = _Ranks(rank, world_size, process_group, device)
    while isinstance(backbone, DistributedDataParallel):
        backbone = backbone.module

    def share() -> Tensor:
        if batch_size < 1 or not images:
            raise ConfigError(
                f"batch_size is {batch_size} and there are {len(images)} images: expected at least 1 of each"
            )
        batches = -(-len(images) // batch_size)
        mine = range(ranks.rank * batches // ranks.world_size, (ranks.rank + 1) * batches // ranks.world_size)
        parts = [
            _embed_batch(backbone, images, number * batch_size, batch_size, decode, device, flip, autocast_dtype)
            for number in mine
        ]
        return torch.cat(parts) if parts else torch.empty(0, 0)

    with torch.no_grad(), _as_saved(backbone, ranks):
        rows, shapes = ranks.together(share, lambda rows: tuple(rows.shape), same=(len(images), batch_size, flip))
    return ranks.gather_rows(rows, shapes)


def _embed_batch(
    backbone: nn.Module,
    images: Sequence[bytes],
    begin: int,
    batch_size: int,
    decode: Decode,
    device: torch.device,
    flip: bool,
    autocast_dtype: torch.dtype | None,
) -> Tensor:
    """Unit embeddings ``[n, d]`` of the images from ``begin``, at most ``batch_size``, float32 on the CPU."""
    chosen = images[begin : begin + batch_size]
    pixels = _decode(decode, chosen, begin, len(images)).to(device)
    with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        embeddings = backbone(pixels).float()
        if flip:
            embeddings = embeddings + backbone(pixels.flip(-1)).float()
    if embeddings.ndim != 2 or len(embeddings) != len(chosen):
        raise ConfigError(
            f"the backbone made {tuple(embeddings.shape)} of {len(chosen)} images: "
            f"expected [{len(chosen)}, embedding size]"
        )
    embeddings = embeddings.cpu()
    bad = (~embeddings.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"the embedding of verification image {begin + int(bad[0])} of {len(images)} has a NaN or an infinity: "
            "there is nothing to verify; did the training diverge?"
        )
    return functional.normalize(embeddings, eps=1e-12)


def _decode(decode: Decode, images: Sequence[bytes], begin: int, total: int) -> Tensor:
    """Decode a batch; an error says which image of the set it is."""
    try:
        return decode(images)
    except DataError:
        for offset, image in enumerate(images):
            try:
                decode([image])
            except DataError as error:
                reason = str(error).removeprefix("image 0 of 1: ")
                raise DataError(f"verification image {begin + offset} of {total}: {reason}") from error
        raise


@contextlib.contextmanager
def _as_saved(backbone: nn.Module, ranks: _Ranks) -> Iterator[None]:
    """The backbone in eval mode and with the buffers of rank 0; each module's own mode and buffers afterwards."""
    modes = [(module, module.training) for module in backbone.modules()]
    buffers = [buffer for buffer in backbone.buffers() if ranks.world_size > 1]
    own = [buffer.clone() for buffer in buffers]
    try:
        backbone.eval()
        ranks.copy_from_first(buffers)
        yield
    finally:
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)
        for module, training in modes:
            module.training = training


class _Ranks:
    """The ranks that share an evaluation. The process group is read once and becomes integers.

    Raises:
        ConfigError: where the rank or world size given is not that of the group.
    """

    def __init__(
        self, rank: int | None, world_size: int | None, process_group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._group, self._device = process_group, torch.device("cpu")
        self._first, self.rank, self.world_size = 0, 0, 1
        if process_group is not None or (dist.is_available() and dist.is_initialized()):
            self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            if process_group is not None:
                self._first = dist.get_global_rank(process_group, 0)
            if dist.get_backend(process_group) == "nccl":
                self._device = device
        given = (self.rank if rank is None else rank, self.world_size if world_size is None else world_size)
        if given != (self.rank, self.world_size):
            raise ConfigError(
                f"rank {given[0]} of {given[1]} was given, but this process is rank {self.rank} of {self.world_size} "
                "in its process group; leave both out, or initialise the group first"
            )

    def together(
        self, work: Callable[[], T], fact: Callable[[T], tuple[int, ...]], same: tuple[int, ...] | None = None
    ) -> tuple[T, list[tuple[int, ...]]]:
        """Do this rank's work; where the work of any rank fails, every rank raises that error.

        Args:
            work: must hold no collective.
            fact: a few integers about the result, for the other ranks.
            same: what has to be equal on all ranks; default: the facts themselves.

        Returns:
            This rank's result, and the facts of all ranks.
        """
        cause: Exception | None = None
        try:
            result = work()
            facts = fact(result)
            told: tuple[object, ...] = ("", "", facts, facts if same is None else same)
        except Exception as error:
            if self.world_size == 1:
                raise
            cause, told = error, (type(error).__name__, " ".join(str(error).split())[:1000], (), ())
        all_told: list[tuple[object, ...]] = [told] * self.world_size
        if self.world_size > 1:
            with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                dist.all_gather_object(all_told, told, group=self._group)
        for rank, (kind, message, *_) in enumerate(all_told):
            if kind:
                raise _error_of(rank, str(kind), str(message)) from cause
        for rank, (*_, values) in enumerate(all_told):
            if values != all_told[0][-1]:
                raise ConfigError(
                    f"rank {rank} evaluates another set than rank 0: {values} against {all_told[0][-1]} (counts and "
                    "settings); give every rank the same file and the same arguments"
                )
        return result, [facts for _, _, facts, _ in all_told]  # type: ignore[misc]

    def gather_rows(self, rows: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Rows ``[n, d]`` of every rank, in rank order, on the CPU; ``shapes`` are the (n, d) of each rank."""
        if self.world_size == 1:
            return rows
        most, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        padded = torch.zeros(most, width, device=self._device)
        if len(rows):
            padded[: len(rows)] = rows.to(self._device)
        gathered = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(gathered, padded, group=self._group)
        return torch.cat([part[: shape[0]] for part, shape in zip(gathered, shapes, strict=True)]).cpu()

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place, one message for each type of element."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in chosen]).to(self._device)
            dist.broadcast(flat, self._first, group=self._group)
            for tensor, values in zip(chosen, flat.split([tensor.numel() for tensor in chosen]), strict=True):
                tensor.copy_(values.view_as(tensor))


def _error_of(rank: int, kind: str, message: str) -> Exception:
    """The error of another rank, of its own type where it is one of the package's."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, PartialFCError):
        return known(f"rank {rank}: {message}")
    return RuntimeError(f"the evaluation failed on rank {rank}: {kind}: {message}")
