"""What a training run keeps, as tensors with flat names; and the saved model, which is a part of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.checkpoint.tensors import local_part, read_into, sharded, tensor_shapes, write_tensors
from partial_fc.errors import CheckpointError, MisfitError
from partial_fc.head import PartialFC
from partial_fc.optim import RowOptimizer

# Counts roundings, so it is there only where something is bfloat16; a run may go on in the other format.
_OPTIONAL = "rounded"
_SHOWN = 3


def save_model(
    folder: Path, backbone: nn.Module, head: PartialFC, process_group: dist.ProcessGroup | None = None
) -> None:
    """Write backbone (rank 0's buffers) and class centres; collective.

    Args:
        folder: made if it isn't there.
        backbone: the same weights on every rank, without a DDP wrapper.
        head: its shards.
        process_group: over which the ranks agree on what they write; None: the default group.

    Raises:
        CheckpointError: on every rank, where one can't write.
    """
    state = {"head.weight": sharded(head.weight.detach(), head.num_classes)}
    if head.group.rank == 0:
        # BatchNorm statistics differ from rank to rank: the library would take each tensor from any of them.
        state |= _named("backbone", backbone.state_dict())
    write_tensors(folder, state, process_group)


def load_backbone(folder: Path, backbone: nn.Module) -> None:
    """Read the backbone's weights of a saved model or commit into ``backbone``, in place.

    Raises:
        CheckpointError: no saved model there, or one of another backbone.
    """
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: no saved model there, expected the folder 'model' of a finished run")
    # Every rank reads the whole backbone for itself: no collective, so one rank's failure leaves none waiting.
    state = _named("backbone", backbone.state_dict())
    try:
        read_into(folder, state)
    except CheckpointError as error:
        raise CheckpointError(f"the saved model doesn't fit the configuration: {error}") from error


class TrainingState:
    """Backbone, head and both optimizers of this rank, as tensors by name.

    ``backbone.<name>``; ``head.weight`` ``[C, d]`` and the head's buffers, ``head.<name>``; ``head_optimizer.<state>``,
    ``[C, d]``, ``[C]`` or scalars; ``backbone_optimizer.<parameter>.<state>``.

    Args:
        backbone: without a DDP wrapper.
        head: its shards over the default process group.
        backbone_optimizer: over the backbone's parameters.
        head_optimizer: over the head's; a row optimizer gets the state that its steps would make.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: PartialFC,
        backbone_optimizer: torch.optim.Optimizer,
        head_optimizer: torch.optim.Optimizer,
    ) -> None:
        self._backbone, self._head = backbone, head
        self._backbone_optimizer, self._head_optimizer = backbone_optimizer, head_optimizer
        self._parameters = {parameter: name for name, parameter in backbone.named_parameters()}
        if isinstance(head_optimizer, RowOptimizer):
            head_optimizer.init_state()

    def tensors(self) -> dict[str, Tensor]:
        """What this rank saves: references, sharded tensors as DTensors, replicated ones on rank 0 only."""
        head, rows = self._head, len(self._head.weight)
        replicated = {**_named("backbone", self._backbone.state_dict()), **self._head_buffers()}
        for parameter, name in self._parameters.items():
            replicated |= _named(f"backbone_optimizer.{name}", _tensors_of(self._backbone_optimizer, parameter))
        state = {"head.weight": sharded(head.weight.detach(), head.num_classes)}
        for name, value in _named("head_optimizer", _tensors_of(self._head_optimizer, head.weight)).items():
            if value.dim() and len(value) == rows:
                state[name] = sharded(value, head.num_classes)
            else:
                replicated[name] = value
        return {**state, **replicated} if head.group.rank == 0 else state

    def coming(self) -> dict[str, Tensor]:
        """What the first step of the backbone's optimizer adds to :meth:`tensors`: name -> a tensor of that form.

        Scalars are left out; an optimizer of unknown kind is taken to add nothing.
        """
        optimizer = self._backbone_optimizer
        if self._head.group.rank or any(optimizer.state.values()):
            return {}
        return {
            f"backbone_optimizer.{self._parameters[parameter]}.{state}": parameter.detach()
            for group in optimizer.param_groups
            for state in sorted((_states_of(optimizer, group) or set()) - {"step"})
            for parameter in group["params"]
            if parameter.requires_grad
        }

    @property
    def bytes(self) -> int:
        """Of what this rank saves now."""
        return sum(local_part(tensor).nbytes for tensor in self.tensors().values())

    def load(self, folder: Path, info: Mapping[str, Any]) -> list[str]:
        """Read a commit into the tensors in place, whatever world size wrote it; each rank for itself.

        Learning rates and other options stay as they are. All is checked before anything is touched; but where a file
        can't be read in the middle, some tensors are the saved ones and some are not, and the run must not go on.

        Args:
            folder: the commit's.
            info: its ``run.json``; ``contents`` and ``margin``, ``negatives`` are read.

        Returns:
            Lines about what isn't in the commit, and what holds instead.

        Raises:
            MisfitError: it doesn't fit (a line for each reason, then what to do).
            CheckpointError: a file can't be read.
        """
        there = tensor_shapes(folder)
        saved = {name: shape for name, (shape, _) in there.items()}
        contents = frozenset(info.get("contents", ()))
        problems = [
            *self._class_problems(saved),
            *(self._backbone_problems(saved) if "backbone" in contents else []),
            *self._buffer_problems(saved, contents, info),
            *self._optimizer_problems(saved, contents),
        ]
        if problems:
            raise MisfitError(
                f"{folder} doesn't fit this run:\n"
                + "".join(f"  {problem}\n" for problem in problems)
                + "change the configuration back, or start without it: train.resume=never"
            )
        notes = self._notes(saved)
        state = {**_named("backbone", self._backbone.state_dict()), **self._head_buffers()}
        state["head.weight"] = sharded(self._head.weight.detach(), self._head.num_classes)
        states: list[dict[Tensor, dict[str, Tensor]]] = [{}, {}]
        for number, (prefix, parameters) in enumerate(self._optimized().items()):
            for parameter, start in parameters.items():
                values = self._targets(prefix, parameter, start, there)
                for name, value in values.items():
                    whole = prefix == "head_optimizer" and value.dim() > 0
                    state[start + name] = sharded(value, self._head.num_classes) if whole else value
                states[number][parameter] = values
        read_into(folder, {name: value for name, value in state.items() if name in saved})
        for optimizer, values_of in zip((self._backbone_optimizer, self._head_optimizer), states, strict=True):
            if not isinstance(optimizer, RowOptimizer):
                _give(optimizer, values_of)
        return notes

    def _head_buffers(self) -> dict[str, Tensor]:
        return _named("head", dict(self._head.named_buffers()))

    def _optimized(self) -> dict[str, dict[Tensor, str]]:
        """For each optimizer: its parameters, and what the names of their states begin with."""
        backbone: dict[Tensor, str] = {
            parameter: f"backbone_optimizer.{name}." for parameter, name in self._parameters.items()
        }
        return {"backbone_optimizer": backbone, "head_optimizer": {self._head.weight: "head_optimizer."}}

    def _targets(
        self, prefix: str, parameter: Tensor, start: str, saved: Mapping[str, tuple[torch.Size, torch.dtype]]
    ) -> dict[str, Tensor]:
        """Tensors to read the saved states of one parameter into: those that a row optimizer has, or new ones."""
        if prefix == "head_optimizer" and isinstance(self._head_optimizer, RowOptimizer):
            return {n: v for n, v in _tensors_of(self._head_optimizer, parameter).items() if start + n in saved}
        values = {}
        for name, (shape, dtype) in saved.items():
            if name.startswith(start) and "." not in (state := name[len(start) :]) and state != _OPTIONAL:
                rows = (len(parameter), *shape[1:]) if prefix == "head_optimizer" and shape else shape
                device = parameter.device if shape else "cpu"
                values[state] = torch.empty(rows, dtype=dtype, device=device)
        return values

    def _class_problems(self, saved: Mapping[str, torch.Size]) -> list[str]:
        head, shape = self._head, saved.get("head.weight")
        if shape is None:
            return ["it holds no class centres (head.weight)"]
        problems = []
        if shape[0] != head.num_classes:
            way = "partial-fc head extend or partial-fc head remap makes one that fits"
            problems.append(f"num_classes is {shape[0]} there, expected {head.num_classes}: {way}")
        if shape[1] != head.embedding_size:
            problems.append(f"embedding_size is {shape[1]} there, expected {head.embedding_size}")
        return problems

    def _backbone_problems(self, saved: Mapping[str, torch.Size]) -> list[str]:
        expected = {name: value.shape for name, value in _named("backbone", self._backbone.state_dict()).items()}
        there = {name: shape for name, shape in saved.items() if name.startswith("backbone.")}
        problems = []
        for what, names in (
            ("aren't in it", sorted(expected.keys() - there.keys())),
            ("are in it and not expected", sorted(there.keys() - expected.keys())),
        ):
            if names:
                problems.append(f"{len(names)} tensors of the backbone {what}: {_first(names)}")
        other = [
            f"{name} {list(there[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in there and there[name] != shape
        ]
        if other:
            problems.append(f"{len(other)} tensors of the backbone have another shape: {_first(other)}")
        return problems

    def _buffer_problems(
        self, saved: Mapping[str, torch.Size], contents: frozenset[str], info: Mapping[str, Any]
    ) -> list[str]:
        """State of margin and negatives that only one of the two has; a commit of weights alone may lack it."""
        expected = self._head_buffers()
        problems = []
        for axis in ("margin", "negatives"):
            start, here = f"head.{axis}_", getattr(self._head, axis)
            ours = {name for name in expected if name.startswith(start)}
            theirs = {name for name in saved if name.startswith(start)}
            for what, names in (("not expected", theirs - ours), ("missing", ours - theirs)):
                if names and (what == "not expected" or "head_optimizer" in contents):
                    kinds = f"saved with {axis} {info.get(axis, 'unknown')}, expected {here}"
                    problems.append(f"state of the {axis} is {what}, {_first(sorted(names))}: {kinds}")
            for name in sorted(ours & theirs):
                if saved[name] != expected[name].shape:
                    problems.append(f"{name} has shape {list(saved[name])}, expected {list(expected[name].shape)}")
        return problems

    def _optimizer_problems(self, saved: Mapping[str, torch.Size], contents: frozenset[str]) -> list[str]:
        problems = []
        for prefix, optimizer in (
            ("backbone_optimizer", self._backbone_optimizer),
            ("head_optimizer", self._head_optimizer),
        ):
            there = {name.rpartition(".")[2] for name in saved if name.startswith(f"{prefix}.")} - {_OPTIONAL}
            groups = [_states_of(optimizer, group) for group in optimizer.param_groups]
            if prefix not in contents or not there or None in groups:
                continue
            expected = set(itertools.chain.from_iterable(group or () for group in groups)) - {_OPTIONAL}
            if there != expected:
                named = f"{_first(sorted(there))}, expected {_first(sorted(expected)) or 'none'}"
                problems.append(f"{prefix} is of another kind: it saved {named} ({type(optimizer).__name__})")
        return problems

    def _notes(self, saved: Mapping[str, torch.Size]) -> list[str]:
        notes = []
        for prefix, what, optimizer in (
            ("backbone_optimizer", "backbone", self._backbone_optimizer),
            ("head_optimizer", "class centres", self._head_optimizer),
        ):
            needed = any(_states_of(optimizer, group) != set() for group in optimizer.param_groups)
            if needed and not any(name.startswith(f"{prefix}.") for name in saved):
                notes.append(f"the commit has no optimizer state of the {what}: momentum starts at 0")
        if not any(name.startswith("backbone.") for name in saved):
            notes.append("the commit has no backbone: it starts as in a new run")
        missing = sorted(name for name in self._head_buffers() if name not in saved)
        if missing:
            notes.append(f"the commit has no {', '.join(missing)}: they start as in a new run")
        return notes


def _named(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _tensors_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    # `state` makes an entry for whatever it is asked for.
    states = optimizer.state[parameter] if parameter in optimizer.state else {}
    return {name: value for name, value in states.items() if isinstance(value, Tensor)}


def _states_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> set[str] | None:
    """Names of the states that steps make for a group's parameters; None: not known before one is made."""
    found: set[str] = set()
    for parameter in group["params"]:
        found |= _tensors_of(optimizer, parameter).keys()
    if found or isinstance(optimizer, RowOptimizer):
        return found
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if group["momentum"] else set()
    if isinstance(optimizer, torch.optim.Adam):
        return {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])}
    return None


def _give(optimizer: torch.optim.Optimizer, values_of: Mapping[Tensor, dict[str, Tensor]]) -> None:
    """Put states in by the optimizer's own door; its options stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: values_of[p] for number, p in enumerate(parameters) if values_of.get(p)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
