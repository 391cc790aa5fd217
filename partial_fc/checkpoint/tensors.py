"""Tensors in files: the format of ``torch.distributed.checkpoint`` with flat names, for any number of ranks.

A tensor whose first dimension is the classes is written shard by shard, each rank its own rows; every other tensor by
the one rank that passes it in. What was written by W ranks may be read by any other number: nothing in the files
depends on W but where the rows lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from partial_fc.checkpoint.marker import FileSum
from partial_fc.errors import CheckpointError
from partial_fc.sharding import ClassShards

_METADATA = ".metadata"
_BLOCK = 16 << 20
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, ImportError, AssertionError)


def sharded(local: Tensor, rows: int) -> Tensor:
    """This rank's rows as a part of the whole tensor.

    Args:
        local: ``[local classes, ...]``, contiguous; ceil(rows / W) of them, fewer or none on the last ranks.
        rows: classes over all ranks of the default process group.

    Returns:
        A DTensor ``[rows, ...]``, ``Shard(0)``, that shares ``local``'s memory; ``local`` itself on a single rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    start, end = ClassShards(rows, dist.get_world_size()).bounds(dist.get_rank())
    assert len(local) == end - start, f"{len(local)} rows of {rows} on rank {dist.get_rank()}, expected {end - start}"
    # Of the group that is there: making a mesh in the usual way makes groups, which is collective.
    mesh = DeviceMesh.from_group(dist.group.WORLD, local.device.type)  # type: ignore[arg-type]
    shape = torch.Size((rows, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of what :func:`sharded` made; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_tensors(
    folder: Path, state: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None
) -> list[str]:
    """Write tensors into a folder; collective over the group.

    Args:
        folder: made where it isn't there.
        state: tensors by name: sharded ones (of :func:`sharded`) on all ranks, any other on one rank.
        process_group: the ranks that write; None: the default group, or this process alone.

    Returns:
        Names of the files that this rank wrote; rank 0's have ``.metadata`` among them.

    Raises:
        CheckpointError: on every rank, where one can't write.
    """
    return list(write_summed(folder, state, process_group))


def write_summed(
    folder: Path,
    state: Mapping[str, Tensor],
    process_group: dist.ProcessGroup | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, FileSum]:
    """As :func:`write_tensors`, with the sums of what this rank wrote, so that nothing need be read again.

    Args:
        folder: see there, as for the next two.
        state: see there.
        process_group: see there.
        stopped: asked every few milliseconds; where it says True, the writing ends with an error.

    Returns:
        Sums of this rank's files, by name; they are on the disk.

    Raises:
        CheckpointError: on every rank, where one can't write.
    """
    _no_warning_without_a_group()
    files = _SummedFiles(stopped)
    writer = _SummedWriter(folder, files)
    try:
        save(dict(state), storage_writer=writer, process_group=process_group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        alone = not dist.is_initialized() or dist.get_world_size(process_group) == 1
        who = "can't be written" if alone else f"rank {rank} can't write"
        raise CheckpointError(f"{folder}: {who}: {cause}: look at {'that' if alone else 'its'} disk") from error
    return files.sums


def read_into(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Read tensors in place, whatever number of ranks wrote them; each rank its own rows, without a collective.

    Args:
        folder: what :func:`write_tensors` wrote.
        state: tensors by name to fill: sharded ones (of :func:`sharded`) or whole ones. Another dtype than the saved
            one is converted.

    Raises:
        CheckpointError: a name isn't there or has another shape, or a file can't be read; then some tensors may have
            been filled already.
    """
    saved = tensor_shapes(folder)
    for name, tensor in state.items():
        if name not in saved:
            raise CheckpointError(f"{folder}: there is no tensor {name} in it, expected {_text(tensor.shape)}")
        if saved[name][0] != tensor.shape:
            shapes = f"{_text(saved[name][0])}, expected {_text(tensor.shape)}"
            raise CheckpointError(f"{folder}: tensor {name} is {shapes}: load it into what it was saved from")
    _no_warning_without_a_group()
    try:
        load(dict(state), storage_reader=FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        _, cause = _first_failure(error)
        raise CheckpointError(f"{folder}: its tensors can't be read: {cause}: use another checkpoint") from error


def read_whole(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU, by name; for one process.

    Raises:
        CheckpointError: as :func:`read_into`.
    """
    saved, whole = tensor_shapes(folder), {}
    for name in names:
        if name not in saved:
            raise CheckpointError(f"{folder}: there is no tensor {name} in it: it holds {', '.join(sorted(saved)[:8])}")
        shape, dtype = saved[name]
        whole[name] = torch.empty(shape, dtype=dtype, device="cpu")
    read_into(folder, whole)
    return whole


def tensor_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Global shape and dtype of every saved tensor, by name; the tensors themselves are not read.

    Raises:
        CheckpointError: there is no readable ``.metadata``.
    """
    if not (folder / _METADATA).is_file():
        raise CheckpointError(f"{folder}: there are no saved tensors ({_METADATA} is missing): name another folder")
    try:
        metadata: Metadata = FileSystemReader(folder).read_metadata()
        entries = metadata.state_dict_metadata.items()
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        raise CheckpointError(
            f"{folder}: {_METADATA} can't be read: {_one_line(error)}: use another checkpoint"
        ) from error


class _SummedStream(io.RawIOBase):
    """A file that is written from its begin to its end, and summed on the way."""

    def __init__(self, stream: IO[bytes], files: _SummedFiles) -> None:
        self._stream, self._files = stream, files
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def sum(self) -> FileSum:
        """Of what was written."""
        return FileSum(self._size, self._digest.hexdigest())

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """All of it, in blocks: between them other threads run, and it may be stopped."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _BLOCK):
            block = view[begin : begin + _BLOCK]
            try:
                if self._files.stopped():
                    raise InterruptedError("the writing was stopped")
                self._stream.write(block)
            except OSError as error:
                self._files.failure = error
                raise
            self._digest.update(block)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        """Of the file."""
        return self._stream.fileno()


class _SummedFiles(FileSystem):
    """Opens the files that a writer writes, and keeps their sums.

    Attributes:
        sums: by name.
        stopped: whether to stop.
        failure: what the system said when it refused to write.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.sums: dict[str, FileSum] = {}
        self.stopped = stopped
        self.failure: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """As the base class."""
        with open(path, mode) as stream:
            summed = _SummedStream(stream, self)
            yield summed
            self.sums[Path(path).name] = summed.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """As the base class."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _SummedWriter(FileSystemWriter):
    """The library's writer, of one file a rank, through files that are summed."""

    def __init__(self, folder: Path, files: _SummedFiles) -> None:
        # Copying ahead is for tensors on a GPU; for those on the host it would only make the GPU's streams.
        super().__init__(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self._files = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base class; but where the system refused to write, its own words are the error on every rank."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # What a write raises inside of torch.save comes out of it as "unexpected pos".
            if self._files.failure is not None:
                raise self._files.failure from error
            raise


def _text(shape: torch.Size) -> str:
    return str(list(shape))


def _first_failure(error: CheckpointException) -> tuple[int, str]:
    """The lowest rank that failed, and what it met, in one line."""
    rank = min(error.failures)
    return rank, _one_line(error.failures[rank][0])


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _no_warning_without_a_group() -> None:
    """Without a process group the library warns that it works in one process; that is meant here."""
    # For good, not for a while: what restores filters afterwards isn't safe beside another thread that does.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable", category=UserWarning)
