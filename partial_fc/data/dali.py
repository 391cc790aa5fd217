"""The stream with images decoded and augmented by NVIDIA DALI, on a GPU or on the CPU.

DALI gets batches of encoded images from this process and has no random state, order or file of its own: what it does is
a function of the position, as in the plain decoder. Legend: b this rank's part of a batch, S side in pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_fc.data.faults import Rows
from partial_fc.data.order import Order
from partial_fc.data.pipeline import define_pipeline, pipeline_inputs
from partial_fc.data.sources import Sources
from partial_fc.data.stream import PythonStream, SampleStream
from partial_fc.errors import ConfigError, DataError

logger = logging.getLogger("partial_fc.data")

# How often it may fail in a row though nothing is wrong with an image.
_MAX_UNEXPLAINED = 5
# What takes DALI's CPU operators several times as long as OpenCV (docs/performance.md).
_SLOW_IN_DALI = frozenset(("affine", "crop", "low_resolution", "colour_twist"))


def dali_available() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class _OtherSize(RuntimeError):
    """A batch has an image that isn't of the stream's size: the pipeline has to be one that resizes."""


class DaliStream(SampleStream):
    """The stream with images decoded by DALI; its arguments are those of :class:`SampleStream`.

    The images are those of :class:`PythonStream` up to the rounding of the decoder. Where DALI fails at a batch, the
    plain decoder finds the bad samples, and DALI is started anew with others in their places, or with the pixels of
    those that it alone can't decode: a failed pipeline looks alive, but loses batches.
    """

    _iterator: Any = None
    _given: dict[int, tuple[Rows, tuple[Any, ...]]]
    _pool: ThreadPoolExecutor | None = None
    _failure: BaseException | None = None
    # Until a batch with an image of another size comes.
    _resizes = False

    @property
    def decoder(self) -> str:
        """What decodes the images: ``dali``."""
        return "dali"

    @property
    def _device_id(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    @property
    def ready(self) -> int:
        """Batches that are read ahead of DALI's decoder, which doesn't tell how far it is itself."""
        return 0 if self._pool is None else sum(reading.done() for reading in self._reading.values())

    @property
    def room(self) -> int:
        """The most that :attr:`ready` can be."""
        return self._readers

    def _produce(self, position: int) -> tuple[Tensor, Rows]:
        failures = 0
        while True:
            try:
                if self._iterator is None:
                    self._start(position)
                images = next(self._iterator)[0]["images"]
                return images, self._given.pop(position)[0]
            except (RuntimeError, StopIteration) as error:
                # What the source raised comes back from DALI as an error of its own.
                failure, given = self._failure, [rows for rows, _ in self._given.values()]
                self.close()
                if isinstance(failure, _OtherSize):
                    self._resizes = True
                    continue
                if failure is not None:
                    raise failure from None
                failures += 1
                self._learn(given, position, failures, error)

    def _learn(self, given: list[Rows], position: int, failures: int, error: BaseException) -> None:
        """Find the samples that DALI failed at, so that it can be started anew without them.

        Raises:
            DataError: it fails again and again, and not at an image.
        """
        bad = [self._samples.find_bad(rows) for rows in given]
        if any(bad):
            return
        found = set()
        for rows in given:
            for row, sample in enumerate(rows.ids.tolist()):
                if not self._samples.distrusts(sample) and not _decodes(rows.encoded[row], self._device_id):
                    found.add(sample)
        self._samples.distrust(found)
        if found:
            logger.warning("DALI can't decode samples %s, the plain decoder can: it does", sorted(found)[:10])
            return
        logger.warning("DALI failed at position %d, though all images are good: %s", position, _first_line(error))
        if failures >= _MAX_UNEXPLAINED:
            raise DataError(
                f"DALI failed {failures} times in a row at position {position}, though the images there are good "
                f"({_first_line(error)}): set data.decoder=python"
            ) from error

    def close(self, *, wait: bool = True) -> None:
        """End the pipeline and drop what it decoded ahead. The next call of ``next_batch`` starts it again."""
        self._iterator = None
        self._failure = None
        self._given = {}
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
            self._pool = None

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
        # DALI reads without a copy: the arrays live until their images are there, or as long as the pipeline, whose
        # function holds them.
        given: dict[int, tuple[Rows, tuple[Any, ...]]] = {}
        self._given = given
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="read")
        self._reading: dict[int, Future[tuple[Rows, tuple[Any, ...]]]] = {}

        def source(info: Any) -> tuple[Any, ...]:
            at = position + info.iteration * self.batch_size
            try:
                given[at] = self._take(at)
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
            device_id=self._device_id,
            resize=self._resizes,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(
                f"the DALI pipeline can't be built on {self.device} ({_first_line(error)}): set data.decoder=python"
            ) from error
        self._iterator = plugin.DALIGenericIterator([pipeline], ["images"], auto_reset=False, prepare_first_batch=False)

    def _take(self, position: int) -> tuple[Rows, tuple[Any, ...]]:
        """The rows of the batch at ``position``, and what DALI gets of them; the readers go on with those behind it."""
        assert self._pool is not None
        for ahead in range(self._readers + 1):
            at = position + ahead * self.batch_size
            if at not in self._reading:
                self._reading[at] = self._pool.submit(self._read, at + self._rows, self._sample_ids(at))
        rows, inputs = self._reading.pop(position).result()
        if rows.resized and not self._resizes:
            raise _OtherSize
        return rows, inputs

    def _read(self, positions: np.ndarray, ids: np.ndarray) -> tuple[Rows, tuple[Any, ...]]:
        rows = self._samples.read(positions, ids)
        # DALI 2.4 decodes them, too, but where it can't make sense of a header in a batch of 32 or more, the process
        # dies of a segmentation fault. It never meets one: a JPEG's header is walked, and of others it gets pixels.
        self._samples.decode_foreign(rows)
        parameters = self._augmentation.parameters(self._seed, positions)
        # As one object with many pointers, made here: a list is walked in the main thread, at 2 us an image.
        backend: Any = importlib.import_module("nvidia.dali.backend")
        encoded = backend.TensorListCPU([backend.TensorCPU(image) for image in rows.encoded], contiguous=False)
        return rows, (encoded, *pipeline_inputs(self._augmentation, parameters, self.image_size))


def _decodes(encoded: Any, device_id: int | None) -> bool:
    """Whether DALI decodes this image alone, on a GPU or (None) on the CPU."""
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=device_id)
    def alone() -> Any:
        image = fn.external_source(source=lambda: [encoded], dtype=types.UINT8)
        return fn.decoders.image(image, device="cpu" if device_id is None else "mixed", output_type=types.RGB)

    pipeline = alone()
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    """The line of a DALI error that says most: the one after 'encountered:', else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [line for previous, line in zip(lines, lines[1:], strict=False) if previous == "encountered:"]
    return (after or lines or [type(error).__name__])[0]


def open_stream(kind: str, sources: Sources, order: Order, **options: Any) -> SampleStream:
    """Open a stream by the name of its decoder.

    ``'auto'`` is DALI where it's installed, else the plain decoder, with a warning. On the CPU it's the plain decoder
    also where an augmentation is on that takes DALI several times as long: affine, crop, low resolution or colours.

    Args:
        kind: ``'auto'``, ``'dali'`` or ``'python'``.
        sources: the data set.
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
    on_cpu = torch.device(options.get("device", "cpu")).type == "cpu"
    slow = sorted(_SLOW_IN_DALI & set(options["augmentation"].active)) if on_cpu else []
    if kind == "dali" or (kind == "auto" and installed and not slow):
        return DaliStream(sources, order, **options)
    if kind == "auto" and installed:
        logger.info("images are decoded in plain Python: on a CPU, DALI takes longer for %s", ", ".join(slow))
    return PythonStream(sources, order, **options)
