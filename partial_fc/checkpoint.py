"""The saved model: a ``torch.distributed.checkpoint`` folder with the backbone and the sharded class centres.

Centres are saved as DTensors (``Shard(0)``), each rank its own rows, so any world size may load them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from partial_fc.errors import CheckpointError
from partial_fc.head import PartialFC


def save_model(folder: Path, backbone: nn.Module, head: PartialFC) -> None:
    """Write backbone (rank 0's buffers) and class centres; collective.

    Args:
        folder: made if it isn't there.
        backbone: the same weights on every rank, without a DDP wrapper.
        head: its shards.
    """
    state: dict[str, Any] = {"head": {"weight": _sharded(head)}}
    if head.group.rank == 0:
        # BatchNorm statistics differ from rank to rank: the library would take each tensor from any of them.
        state["backbone"] = backbone.state_dict()
    try:
        _quietly(save, state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: the model can't be saved: {_last_line(error)}: free the disk") from error


def load_backbone(folder: Path, backbone: nn.Module) -> None:
    """Read the backbone's weights of a saved model into ``backbone``, in place.

    Raises:
        CheckpointError: no saved model there, or one of another backbone.
    """
    state = {"backbone": backbone.state_dict()}
    _load(folder, state)
    backbone.load_state_dict(state["backbone"])


def _load(folder: Path, state: dict[str, Any]) -> None:
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: no saved model there, expected the folder 'model' of a finished run")
    try:
        # Every rank reads the whole backbone for itself: no collective, so one rank's failure leaves none waiting.
        _quietly(load, state, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: the saved model doesn't fit the configuration: {_last_line(error)}"
        ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _sharded(head: PartialFC) -> Tensor:
    weight = head.weight.detach()
    if head.group.world_size == 1:
        return weight
    mesh = init_device_mesh(weight.device.type, (head.group.world_size,))
    shape = torch.Size((head.num_classes, head.embedding_size))
    return DTensor.from_local(weight, mesh, [Shard(0)], run_check=False, shape=shape, stride=(head.embedding_size, 1))


def _quietly(function: Any, state: dict[str, Any], **options: Any) -> None:
    """Without a process group the library warns that it works without one; that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(state, **options)
