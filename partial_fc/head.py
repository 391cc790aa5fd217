"""The sharded classifier: parameters, state, statistics and top-k. The step's work is in ``autograd``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.autograd import ShardedSoftmax
from partial_fc.checks import require
from partial_fc.chunks import KeptProducts, KeptRows, default_budget
from partial_fc.collectives import HeadGroup
from partial_fc.emphasis import Negatives, SupportVectors
from partial_fc.kernels import BACKENDS
from partial_fc.labels import DeferredCheck, Prepared, raise_labels, to_device, to_host
from partial_fc.margins import CosFace, Margin
from partial_fc.memory import empty_rows
from partial_fc.mining import Mining
from partial_fc.permutation import hash64
from partial_fc.sampling import SampledClasses, sampled_classes
from partial_fc.sharding import ClassShards
from partial_fc.step import Correction, Engine, Loss, RowUpdater, Step, raise_embeddings
from partial_fc.topk import largest_classes

# Rows of a block of initial centres: a whole block is drawn, then cut to the shard, so W does not matter.
_INIT_BLOCK = 4096
_INIT_STD = 0.01
_INIT_STREAM = 0x1417
# Counted on the host, and saved with the head.
_COUNTERS = ("position", "step")
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
        positive_classes: distinct classes of the global batch in this rank's shard.
        centre_norms: smallest and largest norm ``[2]`` of the centres that this rank walked; None where it has none.
    """

    target_cosine: Tensor
    support_vectors: Tensor | None
    support_vector_share: Tensor | None
    sampled_classes: int
    positive_classes: int | Tensor
    centre_norms: Tensor | None


class PartialFC(nn.Module):
    """Margin softmax over classes that are sharded over the ranks.

    Rank r holds the centres of classes ``[r ceil(C/W), (r+1) ceil(C/W))``. Each rank passes its own embeddings and
    labels; the loss is the mean over the global batch and the same on all ranks. All calls but the constructor are
    collective. Chunks of classes are walked in forward and again in backward: the logits are not stored, but for what
    ``logits_budget`` has room for.

    Args:
        embedding_size: d.
        num_classes: C, over all ranks.
        margin: target margin (``CosFace``, ``ArcFace``, ``CombinedMargin``, ``NormFace``, ``SphereFace``, ``MagFace``,
            ``AdaFace``).
        negatives: negative emphasis (``SupportVectors``, ``Curricular``, ``Plain``).
        mining: sample mining (``FocalLoss``, ``HardMining``); None: the mean of all samples.
        scale: s, the factor of all cosines.
        sample_rate: share of the classes that a training step draws beside the batch's positives, in (0, 1].
        seed: of initial centres and class sampling. Both are functions of (seed, class or position) only.
        process_group: the ranks that share the head; None: the default group, or one process where there is none.
        sampled_classes: how many classes a training step draws over all ranks, instead of ``sample_rate``.
        correct_sampling: weigh drawn classes that aren't positives by how many of those there are for each drawn, so
            that the normalizer estimates that of all classes.
        margin_warmup_steps: training steps over which the margin grows from 0 (``SphereFace`` anneals by itself).
        negatives_warmup_steps: training steps over which the emphasis grows from none (``Curricular`` adapts itself).
        uneven_batches: allow another number of rows on each rank (one more tiny collective a step).
        chunk_size: classes of a chunk; None: by the size of the cache.
        logits_budget: bytes of products that the forward may keep for the backward, which makes the others again; None:
            a thirty-second of what this rank's centres take.
        filter_gradient: a class whose softmax weight is below this for every row of the batch is left out of the
            product that makes the centres' gradient; its momentum and decay still apply. An approximation: each row
            misses at most scale x this (x the emphasis, x the sample's weight with mining) of its pull on such a
            centre; support vectors kept by ``top_k`` never are left out. On a GPU the host waits for each chunk.
            None: exact.
        kernels: ``compiled``, ``triton`` (GPUs) or ``eager``; ``auto``: compiled where it works and repays its time.
        compute_dtype: what the operands of the products are rounded to (``torch.bfloat16`` or ``torch.float16``), or
            ``"tf32"`` (on GPUs); None: not rounded. Sums, norms and exponentials are float32 always (float64 after
            ``double()``).
        storage_dtype: of the centres: float32, or bfloat16 for half the memory (with a row optimizer, which rounds
            stochastically).
        device: of the centres.
        defer_checks: report bad labels and values that aren't finite in :meth:`check` instead of at once; None: on
            GPUs, where raising at once would stall the device. Such a step trains nothing either way.

    Attributes:
        weight: class centres of this rank, ``[local classes, d]``.
        position: samples consumed so far, a 0-dim int64 buffer (on the CPU). A training forward advances it by B.
        step: training forwards so far, likewise; warm-ups and annealed margins read it.
        shards: how the classes are split.
        stats: statistics of the last step, or None.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    weight: nn.Parameter
    position: Tensor
    step: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin = _DEFAULT_MARGIN,
        negatives: Negatives = _DEFAULT_NEGATIVES,
        mining: Mining | None = None,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        sampled_classes: int | None = None,
        correct_sampling: bool = False,
        margin_warmup_steps: int = 0,
        negatives_warmup_steps: int = 0,
        uneven_batches: bool = False,
        chunk_size: int | None = None,
        logits_budget: int | None = None,
        filter_gradient: float | None = None,
        kernels: str = "auto",
        compute_dtype: torch.dtype | Literal["tf32"] | None = None,
        storage_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        defer_checks: bool | None = None,
    ) -> None:
        super().__init__()
        tf32 = compute_dtype == "tf32"
        _check_arguments(locals())
        group = HeadGroup(process_group)
        self.embedding_size, self.num_classes, self.seed = embedding_size, num_classes, seed
        self.margin, self.negatives, self.mining = margin, negatives, mining
        self.sampled_classes = round(sample_rate * num_classes) if sampled_classes is None else sampled_classes
        self.correct_sampling, self.uneven_batches = correct_sampling, uneven_batches
        self.shards = ClassShards(num_classes, group.world_size)
        self.stats: HeadStats | None = None
        self._start, self._end = self.shards.bounds(group.rank)
        self.weight = nn.Parameter(empty_rows(self._end - self._start, embedding_size, storage_dtype, device))
        self._warmups = margin_warmup_steps, negatives_warmup_steps
        self._engine = Engine(
            group=group,
            scale=scale,
            compute_dtype=compute_dtype if isinstance(compute_dtype, torch.dtype) else None,
            tf32=tf32,
            chunk_size=chunk_size,
            kernels=kernels,
            filter_gradient=filter_gradient,
            kept=KeptProducts(default_budget(self.weight.nbytes) if logits_budget is None else logits_budget),
            rows=KeptRows(),
        )
        self._defer_checks = defer_checks
        self._prepared: Prepared | None = None
        self._deferred: DeferredCheck | None = None
        self._open_step = 0
        for name in _COUNTERS:
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device="cpu"))
        for prefix, axis in (("margin", margin), ("negatives", negatives)):
            for name, value in axis.initial_state().items():
                self.register_buffer(f"{prefix}_{name}", value.to(self.weight.device))
        self.reset_parameters()

    @property
    def group(self) -> HeadGroup:
        """The ranks that share the head; ``group.calls`` counts their collectives."""
        return self._engine.group

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
        counters = {name: getattr(self, name) for name in _COUNTERS}
        super()._apply(fn, recurse)
        # Reading these must never wait for a device.
        for name, value in counters.items():
            setattr(self, name, value)
        return self

    def extra_repr(self) -> str:
        """The loss and this rank's classes."""
        sampled = min(self.sampled_classes, self.num_classes)
        return (
            f"{self.embedding_size}, {self.num_classes}, margin={self.margin}, negatives={self.negatives}, "
            f"mining={self.mining}, scale={self._engine.scale:g}, sampled_classes={sampled}, "
            f"classes=[{self._start}, {self._end})"
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
        group, device = self.group, self.weight.device
        # Labels that are on the host and can be gathered there need no GPU at all.
        there = labels if labels.device.type == "cpu" and group.reaches_host else labels.to(device, non_blocking=True)
        if there is labels:
            # The backward reads them, and the caller may fill them anew before.
            there = labels.clone()
        sizes = [len(labels)] * group.world_size
        if self.uneven_batches:
            sizes = group.gather_sizes(len(labels), torch.device("cpu") if group.reaches_host else device)
        if sum(sizes) == 0:
            raise ValueError("the global batch is empty, expected at least one row on some rank")
        unchecked = group.gather_labels(there, sizes).wait()
        outside, bad = (unchecked < 0) | (unchecked >= self.num_classes), None
        if self._defer_checks if self._defer_checks is not None else unchecked.is_cuda:
            bad = outside.any().to(device, non_blocking=True)
            checked = torch.where(outside, 0, unchecked)
        else:
            raise_labels(unchecked, sizes, self.num_classes)
            checked = unchecked
        on_host, arrived = None, None
        if self._samples:
            on_host, arrived = to_host(checked)
        prepared = Prepared(labels, sizes, unchecked, to_device(checked, device), bad, on_host, arrived, self._trains)
        if arrived is None:
            self._sample(prepared)
        self._prepared = prepared

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
        if prepared.given is not labels:
            raise ValueError("forward got other labels than prepare(): pass the same tensor to both")
        training, number, device = self._trains, int(self.step), self.weight.device
        if prepared.arrived is not None:
            # The labels were on their way before the backbone was; the device goes on with that.
            prepared.arrived.synchronize()
        if prepared.arrived is not None or prepared.trains != training:
            prepared.trains = training
            self._sample(prepared)
        sampled, deferred = prepared.sampled, prepared.bad
        if deferred is None and self._defers:
            deferred = torch.zeros((), dtype=torch.bool, device=device)
        ids = None if sampled is None else to_device(sampled.ids, device)
        correction = None
        if sampled is not None and self.correct_sampling:
            correction = self._correction(sampled, prepared)
        if training:
            self.position += sum(prepared.sizes)
            self.step += 1
            self._open_step += 1
        serial = self._open_step
        # Optimizers that round stochastically do it by global class. Set at each step: copies of a weight lose it.
        self.weight.first_class = self._start  # type: ignore[attr-defined]
        step = Step(
            engine=self._engine,
            loss=self._loss_at(number),
            number=number,
            trains=training,
            sizes=prepared.sizes,
            labels=prepared.labels,
            start=self._start,
            local_classes=self._end - self._start,
            ids=ids,
            correction=correction,
            deferred=deferred,
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
        return largest_classes(embeddings, k, self.weight, self._engine, self._start)

    @property
    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @property
    def _defers(self) -> bool:
        return self.weight.is_cuda if self._defer_checks is None else self._defer_checks

    @property
    def _samples(self) -> bool:
        return self.sampled_classes < self.num_classes

    def _sample(self, prepared: Prepared) -> None:
        """Draw the classes to walk, on the host."""
        prepared.sampled = None
        if not prepared.trains or prepared.on_host is None:
            return
        prepared.sampled = sampled_classes(
            prepared.on_host,
            self.num_classes,
            self.sampled_classes,
            seed=self.seed,
            position=int(self.position),
            start=self._start,
            end=self._end,
        )

    def _correction(self, sampled: SampledClasses, prepared: Prepared) -> Correction:
        assert prepared.on_host is not None
        device = self.weight.device
        return Correction(
            positive_P=to_device(sampled.positive, device),
            negatives=self.num_classes - len(prepared.on_host.unique()),
            drawn=self.sampled_classes,
            drawn_positives=torch.full((), sampled.drawn_positives, device=device),
        )

    def _loss_at(self, number: int) -> Loss:
        """The three axes at a training step, warm-ups applied."""
        margin_share, negatives_share = (min(1.0, (number + 1) / max(steps, 1)) for steps in self._warmups)
        return Loss(
            self.margin if margin_share == 1 else self.margin.weakened(margin_share),
            self.negatives if negatives_share == 1 else self.negatives.weakened(negatives_share),
            self.mining,
            {name: getattr(self, f"margin_{name}") for name in self.margin.initial_state()},
            {name: getattr(self, f"negatives_{name}") for name in self.negatives.initial_state()},
        )

    def _keep(self, prefix: str, state: Mapping[str, Tensor], failed: Tensor | None) -> None:
        for name, value in state.items():
            buffer = getattr(self, f"{prefix}_{name}")
            buffer.copy_(value if failed is None else torch.where(failed, buffer, value))

    def _finish(self, step: Step, prepared: Prepared) -> None:
        result = step.result
        assert result is not None
        counts = result.support_vectors
        self.stats = HeadStats(
            target_cosine=result.target_cosine.mean(),
            support_vectors=None if counts is None else counts.float().mean(),
            support_vector_share=None if counts is None else (counts > 0).float().mean(),
            sampled_classes=step.walked,
            positive_classes=self._positives(prepared),
            centre_norms=result.centre_norms,
        )
        if step.trains:
            self._keep("margin", result.margin_state, result.failed)
            self._keep("negatives", result.negatives_state, result.failed)
        if result.failed is not None and step.deferred is not None:
            reasons = (
                functools.partial(raise_labels, prepared.unchecked, prepared.sizes, self.num_classes),
                functools.partial(raise_embeddings, result.finite, prepared.sizes),
            )
            self._deferred = DeferredCheck(step.deferred, result.failed, reasons)
        if prepared.trains:
            # The optimizer reads this: a failed step moves no momentum and decays no weight.
            self.weight.failed_step = result.failed  # type: ignore[attr-defined]

    def _positives(self, prepared: Prepared) -> int | Tensor:
        """How many distinct labels are of this shard; no device is waited for."""
        if prepared.sampled is not None:
            return prepared.sampled.positives
        labels = prepared.labels.sort().values
        first = torch.cat([torch.ones_like(labels[:1], dtype=torch.bool), labels[1:] != labels[:-1]])
        return (first & (labels >= self._start) & (labels < self._end)).sum()

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


def _check_arguments(given: Mapping[str, Any]) -> None:
    num_classes, sampled, rate = given["num_classes"], given["sampled_classes"], given["sample_rate"]
    budget, above = given["logits_budget"], given["filter_gradient"]
    whole = ("embedding_size", "num_classes", "seed", "margin_warmup_steps", "negatives_warmup_steps")
    for name in (*whole, "sampled_classes", "chunk_size", "logits_budget"):
        value = given[name]
        right = (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name not in whole)
        require(right, "PartialFC", name, value, "a whole number" + ("" if name in whole else ", or None"))
    for name in ("scale", "sample_rate"):
        require(isinstance(given[name], float | int), "PartialFC", name, given[name], "a number")
    dtypes = (None, "tf32", torch.float32, torch.bfloat16, torch.float16)
    checks = (
        (given["embedding_size"] >= 1, "embedding_size", "at least 1"),
        (num_classes >= 1, "num_classes", "at least 1"),
        (isinstance(given["margin"], Margin), "margin", "a margin such as CosFace()"),
        (isinstance(given["negatives"], Negatives), "negatives", "an emphasis such as SupportVectors()"),
        (given["mining"] is None or isinstance(given["mining"], Mining), "mining", "None, FocalLoss() or HardMining()"),
        (0 < given["scale"] < math.inf, "scale", "a finite number above 0"),
        (0 < rate <= 1, "sample_rate", "a share in (0, 1]"),
        (sampled is None or 1 <= sampled <= num_classes, "sampled_classes", f"1 to {num_classes} (num_classes)"),
        (sampled is None or rate == 1, "sampled_classes", f"None beside sample_rate={rate}: give one of them"),
        (
            not given["correct_sampling"] or (round(rate * num_classes) if sampled is None else sampled) < num_classes,
            "correct_sampling",
            "False where all classes are used",
        ),
        (given["margin_warmup_steps"] >= 0, "margin_warmup_steps", "at least 0"),
        (given["negatives_warmup_steps"] >= 0, "negatives_warmup_steps", "at least 0"),
        (given["chunk_size"] is None or given["chunk_size"] >= 1, "chunk_size", "at least 1, or None"),
        (budget is None or budget >= 0, "logits_budget", "bytes, at least 0, or None"),
        (above is None or 0 < above < 1, "filter_gradient", "a softmax weight in (0, 1), or None"),
        (given["kernels"] in BACKENDS, "kernels", f"one of {', '.join(BACKENDS)}"),
        (given["compute_dtype"] in dtypes, "compute_dtype", "None, 'tf32', float32, bfloat16 or float16"),
        (given["storage_dtype"] in (torch.float32, torch.bfloat16), "storage_dtype", "float32 or bfloat16"),
    )
    for ok, name, expected in checks:
        require(ok, "PartialFC", name, given[name], expected)
