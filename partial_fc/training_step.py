"""One optimizer step on this rank: data, backbone, head, gradients, update."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from partial_fc.build import Place
from partial_fc.collectives import ring_bytes
from partial_fc.config import Config
from partial_fc.data import Batch, SampleStream
from partial_fc.errors import DataError, LabelError, NonFiniteError
from partial_fc.head import PartialFC
from partial_fc.loss_scale import LossScale
from partial_fc.optim import RowOptimizer, clip_shards, shard_square
from partial_fc.permutation import hash64
from partial_fc.phases import PhaseTimer
from partial_fc.ranks import agreed


class Outcome(NamedTuple):
    """What came of a step; the same on every rank, but for the samples.

    Attributes:
        loss: mean of the micro batches' losses, 0-dim, on the device; None: it wasn't finite.
        applied: 0-dim bool on the device, whether the backbone was updated; None: known at once that it wasn't.
        sample_ids: int64, the samples of this rank.
        reason: why there was no update, where that is known at once.
        overflowed: whether a gradient overflowed in fp16, which the loss scale met.
        gradient_norms: of the backbone's gradient before clipping, and of this shard's centres where the step was asked
            for it; 0-dim, on the device; None: unknown.
    """

    loss: Tensor | None
    applied: Tensor | None
    sample_ids: Tensor
    reason: str | None = None
    overflowed: bool = False
    gradient_norms: tuple[Tensor | None, Tensor | None] = (None, None)


class Nearest(NamedTuple):
    """How some samples of the last batch lie among all class centres, after the step's update.

    Attributes:
        cosines: by n, the mean cosine with the n-th nearest centre that isn't the sample's own; NaN where there are
            fewer classes.
        accuracy: share of the samples whose own centre is the nearest.
    """

    cosines: dict[int, float]
    accuracy: float


class TrainingStep:
    """Runs optimizer steps, one after the other.

    Args:
        config: the configuration.
        place: this process.
        stream: this rank's batches.
        backbone: the same weights on every rank.
        head: this rank's shard.
        optimizers: of backbone and head.
        precision: of the backbone's products.
        timer: counts the phases.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        stream: SampleStream,
        backbone: nn.Module,
        head: PartialFC,
        optimizers: tuple[torch.optim.Optimizer, RowOptimizer],
        precision: torch.dtype,
        timer: PhaseTimer,
    ) -> None:
        self._config, self._place, self._stream = config, place, stream
        self._backbone, self._head, self._optimizers = backbone, head, optimizers
        self.precision, self._timer = precision, timer
        self.scale = LossScale(head.group.sum_over_shards, enabled=precision == torch.float16)
        self._replica: nn.Module = backbone
        self._backbone_bytes = 0
        if place.world_size > 1:
            self._replica = _replicated(backbone, place)
            size = sum(parameter.nbytes for parameter in backbone.parameters() if parameter.requires_grad)
            self._backbone_bytes = ring_bytes(size, place.world_size, sums=True)
        self._sums = 0
        head.group.waiting = lambda: timer.inside("collectives")
        # Of the norm of the centres' gradient, where a step is asked for it.
        self._square: Tensor | None = None
        # Embeddings and labels of the last micro batch.
        self._last: tuple[Tensor, Tensor] | None = None
        skips = config.train.nonfinite == "skip"
        self._statistics = [buffer for buffer in backbone.buffers() if skips and buffer.is_floating_point()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._sample_ids: list[Tensor] = []
        self._data_failure: DataError | None = None

    @property
    def local_samples(self) -> int:
        """This rank's samples of a step."""
        rows, micro = self._config.train.batch_size, self._config.train.accumulate
        rank, world_size = self._place.rank, self._place.world_size
        per_micro = rows // micro
        return micro * ((rank + 1) * per_micro // world_size - rank * per_micro // world_size)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that this rank has sent, by collective."""
        return {**self._head.group.bytes, "backbone_gradient": self._sums * self._backbone_bytes}

    def run(self, number: int, *, norms: bool = False) -> Outcome:
        """One step, from the stream's position to that of the next step. Collective.

        Args:
            number: of the step, from 0.
            norms: whether to look at the norm of the centres' gradient, which reads it once more.

        Raises:
            NonFiniteError: on every rank, with ``train.nonfinite=stop``.
            LabelError: on every rank.
            DataError: on every rank, where the data of one fails.
        """
        accumulate = self._config.train.accumulate
        begin = self._stream.position
        if self._statistics:
            torch._foreach_copy_(self._statistics_before, self._statistics)
        losses: list[Tensor] = []
        self._sample_ids.clear()
        loss, applied, reason, overflowed, norm = None, None, None, False, None
        self._square = torch.zeros((), device=self._place.device) if norms else None
        head_optimizer = self._optimizers[1]
        head_optimizer.gradient_square = self._square if head_optimizer.in_backward else None
        try:
            for micro in range(accumulate):
                losses.append(self._micro_step(number, last=micro + 1 == accumulate))
            self._head.check()
            loss = torch.stack(losses).mean()
            applied, reason, overflowed, norm = self._update()
        except LabelError:
            # Raised on every rank, so all are here; where a rank's data failed, that was the reason.
            agreed(self._raise_data_failure)
            raise
        except NonFiniteError as error:
            if self._config.train.nonfinite == "stop":
                raise
            reason = str(error)
            # A forward that isn't finite would stay in the running statistics for ever.
            if self._statistics:
                torch._foreach_copy_(self._statistics, self._statistics_before)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        following = begin + self._config.train.batch_size
        if self._stream.position != following:
            self._stream.seek(following)
        self._timer.end_step()
        ids = torch.cat(self._sample_ids) if self._sample_ids else torch.empty(0, dtype=torch.int64)
        of_head = None if self._square is None else self._square.sqrt()
        return Outcome(loss, applied, ids, reason, overflowed, (norm, of_head))

    def nearest(self, ns: Sequence[int], samples: int = 64) -> Nearest | None:
        """Look up the nearest class centres of some samples of the last batch. Collective.

        It reads all class centres once.

        Args:
            ns: how near, such as 1 and 5.
            samples: how many, over all ranks.

        Returns:
            The same on every rank; None where there was no batch yet. After a step that was done only: embeddings that
            aren't finite raise.
        """
        if self._last is None:
            return None
        world_size, k = self._place.world_size, min(max(ns) + 1, self._head.num_classes)
        # As many on each rank as on the one that has the fewest.
        fewest = self._config.train.batch_size // self._config.train.accumulate // world_size
        rows = min(max(samples // world_size, 1), fewest)
        embeddings, labels = (tensor[:rows] for tensor in self._last)
        cosines, classes = self._head.topk(embeddings, k)
        own = classes == labels.to(classes.device)[:, None]
        others = cosines.masked_fill(own, -torch.inf).sort(1, descending=True).values
        found = [others[:, n - 1] if n <= k else torch.full_like(others[:, 0], torch.nan) for n in ns]
        means = torch.stack([*found, own[:, 0].to(others.dtype)]).mean(1)
        *values, accuracy = (self._head.group.sum_over_shards(means) / world_size).tolist()
        return Nearest(
            {n: value if math.isfinite(value) else math.nan for n, value in zip(ns, values, strict=True)}, accuracy
        )

    def _micro_step(self, number: int, *, last: bool) -> Tensor:
        """Forward and backward of a micro batch; its loss, detached."""
        phase = self._timer.phase
        self._head.position.fill_(self._stream.position)
        self._head.step.fill_(number)
        if self._config.backbone.dropout > 0:
            torch.manual_seed(hash64(self._config.train.seed, self._stream.position, self._place.rank) >> 1)
        with phase("data"):
            batch = self._next_batch()
            self._sample_ids.append(batch.sample_ids)
            images = batch.images.to(memory_format=torch.channels_last)
        with phase("head_forward"):
            self._head.prepare(batch.labels)
        silent = isinstance(self._replica, DistributedDataParallel) and not last
        with self._replica.no_sync() if silent else contextlib.nullcontext():  # type: ignore[operator]
            with phase("backbone_forward"), self._autocast():
                embeddings = self._replica(images)
            # The head's graph is cut off, so that its time is told from the backbone's.
            leaf = embeddings.detach().requires_grad_()
            with phase("head_forward"):
                try:
                    loss: Tensor = self._head(leaf, batch.labels)
                except NonFiniteError:
                    if self._replica is not self._backbone and not silent:
                        # DDP waits for a backward; without it, it would sum in the middle of the next step.
                        embeddings.backward(torch.zeros_like(embeddings))
                    raise
            with phase("head_backward"):
                factor = self.scale.scale / self._config.train.accumulate
                (loss * factor if factor != 1 else loss).backward()
            with phase("backbone_backward"):
                embeddings.backward(leaf.grad)
        self._sums += not silent
        self._last = leaf.detach(), batch.labels
        return loss.detach()

    def _next_batch(self) -> Batch:
        """The next batch; where the data fails, one without a valid label, at which the head stops every rank."""
        if self._data_failure is None:
            try:
                return self._stream.next_batch()
            except DataError as error:
                self._data_failure = error
            except (OSError, MemoryError) as error:
                reason = f"{type(error).__name__}: {error}"
                self._data_failure = DataError(f"the next batch can't be read ({reason}): look at this machine")
        side, rows = self._config.data.image_size, self.local_samples // self._config.train.accumulate
        images = torch.zeros(rows, 3, side, side, device=self._place.device)
        nothing = torch.full((rows,), -1)
        return Batch(images, nothing, nothing, nothing)

    def _raise_data_failure(self) -> None:
        if self._data_failure is not None:
            raise self._data_failure

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._place.device.type, self.precision)

    def _update(self) -> tuple[Tensor | None, str | None, bool, Tensor | None]:
        """Clip and apply the gradients.

        Returns:
            Whether that was done, on the device; why not; whether fp16 overflowed; the norm of the backbone's gradient.
        """
        section = self._config.optim
        with self._timer.phase("optimizer"):
            if not self.scale.unscale([*self._backbone.parameters(), self._head.weight]):
                return None, f"a gradient overflowed in fp16; the loss scale is {self.scale.scale:g} now", True, None
            gradients = [parameter.grad for parameter in self._backbone.parameters() if parameter.grad is not None]
            # DDP has averaged the gradients: what isn't finite on one rank isn't on any.
            norm = get_total_norm(gradients)
            finite = torch.isfinite(norm)
            if not norm.is_cuda and not finite:
                text = "the gradient of the backbone isn't finite, expected finite numbers: lower the learning rate"
                if self._config.train.nonfinite == "stop":
                    raise NonFiniteError(text)
                return None, text, False, norm
            if self._square is not None and not self._optimizers[1].in_backward:
                self._square += shard_square(self._head.weight)
            if section.clip_norm is not None:
                clip_grads_with_norm_(self._backbone.parameters(), section.clip_norm, norm)
            if section.head_clip_norm is not None:
                clip_shards(self._head.weight, section.head_clip_norm, self._head.group.sum_over_shards)
            if norm.is_cuda:
                self._gate(~finite)
            for optimizer in self._optimizers:
                optimizer.step()
        return finite, None, False, norm

    def _gate(self, failed: Tensor) -> None:
        """Let both optimizers leave out a step that isn't finite, without the host waiting to know."""
        # What fused optimizers of PyTorch look at, and skip the step where it's 1.
        self._optimizers[0].found_inf = failed.float()  # type: ignore[attr-defined]
        before: Tensor | None = getattr(self._head.weight, "failed_step", None)
        self._head.weight.failed_step = failed if before is None else before | failed  # type: ignore[attr-defined]


def _replicated(backbone: nn.Module, place: Place) -> DistributedDataParallel:
    devices = [place.device] if place.device.type == "cuda" else None
    # BatchNorm statistics are each rank's own; rank 0's are evaluated and saved. torch 2.13 renames the option.
    known = inspect.signature(DistributedDataParallel).parameters
    own_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(backbone, device_ids=devices, gradient_as_bucket_view=True, **own_buffers)
