"""The sharded margin softmax as one autograd function, without intermediate graph: :mod:`forward`, :mod:`backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from partial_fc.backward import Backward
from partial_fc.forward import forward
from partial_fc.step import Saved, Step


class ShardedSoftmax(torch.autograd.Function):
    """Loss of the global batch from this rank's embeddings and its shard of the class centres."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, step: Step) -> Tensor:
        """The mean loss over the global batch, a scalar, the same on all ranks."""
        with torch.autocast(weight.device.type, enabled=False):
            loss, saved = forward(embeddings, weight, step, keep=step.trains and any(ctx.needs_input_grad))
        ctx.step = step
        ctx.embedding_dtype = embeddings.dtype
        ctx.save_for_backward(weight, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """W x the gradient of the embeddings ``[b, d]``, and the weight's (None where an updater took it)."""
        # Before the saved tensors are looked at: an updated weight would be autograd's error, which says less.
        updater = ctx.step.claim()
        weight, *saved = ctx.saved_tensors
        wants_embeddings, wants_weight, _ = ctx.needs_input_grad
        with torch.autocast(weight.device.type, enabled=False):
            backward = Backward(loss_gradient, weight, Saved(*saved), ctx.step, wants_embeddings, wants_weight, updater)
            embedding_gradient, weight_gradient = backward.run()
        if embedding_gradient is not None:
            embedding_gradient = embedding_gradient.to(ctx.embedding_dtype)
        return embedding_gradient, weight_gradient, None
