from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.emphasis import Coefficients, Curricular, Negatives, Plain, SupportVectors
from partial_fc.errors import ConfigError
from tests.oracle import curricular_state


def test_coefficients():
    assert Plain().coefficients() is None
    assert SupportVectors(t=1.25).coefficients() == Coefficients(0, 1.25, 0.25)
    assert SupportVectors(t=1.25, mode="fixed").coefficients() == (0, 1, 0.25)
    state = {"tau": torch.tensor(0.3)}
    assert Curricular().coefficients(state) == (1, state["tau"], 0)
    assert SupportVectors(t=1.25).coefficients(state) == (0, 1.25, 0.25)


def test_candidates_and_filter():
    for negatives in (Plain(), SupportVectors(), Curricular()):
        assert negatives.candidates is None and negatives.filter_above is None
    assert SupportVectors(top_k=3).candidates == Curricular(top_k=3).candidates == 3
    for kind in (Plain, SupportVectors, Curricular):
        assert kind(filter_above=-0.5).filter_above == -0.5


def test_only_curricular_has_state():
    for negatives in (Plain(), SupportVectors()):
        assert negatives.initial_state() == {} and negatives.advance({}, torch.ones(2)) == {}
    tau = Curricular().initial_state()["tau"]
    assert tau.item() == 0 and tau.shape == () and tau.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(batches=st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=5), max_size=4), momentum=st.floats(0.001, 1))
def test_tau_is_an_average_of_the_target_cosines(dtype, batches, momentum):
    negatives, expected = Curricular(momentum=momentum), {"tau": 0.0}
    state = {name: value.to(dtype) for name, value in negatives.initial_state().items()}
    for cosines in batches:
        target = torch.tensor(cosines, dtype=torch.float64)
        old = state
        state = negatives.advance(old, target.requires_grad_())
        expected = curricular_state(target, expected, momentum)
        assert state["tau"].dtype == dtype and state["tau"].shape == () and not state["tau"].requires_grad
        assert state["tau"] is not old["tau"]
        assert state["tau"].item() == pytest.approx(expected["tau"], rel=1e-5, abs=1e-6)


def test_tau_by_hand():
    state = Curricular().advance({"tau": torch.tensor(0.5)}, torch.tensor([0.2, 0.6]))
    assert state["tau"].item() == pytest.approx(0.01 * 0.4 + 0.99 * 0.5)


def test_weakened():
    assert SupportVectors(t=1.2, top_k=2).weakened(0.5) == SupportVectors(t=1.1, top_k=2)
    assert SupportVectors(t=1.2, mode="fixed", filter_above=0.5).weakened(0) == SupportVectors(
        t=1.0, mode="fixed", filter_above=0.5
    )
    for negatives in (Plain(), SupportVectors(), Curricular()):
        assert negatives.weakened(1) is negatives
    for negatives in (Plain(), Curricular()):
        assert negatives.weakened(0.5) is negatives


@pytest.mark.parametrize("negatives", [Plain(), SupportVectors(), Curricular()])
@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_a_share_is_between_zero_and_one(negatives, share):
    with pytest.raises(ConfigError, match=rf"{type(negatives).__name__}.weakened: share={share}, expected a share"):
        negatives.weakened(share)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Plain(filter_above=1.5), r"Plain: filter_above=1.5, expected a cosine in \[-1, 1\], or None"),
        (lambda: SupportVectors(filter_above=-2), "SupportVectors: filter_above=-2, expected a cosine"),
        (lambda: SupportVectors(t=0.9), r"SupportVectors: t=0.9, expected a strength in \[1, 2\]"),
        (lambda: SupportVectors(mode="soft"), "SupportVectors: mode='soft', expected 'adaptive' or 'fixed'"),
        (lambda: SupportVectors(top_k=0), "SupportVectors: top_k=0, expected a whole number, at least 1"),
        (lambda: Curricular(top_k=1.5), "Curricular: top_k=1.5, expected a whole number, at least 1"),
        (lambda: Curricular(filter_above=math.nan), "Curricular: filter_above=nan, expected a cosine"),
        (lambda: Curricular(momentum=0), r"Curricular: momentum=0, expected a weight in \(0, 1\]"),
        (lambda: Curricular(momentum=1.1), "Curricular: momentum=1.1, expected a weight"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_missing_state_is_named():
    with pytest.raises(TypeError, match="Curricular.coefficients: state=None, expected the running 'tau'"):
        Curricular().coefficients()
    assert Negatives().coefficients() is None
