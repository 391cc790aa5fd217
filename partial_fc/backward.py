"""The backward of the sharded margin softmax: the walk again, gradients and updates chunk by chunk, one collective.

Legend: W ranks, b rows of this rank, B rows of the global batch, d embedding size, P classes that this rank walks (all
its classes, or the sampled ones), p classes of a chunk, K candidates of ``top_k``. "Global" tensors are the same on
every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.chunks import Chunk, Walk
from partial_fc.kernels import choose_kernels
from partial_fc.step import RowUpdater, Saved, Step, Storage


class Backward:
    """The backward's walk over the local classes."""

    def __init__(
        self,
        loss_gradient: Tensor,
        weight: Tensor,
        saved: Saved,
        step: Step,
        wants_embeddings: bool,
        wants_weight: bool,
        updater: RowUpdater | None,
    ) -> None:
        self._weight, self._saved, self._step = weight, saved, step
        self._wants_embeddings, self._wants_weight, self._updater = wants_embeddings, wants_weight, updater
        self._compute_dtype, self._dtype = step.engine.dtypes(weight)
        batch = len(saved.unit_Bd)
        self._kernels = choose_kernels(step.engine.kernels, weight.device, self._dtype, step.walked * batch)
        # The loss's factor comes in at the end, so that half precision doesn't vanish.
        self._factor = loss_gradient.to(self._dtype) / batch
        gathered = step.engine.rows.of(step.token, step.walked)
        self._walk = Walk(weight, step.ids, batch, step.engine.chunk_size, gathered, filled=gathered is not None)
        # A GPU writes the gradient as the next products want it; a CPU multiplies in float32 anyway.
        gradient_dtype = self._compute_dtype if weight.is_cuda else self._dtype
        self._storage = Storage(self._walk, batch, gradient_dtype, weight.device)
        self._target_B = step.target_columns()
        self._emphasizes = step.loss.negatives.coefficients(step.loss.negatives_state) is not None
        self._row_factor_B = saved.row_weight_B * step.engine.scale

    def run(self) -> tuple[Tensor | None, Tensor | None]:
        """(W x the gradient of this rank's embeddings, the weight's gradient), each None where it isn't wanted."""
        step, saved, weight = self._step, self._saved, self._weight
        updater = self._updater
        gradient_Bd = torch.zeros_like(saved.unit_Bd, dtype=self._dtype)
        centres_gradient_Pd = None
        if self._wants_weight and updater is None:
            centres_gradient_Pd = weight.new_empty(step.walked, weight.shape[1])
        gate = None if saved.failed is None else ~saved.failed
        buffer = None
        if self._wants_weight and (updater is not None or weight.dtype != self._dtype):
            buffer = torch.empty(self._walk.longest, weight.shape[1], dtype=self._dtype, device=weight.device)
        scattering = None
        if self._wants_embeddings and len(self._walk) == 0:
            scattering = step.engine.group.scatter_embedding_gradient(gradient_Bd, step.sizes)
        for chunk in self._walk:
            gradient_PB, peak_P = self._gradient(chunk)
            if self._wants_embeddings:
                self._add_to_embeddings(gradient_Bd, gradient_PB, chunk)
                if chunk.number + 1 == len(self._walk):
                    # Under way while the last chunk's centres move.
                    scattering = step.engine.group.scatter_embedding_gradient(gradient_Bd, step.sizes)
            if self._wants_weight:
                place = None if centres_gradient_Pd is None else centres_gradient_Pd[chunk.begin : chunk.end]
                out = place if buffer is None else buffer[: chunk.end - chunk.begin]
                assert out is not None
                centre_gradient = self._centre_gradient(chunk, gradient_PB, peak_P, out)
                if updater is not None:
                    updater(chunk.rows, centre_gradient, gate, chunk.centres)
                elif place is not None and place.data_ptr() != centre_gradient.data_ptr():
                    # A GPU's products in half precision come in memory of their own.
                    place.copy_(centre_gradient)
        step.engine.kept.give_back(step.kept)
        # A second backward of a retained graph makes the products again.
        step.kept = []
        if centres_gradient_Pd is not None and step.ids is not None:
            centres_gradient_Pd = torch.sparse_coo_tensor(
                step.ids[None], centres_gradient_Pd, weight.shape, is_coalesced=True, check_invariants=False
            )
        if scattering is None:
            return None, centres_gradient_Pd
        return self._embedding_gradient(scattering.wait()), centres_gradient_Pd

    def _gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """B x the loss by the chunk's products ``[p, B]``, and the largest softmax weight of each class."""
        step, saved, kept = self._step, self._saved, self._step.kept
        place = slice(chunk.begin, chunk.end)
        product_PB = kept[chunk.number] if chunk.number < len(kept) else None
        if product_PB is None:
            product_PB = step.engine.multiply(
                chunk.centres, saved.unit_Bd.T, self._compute_dtype, self._storage.product(chunk)
            )
        gradient_QB = self._storage.with_scrap(len(product_PB))
        peak_Q = None
        if step.engine.filter_gradient is not None:
            peak_Q = saved.inverse_norm_P.new_empty(len(product_PB) + 1)
        self._kernels.gradient(
            product_PB,
            saved.inverse_norm_P[place],
            None if saved.offset_P is None else saved.offset_P[place],
            (self._target_B - chunk.begin).to(torch.int32),
            saved.boundary_B if self._emphasizes and saved.kept_index_BK is None else None,
            saved.log_normalizer_B,
            self._row_factor_B,
            saved.target_gradient_B,
            saved.numbers,
            self._storage.unless_there(product_PB),
            None if peak_Q is None else peak_Q[:-1],
        )
        if saved.kept_index_BK is not None and saved.kept_gradient_BK is not None:
            index_BK, classes = saved.kept_index_BK - chunk.begin, len(product_PB)
            inside_BK = (index_BK >= 0) & (index_BK < classes)
            row_BK = torch.where(inside_BK, index_BK, classes)
            inverse_BK = saved.inverse_norm_P[place][row_BK.clamp_max(classes - 1)]
            gradient_QB.scatter_(0, row_BK.T, (saved.kept_gradient_BK * inverse_BK).T.to(gradient_QB.dtype))
            if peak_Q is not None:
                # The kernel knows their cosines as those of ordinary negatives: they are never left out.
                peak_Q.index_fill_(0, row_BK.flatten(), 1.0)
        return gradient_QB[:-1], None if peak_Q is None else peak_Q[:-1]

    def _add_to_embeddings(self, gradient_Bd: Tensor, gradient_PB: Tensor, chunk: Chunk) -> None:
        if self._compute_dtype == self._dtype == chunk.centres.dtype and not self._step.engine.tf32:
            gradient_Bd.addmm_(gradient_PB.T, chunk.centres)
        else:
            gradient_Bd += self._step.engine.multiply(gradient_PB.T, chunk.centres, self._compute_dtype)

    def _centre_gradient(self, chunk: Chunk, gradient_PB: Tensor, peak_P: Tensor | None, out: Tensor) -> Tensor:
        """The loss by the chunk's centres ``[p, d]``."""
        saved, engine = self._saved, self._step.engine
        inverse_norm_P = saved.inverse_norm_P[chunk.begin : chunk.end]
        if peak_P is None:
            product_Pd = engine.multiply(gradient_PB, saved.unit_Bd, self._compute_dtype, out)
            self._kernels.project(product_Pd, chunk.centres, inverse_norm_P, self._factor, saved.failed)
            return product_Pd
        assert engine.filter_gradient is not None
        alive = (peak_P >= engine.filter_gradient).nonzero()[:, 0]
        out.zero_()
        if len(alive):
            product_Ad = engine.multiply(gradient_PB[alive], saved.unit_Bd, self._compute_dtype)
            self._kernels.project(product_Ad, chunk.centres[alive], inverse_norm_P[alive], self._factor, saved.failed)
            out.index_copy_(0, alive, product_Ad.to(out.dtype))
        return out

    def _embedding_gradient(self, gradient_bd: Tensor) -> Tensor:
        """From the loss by the unit rows to W x the loss by the rows."""
        saved, group = self._saved, self._step.engine.group
        along_b1 = (gradient_bd * saved.unit_bd).sum(1, keepdim=True)
        gradient_bd = (gradient_bd - saved.unit_bd * along_b1) / saved.norm_b[:, None]
        if saved.norm_gradient_B is not None:
            first = sum(self._step.sizes[: group.rank])
            own_b = saved.norm_gradient_B[first : first + len(gradient_bd)]
            gradient_bd = gradient_bd + saved.unit_bd * own_b[:, None]
        gradient_bd = gradient_bd * (self._factor * group.world_size)
        return gradient_bd if saved.failed is None else gradient_bd.masked_fill_(saved.failed, 0)
