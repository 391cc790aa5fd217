from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.errors import ConfigError
from partial_fc.mining import FocalLoss, HardMining, Mining
from tests.oracle import mined

LOSSES = st.lists(st.floats(1e-3, 60), min_size=1, max_size=9)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(losses=LOSSES, gamma=st.floats(0, 6))
def test_focal_loss_is_that_of_the_oracle(losses, gamma):
    values = float64(losses).requires_grad_()
    expected = mined(values, {"name": "FocalLoss", "gamma": gamma})
    loss, slope = FocalLoss(gamma).reduce(values.detach())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(slope, torch.autograd.grad(expected, values)[0], rtol=1e-9, atol=1e-18)


@given(losses=LOSSES, keep=st.floats(1e-3, 1))
def test_hard_mining_is_that_of_the_oracle(losses, keep):
    values = float64(losses).requires_grad_()
    expected = mined(values, {"name": "HardMining", "keep": keep})
    loss, slope = HardMining(keep).reduce(values.detach())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.allclose(slope, torch.autograd.grad(expected, values)[0], rtol=1e-14)


@given(losses=LOSSES, gamma=st.floats(0, 5))
def test_focal_loss_against_finite_differences(losses, gamma):
    values, mining = float64(losses), FocalLoss(gamma)
    _, slope = mining.reduce(values)
    for row in range(len(values)):
        h = torch.zeros_like(values).index_fill(0, torch.tensor([row]), 1e-3 * values[row].item() ** 0.5 * 1e-2)
        rise = (mining.reduce(values + h)[0] - mining.reduce(values - h)[0]) / (2 * h[row])
        assert slope[row].item() == pytest.approx(rise.item(), rel=1e-3, abs=1e-6)


@given(losses=LOSSES)
def test_gamma_zero_and_keep_one_are_the_mean(losses):
    values = float64([0.0, *losses])
    for mining in (FocalLoss(gamma=0.0), HardMining(keep=1.0)):
        loss, slope = mining.reduce(values)
        assert loss.item() == pytest.approx(values.mean().item(), rel=1e-14)
        assert slope.tolist() == [1 / len(values)] * len(values)


def test_focal_loss_by_hand():
    loss, slope = FocalLoss().reduce(float64([math.log(2), math.log(4)]))
    assert loss.item() == pytest.approx((0.25 * math.log(2) + 0.5625 * math.log(4)) / 2)
    by_hand = [0.25 + 2 * 0.5 * 0.5 * math.log(2), 0.5625 + 2 * 0.75 * 0.25 * math.log(4)]
    assert slope.tolist() == pytest.approx([value / 2 for value in by_hand])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 1.0, 2.0])
def test_focal_loss_of_certain_samples(gamma, dtype):
    tiny = torch.tensor([0.0, 1e-40, 1e-30, 1e-12, 1e-5], dtype=dtype)
    loss, slope = FocalLoss(gamma).reduce(tiny)
    assert loss.isfinite() and loss.dtype == slope.dtype == dtype
    # For small l the loss is l^(gamma + 1), and its derivative (gamma + 1) l^gamma.
    expected = (gamma + 1) * tiny.double() ** gamma / len(tiny)
    assert torch.allclose(slope.double(), expected, rtol=2e-5, atol=0 if dtype == torch.float64 else 1e-38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_of_hopeless_samples_is_the_loss(dtype):
    loss, slope = FocalLoss().reduce(torch.tensor([80.0, 200.0, 3000.0], dtype=dtype))
    assert loss.item() == pytest.approx(3280 / 3)
    assert slope.tolist() == pytest.approx([1 / 3] * 3)


def test_hard_mining_by_hand():
    loss, slope = HardMining(keep=0.5).reduce(float64([1.0, 5.0, 2.0, 4.0, 3.0]))
    assert loss.item() == 4  # ceil(2.5) = 3 of them: 5, 4 and 3
    assert slope.tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3])


def test_equal_losses_are_kept_by_the_lowest_row():
    losses = torch.ones(200)
    losses[150] = 2
    _, slope = HardMining(keep=0.25).reduce(losses)
    assert slope.nonzero().flatten().tolist() == [*range(49), 150]


@pytest.mark.parametrize("percent", [1, 7, 10, 30, 55, 70, 90, 99, 100])
def test_how_many_are_kept(percent):
    for batch in range(1, 400):
        assert HardMining(keep=percent / 100).kept(batch) == max(1, math.ceil(Fraction(percent * batch, 100)))


@pytest.mark.parametrize("mining", [FocalLoss(), FocalLoss(0.5), FocalLoss(0.0), HardMining(), HardMining(0.01)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows(mining, bad):
    loss, slope = mining.reduce(torch.tensor([1.0, bad, 2.0]))
    assert not loss.isfinite() and slope.shape == (3,)


def test_the_losses_are_left_as_they_are():
    losses = torch.tensor([3.0, 1.0, 2.0])
    for mining in (FocalLoss(), HardMining()):
        mining.reduce(losses)
    assert losses.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FocalLoss(gamma=-1.0), "FocalLoss: gamma=-1.0, expected an exponent of at least 0"),
        (lambda: FocalLoss(gamma=math.inf), "FocalLoss: gamma=inf, expected"),
        (lambda: HardMining(keep=0), r"HardMining: keep=0, expected a share in \(0, 1\]"),
        (lambda: HardMining(keep=1.5), "HardMining: keep=1.5, expected a share"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_the_base_is_no_mining():
    with pytest.raises(TypeError, match="Mining is not a mining: use FocalLoss or HardMining"):
        Mining().reduce(torch.ones(2))
