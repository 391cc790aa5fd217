"""What a step of the head takes: bytes of memory by item, bytes sent by collective, operations of the products.

Arithmetic only: no tensor, no device, no configuration. Legend: W ranks, B rows of the global (micro) batch, b = B / W
rows of this rank, d embedding size, C classes, P classes that this rank walks, p classes of the longest chunk, K =
``top_k``. Everything is of the fullest rank; memory is bytes at the moment that takes most, 1 GB = 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from partial_fc.chunks import classes_in_cache, default_budget, equal_chunks
from partial_fc.collectives import ring_bytes

# glibc keeps freed blocks of up to 32 MiB (its largest threshold for blocks that go back to the system at once).
CPU_RUNTIME = 32 << 20
# CUDA's context, NCCL's buffers and what the caching allocator can't use: an assumption, nobody has measured it here.
GPU_RUNTIME = 2 * 10**9
# Passes of at least so many entries are compiled by kernels="auto" (kernels), rows that an optimizer copies (optim).
WORTH_COMPILING = 1 << 22
ROWS_OF_AN_UPDATE = 8192
LARGEST = 1 << 44

Sizes = dict[str, int]
ADAMW_STATE = ("running means", "running squares", "steps")


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """A head in plain numbers; ``stored``, ``state`` and ``compute`` are bytes of an entry.

    Attributes:
        num_classes: C.
        ranks: W.
        batch: B, rows of a micro batch over all ranks.
        size: d.
        drawn: classes that a step draws over all ranks; None: every class is walked.
        stored: of the class centres (4: float32, 2: bfloat16).
        optimizer: ``sgd`` or ``adamw``.
        momentum: whether ``sgd`` keeps a momentum buffer.
        state: of the optimizer's state.
        compute: of the operands of the products.
        tf32: whether a GPU rounds float32 operands.
        in_backward: whether the optimizer takes each chunk's gradient inside the backward.
        accumulate: micro batches of a step.
        clips_norm: whether the gradient of all shards is clipped by its norm.
        corrects: whether drawn classes are weighed (``correct_sampling``).
        norms: whether the margin needs the embeddings' norms.
        emphasizes: whether support vectors are raised.
        top_k: K; None: all support vectors are.
        logits_budget: bytes of products that the forward may keep; None: the default of the head.
        chunk_size: classes of a chunk; None: by the cache.
        cache: bytes of the cache that a chunk fills.
        gpu: whether the head is on a GPU.
        compiled: whether the elementwise part is fused; None: where a pass is large enough for it (``auto``).
    """

    num_classes: int
    ranks: int
    batch: int
    size: int
    cache: int
    drawn: int | None = None
    stored: int = 4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: bool = True
    state: int = 4
    compute: int = 4
    tf32: bool = False
    in_backward: bool = True
    accumulate: int = 1
    clips_norm: bool = False
    corrects: bool = False
    norms: bool = False
    emphasizes: bool = False
    top_k: int | None = None
    logits_budget: int | None = None
    chunk_size: int | None = None
    gpu: bool = False
    compiled: bool | None = None

    @property
    def rows(self) -> int:
        """b, of the fullest rank."""
        return -(-self.batch // self.ranks)

    @property
    def local(self) -> int:
        """Classes of the first rank's shard, ceil(C / W)."""
        return -(-self.num_classes // self.ranks)

    @property
    def samples(self) -> bool:
        """Whether a step walks a part of the classes."""
        return self.drawn is not None and self.drawn < self.num_classes

    @property
    def walked(self) -> int:
        """P: the drawn classes and the positives, both spread evenly over the shards and none counted twice."""
        if self.drawn is None or not self.samples:
            return self.local
        return min(self.local, -(-self.drawn // self.ranks) + self.rows)

    @property
    def chunks(self) -> tuple[int, int]:
        """(number of chunks, p)."""
        return equal_chunks(self.walked, self.chunk_size or classes_in_cache(self.batch, self.size, self.cache))

    @property
    def kept_rows(self) -> int:
        """Room for gathered rows that the forward leaves to the backward: where P is at most an eighth of the shard."""
        return self.walked + self.walked // 64 + 64 if self.samples and 8 * self.walked <= self.local else 0

    @property
    def kept(self) -> int:
        """Classes whose products the forward keeps: whole chunks, as many as the budget has room for."""
        count, _ = self.chunks
        budget = self.logits_budget
        if budget is None:
            budget = default_budget(self.local * self.size * self.stored)
        fitting = budget // (4 * self.batch)
        kept = min(count, ((fitting + 1) * count - 1) // self.walked)
        return self.walked * kept // count

    @property
    def fused(self) -> bool:
        """Whether the elementwise part needs no temporaries."""
        return self.compiled if self.compiled is not None else self.walked * self.batch >= WORTH_COMPILING

    @property
    def half(self) -> bool:
        """Whether the products' operands are bfloat16 or float16."""
        return self.compute == 2


def head_memory(plan: HeadPlan) -> Sizes:
    """Bytes by item, at the moment of the head's own work that takes most; they add up to what the head takes."""
    fullest = max(phases(plan).items(), key=lambda phase: total(phase[1]))
    return {**resident(plan), **fullest[1]}


def resident(plan: HeadPlan) -> Sizes:
    """Bytes that stay from step to step, by item."""
    entries = plan.local * plan.size
    if plan.optimizer == "adamw":
        state = dict(zip(ADAMW_STATE, (plan.state * entries, plan.state * entries, 4 * plan.local), strict=True))
    else:
        state = {"momentum": plan.state * entries} if plan.momentum else {}
    kept = {} if plan.gpu else {"kept products": 4 * plan.kept * plan.batch}
    assumed = GPU_RUNTIME if plan.gpu else CPU_RUNTIME
    return _present(
        {
            "class centres": plan.stored * entries,
            **state,
            "gathered rows, kept": plan.stored * plan.kept_rows * plan.size,
            **kept,
            "runtime, assumed": assumed,
        }
    )


def phases(plan: HeadPlan) -> dict[str, Sizes]:
    """Bytes beside those that stay, by item, in the head's ``forward``, its ``backward`` and its ``update``."""
    accumulated = _gradient(plan, plan.accumulate - 1)
    forward = {
        **_of_the_batch(plan),
        **_of_the_classes(plan),
        "gradient of the centres": accumulated,
        "chunk: gathered rows": _gathered(plan),
        "chunk: products": _forward_products(plan),
        "chunk: rounded operands": _rounded_operands(plan, backward=False),
        "chunk: temporaries": _forward_temporaries(plan),
    }
    backward = {
        **_of_the_batch(plan),
        **_of_the_classes(plan),
        "gradient of the centres": accumulated + _gradient(plan, 1),
        "copies of the gradient": _copies_in_backward(plan),
        # [B, d] of all rows; of this rank's: what arrives, and three steps from unit rows to embeddings.
        "gradient of the embeddings": 4 * plan.size * (plan.batch + 4 * plan.rows),
        "chunk: gathered rows": _gathered(plan),
        "chunk: products": _backward_products(plan),
        "chunk: gradient rows": _gradient_rows(plan),
        "chunk: rounded operands": _rounded_operands(plan, backward=True),
        "chunk: temporaries": _backward_temporaries(plan),
    }
    update = {
        "gradient of the centres": _gradient(plan, plan.accumulate),
        "copies of the gradient": _copies_in_update(plan),
    }
    if plan.gpu:
        forward["kept products"] = backward["kept products"] = 4 * plan.kept * plan.batch
    return {name: _present(items) for name, items in (("forward", forward), ("backward", backward), ("update", update))}


def host_memory(plan: HeadPlan) -> int:
    """Bytes of the sampled ids on the host: int64 ids twice (while the positives go in), and whether each is one."""
    return 17 * plan.walked if plan.samples else 0


def staged(plan: HeadPlan) -> int:
    """Bytes of the copy that a commit is written from, on the host: class centres and optimizer state."""
    items = resident(plan)
    return sum(items.get(name, 0) for name in ("class centres", "momentum", *ADAMW_STATE))


def payload(plan: HeadPlan) -> Sizes:
    """Bytes of each collective of a micro batch, by the names of ``HeadGroup.calls``; none on one rank.

    What a gather makes, what a sum sums, what a reduce-scatter takes: the same tensor on every rank.
    """
    if plan.ranks == 1:
        return {}
    rows = plan.ranks * plan.rows
    parts = 2
    if plan.emphasizes and plan.top_k is None:
        parts += 1
    elif plan.emphasizes and plan.top_k is not None:
        parts += plan.top_k * (2 if plan.corrects else 1)
    return _present(
        {
            "sizes": 8 * plan.ranks if plan.batch % plan.ranks else 0,
            "labels": 8 * rows,
            "embeddings": rows * (plan.compute * plan.size + (4 if plan.norms else 0)),
            "target_cosines": 4 * (plan.batch + (1 if plan.corrects else 0)),
            "normalizers": 4 * plan.ranks * parts * plan.batch,
            "embedding_gradient": 4 * rows * plan.size,
        }
    )


def on_the_wire(name: str, size: int, ranks: int) -> int:
    """Bytes that each rank sends for a collective by the ring algorithm."""
    return ring_bytes(size, ranks, sums=name in ("target_cosines", "backbone_gradient"))


def operations(plan: HeadPlan) -> int:
    """Operations of a step's products on the fullest rank: (4 - kept share) x 2 B P d, a micro batch.

    Products: forward, again in backward (but for what is kept), to embeddings, to centres.
    """
    return 2 * plan.accumulate * plan.batch * plan.size * (4 * plan.walked - plan.kept)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of classes that fits, at least 2; 0 where none does. At most 2^44."""
    if not fits(2):
        return 0
    low, high = 2, 4
    while high < LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def total(items: Mapping[str, int]) -> int:
    """Sum over the items."""
    return sum(items.values())


def _present(items: Mapping[str, int]) -> Sizes:
    return {name: size for name, size in items.items() if size}


def _of_the_batch(plan: HeadPlan) -> Sizes:
    """Embeddings in their forms, and vectors of B."""
    rows, size = plan.rows, plan.size
    # This rank's as they came and as unit rows; those of all ranks as they arrive, once more without their norms.
    own = 2 * 4 * rows * size
    gathered = plan.compute * plan.batch * size * (2 if plan.norms else 1)
    if plan.ranks == 1 and not plan.half and not plan.norms:
        gathered = 0  # the unit rows themselves
    candidates = 0
    if plan.emphasizes and plan.top_k is not None:
        # Cosines, places and gradients of this shard's, and what the merge makes of all shards'.
        candidates = plan.batch * plan.top_k * (20 + 24 * plan.ranks)
    vectors = plan.batch * (20 * 8 + 12 * plan.ranks)
    return {"embeddings": own + gathered, "vectors of the batch": vectors + candidates}


def _of_the_classes(plan: HeadPlan) -> Sizes:
    """What has an entry for each walked class."""
    ids = 8 * plan.walked if plan.samples and plan.gpu else 0
    if plan.samples and not plan.gpu:
        ids = host_memory(plan)
    offsets = 5 * plan.walked if plan.corrects else 0  # and whether each is a positive
    return {"inverse norms, offsets": 4 * plan.walked + offsets, "sampled ids": ids}


def _gradient(plan: HeadPlan, micro_batches: int) -> int:
    """Gradients of the centres that so many micro batches leave: row-sparse ones stand side by side."""
    if plan.in_backward or micro_batches == 0:
        return 0
    rows = plan.walked * micro_batches if plan.samples else plan.local
    return plan.stored * rows * plan.size


def _copies_in_backward(plan: HeadPlan) -> int:
    """Row-sparse gradients of all micro batches side by side, made anew when the last one is added."""
    return _gradient(plan, plan.accumulate) if plan.samples and plan.accumulate > 1 else 0


def _copies_in_update(plan: HeadPlan) -> int:
    """Beside the gradient: one more where it is row-sparse (coalesced) or squared, and the rows that are worked on."""
    if plan.in_backward:
        return 0
    gradient = _gradient(plan, plan.accumulate)
    coalesced = gradient if plan.samples else 0
    squared = gradient // plan.stored * (4 if plan.stored == 4 else 8) if plan.clips_norm else 0
    # Rows at given places are read into temporaries, a slice of rows is not.
    rows = 4 * min(ROWS_OF_AN_UPDATE, plan.walked) * plan.size * (5 if plan.samples else 1)
    return max(squared, coalesced + rows)


def _gathered(plan: HeadPlan) -> int:
    return plan.stored * plan.chunks[1] * plan.size if plan.samples and not plan.kept_rows else 0


def _forward_products(plan: HeadPlan) -> int:
    """A place for a chunk's product; a GPU's products in half precision come in new ones, two at once."""
    return 4 * plan.chunks[1] * plan.batch * (3 if plan.gpu and plan.half else 1)


def _backward_products(plan: HeadPlan) -> int:
    """A product and its gradient, in one place unless a GPU rounds the gradient."""
    return (4 + plan.compute if plan.gpu and plan.half else 4) * plan.chunks[1] * plan.batch


def _gradient_rows(plan: HeadPlan) -> int:
    """Gradients of a chunk's centres, where they don't go to their place at once; see ``_forward_products``."""
    if not plan.in_backward and plan.stored == 4 and not (plan.gpu and plan.half):
        return 0
    return 4 * plan.chunks[1] * plan.size * (3 if plan.gpu and plan.half else 1)


def _rounded_operands(plan: HeadPlan, *, backward: bool) -> int:
    """Copies of a product's operands in the compute dtype; CPUs widen half precision again. And its result, if new."""
    longest, batch, size = plan.chunks[1], plan.batch, plan.size
    widened = 0 if plan.gpu or not plan.half else 4
    centres = (plan.compute if plan.stored != plan.compute else 0) + widened
    if not backward:
        return longest * size * centres + batch * size * widened
    result = 4 * batch * size if plan.half or plan.stored != 4 or plan.tf32 else 0
    gradient = plan.compute + widened if plan.half and not plan.gpu else 0
    return longest * size * centres + longest * batch * gradient + result


def _forward_temporaries(plan: HeadPlan) -> int:
    """Of [p, B], float32: five where nothing is fused, or candidates are looked for."""
    if plan.fused and not (plan.emphasizes and plan.top_k is not None):
        return 0
    return 5 * 4 * plan.chunks[1] * plan.batch


def _backward_temporaries(plan: HeadPlan) -> int:
    """Six of [p, B] or two of [p, d], float32, where nothing is fused."""
    return 0 if plan.fused else 4 * plan.chunks[1] * max(6 * plan.batch, 2 * plan.size)
