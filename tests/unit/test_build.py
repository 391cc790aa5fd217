from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from partial_fc.build import build_augmentation, build_order, build_sources
from partial_fc.config import Config, data_config
from partial_fc.config_data import AugmentConfig
from partial_fc.data import BalancedOrder, ClassIndex, IdentityOrder, Order, SampleOrder, Sources, WeightedOrder
from partial_fc.errors import ConfigError
from tests import records

# Of two sets: 3 and 2 classes, sorted.
LABELS = ([0, 0, 0, 1, 2, 2], [0, 1, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, labels in zip("ab", LABELS, strict=True):
        images = [records.encode(records.smooth_image(place, 16, 16)) for place in range(len(labels))]
        records.write_new(folder / name, images, labels)
    return folder


def configuration(folder: Path, *overrides: str) -> Config:
    fixed = [f"data.path={folder}/a", f"data.cache={folder}/cache", "train.steps=1", "train.seed=5"]
    return data_config("unused", [*fixed, *overrides])


def both(folder: Path, weight: float = 1) -> str:
    return f"data.more=[{{path: {folder}/b, weight: {weight}}}]"


def built(folder: Path, *overrides: str) -> tuple[Sources, Order]:
    config = configuration(folder, *overrides)
    sources = build_sources(config)
    return sources, build_order(config, sources)


def assert_same(order: Order, expected: Order) -> None:
    assert type(order) is type(expected) and order.length == expected.length
    positions = np.arange(4 * order.length)
    assert np.array_equal(order.sample_ids(positions), expected.sample_ids(positions))


def test_the_plain_order(folder: Path) -> None:
    sources, order = built(folder)
    assert_same(order, SampleOrder(6, 5))
    assert len(sources) == 6
    assert not np.array_equal(
        order.sample_ids(np.arange(60)), built(folder, "train.seed=6")[1].sample_ids(np.arange(60))
    )


def test_the_weights_of_all_sources(folder: Path) -> None:
    _, order = built(folder, both(folder, 2))
    assert_same(order, WeightedOrder([6, 3], [1, 2], 5))
    _, order = built(folder, both(folder), "data.weight=0.5")
    assert_same(order, WeightedOrder([6, 3], [0.5, 1], 5))
    _, order = built(folder, both(folder))
    assert_same(order, SampleOrder(9, 5))


@pytest.mark.parametrize("balance", [1.0, 0.5])
def test_the_balanced_order(folder: Path, balance: float) -> None:
    sources, order = built(folder, both(folder), "data.order=balanced", f"data.balance={balance}")
    classes = ClassIndex(np.array([0, 0, 0, 1, 2, 2, 3, 4, 4]))
    assert_same(order, BalancedOrder(classes, 5, balance))
    assert sources.all_labels().tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]


def test_the_order_of_identities(folder: Path) -> None:
    _, order = built(folder, "data.order=identities", "data.images_per_identity=2")
    assert_same(order, IdentityOrder(ClassIndex(np.array(LABELS[0])), 5, 2))


def test_several_sources_with_their_classes_apart_or_merged(folder: Path) -> None:
    apart = build_sources(configuration(folder, both(folder)))
    assert apart.sizes == [6, 3] and apart.num_classes == 5
    assert apart.labels(np.arange(9)).tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]
    merged = build_sources(configuration(folder, both(folder), "data.merge_classes=true"))
    assert merged.num_classes == 3
    assert merged.labels(np.arange(9)).tolist() == [0, 0, 0, 1, 2, 2, 0, 1, 1]
    images = merged.encoded(np.array([0, 6]))
    assert np.array_equal(images[0], images[1])


def test_the_keys_of_each_source_reach_its_archive(folder: Path) -> None:
    more = f"data.more=[{{path: {folder}/b, num_classes: 7}}]"
    assert build_sources(configuration(folder, "data.num_classes=4", more)).num_classes == 11
    with pytest.raises(ConfigError, match="expected files of data.format=tfrecord"):
        build_sources(configuration(folder, f"data.more=[{{path: {folder}/b, format: tfrecord}}]"))
    assert any((folder / "cache").iterdir()) and not (folder / "a" / ".partial_fc").exists()


def test_every_key_of_the_augmentation_reaches_it() -> None:
    assert build_augmentation(AugmentConfig()) == type(build_augmentation(AugmentConfig()))()
    for name, field in AugmentConfig.model_fields.items():
        other = 31 if isinstance(field.default, int) else field.default * 0.5 + 0.2
        other = 1.5 if name == "crop_aspect" else other
        changed = build_augmentation(AugmentConfig(**{name: other}))
        expected = dataclasses.replace(build_augmentation(AugmentConfig()), **{name: other})
        assert changed == expected and getattr(changed, name) == other != field.default
