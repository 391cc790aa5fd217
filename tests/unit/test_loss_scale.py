"""The loss scale: dense, sparse and accumulated gradients; one rank's overflow counts for all."""

from __future__ import annotations

import torch

from partial_fc.loss_scale import LossScale


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def test_dense_and_accumulated_sparse_gradients_are_divided() -> None:
    dense, sparse = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, 2))
    dense.grad = torch.full((3,), 8.0)
    part = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.full((1, 2), 4.0), (3, 2))
    sparse.grad = part + part
    assert LossScale(alone, initial=8.0).unscale([dense, sparse])
    assert dense.grad.tolist() == [1.0, 1.0, 1.0]
    assert sparse.grad.to_dense().tolist() == [[0, 0], [1, 1], [0, 0]]


def test_an_overflow_on_another_rank_halves_the_scale_here() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    scale = LossScale(lambda own: own.add_(1), initial=8.0)
    assert not scale.unscale([parameter])
    assert scale.scale == 4.0


def test_an_infinity_is_found_and_quiet_steps_double_the_scale() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    scale = LossScale(alone, initial=8.0, growth_interval=2)
    parameter.grad = torch.tensor([torch.inf])
    assert not scale.unscale([parameter]) and scale.scale == 4.0
    for expected in (4.0, 8.0):
        parameter.grad = torch.ones(1)
        assert scale.unscale([parameter]) and scale.scale == expected


def test_disabled_it_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([torch.inf])
    scale = LossScale(alone, enabled=False)
    assert scale.scale == 1.0 and scale.unscale([parameter])
