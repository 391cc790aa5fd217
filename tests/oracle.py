"""The head's loss as its definition says, on one process, in float64, with all logits formed.

Written from the formulas of the design alone. It never imports partial_fc: what the head and this file agree on, two
readings of the formulas agree on. Nothing here is made to be fast; autograd differentiates it.

Margins and negatives are given by name, as in a configuration file:
``{"name": "ArcFace", "m": 0.5, "easy_margin": True}``, ``{"name": "SupportVectors", "t": 1.2, "top_k": 3}``. A function
from the target cosines ``[B]`` to phi ``[B]`` serves as a margin, too.

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
        loss: mean over the batch, scalar.
        losses: loss of each sample [B].
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


def margin_values(cosine: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
    """phi(c) [B] and the boundary f [B], which is phi before easy_margin."""
    if callable(margin):
        value = margin(cosine)
        return value, value
    settings = dict(margin)
    name, easy = settings.pop("name"), settings.pop("easy_margin", False)
    value = {"NormFace": _norm_face, "CosFace": _cos_face, "ArcFace": _arc_face, "CombinedMargin": _combined_margin}[
        name
    ](cosine, **settings)
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


def dense(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    margin: Margin,
    negatives: Mapping[str, Any],
    scale: float = 64.0,
    sampled: Tensor | None = None,
) -> Dense:
    """The loss and all that leads to it.

    Args:
        embeddings: [B, d] float64, the global batch.
        labels: [B] int64 global class ids.
        weight: [C, d] float64, all classes.
        margin: by name with its parameters, or a function of the target cosines.
        negatives: ``Plain`` or ``SupportVectors`` by name with its parameters.
        scale: s.
        sampled: global ids of the classes that take part, sorted, the labels among them; None for all.
    """
    assert embeddings.dtype == weight.dtype == torch.float64, "the oracle is a float64 reference"
    assert labels.dtype == torch.int64 and 0 <= int(labels.min()) and int(labels.max()) < len(weight)
    classes = torch.arange(len(weight)) if sampled is None else sampled
    assert bool((classes.diff() > 0).all()), "sampled classes are sorted and distinct"
    is_target = classes[None, :] == labels[:, None]
    assert bool(is_target.any(1).all()), "every label is among the sampled classes"

    c = cosines(embeddings, weight[classes])
    target = c[is_target]
    phi, boundary = margin_values(target, margin)

    settings = dict(negatives)
    name = settings.pop("name")
    above = settings.pop("filter_above", None)
    filtered = torch.zeros_like(is_target) if above is None else (c > above) & ~is_target
    support = (c > boundary[:, None]) & ~is_target & ~filtered
    if name == "Plain":
        assert not settings, f"Plain has no {list(settings)}"
        h = c
    else:
        assert name == "SupportVectors", name
        h, support = _support_vectors(c, support, **settings)

    z = scale * torch.where(is_target, phi[:, None], h)
    z = z.masked_fill(filtered, -math.inf)
    losses = torch.logsumexp(z, dim=1) - z[is_target]
    return Dense(losses.mean(), losses, z, c, target, boundary, support, classes)


def _support_vectors(
    c: Tensor, support: Tensor, t: float = 1.2, mode: str = "adaptive", top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """h(c) and the mask that top_k leaves of I."""
    if top_k is not None:
        kept = torch.zeros_like(support)
        for row in range(len(c)):
            ranked = sorted((-c[row, j].item(), j) for j in support[row].nonzero().flatten().tolist())
            for _, j in ranked[:top_k]:  # equal cosines: the lowest column, so the lowest class id, comes first
                kept[row, j] = True
        support = kept
    raised = {"adaptive": t * c + t - 1, "fixed": c + t - 1}[mode]
    return torch.where(support, raised, c), support


def dense_loss(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    margin: Margin,
    negatives: Mapping[str, Any],
    scale: float = 64.0,
    sampled: Tensor | None = None,
) -> Tensor:
    """Mean loss over the batch, a differentiable scalar; arguments as in :func:`dense`."""
    return dense(embeddings, labels, weight, margin=margin, negatives=negatives, scale=scale, sampled=sampled).loss


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
