"""Commits made of other programs' files: arcface_torch's checkpoints, and plain matrices of class centres.

Files in PyTorch's format are loaded with ``weights_only``: they may hold tensors and plain values, no code. Legend: C
classes, d embedding size.
"""

from __future__ import annotations

import os
import pickle
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from partial_fc import models
from partial_fc.checkpoint.marker import FORMAT
from partial_fc.checkpoint.surgery import CENTRES, check_memory, check_target, write_commit
from partial_fc.errors import CheckpointError, ConfigError
from partial_fc.models.iresnet import STRIDE

ARCFACE_BACKBONES = ("iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200")
_FILE = re.compile(r"checkpoint_gpu_([0-9]{1,9})\.pt")
_BACKBONE, _HEAD = "state_dict_backbone", "state_dict_softmax_fc"
_BLOCK = re.compile(r"layer([1-4])\.([0-9]+)\.")
_WRAPPER = "module."
_ROWS = 1 << 14
_LEGACY = "_use_new_zipfile_serialization"


def find_arcface_files(paths: Sequence[Path]) -> list[Path]:
    """The files ``checkpoint_gpu_{rank}.pt`` of all ranks, in the order of the ranks.

    Args:
        paths: files, and folders that hold them.

    Raises:
        ConfigError: a path is neither, or a rank between 0 and the last one is missing or there twice.
    """
    found: dict[int, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder, expected checkpoint_gpu_0.pt, ..., or their folder")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        ranked = [(int(match[1]), file) for file in files if (match := _FILE.fullmatch(file.name))]
        if not ranked:
            raise ConfigError(f"{path}: got no file of arcface_torch, expected names such as checkpoint_gpu_0.pt")
        for rank, file in ranked:
            if rank in found and not os.path.samefile(found[rank], file):
                raise ConfigError(f"{file}: rank {rank} is there twice, also as {found[rank]}: name one run's files")
            found[rank] = file
    for rank in range(max(found)):
        if rank not in found:
            raise ConfigError(
                f"{found[max(found)].parent}: checkpoint_gpu_{rank}.pt is missing, expected ranks 0 to {max(found)} "
                "without a gap: every rank holds its own classes"
            )
    return [found[rank] for rank in sorted(found)]


def import_arcface(paths: Sequence[Path], out: Path, *, backbone_name: str | None = None) -> dict[str, Any]:
    """Write a commit of arcface_torch's checkpoints: backbone of rank 0 and class centres of all ranks, at step 0.

    arcface_torch gives rank r of W ``C // W + (r < C % W)`` classes, so the centres are those of the ranks, one behind
    the other. Its optimizer state, schedule and counters (``epoch``, ``global_step``, ``state_optimizer``,
    ``state_lr_scheduler``) are not used. Needs the memory of the new commit; the files are mapped.

    Args:
        paths: files ``checkpoint_gpu_{rank}.pt`` and folders that hold them.
        out: the new commit's folder.
        backbone_name: what the backbone has to be, ``iresnet18`` ... ``iresnet200``; None: whichever it is.

    Returns:
        ``run.json``.

    Raises:
        ConfigError: ranks are missing or there twice, there is something at ``out``, or no backbone has this name.
        CheckpointError: a file isn't what arcface_torch writes, the files don't fit each other, or memory is short.
    """
    if backbone_name not in (None, *ARCFACE_BACKBONES):
        names = ", ".join(ARCFACE_BACKBONES)
        raise ConfigError(f"--backbone-name is {backbone_name!r}, expected one of {names}: no other can be imported")
    check_target(out)
    files = find_arcface_files(paths)
    first = _load_arcface(files[0])
    backbone, section = _check_backbone(first, files[0], backbone_name)
    shards = [_centres_of(first if number == 0 else _load_arcface(file), file) for number, file in enumerate(files)]
    _check_shards(shards, files, section["backbone"]["embedding_size"])
    classes = sum(map(len, shards))
    check_memory(sum(map(_bytes, [*shards, *backbone.values()])), f"{files[0].parent}: the import")
    centres = torch.empty(classes, shards[0].shape[1], dtype=torch.float32, device="cpu")
    begin = 0
    for shard, file in zip(shards, files, strict=True):
        _copy_finite(centres[begin : begin + len(shard)], shard, f"{file}: {_HEAD}.weight")
        begin += len(shard)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    entry = {
        "operation": "import-arcface",
        "from": [str(file) for file in files],
        "unused": sorted({*map(str, first)} - {_BACKBONE, _HEAD}),
    }
    return _write(out, centres, state, ["backbone", "head"], section, entry)


def import_weights(path: Path, out: Path, *, key: str | None = None) -> dict[str, Any]:
    """Write a commit of class centres alone, at step 0.

    Needs the memory of the new commit; the file is mapped.

    Args:
        path: ``.npy``, ``.safetensors``, or ``.pt``, ``.pth``: a tensor ``[C, d]``, or a dict with one.
        out: the new commit's folder.
        key: name of the tensor where there are several; in nested dicts ``outer.inner``.

    Returns:
        ``run.json``.

    Raises:
        ConfigError: the file's ending isn't one of these, or there is something at ``out``.
        CheckpointError: the file can't be read, has no (or more than one) matrix, a NaN or infinity, or memory is
            short.
    """
    check_target(out)
    matrix = _read_matrix(path, key)
    if matrix.dim() != 2 or 0 in matrix.shape or not matrix.is_floating_point():
        raise CheckpointError(
            f"{path}: got {str(matrix.dtype).removeprefix('torch.')} of shape {list(matrix.shape)}, expected "
            "floating-point [classes, embedding size]: name the matrix of the class centres"
        )
    check_memory(4 * matrix.numel(), f"{path}: the import")
    centres = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
    _copy_finite(centres, matrix, str(path))
    section = {"backbone": {"embedding_size": matrix.shape[1]}}
    entry = {"operation": "import-weights", "from": [str(path)], "key": key}
    return _write(out, centres, {}, ["head"], section, entry)


def _write(
    out: Path,
    centres: Tensor,
    state: dict[str, Tensor],
    contents: list[str],
    section: dict[str, Any],
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Write the commit; its stream begins at 0, and the head's counters with it."""
    counters = {f"head.{name}": torch.zeros((), dtype=torch.int64, device="cpu") for name in ("position", "step")}
    try:
        own = version("partial-fc")
    except PackageNotFoundError:
        own = "unknown"
    info = {
        "format": FORMAT,
        "step": 0,
        "samples": 0,
        "num_classes": len(centres),
        "embedding_size": centres.shape[1],
        "margin": None,
        "negatives": None,
        "world_size": 1,
        "loss_scale": {},
        "watch": {},
        "learning_rate_factor": 1.0,
        "config": section,
        "versions": {"partial_fc": own, "torch": torch.__version__, "python": platform.python_version()},
        "accuracy": None,
        "contents": contents,
        "history": [{**entry, "classes_after": len(centres)}],
    }
    write_commit(out, {**state, **counters, CENTRES: centres}, info)
    return info


def _load(path: Path) -> Any:
    """What a file in PyTorch's format holds: tensors, mapped where the format allows it, and plain values."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # PyTorch's format before 1.6 isn't a zip file and can't be mapped.
            if _LEGACY not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error}): check the path") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is damaged, or holds objects that run code when they are read; expected tensors and plain values "
            "only: save its tensors alone with torch.save"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: is no PyTorch file ({_first_line(error)}): copy it again") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _load_arcface(path: Path) -> dict[str, Any]:
    content = _load(path)
    for key in (_BACKBONE, _HEAD):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else ""
            found = f"a dict of {keys}" if isinstance(content, dict) else _kind(content)
            raise CheckpointError(
                f"{path}: has no {key} ({found}), expected what arcface_torch writes with save_all_states"
            )
    return dict(content)


def _kind(content: object) -> str:
    return f"a tensor {list(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def _centres_of(content: dict[str, Any], path: Path) -> Tensor:
    weight = content[_HEAD].get("weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        found = "nothing" if weight is None else _kind(weight)
        raise CheckpointError(f"{path}: {_HEAD}.weight is {found}, expected [classes of this rank, embedding size]")
    return weight.detach()


def _check_shards(shards: list[Tensor], files: list[Path], embedding_size: int) -> None:
    """Sizes as arcface_torch gives them to W ranks; d that of the backbone."""
    for shard, file in zip(shards, files, strict=True):
        if shard.shape[1] != embedding_size:
            raise CheckpointError(
                f"{file}: {_HEAD}.weight has {shard.shape[1]} columns, the backbone of rank 0 makes embeddings of "
                f"{embedding_size}: name the files of one run"
            )
    classes, ranks = sum(map(len, shards)), len(shards)
    for rank, (shard, file) in enumerate(zip(shards, files, strict=True)):
        expected = classes // ranks + (rank < classes % ranks)
        if len(shard) != expected:
            raise CheckpointError(
                f"{file}: {_HEAD}.weight has {len(shard)} classes, expected {expected} on rank {rank} of {ranks} with "
                f"{classes} classes in all: ranks are missing, or the files are of different runs"
            )
    if not classes:
        raise CheckpointError(f"{files[0]}: {_HEAD}.weight has no class on any rank, expected at least one")


def _check_backbone(
    content: dict[str, Any], path: Path, wanted: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rank 0's backbone with the names that its model has, and the configuration that builds it."""
    backbone = {str(name).removeprefix(_WRAPPER): value for name, value in content[_BACKBONE].items()}
    for key, value in backbone.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {_BACKBONE}.{key} is {_kind(value)}, expected a tensor")
    depths = [
        1 + max((int(m[2]) for n in backbone if (m := _BLOCK.match(n)) and int(m[1]) == stage), default=-1)
        for stage in (1, 2, 3, 4)
    ]
    name = next((name for name in ARCFACE_BACKBONES if _depths(name) == depths), None)
    last = backbone.get("fc.weight")
    if name is None or last is None or last.dim() != 2:
        raise CheckpointError(
            f"{path}: the backbone has stages of {depths} blocks, expected one of {', '.join(ARCFACE_BACKBONES)}: "
            f"import the centres alone with `head import-weights --key {_HEAD}.weight` (files of one rank)"
        )
    if wanted not in (None, name):
        raise CheckpointError(f"{path}: the backbone is {name}, expected {wanted}: leave --backbone-name out")
    size = {"embedding_size": last.shape[0], "image_size": STRIDE * round((last.shape[1] / 512) ** 0.5)}
    expected = _skeleton(name, **size).state_dict() if min(size.values()) > 0 else {}
    wrong = sorted(
        {*backbone} ^ {*expected}
        | {key for key in {*backbone} & {*expected} if backbone[key].shape != expected[key].shape}
    )
    if wrong:
        key = wrong[0]
        shapes = [list(state[key].shape) if key in state else "nothing" for state in (backbone, expected)]
        raise CheckpointError(
            f"{path}: {_BACKBONE}.{key} is {shapes[0]}, expected {shapes[1]} as in {name} "
            f"({len(wrong)} of its tensors differ): expected arcface_torch's {name}"
        )
    for key, value in backbone.items():
        # A model trained in half precision is trained on in float32.
        backbone[key] = value.detach().float() if value.is_floating_point() else value.detach()
        if not backbone[key].isfinite().all():
            raise CheckpointError(f"{path}: {_BACKBONE}.{key} has a NaN or an infinity: take an earlier checkpoint")
    section = {"backbone": {"name": name, "embedding_size": size["embedding_size"]}}
    return backbone, {**section, "data": {"image_size": size["image_size"]}}


def _skeleton(name: str, **size: int) -> nn.Module:
    """The named network without memory for its weights."""
    with torch.device("meta"):
        network: nn.Module = getattr(models, name)(**size)
        return network


def _depths(name: str) -> list[int]:
    network = _skeleton(name)
    return [len(getattr(network, f"layer{stage}")) for stage in (1, 2, 3, 4)]


def _bytes(tensor: Tensor) -> int:
    """Bytes as float32."""
    return 4 * tensor.numel()


def _copy_finite(target: Tensor, source: Tensor, where: str) -> None:
    """Copy rows, a block at a time; a CheckpointError for a NaN or an infinity."""
    for begin in range(0, len(source), _ROWS):
        rows = target[begin : begin + _ROWS]
        rows.copy_(source[begin : begin + _ROWS])
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise CheckpointError(
                f"{where}: row {begin + int(bad[0])} has a NaN or an infinity, expected finite class centres: "
                "take an earlier checkpoint"
            )


def _read_matrix(path: Path, key: str | None) -> Tensor:
    ending = path.suffix.lower()
    if ending not in (".pt", ".pth", ".npy", ".safetensors"):
        raise ConfigError(f"{path}: got a name that ends in {ending!r}, expected .pt, .pth, .npy or .safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a matrix of class centres: check the path")
    if ending == ".npy":
        if key is not None:
            raise ConfigError(f"--key is {key!r}, expected none with a .npy file, which holds one array")
        return _read_numpy(path)
    if ending == ".safetensors":
        return _read_safetensors(path, key)
    content = _load(path)
    if isinstance(content, Tensor) and key is None:
        return content.detach()
    tensors = _flat(content) if isinstance(content, Mapping) else {}
    return tensors[_choose(path, {name: tensor.dim() for name, tensor in tensors.items()}, key)].detach()


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested dicts by dotted name."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
    return found


def _choose(path: Path, dims: Mapping[str, int], key: str | None) -> str:
    """The name of the tensor that is meant."""
    if key is not None:
        if key not in dims:
            raise CheckpointError(f"{path}: has no tensor {key!r}, it has {_names(list(dims))}: correct --key")
        return key
    matrices = [name for name, dim in dims.items() if dim == 2]
    if len(matrices) != 1:
        found = _names(matrices or list(dims))
        wanted = "tell which one with --key" if matrices else "name a file with class centres"
        raise CheckpointError(f"{path}: has {len(matrices)} matrices ({found}), expected one: {wanted}")
    return matrices[0]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}" if names else "no tensor"


def _read_numpy(path: Path) -> Tensor:
    try:
        # Read-only maps make PyTorch warn; a private one that nobody writes to is the same.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CheckpointError(f"{path}: can't be read as a .npy file ({_first_line(error)}): copy it again") from error


def _read_safetensors(path: Path, key: str | None) -> Tensor:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            name = _choose(path, {name: len(file.get_slice(name).get_shape()) for name in file.keys()}, key)
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read as safetensors ({_first_line(error)}): copy it again") from error
