"""What a run would take, before it is started: memory by item, bytes sent, operations, and the most classes that fit.

The formulas of the head are in ``footprint``; here the configuration is read, and the backbone is measured on a few
images; ``plan_report`` makes the tables. Bytes; 1 GB = 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from partial_fc import build, footprint
from partial_fc.build import Place
from partial_fc.chunks import cpu_cache
from partial_fc.config import Config
from partial_fc.errors import ConfigError
from partial_fc.footprint import HeadPlan, Sizes, total

SIZES = (10**6, 10**7, 10**8, 10**9)
DEFAULT_MEMORY = 80 * 10**9
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_UNITS["TI"] = 1 << 40


class Gpu(NamedTuple):
    """Memory as nvidia-smi reports it, and L2 cache, both in MiB."""

    memory: int
    cache: float


GPUS = {
    "v100-16": Gpu(16384, 6),
    "v100-32": Gpu(32768, 6),
    "a100-40": Gpu(40960, 40),
    "a100-80": Gpu(81920, 40),
    "l40s": Gpu(46068, 96),
    "h100": Gpu(81559, 50),
    "h200": Gpu(143771, 50),
    "b200": Gpu(183359, 126.5),
}


@dataclass(frozen=True)
class Machine:
    """What one rank has.

    Attributes:
        name: for the reader.
        memory: bytes.
        cache: bytes that a chunk of the head fills.
        gpu: whether it is a GPU.
    """

    name: str
    memory: int
    cache: int
    gpu: bool


@dataclass(frozen=True)
class BackbonePlan:
    """The backbone in plain numbers; bytes.

    Attributes:
        parameters: of the trainable parameters; as many of their gradients.
        buffers: of BatchNorm's statistics.
        state: of the optimizer's.
        fixed: what a forward saves for the backward, whatever the batch.
        per_image: and for each image.
        largest: the largest tensor of those, an image.
        image: one image, float32.
        prefetch: batches that are decoded ahead.
    """

    parameters: int
    buffers: int
    state: int
    fixed: int
    per_image: int
    largest: int
    image: int
    prefetch: int

    def activations(self, rows: int) -> int:
        """Bytes that wait for the backward of so many images."""
        return self.fixed + rows * self.per_image

    def resident(self, rows: int) -> Sizes:
        """Bytes that stay from step to step, by item; DDP's buckets are the gradients."""
        return {
            "backbone": self.parameters + self.buffers,
            "backbone: gradients": self.parameters,
            "backbone: optimizer state": self.state,
            # Decoded ahead, in use, and with the channels innermost.
            "images": (self.prefetch + 2) * rows * self.image,
        }


class Memory(NamedTuple):
    """Memory of a rank; bytes.

    Attributes:
        moment: of a step that takes most: ``forward`` or ``backward`` of the head, backward of the ``backbone``, or
            ``update``.
        items: what is held then.
        others: what is held at other moments only, at most.
    """

    moment: str
    items: Sizes
    others: Sizes

    @property
    def together(self) -> int:
        """Sum of the items."""
        return total(self.items)


@dataclass(frozen=True)
class RunPlan:
    """A run in plain numbers, but for the number of classes."""

    title: str
    machine: Machine
    backbone: BackbonePlan
    head: HeadPlan
    rate: float
    """Share of the classes that a step draws; 1: by ``number``."""
    number: int | None
    """How many it draws; None: by ``rate``."""
    stages: bool
    """Whether commits are written from a copy."""

    def at(self, num_classes: int, ranks: int | None = None) -> HeadPlan:
        """The head with so many classes, on so many ranks (with as many rows on each as before)."""
        ranks = self.head.ranks if ranks is None else ranks
        batch = self.head.batch if ranks == self.head.ranks else self.head.rows * ranks
        drawn = round(self.rate * num_classes) if self.number is None else min(self.number, num_classes)
        values = {**vars(self.head), "num_classes": num_classes, "ranks": ranks, "batch": batch, "drawn": drawn}
        return HeadPlan(**values)

    def memory(self, head: HeadPlan) -> Memory:
        """Bytes by item of the fullest rank, at the moment of a step that takes most."""
        stays = {**footprint.resident(head), **self.backbone.resident(head.rows)}
        if not self.machine.gpu:
            stays["commit: staged copy"] = self.staged(head)
        saved = {"activations": self.backbone.activations(head.rows)}
        of_head = footprint.phases(head)
        centres = "gradient of the centres"
        # Two gradients of the largest feature map.
        passing = {"activations: gradients": 2 * head.rows * self.backbone.largest}
        moments = {
            "forward": {**of_head["forward"], **saved},
            "backward": {**of_head["backward"], **saved},
            "backbone": {centres: of_head["update"].get(centres, 0), **saved, **passing},
            "update": of_head["update"],
        }
        name, items = max(moments.items(), key=lambda moment: total(moment[1]))
        others: Sizes = {}
        for moment in moments.values():
            for item, size in moment.items():
                others[item] = max(size, others.get(item, 0))
        return Memory(
            name,
            {item: size for item, size in {**stays, **items}.items() if size},
            {item: size for item, size in others.items() if size and not items.get(item)},
        )

    def staged(self, head: HeadPlan) -> int:
        """Bytes on the host of the copy that a commit is written from; rank 0's, which saves the backbone."""
        if not self.stages:
            return 0
        return footprint.staged(head) + self.backbone.parameters + self.backbone.buffers + self.backbone.state

    def most_classes(self, ranks: int) -> int:
        """The largest C whose fullest rank fits; 0: none."""
        return footprint.largest(lambda count: self.memory(self.at(count, ranks)).together <= self.machine.memory)


def read_memory(text: str) -> int:
    """Bytes of ``80GB``, ``141GiB``, ``80e9``, as ``--memory`` takes them.

    Raises:
        ConfigError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([KMGT]I?)?B)?\s*", text, re.IGNORECASE)
    size = round(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ConfigError(f"--memory is {text!r}, expected bytes above 0 such as 80GB, 141GiB or 80e9")
    return size


def choose_machine(on_cpu: bool, gpu: str | None, memory: str | None) -> Machine:
    """What a rank has: a GPU of the table, and what ``--memory`` says instead of its memory.

    Args:
        on_cpu: whether the configuration asks for the CPU (then the cache is that of this machine's CPU).
        gpu: a name of :data:`GPUS`; None: an H100's cache, and 80 GB.
        memory: as :func:`read_memory`; None: the GPU's.

    Raises:
        ConfigError: a name or a size that can't be read; a GPU for a run on the CPU.
    """
    if gpu is not None and gpu.lower() not in GPUS:
        raise ConfigError(f"--gpu is {gpu!r}, expected one of {', '.join(GPUS)} (or give --memory)")
    if gpu is not None and on_cpu:
        raise ConfigError(f"--gpu is {gpu!r} with train.device=cpu, expected --memory alone")
    spec = GPUS[(gpu or "h100").lower()]
    size = read_memory(memory) if memory is not None else spec.memory << 20 if gpu is not None else DEFAULT_MEMORY
    if on_cpu:
        return Machine("CPU", size, cpu_cache() // 2, gpu=False)
    name = gpu.upper() if gpu is not None else "a GPU with an H100's cache"
    return Machine(name, size, int(spec.cache * (1 << 20)), gpu=True)


def plan_run(config: Config, machine: Machine, ranks: int) -> RunPlan:
    """Read the configuration, and measure its backbone.

    Args:
        config: the configuration; its data set isn't opened.
        machine: what a rank has.
        ranks: W.

    Raises:
        ConfigError: fewer than one rank, or fewer rows of a micro batch than ranks.
    """
    train, optim, section = config.train, config.optim, config.head
    batch = train.batch_size // train.accumulate
    if not 1 <= ranks <= batch:
        raise ConfigError(f"--ranks is {ranks}, expected 1 to {batch} (rows of a micro batch: train.batch_size)")
    precision = _precision(config, machine)
    compute = build.choose_head_precision(config, precision)
    storage = 2 if section.storage == "bf16" else 4
    in_backward, _ = build.updates_in_backward(config)
    optimizer = optim.head_name or optim.name
    head = HeadPlan(
        num_classes=config.data.num_classes or SIZES[0],
        ranks=ranks,
        batch=batch,
        size=config.backbone.embedding_size,
        cache=machine.cache,
        stored=storage,
        optimizer=optimizer,
        momentum=optim.momentum > 0,
        state=storage if optim.head_state is None else 2 if optim.head_state == "bf16" else 4,
        compute=compute.itemsize if isinstance(compute, torch.dtype) else 4,
        tf32=compute == "tf32",
        in_backward=in_backward,
        accumulate=train.accumulate,
        clips_norm=optim.head_clip_norm is not None,
        corrects=section.correct_sampling,
        norms=build.MARGINS[section.margin.name].needs_norms,
        emphasizes=section.negatives.name != "Plain",
        top_k=getattr(section.negatives, "top_k", None),
        logits_budget=section.logits_budget,
        chunk_size=section.chunk_size,
        gpu=machine.gpu,
        compiled=None if section.kernels == "auto" else section.kernels != "eager",
    )
    products = "tf32" if compute == "tf32" else "fp32" if compute is None else str(compute).removeprefix("torch.")
    title = (
        f"{train.name}: {ranks} rank{'s' * (ranks > 1)} x {head.rows} rows"
        f"{f' x {train.accumulate} micro batches' if train.accumulate > 1 else ''}, {config.backbone.name}, "
        f"d = {head.size}, products in {products}, centres by {optimizer} "
        f"{'in backward' if in_backward else 'in two phases'}; {machine.name}, {show_bytes(machine.memory)} a rank"
    )
    backbone, stages = plan_backbone(config, precision), config.checkpoint.background
    return RunPlan(title, machine, backbone, head, section.sample_rate, section.sampled_classes, stages)


def _precision(config: Config, machine: Machine) -> torch.dtype:
    """Of the backbone's products; auto is bfloat16 on every GPU of the table, as ``build`` chooses there."""
    if machine.gpu:
        return {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
            config.train.precision, torch.float32
        )
    return build.choose_precision(config, torch.device("cpu"))


def plan_backbone(config: Config, precision: torch.dtype) -> BackbonePlan:
    """Build the backbone on the CPU, and count what its forward saves for 2 and for 4 images.

    Args:
        config: the configuration.
        precision: what the products are rounded to.
    """
    backbone = build.build_backbone(config, Place(0, 1, 0, torch.device("cpu")))
    parameters = sum(parameter.nbytes for parameter in backbone.parameters())
    side, optim = config.data.image_size, config.optim
    few, many = (saved_for_backward(backbone, count, side, precision) for count in (2, 4))
    copies = 2 if optim.name == "adamw" else 1 if optim.momentum > 0 else 0
    per_image = (total(many) - total(few)) // 2
    return BackbonePlan(
        parameters=parameters,
        buffers=sum(buffer.nbytes for buffer in backbone.buffers()),
        state=copies * parameters,
        fixed=max(0, total(few) - 2 * per_image),
        per_image=per_image,
        # Growing with the batch: rounded weights don't.
        largest=max((many[key] - few[key]) // 2 for key in few),
        image=3 * side * side * 4,
        prefetch=config.data.prefetch,
    )


def saved_for_backward(backbone: nn.Module, count: int, side: int, precision: torch.dtype) -> Sizes:
    """Bytes of the tensors that a training forward of ``count`` images keeps, in their order; not parameters, images.

    Args:
        backbone: on the CPU; its statistics move.
        count: images.
        side: of an image, pixels.
        precision: of the products, by autocast.
    """
    images = torch.zeros(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    skipped = {tensor.untyped_storage().data_ptr() for tensor in (images, *backbone.parameters(), *backbone.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    rounds = precision != torch.float32
    autocast = torch.autocast("cpu", precision) if rounds else contextlib.nullcontext()
    threads = torch.get_num_threads()
    # So little work takes several threads longer, where other processes are busy.
    torch.set_num_threads(1)
    try:
        # The output keeps what was packed alive, so that no address comes twice.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            output = backbone.train()(images)
        del output
    finally:
        torch.set_num_threads(threads)
    return {str(number): size for number, size in enumerate(found.values())}


def sent(run: RunPlan) -> dict[str, tuple[int, int]]:
    """(bytes of the tensor, bytes that each rank sends) of each collective of a step, all its micro batches together.

    The backbone's gradients are summed once a step, those of the micro batches before the last one stay at home.
    """
    ranks = run.head.ranks
    sizes = {name: size * run.head.accumulate for name, size in footprint.payload(run.head).items()}
    if ranks > 1:
        sizes["backbone_gradient"] = run.backbone.parameters
    return {name: (size, footprint.on_the_wire(name, size, ranks)) for name, size in sizes.items()}


def as_dict(run: RunPlan, sizes: Sequence[int]) -> dict[str, Any]:
    """All of the plan, for ``--json``: bytes and counts."""
    return {
        "title": run.title,
        "memory_per_rank": run.machine.memory,
        "sizes": [_size_as_dict(run, count) for count in sizes],
        "sent": {name: {"tensor": whole, "rank_sends": wire} for name, (whole, wire) in sent(run).items()},
        "largest": [
            {"ranks": ranks, "num_classes": run.most_classes(ranks)} for ranks in dict.fromkeys((run.head.ranks, 1))
        ],
    }


def _size_as_dict(run: RunPlan, count: int) -> dict[str, Any]:
    head = run.at(count)
    memory = run.memory(head)
    return {
        "num_classes": count,
        "local_classes": head.local,
        "walked_classes": head.walked,
        "chunks": head.chunks[0],
        "chunk_classes": head.chunks[1],
        "fullest_moment": memory.moment,
        "memory": memory.items,
        "memory_at_other_moments": memory.others,
        "memory_total": memory.together,
        "fits": memory.together <= run.machine.memory,
        "host_memory": footprint.host_memory(head),
        "staged_for_commits": run.staged(head),
        "operations": footprint.operations(head),
    }


def show_bytes(size: int) -> str:
    """Three digits and a decimal unit: ``85.5 GB``."""
    if size == 0:
        return "-"
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            value = size / factor
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size} B"


def show_count(count: int) -> str:
    """``10^7`` for such a power from 10^6 on, else the digits in groups."""
    power = len(str(count)) - 1
    return f"10^{power}" if power >= 6 and count == 10**power else f"{count:,}"
