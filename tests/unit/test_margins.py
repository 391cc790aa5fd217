from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from partial_fc.errors import ConfigError
from partial_fc.margins import ArcFace, CombinedMargin, CosFace, Margin, NormFace, SphereFace, sine_floor
from partial_fc.norm_margins import AdaFace, MagFace
from tests.oracle import ada_face_state, mag_face_penalty, margin_values

STATE = {"mean": torch.tensor(20.0), "std": torch.tensor(6.0)}
MARGINS = [
    NormFace(),
    CosFace(m=0.35),
    CosFace(m=0.35, easy_margin=True),
    ArcFace(m=0.5),
    ArcFace(m=0.5, easy_margin=True),
    CombinedMargin(m1=1.2, m2=0.4, m3=0.1),
    CombinedMargin(m1=0.9, m2=0.4, m3=0.15, easy_margin=True),
    SphereFace(),
    SphereFace(m=1),
    SphereFace(m=3, lambda_min=0.0, lambda_start=10.0, gamma=1e-4, power=2.0),
    MagFace(),
    MagFace(easy_margin=True),
    MagFace(l_a=1.0, u_a=30.0, l_m=0.1, u_m=2.0),
    AdaFace(),
    AdaFace(m=0.9, h=1.5),
]
STEP = 700


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(size: int = 4001, edge: float = 1e-3) -> torch.Tensor:
    """Angles over (0, pi)."""
    return torch.linspace(edge, math.pi - edge, size, dtype=torch.float64)


def varied_norms(like: torch.Tensor) -> torch.Tensor:
    """Norms from 0.5 to 150 that don't follow the order of the angles."""
    return 0.5 + 149.5 * torch.frac(torch.arange(len(like), dtype=torch.float64) * 0.6180339887)


def by_name(margin: Margin) -> dict:
    return {"name": type(margin).__name__} | vars(margin)


def everything(margin: Margin, cosine: torch.Tensor, norms: torch.Tensor, step: int = STEP):
    return margin.evaluate(cosine, norms=norms, state=STATE, step=step)


def smooth(margin: Margin, theta: torch.Tensor, norms: torch.Tensor, width: float = 1e-3) -> torch.Tensor:
    """Which samples lie away from every jump or kink of phi in theta and in the norm."""
    away = torch.ones_like(theta, dtype=torch.bool)
    if getattr(margin, "easy_margin", False):
        away &= (theta - math.pi / 2).abs() > width
    if isinstance(margin, ArcFace):
        away &= (theta - math.pi + margin.m).abs() > width
    if isinstance(margin, MagFace):
        m = margin.l_m + (norms.clamp(margin.l_a, margin.u_a) - margin.l_a) * (margin.u_m - margin.l_m) / (
            margin.u_a - margin.l_a
        )
        away &= (theta - math.pi + m).abs() > width
        away &= ((norms - margin.l_a).abs() > width) & ((norms - margin.u_a).abs() > width)
    if isinstance(margin, AdaFace):
        g = ((norms.clamp(1e-3, 100) - 20) / 6.001 * margin.h).clamp(-1, 1)
        turned = theta - margin.m * g
        away &= (turned.abs() > width) & ((turned - math.pi).abs() > width)
    return away


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_values_and_derivatives_are_those_of_the_oracle(margin):
    theta = grid()
    norms = varied_norms(theta).requires_grad_()
    cosine = theta.cos().requires_grad_()
    got = everything(margin, cosine.detach(), norms.detach())
    state = {name: value.item() for name, value in STATE.items()}
    phi, boundary = margin_values(cosine, by_name(margin), norms=norms, state=state, step=STEP)
    by_cosine, by_norm = torch.autograd.grad(phi.sum(), [cosine, norms], allow_unused=True)
    here = smooth(margin, theta, norms.detach())
    assert here.float().mean() > 0.95
    assert torch.allclose(got.phi[here], phi[here], rtol=1e-12, atol=1e-13)
    assert torch.allclose(got.boundary[here], boundary[here], rtol=1e-12, atol=1e-13)
    assert torch.allclose(got.derivative[here], by_cosine[here], rtol=1e-9, atol=1e-9)
    if isinstance(margin, MagFace):
        assert torch.allclose(got.norm_derivative[here], by_norm[here], rtol=1e-12, atol=1e-14)
        assert (got.norm_derivative != 0).any()
    else:
        assert got.norm_derivative is None


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_derivatives_are_those_of_finite_differences(margin):
    theta = grid(2001, 0.05)
    cosine, norms, h = theta.cos(), varied_norms(theta), 1e-6
    got = everything(margin, cosine, norms)
    slope = (everything(margin, cosine + h, norms).phi - everything(margin, cosine - h, norms).phi) / (2 * h)
    here = smooth(margin, theta, norms)
    assert torch.allclose(got.derivative[here], slope[here], rtol=1e-6, atol=1e-6)
    if got.norm_derivative is not None:
        slope = (everything(margin, cosine, norms + h).phi - everything(margin, cosine, norms - h).phi) / (2 * h)
        assert torch.allclose(got.norm_derivative[here], slope[here], rtol=1e-6, atol=1e-8)


@given(
    theta=st.floats(0.02, math.pi - 0.02),
    low=st.floats(0.0, 1.5),
    more=st.floats(0.0, 1.5),
    norm=st.floats(1.0, 200.0),
    easy=st.booleans(),
)
def test_magface_against_finite_differences_anywhere(theta, low, more, norm, easy):
    margin = MagFace(l_m=low, u_m=low + more, easy_margin=easy)
    angle, a, h = float64([theta]), float64([norm]), 1e-6
    assume(bool(smooth(margin, angle, a)))
    cosine = angle.cos()
    got = margin.evaluate(cosine, norms=a)
    assert torch.equal(got.phi, got.boundary) or (easy and cosine <= 0)
    by_cosine = margin.evaluate(cosine + h, norms=a).phi - margin.evaluate(cosine - h, norms=a).phi
    by_norm = margin.evaluate(cosine, norms=a + h).phi - margin.evaluate(cosine, norms=a - h).phi
    assert got.derivative.item() == pytest.approx(by_cosine.item() / (2 * h), rel=1e-5, abs=1e-5)
    assert got.norm_derivative.item() == pytest.approx(by_norm.item() / (2 * h), rel=1e-5, abs=1e-7)


@given(
    theta=st.floats(0.02, math.pi - 0.02),
    m=st.integers(1, 9),
    step=st.integers(0, 10**7),
    gamma=st.floats(0, 1),
    power=st.floats(0, 3),
)
def test_sphereface_against_finite_differences_anywhere(theta, m, step, gamma, power):
    margin, h = SphereFace(m=m, gamma=gamma, power=power, lambda_min=0.0), 1e-6
    cosine = float64([theta]).cos()
    got = margin.evaluate(cosine, step=step)
    slope = (margin.evaluate(cosine + h, step=step).phi - margin.evaluate(cosine - h, step=step).phi) / (2 * h)
    assert got.derivative.item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-3)
    assert got.phi.item() <= cosine.item() + 1e-12


@given(theta=st.floats(0.02, math.pi - 0.02), m=st.floats(0, 3), h=st.floats(0, 4), norm=st.floats(0.0, 300.0))
def test_adaface_against_finite_differences_anywhere(theta, m, h, norm):
    margin, width = AdaFace(m=m, h=h), 1e-6
    angle, norms = float64([theta]), float64([norm])
    assume(bool(smooth(margin, angle, norms)))
    cosine = angle.cos()
    got = everything(margin, cosine, norms)
    slope = everything(margin, cosine + width, norms).phi - everything(margin, cosine - width, norms).phi
    assert got.derivative.item() == pytest.approx(slope.item() / (2 * width), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("margin", [SphereFace(), SphereFace(m=7, lambda_min=0.0), MagFace(), AdaFace()], ids=str)
@pytest.mark.parametrize("norm", [5.0, 17.0, 60.0, 150.0])
@pytest.mark.parametrize("step", [0, 100, 10**6])
def test_phi_falls_with_the_angle(margin, norm, step):
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    phi = everything(margin, theta.cos(), torch.full_like(theta, norm), step).phi
    assert bool((phi.diff() <= 1e-12).all())
    if not isinstance(margin, AdaFace):  # whose angle is clipped: phi is flat there
        assert bool((phi.diff() < 0).all())


@pytest.mark.parametrize("norms", [torch.full((4001,), 60.0), torch.full((4001,), 3.0), torch.full((4001,), 1e4)])
@pytest.mark.parametrize("easy", [False, True])
def test_magface_at_a_constant_norm_is_arcface(norms, easy):
    share = (norms[0].double().clamp(10, 110).item() - 10) / 100
    cosine = grid().cos()
    got = MagFace(easy_margin=easy).evaluate(cosine, norms=norms)
    expected = ArcFace(m=0.45 + 0.35 * share, easy_margin=easy).evaluate(cosine)
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
    same = MagFace(l_m=0.5, u_m=0.5).evaluate(cosine, norms=varied_norms(cosine))
    assert torch.allclose(same.phi, ArcFace(m=0.5).evaluate(cosine).phi, rtol=1e-12, atol=1e-13)
    assert not same.norm_derivative.any()


def test_magface_by_hand():
    cosine, norms = float64([math.cos(0.7)] * 3), float64([10.0, 60.0, 110.0])
    got = MagFace().evaluate(cosine, norms=norms)
    assert got.phi.tolist() == pytest.approx([math.cos(0.7 + m) for m in (0.45, 0.625, 0.8)], rel=1e-13)
    assert got.norm_derivative.tolist() == pytest.approx([-math.sin(0.7 + m) * 0.0035 for m in (0.45, 0.625, 0.8)])
    past = MagFace().evaluate(float64([math.cos(3.0)]), norms=float64([60.0]))
    assert past.phi.item() == pytest.approx(math.cos(3.0) - 0.625 * math.sin(0.625))
    assert past.derivative.item() == 1
    assert past.norm_derivative.item() == pytest.approx(-(math.sin(0.625) + 0.625 * math.cos(0.625)) * 0.0035)
    clamped = MagFace().evaluate(cosine[:2], norms=float64([9.9, 111.0]))
    assert clamped.norm_derivative.tolist() == [0, 0]


def test_magface_easy_margin_passes_nothing_to_the_norm():
    got = MagFace(easy_margin=True).evaluate(float64([-0.3, 0.3]), norms=float64([60.0, 60.0]))
    assert got.phi[0].item() == -0.3 and got.derivative[0].item() == 1
    assert got.norm_derivative[0].item() == 0 and got.norm_derivative[1].item() != 0
    assert got.boundary[0].item() == pytest.approx(math.cos(math.acos(-0.3) + 0.625))


def test_magface_penalty():
    norms = torch.linspace(1, 200, 500, dtype=torch.float64, requires_grad=True)
    expected = mag_face_penalty(norms, l_a=12.0, u_a=90.0, lambda_g=7.0)
    values, slope = MagFace(l_a=12.0, u_a=90.0, lambda_g=7.0).penalty(norms.detach())
    assert torch.allclose(values, expected, rtol=1e-14)
    assert torch.allclose(slope, torch.autograd.grad(expected.sum(), norms)[0], rtol=1e-12, atol=1e-16)
    values, slope = MagFace().penalty(float64([110.0, 10.0, 1.0, 1e3]))
    assert values[0].item() == pytest.approx(35 * 2 / 110)
    assert slope[0].item() == pytest.approx(0, abs=1e-18) and slope[1].item() == pytest.approx(35 * (110**-2 - 1e-2))
    assert slope[2:].tolist() == [0, 0]
    assert all(margin.penalty(norms) is None for margin in MARGINS if not isinstance(margin, MagFace))


def test_sphereface_by_hand():
    cosine = float64([1.0, math.cos(math.pi / 4), 0.0, -1.0])
    bare = SphereFace(lambda_min=0.0, lambda_start=0.0)
    assert bare.evaluate(cosine).phi.tolist() == pytest.approx([1, -1, -3, -7], abs=1e-12)
    annealed = SphereFace().evaluate(cosine, step=0).phi
    assert annealed.tolist() == pytest.approx(((1000 * cosine + float64([1, -1, -3, -7])) / 1001).tolist(), abs=1e-12)
    end = SphereFace().evaluate(cosine, step=10**9).phi
    assert end.tolist() == pytest.approx(((5 * cosine + float64([1, -1, -3, -7])) / 6).tolist(), abs=1e-12)


def test_sphereface_is_annealed():
    margin = SphereFace()
    assert margin.annealing(0) == 1000
    assert margin.annealing(100) == pytest.approx(1000 / 13)
    assert margin.annealing(1658) > 5 and margin.annealing(1659) == 5
    official = SphereFace(gamma=1e-4, power=2.0)
    assert official.annealing(131421) > 5 and official.annealing(131422) == 5
    values = [margin.annealing(step) for step in range(0, 3000, 50)]
    assert values == sorted(values, reverse=True)


def test_sphereface_with_factor_one_has_no_margin():
    cosine = grid().cos()
    got = SphereFace(m=1).evaluate(cosine, step=5)
    assert torch.allclose(got.phi, cosine, rtol=1e-14, atol=1e-15)
    assert torch.allclose(got.derivative, torch.ones_like(cosine), rtol=1e-12)


def test_adaface_by_hand():
    cosine = float64([math.cos(1.1)] * 3)
    # h (a - mean) / (std + 0.001): far below -1, 0, far above 1.
    got = AdaFace(m=0.4).evaluate(cosine, norms=float64([0.0, 20.0, 100.0]), state={**STATE, "std": torch.tensor(1.0)})
    assert got.phi.tolist() == pytest.approx([math.cos(1.5), math.cos(1.1) - 0.4, math.cos(0.7) - 0.8], rel=1e-12)
    slopes = [math.sin(1.5) / math.sin(1.1), 1, math.sin(0.7) / math.sin(1.1)]
    assert got.derivative.tolist() == pytest.approx(slopes, rel=1e-12)
    assert torch.equal(got.phi, got.boundary) and got.norm_derivative is None


def test_adaface_clips_the_angle():
    state = {"mean": torch.tensor(20.0), "std": torch.tensor(1.0)}
    got = AdaFace(m=0.4).evaluate(float64([math.cos(0.2), math.cos(3.0)]), norms=float64([100.0, 1.0]), state=state)
    assert got.phi.tolist() == pytest.approx([1 - 0.8, -1.0])
    assert got.derivative.tolist() == [0, 0]


def test_adaface_norms_beyond_the_clip_count_as_the_clip():
    cosine = float64([0.3, 0.3])
    margin, state = AdaFace(h=0.05), {"mean": torch.tensor(50.0), "std": torch.tensor(30.0)}
    got = margin.evaluate(cosine, norms=float64([100.0, 1e6]), state=state)
    assert got.phi[0] == got.phi[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaface_state(dtype):
    margin = AdaFace(momentum=0.1)
    state = {name: value.to(dtype) for name, value in margin.initial_state().items()}
    assert {name: (value.item(), value.shape) for name, value in state.items()} == {"mean": (20, ()), "std": (100, ())}
    before, expected = dict(state), None
    for seed in range(3):
        norms = 30 * torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 90
        new = margin.advance(state, norms.to(dtype).requires_grad_())
        expected = ada_face_state(norms, expected, momentum=0.1)
        assert {name: value.item() for name, value in new.items()} == pytest.approx(expected, rel=1e-6)
        assert all(value.dtype == dtype and value.shape == () and not value.requires_grad for value in new.values())
        state = new
    assert before == {"mean": 20, "std": 100}


def test_adaface_state_of_a_single_sample():
    state = {"mean": torch.tensor(20.0), "std": torch.tensor(5.0)}
    new = AdaFace(momentum=0.5).advance(state, torch.tensor([30.0]))
    assert new == {"mean": torch.tensor(25.0), "std": torch.tensor(5.0)}
    assert new["std"] is not state["std"]


def test_other_margins_have_no_state():
    for margin in MARGINS:
        if not isinstance(margin, AdaFace):
            assert margin.initial_state() == {} and margin.advance({}, torch.ones(3)) == {}
        assert margin.needs_norms == isinstance(margin, MagFace | AdaFace)


@pytest.mark.parametrize("margin", [m for m in MARGINS if not m.needs_norms], ids=str)
def test_the_cosine_alone_is_enough(margin):
    cosine = grid(11).cos()
    assert torch.equal(margin.evaluate(cosine).phi, margin.evaluate(cosine, norms=cosine + 2, state=STATE).phi)


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_a_weakened_margin_goes_from_nothing_to_itself(margin):
    theta = grid(500)
    cosine, norms = theta.cos(), varied_norms(theta)
    assert margin.weakened(1) is margin and margin.weakened(1.0) is margin
    if isinstance(margin, SphereFace | NormFace):
        assert margin.weakened(0.3) is margin
        return
    assert torch.allclose(everything(margin.weakened(0), cosine, norms).phi, cosine, rtol=1e-12, atol=1e-12)
    gap = [(cosine - everything(margin.weakened(x), cosine, norms).boundary).mean() for x in (0, 0.25, 0.5, 0.75, 1)]
    assert all(abs(one) < abs(other) for one, other in zip(gap, gap[1:], strict=False))
    assert type(margin.weakened(0.5)) is type(margin)
    assert margin.weakened(0.5).initial_state() == margin.initial_state()


def test_the_fields_of_weakened_margins():
    assert CosFace(m=0.4, easy_margin=True).weakened(0.5) == CosFace(m=0.2, easy_margin=True)
    assert ArcFace(m=0.4).weakened(0.25) == ArcFace(m=0.1)
    assert CombinedMargin(m1=1.5, m2=0.4, m3=0.2).weakened(0.5) == CombinedMargin(m1=1.25, m2=0.2, m3=0.1)
    assert CombinedMargin(m1=0.5).weakened(0.0) == CombinedMargin(m1=1, m2=0, m3=0)
    assert MagFace(lambda_g=9.0).weakened(0.5) == MagFace(l_m=0.225, u_m=0.4, lambda_g=9.0)
    assert AdaFace(m=0.4, h=0.2).weakened(0.5) == AdaFace(m=0.2, h=0.2)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("margin", [NormFace(), CosFace(), CombinedMargin(), SphereFace(), MagFace()], ids=str)
def test_a_share_is_between_zero_and_one(margin, share):
    with pytest.raises(ConfigError, match=rf"{type(margin).__name__}.weakened: share={share}, expected a share"):
        margin.weakened(share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_values_are_finite_and_of_the_cosines_dtype(margin, dtype):
    cosine = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=dtype)
    norms = torch.tensor([0.0, 12.0, 20.0, 60.0, 1e6], dtype=torch.float32)
    for value in everything(margin, cosine, norms):
        assert value is None or (value.dtype == dtype and value.shape == (5,) and bool(value.isfinite().all()))
    assert everything(margin, cosine, norms).derivative.abs().max() <= 30 / sine_floor(dtype)
    assert cosine.tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_float32_is_near_float64(margin):
    theta = grid(2000, 0.02)
    norms = varied_norms(theta)
    here = smooth(margin, theta, norms)
    single = everything(margin, theta.cos().float(), norms.float())
    double = everything(margin, theta.cos().float().double(), norms.float().double())
    assert torch.allclose(single.phi.double()[here], double.phi[here], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CosFace(m=2.1), r"CosFace: m=2.1, expected a cosine margin in \[0, 2\]"),
        (lambda: ArcFace(m=math.pi), r"ArcFace: m=3.14.*, expected an angle in \[0, pi\)"),
        (lambda: CombinedMargin(m1=0), "CombinedMargin: m1=0, expected a factor above 0"),
        (lambda: CombinedMargin(m2=-1), "CombinedMargin: m2=-1, expected an angle"),
        (lambda: CombinedMargin(m3=math.inf), "CombinedMargin: m3=inf, expected a cosine margin"),
        (lambda: SphereFace(m=1.5), "SphereFace: m=1.5, expected a whole number, at least 1"),
        (lambda: SphereFace(m=0), "SphereFace: m=0, expected a whole number"),
        (lambda: SphereFace(lambda_min=-1.0), "SphereFace: lambda_min=-1.0, expected a number of at least 0"),
        (lambda: SphereFace(lambda_start=math.inf), "SphereFace: lambda_start=inf, expected"),
        (lambda: SphereFace(gamma=-1e-4), "SphereFace: gamma=-0.0001, expected"),
        (lambda: SphereFace(power=math.nan), "SphereFace: power=nan, expected"),
        (lambda: MagFace(l_a=0), "MagFace: l_a=0, expected a norm above 0"),
        (lambda: MagFace(u_a=10.0), r"MagFace: u_a=10.0, expected a norm above l_a=10.0"),
        (lambda: MagFace(l_m=-0.1), r"MagFace: l_m=-0.1, expected an angle in \[0, pi\)"),
        (lambda: MagFace(u_m=0.4), r"MagFace: u_m=0.4, expected an angle in \[l_m=0.45, pi\)"),
        (lambda: MagFace(lambda_g=-1), "MagFace: lambda_g=-1, expected a weight of at least 0"),
        (lambda: AdaFace(m=4.0), r"AdaFace: m=4.0, expected an angle in \[0, pi\)"),
        (lambda: AdaFace(h=-1.0), "AdaFace: h=-1.0, expected a factor of at least 0"),
        (lambda: AdaFace(momentum=0.0), r"AdaFace: momentum=0.0, expected a weight in \(0, 1\]"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_what_is_missing_is_named():
    cosine = torch.zeros(2)
    with pytest.raises(TypeError, match=r"MagFace.evaluate: norms=None, expected the norms of the embeddings \[B\]"):
        MagFace().evaluate(cosine)
    with pytest.raises(TypeError, match=r"AdaFace.evaluate: norms=None, expected the norms"):
        AdaFace().evaluate(cosine, state=STATE)
    with pytest.raises(TypeError, match=r"AdaFace.evaluate: state=None, expected the running 'mean' and 'std'"):
        AdaFace().evaluate(cosine, norms=cosine)
    with pytest.raises(TypeError, match="Margin is not a margin"):
        Margin().evaluate(cosine)


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_a_margin_never_changes(margin):
    with pytest.raises(FrozenInstanceError):
        margin.m = 1.0
