"""The sections of the configuration that tell of the training images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from partial_fc.config_reader import Contradiction
from partial_fc.config_types import Count, PositiveShare, Section, Share


class SourceConfig(Section):
    """One set of images and its files."""

    path: Annotated[str, Field(min_length=1)]
    """Folder of the data set or its .rec file, or shards: a file, shard-*.tar, shard-{000000..000099}.tar."""
    format: Literal["auto", "recordio", "folder", "webdataset", "tfrecord"] = "auto"
    """Format of the files; auto: told from their names."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; null: as many as the data set has."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """How often the set's samples come in a pass, at least one of them; 0.5: each in every other one."""
    image_key: str | None = None
    """Feature of a TFRecord that holds the image; null: one of the usual names."""
    label_key: str | None = None
    """Feature of a TFRecord that holds the class; null: one of the usual names."""


class DataConfig(SourceConfig):
    """Where the training images are, in which order they come, and how they are read."""

    more: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Further sets whose samples are added, each with the keys of a source."""
    merge_classes: bool = False
    """Whether the same class id in two sets is the same class; false: their classes are told apart."""
    cache: str | None = None
    """Folder for the tables of where the images are; null: .partial_fc beside the data."""
    order: Literal["shuffled", "balanced", "identities"] = "shuffled"
    """Order of the samples: each once a pass, shuffled; classes more evenly; or images_per_identity in a row."""
    balance: Share = 1.0
    """With order balanced: 1 draws each class equally often, 0 each sample; a class of n has n^(1 - balance) turns."""
    images_per_identity: Count = 4
    """With order identities: images of a class in a row; a batch holds batch_size / images_per_identity identities."""
    image_size: Annotated[int, Field(ge=16, multiple_of=16)] = 112
    """Side of the square images, in pixels; 112 is what the published backbones and test sets use."""
    decoder: Literal["auto", "dali", "python"] = "auto"
    """What decodes the images; auto: DALI where it is installed, else plain Python."""
    threads: Count = 2
    """Decoding threads of each rank."""
    readers: Count = 2
    """Threads of each rank that read encoded images ahead of DALI."""
    prefetch: Count = 2
    """Batches that each rank decodes ahead."""
    max_image_pixels: Count = 1 << 26
    """Images with more pixels are not decoded but replaced, as undecodable ones are."""
    max_bad_share: Share = 0.01
    """Share of a rank's samples (after its first 1,000) that may be unusable and replaced before the run stops."""


class AugmentConfig(Section):
    """Random changes of a training image, each a function of (seed, position)."""

    flip: Share = 0.5
    """Probability of a horizontal flip."""
    rotate: Annotated[float, Field(ge=0, le=math.pi)] = 0.0
    """Largest angle of rotation, in radians."""
    scale: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """Largest relative change of size: the size is multiplied by 1 + u, u uniform in [-scale, scale]."""
    shift: Share = 0.0
    """Largest shift along each axis, as a fraction of the image's side."""
    fill: Annotated[int, Field(ge=0, le=255)] = 0
    """Level of the pixels from outside the image and of cutouts, 0 (black) to 255 (white)."""
    crop: Share = 0.0
    """Probability of a random resized crop; AdaFace has 0.2, but leaves the crop in its place and size, on black."""
    crop_area: PositiveShare = 0.2
    """Smallest share of the area that a crop keeps."""
    crop_aspect: Annotated[float, Field(ge=1, le=10)] = 4 / 3
    """Largest ratio of a crop's longer side to its shorter one."""
    low_resolution: Share = 0.0
    """Probability that the image is made smaller and larger again; AdaFace has 0.2."""
    low_resolution_side: PositiveShare = 0.2
    """Smallest share of the side that it's made smaller to."""
    colour_twist: Share = 0.0
    """Probability of changed colours; AdaFace has 0.2."""
    colour_strength: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """Largest relative change of brightness, contrast and saturation."""
    colour_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the hue; 1 is a full turn."""
    grayscale: Share = 0.0
    """Probability that the colours go."""
    blur: Share = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Annotated[float, Field(ge=0.01, le=20)] = 2.0
    """Largest sigma of a blur, in pixels of an image of side 112."""
    jpeg: Share = 0.0
    """Probability of a JPEG compression."""
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 30
    """Lowest quality of a compression; the highest is 95."""
    cutout: Share = 0.0
    """Probability that a square is filled."""
    cutout_side: PositiveShare = 0.5
    """Largest side of that square, as a share of the image's."""


def data_contradictions(data: DataConfig, rows: int) -> Iterator[Contradiction]:
    """What no single value shows; ``rows`` samples go through the network at once."""
    places = ["data", *(f"data.more[{place}]" for place in range(len(data.more)))]
    for place, source in zip(places, (data, *data.more), strict=True):
        if source.weight != 1 and data.order != "shuffled":
            text = f"got {source.weight:g}, expected 1 with data.order={data.order} (weights are for order shuffled)"
            yield Contradiction((f"{place}.weight", "data.order"), text)
    if data.balance != 1 and data.order != "balanced":
        text = f"got {data.balance:g}, expected 1 with data.order={data.order} (only balanced has a balance)"
        yield Contradiction(("data.balance", "data.order"), text)
    if data.images_per_identity != 4 and data.order != "identities":
        text = f"got {data.images_per_identity}, expected 4 with data.order={data.order} (only identities needs it)"
        yield Contradiction(("data.images_per_identity", "data.order"), text)
    if data.order == "identities" and rows % data.images_per_identity:
        text = (
            f"got {data.images_per_identity}, expected a divisor of the {rows} samples that go through the network "
            "at once (train.batch_size / train.accumulate)"
        )
        yield Contradiction(("data.images_per_identity", "train.batch_size"), text)
    if data.merge_classes and not data.more:
        yield Contradiction(("data.merge_classes", "data.more"), "got true, expected false without data.more")
