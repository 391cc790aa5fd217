"""The ranks of a job: joining them, and doing things so that a failure of one is raised by all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from partial_fc import build
from partial_fc.build import Place
from partial_fc.config import Config
from partial_fc.errors import ConfigError, DataError, PartialFCError

T = TypeVar("T")

# While some ranks do something long, the others hear from them this often: well below any timeout.
_BEAT_SECONDS = 2.0


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Place]:
    """Join the ranks that torchrun started (or be the only one), and leave them at the end."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = build.choose_device(config, local_rank)
    except ConfigError as error:
        # Local rank 0 may have found its GPU.
        error.rank = rank
        raise
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Place(rank, world_size, local_rank, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.train.timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # Keys of the process group don't meet those of others who use the job's store.
    groups = PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
    # An agent's store keeps the keys of earlier attempts of the job.
    token = from_first(lambda: secrets.token_hex(4))
    yield Place(rank, world_size, local_rank, device, PrefixStore(f"attempt/{token}", store))
    # A process that ends while others still talk to it can abort in gloo's teardown.
    dist.barrier()
    dist.destroy_process_group()


def agreed(action: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, every rank raises that rank's error, and none waits."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except OSError as error:
        where = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        failure = DataError(f"{where}: check the path and its permissions")
    except Exception as error:  # The others must hear of it, whatever it is; this rank raises it below.
        failure = error
    told = failure if failure is None or isinstance(failure, PartialFCError) else _told(failure)
    failures: list[PartialFCError | None] = [told]
    if dist.is_initialized():
        failures *= dist.get_world_size()
        dist.all_gather_object(failures, told)
    if failure is not None and not isinstance(failure, PartialFCError):
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            raise type(other)(f"{other}" if rank == 0 else f"rank {rank}: {other}") from failure
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], T]) -> T:
    """Do something on rank 0, and give all ranks what came of it (picklable), or its failure. Collective."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    result = agreed(lambda: action() if first else None)
    if not dist.is_initialized():
        return result  # type: ignore[return-value]
    told = [result]
    dist.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]


def _told(error: Exception) -> PartialFCError:
    return PartialFCError(f"{type(error).__name__}: {error} (that rank shows where)")


def agreed_while(action: Callable[[], T], *, mine: bool, beat: Callable[[], None] | None = None) -> T | None:
    """Do something long on some of the ranks; the others wait for them, without running into the group's timeout.

    A rank that hangs or is gone is noticed meanwhile, as in any collective.

    Args:
        action: what is done, in a thread.
        mine: whether this rank does it.
        beat: called every few seconds, where all ranks are heard of.

    Returns:
        The action's result where this rank did it, else None.

    Raises:
        PartialFCError: on every rank, seconds after it failed on one.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="agreed")
    future = pool.submit(_on_this_gpu(action)) if mine else None
    pool.shutdown(wait=False)
    states = ["working"]
    while "working" in states and "failed" not in states:
        state = "done"
        if future is None:
            time.sleep(_BEAT_SECONDS if len(states) > 1 else 0)
        else:
            concurrent.futures.wait([future], timeout=_BEAT_SECONDS)
            state = "working" if not future.done() else "failed" if future.exception() else "done"
        states = [state]
        if dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, state)
        if beat is not None:
            beat()
    if future is not None and not future.done():
        return agreed(lambda: None)
    return agreed(lambda: future.result() if future is not None else None)


def _on_this_gpu(action: Callable[[], T]) -> Callable[[], T]:
    """The action with this thread's current GPU, which another thread doesn't know of."""
    if not torch.cuda.is_initialized():
        return action
    device = torch.cuda.current_device()

    def there() -> T:
        with torch.cuda.device(device):
            return action()

    return there
