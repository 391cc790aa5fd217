"""The configuration: typed sections, read from YAML and ``section.key=value`` overrides, checked together.

:func:`load_config` reports every problem at once, one line each: where it stands (``file:line`` or ``override``), the
key, the value got, what was expected, and the nearest valid name. Only the top of the package imports this module;
everything below ``build`` takes plain arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from partial_fc.config_data import AugmentConfig, DataConfig, data_contradictions
from partial_fc.config_reader import Contradiction, raise_contradictions, read_model, write_yaml
from partial_fc.config_train import (
    CheckpointConfig,
    EvaluateConfig,
    MetricsConfig,
    TrainConfig,
    metrics_contradictions,
)
from partial_fc.config_types import BelowOne, Cosine, Count, NotNegative, Positive, Section


class BackboneConfig(Section):
    """The network that makes embeddings of images."""

    name: Literal["iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200", "mobilefacenet", "small"] = (
        "iresnet50"
    )
    """Architecture."""
    embedding_size: Count = 512
    """Length of an embedding."""
    width: Count | None = None
    """Channels of the first stage; for the small net only. Null: the net's own."""
    dropout: BelowOne = 0.0
    """Probability with which a feature is dropped before the last layer."""
    sync_batchnorm: bool = False
    """Batch statistics over all ranks instead of one."""


class NormFaceConfig(Section):
    """No margin."""

    name: Literal["NormFace"] = "NormFace"
    """Which margin."""


class CosFaceConfig(Section):
    """Additive cosine margin, c - m."""

    name: Literal["CosFace"] = "CosFace"
    """Which margin."""
    m: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Margin on the cosine."""
    easy_margin: bool = False
    """No margin where the target cosine is at most 0."""


class ArcFaceConfig(Section):
    """Additive angular margin, cos(theta + m)."""

    name: Literal["ArcFace"] = "ArcFace"
    """Which margin."""
    m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.5
    """Margin on the angle, in radians."""
    easy_margin: bool = False
    """No margin where the target cosine is at most 0."""


class CombinedMarginConfig(Section):
    """Monotone cos(m1 theta + m2) - m3."""

    name: Literal["CombinedMargin"] = "CombinedMargin"
    """Which margin."""
    m1: Positive = 1.0
    """Factor of the angle."""
    m2: NotNegative = 0.5
    """Margin on the angle, in radians."""
    m3: NotNegative = 0.0
    """Margin on the cosine."""
    easy_margin: bool = False
    """No margin where the target cosine is at most 0."""


class SphereFaceConfig(Section):
    """Multiplicative angular margin, cos(m theta) unfolded, annealed: (lambda c + psi) / (1 + lambda)."""

    name: Literal["SphereFace"] = "SphereFace"
    """Which margin."""
    m: Count = 4
    """Factor of the angle, a whole number."""
    lambda_min: NotNegative = 5.0
    """Weight of the bare cosine in the end; 5 and the three below are the authors' published setting."""
    lambda_start: NotNegative = 1000.0
    """Weight of the bare cosine at first."""
    gamma: NotNegative = 0.12
    """How fast that weight falls, per step (the official SV-X layer: 1e-4, with power 2)."""
    power: NotNegative = 1.0
    """Exponent of the fall."""


class MagFaceConfig(Section):
    """Angular margin that grows with the norm of the embedding, and a regularizer that draws norms up."""

    name: Literal["MagFace"] = "MagFace"
    """Which margin."""
    l_a: Positive = 10.0
    """Smallest norm; smaller ones count as this."""
    u_a: Positive = 110.0
    """Largest norm; larger ones count as this."""
    l_m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.45
    """Margin at l_a, in radians."""
    u_m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.8
    """Margin at u_a, in radians."""
    lambda_g: NotNegative = 35.0
    """Weight of the regularizer."""
    easy_margin: bool = False
    """No margin where the target cosine is at most 0."""


class AdaFaceConfig(Section):
    """Angular and cosine margin by image quality, read off the norm of the embedding."""

    name: Literal["AdaFace"] = "AdaFace"
    """Which margin."""
    m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.4
    """Margin, on the angle in radians and on the cosine."""
    h: NotNegative = 0.333
    """How strongly the norm acts."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in the running mean and deviation of the norms."""


class PlainConfig(Section):
    """No emphasis of negatives."""

    name: Literal["Plain"] = "Plain"
    """Which emphasis."""
    filter_above: Cosine | None = None
    """Negatives whose cosine lies above this leave the sum (noisy labels); null: none do."""


class SupportVectorsConfig(Section):
    """Negatives above the boundary are raised."""

    name: Literal["SupportVectors"] = "SupportVectors"
    """Which emphasis."""
    t: Annotated[float, Field(ge=1, le=2)] = 1.2
    """Strength; 1 is none. 1.2 is the papers' setting."""
    mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: t c + t - 1; fixed: c + t - 1."""
    top_k: Count | None = None
    """Keep only the k hardest support vectors of each sample, over all shards; null: all."""
    filter_above: Cosine | None = None
    """Negatives whose cosine lies above this leave the sum (noisy labels); null: none do."""


class CurricularConfig(Section):
    """Negatives above the boundary count more as training goes on: c (tau + c), tau the mean target cosine."""

    name: Literal["Curricular"] = "Curricular"
    """Which emphasis."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in the running mean tau."""
    top_k: Count | None = None
    """Keep only the k hardest support vectors of each sample, over all shards; null: all."""
    filter_above: Cosine | None = None
    """Negatives whose cosine lies above this leave the sum (noisy labels); null: none do."""


class FocalLossConfig(Section):
    """Easy samples count less: (1 - p)^gamma times the loss of each sample."""

    name: Literal["FocalLoss"] = "FocalLoss"
    """Which mining."""
    gamma: NotNegative = 2.0
    """How much less; 0 is the plain mean."""


class HardMiningConfig(Section):
    """The mean over the hardest samples of the global (micro) batch."""

    name: Literal["HardMining"] = "HardMining"
    """Which mining."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the samples that count."""


MarginConfig = Annotated[
    NormFaceConfig
    | CosFaceConfig
    | ArcFaceConfig
    | CombinedMarginConfig
    | SphereFaceConfig
    | MagFaceConfig
    | AdaFaceConfig,
    Field(discriminator="name"),
]
NegativesConfig = Annotated[PlainConfig | SupportVectorsConfig | CurricularConfig, Field(discriminator="name")]
MiningConfig = Annotated[FocalLossConfig | HardMiningConfig, Field(discriminator="name")]


class HeadConfig(Section):
    """The classifier and its loss. A margin, emphasis or mining may be its name alone: ``margin: ArcFace``."""

    margin: MarginConfig = CosFaceConfig()
    """Target margin, by name with its parameters."""
    negatives: NegativesConfig = PlainConfig()
    """Emphasis of negatives, by name with its parameters."""
    mining: MiningConfig | None = None
    """Sample mining, by name with its parameters; null: the mean of all samples."""
    margin_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the margin grows from 0 (SphereFace anneals by itself)."""
    negatives_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the emphasis grows from none (Curricular adapts by itself)."""
    scale: Positive = 64.0
    """Scale of the cosines; 64 is the setting of CosFace and ArcFace."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the classes that a step draws, besides those of its batch (Partial-FC)."""
    sampled_classes: Count | None = None
    """How many classes a step draws over all ranks, instead of sample_rate; null: by the rate."""
    correct_sampling: bool = False
    """Weigh the drawn negatives so that they stand for those that weren't drawn."""
    in_backward: Literal["auto"] | bool = "auto"
    """Update the class centres chunk by chunk inside the backward pass, without a gradient in memory; auto: where
    gradient accumulation, fp16 and head_clip_norm allow it."""
    chunk_size: Count | None = None
    """Classes that are walked at once; null: sized to the cache."""
    logits_budget: Annotated[int, Field(ge=0)] | None = None
    """Bytes of products that each rank's forward may keep for the backward, which makes the others again; null: a
    thirty-second of what its centres take."""
    filter_gradient: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Leave a class out of its own gradient's product where its softmax weight is below this for the whole batch;
    null: exact."""
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """What runs the elementwise part; auto: torch.compile where it works and repays its time, else plain PyTorch."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """What the head's products are rounded to; auto: as train.precision."""
    storage: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored class centres; bf16 halves them, and is rounded stochastically."""

    @field_validator("margin", "negatives", "mining", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        default = cls.model_fields[info.field_name].default
        if isinstance(value, dict) and "name" not in value and default is not None:
            return {"name": default.name, **value}
        return value


class OptimConfig(Section):
    """Optimizer and learning rate schedule of backbone and head."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    head_name: Literal["sgd", "adamw"] | None = None
    """Optimizer of the class centres; null: the same."""
    learning_rate: Positive = 0.1
    """Peak learning rate, of the global batch."""
    head_learning_rate: Positive | None = None
    """Peak learning rate of the class centres; null: the same."""
    momentum: BelowOne = 0.9
    """Momentum (sgd)."""
    nesterov: bool = False
    """Nesterov's momentum (sgd)."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    """Decay of the two running means (adamw)."""
    weight_decay: NotNegative = 5e-4
    """Weight decay; 5e-4 is the setting of CosFace and ArcFace with sgd."""
    head_weight_decay: NotNegative | None = None
    """Weight decay of the class centres; null: the same."""
    schedule: Literal["polynomial", "cosine", "step", "constant"] = "polynomial"
    """How the learning rate falls after the warm-up, per optimizer step."""
    power: Positive = 2.0
    """Exponent of the polynomial schedule."""
    milestones: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Steps after which the step schedule multiplies the rate by gamma, rising."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of the step schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    clip_norm: Positive | None = None
    """Largest norm of the backbone's gradient; null: no clipping."""
    head_clip_norm: Positive | None = None
    """Largest norm of the class centres' gradient over all shards; null: no clipping."""
    head_clip_row_norm: Positive | None = None
    """Largest norm of the gradient of one class centre; null: no clipping."""
    head_clip_value: Positive | None = None
    """Largest absolute value in the gradient of a class centre; null: no clipping."""
    head_state: Literal["fp32", "bf16"] | None = None
    """Type of the class centres' optimizer state; bf16 is rounded stochastically. Null: as head.storage."""


class Config(Section):
    """All sections of a run."""

    data: DataConfig
    """Where the training images are and how they are read."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of a training image."""
    backbone: BackboneConfig = BackboneConfig()
    """The network that makes embeddings of images."""
    head: HeadConfig = HeadConfig()
    """The classifier and its loss."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate schedule."""
    train: TrainConfig
    """The loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Commits of the whole state, which a run goes on from."""
    metrics: MetricsConfig = MetricsConfig()
    """The Prometheus endpoint of each rank."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Verification during and after training."""

    @model_validator(mode="after")
    def _agree(self) -> Config:
        raise_contradictions(list(_contradictions(self)))
        return self

    def dump(self, path: str | Path) -> None:
        """Write the resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
        Path(path).write_text(write_yaml(self.model_dump(mode="json")), encoding="utf-8")


def _contradictions(config: Config) -> Iterator[Contradiction]:
    """What no single value shows."""
    backbone, head, optim, train = config.backbone, config.head, config.optim, config.train
    if train.steps is None and train.epochs is None:
        yield Contradiction(("train.steps", "train.epochs"), "missing, expected train.steps or train.epochs")
    if train.name == "targets":
        text = f"got {train.name!r}, expected another name: beside the runs, that folder holds what Prometheus reads"
        yield Contradiction(("train.name",), text)
    if train.steps is not None and train.epochs is not None:
        text = (
            f"got {train.steps} next to train.epochs={train.epochs:g}, expected only one of them: set the other to null"
        )
        yield Contradiction(("train.steps", "train.epochs"), text)
    if train.batch_size % train.accumulate:
        text = f"got {train.batch_size}, expected a multiple of train.accumulate={train.accumulate}"
        yield Contradiction(("train.batch_size", "train.accumulate"), text)
    if train.steps is not None and optim.warmup_steps >= train.steps:
        text = f"got {optim.warmup_steps}, expected fewer than train.steps={train.steps}"
        yield Contradiction(("optim.warmup_steps", "train.steps"), text)
    yield from data_contradictions(config.data, train.batch_size // train.accumulate)
    if backbone.width is not None and backbone.name != "small":
        text = f"got {backbone.width}, expected null with backbone.name={backbone.name} (only small has a width)"
        yield Contradiction(("backbone.width", "backbone.name"), text)
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        text = f"got true, expected false with optim.name={optim.name}, optim.momentum={optim.momentum:g}"
        yield Contradiction(("optim.nesterov", "optim.name", "optim.momentum"), text)
    if bool(optim.milestones) != (optim.schedule == "step"):
        wanted = "at least one step" if optim.schedule == "step" else "an empty list"
        text = f"got {list(optim.milestones)}, expected {wanted} with optim.schedule={optim.schedule}"
        yield Contradiction(("optim.milestones", "optim.schedule"), text)
    elif list(optim.milestones) != sorted(set(optim.milestones)):
        yield Contradiction(("optim.milestones",), f"got {list(optim.milestones)}, expected steps that rise")
    if head.sampled_classes is not None and head.sample_rate != 1:
        text = f"got {head.sampled_classes} next to head.sample_rate={head.sample_rate:g}, expected only one of them"
        yield Contradiction(("head.sampled_classes", "head.sample_rate"), text)
    if head.correct_sampling and head.sampled_classes is None and head.sample_rate == 1:
        text = "got true, expected false where all classes are used (head.sample_rate=1)"
        yield Contradiction(("head.correct_sampling", "head.sample_rate"), text)
    if isinstance(head.margin, MagFaceConfig) and not (
        head.margin.l_a < head.margin.u_a and head.margin.l_m <= head.margin.u_m
    ):
        text = "got bounds of MagFace that don't rise, expected l_a < u_a and l_m <= u_m"
        yield Contradiction(("head.margin",), text)
    yield from metrics_contradictions(config.metrics)
    saves = config.checkpoint.every_steps is not None or config.checkpoint.every_minutes is not None
    if train.on_divergence == "rollback" and not saves:
        text = "got rollback without a commit to go back to, expected checkpoint.every_steps or every_minutes with it"
        yield Contradiction(("train.on_divergence", "checkpoint.every_steps"), text)
    if head.in_backward is True:
        for key, value, bad in [
            ("optim.head_clip_norm", optim.head_clip_norm, optim.head_clip_norm is not None),
            ("train.accumulate", train.accumulate, train.accumulate > 1),
            ("train.precision", train.precision, train.precision == "fp16"),
        ]:
            if bad:
                text = f"got true, expected auto or false with {key}={value}"
                yield Contradiction(("head.in_backward", key), text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides in order, and check all of it.

    Args:
        path: YAML file; numbers and truth values as in YAML 1.2 (``5e-4`` is a number, ``on`` is text).
        overrides: ``section.key=value``, at any depth (``head.margin.m=0.4``), the value in YAML. A mapping replaces
            what the file has there.

    Returns:
        The configuration, with ``train.name`` filled in from the name of the file.

    Raises:
        ConfigError: every problem found, one line each.
    """
    path = Path(path)
    return read_model(Config, path, overrides, defaults={"train.name": path.stem})


def data_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a tool that only looks at images: its sections ``data`` and ``augment`` count.

    Args:
        path: a data set, or a configuration (``.yaml``) that names one; it need not say how long the run is.
        overrides: ``section.key=value``, as for :func:`load_config`.

    Raises:
        ConfigError: every problem found, one line each.
    """
    file = Path(path) if Path(path).suffix in (".yaml", ".yml") else None
    # As JSON, which is YAML in which no character of a path means anything.
    data = [] if file else [f"data.path={json.dumps(str(path))}"]
    # Last, so that they stand whatever the file says: a run has one of the two, and a tool has no use for either.
    length = ["train.steps=null", "train.epochs=1"]
    return read_model(Config, file, [*data, *overrides, *length], defaults={})
