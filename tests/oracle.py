"""The head's loss as its definition says, on one process, in float64, with all logits formed.

Written from the formulas of the design alone. It never imports partial_fc: what the head and this file agree on, two
readings of the formulas agree on. Nothing here is made to be fast; autograd differentiates it.

Margins and negatives are given by name, as in a configuration file:
``{"name": "ArcFace", "m": 0.5, "easy_margin": True}``, ``{"name": "SupportVectors", "t": 1.2, "top_k": 3}``. A function
from the target cosines ``[B]`` to phi ``[B]`` serves as a margin, too. Mining: ``{"name": "HardMining", "keep": 0.5}``.

Running values ("mean" and "std" of AdaFace, "tau" of Curricular) go in as numbers, as they stand after the update of
the step in question, and are constants to autograd; :func:`next_state` makes that update.

Legend: B batch, d embedding, C classes, N sampled classes (N = C without sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Margin = Mapping[str, Any] | Callable[[Tensor], Tensor]

NORM_FLOOR = 1e-12
SINE_FLOOR = 1e-8


@dataclass(frozen=True)
class Dense:
    """Everything that the definition names.

    Attributes:
        loss: what mining makes of the losses (their mean without it) and the mean penalty, scalar.
        losses: loss of each sample [B], without penalty.
        logits: z [B, N], -inf for a negative that is filtered.
        cosines: c [B, N].
        target_cosine: c_iy [B].
        boundary: f_i [B].
        support_mask: I after filter_above and top_k [B, N]; where there is no emphasis, I without top_k.
        classes: global ids of the N columns [N].
    """

    loss: Tensor
    losses: Tensor
    logits: Tensor
    cosines: Tensor
    target_cosine: Tensor
    boundary: Tensor
    support_mask: Tensor
    classes: Tensor


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms, which are floored."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)


def cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    """c [B, C], clamped to [-1, 1]; the clamp passes gradients."""
    raw = unit(embeddings) @ unit(weight).T
    return raw + (raw.clamp(-1, 1) - raw).detach()


def angle(cosine: Tensor) -> Tensor:
    """Arccos c, of which the derivative is -1 / max(sin theta, 1e-8): finite at c = 1 and c = -1."""
    fixed = cosine.detach().clamp(-1, 1)
    theta = torch.acos(fixed)
    return theta - (cosine - cosine.detach()) / torch.sin(theta).clamp_min(SINE_FLOOR)


def margin_values(
    cosine: Tensor,
    margin: Margin,
    *,
    norms: Tensor | None = None,
    state: Mapping[str, float] | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """phi(c) [B] and the boundary f [B], which is phi before easy_margin.

    Args:
        cosine: target cosines [B].
        margin: by name with its parameters, or a function of the target cosines.
        norms: a, lengths of the embeddings [B], for MagFace and AdaFace.
        state: "mean" and "std" of this step, for AdaFace.
        step: number of the step, for SphereFace.
    """
    if callable(margin):
        value = margin(cosine)
        return value, value
    settings = dict(margin)
    name, easy = settings.pop("name"), settings.pop("easy_margin", False)
    if name == "SphereFace":
        value = _sphere_face(cosine, step, **settings)
    elif name == "MagFace":
        assert norms is not None, "MagFace needs norms"
        settings.pop("lambda_g", None)
        value = _mag_face(cosine, norms, **settings)
    elif name == "AdaFace":
        assert norms is not None and state is not None, "AdaFace needs norms and state"
        settings.pop("momentum", None)
        value = _ada_face(cosine, norms, state["mean"], state["std"], **settings)
    else:
        simple = {
            "NormFace": _norm_face,
            "CosFace": _cos_face,
            "ArcFace": _arc_face,
            "CombinedMargin": _combined_margin,
        }
        value = simple[name](cosine, **settings)
    return torch.where(cosine > 0, value, cosine) if easy else value, value


def _norm_face(cosine: Tensor) -> Tensor:
    return cosine


def _cos_face(cosine: Tensor, m: float = 0.35) -> Tensor:
    return cosine - m


def _arc_face(cosine: Tensor, m: float = 0.5) -> Tensor:
    theta = angle(cosine)
    return torch.where(theta < math.pi - m, torch.cos(theta + m), cosine - m * math.sin(m))


def _combined_margin(cosine: Tensor, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0) -> Tensor:
    a = m1 * angle(cosine) + m2
    k = (a / math.pi).floor().detach()
    return torch.cos(math.pi * k) * torch.cos(a) - 2 * k - m3


def _sphere_face(
    cosine: Tensor,
    step: int,
    m: int = 4,
    lambda_min: float = 5.0,
    lambda_start: float = 1000.0,
    gamma: float = 0.12,
    power: float = 1.0,
) -> Tensor:
    """By the Chebyshev polynomial cos(m theta) = T_m(c), and k counted interval by interval: no angle is needed."""
    before, polynomial = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, polynomial = polynomial, 2 * cosine * polynomial - before
    k = sum((cosine.detach() <= math.cos(j * math.pi / m)).double() for j in range(1, m))
    psi = (-1.0) ** k * polynomial - 2 * k
    annealed = lambda_start / (1 + gamma * step) ** power
    share = 1 / (1 + max(annealed, lambda_min))
    return (1 - share) * cosine + share * psi


def _mag_face(
    cosine: Tensor,
    norms: Tensor,
    l_a: float = 10.0,
    u_a: float = 110.0,
    l_m: float = 0.45,
    u_m: float = 0.8,
) -> Tensor:
    share = (norms.clamp(l_a, u_a) - l_a) / (u_a - l_a)
    m = (1 - share) * l_m + share * u_m
    theta = angle(cosine)
    return torch.where(theta < math.pi - m, torch.cos(theta + m), cosine - m * torch.sin(m))


def mag_face_penalty(norms: Tensor, l_a: float = 10.0, u_a: float = 110.0, lambda_g: float = 35.0) -> Tensor:
    """lambda_g (a / u_a^2 + 1 / a) of each sample [B], a clamped to [l_a, u_a]."""
    a = norms.clamp(l_a, u_a)
    return lambda_g * (a / u_a**2 + 1 / a)


def _ada_face(cosine: Tensor, norms: Tensor, mean: float, std: float, m: float = 0.4, h: float = 0.333) -> Tensor:
    a = norms.detach().clamp(0.001, 100)
    g = torch.clamp(h * (a - mean) / (std + 0.001), -1, 1)
    return torch.cos(torch.clamp(angle(cosine) - m * g, 0, math.pi)) - m * (1 + g)


def ada_face_state(norms: Tensor, state: Mapping[str, float] | None = None, momentum: float = 0.01) -> dict[str, float]:
    """AdaFace's "mean" and "std" after a batch of norms [B]; before the first: 20 and 100."""
    old = {"mean": 20.0, "std": 100.0} | dict(state or {})
    values = [min(max(norm, 0.001), 100.0) for norm in norms.tolist()]
    mean = sum(values) / len(values)
    std = old["std"]
    if len(values) > 1:
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {
        "mean": old["mean"] + momentum * (mean - old["mean"]),
        "std": old["std"] + momentum * (std - old["std"]),
    }


def curricular_state(
    target_cosine: Tensor, state: Mapping[str, float] | None = None, momentum: float = 0.01
) -> dict[str, float]:
    """Curricular's "tau" after a batch of target cosines [B]; before the first: 0."""
    old = (state or {}).get("tau", 0.0)
    return {"tau": old + momentum * (math.fsum(target_cosine.tolist()) / len(target_cosine) - old)}


def next_state(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    margin: Margin,
    negatives: Mapping[str, Any],
    state: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The running values that a step on this batch uses, from those before it (None: before the first step)."""
    new: dict[str, float] = {}
    with torch.no_grad():
        if not callable(margin) and margin["name"] == "AdaFace":
            new |= ada_face_state(embeddings.norm(dim=1), state, margin.get("momentum", 0.01))
        if negatives["name"] == "Curricular":
            target = cosines(embeddings, weight).gather(1, labels[:, None])[:, 0]
            new |= curricular_state(target, state, negatives.get("momentum", 0.01))
    return new


def mined(losses: Tensor, mining: Mapping[str, Any] | None) -> Tensor:
    """The loss of the batch: the mean of the losses [B], or what ``FocalLoss`` or ``HardMining`` makes of them."""
    if mining is None:
        return losses.mean()
    settings = dict(mining)
    return {"FocalLoss": _focal_loss, "HardMining": _hard_mining}[settings.pop("name")](losses, **settings)


def _focal_loss(losses: Tensor, gamma: float = 2.0) -> Tensor:
    p = torch.exp(-losses)
    return torch.stack([(1 - p[i]) ** gamma * losses[i] for i in range(len(losses))]).sum() / len(losses)


def _hard_mining(losses: Tensor, keep: float = 0.9) -> Tensor:
    """The count is the smallest k with k >= keep B, up to rounding; rows are ranked by (-loss, row)."""
    count = next(k for k in range(1, len(losses) + 1) if k >= keep * len(losses) - 1e-9)
    ranked = sorted((-loss, row) for row, loss in enumerate(losses.tolist()))
    return sum(losses[row] for _, row in ranked[:count]) / count


def dense(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    margin: Margin,
    negatives: Mapping[str, Any],
    scale: float = 64.0,
    sampled: Tensor | None = None,
    mining: Mapping[str, Any] | None = None,
    state: Mapping[str, float] | None = None,
    step: int = 0,
    log_weight: Tensor | None = None,
) -> Dense:
    """The loss and all that leads to it.

    Args:
        embeddings: [B, d] float64, the global batch.
        labels: [B] int64 global class ids.
        weight: [C, d] float64, all classes.
        margin: by name with its parameters, or a function of the target cosines.
        negatives: ``Plain``, ``SupportVectors`` or ``Curricular`` by name with its parameters.
        scale: s.
        sampled: global ids of the classes that take part, sorted, the labels among them; None for all.
        mining: ``FocalLoss`` or ``HardMining`` by name with its parameters; None for the mean.
        state: running values that this step uses (after its update), where margin or negatives have any.
        step: number of the step, for SphereFace.
        log_weight: [N], added to the logits of the N columns, except to a row's own target: log(C'/n') of the
            sampling correction. None: 0.
    """
    assert embeddings.dtype == weight.dtype == torch.float64, "the oracle is a float64 reference"
    assert labels.dtype == torch.int64 and 0 <= int(labels.min()) and int(labels.max()) < len(weight)
    classes = torch.arange(len(weight)) if sampled is None else sampled
    assert bool((classes.diff() > 0).all()), "sampled classes are sorted and distinct"
    is_target = classes[None, :] == labels[:, None]
    assert bool(is_target.any(1).all()), "every label is among the sampled classes"

    c = cosines(embeddings, weight[classes])
    target = c[is_target]
    norms = embeddings.norm(dim=1)
    phi, boundary = margin_values(target, margin, norms=norms, state=state, step=step)

    settings = dict(negatives)
    name = settings.pop("name")
    above = settings.pop("filter_above", None)
    filtered = torch.zeros_like(is_target) if above is None else (c > above) & ~is_target
    support = (c > boundary[:, None]) & ~is_target & ~filtered
    if name == "Plain":
        assert not settings, f"Plain has no {list(settings)}"
        h = c
    else:
        support = _hardest(c, support, settings.pop("top_k", None))
        h = torch.where(support, _raised(c, name, state or {}, **settings), c)

    z = scale * torch.where(is_target, phi[:, None], h)
    if log_weight is not None:
        z = z + torch.where(is_target, 0, log_weight)
    z = z.masked_fill(filtered, -math.inf)
    losses = torch.logsumexp(z, dim=1) - z[is_target]
    loss = mined(losses, mining)
    if not callable(margin) and margin["name"] == "MagFace":
        bounds = {key: value for key, value in margin.items() if key in ("l_a", "u_a", "lambda_g")}
        loss = loss + mag_face_penalty(norms, **bounds).mean()
    return Dense(loss, losses, z, c, target, boundary, support, classes)


def _hardest(c: Tensor, support: Tensor, top_k: int | None) -> Tensor:
    """The mask that top_k leaves of I."""
    if top_k is None:
        return support
    kept = torch.zeros_like(support)
    for row in range(len(c)):
        ranked = sorted((-c[row, j].item(), j) for j in support[row].nonzero().flatten().tolist())
        for _, j in ranked[:top_k]:  # equal cosines: the lowest column, so the lowest class id, comes first
            kept[row, j] = True
    return kept


def _raised(c: Tensor, name: str, state: Mapping[str, float], **settings: Any) -> Tensor:
    """h(c) of a support vector."""
    if name == "Curricular":
        assert set(settings) <= {"momentum"}, f"Curricular has no {list(settings)}"
        assert "tau" in state, "Curricular needs state"
        return c * (state["tau"] + c)
    assert name == "SupportVectors" and set(settings) <= {"t", "mode"}, (name, settings)
    t = settings.get("t", 1.2)
    return {"adaptive": t * c + t - 1, "fixed": c + t - 1}[settings.get("mode", "adaptive")]


def dense_loss(
    embeddings: Tensor, labels: Tensor, weight: Tensor, *, margin: Margin, negatives: Mapping[str, Any], **settings: Any
) -> Tensor:
    """The loss of the batch, a differentiable scalar; arguments as in :func:`dense`."""
    return dense(embeddings, labels, weight, margin=margin, negatives=negatives, **settings).loss


def dense_gradients(
    embeddings: Tensor, labels: Tensor, weight: Tensor, *, world_size: int = 1, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ``embeddings.grad`` [B, d] and ``weight.grad`` [C, d] as a head on ``world_size`` ranks leaves them.

    The gradient of the embeddings is ``world_size`` times that of the mean loss (DDP then takes the mean over ranks);
    that of the weight is unscaled, and zero for classes that aren't sampled. The arguments are left as they are.
    """
    embeddings = embeddings.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    loss = dense_loss(embeddings, labels, weight, **settings)
    by_embeddings, by_weight = torch.autograd.grad(loss, [embeddings, weight])
    return loss.detach(), world_size * by_embeddings, by_weight


def dense_stats(
    embeddings: Tensor, labels: Tensor, weight: Tensor, *, margin: Margin, negatives: Mapping[str, Any], **settings: Any
) -> dict[str, Tensor]:
    """``support_vectors`` [B] int64, how many a sample has (after top_k), and ``target_cosine`` [B]."""
    with torch.no_grad():
        result = dense(embeddings, labels, weight, margin=margin, negatives=negatives, **settings)
    return {"support_vectors": result.support_mask.sum(1), "target_cosine": result.target_cosine}


def topk(embeddings: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k classes of largest cosine of each embedding: values [B, k], falling, and classes [B, k].

    Ties by the lowest class id.
    """
    c = cosines(embeddings.double(), weight.double())
    ranked = [sorted(range(len(weight)), key=lambda j: (-row[j].item(), j))[:k] for row in c]
    classes = torch.tensor(ranked, dtype=torch.int64).reshape(len(c), -1)
    return c.gather(1, classes), classes
