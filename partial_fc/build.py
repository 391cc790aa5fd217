"""From the configuration to objects: the only place that reads names from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed import Store  # type: ignore[attr-defined]

from partial_fc import models
from partial_fc.config import Config
from partial_fc.config_data import AugmentConfig, SourceConfig
from partial_fc.data import (
    Archive,
    Augmentation,
    BalancedOrder,
    ClassIndex,
    IdentityOrder,
    Order,
    Progress,
    SampleOrder,
    SampleStream,
    Sources,
    WeightedOrder,
    open_archive,
    open_stream,
)
from partial_fc.emphasis import Curricular, Negatives, Plain, SupportVectors
from partial_fc.errors import ConfigError
from partial_fc.head import PartialFC
from partial_fc.margins import ArcFace, CombinedMargin, CosFace, Margin, NormFace, SphereFace
from partial_fc.mining import FocalLoss, HardMining, Mining
from partial_fc.norm_margins import AdaFace, MagFace
from partial_fc.optim import RowAdamW, RowOptimizer, RowSGD
from partial_fc.schedule import Schedule

MARGINS: dict[str, type[Margin]] = {
    margin.__name__: margin for margin in (NormFace, CosFace, ArcFace, CombinedMargin, SphereFace, MagFace, AdaFace)
}
_NEGATIVES: dict[str, Callable[..., Negatives]] = {
    negatives.__name__: negatives for negatives in (Plain, SupportVectors, Curricular)
}
_MININGS: dict[str, Callable[..., Mining]] = {mining.__name__: mining for mining in (FocalLoss, HardMining)}
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "iresnet18": models.iresnet18,
    "iresnet34": models.iresnet34,
    "iresnet50": models.iresnet50,
    "iresnet100": models.iresnet100,
    "iresnet200": models.iresnet200,
    "mobilefacenet": models.mobilefacenet,
    "small": models.SmallNet,
}


@dataclass(frozen=True)
class Place:
    """Which process this is, and where it computes.

    Attributes:
        rank: among all ranks.
        world_size: W.
        local_rank: among the ranks of this machine.
        device: where backbone and head are.
        store: the job's, with a prefix of this attempt; None where there is only one process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    store: Store | None = None


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU.

    Raises:
        ConfigError: GPUs are asked for, and this machine has none for this rank.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.train.device == "cpu" or (config.train.device == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine shows {gpus}, expected one a rank "
            "(lower --nproc-per-node, or set train.device=cpu)"
        )
    return torch.device("cuda", local_rank)


def choose_precision(config: Config, device: torch.device) -> torch.dtype:
    """What the products of the backbone are rounded to: float32, bfloat16 or float16.

    Raises:
        ConfigError: anything but fp32 is asked for on a CPU.
    """
    name = config.train.precision
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name != "fp32" and device.type == "cpu":
        raise ConfigError(f"train.precision is {name!r} on the CPU, expected auto or fp32 (the others need a GPU)")
    return _DTYPES[name]


def choose_head_precision(config: Config, precision: torch.dtype) -> torch.dtype | Literal["tf32"] | None:
    """What the products of the head are rounded to; None: not rounded.

    Args:
        config: the configuration.
        precision: the backbone's (:func:`choose_precision`).
    """
    name = config.head.precision
    if name == "auto":
        if config.train.precision == "tf32":
            return "tf32"
        return None if precision == torch.float32 else precision
    return "tf32" if name == "tf32" else None if name == "fp32" else _DTYPES[name]


def build_sources(config: Config, progress: Progress | None = None) -> Sources:
    """The training images; the table of where they are is made where it isn't there yet, which may take minutes.

    Raises:
        DataError, ConfigError: they can't be read.
    """
    archives = [_open_source(source, config.data.cache, progress) for source in (config.data, *config.data.more)]
    return Sources(archives, merge_classes=config.data.merge_classes)


def _open_source(source: SourceConfig, cache: str | None, progress: Progress | None) -> Archive:
    return open_archive(
        source.path,
        format=source.format,
        num_classes=source.num_classes,
        cache=cache,
        image_key=source.image_key,
        label_key=source.label_key,
        progress=progress,
    )


def build_order(config: Config, sources: Sources) -> Order:
    """Which sample stands at which position of the stream."""
    section, seed = config.data, config.train.seed
    if section.order == "balanced":
        return BalancedOrder(ClassIndex(sources.all_labels()), seed, section.balance)
    if section.order == "identities":
        return IdentityOrder(ClassIndex(sources.all_labels()), seed, section.images_per_identity)
    weights = [section.weight, *(source.weight for source in section.more)]
    if any(weight != 1 for weight in weights):
        return WeightedOrder(sources.sizes, weights, seed)
    return SampleOrder(len(sources), seed)


def build_augmentation(section: AugmentConfig) -> Augmentation:
    """What may happen to a training image."""
    return Augmentation(**section.model_dump())


def build_stream(config: Config, sources: Sources, order: Order, place: Place) -> SampleStream:
    """This rank's part of the endless sample stream, in micro batches."""
    return open_stream(
        config.data.decoder,
        sources,
        order,
        batch_size=config.train.batch_size // config.train.accumulate,
        rank=place.rank,
        world_size=place.world_size,
        image_size=config.data.image_size,
        augmentation=build_augmentation(config.augment),
        seed=config.train.seed,
        threads=config.data.threads,
        readers=config.data.readers,
        prefetch=config.data.prefetch,
        device=place.device,
        max_image_pixels=config.data.max_image_pixels,
        max_bad_share=config.data.max_bad_share,
    )


def build_backbone(config: Config, place: Place) -> nn.Module:
    """The backbone with its initial weights, the same on every rank.

    Raises:
        ConfigError: an option that this backbone doesn't have.
    """
    section = config.backbone
    options: dict[str, object] = {"embedding_size": section.embedding_size, "image_size": config.data.image_size}
    if section.width is not None:
        options["width"] = section.width
    if section.dropout > 0:
        if section.name == "mobilefacenet":
            raise ConfigError(f"backbone.dropout is {section.dropout:g}, expected 0 with backbone.name=mobilefacenet")
        options["dropout"] = section.dropout
    torch.manual_seed(config.train.seed)
    try:
        backbone = _BACKBONES[section.name](**options)
    except ValueError as error:
        raise ConfigError(f"backbone: {error}") from error
    if section.sync_batchnorm and place.world_size > 1:
        if place.device.type != "cuda":
            raise ConfigError(
                "backbone.sync_batchnorm is true on the CPU, expected false (PyTorch has it on GPUs only)"
            )
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    backbone = backbone.to(place.device)
    # Convolutions are fastest with the channels innermost, on CPUs and on tensor cores.
    return backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_head(config: Config, num_classes: int, place: Place, precision: torch.dtype) -> PartialFC:
    """The sharded head; collective in nothing but its later calls."""
    section, seed = config.head, config.train.seed
    uneven = (config.train.batch_size // config.train.accumulate) % place.world_size != 0
    return PartialFC(
        config.backbone.embedding_size,
        num_classes,
        margin=MARGINS[section.margin.name](**section.margin.model_dump(exclude={"name"})),
        negatives=_NEGATIVES[section.negatives.name](**section.negatives.model_dump(exclude={"name"})),
        mining=None
        if section.mining is None
        else _MININGS[section.mining.name](**section.mining.model_dump(exclude={"name"})),
        scale=section.scale,
        sample_rate=section.sample_rate,
        seed=seed,
        sampled_classes=section.sampled_classes,
        correct_sampling=section.correct_sampling,
        margin_warmup_steps=section.margin_warmup_steps,
        negatives_warmup_steps=section.negatives_warmup_steps,
        uneven_batches=uneven,
        chunk_size=section.chunk_size,
        logits_budget=section.logits_budget,
        filter_gradient=section.filter_gradient,
        kernels=section.kernels,
        compute_dtype=choose_head_precision(config, precision),
        storage_dtype=_DTYPES[section.storage],
        device=place.device,
    )


def updates_in_backward(config: Config) -> tuple[bool, str]:
    """Whether the class centres are updated inside the backward pass, and in a line, why (not)."""
    if config.head.in_backward is False:
        return False, "head.in_backward=false"
    reasons = [
        f"{key}={value}"
        for key, value, bad in (
            ("train.accumulate", config.train.accumulate, config.train.accumulate > 1),
            ("train.precision", config.train.precision, config.train.precision == "fp16"),
            ("optim.head_clip_norm", config.optim.head_clip_norm, config.optim.head_clip_norm is not None),
        )
        if bad
    ]
    if reasons:
        return False, f"{', '.join(reasons)} needs the whole gradient"
    return True, "nothing needs the whole gradient"


def build_optimizers(
    config: Config, backbone: nn.Module, head: PartialFC
) -> tuple[torch.optim.Optimizer, RowOptimizer]:
    """Optimizers of backbone and head, with their peak learning rates."""
    section = config.optim
    in_backward, _ = updates_in_backward(config)
    head_rate = section.head_learning_rate or section.learning_rate
    head_decay = section.weight_decay if section.head_weight_decay is None else section.head_weight_decay
    shared: dict[str, Any] = {
        "max_value": section.head_clip_value,
        "max_row_norm": section.head_clip_row_norm,
        "state_dtype": None if section.head_state is None else _DTYPES[section.head_state],
        "seed": config.train.seed,
        "kernels": config.head.kernels,
        "in_backward": in_backward,
    }
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    fused = parameters[0].is_cuda
    of_backbone: torch.optim.Optimizer
    of_head: RowOptimizer
    if section.name == "adamw":
        of_backbone = torch.optim.AdamW(
            parameters, section.learning_rate, section.betas, weight_decay=section.weight_decay, fused=fused
        )
    else:
        of_backbone = torch.optim.SGD(
            parameters,
            section.learning_rate,
            section.momentum,
            weight_decay=section.weight_decay,
            nesterov=section.nesterov,
            fused=fused,
        )
    if (section.head_name or section.name) == "adamw":
        of_head = RowAdamW(head.parameters(), head_rate, section.betas, weight_decay=head_decay, **shared)
    else:
        of_head = RowSGD(head.parameters(), head_rate, section.momentum, head_decay, section.nesterov, **shared)
    return of_backbone, of_head


def total_steps(config: Config, samples_a_pass: int) -> int:
    """Optimizer steps of the run: ``train.steps``, or so many that ``train.epochs`` passes of the order are done.

    Raises:
        ConfigError: the warm-up is not shorter than that.
    """
    steps = config.train.steps
    if steps is None:
        assert config.train.epochs is not None
        steps = max(1, round(config.train.epochs * samples_a_pass / config.train.batch_size))
    if config.optim.warmup_steps >= steps:
        raise ConfigError(
            f"optim.warmup_steps is {config.optim.warmup_steps}, expected fewer than the run's {steps} steps"
        )
    return steps


def build_schedule(config: Config, steps: int) -> Schedule:
    """Factor of the learning rate by step."""
    section = config.optim
    return Schedule(
        section.schedule,
        steps,
        warmup_steps=section.warmup_steps,
        power=section.power,
        milestones=section.milestones,
        gamma=section.gamma,
    )
