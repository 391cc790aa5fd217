from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partial_fc.data.decode import decode_images
from partial_fc.errors import ConfigError, DataError, NonFiniteError
from partial_fc.evaluate import Pairs, embed_images, evaluate_pairs, read_pairs, write_pairs
from partial_fc.evaluate.verification import verification

OMNIGLOT = Path(__file__).resolve().parents[3] / "shared/data/omniglot/omniglot_val.bin"
JPEG = b"\xff\xd8\xff\xe0"


def decode_numbers(images: Sequence[bytes]) -> Tensor:
    """Stands in for a decoder: pixels drawn from the number in the "image"; "bad" can't be decoded."""
    pixels = torch.empty(len(images), 3, 8, 8)
    for row, image in enumerate(images):
        if image.endswith(b"bad"):
            raise DataError(f"image {row} of {len(images)}: no image")
        pixels[row] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(image[4:])))
    return pixels


def encoded(count: int) -> list[bytes]:
    return [JPEG + str(number).encode() for number in range(count)]


class Net(nn.Module):
    """Counts its calls; BatchNorm and dropout make the mode matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.fc = nn.Linear(4 * 36, 5)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.sizes.append(len(x))
        return self.fc(self.body(x))


def test_an_embedding_is_the_unit_sum_of_image_and_mirror_image() -> None:
    net, images = Net(), encoded(11)
    found = embed_images(net, images, decode=decode_numbers, batch_size=4)
    assert found.shape == (11, 5) and found.dtype == torch.float32 and not found.requires_grad
    assert net.sizes == [4, 4, 4, 4, 3, 3]
    net.eval()
    with torch.no_grad():
        pixels = decode_numbers(images)
        expected = net(pixels) + net(pixels.flip(3))
        plain = net(pixels)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    found = embed_images(net, images, decode=decode_numbers, batch_size=4, flip=False)
    torch.testing.assert_close(found, plain / plain.norm(dim=1, keepdim=True))


def test_modes_and_statistics_are_put_back_after_success_and_failure() -> None:
    net = Net()
    net.body[1].eval()  # a frozen BatchNorm in a network that trains
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for images in (encoded(3), [JPEG + b"bad"]):
        try:
            embed_images(net, images, decode=decode_numbers)
        except DataError:
            assert images == [JPEG + b"bad"]
        assert net.training and net.body.training and net.body[4].training and not net.body[1].training
        assert all((net.state_dict()[name] == value).all() for name, value in before.items())


def test_autocast_changes_the_forward_only() -> None:
    net = Net()
    seen = []
    net.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    half = embed_images(net, encoded(6), decode=decode_numbers, autocast_dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and half.dtype == torch.float32
    full = embed_images(net, encoded(6), decode=decode_numbers)
    torch.testing.assert_close(half, full, atol=0.03, rtol=0)
    torch.testing.assert_close(half.norm(dim=1), torch.ones(6))


def test_an_image_that_cannot_be_decoded_is_named() -> None:
    images = [*encoded(9), JPEG + b"bad"]
    with pytest.raises(DataError, match="^verification image 9 of 10: no image$"):
        embed_images(Net(), images, decode=decode_numbers, batch_size=4)


def test_a_non_finite_embedding_is_named() -> None:
    def decode(images: Sequence[bytes]) -> Tensor:
        pixels = decode_numbers(images)
        if images[0] == encoded(5)[4]:
            pixels[1] = torch.nan
        return pixels

    with pytest.raises(NonFiniteError, match="verification image 5 of 7 has a NaN"):
        embed_images(Net(), encoded(7), decode=decode, batch_size=4)


def test_an_error_of_the_backbone_is_its_own_with_one_process() -> None:
    with pytest.raises(ZeroDivisionError):
        embed_images(Net(), encoded(2), decode=lambda images: torch.zeros(1 // 0))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"batch_size": 0}, "batch_size is 0 and there are 4 images"),
        ({"images": []}, "batch_size is 128 and there are 0 images"),
        ({"rank": 1, "world_size": 2}, "rank 1 of 2 was given, but this process is rank 0 of 1"),
        ({"backbone": nn.Identity()}, r"the backbone made \(4, 3, 8, 8\) of 4 images: expected \[4, embedding size\]"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        embed_images(**{"backbone": Net(), "images": encoded(4), "decode": decode_numbers, **arguments})


def a_set(path: Path) -> Path:
    random = np.random.default_rng(0)
    images = [encoded(30)[number] for number in random.integers(0, 30, 80)]
    write_pairs(path, images, [index % 2 == 0 for index in range(40)])
    return path


def test_pairs_are_scored_by_their_embeddings(tmp_path: Path) -> None:
    net, path = Net(), a_set(tmp_path / "a.bin")
    pairs = read_pairs(path)
    embeddings = embed_images(net, pairs.images, decode=decode_numbers)
    expected = verification(embeddings.numpy(), pairs.left, pairs.right, pairs.same, folds=4)
    for given in (pairs, path, str(path)):
        net.sizes = []
        found = evaluate_pairs(net, given, decode=decode_numbers, folds=4, rank=0, world_size=1)
        assert json.dumps(found.summary()) == json.dumps(expected.summary())
        # Each distinct image once, and once mirrored.
        assert sum(net.sizes) == 2 * len(pairs.images) < 80


def test_an_error_names_the_file(tmp_path: Path) -> None:
    images = [*encoded(19), JPEG + b"bad"]
    write_pairs(tmp_path / "a.bin", images, [True, False] * 5)
    with pytest.raises(DataError, match="a.bin: verification image 19 of 20: no image"):
        evaluate_pairs(Net(), tmp_path / "a.bin", decode=decode_numbers)
    with pytest.raises(DataError, match="nowhere.bin: can't be read"):
        evaluate_pairs(Net(), tmp_path / "nowhere.bin", decode=decode_numbers)
    with pytest.raises(ConfigError, match="a.bin: folds is 41"):
        evaluate_pairs(Net(), a_set(tmp_path / "a.bin"), decode=decode_numbers, folds=41)


@pytest.mark.skipif(not OMNIGLOT.exists(), reason="the omniglot verification set is not on this machine")
def test_real_images_beat_chance_by_their_pixels() -> None:
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            small = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 7).flatten(1)
            return small - small.mean(1, keepdim=True)

    whole = read_pairs(OMNIGLOT)
    # 60 same and 60 different pairs of each fold.
    chosen = np.concatenate([np.r_[0:60, 300:360] + 600 * fold for fold in range(10)])
    kept = np.unique(np.concatenate([whole.left[chosen], whole.right[chosen]]))
    left, right = (np.searchsorted(kept, side[chosen]) for side in (whole.left, whole.right))
    pairs = Pairs([whole.images[index] for index in kept], left, right, whole.same[chosen])
    decode = functools.partial(decode_images, image_size=112, threads=1)
    result = evaluate_pairs(Pixels(), pairs, decode=decode, flip=False)
    assert 0.55 < result.accuracy < 0.7 and 0.55 < result.auc < 0.75
    assert result.same_pairs == result.different_pairs == 600
    assert result.tar_at_far[1e-2] < result.accuracy and np.isnan(result.tar_at_far[1e-3])
