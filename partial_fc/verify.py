"""Verification of a run's backbone on the configured sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_fc import build
from partial_fc.build import Place
from partial_fc.checkpoint import load_backbone
from partial_fc.config import Config
from partial_fc.data import decode_images
from partial_fc.errors import ConfigError
from partial_fc.evaluate import VerificationResult, evaluate_pairs
from partial_fc.ranks import agreed


def verification_sets(config: Config) -> dict[str, Path]:
    """The configured verification files by name; relative ones start at the data's folder.

    Raises:
        ConfigError: one isn't there, or two have the same name.
    """
    place = Path(config.data.path).expanduser()
    base = place if place.is_dir() else place.parent
    sets: dict[str, Path] = {}
    for given in config.evaluate.sets:
        path = base / given
        if not path.is_file():
            raise ConfigError(f"evaluate.sets names {given!r}, but {path} is no file: correct the name, or data.path")
        if path.stem in sets:
            raise ConfigError(f"evaluate.sets names two files {path.stem!r}: expected each name once")
        sets[path.stem] = path
    return sets


def evaluate_saved(config: Config, run: Path, place: Place) -> dict[str, VerificationResult]:
    """Verification of a run's saved model on ``evaluate.sets``, by set. Collective.

    Raises:
        ConfigError: no set is configured.
        CheckpointError: the run holds no model, or another one than its configuration says.
    """
    precision = agreed(lambda: build.choose_precision(config, place.device))
    sets = agreed(lambda: verification_sets(config))
    if not sets:
        raise ConfigError("evaluate.sets is empty, expected verification files: add evaluate.sets='[lfw.bin]'")
    backbone = agreed(lambda: build.build_backbone(config, place))
    agreed(lambda: load_backbone(run / "model", backbone))
    return evaluate_sets(config, backbone, sets, place, precision)


def evaluate_sets(
    config: Config,
    backbone: nn.Module,
    sets: dict[str, Path],
    place: Place,
    precision: torch.dtype,
    progressed: Callable[[], None] | None = None,
) -> dict[str, VerificationResult]:
    """Verification on all ranks, by set. Collective.

    Args:
        config: image size and batch size.
        backbone: on every rank.
        sets: files by name.
        place: this process.
        precision: of the backbone's products.
        progressed: called at each batch.
    """

    def decode(images: Sequence[bytes]) -> Tensor:
        if progressed is not None:
            progressed()
        return decode_images(images, image_size=config.data.image_size, threads=config.data.threads)

    return {
        name: evaluate_pairs(
            backbone,
            path,
            decode=decode,
            batch_size=config.evaluate.batch_size,
            device=place.device,
            flip=config.evaluate.flip,
            autocast_dtype=None if precision == torch.float32 else precision,
        )
        for name, path in sets.items()
    }


def describe(name: str, result: VerificationResult) -> str:
    """A verification in a line."""
    rates = "  ".join(
        f"TAR@{far:g} {'too few pairs' if tar != tar else f'{tar:.4f}'}" for far, tar in result.tar_at_far.items()
    )
    return f"{name}: accuracy {result.accuracy:.4f} +- {result.accuracy_std:.4f}  AUC {result.auc:.4f}  {rates}"
