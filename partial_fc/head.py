"""The sharded classifier: parameters, state, statistics and top-k. The step's work is in ``autograd``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.autograd import (
    Definition,
    RowUpdater,
    ShardedSoftmax,
    Step,
    chunk_length,
    inverse_norms,
    row_of,
    unit_rows,
    walk,
)
from partial_fc.collectives import HeadGroup
from partial_fc.emphasis import Negatives, SupportVectors
from partial_fc.errors import ConfigError, LabelError, NonFiniteError
from partial_fc.kernels import multiply
from partial_fc.margins import CosFace, Margin
from partial_fc.normalizer import keep_largest
from partial_fc.permutation import hash64
from partial_fc.sampling import sampled_classes
from partial_fc.sharding import ClassShards

# Rows of a block of initial centres: a whole block is drawn, then cut to the shard, so W does not matter.
_INIT_BLOCK = 4096
_INIT_STD = 0.01
_INIT_STREAM = 0x1417
# Frozen, so one instance may serve all heads.
_DEFAULT_MARGIN = CosFace()
_DEFAULT_NEGATIVES = SupportVectors()


@dataclass(frozen=True)
class HeadStats:
    """The last step's statistics. Tensors stay on the device until they are read (``float(...)``).

    Attributes:
        target_cosine: mean over the global batch of the target cosines.
        support_vectors: mean number of raised negatives a sample; None for ``Plain``.
        support_vector_share: share of the samples with at least one; None for ``Plain``.
        sampled_classes: classes that this rank walked (all of its shard where nothing is sampled).
        positive_classes: distinct classes of the batch in this rank's shard; None where nothing is sampled.
    """

    target_cosine: Tensor
    support_vectors: Tensor | None
    support_vector_share: Tensor | None
    sampled_classes: int
    positive_classes: int | None


@dataclass
class _Prepared:
    """Labels gathered early, and what follows from them."""

    labels: Tensor
    sizes: list[int]
    gathered: Tensor
    unchecked: Tensor
    bad: Tensor | None
    trains: bool
    ids: Tensor | None
    positives: int | None


class _DeferredCheck:
    """A failure that the device found, to be read without stalling it: flags are copied while it works on."""

    def __init__(self, bad_labels: Tensor, failed: Tensor, raise_labels: Callable[[], None]) -> None:
        flags = torch.stack([bad_labels, failed])
        self._raise_labels = raise_labels
        self._copied = None
        if flags.is_cuda:
            self._flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags

    def check(self) -> None:
        """Wait until the flags are there, and raise."""
        if self._copied is not None:
            self._copied.synchronize()
        bad_labels, failed = self._flags.tolist()
        if bad_labels:
            self._raise_labels()
        if failed:
            raise NonFiniteError(
                "an embedding or the loss of the last step isn't finite: expected finite numbers "
                "(nothing was trained on this batch; lower the learning rate or look at the batch's images)"
            )


class PartialFC(nn.Module):
    """Margin softmax over classes that are sharded over the ranks.

    Rank r holds the centres of classes ``[r ceil(C/W), (r+1) ceil(C/W))``. Each rank passes its own embeddings and
    labels; the loss is the mean over the global batch and the same on all ranks. All calls but the constructor are
    collective. Chunks of classes are walked in forward and again in backward: the logits are never stored.

    Args:
        embedding_size: d.
        num_classes: C, over all ranks.
        margin: target margin (``CosFace``, ``ArcFace``, ``CombinedMargin``, ``NormFace``).
        negatives: negative emphasis (``SupportVectors``, ``Plain``).
        mining: sample mining; only None (the mean of all samples) so far.
        scale: s, the factor of all cosines.
        sample_rate: share of the classes that a training step uses beside the batch's positives, in (0, 1].
        seed: of initial centres and class sampling. Both are functions of (seed, class or position) only.
        process_group: the ranks that share the head; None: the default group, or one process where there is none.
        uneven_batches: allow another number of rows on each rank (one more tiny collective a step).
        chunk_size: classes of a chunk; None: by the size of the cache.
        compute_dtype: what the operands of the products are rounded to (``torch.bfloat16`` on GPUs); None: not rounded.
            Sums, norms and exponentials are float32 always (float64 after ``double()``).
        device: of the centres.
        defer_checks: report bad labels and values that aren't finite in :meth:`check` instead of at once; None: on
            GPUs, where raising at once would stall the device. Such a step trains nothing either way.

    Attributes:
        weight: class centres of this rank, ``[local classes, d]``.
        position: samples consumed so far, a 0-dim int64 buffer (on the CPU). A training forward advances it by B.
        shards: how the classes are split.
        stats: statistics of the last step, or None.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    weight: nn.Parameter
    position: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin = _DEFAULT_MARGIN,
        negatives: Negatives = _DEFAULT_NEGATIVES,
        mining: None = None,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        uneven_batches: bool = False,
        chunk_size: int | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        defer_checks: bool | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(embedding_size, num_classes, mining, scale, sample_rate, chunk_size)
        group = HeadGroup(process_group)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.seed, self.uneven_batches = sample_rate, seed, uneven_batches
        self.shards = ClassShards(num_classes, group.world_size)
        self.stats: HeadStats | None = None
        self._definition = Definition(group, margin, negatives, scale, compute_dtype, chunk_size)
        self._start, self._end = self.shards.bounds(group.rank)
        self._defer_checks = defer_checks
        self._prepared: _Prepared | None = None
        self._deferred: _DeferredCheck | None = None
        self._open_step = 0
        self.weight = nn.Parameter(torch.empty(self._end - self._start, embedding_size, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.reset_parameters()

    @property
    def group(self) -> HeadGroup:
        """The ranks that share the head; ``group.calls`` counts their collectives."""
        return self._definition.group

    def reset_parameters(self) -> None:
        """Draw the centres: normal, std 0.01, the same for any world size (on one kind of device)."""
        with torch.no_grad():
            for block in range(self._start // _INIT_BLOCK, -(-self._end // _INIT_BLOCK)):
                first, last = block * _INIT_BLOCK, min((block + 1) * _INIT_BLOCK, self.num_classes)
                generator = torch.Generator(self.weight.device)
                generator.manual_seed(hash64(_INIT_STREAM, self.seed, block) >> 1)
                rows = torch.empty(last - first, self.embedding_size, device=self.weight.device)
                rows.normal_(0, _INIT_STD, generator=generator)
                low, high = max(first, self._start), min(last, self._end)
                self.weight[low - self._start : high - self._start] = rows[low - first : high - first]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialFC:
        position = self.position
        super()._apply(fn, recurse)
        # Reading the position must never wait for a device.
        self.position = position
        return self

    def extra_repr(self) -> str:
        """The loss and this rank's classes."""
        definition = self._definition
        return (
            f"{self.embedding_size}, {self.num_classes}, margin={definition.margin}, negatives={definition.negatives}, "
            f"scale={definition.scale:g}, sample_rate={self.sample_rate:g}, classes=[{self._start}, {self._end})"
        )

    def prepare(self, labels: Tensor) -> None:
        """Gather the labels and sample the classes early, before (or while) the backbone runs.

        Args:
            labels: ``[b]`` int64 global class ids; the same tensor must go to the next forward.

        Raises:
            LabelError: on every rank, where a label of any rank is outside ``[0, num_classes)``.
            ValueError: where the tensor isn't ``[b]`` int64.
        """
        self.check()
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}, expected int64 of shape [b]")
        group = self.group
        there = labels.to(self.weight.device, non_blocking=True)
        if self.uneven_batches:
            sizes = group.gather_sizes(len(labels), there.device)
        else:
            sizes = [len(labels)] * group.world_size
        if sum(sizes) == 0:
            raise ValueError("the global batch is empty, expected at least one row on some rank")
        gathered = group.gather_labels(there, sizes)
        bad, outside = None, (gathered < 0) | (gathered >= self.num_classes)
        if self._defers:
            bad = outside.any()
            checked = torch.where(outside, 0, gathered)
        else:
            self._raise_labels(gathered, sizes)
            checked = gathered
        ids, positives = self._sample(checked)
        self._prepared = _Prepared(labels, sizes, checked, gathered, bad, self._trains, ids, positives)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the global batch.

        ``embeddings.grad`` becomes W x the gradient of that mean, so that an average over ranks (DDP) is right;
        ``weight.grad`` is the gradient of the mean, row-sparse where classes are sampled. In ``eval()`` and under
        ``no_grad`` all classes are used, and no state changes.

        Args:
            embeddings: ``[b, d]`` of this rank, any float dtype; b is the same on all ranks unless ``uneven_batches``.
            labels: ``[b]`` int64 global class ids of this rank.

        Returns:
            A scalar, float32 (float64 after ``double()``), the same on all ranks.

        Raises:
            LabelError: on every rank, for a label outside ``[0, num_classes)``; names rank, row and label.
            NonFiniteError: on every rank, for a NaN or infinite embedding; names rank and row.
            ValueError: for wrong shapes or dtypes.
        """
        if embeddings.dim() != 2 or embeddings.shape != (len(labels), self.embedding_size):
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, expected [{len(labels)}, {self.embedding_size}] "
                "(rows as in labels, the head's embedding_size)"
            )
        if self._prepared is None:
            self.prepare(labels)
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        if prepared.labels is not labels:
            raise ValueError("forward got other labels than prepare(): pass the same tensor to both")
        training = self._trains
        if prepared.trains != training:
            prepared.ids, prepared.positives = self._sample(prepared.gathered)
        if training:
            self.position += sum(prepared.sizes)
            self._open_step += 1
        serial = self._open_step
        step = Step(
            definition=self._definition,
            sizes=prepared.sizes,
            labels=prepared.gathered,
            start=self._start,
            local_classes=self._end - self._start,
            ids=prepared.ids,
            deferred=prepared.bad,
            claim=lambda: self._claim(serial, training),
        )
        loss: Tensor = ShardedSoftmax.apply(embeddings, self.weight, step)
        self._finish(step, prepared)
        return loss

    def check(self) -> None:
        """Raise what the last step found wrong, where checks are deferred (GPUs); the next forward calls this, too.

        Cheap after ``loss.backward()``: it waits for the head's forward only, while the device works on.

        Raises:
            LabelError: as :meth:`forward`.
            NonFiniteError: as :meth:`forward`.
        """
        pending, self._deferred = self._deferred, None
        if pending is not None:
            pending.check()

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k classes of largest cosine over all shards, ties by the lowest class id. Collective.

        Args:
            embeddings: ``[b, d]`` of this rank; b may differ from rank to rank.
            k: 1 to num_classes.

        Returns:
            (cosines ``[b, k]``, class ids ``[b, k]`` int64) of the rows that this rank passed in, largest first.

        Raises:
            NonFiniteError: on every rank, for a NaN or infinite embedding.
            ValueError: for another shape, or another k.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"topk got embeddings {tuple(embeddings.shape)}, expected [b, {self.embedding_size}]")
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"topk got k={k}, expected 1 to {self.num_classes} (num_classes)")
        group, (compute_dtype, dtype) = self.group, self._definition.dtypes(self.weight)
        sizes = group.gather_sizes(len(embeddings), self.weight.device)
        unit = group.gather_embeddings(unit_rows(embeddings.to(dtype))[0].to(compute_dtype), sizes)
        bad = (~torch.isfinite(unit).all(1)).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"topk got an embedding in {row_of(sizes, int(bad[0]))} that isn't finite, expected finite numbers"
            )
        length = max(k, chunk_length(len(unit), len(self.weight), self._definition.chunk_size, unit.device))
        best = unit.new_full((len(unit), k), -torch.inf, dtype=dtype)
        classes = torch.full_like(best, -1, dtype=torch.int64)
        for chunk in walk(self.weight, None, length, dtype):
            cosine = multiply(unit, chunk.centres.T, compute_dtype).mul_(inverse_norms(chunk.centres)).clamp_(-1, 1)
            ids = torch.arange(chunk.begin, chunk.end, device=unit.device).expand(len(unit), -1) + self._start
            best, classes = _largest(torch.cat([best, cosine], 1), torch.cat([classes, ids], 1), k)
        best_all = group.gather_candidates(best).transpose(0, 1).flatten(1)
        classes_all = group.gather_candidates(classes).transpose(0, 1).flatten(1)
        best, classes = _largest(best_all, classes_all, k)
        first = sum(sizes[: group.rank])
        return best[first : first + len(embeddings)], classes[first : first + len(embeddings)]

    @property
    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @property
    def _defers(self) -> bool:
        return self.weight.is_cuda if self._defer_checks is None else self._defer_checks

    def _sample(self, labels: Tensor) -> tuple[Tensor | None, int | None]:
        drawn = round(self.sample_rate * self.num_classes)
        if not self._trains or drawn >= self.num_classes:
            return None, None
        position = int(self.position)
        return sampled_classes(
            labels, self.num_classes, drawn, seed=self.seed, position=position, start=self._start, end=self._end
        )

    def _raise_labels(self, gathered: Tensor, sizes: Sequence[int]) -> None:
        outside = ((gathered < 0) | (gathered >= self.num_classes)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise LabelError(
                f"label {int(gathered[row])} in {row_of(sizes, row)} is outside [0, {self.num_classes}): expected a "
                "class id of the head (raise num_classes, or look at the data set's labels)"
            )

    def _finish(self, step: Step, prepared: _Prepared) -> None:
        result = step.result
        assert result is not None
        counts = result.support_vectors
        self.stats = HeadStats(
            target_cosine=result.target_cosine.mean(),
            support_vectors=None if counts is None else counts.float().mean(),
            support_vector_share=None if counts is None else (counts > 0).float().mean(),
            sampled_classes=step.walked,
            positive_classes=prepared.positives,
        )
        if result.failed is not None and prepared.bad is not None:
            raise_labels = functools.partial(self._raise_labels, prepared.unchecked, prepared.sizes)
            self._deferred = _DeferredCheck(prepared.bad, result.failed, raise_labels)
        if prepared.trains:
            # The optimizer reads this: a failed step moves no momentum and decays no weight.
            self.weight.failed_step = result.failed  # type: ignore[attr-defined]

    def _claim(self, serial: int, training: bool) -> RowUpdater | None:
        updater: RowUpdater | None = getattr(self.weight, "row_updater", None)
        if updater is None or not training:
            return None
        if serial != self._open_step:
            raise RuntimeError(
                "an optimizer in backward allows one forward a backward: this loss is not the head's last one, or its "
                "backward ran already (use a two-phase optimizer, in_backward=False, to accumulate gradients)"
            )
        self._open_step += 1
        return updater


def _largest(values: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest columns of each row, ties by the lowest column, which is the lowest class."""
    _, order = keep_largest(values, k)
    return values.gather(1, order[:, :k]), classes.gather(1, order[:, :k])


def _check_arguments(
    embedding_size: int, num_classes: int, mining: object, scale: float, sample_rate: float, chunk_size: int | None
) -> None:
    checks = (
        (embedding_size >= 1, "embedding_size", embedding_size, "at least 1"),
        (num_classes >= 1, "num_classes", num_classes, "at least 1"),
        (mining is None, "mining", mining, "None"),
        (0 < scale < math.inf, "scale", scale, "a finite number above 0"),
        (0 < sample_rate <= 1, "sample_rate", sample_rate, "a share in (0, 1]"),
        (chunk_size is None or chunk_size >= 1, "chunk_size", chunk_size, "at least 1, or None"),
    )
    for ok, name, value, expected in checks:
        if not ok:
            raise ConfigError(f"PartialFC: {name}={value!r}, expected {expected}")
