"""Imprinted centres, against numpy in float64; images that can't be used."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partial_fc.data import Sources, decode_images, open_archive
from partial_fc.data.files import MachineError
from partial_fc.errors import DataError, NonFiniteError
from partial_fc.imprint import imprint
from partial_fc.models import SmallNet
from tests import records

SIDE, SIZE = 16, 8
LABELS = [2, 0, 1, 0, 2, 2, 0, 1, 1, 2]


def images() -> list[bytes]:
    """One of them has another size."""
    return [records.encode(records.smooth_image(i, SIDE, SIDE + 8 * (i == 3))) for i in range(len(LABELS))]


def write(folder: Path, encoded: list[bytes], labels: list[int] = LABELS, classes: int = 3) -> Sources:
    records.write_new(folder, encoded, labels, classes)
    return Sources([open_archive(folder)])


def network() -> SmallNet:
    """With running statistics that differ from those of a batch."""
    torch.manual_seed(0)
    backbone = SmallNet(SIZE, SIDE)
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(16, 3, SIDE, SIDE))
    return backbone


def oracle(backbone: nn.Module, encoded: list[bytes], labels: list[int]) -> np.ndarray:
    with torch.no_grad():
        embeddings = backbone.eval()(decode_images(encoded, SIDE)).double().numpy()
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = np.stack([units[np.array(labels) == label].mean(0) for label in range(max(labels) + 1)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def run(backbone: nn.Module, sources: Sources, **options: object) -> Tensor:
    return imprint(backbone, sources, embedding_size=SIZE, image_size=SIDE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 128])
def test_a_centre_is_the_mean_direction_of_its_class(tmp_path: Path, batch_size: int) -> None:
    encoded, backbone, seen = images(), network(), []
    centres = run(backbone, write(tmp_path, encoded), batch_size=batch_size, progress=lambda *done: seen.append(done))
    assert centres.dtype == torch.float32
    np.testing.assert_allclose(centres.numpy(), oracle(backbone, encoded, LABELS), atol=1e-6)
    assert seen[-1] == (10, 10) and len(seen) == -(-10 // batch_size)


def test_the_first_images_of_a_class_will_do(tmp_path: Path) -> None:
    encoded, backbone = images(), network()
    centres = run(backbone, write(tmp_path, encoded), limit_per_class=2)
    chosen = [row for row in range(10) if LABELS[:row].count(LABELS[row]) < 2]
    expected = oracle(backbone, [encoded[row] for row in chosen], [LABELS[row] for row in chosen])
    np.testing.assert_allclose(centres.numpy(), expected, atol=1e-6)


def test_images_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded, backbone = images(), network()
    encoded[4] = encoded[4][: len(encoded[4]) // 2]
    encoded[7] = b"not an image at all"
    with caplog.at_level(logging.WARNING):
        centres = run(backbone, write(tmp_path, encoded), batch_size=2)
    good = [row for row in range(10) if row not in (4, 7)]
    expected = oracle(backbone, [encoded[row] for row in good], [LABELS[row] for row in good])
    np.testing.assert_allclose(centres.numpy(), expected, atol=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert "2 images can't be used and are left out" in said[0]
    assert len(said) == 3 and all("train.rec, byte " in line for line in said[1:])


def test_a_class_without_a_usable_image_is_named(tmp_path: Path) -> None:
    encoded = images()
    for row in (2, 7, 8):
        encoded[row] = b"not an image at all"
    with pytest.raises(DataError, match="1 of 3 classes have no usable image, the first is class 1: add images, or"):
        run(network(), write(tmp_path / "a", encoded))
    with pytest.raises(DataError, match="2 of 5 classes have no usable image, the first is class 3"):
        run(network(), write(tmp_path / "b", images(), classes=5))
    with pytest.raises(DataError, match="1 of 3 classes have no usable image"):
        run(network(), write(tmp_path / "c", images()[:4], LABELS[:1] + [2, 0, 0]), limit_per_class=1)


def test_a_lack_of_the_machine_leaves_no_image_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = write(tmp_path, images())

    def lacking(ids: np.ndarray) -> list[np.ndarray]:
        raise MachineError("too many files are open")

    monkeypatch.setattr(sources, "encoded", lacking)
    with pytest.raises(MachineError, match="too many files"):
        run(network(), sources)


class Odd(nn.Module):
    """Embeddings that point to and fro."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.ones(len(x))
        signs[::2] = -1
        return signs[:, None] * torch.full((1, SIZE), self._value)


def test_embeddings_that_make_no_centre_are_refused(tmp_path: Path) -> None:
    sources = write(tmp_path, images()[:4], [0, 0, 1, 1], 2)
    with pytest.raises(NonFiniteError, match="an embedding has a NaN or an infinity"):
        run(Odd(float("nan")), sources)
    with pytest.raises(DataError, match="the embeddings of class 0 cancel out, expected images that are alike"):
        run(Odd(1.0), sources)
