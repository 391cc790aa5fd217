"""Class centres out of images: the mean direction of a class's embeddings.

Qi et al., "Low-Shot Learning with Imprinted Weights" (CVPR 2018): the mean of the unit embeddings, made a unit again.
Legend: K classes, d embedding size, S side of the images in pixels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_fc.data import Progress, Sources, decode_image
from partial_fc.data.decode import normalise_into
from partial_fc.data.files import MachineError
from partial_fc.data.table import UNUSABLE
from partial_fc.errors import DataError, NonFiniteError

logger = logging.getLogger(__name__)

# Batches that are decoded ahead.
_AHEAD = 2
# Unusable images that are named one by one.
_NAMED = 5
# A mean of unit embeddings that is shorter than this has no direction.
_LEAST_MEAN = 1e-6


def imprint(
    backbone: nn.Module,
    sources: Sources,
    *,
    embedding_size: int,
    image_size: int,
    batch_size: int = 128,
    limit_per_class: int | None = None,
    threads: int = 2,
    max_image_pixels: int = 1 << 26,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Unit centres of all classes of a data set.

    Images that can't be used are left out, counted, and the first few named in the log.

    Args:
        backbone: float ``[n, 3, S, S]`` -> ``[n, d]``, on ``device``; is put into eval mode.
        sources: the images.
        embedding_size: d.
        image_size: S; images of another size are resized.
        batch_size: images in a forward.
        limit_per_class: the first so many samples of a class are looked at; None: all.
        threads: how many threads decode.
        max_image_pixels: images with more are left out.
        device: where the backbone is.
        autocast_dtype: bfloat16 or float16 for the forward; None: the backbone's own type.
        progress: called with the samples done and their total.

    Returns:
        float32 ``[K, d]`` on the CPU, rows of norm 1.

    Raises:
        DataError: a class has no usable image, its embeddings cancel out, or the machine can't read the files.
        NonFiniteError: an embedding has a NaN or an infinity.
    """
    backbone.eval()
    device = torch.device(device)
    sums, counts = torch.zeros(sources.num_classes, embedding_size), torch.zeros(sources.num_classes)
    unusable: list[str] = []
    order = _samples(sources, limit_per_class)

    def read(sample: int) -> np.ndarray | str:
        try:
            encoded = sources.encoded(np.array([sample]))[0]
            pixels = np.empty((3, image_size, image_size), dtype=np.float32)
            normalise_into(decode_image(encoded, image_size, max_pixels=max_image_pixels), pixels)
            return pixels
        except MachineError:
            raise
        except DataError as error:
            return f"{sources.locate(sample)}: {error}"

    with torch.inference_mode(), ThreadPoolExecutor(max(1, threads)) as pool:
        done = 0
        for samples, results in _ahead(pool, read, order, batch_size):
            unusable += [result for result in results if isinstance(result, str)]
            good = [row for row, result in enumerate(results) if not isinstance(result, str)]
            if good:
                pixels = torch.from_numpy(np.stack([results[row] for row in good])).to(device)
                labels = torch.from_numpy(sources.labels(samples[good]))
                sums.index_add_(0, labels, _embed(backbone, pixels, autocast_dtype))
                counts.index_add_(0, labels, torch.ones(len(good)))
            done += len(samples)
            if progress is not None:
                progress(done, len(order))
    _say_unusable(sources, unusable)
    return _directions(sources, sums, counts)


def _samples(sources: Sources, limit: int | None) -> np.ndarray:
    """Ids of the samples to look at, class by class."""
    labels = np.asarray(sources.all_labels())
    usable = np.flatnonzero(labels != UNUSABLE)
    order = usable[np.argsort(labels[usable], kind="stable")]
    if limit is not None and len(order):
        begins = np.searchsorted(labels[order], np.arange(sources.num_classes))
        order = order[np.arange(len(order)) - begins[labels[order]] < limit]
    return order


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], np.ndarray | str], order: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray | str]]]:
    """(ids, what ``read`` makes of them), batch by batch, while the next ones are read."""
    waiting: deque[tuple[np.ndarray, list[Future[np.ndarray | str]]]] = deque()
    for begin in range(0, len(order), batch_size):
        samples = order[begin : begin + batch_size]
        waiting.append((samples, [pool.submit(read, sample) for sample in samples.tolist()]))
        if len(waiting) > _AHEAD:
            samples, futures = waiting.popleft()
            yield samples, [future.result() for future in futures]
    for samples, futures in waiting:
        yield samples, [future.result() for future in futures]


def _embed(backbone: nn.Module, pixels: Tensor, autocast_dtype: torch.dtype | None) -> Tensor:
    """Unit embeddings ``[n, d]``, float32 on the CPU."""
    with torch.autocast(pixels.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        embeddings: Tensor = backbone(pixels)
    embeddings = embeddings.float().cpu()
    if not embeddings.isfinite().all():
        raise NonFiniteError("an embedding has a NaN or an infinity, expected a backbone that is trained: take another")
    return functional.normalize(embeddings)


def _say_unusable(sources: Sources, reasons: list[str]) -> None:
    if reasons:
        logger.warning("%s: %d images can't be used and are left out", sources.path, len(reasons))
        for reason in reasons[:_NAMED]:
            logger.warning("left out: %s", reason)


def _directions(sources: Sources, sums: Tensor, counts: Tensor) -> Tensor:
    empty = (counts == 0).nonzero()
    if len(empty):
        raise DataError(
            f"{sources.path}: {len(empty)} of {len(counts)} classes have no usable image, the first is class "
            f"{int(empty[0])}: add images, or leave the class out of the set"
        )
    means = sums / counts[:, None]
    lost = (torch.linalg.vector_norm(means, dim=1) < _LEAST_MEAN).nonzero()
    if len(lost):
        raise DataError(
            f"{sources.path}: the embeddings of class {int(lost[0])} cancel out, expected images that are alike: "
            "look at them with `partial-fc show`"
        )
    return functional.normalize(means)
