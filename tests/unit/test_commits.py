"""Commits: how they come to be, which one is taken, which go. Mutations of whole ones are in test_commit_mutations."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.checkpoint import durable, marker
from partial_fc.checkpoint.commits import (
    Commit,
    FileSum,
    begin,
    clean,
    discard_after,
    list_commits,
    newest_commit,
    prune,
    read_commit,
    seal,
    step_of,
    sum_files,
)
from partial_fc.errors import CheckpointError, ConfigError


def info_of(step: int, **others: Any) -> dict[str, Any]:
    known = {"format": 1, "step": step, "samples": 20 * step, "num_classes": 7, "embedding_size": 4}
    return {**known, "contents": ["backbone", "head"], "accuracy": None, **others}


def make(root: Path, step: int, content: bytes = b"rows", target: Path | None = None, **others: Any) -> Path:
    """A commit with two files."""
    partial = begin(root, step)
    (partial / ".metadata").write_bytes(b"names of %d" % step)
    (partial / "__0_0.distcp").write_bytes(content)
    return seal(partial, info_of(step, **others), sum_files(partial, [".metadata", "__0_0.distcp"]), target)


def rename_info(folder: Path, **changes: Any) -> None:
    """Change ``run.json`` and its sums, as if the commit had been written so."""
    info = json.loads((folder / "run.json").read_text())
    info = {key: value for key, value in {**info, **changes}.items() if value is not ...}
    (folder / "run.json").write_text(json.dumps(info))
    sums = sum_files(folder, ["run.json", ".metadata", "__0_0.distcp"])
    (folder / "commit.json").write_bytes(marker.marker_of(sums))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def never(line: str) -> None:
    raise AssertionError(f"refused: {line}")


def test_a_commit_holds_the_files_and_what_vouches_for_them(tmp_path: Path) -> None:
    folder = make(tmp_path / "runs" / "a" / "checkpoints", 40, accuracy=0.5)
    assert folder == tmp_path / "runs" / "a" / "checkpoints" / "step-00000040"
    assert names(folder) == [".metadata", "__0_0.distcp", "commit.json", "run.json"] and names(folder.parent) == [
        folder.name
    ]
    marker = json.loads((folder / "commit.json").read_text())
    assert marker["format"] == 1 and sorted(marker["files"]) == [".metadata", "__0_0.distcp", "run.json"]
    assert marker["files"]["__0_0.distcp"]["size"] == 4
    commit = read_commit(folder)
    assert commit == Commit(folder, info_of(40, accuracy=0.5)) and commit.step == 40
    assert newest_commit(folder.parent, never) == commit


def test_sums_of_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "long").write_bytes(b"a" * (durable._BLOCK + 1))
    sums = sum_files(tmp_path, ["empty", "abc", "long"])
    # The examples of FIPS 180-4 and its companion.
    assert sums["abc"] == FileSum(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert sums["empty"] == FileSum(0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert sums["long"].size == durable._BLOCK + 1
    with pytest.raises(FileNotFoundError, match="gone"):
        sum_files(tmp_path, ["gone"])


def test_nothing_has_the_name_before_everything_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append(("rename", str(target)))
        real_rename(source, target)

    root = tmp_path / "new" / "checkpoints"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    partial = begin(root, 3)
    assert done == [("sync", str(tmp_path / "new")), ("sync", str(tmp_path))]
    (partial / "b").write_bytes(b"b")
    (partial / "a").write_bytes(b"a")
    sums = sum_files(partial, ["a", "b"])
    done.clear()
    folder = seal(partial, info_of(3), sums)
    files = [("sync", str(partial / name)) for name in ("a", "b", "run.json", "commit.json")]
    assert done == [*files, ("sync", str(partial)), ("rename", str(folder)), ("sync", str(root))]


def test_a_writer_brings_its_files_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (tmp_path / "a").write_bytes(b"a")
    sum_files(tmp_path, ["a"])
    assert synced == [str(tmp_path / "a")]


@pytest.mark.parametrize("fails", range(6))
def test_a_full_disk_comes_out_with_a_file_name_and_makes_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    make(tmp_path, 1)
    partial = begin(tmp_path, 2)
    (partial / "a").write_bytes(b"a")
    sums = sum_files(partial, ["a"])
    calls = iter(range(100))

    def sync(descriptor: int) -> None:
        if next(calls) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    if fails < 5:
        with pytest.raises(OSError, match=r"No space left on device: '.+'") as failed:
            seal(partial, info_of(2), sums)
        expected = [partial / "a", partial / "run.json", partial / "commit.json", partial, tmp_path]
        assert failed.value.filename == str(expected[fails])
    else:
        seal(partial, info_of(2), sums)
    monkeypatch.undo()
    # The last sync comes after the rename: what has the name is whole.
    newest = newest_commit(tmp_path, never)
    assert newest is not None and newest.step == (1 if fails < 4 else 2)
    assert make(tmp_path, 2) == tmp_path / "step-00000002" and read_commit(tmp_path / "step-00000002").step == 2
    clean(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_file_system_without_fsync_of_folders_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    assert read_commit(make(tmp_path / "new", 2)).step == 2


def test_begin_says_which_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        begin(tmp_path / "file" / "checkpoints", 1)


def test_files_that_are_not_the_summed_ones_make_no_commit(tmp_path: Path) -> None:
    partial = begin(tmp_path, 1)
    (partial / "a").write_bytes(b"a")
    sums = sum_files(partial, ["a"])
    (partial / "b").write_bytes(b"b")
    for wrong, why in (
        (sums, "b is not part of it"),
        ({}, "a and 1 more are not part of it"),
        ({**sums, "b": FileSum(2, "0" * 64)}, "b has 1 bytes, expected 2"),
        ({**sums, "b": FileSum(1, "0" * 64), "c": FileSum(1, "0" * 64)}, "c is missing"),
        ({**sums, "run.json": FileSum(1, "0" * 64)}, "the sums name run.json or commit.json"),
    ):
        with pytest.raises(CheckpointError, match=f"{partial.name}: {why}.*: the commit is not made, save again"):
            seal(partial, info_of(1), wrong)
    assert list_commits(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, r"run.json has format 2, newer than format 1 of this version: update partial_fc"),
        ({"format": "1"}, r"run.json has format '1', expected 1"),
        ({"format": ...}, r"run.json has format None, expected 1"),
        ({"step": ...}, r"run.json has step None, expected a whole number of at least 0"),
        ({"step": True}, r"run.json has step True, expected"),
        ({"step": 2.0}, r"run.json has step 2.0, expected"),
        ({"samples": -1}, r"run.json has samples -1, expected"),
        ({"num_classes": 0}, r"run.json has num_classes 0, expected a whole number of at least 1"),
        ({"embedding_size": "4"}, r"run.json has embedding_size '4', expected"),
        ({"contents": "head"}, r"run.json has contents 'head', expected a list of names"),
        ({"contents": [1]}, r"run.json has contents \[1\], expected a list of names"),
        ({"step": 3}, r"run.json says step 3, expected step 2 as in the folder's name"),
    ],
)
def test_run_json_has_what_the_loader_needs(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    rename_info(folder, **changes)
    with pytest.raises(CheckpointError, match=f"step-00000002: {why}.*: it can't be used, take another commit$"):
        read_commit(folder)
    lines: list[str] = []
    newest = newest_commit(tmp_path, lines.append)
    assert newest is not None and newest.step == 1 and len(lines) == 1
    if "step" not in changes or not isinstance(changes["step"], int) or changes["step"] is True:
        partial = begin(tmp_path, 4)
        info = {key: value for key, value in {**info_of(4), **changes}.items() if value is not ...}
        with pytest.raises(CheckpointError, match=why.replace("folder's", ".*")):
            seal(partial, info, {})


def test_the_name_of_a_commit_elsewhere_is_free(tmp_path: Path) -> None:
    folder = make(tmp_path, 2, target=tmp_path / "extended")
    assert folder == tmp_path / "extended" and read_commit(folder).step == 2 and names(tmp_path) == ["extended"]
    with pytest.raises(CheckpointError, match="extended: is there already, expected the name of a new commit"):
        make(tmp_path, 2, target=folder)
    with pytest.raises(CheckpointError, match=r"nothing: can't be read \(No such file or directory\)"):
        read_commit(tmp_path / "nothing")


def test_a_second_attempt_at_a_step_leaves_the_first(tmp_path: Path) -> None:
    make(tmp_path, 2, b"first")
    folder = make(tmp_path, 2, b"other")
    assert (folder / "__0_0.distcp").read_bytes() == b"first" and names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("instead", ["flipped", "empty", "file", "link"])
def test_a_second_attempt_at_a_step_replaces_what_is_not_usable(tmp_path: Path, instead: str) -> None:
    elsewhere = make(tmp_path / "elsewhere", 2, b"kept")
    folder = make(tmp_path / "here", 2, b"first")
    if instead == "flipped":
        (folder / "__0_0.distcp").write_bytes(b"fIrst")
    else:
        shutil.rmtree(folder)
        {"empty": folder.mkdir, "file": folder.touch, "link": lambda: folder.symlink_to(elsewhere)}[instead]()
    assert make(tmp_path / "here", 2, b"other") == folder and read_commit(folder).step == 2
    assert (folder / "__0_0.distcp").read_bytes() == b"other" and names(tmp_path / "here") == ["step-00000002"]
    assert read_commit(elsewhere).step == 2, "what the link led to was touched"


def test_the_parts_together_verify_everything_and_each_checks_names_and_run_json(tmp_path: Path) -> None:
    partial = begin(tmp_path, 2)
    files = [f"__{rank}_0.distcp" for rank in range(5)]
    for name in files:
        (partial / name).write_bytes(name.encode())
    folder = seal(partial, info_of(2), sum_files(partial, files))
    for name in files:
        (folder / name).write_bytes(name.encode()[::-1])
        for parts in (1, 2, 3, 9):
            failed = 0
            for part in range(parts):
                try:
                    read_commit(folder, part=part, parts=parts)
                except CheckpointError as error:
                    assert f"{name} isn't what was written" in str(error)
                    failed += 1
            assert failed == 1
        (folder / name).write_bytes(name.encode())
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace("40", "41"))
    for part in range(9):
        with pytest.raises(CheckpointError, match=r"run.json isn't what was written: it has SHA-256 \w{12}\.\.\."):
            read_commit(folder, part=part, parts=9)


@pytest.mark.parametrize(
    "passing",
    ["EMFILE", "ENFILE", "ENOMEM", "EINTR", "EAGAIN", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNABORTED"]
    + ["ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH"],
)
def test_a_machine_in_trouble_says_nothing_about_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passing: str
) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    code = getattr(errno, passing)

    def fail(path: Path, **options: Any) -> tuple[int, str]:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(marker, "sum_file", fail)
    with pytest.raises(OSError, match="run.json"):
        newest_commit(tmp_path, never)
    with pytest.raises(OSError, match="run.json"):
        read_commit(tmp_path / "step-00000002")
    assert prune(tmp_path, keep_last=1, keep_best=False) == []
    monkeypatch.undo()
    assert newest_commit(tmp_path, never) == read_commit(tmp_path / "step-00000002")


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_cant_be_read_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    failures = iter([OSError(errno.EIO, "Input/output error", str(folder / "__0_0.distcp"))] * times)

    def read(path: Path, **options: Any) -> tuple[int, str]:
        if path == folder / "__0_0.distcp" and (failure := next(failures, None)):
            raise failure
        return durable.sum_file(path, **options)

    monkeypatch.setattr(marker, "sum_file", read)
    lines: list[str] = []
    commit = newest_commit(tmp_path, lines.append)
    assert commit is not None and commit.step == (2 if times == 1 else 1)
    why = "__0_0.distcp can't be read (Input/output error): it is not used, the previous commit is"
    assert lines == ([] if times == 1 else [f"{folder}: {why}"])


@pytest.mark.parametrize("code", [errno.EHOSTUNREACH, errno.ESTALE, errno.ECONNRESET, errno.EIO])
def test_a_second_attempt_leaves_what_cant_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = make(tmp_path, 2, b"first")
    failures = iter([OSError(code, os.strerror(code), str(folder / "__0_0.distcp"))])

    def read(path: Path, **options: Any) -> tuple[int, str]:
        if path == folder / "__0_0.distcp" and (failure := next(failures, None)):
            raise failure
        return durable.sum_file(path, **options)

    monkeypatch.setattr(marker, "sum_file", read)
    if code == errno.EIO:
        assert make(tmp_path, 2, b"other") == folder
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            make(tmp_path, 2, b"other")
    assert (folder / "__0_0.distcp").read_bytes() == b"first" and read_commit(folder).step == 2
    clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_commits_by_name_newest_first(tmp_path: Path) -> None:
    assert list_commits(tmp_path / "nothing") == []
    for name in ("step-00000009", "step-00000010", "step-100000000", "step-99999999", "step-00000000"):
        (tmp_path / name).mkdir()
    strange = ["step-9", "step-000000011", "step-0000001a", "step-00000012 ", "step--0000001", "xstep-00000001"]
    for name in [
        *strange,
        "step-00000013.bak",
        ".step-00000014-00c0ffee.partial",
        "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661",
    ]:
        (tmp_path / name).mkdir()
    found = [folder.name for folder in list_commits(tmp_path)]
    assert found == ["step-100000000", "step-99999999", "step-00000010", "step-00000009", "step-00000000"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        list_commits(tmp_path / "file")


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    accuracies = {10: None, 20: 0.9, 30: 0.9, 40: float("nan"), 50: 0.5, 60: float("nan")}
    for step, accuracy in accuracies.items():
        make(tmp_path, step, accuracy=accuracy)
    assert [path.name for path in prune(tmp_path, keep_last=2, keep_best=True)] == [
        "step-00000040",
        "step-00000020",
        "step-00000010",
    ]
    assert names(tmp_path) == ["step-00000030", "step-00000050", "step-00000060"]
    assert prune(tmp_path, keep_last=2, keep_best=True) == []
    assert prune(tmp_path, keep_last=1, keep_best=False) == [tmp_path / "step-00000050", tmp_path / "step-00000030"]
    assert prune(tmp_path, keep_last=3, keep_best=False) == [] and names(tmp_path) == ["step-00000060"]
    with pytest.raises(ConfigError, match="keep_last is 0, expected at least 1"):
        prune(tmp_path, keep_last=0, keep_best=True)
    assert prune(tmp_path / "nothing", keep_last=1, keep_best=True) == []


def test_an_unusable_commit_is_not_one_of_those_kept(tmp_path: Path) -> None:
    folders = {step: make(tmp_path, step) for step in (10, 20, 30, 40, 50, 60)}
    for step in (60, 40, 10):
        (folders[step] / "__0_0.distcp").write_bytes(b"")
    assert prune(tmp_path, keep_last=2, keep_best=False) == [folders[20], folders[10]]
    # 60 and 40 are newer than 30, the oldest that is kept: they stay to be looked at.
    assert [folder for folder in folders.values() if folder.exists()] == [folders[step] for step in (30, 40, 50, 60)]
    assert prune(tmp_path, keep_last=3, keep_best=False) == []


def test_what_is_no_folder_of_ours_is_not_touched(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", 1)
    root = tmp_path / "checkpoints"
    make(root, 60)
    (root / "step-00000001").symlink_to(elsewhere)
    (root / "step-00000002").write_text("a note")
    (root / ".step-00000004-00c0ffee.partial").symlink_to(elsewhere)
    (root / ".step-00000005-00c0ffee.partial").write_text("a note")
    for name in ("best", "step-00000003.bak", ".step-00000003-notours.partial", ".step-3-00c0ffee.partial", ".cache"):
        (root / name).mkdir()
    before = names(root)
    assert prune(root, keep_last=1, keep_best=True) == []
    clean(root)
    assert names(root) == before and read_commit(elsewhere).step == 1


def test_cleaning_removes_what_was_left_unfinished(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (begin(tmp_path, 2) / "half").write_bytes(b"half")
    (tmp_path / ".step-00000001-00c0ffee.removed" / "deep").mkdir(parents=True)
    clean(tmp_path)
    assert names(tmp_path) == ["step-00000001"]
    clean(tmp_path)
    clean(tmp_path / "nothing")


def test_what_can_not_be_removed_stays_and_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {step: make(tmp_path, step) for step in (1, 2, 3)}
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == folders[2]:
            raise OSError(errno.EROFS, "Read-only file system", str(source))
        if source == folders[1]:
            shutil.rmtree(source)  # another process was faster
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert prune(tmp_path, keep_last=1, keep_best=False) == []
    assert names(tmp_path) == ["step-00000002", "step-00000003"] and read_commit(folders[2]).step == 2


def test_a_removal_that_is_cut_off_leaves_no_half_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (path / "commit.json").unlink())
    assert prune(tmp_path, keep_last=1, keep_best=False) == [tmp_path / "step-00000001"]
    assert list_commits(tmp_path) == [tmp_path / "step-00000002"] and len(names(tmp_path)) == 2
    monkeypatch.undo()
    clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_what_came_after_a_step_is_discarded_whether_usable_or_not(tmp_path: Path) -> None:
    folders = {step: make(tmp_path, step, accuracy=step / 100) for step in (0, 10, 20, 30, 40)}
    (folders[40] / "run.json").unlink()
    (tmp_path / "step-00000050").write_text("a note")
    assert discard_after(tmp_path, 10) == [folders[40], folders[30], folders[20]]
    assert names(tmp_path) == ["step-00000000", "step-00000010", "step-00000050"]
    assert discard_after(tmp_path, 10) == [] and discard_after(tmp_path / "nothing", 1) == []
    # The second history has its own commit of a step that the first had.
    assert (make(tmp_path, 20, b"anew") / "__0_0.distcp").read_bytes() == b"anew"
    assert [step_of(folder) for folder in list_commits(tmp_path)] == [50, 20, 10, 0] and step_of(tmp_path) is None


def test_a_later_commit_that_can_not_be_discarded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {step: make(tmp_path, step) for step in (1, 2, 3)}
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == folders[2]:
            raise OSError(errno.EROFS, "Read-only file system", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Read-only file system: .*step-00000002"):
        discard_after(tmp_path, 1)
    assert list_commits(tmp_path) == [folders[2], folders[1]]


@given(
    st.dictionaries(st.integers(0, 30), st.tuples(st.booleans(), st.sampled_from([None, 0.1, 0.2])), max_size=8),
    st.integers(1, 4),
    st.booleans(),
)
def test_pruning_by_its_definition(
    tmp_path_factory: pytest.TempPathFactory, steps: dict[int, tuple[bool, float | None]], last: int, best: bool
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    for step, (usable, accuracy) in steps.items():
        folder = make(root, step, accuracy=accuracy)
        if not usable:
            (folder / ".metadata").unlink()
    good = sorted((step for step in steps if steps[step][0]), reverse=True)
    kept = set(steps)
    if len(good) >= last:
        kept = {step for step in steps if step >= good[last - 1]}
        measured = [(steps[step][1], step) for step in good if steps[step][1] is not None]
        if best and measured:
            kept.add(max(measured)[1])
    gone = prune(root, keep_last=last, keep_best=best)
    assert [folder.name for folder in gone] == [f"step-{step:08d}" for step in sorted(set(steps) - kept, reverse=True)]
    assert names(root) == [f"step-{step:08d}" for step in sorted(kept)]
