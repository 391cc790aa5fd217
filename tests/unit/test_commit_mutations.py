"""Damaged commits: the previous one is taken, and a line says which folder isn't used and why."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.checkpoint.commits import begin, newest_commit, read_commit, seal, sum_files
from partial_fc.checkpoint.tensors import read_whole, write_tensors
from partial_fc.errors import CheckpointError

OLD, NEW = "step-00000020", "step-00000040"
FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "commit.json", "run.json")
Mutation = Callable[[Path], None]


def write_commit(root: Path, step: int) -> Path:
    """A commit as two ranks leave it: equal names and sizes at every step, other contents."""
    partial = begin(root, step)
    state = {"head.weight": torch.full((6, 4), float(step)), "backbone.weight": torch.full((3, 4), -float(step))}
    written = write_tensors(partial, state)
    # Without a second process: rank 1's file, of the size of rank 0's, so that only the contents tell them apart.
    (partial / "__1_0.distcp").write_bytes((partial / "__0_0.distcp").read_bytes()[::-1])
    info = {"format": 1, "step": step, "samples": 8 * step, "num_classes": 6, "embedding_size": 4}
    contents = {"contents": ["backbone", "head"], "config": {"train": {"batch_size": 8}}, "accuracy": None}
    return seal(partial, {**info, **contents}, sum_files(partial, [*written, "__1_0.distcp"]))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for name, step in ((OLD, 20), (NEW, 40)):
        folder = write_commit(root, step)
        assert folder.name == name and sorted(os.listdir(folder)) == sorted(FILES)
    sizes = [[(root / name / file).stat().st_size for file in FILES] for name in (OLD, NEW)]
    assert sizes[0] == sizes[1], "sizes alone would tell the commits apart"
    return root


@pytest.fixture
def root(originals: Path, tmp_path: Path) -> Path:
    """Two commits of their own."""
    return Path(shutil.copytree(originals, tmp_path / "checkpoints"))


def flip(file: str, where: float, bit: int = 0) -> Mutation:
    def mutate(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[int(where * (len(content) - 1))] ^= 1 << bit
        (folder / file).write_bytes(content)

    return mutate


def content(file: str, change: Callable[[bytes], bytes]) -> Mutation:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def marker(change: Callable[[dict[str, Any]], object]) -> Mutation:
    """Another marker, of the right form."""

    def mutate(folder: Path) -> None:
        written = json.loads((folder / "commit.json").read_text())
        change(written)
        (folder / "commit.json").write_text(json.dumps(written, indent=1))

    return mutate


def listing(name: str) -> Mutation:
    """A marker with one more file, which is there and has this sum."""

    def mutate(folder: Path) -> None:
        path = Path(name) if name.startswith("/") else folder / name
        with_it = {**json.loads((folder / "commit.json").read_text())}
        size, digest = sum_files(path.parent, [path.name])[path.name]
        with_it["files"][name] = {"size": size, "sha256": digest}
        with_it["files"] = dict(sorted(with_it["files"].items()))
        (folder / "commit.json").write_text(json.dumps(with_it, indent=1))

    return mutate


def from_the_older(file: str) -> Mutation:
    return lambda folder: shutil.copy(folder.parent / OLD / file, folder / file) and None


def swap(first: str, second: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / first).rename(folder / "aside")
        (folder / second).rename(folder / first)
        (folder / "aside").rename(folder / second)

    return mutate


def swap_with_the_older(file: str) -> Mutation:
    """Both commits have the other's file: then none is left."""

    def mutate(folder: Path) -> None:
        older = folder.parent / OLD
        shutil.copy(older / file, folder.parent / "aside")
        shutil.copy(folder / file, older / file)
        shutil.move(folder.parent / "aside", folder / file)

    return mutate


def instead(file: str, make: Callable[[Path], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / file).rename(folder.parent / "aside")
        make(folder / file)

    return mutate


def remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def replace_folder(make: Callable[[Path], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        folder.rename(folder.parent / "aside")
        make(folder)

    return mutate


def edit_step(text: bytes) -> bytes:
    assert b'"samples": 320' in text
    return text.replace(b'"samples": 320', b'"samples": 321')


WRITTEN = "isn't what was written"
# Name -> (what happens to the newer of two commits, what the line says behind the folder).
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "folder empty": (remove_all, "has no commit.json, so it was not written to its end"),
    "folder is a file": (replace_folder(Path.touch), "is a file, expected a folder"),
    "folder is a link": (
        replace_folder(lambda path: path.symlink_to("aside")),
        "is a symbolic link, expected a folder",
    ),
    "folder is a broken link": (replace_folder(lambda path: path.symlink_to("gone")), "is a symbolic link"),
    "marker missing": (lambda folder: (folder / "commit.json").unlink(), "has no commit.json"),
    "marker empty": (content("commit.json", lambda _: b""), r"commit.json \(0 bytes\) is not JSON"),
    "marker zeroed": (content("commit.json", lambda text: bytes(len(text))), r"commit.json \(\d+ bytes\) is not JSON"),
    "marker truncated": (content("commit.json", lambda text: text[:-1]), r"commit.json \(\d+ bytes\) is not JSON"),
    "marker extended": (content("commit.json", lambda text: text + b"\n"), f"commit.json {WRITTEN}"),
    "marker not JSON": (content("commit.json", lambda _: b"\x80pickle"), "commit.json .* is not JSON"),
    "marker nested deeply": (content("commit.json", lambda _: b"[" * 200_000), "commit.json .* is not JSON"),
    "marker a list": (content("commit.json", lambda _: b"[]"), "commit.json holds no JSON object"),
    "marker without format": (marker(lambda it: it.pop("format")), "commit.json has format None, expected 1"),
    "marker of a newer format": (marker(lambda it: it.update(format=2)), "commit.json has format 2, newer .* update"),
    "marker without files": (marker(lambda it: it.pop("files")), "commit.json lists no files"),
    "marker with other keys": (marker(lambda it: it.update(more=1)), f"commit.json {WRITTEN}"),
    "marker of another size": (
        marker(lambda it: it["files"]["__1_0.distcp"].update(size=7)),
        r"__1_0.distcp has \d+ bytes, expected 7",
    ),
    "marker of another checksum": (
        marker(lambda it: it["files"]["__1_0.distcp"].update(sha256="0" * 64)),
        f"__1_0.distcp {WRITTEN}: it has SHA-256 .*, expected 000000000000",
    ),
    "marker with half a checksum": (
        marker(lambda it: it["files"]["__1_0.distcp"].update(sha256="0" * 32)),
        "commit.json has no size and SHA-256 of __1_0.distcp",
    ),
    "marker with a size that is text": (
        marker(lambda it: it["files"]["__1_0.distcp"].update(size="7")),
        "commit.json has no size and SHA-256 of __1_0.distcp",
    ),
    "marker without a file": (marker(lambda it: it["files"].pop("__1_0.distcp")), "__1_0.distcp is not part of it"),
    "marker without run.json": (marker(lambda it: it["files"].pop("run.json")), "commit.json doesn't list run.json"),
    "marker of the older commit": (from_the_older("commit.json"), f"{WRITTEN}: it has SHA-256"),
    "marker is a link": (
        instead("commit.json", lambda path: path.symlink_to("../aside")),
        "commit.json is no plain file",
    ),
    "marker lists a file above": (listing(f"../{OLD}/run.json"), f"commit.json lists '../{OLD}/run.json', expected"),
    "marker lists an absolute name": (listing(__file__), "commit.json lists '/.*', expected names"),
    "marker lists itself": (listing("commit.json"), "commit.json lists 'commit.json', expected names"),
    "metadata missing": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "metadata bit-flipped": (flip(".metadata", 0.5), f".metadata {WRITTEN}"),
    "data missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "data of both ranks missing": (
        lambda folder: [path.unlink() for path in folder.glob("*.distcp")] and None,
        "__0_0.distcp and 1 more are missing",
    ),
    "data truncated": (content("__0_0.distcp", lambda data: data[:-1]), r"__0_0.distcp has \d+ bytes, expected \d+"),
    "data empty": (content("__0_0.distcp", lambda data: b""), r"__0_0.distcp has 0 bytes, expected \d+"),
    "data extended": (content("__0_0.distcp", lambda data: data + b"\0"), r"__0_0.distcp has \d+ bytes, expected \d+"),
    "data flipped in the first byte": (flip("__0_0.distcp", 0), f"__0_0.distcp {WRITTEN}"),
    "data flipped in the middle": (flip("__0_0.distcp", 0.5, 7), f"__0_0.distcp {WRITTEN}"),
    "data flipped in the last byte": (flip("__0_0.distcp", 1), f"__0_0.distcp {WRITTEN}"),
    "data zeroed": (content("__0_0.distcp", lambda data: bytes(len(data))), f"__0_0.distcp {WRITTEN}"),
    "data of the older commit": (from_the_older("__0_0.distcp"), f"__0_0.distcp {WRITTEN}"),
    "data of the two ranks swapped": (swap("__0_0.distcp", "__1_0.distcp"), f"__[01]_0.distcp {WRITTEN}"),
    "data is a folder": (instead("__0_0.distcp", Path.mkdir), "__0_0.distcp is no plain file"),
    "data is a link": (
        instead("__0_0.distcp", lambda path: path.symlink_to("../aside")),
        "__0_0.distcp is no plain file",
    ),
    "data is a broken link": (instead("__0_0.distcp", lambda path: path.symlink_to("gone")), "is no plain file"),
    "data is a pipe": (instead("__0_0.distcp", os.mkfifo), "__0_0.distcp is no plain file"),
    "data renamed": (
        lambda folder: (folder / "__1_0.distcp").rename(folder / "__2_0.distcp") and None,
        "__1_0.distcp is missing",
    ),
    "run.json missing": (lambda folder: (folder / "run.json").unlink(), "run.json is missing"),
    "run.json of the older commit": (from_the_older("run.json"), f"run.json {WRITTEN}"),
    "run.json edited": (content("run.json", edit_step), f"run.json {WRITTEN}"),
    "older commit renamed": (
        lambda folder: [shutil.rmtree(folder), shutil.copytree(folder.parent / OLD, folder)] and None,
        "run.json says step 20, expected step 40 as in the folder's name",
    ),
    "a file more": (lambda folder: (folder / "__2_0.distcp").touch(), "__2_0.distcp is not part of it"),
    "a hidden file more": (lambda folder: (folder / ".metadata.tmp").touch(), ".metadata.tmp is not part of it"),
    "a folder more": (lambda folder: (folder / "deep").mkdir(), "deep is not part of it"),
    "a file more whose name has two lines": (lambda folder: (folder / "a\nb").touch(), r"'a\\nb' is not part of it"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_previous_commit_is_taken_and_a_line_says_why(root: Path, name: str) -> None:
    mutate, why = MUTATIONS[name]
    mutate(root / NEW)
    lines: list[str] = []
    commit = newest_commit(root, lines.append)
    assert commit is not None and commit.folder == root / OLD and commit.step == 20 and commit.info["samples"] == 160
    expected = re.escape(f"{root / NEW}: ") + ".*" + why + ".*: it is not used, the previous commit is"
    assert len(lines) == 1 and re.fullmatch(expected, lines[0]), lines
    with pytest.raises(CheckpointError, match=why):
        read_commit(root / NEW)


def test_whole_commits_are_taken(root: Path) -> None:
    lines: list[str] = []
    commit = newest_commit(root, lines.append)
    assert commit is not None and commit.folder == root / NEW and lines == []
    assert read_whole(commit.folder, ["head.weight"])["head.weight"].eq(40).all()


def test_what_can_not_be_read_is_not_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if path == root / NEW / "__1_0.distcp":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    lines: list[str] = []
    commit = newest_commit(root, lines.append)
    assert commit is not None and commit.step == 20
    assert f"{root / NEW}: __1_0.distcp can't be read (Permission denied): it is not used" in lines[0]


def test_a_folder_left_half_written_is_no_commit(root: Path) -> None:
    half = begin(root, 60)
    shutil.copytree(root / NEW, half, dirs_exist_ok=True)
    commit = newest_commit(root, pytest.fail)
    assert commit is not None and commit.folder == root / NEW


def test_the_newer_commit_renamed_to_an_older_step(root: Path) -> None:
    (root / NEW).rename(root / "step-00000010")
    assert (commit := newest_commit(root, pytest.fail)) is not None and commit.step == 20
    with pytest.raises(CheckpointError, match="run.json says step 40, expected step 10"):
        read_commit(root / "step-00000010")


def test_where_every_commit_is_bad_there_is_none_and_a_line_for_each(root: Path) -> None:
    swap_with_the_older("__0_0.distcp")(root / NEW)
    (root / "step-00000060").mkdir()
    lines: list[str] = []
    assert newest_commit(root, lines.append) is None
    assert [line.split(": ")[0] for line in lines] == [str(root / name) for name in ("step-00000060", NEW, OLD)]
    assert [line.endswith("the previous commit is") for line in lines] == [True, True, False]
    assert lines[2].endswith("it is not used, and there is no previous commit")
    assert all("\n" not in line for line in lines)


@given(st.sampled_from(FILES), st.integers(min_value=0), st.integers(1, 255))
def test_no_byte_of_any_file_changes_unseen(root_of_flips: Path, file: str, index: int, mask: int) -> None:
    folder = root_of_flips / NEW
    before = (folder / file).read_bytes()
    changed = bytearray(before)
    changed[index % len(before)] ^= mask
    (folder / file).write_bytes(changed)
    lines: list[str] = []
    try:
        commit = newest_commit(root_of_flips, lines.append)
    finally:
        (folder / file).write_bytes(before)
    assert commit is not None and commit.step == 20 and len(lines) == 1
    assert lines[0].startswith(f"{folder}: ") and "\n" not in lines[0]


@pytest.fixture(scope="module")
def root_of_flips(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(originals, tmp_path_factory.mktemp("flips") / "checkpoints"))


def test_no_byte_of_the_marker_changes_unseen(root: Path) -> None:
    path = root / NEW / "commit.json"
    whole = path.read_bytes()
    for index in range(len(whole)):
        for mask in (1, 2, 16, 32):
            path.write_bytes(whole[:index] + bytes((whole[index] ^ mask,)) + whole[index + 1 :])
            with pytest.raises(CheckpointError, match=NEW):
                read_commit(root / NEW)
    path.write_bytes(whole)
    assert read_commit(root / NEW).step == 40
