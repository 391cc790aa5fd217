"""Evaluation on several ranks: the same bits as on one, and no rank left waiting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partial_fc import errors
from partial_fc.evaluate import embed_images, evaluate_pairs, write_pairs
from tests.ranks import RankPool
from tests.unit.test_runner import JPEG, Net, a_set, decode_numbers, encoded

Ranks = Callable[[int], RankPool]


def embed_job(rank: int, world_size: int, count: int, batch_size: int) -> tuple[Tensor, int]:
    net = Net()
    embeddings = embed_images(
        net, encoded(count), decode=decode_numbers, batch_size=batch_size, rank=rank, world_size=world_size
    )
    return embeddings, sum(net.sizes)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count, batch_size", [(53, 5), (7, 2), (2, 1), (1, 8), (4, 4)])
def test_embeddings_are_those_of_one_rank_bit_for_bit(
    ranks: Ranks, world_size: int, count: int, batch_size: int
) -> None:
    expected = embed_images(Net(), encoded(count), decode=decode_numbers, batch_size=batch_size)
    results = ranks(world_size).run(embed_job, count, batch_size)
    for embeddings, _ in results:
        assert embeddings.dtype == torch.float32 and torch.equal(embeddings, expected)
    assert sum(forwards for _, forwards in results) == 2 * count


def test_no_rank_embeds_more_than_its_share(ranks: Ranks) -> None:
    # The peers verify on rank 0 alone, while the others wait for the timeout of their collective.
    forwards = [forwards for _, forwards in ranks(3).run(embed_job, 60, 4)]
    assert forwards == [40, 40, 40]


def pairs_job(rank: int, world_size: int, path: str) -> str:
    return json.dumps(evaluate_pairs(Net(), path, decode=decode_numbers, batch_size=4, folds=4).summary())


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_result_of_one_rank(ranks: Ranks, world_size: int, tmp_path: Path) -> None:
    path = str(a_set(tmp_path / "a.bin"))
    expected = pairs_job(0, 1, path)
    assert ranks(world_size).run(pairs_job, path) == [expected] * world_size


def group_job(rank: int, world_size: int) -> Tensor | None:
    """Ranks 1 and 2 evaluate in a group of their own, in which rank 1 is the first; rank 0 trains on."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    net = Net()
    if rank == 2:
        net.body[1].running_mean += 5  # type: ignore[operator]
    return embed_images(net, encoded(9), decode=decode_numbers, batch_size=2, process_group=group)


def test_a_group_of_some_ranks(ranks: Ranks) -> None:
    expected = embed_images(Net(), encoded(9), decode=decode_numbers, batch_size=2)
    outside, first, second = ranks(3).run(group_job)
    assert outside is None and torch.equal(first, expected) and torch.equal(second, expected)


def ddp_job(rank: int, world_size: int, count: int, batch_size: int) -> tuple[Tensor, bool, bool]:
    """A wrapped backbone that has trained a step on each rank's own images, and so has own BatchNorm statistics."""
    net = Net()
    wrapped = DistributedDataParallel(net)
    with torch.no_grad():
        net.body(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)))
    before = [buffer.clone() for buffer in net.buffers()]
    embeddings = embed_images(wrapped, encoded(count), decode=decode_numbers, batch_size=batch_size)
    kept = all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    return embeddings, kept, wrapped.training and net.training


@pytest.mark.parametrize("count, batch_size", [(7, 2), (2, 1)])
def test_a_wrapped_backbone_is_evaluated_with_the_statistics_of_rank_0(
    ranks: Ranks, count: int, batch_size: int
) -> None:
    # The ranks do different numbers of forwards, in the second case rank 0 none: a wrapper that broadcasts would hang.
    net = Net()
    with torch.no_grad():
        net.body(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    expected = embed_images(net, encoded(count), decode=decode_numbers, batch_size=batch_size)
    for embeddings, kept, training in ranks(3).run(ddp_job, count, batch_size):
        assert torch.equal(embeddings, expected) and kept and training


def failing_job(rank: int, world_size: int, failing: int, how: str, path: str) -> tuple[str, str, float, bool, float]:
    """(type, message, seconds, training mode, what a collective gives after the failure)."""
    images, net, settings = encoded(12), Net(), {}
    pairs: Any = None

    def decode(chosen: Sequence[bytes]) -> Tensor:
        if rank == failing and how == "another error":
            raise MemoryError("no memory\nfor the images")
        pixels = decode_numbers(chosen)
        return pixels * torch.nan if rank == failing and how == "nan" else pixels

    if how == "bad image":  # in the share of the failing rank
        images[failing * 12 // world_size] = JPEG + b"bad"
    elif how == "fewer images" and rank == failing:
        images = images[:-1]
    elif how == "another batch size" and rank == failing:
        settings["batch_size"] = 3
    elif how == "missing file":
        pairs = path if rank != failing else path + ".gone"
    begin = time.monotonic()
    try:
        if pairs is None:
            embed_images(net, images, decode=decode, **{"batch_size": 2, **settings})
        else:
            evaluate_pairs(net, pairs, decode=decode, batch_size=2, folds=4)
    except Exception as error:
        after = torch.ones(1)
        dist.all_reduce(after)
        return type(error).__name__, str(error), time.monotonic() - begin, net.training, float(after)
    raise AssertionError("no error")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "how, kind, message",
    [
        ("bad image", "DataError", "rank {rank}: verification image {image} of 12: no image"),
        ("nan", "NonFiniteError", "rank {rank}: the embedding of verification image {image} of 12 has a NaN"),
        (
            "another error",
            "RuntimeError",
            "the evaluation failed on rank {rank}: MemoryError: no memory for the images",
        ),
        ("fewer images", "ConfigError", "evaluates another set than rank 0"),
        ("another batch size", "ConfigError", "evaluates another set than rank 0"),
        ("missing file", "DataError", "rank {rank}: {path}.gone: can't be read: No such file"),
    ],
)
def test_an_error_of_one_rank_is_that_of_all(
    ranks: Ranks, tmp_path: Path, world_size: int, how: str, kind: str, message: str
) -> None:
    path = str(a_set(tmp_path / "a.bin"))
    failing = world_size - 1
    results = ranks(world_size).run(failing_job, failing, how, path, timeout=60)
    assert len({(name, text) for name, text, *_ in results}) == 1
    for name, text, seconds, training, after in results:
        assert name == kind
        assert message.format(rank=failing, image=failing * 12 // world_size, path=path) in text
        # No rank ran into a timeout, modes are back, and the group still works.
        assert seconds < 30 and training and after == world_size
    assert kind == "RuntimeError" or issubclass(getattr(errors, kind), errors.PartialFCError)


def rank_job(rank: int, world_size: int) -> str:
    try:
        embed_images(Net(), encoded(2), decode=decode_numbers, rank=0, world_size=1)
    except errors.ConfigError as error:
        return str(error)
    raise AssertionError("no error")


def test_a_rank_that_is_not_that_of_the_group_is_refused(ranks: Ranks) -> None:
    messages = ranks(2).run(rank_job)
    assert "rank 0 of 1 was given, but this process is rank 1 of 2 in its process group" in messages[1]


def set_job(rank: int, world_size: int, folder: str) -> str:
    try:
        evaluate_pairs(Net(), f"{folder}/{rank}.bin", decode=decode_numbers, folds=4)
    except errors.ConfigError as error:
        return str(error)
    raise AssertionError("no error")


def test_ranks_with_different_files_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    a_set(tmp_path / "0.bin")
    write_pairs(tmp_path / "1.bin", encoded(16), [True, False] * 4)
    messages = ranks(2).run(set_job, str(tmp_path))
    assert (
        messages[0] == messages[1] and "rank 1 evaluates another set than rank 0: (8, 16) against (40, " in messages[0]
    )
