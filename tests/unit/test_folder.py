from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from partial_fc.data.files import IMAGE_EXTENSIONS, MachineError
from partial_fc.data.folder import scan_folder
from partial_fc.data.table import UNUSABLE
from partial_fc.errors import DataError


def make(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * i)
    return root


def as_image_folder(root: Path) -> list[tuple[str, int]]:
    """What torchvision's ImageFolder makes of a folder without hidden files."""
    samples = []
    for label, name in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith(tuple(IMAGE_EXTENSIONS)):
                    samples.append((os.path.relpath(os.path.join(folder, file), root), label))
    return samples


def test_the_order_is_that_of_image_folder(tmp_path: Path):
    root = make(
        tmp_path,
        *("b/2.jpg", "b/10.JPG", "b/1.Png", "b/sub/0.jpg", "b/sub-x/0.jpg", "b/sub/deep/0.webp", "b/su/1.tiff"),
        *("a/x.jpg", "a/readme.txt", "a/noextension", "B/1.bmp", "c d/ü.jpeg", "é/1.ppm", "10/1.pgm", "9/1.tif"),
        *("empty/readme.txt", "folder.jpg/1.jpg", "top.jpg"),
    )
    names, scan = scan_folder(root)
    assert list(zip(names, scan.label.tolist(), strict=True)) == as_image_folder(root)
    assert len(names) == 14
    assert scan.class_names == ["10", "9", "B", "a", "b", "c d", "empty", "folder.jpg", "é"] and scan.num_classes == 9
    assert scan.length.tolist() == [(root / name).stat().st_size for name in names]
    assert scan.file.tolist() == list(range(14)) and not scan.offset.any() and not scan.faults
    assert [getattr(scan, name).dtype for name in ("file", "offset", "length", "label")] == ["i4", "i8", "i4", "i8"]
    for other in (str(root) + "/", os.path.relpath(root)):
        assert scan_folder(Path(other))[0] == names


def test_hidden_files_and_folders_are_left_out(tmp_path: Path):
    root = make(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._1.jpg", "a/.cache/3.jpg", ".git/4.jpg", "a/.jpg")
    names, scan = scan_folder(root)
    assert names == ["a/1.jpg"] and scan.class_names == ["a"]


def test_an_empty_file_is_a_sample(tmp_path: Path):
    _, scan = scan_folder(make(tmp_path, "a/1.jpg"))
    assert scan.length.tolist() == [0] and scan.label.tolist() == [0]


def test_links_are_followed(tmp_path: Path):
    store = make(tmp_path / "store", "1.jpg", "2.jpg", "more/3.jpg")
    root = make(tmp_path / "root", "a/0.jpg")
    os.symlink(store / "2.jpg", root / "a" / "9.jpg")
    os.symlink(store, root / "a" / "linked")
    os.symlink(store / "more", root / "b")
    names, scan = scan_folder(root)
    assert names == ["a/0.jpg", "a/9.jpg", "a/linked/1.jpg", "a/linked/2.jpg", "a/linked/more/3.jpg", "b/3.jpg"]
    assert scan.label.tolist() == [0] * 5 + [1] and scan.length.tolist() == [0, 1, 0, 1, 2, 2]


@pytest.mark.timeout(60)
def test_links_in_circles_end(tmp_path: Path):
    root = make(tmp_path / "root", "a/1.jpg", "a/x/2.jpg", "a/y/3.jpg", "b/4.jpg")
    for at, to in [("a/self", "."), ("a/x/up", ".."), ("a/x/root", "../.."), ("a/y/out", "../../.."), ("a/y/top", "/")]:
        os.symlink(to, root / at)
    for i in range(30):  # each leads to all: as many ways as 30! without care
        os.makedirs(root / f"b/{i}")
        for j in range(30):
            os.symlink(f"../{j}", root / f"b/{i}/to-{j}")
    os.symlink("loop", root / "loop")
    os.symlink("loop.jpg", root / "a" / "loop.jpg")
    names, scan = scan_folder(root)
    assert names == ["a/1.jpg", "a/loop.jpg", "a/x/2.jpg", "a/y/3.jpg", "b/4.jpg"]
    assert scan.class_names == ["a", "b"]
    assert list(scan.faults) == [1] and "loop.jpg: can't be read" in scan.faults[1].reason


def test_of_two_ways_to_a_folder_the_one_without_a_link_counts(tmp_path: Path):
    root = make(tmp_path, "a/z/1.jpg")
    os.symlink("z", root / "a" / "b")
    os.symlink("z", root / "a" / "zz")
    assert scan_folder(root)[0] == ["a/z/1.jpg"]


def test_what_can_t_be_opened_is_a_fault(tmp_path: Path):
    root = make(tmp_path, "a/1.jpg", "a/4.jpg")
    os.symlink("nowhere", root / "a" / "2.jpg")
    os.mkfifo(root / "a" / "3.jpg")
    os.truncate(root / "a" / "4.jpg", 1 << 31)  # a hole, which takes no room on the disk
    names, scan = scan_folder(root)
    assert names == ["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg"]
    assert scan.label.tolist() == [0, UNUSABLE, UNUSABLE, UNUSABLE] and scan.length.tolist() == [0] * 4
    assert [fault.kind for fault in scan.faults.values()] == ["record"] * 3
    for row, reason in enumerate(
        ("can't be read (No such file", "not a regular file", "2147483648 bytes, expected"), 1
    ):
        assert scan.faults[row].reason.startswith(f"{root / names[row]}: {reason}")


def test_folders_without_images_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no image in 0 sub-folders, expected files such as class/image.jpg"):
        scan_folder(make(tmp_path, "1.jpg"))
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no image in 1 sub-folders")):
        scan_folder(make(tmp_path, "a/1.txt"))
    with pytest.raises(DataError, match="absent: can't read the folder"):
        scan_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="1.jpg: can't read the folder"):
        scan_folder(tmp_path / "1.jpg")


def test_a_folder_that_is_closed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = make(tmp_path, "a/1.jpg", "b/c/2.jpg")

    def scandir(path: str | Path, opened=os.scandir):
        if str(path).endswith("b/c"):
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"b/c: can't read the folder \(Permission denied\)"):
        scan_folder(root)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("call", ["is_dir", "stat"])
def test_a_lack_of_the_machine_leaves_no_class_or_image_out(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir, name = os.scandir, "b" if call == "is_dir" else "2.jpg"

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path, self.is_symlink = entry.name, entry.path, entry.is_symlink
            self.is_dir, self.stat = entry.is_dir, entry.stat
            if entry.name == name:
                setattr(self, call, self.refuse)

        def refuse(self) -> None:
            raise OSError(number, os.strerror(number))

    @contextmanager
    def scan(path: str | Path) -> Iterator[list[Entry]]:
        with scandir(path) as entries:
            yield [Entry(entry) for entry in entries]

    monkeypatch.setattr("partial_fc.data.folder.os.scandir", scan)
    for number in (errno.ENOMEM, errno.ESTALE):
        with pytest.raises(MachineError, match=rf"/{name}: can't read the (folder|image) \({os.strerror(number)}\)"):
            scan_folder(tmp_path)
    number = errno.ELOOP
    names, _ = scan_folder(tmp_path)
    assert names == (["a/1.jpg"] if call == "is_dir" else ["a/1.jpg", "b/2.jpg"])


def test_names_that_are_no_text_can_be_opened(tmp_path: Path):
    root = make(tmp_path, "a/1.jpg")
    with open(os.path.join(os.fsencode(root), b"a", b"\xff.jpg"), "wb") as file:
        file.write(b"image")
    names, _ = scan_folder(root)
    assert (root / names[1]).read_bytes() == b"image"


def test_progress_is_told_in_classes(tmp_path: Path):
    root = make(tmp_path, *(f"{i}/{j}.jpg" for i in range(5) for j in range(3)))
    told: list[tuple[int, int]] = []
    _, scan = scan_folder(root, lambda done, total: told.append((done, total)))
    assert told == [(5, 5)] and np.bincount(scan.label).tolist() == [3] * 5
