from __future__ import annotations

import pickle
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from partial_fc.checkpoint import (
    load_backbone,
    read_into,
    read_whole,
    save_model,
    sharded,
    sum_files,
    tensor_shapes,
    write_tensors,
)
from partial_fc.checkpoint.tensors import write_summed
from partial_fc.errors import CheckpointError
from partial_fc.head import PartialFC

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
STATES = st.dictionaries(st.text("ab.c", min_size=1, max_size=4), st.tuples(SHAPES, DTYPES), min_size=1, max_size=4)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape) * 4).to(dtype)


@given(STATES)
def test_what_is_written_is_read_back(forms: dict[str, tuple[tuple[int, ...], torch.dtype]]):
    state = {name: drawn(*form) for name, form in forms.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert write_tensors(folder, state) == ["__0_0.distcp", ".metadata"]
        assert tensor_shapes(folder) == {name: (value.shape, value.dtype) for name, value in state.items()}
        for name, value in read_whole(folder, state).items():
            assert torch.equal(value, state[name]) and value.dtype == state[name].dtype
        target = {name: torch.ones_like(value) for name, value in state.items()}
        addresses = {name: value.data_ptr() for name, value in target.items()}
        read_into(folder, target)
        assert all(torch.equal(target[name], state[name]) for name in state)
        assert addresses == {name: value.data_ptr() for name, value in target.items()}


def test_another_dtype_and_layout_is_converted(tmp_path: Path):
    weight = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
    write_tensors(tmp_path, {"weight": weight})
    target = torch.empty(5, 3, 2, 2, dtype=torch.bfloat16)
    read_into(tmp_path, {"weight": target})
    assert torch.equal(target, weight.bfloat16())


def test_the_sums_on_the_way_are_those_of_the_files(tmp_path: Path):
    # More than one block, and a second file.
    sums = write_summed(tmp_path, {"large": torch.randn(5 << 20), "small": torch.tensor(3)})
    assert sums == sum_files(tmp_path, sums) and len(sums) == 2
    assert {path.name for path in tmp_path.iterdir()} == sums.keys()


@pytest.mark.parametrize("reads", [False, True])
def test_nothing_is_warned_of_and_other_warnings_stay(tmp_path: Path, reads: bool):
    if reads:
        write_tensors(tmp_path, {"x": torch.ones(2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (read_into if reads else write_tensors)(tmp_path, {"x": torch.ones(2)})
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


def test_one_rank_needs_no_dtensor():
    local = torch.ones(3, 2)
    assert sharded(local, 3) is local


def test_errors_name_the_folder_and_the_tensor(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no saved tensors"):
        tensor_shapes(tmp_path)
    write_tensors(tmp_path, {"x": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match=r"no tensor y in it, expected \[2\]"):
        read_into(tmp_path, {"y": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"x is \[2, 3\], expected \[2\]"):
        read_into(tmp_path, {"x": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no tensor z in it: it holds x"):
        read_whole(tmp_path, ["z"])


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps({"a": 1})[:-3], pickle.dumps([1])])
def test_a_broken_list_of_tensors_is_an_error(tmp_path: Path, content: bytes):
    write_tensors(tmp_path, {"x": torch.ones(2)})
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata can't be read") as caught:
        read_into(tmp_path, {"x": torch.ones(2)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["gone", "short", "noise"])
def test_a_broken_file_is_an_error_of_one_line(tmp_path: Path, what: str):
    write_tensors(tmp_path, {"x": torch.ones(2000)})
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    path.unlink()
    if what != "gone":
        path.write_bytes(content[:4000] if what == "short" else bytes(len(content)))
    with pytest.raises(CheckpointError, match="its tensors can't be read") as caught:
        read_into(tmp_path, {"x": torch.ones(2000)})
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written: NotADirectoryError") as caught:
        write_tensors(tmp_path / "file" / "folder", {"x": torch.ones(2)})
    assert "\n" not in str(caught.value)


def test_writing_may_be_stopped(tmp_path: Path):
    with pytest.raises(CheckpointError, match="the writing was stopped"):
        write_summed(tmp_path, {"x": torch.ones(2)}, stopped=lambda: True)


def test_a_saved_model_is_read_and_another_one_is_not(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no saved model there, expected the folder 'model'"):
        load_backbone(tmp_path, nn.Linear(3, 4))
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_model(tmp_path, backbone, PartialFC(4, 7))
    assert tensor_shapes(tmp_path)["head.weight"][0] == (7, 4)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_backbone(tmp_path, other)
    for (name, value), found in zip(backbone.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, found), name
    for wrong in (nn.Sequential(nn.Linear(3, 5)), nn.Linear(3, 4)):
        with pytest.raises(CheckpointError, match="the saved model doesn't fit the configuration: .*tensor"):
            load_backbone(tmp_path, wrong)
