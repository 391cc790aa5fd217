"""What the commands ``partial-fc head ...`` do. Legend: C classes, K new classes, d embedding size."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from partial_fc import build
from partial_fc.build import Place
from partial_fc.checkpoint import load_backbone
from partial_fc.checkpoint.foreign import import_arcface, import_weights
from partial_fc.checkpoint.marker import Commit
from partial_fc.checkpoint.surgery import change_classes, check_memory, check_target, extend_classes, find_commit
from partial_fc.config import Config, data_config
from partial_fc.config_data import SourceConfig
from partial_fc.data.class_map import REMOVED, read_groups, read_order, read_removed, write_class_map
from partial_fc.errors import CheckpointError, ConfigError, DataError
from partial_fc.head import PartialFC
from partial_fc.imprint import imprint
from partial_fc.progress import progress_bars
from partial_fc.tools import given_path


def run_import_arcface(paths: Sequence[Path], out: Path, *, backbone_name: str | None) -> None:
    """Make a commit of arcface_torch's checkpoints; see :func:`partial_fc.checkpoint.foreign.import_arcface`."""
    info = import_arcface([path.expanduser() for path in paths], out.expanduser(), backbone_name=backbone_name)
    (done,) = info["history"]
    print(
        f"{out}: {info['num_classes']:,} classes of {info['embedding_size']} from {len(done['from'])} ranks, "
        f"and {info['config']['backbone']['name']}"
    )
    if done["unused"]:
        print(f"not used: {', '.join(done['unused'])}; the run begins at step 0 with the optimizer's state at zero")
    _say_next(out)


def run_import_weights(file: Path, out: Path, *, key: str | None) -> None:
    """Make a commit of a matrix of class centres; see :func:`partial_fc.checkpoint.foreign.import_weights`."""
    info = import_weights(file.expanduser(), out.expanduser(), key=key)
    print(f"{out}: {info['num_classes']:,} classes of {info['embedding_size']}, no backbone")
    _say_next(out)


def run_extend(
    path: Path,
    out: Path,
    overrides: Sequence[str],
    *,
    data: Path | None,
    count: int | None,
    batch_size: int,
    limit_per_class: int | None,
) -> None:
    """Add classes to a commit, behind its last one.

    With ``data``, a new centre is the direction of the class's embeddings (:func:`partial_fc.imprint.imprint`) times
    the mean norm of the old centres. With ``count`` it is what a new head draws for that id.

    Args:
        path: a commit, a run or a folder of commits.
        out: the new commit.
        overrides: ``section.key=value``, how ``data`` is read.
        data: the images of the new classes, or a configuration that names them; its label i becomes C + i.
        count: K, without images.
        batch_size: images in a forward.
        limit_per_class: the first so many images of a class are looked at; None: all.

    Raises:
        ConfigError: neither or both of ``data`` and ``count``, or there is something at ``out``.
        CheckpointError: the commit can't be read, or has no backbone; or the new one can't be written.
        DataError: the images can't be read, or a class has none.
    """
    if (data is None) == (count is None):
        raise ConfigError(
            f"got --data {data} and --count {count}, expected one of them: images, or a number of classes"
        )
    if count is not None and overrides:
        raise ConfigError(f"got {overrides[0]!r} with --count, expected changes of the configuration with --data only")
    out = given_path(out, "the folder of the new commit")
    check_target(out)
    commit = find_commit(path.expanduser(), print)
    classes = commit.info["num_classes"]
    if data is not None:
        config = _settings(commit, given_path(data, "a data set"), overrides)
        advice = _further_sets(config, data)
        centres = _imprint(commit, config, batch_size, limit_per_class)
        entry = {"operation": "extend", "data": config.data.path, "limit_per_class": limit_per_class}
    else:
        assert count is not None
        centres = _draw(commit, count)
        entry = {"operation": "extend", "data": None}
        advice = "data.more=[{path: NEW_SET}]"
    extend_classes(commit, out, centres, entry, units=data is not None)
    last = classes + len(centres) - 1
    print(f"{out}: step {commit.step}, {last + 1:,} classes; new are {classes} to {last}, in the order of their labels")
    print(f"the training set must give them these labels: {advice} behind a set of {classes} classes does")
    _say_next(out)


def run_remap(path: Path, out: Path, *, order: Path | None, remove: Path | None) -> None:
    """Reorder (``order``) or remove (``remove``) classes of a commit; see ``data.class_map`` for the files.

    Raises:
        ConfigError: neither or both files are given, one can't be used, or there is something at ``out``.
        CheckpointError: the commit can't be read, or the new one not be written.
    """
    if (order is None) == (remove is None):
        raise ConfigError(
            f"got --order {order} and --remove {remove}, expected one of them: name one file of class ids"
        )
    if order is not None:
        _change(path, out, lambda classes: read_order(order.expanduser(), classes), "remap")
    else:
        assert remove is not None
        _change(path, out, lambda classes: read_removed(remove.expanduser(), classes), "remap")


def run_merge(path: Path, out: Path, *, groups: Path) -> None:
    """Merge classes of a commit; see :func:`partial_fc.checkpoint.surgery.change_classes`.

    Raises:
        ConfigError: the file can't be used, or there is something at ``out``.
        CheckpointError: the commit can't be read, or the new one not be written.
    """
    _change(path, out, lambda classes: read_groups(groups.expanduser(), classes), "merge")


def _change(path: Path, out: Path, read: Callable[[int], np.ndarray], operation: str) -> None:
    out = given_path(out, "the folder of the new commit")
    listed = Path(f"{out}.classes.csv")
    for place in (out, listed):
        check_target(place)
    commit = find_commit(path.expanduser(), print)
    classes = commit.info["num_classes"]
    class_map = read(classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # First: centres whose ids nobody knows would be of no use.
        write_class_map(listed, class_map)
        change_classes(commit, out, class_map, {"operation": operation})
    except OSError as error:
        raise DataError(f"{error.filename or listed}: can't be written ({error.strerror}): mend that first") from error
    finally:
        # What hindered the writing may hinder this, too; the error that counts is on its way.
        with contextlib.suppress(OSError):
            if not out.exists():
                listed.unlink(missing_ok=True)
    after = int(class_map.max()) + 1
    removed = int((class_map == REMOVED).sum())
    print(
        f"{out}: step {commit.step}, {after:,} classes of {classes:,} ({removed:,} removed, "
        f"{classes - removed - after:,} merged into others)"
    )
    print(f"labels of the data: partial-fc prepare SOURCE DESTINATION --class-map {listed}")
    _say_next(out)


def _further_sets(config: Config, data: Path) -> str:
    """The sets of a configuration as ``data.more``, quoted for a shell: paths, and what else isn't the default."""
    if config.data.merge_classes:
        # Their labels are one numbering; those of data.more would be one behind the other.
        return (
            f"one set made of them (partial-fc prepare {shlex.quote(str(data))} NEW_SET), data.more=[{{path: NEW_SET}}]"
        )
    keys = set(SourceConfig.model_fields)
    sets = [
        source.model_dump(mode="json", include=keys, exclude_defaults=True)
        for source in (config.data, *config.data.more)
    ]
    text = yaml.safe_dump(sets, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return shlex.quote(f"data.more={text.strip()}")


def _say_next(out: Path) -> None:
    print(f"go on: partial-fc train CONFIG train.resume={out}")


def _settings(commit: Commit, data: Path, overrides: Sequence[str]) -> Config:
    """The configuration of the new images, with the backbone and the image size that the commit was trained with.

    Raises:
        CheckpointError: the commit has no backbone, or doesn't say which.
        ConfigError: the configuration can't be used.
    """
    saved = commit.info.get("config")
    backbone = saved.get("backbone") if isinstance(saved, dict) else None
    if "backbone" not in commit.info["contents"] or not isinstance(backbone, dict) or "name" not in backbone:
        raise CheckpointError(
            f"{commit.folder}: has no backbone, expected one for --data: use --count, or another commit"
        )
    assert isinstance(saved, dict)
    given = [f"backbone={json.dumps(backbone)}"]
    if "image_size" in saved.get("data", {}):
        given.append(f"data.image_size={json.dumps(saved['data']['image_size'])}")
    return data_config(data, [*given, *overrides])


def _draw(commit: Commit, count: int) -> Tensor:
    """Centres ``[K, d]`` as a new head of all classes has them."""
    saved = commit.info.get("config") or {}
    classes, size = commit.info["num_classes"], commit.info["embedding_size"]
    # The head draws all its classes, for the sake of a few.
    check_memory(4 * (classes + count) * size, f"{commit.folder}: {count} new centres")
    head = PartialFC(size, classes + count, seed=saved.get("train", {}).get("seed", 0), device="cpu")
    return head.weight.detach()[classes:].clone()


def _imprint(commit: Commit, config: Config, batch_size: int, limit: int | None) -> Tensor:
    """Unit centres ``[K, d]`` of the classes of a data set, on the CPU."""
    place = Place(0, 1, 0, build.choose_device(config, 0))
    precision = build.choose_precision(config, place.device)
    backbone = build.build_backbone(config, place)
    load_backbone(commit.folder, backbone)
    with progress_bars("finding the images", "embedding the images") as (finding, embedding):
        sources = build.build_sources(config, finding)
        check_memory(4 * sources.num_classes * commit.info["embedding_size"], f"{sources.path}: the new centres")
        return imprint(
            backbone,
            sources,
            embedding_size=commit.info["embedding_size"],
            image_size=config.data.image_size,
            batch_size=batch_size,
            limit_per_class=limit,
            threads=config.data.threads,
            max_image_pixels=config.data.max_image_pixels,
            device=place.device,
            autocast_dtype=None if precision == torch.float32 else precision,
            progress=embedding,
        )
