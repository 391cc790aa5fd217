from __future__ import annotations

import numpy as np
import pytest

from partial_fc.data.augment import Augmentation, pixel_matrices
from partial_fc.errors import ConfigError


def test_parameters_are_a_function_of_seed_and_position() -> None:
    augmentation = Augmentation(flip=0.5, rotate=0.3, scale=0.2, shift=0.1)
    all_ = augmentation.parameters(3, np.arange(1000))
    assert all_.shape == (1000, 7) and all_.dtype == np.float32
    some = np.array([999, 0, 512, 512])
    assert np.array_equal(augmentation.parameters(3, some), all_[some])
    assert not np.array_equal(augmentation.parameters(4, some), all_[some])


def test_the_ranges_are_filled_and_kept() -> None:
    augmentation = Augmentation(flip=0.25, rotate=0.3, scale=0.2, shift=0.1)
    parameters = augmentation.parameters(0, np.arange(5000)).astype(np.float64)
    assert abs(parameters[:, 0].mean() - 0.25) < 0.03
    matrices = parameters[:, 1:].reshape(-1, 2, 3)
    # Back to what happens to the image: the inverse map.
    inverse = np.linalg.inv(matrices[:, :, :2])
    size = np.sqrt(np.linalg.det(inverse))
    angle = np.arctan2(inverse[:, 1, 0], inverse[:, 0, 0])
    shift = -np.einsum("nij,nj->ni", inverse, matrices[:, :, 2])
    for value, limit in ((size - 1, 0.2), (angle, 0.3), (shift[:, 0], 0.1), (shift[:, 1], 0.1)):
        assert np.abs(value).max() <= limit + 1e-6
        assert np.abs(value).max() > 0.98 * limit
        assert abs(value.mean()) < 0.05 * limit
    # Rotated and scaled only, never sheared.
    assert np.allclose(inverse[:, 0, 0], inverse[:, 1, 1]) and np.allclose(inverse[:, 0, 1], -inverse[:, 1, 0])


def test_nothing_to_do_is_the_identity() -> None:
    still = Augmentation(flip=0)
    assert still.identity and not still.affine
    assert np.array_equal(still.parameters(0, np.arange(3)), np.tile([0, 1, 0, 0, 0, 1, 0], (3, 1)))
    assert not Augmentation().identity and not Augmentation().affine
    assert Augmentation(flip=0, shift=0.1).affine


def test_pixel_matrices_turn_around_the_middle() -> None:
    parameters = np.array([[0, 0, 1, 0, -1, 0, 0], [0, 1, 0, 0.25, 0, 1, -0.5]], dtype=np.float32)
    quarter, shifted = pixel_matrices(parameters, 8)
    # The output's upper left corner shows the source's lower left one; the middle stays.
    assert np.allclose(quarter @ [0, 0, 1], [0, 8])
    assert np.allclose(quarter @ [4, 4, 1], [4, 4])
    assert np.allclose(shifted @ [1, 5, 1], [3, 1])


@pytest.mark.parametrize(
    ("name", "value"), [("flip", 1.5), ("rotate", -0.1), ("scale", 1.0), ("shift", float("nan")), ("fill", 256)]
)
def test_a_value_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"augment.{name} must be from 0 to .*, got {value}"):
        Augmentation(**{name: value})
