"""The machine of a rank: versions, environment, limits, processors, GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

import partial_fc
from partial_fc.doctor.findings import Identity, Notes
from partial_fc.machine import host_memory, processors

# Upstream defect of torchrun, pytorch issue 135712.
RESTARTS_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# torchrun sets it to 1.
_OF_TORCHRUN = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
# What changes how ranks talk to each other.
_WATCHED = re.compile(
    r"^(NCCL_|TORCH_NCCL_|GLOO_|TORCH_DISABLE_|PYTORCH_|CUDA_LAUNCH_BLOCKING$|CUBLAS_|OMP_NUM_THREADS$)"
)
# Set per machine with good reason, or by the launcher.
_MAY_DIFFER = re.compile(r"(_IFNAME|_HCA|_LOG_LEVEL|^NCCL_DEBUG|_FILE)")
# Of a process with a reader, its threads, sockets to its peers and mapped shards.
_FEW_DESCRIPTORS = 1024
# NCCL's buffers between the GPUs of a machine; a container has 64 MB unless told otherwise.
_SMALL_SHM = 10**9
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


class Gpu(NamedTuple):
    """One GPU, as this process sees it; bytes.

    Attributes:
        name: of the model.
        capability: such as ``9.0``.
        total: memory.
        free: of it, now.
        uuid: of the device; two ranks with the same share it.
        driver: version; None: unknown.
        ecc: ``Enabled``, ``Disabled`` or None: unknown.
        errors: memory errors that ECC could not correct since the last reset; None: unknown.
        cache: bytes of the L2 cache.
    """

    name: str
    capability: str
    total: int
    free: int
    uuid: str
    driver: str | None
    ecc: str | None
    errors: int | None
    cache: int


class GpuProbe(Protocol):
    """Where the checks learn of GPUs; tests have their own."""

    def count(self) -> int:
        """GPUs that this process sees."""
        ...

    def look(self, index: int) -> Gpu:
        """What one of them is."""
        ...

    def backend(self) -> str | None:
        """NCCL's version, None where there is none."""
        ...


class CudaProbe:
    """The GPUs of this machine, by torch and nvidia-smi."""

    def count(self) -> int:
        """GPUs that this process sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def look(self, index: int) -> Gpu:
        """What one of them is; makes a CUDA context on it."""
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        uuid = str(getattr(properties, "uuid", index))
        driver, ecc, errors = _ask_smi(uuid)
        capability = f"{properties.major}.{properties.minor}"
        return Gpu(properties.name, capability, total, free, uuid, driver, ecc, errors, properties.L2_cache_size)

    def backend(self) -> str | None:
        """NCCL's version, None where there is none."""
        if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
            return None
        return ".".join(str(part) for part in torch.cuda.nccl.version())


def _ask_smi(uuid: str) -> tuple[str | None, str | None, int | None]:
    """(driver, ECC mode, uncorrected errors) of a GPU by nvidia-smi, None for what it doesn't say."""
    if shutil.which("nvidia-smi") is None:
        return None, None, None
    query = "uuid,driver_version,ecc.mode.current,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None, None, None
    return read_smi(answer, uuid)


def read_smi(answer: str, uuid: str) -> tuple[str | None, str | None, int | None]:
    """(driver, ECC mode, uncorrected errors) of one GPU from the lines of nvidia-smi; None for what isn't there."""
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].removeprefix("GPU-") == uuid.removeprefix("GPU-"):
            ecc = fields[2] if fields[2] in ("Enabled", "Disabled") else None
            return fields[1], ecc, int(fields[3]) if fields[3].isdigit() else None
    return None, None, None


def check_versions(notes: Notes, probe: GpuProbe) -> None:
    """Versions of what ranks must have in common; None for what isn't installed."""
    notes.facts.update(
        {
            "partial_fc": partial_fc.__version__,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "NCCL": probe.backend(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "DALI": _dali_version(),
        }
    )


def _dali_version() -> str | None:
    for name in _DALI:
        try:
            return f"{importlib.metadata.version(name)} ({name.removeprefix('nvidia-dali-')})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_environment(notes: Notes, me: Identity, environ: Mapping[str, str]) -> None:
    """Switches that change how ranks talk to each other, and the one that restarts need."""
    switches = {name: value for name, value in sorted(environ.items()) if _WATCHED.match(name)}
    if "TORCHELASTIC_RUN_ID" in environ and switches.get(_OF_TORCHRUN) == "1":
        del switches[_OF_TORCHRUN]
    notes.facts["switches"] = switches
    notes.facts["torchrun"] = "TORCHELASTIC_RUN_ID" in environ
    if "TORCHELASTIC_RUN_ID" in environ and environ.get(RESTARTS_SWITCH) != "1":
        notes.warn(
            f"{RESTARTS_SWITCH} is {environ.get(RESTARTS_SWITCH, 'not set')}, expected 1: a restarted rank can meet "
            f"addresses of the attempt before and fail again (pytorch issue 135712). export {RESTARTS_SWITCH}=1 on "
            "every machine before torchrun"
        )


def may_differ(switch: str) -> bool:
    """Whether ranks may have different values of a switch of the environment."""
    return bool(_MAY_DIFFER.search(switch))


def check_limits(notes: Notes, me: Identity, *, files: int, on_gpu: bool, shm: Path = Path("/dev/shm")) -> None:
    """Open files, and shared memory for NCCL.

    Args:
        notes: where it goes.
        me: this process.
        files: of the data sets.
        on_gpu: whether NCCL is used.
        shm: where shared memory is.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    notes.facts["open_files"] = None if limit == resource.RLIM_INFINITY else limit
    # The reader maps up to a quarter of the limit.
    wanted = max(_FEW_DESCRIPTORS, min(4 * files, 65536))
    if limit != resource.RLIM_INFINITY and limit < wanted:
        notes.warn(f"{limit} files may be open, expected {wanted} ({files} files of data): ulimit -n {wanted}")
    if shm.is_dir():
        space = os.statvfs(shm)
        size = space.f_blocks * space.f_frsize
        notes.facts["shm_bytes"] = size
        if on_gpu and me.local_world_size > 1 and size < _SMALL_SHM:
            notes.warn(
                f"{shm} has {size / 1e6:.0f} MB, expected 1 GB or more for NCCL between the GPUs of a machine: "
                "start the container with --ipc=host or --shm-size=8g"
            )


def check_processors(notes: Notes, me: Identity, data_threads: int) -> None:
    """Processors and threads of this rank, and the machine's memory."""
    mask = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(processors()))
    memory = host_memory()
    notes.facts.update(
        {
            "mask": mask,
            "ranks": me.local_world_size,
            "threads": torch.get_num_threads(),
            "data_threads": data_threads,
            "memory_available": None if memory is None else memory.available,
        }
    )


def check_gpu(notes: Notes, me: Identity, device: str, probe: GpuProbe) -> None:
    """The GPU of this rank.

    Args:
        notes: where it goes.
        me: this process.
        device: ``auto``, ``cpu`` or ``cuda`` (``train.device``).
        probe: where GPUs are looked up.
    """
    count = 0 if device == "cpu" else probe.count()
    notes.facts["count"] = count
    notes.facts["device"] = "cpu" if device == "cpu" or (device == "auto" and count == 0) else "cuda"
    if notes.facts["device"] == "cpu":
        return
    if me.local_rank >= count:
        notes.fail(
            f"local rank {me.local_rank} has no GPU: this machine shows {count}, expected {me.local_world_size} or "
            "more. Lower --nproc-per-node, see nvidia-smi and CUDA_VISIBLE_DEVICES, or set train.device=cpu"
        )
        return
    gpu = probe.look(me.local_rank)
    facts: dict[str, Any] = gpu._asdict()
    notes.facts["gpu"] = facts
    if gpu.free < 0.9 * gpu.total:
        notes.warn(
            f"{(gpu.total - gpu.free) / 1e9:.1f} of {gpu.total / 1e9:.1f} GB of GPU {me.local_rank} are in use: see "
            "nvidia-smi for other programs and end them, or plan with what is free"
        )
    if gpu.errors:
        notes.warn(
            f"GPU {me.local_rank} counts {gpu.errors} memory errors that ECC could not correct: restart the machine, "
            "and have the GPU replaced if they come back"
        )
    if gpu.ecc == "Disabled":
        notes.warn(f"ECC of GPU {me.local_rank} is disabled, a flipped bit goes unseen: nvidia-smi -e 1 and a restart")
