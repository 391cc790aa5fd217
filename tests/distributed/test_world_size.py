"""The same training at any world size: 20 steps with sampling, a backbone under DDP, row optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import partial_fc as pfc

STEPS, BATCH = 20, 12


def losses(rank: int, world_size: int, dtype: torch.dtype, in_backward: bool, negatives: Any) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    backbone = nn.Sequential(nn.Linear(20, 32), nn.PReLU(32), nn.Linear(32, 16)).to(dtype)
    head = pfc.PartialFC(16, 301, negatives=negatives, scale=16.0, sample_rate=0.3, seed=4, chunk_size=32).to(dtype)
    replica = DistributedDataParallel(backbone) if world_size > 1 else backbone
    optimizers = [
        torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        pfc.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, in_backward=in_backward),
    ]
    own = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    values = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 20, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(301, (BATCH,), generator=generator)
        loss = head(replica(images[own]), labels[own])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("negatives", [pfc.SupportVectors(1.1), pfc.SupportVectors(1.1, top_k=3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_losses_do_not_depend_on_the_world_size(
    ranks: Any, dtype: torch.dtype, tolerance: float, negatives: Any, in_backward: bool
) -> None:
    expected = ranks(1).run(losses, dtype, in_backward, negatives)[0]
    assert expected[-1] != expected[0]
    for world_size in (2, 4):
        for found in ranks(world_size).run(losses, dtype, in_backward, negatives):
            assert found == pytest.approx(expected, rel=tolerance)


def in_bfloat16(rank: int, world_size: int) -> torch.Tensor:
    head = pfc.PartialFC(16, 301, scale=16.0, sample_rate=0.3, seed=4, storage_dtype=torch.bfloat16)
    optimizer = pfc.optim.RowSGD(
        head.parameters(), lr=0.1, momentum=0.9, state_dtype=torch.bfloat16, seed=1, in_backward=True
    )
    generator = torch.Generator().manual_seed(0)
    own = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for _ in range(3):
        embeddings = torch.randn(BATCH, 16, generator=generator)
        labels = torch.randint(301, (BATCH,), generator=generator)
        head(embeddings[own].requires_grad_(), labels[own]).backward()
        optimizer.step()
    return head.weight.detach()


def test_stochastic_rounding_does_not_depend_on_the_world_size(ranks: Any) -> None:
    whole = ranks(1).run(in_bfloat16)[0].float()
    for world_size in (2, 3):
        parts = torch.cat(ranks(world_size).run(in_bfloat16)).float()
        # Sums in another order move a value over an edge now and then: by one step, in few places.
        assert (parts != whole).float().mean() < 0.01
        assert torch.allclose(parts, whole, rtol=0.02, atol=1e-3)


def accumulated(rank: int, world_size: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    backbone = nn.Linear(20, 16).double()
    head = pfc.PartialFC(16, 50, scale=16.0, seed=4).double()
    images = torch.randn(BATCH, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (BATCH,), generator=generator)
    for part, chosen in zip(images.chunk(micro), labels.chunk(micro), strict=True):
        own = slice(rank * len(part) // world_size, (rank + 1) * len(part) // world_size)
        (head(backbone(part[own]), chosen[own]) / micro).backward()
    assert head.weight.grad is not None and backbone.weight.grad is not None
    # What DDP does at the last micro batch.
    torch.distributed.all_reduce(backbone.weight.grad)
    return head.weight.grad, backbone.weight.grad / world_size


def test_accumulated_gradients_are_those_of_the_whole_batch(ranks: Any) -> None:
    head, backbone = ranks(1).run(accumulated, 1)[0]
    parts = ranks(2).run(accumulated, 3)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), head, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(parts[0][1], backbone, rtol=1e-10, atol=1e-14)
