from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from partial_fc.data import files as files_module
from partial_fc.data.files import MachineError, MappedFiles, Mappings, find_files, map_file, unreadable
from partial_fc.data.kept import keep_arrays, kept_array, kept_facts
from partial_fc.data.table import Names
from partial_fc.errors import DataError


def mapped(folder: Path) -> int:
    """Mappings of files below a folder that this process has."""
    return Path("/proc/self/maps").read_text().count(f" {folder}/")


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


def test_a_lack_of_the_machine_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    for number, remedy in (
        (errno.EMFILE, r"\(Too many open files\): raise the limit of open files \(ulimit -n\), or lower data.readers"),
        (errno.ENFILE, r"\(Too many open files in system\): raise the machine's limit .*fs.file-max"),
        (errno.ENOMEM, r"\(Cannot allocate memory\): free memory, .*vm.max_map_count"),
        (errno.ESTALE, r"\(Stale file handle\): the file system doesn't answer"),
    ):

        def refuse(*args: object, number: int = number, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(files_module.mmap, "mmap", refuse)
            for read in (lambda: map_file(tmp_path / "0.bin"), lambda: MappedFiles(tmp_path, ["0.bin"]).bytes(0)):
                with pytest.raises(MachineError, match=f"/0.bin: can't read the data set {remedy}"):
                    read()
    for number in (errno.EIO, errno.EACCES, errno.ENOENT):
        error = unreadable("x", "the image", OSError(number, os.strerror(number)), "copy it again")
        assert (
            type(error) is DataError and str(error) == f"x: can't read the image ({os.strerror(number)}): copy it again"
        )


def test_few_mappings_are_kept_and_views_outlive_them(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 20), Mappings(3))
    views = [files.bytes(file)[1:] for file in range(5)]
    assert mapped(tmp_path) == 5
    assert [view.tobytes() for view in views] == [bytes([number]) * number for number in range(5)]
    del views
    assert mapped(tmp_path) == 3
    for file in [*range(20), *range(20)]:
        assert files.bytes(file).tobytes() == bytes([file]) * (file + 1)
    assert mapped(tmp_path) == 3


def test_the_files_used_last_stay_mapped(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 4), Mappings(2))
    first = files.bytes(0)
    files.bytes(1)
    assert files.bytes(0) is first
    files.bytes(2)
    assert files.bytes(0) is first
    files.bytes(3)
    files.bytes(2)
    assert files.bytes(0) is not first


def test_data_sets_share_the_mappings(tmp_path: Path) -> None:
    mappings = Mappings(4)
    names = write(tmp_path, 20)
    one, other = (MappedFiles(tmp_path, names, mappings) for _ in range(2))
    for file in range(20):
        assert one.bytes(file)[-1] == other.bytes(file)[-1] == file
        assert mapped(tmp_path) <= 4
    assert len(one.mapped) == len(other.mapped) == 2
    assert MappedFiles(tmp_path, names).mappings is MappedFiles(tmp_path, names).mappings
    del one
    gc.collect()
    assert mapped(tmp_path) == 2
    for file in range(20):
        other.bytes(file)
    assert mapped(tmp_path) == 4


def test_of_two_threads_that_map_a_file_at_once_both_get_one_mapping(tmp_path: Path) -> None:
    mappings = Mappings(4)
    files = MappedFiles(tmp_path, write(tmp_path, 1), mappings)
    first, second = map_file(tmp_path / "0.bin"), map_file(tmp_path / "0.bin")
    assert mappings.keep(files, 0, first) is mappings.keep(files, 0, second) is files.bytes(0) is first


def test_mappings_are_crowded_where_data_sets_have_more_files_than_are_kept(tmp_path: Path) -> None:
    mappings = Mappings(4)
    names = write(tmp_path, 5)
    one, other = MappedFiles(tmp_path, names[:2], mappings), MappedFiles(tmp_path, names[:3], mappings)
    for _ in range(2):
        assert not mappings.crowded(one)
    assert mappings.crowded(other) and mappings.crowded(one)
    del other
    gc.collect()
    third = MappedFiles(tmp_path, names[:2], mappings)
    assert not mappings.crowded(third)
    assert MappedFiles(tmp_path, names, mappings).bytes(0).size == 1 and mappings.crowded(one)


def test_as_many_mappings_are_kept_as_the_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((1, 1), (256, 64), (1024, 256), (10**6, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(files_module.resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        monkeypatch.setattr(files_module, "_UNTRACKED", False)
        assert Mappings().most == most
        monkeypatch.setattr(files_module, "_UNTRACKED", True)
        assert Mappings().most == 4096


def test_where_python_can_a_mapping_takes_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    real, given = mmap.mmap, []

    def record(*args: object, trackfd: bool = True, **options: object) -> mmap.mmap:
        given.append(trackfd)
        return real(*args, **options)

    monkeypatch.setattr(files_module.mmap, "mmap", record)
    for untracked in (False, True):
        monkeypatch.setattr(files_module, "_UNTRACKED", untracked)
        assert map_file(tmp_path / "0.bin").tobytes() == b"\0"
    assert given == [True, False]


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, write(tmp_path, 20))
    assert files.bytes(9).size == 10
    os.truncate(tmp_path / "9.bin", 4)
    with pytest.raises(DataError, match="9.bin: shrank from 10 to 4 bytes while in use: restore"):
        files.bytes(9)
    with open(tmp_path / "9.bin", "ab") as file:
        file.write(b"x" * 60)
    assert files.bytes(9).size == 10
    (tmp_path / "9.bin").unlink()
    assert files.bytes(9).tobytes()[:4] == bytes([9]) * 4


@pytest.mark.timeout(60)
def test_threads_share_the_mappings(tmp_path: Path) -> None:
    mappings, names = Mappings(4), write(tmp_path, 30)
    sets = [MappedFiles(tmp_path, names, mappings) for _ in range(2)]
    wrong: list[object] = []

    def read(seed: int) -> None:
        for file in np.random.default_rng(seed).integers(0, 30, 2000).tolist():
            data = sets[(file + seed) % 2].bytes(file)
            if data.size != file + 1 or data[-1] != file:
                wrong.append(file)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and mapped(tmp_path) == 4


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


def test_small_arrays_that_are_kept_take_no_descriptor(tmp_path: Path) -> None:
    keep_arrays(tmp_path / "kept", {"small": np.arange(100), "large": np.arange(1 << 18)}, {})
    before = descriptors()
    small = kept_array(tmp_path / "kept", "small", np.int64)
    assert descriptors() == before and small.tolist() == list(range(100)) and not small.flags.writeable
    large = kept_array(tmp_path / "kept", "large", np.int64)
    assert mapped(tmp_path) == 1 and large[-1] == (1 << 18) - 1


def test_parts_of_a_pattern_that_exist_are_taken_as_they_are(tmp_path: Path) -> None:
    for folder in ("g[1]", "g1", "a{b}", "x/*"):
        (tmp_path / folder).mkdir(parents=True)
        for shard in range(2):
            (tmp_path / folder / f"t-{shard}.tar").write_bytes(b"")
    (tmp_path / "g1" / "u[0].tar").write_bytes(b"")
    (tmp_path / "g1" / "u0.tar").write_bytes(b"")

    def found(pattern: str) -> tuple[Path, list[str]]:
        files = find_files(tmp_path / pattern, "auto")
        return files.root, files.names

    both = ["t-0.tar", "t-1.tar"]
    assert found("g[1]/t-*.tar") == (tmp_path / "g[1]", both)
    assert found("g[1]/t-{0..1}.tar") == (tmp_path / "g[1]", both)
    assert found("a{b}/t-*.tar") == (tmp_path / "a{b}", both)
    assert found("*/t-1.tar") == (tmp_path, ["a{b}/t-1.tar", "g1/t-1.tar", "g[1]/t-1.tar"])
    assert found("x/*/t-*.tar") == (tmp_path / "x" / "*", both)
    assert found("*1*/u[0].tar") == (tmp_path, ["g1/u[0].tar"])
    assert found("g[0-9]/u*.tar") == (tmp_path, ["g1/u0.tar", "g1/u[0].tar"])
    assert found("{g[1],g1}/t-0.tar") == (tmp_path, ["g1/t-0.tar", "g[1]/t-0.tar"])
    for missing in ("g[1]/none.tar", "g[1]/n-*.tar", "g[1]/none/t-*.tar"):
        with pytest.raises(DataError, match=r"/g\[1\]/n.*tar: there is no such file, and 1 of the 1"):
            found(missing)
    names = ",".join(f"{number:060}" for number in range(6))
    with pytest.raises(DataError, match="000.tar: there is no such file, and 6 of the 6"):
        found(f"{{{names}}}.tar")


def test_the_home_folder_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "a.tar").write_bytes(b"")
    for path in ("~/faces", "~/faces/a.tar", "~/faces/*.tar", Path("~/faces")):
        found = find_files(path, "auto")
        assert found.root == tmp_path / "faces" and found.names == ["a.tar"]
    with pytest.raises(DataError, match=f"{tmp_path}/none: can't read"):
        find_files("~/none", "auto")
