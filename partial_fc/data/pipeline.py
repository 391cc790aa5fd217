"""The definition of the DALI pipeline: decoding, augmentation and normalisation, on a GPU or on the CPU.

One definition serves both. All operators get their parameters from the source, none has a random state of its own; on
the GPU the parameters stay on the host, where operators read them. What may not happen isn't in the pipeline, and an
operator sees the samples it happens to: conditionals split a batch and merge it again, which costs 1 to 3 us an image,
where the operators take 10 to 600. Legend: b this rank's part of a batch, S side in pixels, K columns of the
parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from partial_fc.data.augment import Augmentation, Column, blur_kernel, first_pixel, pixel_matrices, pixels


def pipeline_inputs(augmentation: Augmentation, parameters: np.ndarray, image_size: int) -> tuple[np.ndarray, ...]:
    """What the pipeline's source hands over besides the encoded images.

    Args:
        augmentation: of the pipeline.
        parameters: float32 ``[n, K]``, of :meth:`Augmentation.parameters`.
        image_size: S.

    Returns:
        Arrays of n rows, as few as the augmentation needs; for flips alone it's one, int32 ``[n]``.
    """
    return tuple(np.ascontiguousarray(array) for array in _inputs(augmentation, parameters, image_size))


def _inputs(augmentation: Augmentation, parameters: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """The arrays in the order in which the pipeline takes them: flips, then as in :attr:`Augmentation.active`.

    A zero says that an augmentation isn't applied: the height of a crop, the side of a low resolution, the middle of a
    kernel, a quality. Of crops and cutouts come (top, left, height, width).
    """
    active = set(augmentation.active)
    yield parameters[:, Column.FLIP].astype(np.int32)
    if "affine" in active:
        yield pixel_matrices(parameters, side)
    if "crop" in active:
        width, height, x, y = parameters[:, Column.CROP].T.astype(np.float64)
        width, height = pixels(width, side), pixels(height, side)
        top, left = first_pixel(y, height, side), first_pixel(x, width, side)
        yield np.stack([top, left, height, width], axis=1).astype(np.int32)
    if "low_resolution" in active:
        yield pixels(parameters[:, Column.LOW_RESOLUTION].astype(np.float64), side).astype(np.float32)
    if "colour_twist" in active:
        yield parameters[:, Column.COLOUR.start].astype(np.int32)
        yield parameters[:, Column.COLOUR][:, 1:].reshape(-1, 3, 4)
    if "grayscale" in active:
        yield parameters[:, Column.GRAYSCALE].astype(np.int32)
    if "blur" in active:
        sigma = parameters[:, Column.BLUR].astype(np.float64) * side
        yield blur_kernel(sigma, augmentation.blur_radius(side))[:, None]
    if "jpeg" in active:
        yield parameters[:, Column.JPEG].astype(np.int32)
    if "cutout" in active:
        share, x, y = parameters[:, Column.CUTOUT].T.astype(np.float64)
        square = pixels(share, side)
        top, left = first_pixel(y, square, side), first_pixel(x, square, side)
        yield np.stack([top, left, square, square], axis=1).astype(np.float32)


def define_pipeline(
    source: Any,
    *,
    batch_size: int,
    image_size: int,
    augmentation: Augmentation,
    threads: int,
    prefetch: int,
    device_id: int | None,
    resize: bool = True,
) -> Any:
    """Define the DALI pipeline, without building it (which alone needs the device).

    Args:
        source: function of a DALI ``BatchInfo``, giving b encoded images (uint8), and behind them the arrays of
            :func:`pipeline_inputs`.
        batch_size: b.
        image_size: S.
        augmentation: what may happen to the images.
        threads: decoding threads on the CPU.
        prefetch: how many batches DALI runs ahead.
        device_id: the GPU; None: the CPU.
        resize: whether images of another size are resized. To ask each for its size takes a twentieth of the time of
            its decoding; without, they must all be ``S x S``.

    Returns:
        A ``nvidia.dali.Pipeline`` with one output, float32 ``[b, 3, S, S]``, RGB, (level - 127.5) / 127.5.
    """
    # Not an import statement: DALI's own types would make the type check depend on whether it's installed.
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
    # Of no rows, for their types and dimensions.
    inputs = pipeline_inputs(augmentation, augmentation.parameters(0, np.arange(0)), image_size)
    kinds = {np.dtype(np.int32): types.INT32, np.dtype(np.float32): types.FLOAT}

    @dali.pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def image_pipeline() -> Any:
        encoded, flips, *others = fn.external_source(
            source=source,
            num_outputs=1 + len(inputs),
            batch=True,
            batch_info=True,
            no_copy=True,
            dtype=[types.UINT8] + [kinds[array.dtype] for array in inputs],
            ndim=[1] + [array.ndim - 1 for array in inputs],
        )
        images = _decoded(fn, types, encoded, image_size, on_gpu=device_id is not None)
        if resize:
            images = _resized(fn, types, images, encoded, image_size)
        given = iter(others)
        images = _moved(fn, types, images, augmentation, given, image_size)
        images = _degraded(fn, types, images, augmentation, given, image_size)
        return fn.crop_mirror_normalize(
            images, mirror=flips, dtype=types.FLOAT, output_layout="CHW", mean=[127.5] * 3, std=[127.5] * 3
        )

    return image_pipeline()


# DALI turns the functions below into parts of the pipeline: an `if` on what the source gave applies to each sample by
# itself, one on the augmentation decides about the pipeline.


def _decoded(fn: Any, types: Any, encoded: Any, side: int, on_gpu: bool) -> Any:
    """Decode."""
    if on_gpu:
        # The chroma is interpolated as on the CPU; the hints are for the hardware's decoder.
        return fn.decoders.image(
            encoded,
            device="mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            preallocate_width_hint=side,
            preallocate_height_hint=side,
        )
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


def _resized(fn: Any, types: Any, images: Any, encoded: Any, side: int) -> Any:
    """Resize images of another size, by a filter that is bilinear and antialiased."""
    shape = fn.peek_image_shape(encoded)
    if (shape[0] != side) | (shape[1] != side):
        images = fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
    return images


def _moved(fn: Any, types: Any, images: Any, augmentation: Augmentation, given: Iterator[Any], side: int) -> Any:
    """Apply the affine map, the crop and the low resolution."""
    if augmentation.affine:
        matrix = next(given)
        images = fn.warp_affine(images, matrix=matrix, fill_value=augmentation.fill, interp_type=types.INTERP_LINEAR)
    if augmentation.crop > 0:
        box = next(given)
        if box[2] > 0:
            # Not a resize with a region of interest: its filter sees the pixels around the region.
            images = fn.slice(images, start=box[:2], shape=box[2:], axes=[0, 1])
            images = fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR)
    if augmentation.low_resolution > 0:
        small = next(given)
        if small > 0:
            images = fn.resize(images, resize_x=small, resize_y=small, interp_type=types.INTERP_LINEAR, antialias=True)
            images = fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR)
    return images


def _degraded(fn: Any, types: Any, images: Any, augmentation: Augmentation, given: Iterator[Any], side: int) -> Any:
    """Change the colours, blur, compress, cut out."""
    if augmentation.colour_twist > 0:
        twisted, colours = next(given), next(given)
        if twisted > 0:
            images = fn.coord_transform(images, MT=colours, dtype=types.UINT8)
    if augmentation.grayscale > 0:
        grey = next(given)
        if grey > 0:
            images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
            images = fn.color_space_conversion(images, image_type=types.GRAY, output_type=types.RGB)
    if augmentation.blur > 0:
        row = next(given)
        if row[0, augmentation.blur_radius(side)] > 0:
            # A sixth of the time of gaussian_blur on the CPU. Older releases have it among the experiments.
            convolve = getattr(fn, "filter", None) or fn.experimental.filter
            images = convolve(convolve(images, row), fn.transpose(row))
    if augmentation.jpeg > 0:
        quality = next(given)
        if quality > 0:
            images = fn.jpeg_compression_distortion(images, quality=quality)
    if augmentation.cutout > 0:
        square = next(given)
        images = fn.erase(images, anchor=square[:2], shape=square[2:], axis_names="HW", fill_value=augmentation.fill)
    return images
