"""The conventional algorithm of a margin softmax over many classes, as widely used trainers write it in eager PyTorch.

It is the baseline of ``head.py``: dense logits ``[B, P]`` through autograd, a softmax of its own (the one that shards
would merge), and a dense update. Nothing here is slowed down; where eager PyTorch offers a faster way to do the same
(elementwise work in place, ``torch.optim.SGD(fused=True)``), it is taken.

Of the two variants of class sampling in use, this is the second: after the backward the gradient of the sampled centres
is scattered into a dense ``[C, d]`` gradient, and ``torch.optim.SGD`` runs over all classes. So momentum and decay move
every class each step although a fraction is sampled, and the state is three times the weight (design, section 8,
item 2). It is the one that trainers use now, since any optimizer works with it. (The first variant copies the sampled
rows of weight and momentum out and in again, and needs an optimizer of its own.) The dense gradient is one buffer that
stays, which is faster than the new one that autograd's ``index_select`` would make each step.

Legend: B batch, d embedding, C classes, P sampled classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy by an explicit softmax; the logits' memory becomes the probabilities, then the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[B, P]`` (overwritten) and labels ``[B]`` to a scalar."""
        logits = logits.detach()
        logits.sub_(logits.amax(1, keepdim=True))
        target = logits.gather(1, labels[:, None])
        total = logits.exp_().sum(1, keepdim=True)
        logits.div_(total)
        ctx.probabilities, ctx.labels = logits, labels
        return (total.log() - target).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(p - 1 at the label) / B."""
        logits: Tensor = ctx.probabilities
        ctx.probabilities = None
        logits[torch.arange(len(logits), device=logits.device), ctx.labels] -= 1
        return logits.mul_(gradients[0] / len(logits)), None


class ConventionalHead(nn.Module):
    """CosFace, with or without adaptive support-vector emphasis, over dense logits.

    Args:
        embedding_size: d.
        num_classes: C.
        sample_rate: share of the classes that a step uses, in (0, 1].
        margin: m of CosFace: phi(c) = c - m.
        emphasis: t of SV-Softmax (arXiv 1812.11317): a negative c above phi becomes t c + t - 1; None: off.
        scale: s, the factor of all cosines.
        compute_dtype: the product runs under autocast to it; None: as it is.
        device: of the centres.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        sample_rate: float = 1.0,
        margin: float = 0.35,
        emphasis: float | None = 1.2,
        scale: float = 64.0,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.sample_rate = num_classes, sample_rate
        self.margin, self.emphasis, self.scale, self.compute_dtype = margin, emphasis, scale, compute_dtype
        if weight is None:
            weight = torch.empty(num_classes, embedding_size, device=device).normal_(0, 0.01)
        self.weight = nn.Parameter(weight)
        self._activated: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def sample(self, labels: Tensor) -> Tensor:
        """Sorted class ids ``[P]``: the batch's positives, and the largest of C random numbers."""
        positives = labels.unique()
        scores = torch.rand(self.num_classes, device=labels.device)
        scores[positives] = 2.0
        count = max(round(self.sample_rate * self.num_classes), len(positives))
        return scores.topk(count).indices.sort().values

    def forward(self, embeddings: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Mean loss of the batch.

        Args:
            embeddings: ``[B, d]``.
            labels: ``[B]`` int64 class ids.
            ids: ``[P]`` sorted class ids to use instead of a sample.
        """
        centres: Tensor = self.weight
        if ids is None and self.sample_rate < 1:
            ids = self.sample(labels)
        if ids is not None:
            centres = self.weight.detach().index_select(0, ids).requires_grad_()
            labels = torch.searchsorted(ids, labels)
            self._activated = ids, centres
        with torch.autocast(embeddings.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            cosine = F.linear(F.normalize(embeddings), F.normalize(centres))
        if self.compute_dtype is not None:
            cosine = cosine.float()
        loss: Tensor = SoftmaxCrossEntropy.apply(self.logits(cosine.clamp(-1, 1), labels), labels)
        return loss

    def logits(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """Margin, emphasis and scale on cosines ``[B, P]``."""
        rows = torch.arange(len(labels), device=labels.device)
        final = cosine[rows, labels] - self.margin
        if self.emphasis is None:
            return cosine.index_put((rows, labels), final).mul_(self.scale)
        hard = cosine.detach() > final.detach()[:, None]
        raised = (cosine * self.emphasis).add_(self.emphasis - 1)
        return torch.where(hard, raised, cosine).index_put_((rows, labels), final).mul_(self.scale)

    @torch.no_grad()
    def scatter_gradient(self) -> None:
        """Put the sampled centres' gradient into the dense gradient ``[C, d]``."""
        if self._activated is None:
            return
        (ids, centres), self._activated = self._activated, None
        assert centres.grad is not None
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        else:
            self.weight.grad.zero_()
        self.weight.grad.index_copy_(0, ids, centres.grad)


def make_optimizer(head: ConventionalHead, lr: float, *, fused: bool = True) -> torch.optim.SGD:
    """The dense SGD: momentum 0.9, decay 5e-4.

    Trainers take PyTorch's default (``fused=False``), which makes one more ``[C, d]`` copy for the decay and was five
    times slower here; the fused one computes the same.
    """
    return torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=fused or None)


def train_step(head: ConventionalHead, optimizer: torch.optim.SGD, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward, dense update. ``embeddings.grad`` is left for the backbone."""
    if head.sample_rate == 1:
        # The sampled step keeps its dense buffer instead.
        optimizer.zero_grad(set_to_none=True)
    loss = head(embeddings, labels)
    loss.backward()
    head.scatter_gradient()
    optimizer.step()
    return loss.detach()
