from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from partial_fc.data import files as files_module
from partial_fc.data.files import MappedFiles, Names, map_file
from partial_fc.data.kept import keep_arrays, kept_array, kept_facts
from partial_fc.errors import DataError


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def write(folder: Path, count: int) -> list[str]:
    for number in range(count):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * (number + 1))
    return [f"{number}.bin" for number in range(count)]


def test_a_file_is_mapped_read_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    data = map_file(tmp_path / "a")
    assert data.dtype == np.uint8 and data.tobytes() == b"hello"
    assert not data.flags.writeable and not data.flags.owndata
    (tmp_path / "a").unlink()
    assert data[1:3].tobytes() == b"el"


def test_an_empty_file_is_an_empty_array(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert map_file(tmp_path / "a").shape == (0,)
    assert MappedFiles(tmp_path, ["a"]).bytes(0).shape == (0,)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/a: can't read the data set \(No such file.*data.path"):
        map_file(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a: can't read the data set \(No such file.*data.path"):
        MappedFiles(tmp_path, ["a"]).bytes(0)
    with pytest.raises(DataError, match=r"can't read the data set \(Is a directory"):
        map_file(tmp_path)


def test_too_many_open_files_have_their_own_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    write(tmp_path, 1)
    monkeypatch.setattr("partial_fc.data.files.mmap.mmap", refuse)
    with pytest.raises(DataError, match=r"0.bin: can't read the data set \(Too many open files\).*ulimit -n"):
        map_file(tmp_path / "0.bin")


def test_few_mappings_are_kept_and_views_outlive_them(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 20), most=3)
    before = descriptors()
    views = [files.bytes(file)[1:] for file in range(5)]
    assert descriptors() == before + 5
    assert [view.tobytes() for view in views] == [bytes([number]) * number for number in range(5)]
    del views
    assert descriptors() == before + 3
    for file in [*range(20), *range(20)]:
        assert files.bytes(file).tobytes() == bytes([file]) * (file + 1)
    assert descriptors() == before + 3


def test_the_files_used_last_stay_mapped(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 4), most=2)
    first = files.bytes(0)
    files.bytes(1)
    assert files.bytes(0) is first
    files.bytes(2)
    assert files.bytes(0) is first
    files.bytes(3)
    files.bytes(2)
    assert files.bytes(0) is not first


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 20))
    assert files.bytes(9).size == 10
    os.truncate(tmp_path / "9.bin", 4)
    with pytest.raises(DataError, match="9.bin: shrank from 10 to 4 bytes while in use: restore"):
        files.bytes(9)
    with open(tmp_path / "9.bin", "ab") as file:
        file.write(b"x" * 60)
    assert files.bytes(9).size == 10


@pytest.mark.timeout(60)
def test_threads_share_the_mappings(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 30), most=4)
    wrong: list[object] = []

    def read(seed: int) -> None:
        for file in np.random.default_rng(seed).integers(0, 30, 2000).tolist():
            data = files.bytes(file)
            if data.size != file + 1 or data[-1] != file:
                wrong.append(file)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files._open) <= 4


def test_names_are_what_was_packed() -> None:
    given = ["a/1.jpg", "", "b/ü.png", os.fsdecode(b"c/\xff.jpg"), "日本"]
    names = Names.of(given)
    assert len(names) == 5 and list(names) == given and names[-1] == "日本" and names[1:3] == given[1:3]
    assert "b/ü.png" in names and names.index("日本") == 4
    assert names.text.dtype == np.uint8 and names.ends.dtype == np.int64
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} of 5 names"):
            names[index]
    assert list(Names.of([])) == []


def test_arrays_are_kept_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for size in (3, 0, 5):
        keep_arrays(folder, {"a": np.arange(size), "b": np.zeros(size, dtype=np.uint8)}, {"size": size})
        assert kept_facts(folder) == {"size": size}
        a, b = kept_array(folder, "a", np.int64), kept_array(folder, "b", np.uint8)
        assert a.tolist() == list(range(size)) and b.tolist() == [0] * size
        assert type(a) is np.ndarray and not a.flags.writeable
    assert os.listdir(tmp_path) == ["kept"] and sorted(os.listdir(folder)) == ["a.npy", "b.npy", "table.json"]


def test_what_is_kept_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_arrays(tmp_path / "kept", {"a": np.arange(3)}, {"size": 3})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="No space left"):
            keep_arrays(tmp_path / name, {"a": np.arange(4)}, {"size": 4})
    assert os.listdir(tmp_path) == ["kept"] and kept_facts(tmp_path / "kept") == {"size": 3}


def test_damaged_arrays_are_value_errors(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep_arrays(folder, {"a": np.arange(3)}, {})
    whole = (folder / "a.npy").read_bytes()
    for damaged in (b"", whole[:9], whole[:60], whole[:-1], b"x" + whole[1:], whole.replace(b"'<i8'", b"'|O' ")):
        (folder / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError):
            kept_array(folder, "a", np.int64)
    (folder / "a.npy").write_bytes(whole)
    with pytest.raises(ValueError, match=r"a.npy: int64 \(3,\), expected int32"):
        kept_array(folder, "a", np.int32)
    with pytest.raises(FileNotFoundError):
        kept_array(folder, "b", np.int32)


@pytest.mark.timeout(60)
def test_several_may_keep_arrays_in_one_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module.os, "fsync", lambda descriptor: None)
    failed: list[BaseException] = []

    def keep(number: int) -> None:
        try:
            for _ in range(30):
                keep_arrays(tmp_path / "kept", {"a": np.full(5, number)}, {"number": number})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and os.listdir(tmp_path) == ["kept"]
    assert kept_array(tmp_path / "kept", "a", np.int64).tolist() == [kept_facts(tmp_path / "kept")["number"]] * 5
