"""The stream with images decoded and augmented by NVIDIA DALI, on a GPU or on the CPU.

DALI gets batches of encoded images from this process and has no random state, order or file of its own: what it does is
a function of the position, as in the plain decoder. Legend: b this rank's part of a batch, S side in pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_fc.data.augment import Augmentation, pixel_matrices
from partial_fc.data.decode import normalise
from partial_fc.data.order import SampleOrder
from partial_fc.data.readers import RecordReader
from partial_fc.data.stream import PythonStream, Samples, SampleStream, logger
from partial_fc.errors import ConfigError, DataError

# Batches in a row that DALI fails at though the plain decoder finds nothing wrong: then it's not the images.
_MAX_UNEXPLAINED = 5


def dali_available() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def define_pipeline(
    source: Any,
    *,
    batch_size: int,
    image_size: int,
    augmentation: Augmentation,
    threads: int,
    prefetch: int,
    device_id: int | None,
) -> Any:
    """Define the DALI pipeline, without building it (which alone needs the device).

    Args:
        source: function of a DALI ``BatchInfo``, giving encoded images (uint8), flip flags (int32) and, where the
            augmentation is affine, maps in pixels (float32 ``[2, 3]``); b of each.
        batch_size: b.
        image_size: S.
        augmentation: decides whether there is an affine operation, and the level outside the image.
        threads: decoding threads on the CPU.
        prefetch: how many batches DALI runs ahead.
        device_id: the GPU; None: the CPU.

    Returns:
        A ``nvidia.dali.Pipeline`` with one output, float32 ``[b, 3, S, S]``.
    """
    # Not an import statement: DALI's own types would make the type check depend on whether it's installed.
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
    affine, fill = augmentation.affine, augmentation.fill
    inputs = 3 if affine else 2

    @dali.pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def image_pipeline() -> Any:
        given = fn.external_source(
            source=source,
            num_outputs=inputs,
            batch=True,
            batch_info=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT32, types.FLOAT][:inputs],
            ndim=[1, 0, 2][:inputs],
        )
        images = fn.decoders.image(given[0], device="cpu" if device_id is None else "mixed", output_type=types.RGB)
        shape = fn.peek_image_shape(given[0])
        if shape[0] != image_size or shape[1] != image_size:
            images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
        if affine:
            images = fn.warp_affine(images, matrix=given[2], fill_value=fill, interp_type=types.INTERP_LINEAR)
        return fn.crop_mirror_normalize(
            images, mirror=given[1], dtype=types.FLOAT, output_layout="CHW", mean=[127.5] * 3, std=[127.5] * 3
        )

    return image_pipeline()


class DaliStream(SampleStream):
    """The stream with images decoded by DALI; its arguments are those of :class:`SampleStream`.

    The images are those of :class:`PythonStream` up to the rounding of the decoder. A batch that DALI fails at comes
    from the plain decoder, which finds and replaces the bad samples, and DALI is started anew behind it: a failed
    pipeline looks alive, but loses batches.
    """

    _iterator: Any = None
    _failure: BaseException | None = None
    _unexplained = 0

    def _produce(self, position: int) -> tuple[Tensor, Samples]:
        try:
            if self._iterator is None:
                self._start(position)
            images = next(self._iterator)[0]["images"]
        except (RuntimeError, StopIteration) as error:
            # What the source raised comes back from DALI as an error of its own.
            failure = self._failure
            self.close()
            if failure is not None:
                raise failure from None
            return self._fall_back(position, error)
        self._unexplained = 0
        return images, self._given.pop(position)[0]

    def close(self) -> None:
        """End the pipeline and drop what it decoded ahead. The next call of ``next_batch`` starts it again."""
        self._iterator = None
        self._failure = None

    def _start(self, position: int) -> None:
        """Build the pipeline for the batches from ``position`` on."""
        try:
            plugin: Any = importlib.import_module("nvidia.dali.plugin.pytorch")
        except ImportError as error:
            raise ConfigError(
                f"NVIDIA DALI can't be imported ({error}): install nvidia-dali-cuda130 (or -cuda120), "
                "or set data.decoder=python"
            ) from error
        if self.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"DALI decodes on 'cpu' or 'cuda', not on '{self.device}': set data.decoder=python")
        device_id = None
        if self.device.type == "cuda":
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index

        # DALI reads without a copy: the arrays live until their images are there, or as long as the pipeline, whose
        # function holds them.
        given: dict[int, tuple[Samples, tuple[Any, ...]]] = {}
        self._given = given

        def source(info: Any) -> tuple[Any, ...]:
            at = position + info.iteration * self.batch_size
            try:
                given[at] = self._give(at)
            except BaseException as error:
                self._failure = error
                raise
            return given[at][1]

        pipeline = define_pipeline(
            source,
            batch_size=len(self._rows),
            image_size=self.image_size,
            augmentation=self._augmentation,
            threads=self._threads,
            prefetch=self._prefetch,
            device_id=device_id,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(
                f"the DALI pipeline can't be built on {self.device} ({_first_line(error)}): set data.decoder=python"
            ) from error
        self._iterator = plugin.DALIGenericIterator([pipeline], ["images"], auto_reset=False, prepare_first_batch=False)

    def _give(self, position: int) -> tuple[Samples, tuple[Any, ...]]:
        """Samples of the batch at ``position``, and what DALI gets of them; it asks ahead of the output."""
        samples = self._samples.read(self._sample_ids(position))
        parameters = self._parameters(position)
        flips = parameters[:, 0].astype(np.int32)
        if not self._augmentation.affine:
            return samples, (samples.encoded, flips)
        return samples, (samples.encoded, flips, pixel_matrices(parameters, self.image_size))

    def _fall_back(self, position: int, error: BaseException) -> tuple[Tensor, Samples]:
        """Decode the batch that DALI failed at with the plain decoder."""
        samples = self._samples.read(self._sample_ids(position))
        known = len(samples.bad)
        pixels = np.empty((len(samples.ids), self.image_size, self.image_size, 3), dtype=np.uint8)
        self._samples.decode(samples, self._augmentation, self._parameters(position), pixels)
        self._unexplained = 0 if len(samples.bad) > known else self._unexplained + 1
        if self._unexplained:
            logger.warning(
                "DALI failed at the batch at position %d, the plain decoder didn't: %s", position, _first_line(error)
            )
        if self._unexplained >= _MAX_UNEXPLAINED:
            raise DataError(
                f"DALI failed at {self._unexplained} batches in a row, the last at position {position}, though their "
                f"images are good ({_first_line(error)}): set data.decoder=python"
            ) from error
        return normalise(pixels, self.device), samples


def _first_line(error: BaseException) -> str:
    """The line of a DALI error that says most: the one after 'encountered:', else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [line for previous, line in zip(lines, lines[1:], strict=False) if previous == "encountered:"]
    return (after or lines or [type(error).__name__])[0]


def open_stream(kind: str, reader: RecordReader, order: SampleOrder, **options: Any) -> SampleStream:
    """Open a stream by the name of its decoder.

    ``'auto'`` is DALI where it's installed, else the plain decoder, with a warning. On the CPU it's the plain decoder
    as well where the augmentation is affine: DALI's warp takes 6 times as long as OpenCV's there.

    Args:
        kind: ``'auto'``, ``'dali'`` or ``'python'``.
        reader: the data set.
        order: which sample stands at which position.
        options: the other arguments of :class:`SampleStream`.

    Raises:
        ConfigError: another name, ``'dali'`` where DALI isn't installed, or what :class:`SampleStream` raises.
    """
    if kind not in ("auto", "dali", "python"):
        raise ConfigError(f"data.decoder must be 'auto', 'dali' or 'python', got {kind!r}")
    installed = dali_available()
    if kind == "dali" and not installed:
        raise ConfigError(
            "data.decoder is 'dali', but NVIDIA DALI isn't installed: install nvidia-dali-cuda130 (or -cuda120), "
            "or set data.decoder=python"
        )
    if kind == "auto" and not installed:
        logger.warning("NVIDIA DALI isn't installed: images are decoded in Python, which is slower")
    slow_warp = options["augmentation"].affine and torch.device(options.get("device", "cpu")).type == "cpu"
    if kind == "dali" or (kind == "auto" and installed and not slow_warp):
        return DaliStream(reader, order, **options)
    return PythonStream(reader, order, **options)
