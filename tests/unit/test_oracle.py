from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.oracle import (
    ada_face_state,
    angle,
    cosines,
    curricular_state,
    dense,
    dense_gradients,
    dense_loss,
    dense_stats,
    mag_face_penalty,
    margin_values,
    mined,
    next_state,
    topk,
)

MARGINS = [
    {"name": "NormFace"},
    {"name": "CosFace", "m": 0.35},
    {"name": "CosFace", "m": 0.35, "easy_margin": True},
    {"name": "ArcFace", "m": 0.5},
    {"name": "ArcFace", "m": 0.5, "easy_margin": True},
    {"name": "CombinedMargin", "m1": 1.2, "m2": 0.4, "m3": 0.1},
    {"name": "SphereFace", "m": 3, "lambda_min": 0.5},
    {"name": "MagFace", "l_a": 0.7, "u_a": 3.0},
    {"name": "MagFace", "l_a": 0.7, "u_a": 3.0, "lambda_g": 2.0, "easy_margin": True},
]
NEGATIVES = [
    {"name": "Plain"},
    {"name": "Plain", "filter_above": 0.2},
    {"name": "SupportVectors", "t": 1.2},
    {"name": "SupportVectors", "t": 1.3, "mode": "fixed", "filter_above": 0.3},
    {"name": "SupportVectors", "t": 1.2, "top_k": 2},
    {"name": "SupportVectors", "t": 1.2, "mode": "fixed", "top_k": 3, "filter_above": 0.3},
    {"name": "Curricular"},
    {"name": "Curricular", "top_k": 2, "filter_above": 0.3},
]
STATE = {"mean": 2.0, "std": 0.4, "tau": 0.35}
MININGS = [None, {"name": "FocalLoss"}, {"name": "FocalLoss", "gamma": 0.5}, {"name": "HardMining", "keep": 0.6}]


def batch(classes: int = 13, rows: int = 5, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(classes, (rows,), generator=generator), weight


def planar(degrees: list[float]) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1)


@pytest.mark.parametrize(("margin", "negatives"), list(itertools.product(MARGINS, NEGATIVES)))
def test_gradients_are_those_of_finite_differences(margin, negatives):
    embeddings, labels, weight = batch(classes=7, rows=4, size=3)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return dense_loss(x, labels, w, margin=margin, negatives=negatives, scale=4.0, state=STATE, step=10**5)

    assert gradcheck(loss, (embeddings.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("mining", MININGS)
def test_gradients_with_mining_and_weights_are_those_of_finite_differences(mining):
    embeddings, labels, weight = batch(classes=7, rows=4, size=3)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        weights = torch.linspace(0, 2, 7, dtype=torch.float64)
        settings = {"margin": MARGINS[7], "negatives": NEGATIVES[6], "state": STATE, "scale": 4.0}
        return dense_loss(x, labels, w, mining=mining, log_weight=weights, **settings)

    assert gradcheck(loss, (embeddings.requires_grad_(), weight.requires_grad_()))


def test_by_hand_without_emphasis():
    # The embedding lies on class 0; class 1 at a right angle, class 2 opposite. Lengths don't matter.
    embeddings, weight = 3 * planar([0]), 0.5 * planar([0, 90, 180])
    loss = dense_loss(
        embeddings,
        torch.tensor([0]),
        weight,
        margin={"name": "CosFace", "m": 0.5},
        negatives={"name": "Plain"},
        scale=2,
    )
    # z = 2 * (0.5, 0, -1)
    assert loss.item() == pytest.approx(math.log(math.e + 1 + math.exp(-2)) - 1, rel=1e-14)


@pytest.mark.parametrize(
    ("negatives", "values", "count"),
    [
        ({"name": "SupportVectors", "t": 1.2}, [1.2 * math.sqrt(0.5) + 0.2, 1.2 * 0.5 + 0.2, -0.5], 2),
        ({"name": "SupportVectors", "t": 1.2, "mode": "fixed"}, [math.sqrt(0.5) + 0.2, 0.7, -0.5], 2),
        ({"name": "SupportVectors", "t": 1.2, "top_k": 1}, [1.2 * math.sqrt(0.5) + 0.2, 0.5, -0.5], 1),
        ({"name": "SupportVectors", "t": 1.2, "top_k": 1, "filter_above": 0.6}, [None, 0.8, -0.5], 1),
        ({"name": "Plain", "filter_above": 0.6}, [None, 0.5, -0.5], 1),
    ],
)
def test_by_hand_with_support_vectors(negatives, values, count):
    # c = 0 with its own class, cos 45, cos 60 and cos 120 with the others; the boundary is -0.35.
    weight = planar([90, 45, 60, 120])
    settings = {"margin": {"name": "CosFace", "m": 0.35}, "negatives": negatives, "scale": 3.0}
    loss = dense_loss(planar([0]), torch.tensor([0]), weight, **settings)
    logits = [-0.35, *(value for value in values if value is not None)]
    expected = math.log(sum(math.exp(3 * value) for value in logits)) + 3 * 0.35
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    stats = dense_stats(planar([0]), torch.tensor([0]), weight, **settings)
    assert stats["support_vectors"].tolist() == [count]
    assert stats["target_cosine"].tolist() == pytest.approx([0], abs=1e-12)


def test_equal_cosines_are_kept_by_the_lowest_class_id():
    weight = planar([0, 60, 60, 60, 60])
    settings = {"margin": {"name": "CosFace", "m": 0.9}, "negatives": {"name": "SupportVectors", "top_k": 2}}
    result = dense(planar([0]), torch.tensor([0]), weight, **settings)
    assert result.support_mask.tolist() == [[False, True, True, False, False]]
    values, classes = topk(planar([0]), weight, 3)
    assert classes.tolist() == [[0, 1, 2]]
    assert values[0].tolist() == pytest.approx([1, 0.5, 0.5])


def test_easy_margin_moves_phi_but_not_the_boundary():
    c = torch.tensor([-0.4, 0.6], dtype=torch.float64)
    for margin in [{"name": "CosFace", "m": 0.2}, {"name": "ArcFace", "m": 0.2}]:
        plain, boundary = margin_values(c, margin)
        assert torch.equal(plain, boundary)
        easy, easy_boundary = margin_values(c, margin | {"easy_margin": True})
        assert torch.equal(easy_boundary, boundary)
        assert easy.tolist() == [-0.4, plain[1].item()]


def test_margins_by_hand():
    c = torch.tensor([math.cos(0.7), math.cos(2.9)], dtype=torch.float64)
    assert margin_values(c, {"name": "NormFace"})[0].tolist() == c.tolist()
    arc = [math.cos(1.2), math.cos(2.9) - 0.5 * math.sin(0.5)]
    assert margin_values(c, {"name": "ArcFace"})[0].tolist() == pytest.approx(arc, rel=1e-14)
    combined = [math.cos(1.25 * 0.7 + 0.5) - 0.1, -math.cos(1.25 * 2.9 + 0.5) - 2 - 0.1]
    settings = {"name": "CombinedMargin", "m1": 1.25, "m3": 0.1}
    assert margin_values(c, settings)[0].tolist() == pytest.approx(combined, rel=1e-13)


def test_the_combined_margin_falls_and_has_no_jump():
    theta = torch.linspace(1e-3, math.pi - 1e-3, 20001, dtype=torch.float64)
    phi, _ = margin_values(theta.cos(), {"name": "CombinedMargin", "m1": 4.0, "m2": 0.3, "m3": 0.2})
    assert bool((phi.diff() < 0).all()) and phi.diff().abs().max() < 1e-3


def test_derivatives_are_finite_where_the_sine_is_zero():
    c = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(angle(c).sum(), c)
    assert slope[:2].tolist() == pytest.approx([-1e8, -1e8])
    assert slope[2].item() == pytest.approx(-1 / math.sin(math.acos(0.5)))


def test_the_clamp_passes_gradients():
    # A unit vector in floating point may have a cosine a little above 1 with itself.
    x = torch.tensor([[0.1, 0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    c = cosines(x, torch.tensor([[0.1, 0.3, 0.7], [0.7, 0.1, 0.3]], dtype=torch.float64))
    assert c.max() <= 1
    (slope,) = torch.autograd.grad(c[0, 1], x)
    assert slope.abs().max() > 0.1


def test_sampling_is_the_loss_over_fewer_classes():
    embeddings, labels, weight = batch()
    sampled = torch.cat([labels, torch.tensor([0, 12])]).unique()
    settings = {"margin": MARGINS[3], "negatives": NEGATIVES[4], "scale": 8.0}
    loss, by_embeddings, by_weight = dense_gradients(embeddings, labels, weight, sampled=sampled, **settings)
    few, few_by_embeddings, few_by_weight = dense_gradients(
        embeddings, torch.searchsorted(sampled, labels), weight[sampled], world_size=3, **settings
    )
    assert torch.equal(loss, few)
    assert torch.allclose(3 * by_embeddings, few_by_embeddings, rtol=1e-14, atol=0)
    assert torch.equal(by_weight[sampled], few_by_weight)
    unsampled = torch.ones(len(weight), dtype=torch.bool).index_fill(0, sampled, False)
    assert not by_weight[unsampled].any() and unsampled.any()
    with pytest.raises(AssertionError, match="every label"):
        dense_gradients(embeddings, labels, weight, sampled=sampled[sampled != labels[0]], **settings)


def test_topk_of_everything_is_a_sort():
    embeddings, _, weight = batch()
    values, classes = topk(embeddings, weight, 13)
    assert torch.equal(values, cosines(embeddings, weight).sort(1, descending=True).values)
    assert torch.equal(classes.sort(1).values, torch.arange(13).expand(5, 13))


def test_adaface_is_differentiated_along_the_cosine_alone():
    embeddings, labels, weight = batch()
    margin, norms = {"name": "AdaFace", "m": 0.4}, embeddings.norm(dim=1)
    cosine = torch.tensor([-0.6, -0.1, 0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda c: margin_values(c, margin, norms=norms, state=STATE)[0], (cosine,))
    settings = {"negatives": NEGATIVES[0], "scale": 4.0, "state": STATE}
    _, detached, _ = dense_gradients(embeddings, labels, weight, margin=margin, **settings)
    attaching = {"name": "MagFace", "l_a": 0.1, "u_a": 20.0}
    _, attached, _ = dense_gradients(embeddings, labels, weight, margin=attaching, **settings)
    # The loss doesn't change along the embedding where the norm is detached.
    assert (detached * embeddings).sum(1).abs().max() < 1e-15
    assert (attached * embeddings).sum(1).abs().min() > 1e-3


def test_adaptive_margins_by_hand():
    c = torch.tensor([math.cos(0.7), math.cos(2.9)], dtype=torch.float64)
    bare = {"name": "SphereFace", "m": 4, "lambda_min": 0.0, "lambda_start": 0.0}
    assert margin_values(c, bare)[0].tolist() == pytest.approx([math.cos(2.8), -math.cos(11.6) - 6], rel=1e-12)
    annealed = margin_values(c, {"name": "SphereFace", "gamma": 0.5, "power": 2.0}, step=18)[0]
    by_hand = [10 * math.cos(0.7) + math.cos(2.8), 10 * math.cos(2.9) - math.cos(11.6) - 6]
    assert annealed.tolist() == pytest.approx([value / 11 for value in by_hand], rel=1e-12)
    norms = torch.tensor([60.0, 500.0], dtype=torch.float64)
    mag, boundary = margin_values(c, {"name": "MagFace", "easy_margin": True}, norms=norms)
    assert mag.tolist() == pytest.approx([math.cos(0.7 + 0.625), math.cos(2.9)])
    assert boundary.tolist() == pytest.approx([math.cos(0.7 + 0.625), math.cos(2.9) - 0.8 * math.sin(0.8)])
    assert mag_face_penalty(norms).tolist() == pytest.approx([35 * (60 / 110**2 + 1 / 60), 70 / 110])
    ada, _ = margin_values(c, {"name": "AdaFace", "h": 0.5}, norms=norms, state={"mean": 50.0, "std": 19.999})
    assert ada.tolist() == pytest.approx([math.cos(0.7 - 0.1) - 0.5, math.cos(2.9 - 0.4) - 0.8], rel=1e-12)


def test_curricular_by_hand():
    # c = 0 with its own class, cos 45, cos 60 and cos 120 with the others; the boundary is -0.35.
    weight, label = planar([90, 45, 60, 120]), torch.tensor([0])
    settings = {"margin": {"name": "CosFace", "m": 0.35}, "negatives": {"name": "Curricular"}, "scale": 3.0}
    loss = dense_loss(planar([0]), label, weight, state={"tau": 0.3}, **settings)
    values = [-0.35, math.sqrt(0.5) * (math.sqrt(0.5) + 0.3), 0.5 * 0.8, -0.5]
    assert loss.item() == pytest.approx(math.log(sum(math.exp(3 * value) for value in values)) + 3 * 0.35, rel=1e-12)
    with pytest.raises(AssertionError, match="Curricular needs state"):
        dense_loss(planar([0]), label, weight, **settings)


def test_running_values():
    norms = torch.tensor([10.0, 20.0, 30.0, 500.0], dtype=torch.float64)
    assert ada_face_state(norms)["mean"] == pytest.approx(0.99 * 20 + 0.01 * 40)
    spread = norms.clamp(max=100).std().item()
    assert ada_face_state(norms, {"mean": 0.0, "std": 5.0}, momentum=0.5)["std"] == pytest.approx((5 + spread) / 2)
    assert ada_face_state(norms[:1], {"mean": 20.0, "std": 5.0}, momentum=0.5) == {"mean": 15.0, "std": 5.0}
    assert curricular_state(torch.tensor([0.5, 0.7]))["tau"] == pytest.approx(0.006)
    embeddings, labels, weight = batch()
    settings = {"margin": {"name": "AdaFace", "momentum": 0.2}, "negatives": {"name": "Curricular", "momentum": 0.3}}
    state = next_state(embeddings, labels, weight, state={"mean": 1.0, "std": 1.0, "tau": 0.5}, **settings)
    length = embeddings.norm(dim=1)
    target = dense_stats(embeddings, labels, weight, state=state, **settings)["target_cosine"]
    expected = [0.8 + 0.2 * length.mean(), 0.8 + 0.2 * length.std(), 0.35 + 0.3 * target.mean()]
    assert [state[name] for name in ("mean", "std", "tau")] == pytest.approx([value.item() for value in expected])
    assert next_state(embeddings, labels, weight, margin=MARGINS[7], negatives=NEGATIVES[2]) == {}


def test_mining_by_hand():
    losses = torch.tensor([1.0, 3.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert mined(losses, None).item() == 2.25
    assert mined(losses, {"name": "HardMining", "keep": 0.5}).item() == 3
    hardest = mined(losses, {"name": "HardMining", "keep": 0.25})
    assert torch.autograd.grad(hardest, losses)[0].tolist() == [0, 1, 0, 0]
    focal = sum((1 - math.exp(-loss)) ** 3 * loss for loss in losses.tolist()) / 4
    assert mined(losses, {"name": "FocalLoss", "gamma": 3.0}).item() == pytest.approx(focal)


def test_the_penalty_is_added_outside_mining():
    embeddings, labels, weight = batch()
    settings = {"negatives": NEGATIVES[2], "scale": 4.0, "mining": MININGS[3]}
    with_penalty = dense(embeddings, labels, weight, margin=MARGINS[7], **settings)
    without = dense(embeddings, labels, weight, margin=MARGINS[7] | {"lambda_g": 0.0}, **settings)
    assert torch.equal(with_penalty.losses, without.losses)
    penalty = mag_face_penalty(embeddings.norm(dim=1), l_a=0.7, u_a=3.0).mean()
    assert with_penalty.loss.item() == pytest.approx((without.loss + penalty).item(), rel=1e-14)
    assert without.loss.item() == pytest.approx(with_penalty.losses.sort().values[2:].mean().item(), rel=1e-14)


def test_a_weighted_negative_counts_as_many():
    # Class 3 alone, with the weight log 2, is worth itself and a twin of it. A row of class 3 has no weight on it.
    embeddings, _, weight = batch()
    labels, twice = torch.tensor([0, 1, 3, 2, 0]), torch.cat([weight, weight[3:4]])
    settings = {"margin": MARGINS[1], "negatives": {"name": "Curricular"}, "scale": 4.0, "state": STATE}
    log_weight = torch.zeros(13, dtype=torch.float64)
    log_weight[3] = math.log(2)
    got = dense(embeddings, labels, weight, log_weight=log_weight, **settings).losses
    plain, twin = (dense(embeddings, labels, each, **settings).losses for each in (weight, twice))
    assert torch.allclose(got, torch.where(labels == 3, plain, twin), rtol=1e-13)
