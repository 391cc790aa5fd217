"""Other programs' files: arcface_torch's checkpoints, written here as it writes them, and plain matrices."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from partial_fc import models
from partial_fc.checkpoint import TrainingState, foreign, read_whole, tensor_shapes
from partial_fc.checkpoint.commits import read_commit
from partial_fc.checkpoint.foreign import find_arcface_files, import_arcface, import_weights
from partial_fc.errors import CheckpointError, ConfigError
from partial_fc.head import PartialFC
from partial_fc.optim import RowSGD

SIZE = 8
Change = Callable[[dict[str, Tensor]], dict[str, Any]]


class Custom:
    """What weights_only refuses."""


@pytest.fixture(scope="module")
def backbone() -> dict[str, Tensor]:
    """An iresnet18 for images of 16 pixels."""
    torch.manual_seed(0)
    return models.iresnet18(embedding_size=SIZE, image_size=16).state_dict()


def split(classes: int, ranks: int) -> list[int]:
    """Rows of each rank as PartialFC_V2 has them: num_classes // world_size + int(rank < num_classes % world_size)."""
    return [classes // ranks + int(rank < classes % ranks) for rank in range(ranks)]


def write(folder: Path, backbone: dict[str, Tensor], centres: Tensor, ranks: int, **changes: Any) -> Path:
    """The files of a run, with what train_v2.py puts into them."""
    folder.mkdir(exist_ok=True)
    for rank, weight in enumerate(centres.split(split(len(centres), ranks))):
        # All ranks have a backbone; that of the others must not be read.
        own = backbone if rank == 0 else {"fc.weight": torch.ones(1)}
        torch.save(
            {
                "epoch": 3,
                "global_step": 1200,
                "state_dict_backbone": OrderedDict((f"module.{name}", value) for name, value in own.items()),
                "state_dict_softmax_fc": OrderedDict(weight=weight.clone()),
                "state_optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
                "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 1200},
                **changes,
            },
            folder / f"checkpoint_gpu_{rank}.pt",
        )
    return folder


def whole(folder: Path) -> dict[str, Tensor]:
    return read_whole(folder, tensor_shapes(folder))


@settings(max_examples=8)
@given(classes=st.integers(1, 30), ranks=st.integers(1, 5))
def test_centres_come_in_the_order_of_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, backbone: dict[str, Tensor], classes: int, ranks: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    centres = torch.randn(classes, SIZE)
    info = import_arcface([write(folder / "old", backbone, centres, ranks)], folder / "new")
    new = whole(folder / "new")
    assert torch.equal(new["head.weight"], centres)
    assert info == read_commit(folder / "new").info and info["num_classes"] == classes


def test_the_backbone_is_that_of_rank_0(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    centres = torch.randn(11, SIZE)
    info = import_arcface([write(tmp_path / "old", backbone, centres, 3)], tmp_path / "new", backbone_name="iresnet18")
    new = whole(tmp_path / "new")
    assert all(torch.equal(new[f"backbone.{name}"], value) for name, value in backbone.items())
    assert new.keys() == {*(f"backbone.{name}" for name in backbone), "head.weight", "head.position", "head.step"}
    assert info["config"] == {"backbone": {"name": "iresnet18", "embedding_size": SIZE}, "data": {"image_size": 16}}
    assert (info["step"], info["samples"], info["contents"]) == (0, 0, ["backbone", "head"])
    (done,) = info["history"]
    assert done["unused"] == ["epoch", "global_step", "state_lr_scheduler", "state_optimizer"]


def test_a_training_goes_on_from_it(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    centres = torch.randn(11, SIZE)
    info = import_arcface([write(tmp_path / "old", backbone, centres, 2)], tmp_path / "new")
    network, head = models.iresnet18(embedding_size=SIZE, image_size=16), PartialFC(SIZE, 11)
    state = TrainingState(
        network, head, torch.optim.SGD(network.parameters(), 0.1, 0.9), RowSGD(head.parameters(), 0.1, 0.9)
    )
    notes = state.load(tmp_path / "new", info)
    assert torch.equal(head.weight, centres)
    assert torch.equal(network.state_dict()["fc.weight"], backbone["fc.weight"])
    assert len([note for note in notes if "no optimizer state" in note]) == 2


def test_half_precision_becomes_float32(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in backbone.items()}
    import_arcface([write(tmp_path / "old", half, torch.randn(4, SIZE).half(), 2)], tmp_path / "new")
    dtypes = {dtype for _, dtype in tensor_shapes(tmp_path / "new").values()}
    assert dtypes == {torch.float32, torch.int64}


def test_files_of_ranks_are_found_wherever_they_are(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    folder = write(tmp_path / "old", backbone, torch.randn(12, SIZE), 12)
    (folder / "model.pt").touch()
    expected = [folder / f"checkpoint_gpu_{rank}.pt" for rank in range(12)]
    assert find_arcface_files([folder]) == expected
    assert find_arcface_files([*expected[6:], *expected[:6]]) == expected
    assert find_arcface_files([folder, expected[3]]) == expected


def test_a_set_of_files_that_is_not_whole_is_refused(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    folder = write(tmp_path / "old", backbone, torch.randn(7, SIZE), 4)
    other = shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ConfigError, match="checkpoint_gpu_1.pt: rank 1 is there twice, also as "):
        find_arcface_files([folder, other / "checkpoint_gpu_1.pt"])
    (folder / "checkpoint_gpu_2.pt").unlink()
    with pytest.raises(ConfigError, match="checkpoint_gpu_2.pt is missing, expected ranks 0 to 3 without a gap"):
        import_arcface([folder], tmp_path / "new")
    with pytest.raises(ConfigError, match="nowhere: no such file or folder, expected checkpoint_gpu_0.pt"):
        find_arcface_files([tmp_path / "nowhere"])
    (tmp_path / "model.pt").touch()
    with pytest.raises(ConfigError, match="model.pt: got no file of arcface_torch, expected names such as"):
        find_arcface_files([tmp_path / "model.pt"])
    # The last one is missing: the sizes say so where C isn't a multiple of W.
    (other / "checkpoint_gpu_3.pt").unlink()
    (other / "checkpoint_gpu_2.pt").unlink()
    shutil.copy(other / "checkpoint_gpu_0.pt", other / "checkpoint_gpu_2.pt")
    torch.save(
        {**torch.load(other / "checkpoint_gpu_1.pt"), "state_dict_softmax_fc": {"weight": torch.randn(1, SIZE)}},
        other / "checkpoint_gpu_1.pt",
    )
    with pytest.raises(CheckpointError, match="has 1 classes, expected 2 on rank 1 of 3 with 5 classes in all"):
        import_arcface([other], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def head(**state: Any) -> Change:
    return lambda _: {"state_dict_softmax_fc": state}


def body(**changes: Any) -> Change:
    """Tensors that a backbone has too many of, or others; None: lacks."""
    named = {name.replace("_weight", ".weight"): value for name, value in changes.items()}

    def change(backbone: dict[str, Tensor]) -> dict[str, Any]:
        state = {**backbone, **named}
        return {"state_dict_backbone": {name: value for name, value in state.items() if value is not None}}

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _: {"state_dict_softmax_fc": None}, r"has no state_dict_softmax_fc \(a dict of epoch, global_step, "),
        (head(weight=torch.ones(3)), r"weight is a tensor \[3\], expected \[classes of this rank, "),
        (head(w=torch.ones(3)), "weight is nothing, expected"),
        (head(weight=torch.ones(3, 9)), "has 9 columns, the backbone of rank 0 makes embeddings of 8"),
        (head(weight=torch.ones(0, 8)), "has no class on any rank"),
        (head(weight=torch.full((3, 8), torch.nan)), "row 0 has a NaN or an infinity"),
        (body(bn1_weight=None), r"bn1.weight is nothing, expected \[64\] as in iresnet18 \(1 of its tensors"),
        (body(more=torch.ones(1)), r"more is \[1\], expected nothing as in iresnet18"),
        (body(bn1_weight=torch.ones(2)), r"bn1.weight is \[2\], expected \[64\]"),
        (body(bn1_weight=torch.full((64,), torch.inf)), "bn1.weight has a NaN or an infinity"),
        (body(bn1_weight=3), "bn1.weight is a int, expected a tensor"),
        (body(fc_weight=None), r"stages of \[2, 2, 2, 2\] blocks, expected one of iresnet18"),
        (lambda _: {"state_dict_backbone": {"x": torch.ones(1)}}, r"stages of \[0, 0, 0, 0\] blocks, expected"),
        (lambda _: {"state_optimizer": Custom()}, "holds objects that run code when they are read"),
    ],
)
def test_a_file_that_is_not_arcfaces_is_refused(
    tmp_path: Path, backbone: dict[str, Tensor], change: Change, match: str
) -> None:
    folder = write(tmp_path / "old", backbone, torch.randn(3, SIZE), 1, **change(backbone))
    with pytest.raises(CheckpointError, match=match) as caught:
        import_arcface([folder], tmp_path / "new")
    assert "\n" not in str(caught.value) and "checkpoint_gpu_0.pt" in str(caught.value)
    assert os.listdir(tmp_path) == ["old"]


def test_the_name_of_the_backbone_has_to_be_right(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    folder = write(tmp_path / "old", backbone, torch.randn(3, SIZE), 1)
    with pytest.raises(ConfigError, match="--backbone-name is 'r50', expected one of iresnet18, iresnet34"):
        import_arcface([folder], tmp_path / "new", backbone_name="r50")
    with pytest.raises(CheckpointError, match="the backbone is iresnet18, expected iresnet50"):
        import_arcface([folder], tmp_path / "new", backbone_name="iresnet50")


@pytest.mark.parametrize("name", foreign.ARCFACE_BACKBONES)
def test_every_depth_is_told_from_the_names(name: str) -> None:
    with torch.device("meta"):
        network = getattr(models, name)()
    assert foreign._depths(name) == [len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)]
    assert len({tuple(foreign._depths(other)) for other in foreign.ARCFACE_BACKBONES}) == 5


def test_nothing_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        import_arcface([tmp_path], tmp_path)
    with pytest.raises(ConfigError, match="is there already"):
        import_weights(tmp_path, tmp_path)


def save(path: Path, matrix: Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, matrix.numpy())
    elif path.suffix == ".safetensors":
        save_file({"w": matrix, "bias": torch.ones(len(matrix))}, path)
    elif path.suffix == ".pth":
        torch.save({"bias": torch.ones(len(matrix)), "w": matrix, "epoch": 3}, path)
    else:
        torch.save(matrix, path)
    return path


@pytest.mark.parametrize("ending", ["npy", "safetensors", "pt", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_matrix_is_read(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(7, SIZE).to(dtype)
    info = import_weights(save(tmp_path / f"w.{ending}", matrix), tmp_path / "new")
    new = whole(tmp_path / "new")
    assert new.keys() == {"head.weight", "head.position", "head.step"} and torch.equal(
        new["head.weight"], matrix.float()
    )
    assert info == read_commit(tmp_path / "new").info
    assert (info["num_classes"], info["embedding_size"], info["contents"]) == (7, SIZE, ["head"])
    assert info["config"] == {"backbone": {"embedding_size": SIZE}}


def test_a_matrix_of_several_is_named_by_its_key(tmp_path: Path) -> None:
    one, two = torch.randn(3, 2), torch.randn(4, 2)
    torch.save({"a": one, "b": {"c.d": two}, "e": 3}, tmp_path / "w.pt")
    save_file({"a": one, "b": two}, tmp_path / "w.safetensors")
    for name, key in (("w.pt", "b.c.d"), ("w.safetensors", "b")):
        with pytest.raises(
            CheckpointError, match=r"has 2 matrices \(a, b.*\), expected one: tell which one with --key"
        ):
            import_weights(tmp_path / name, tmp_path / "new")
        with pytest.raises(CheckpointError, match=r"has no tensor 'x', it has a, b.*: correct --key"):
            import_weights(tmp_path / name, tmp_path / "new", key="x")
        import_weights(tmp_path / name, tmp_path / name.replace(".", ""), key=key)
        assert torch.equal(whole(tmp_path / name.replace(".", ""))["head.weight"], two)


def test_files_of_before_pytorch_1_6_and_of_other_machines_are_read(tmp_path: Path) -> None:
    matrix = torch.randn(3, 2)
    torch.save(matrix, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    import_weights(tmp_path / "w.pt", tmp_path / "a")
    np.save(tmp_path / "w.npy", np.asfortranarray(matrix.numpy()).astype(">f4"))
    import_weights(tmp_path / "w.npy", tmp_path / "b")
    for place in ("a", "b"):
        assert torch.equal(whole(tmp_path / place)["head.weight"], matrix)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("w.bin", b"", "got a name that ends in '.bin', expected .pt, .pth, .npy or .safetensors"),
        ("w.pt", b"", "w.pt: is no PyTorch file"),
        ("w.pt", b"PK\x03\x04 not a zip", "w.pt: is no PyTorch file"),
        ("w.pt", b"nonsense", "w.pt: is damaged, or holds objects that run code"),
        ("w.npy", b"nonsense", "w.npy: can't be read as a .npy file"),
        ("w.npy", b"", "w.npy: can't be read as a .npy file"),
        ("w.safetensors", b"nonsense", "w.safetensors: can't be read as safetensors"),
        ("w.pt", torch.ones(3), r"got float32 of shape \[3\], expected floating-point \[classes, embedding size\]"),
        ("w.pt", torch.ones(0, 3), r"of shape \[0, 3\], expected"),
        ("w.pt", torch.ones(2, 3, dtype=torch.int64), "got int64 of shape"),
        ("w.pt", torch.tensor([[1.0, 2.0], [1.0, torch.inf]]), "w.pt: row 1 has a NaN or an infinity"),
        ("w.pt", {}, r"has 0 matrices \(no tensor\), expected one: name a file with class centres"),
        ("w.pt", [torch.ones(2, 2)], r"has 0 matrices \(no tensor\)"),
        ("w.pt", Custom(), "holds objects that run code when they are read; expected tensors and plain values only"),
    ],
)
def test_a_file_without_a_matrix_is_refused(tmp_path: Path, name: str, content: object, match: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
        import_weights(path, tmp_path / "new")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == [name]


def test_what_is_no_file_or_has_no_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w.pt: no such file, expected a matrix of class centres"):
        import_weights(tmp_path / "w.pt", tmp_path / "new")
    np.save(tmp_path / "w.npy", np.ones((2, 2)))
    with pytest.raises(ConfigError, match="--key is 'a', expected none with a .npy file"):
        import_weights(tmp_path / "w.npy", tmp_path / "new", key="a")
    np.save(tmp_path / "x.npy", np.array([Custom()]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="x.npy: can't be read as a .npy file"):
        import_weights(tmp_path / "x.npy", tmp_path / "new")
