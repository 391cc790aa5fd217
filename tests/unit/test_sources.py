from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.files import MappedFiles
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE, Fault, Names, Scan
from partial_fc.errors import ConfigError, DataError
from tests import formats, records


def archive(root: Path, labels: list[int], num_classes: int | None = None) -> Archive:
    """Image i is ``<folder>-i``; a label of -1 makes a fault."""
    images = [f"{root.name}-{number}".encode() for number in range(len(labels))]
    return open_archive(records.write_new(root, images, labels), num_classes=num_classes)


def three(root: Path) -> list[Archive]:
    return [
        archive(root / "a", [0, 1, 1]),
        archive(root / "b", [2, -1, 0, 0], num_classes=5),
        archive(root / "c", [0]),
    ]


def test_samples_are_put_one_behind_the_other(tmp_path: Path) -> None:
    sources = Sources(three(tmp_path))
    assert len(sources) == 8 and sources.sizes == [3, 4, 1]
    ids = np.array([7, 0, 3, 2, 6, 0])
    assert [image.tobytes() for image in sources.encoded(ids)] == [b"c-0", b"a-0", b"b-0", b"a-2", b"b-3", b"a-0"]
    assert sources.lengths(ids).tolist() == [3] * 6
    assert sources.encoded(np.array([], dtype=np.int64)) == []
    assert sources.labels(np.array([], dtype=np.int64)).tolist() == []


def test_classes_are_told_apart(tmp_path: Path) -> None:
    sources = Sources(three(tmp_path))
    assert sources.num_classes == 2 + 5 + 1
    labels = [0, 1, 1, 4, UNUSABLE, 2, 2, 7]
    assert sources.all_labels().tolist() == labels and sources.labels(np.arange(8)).tolist() == labels
    assert sources.labels(np.array([7, 4, 0])).tolist() == [7, UNUSABLE, 0]
    assert sources.labels(np.arange(8)).dtype == sources.all_labels().dtype == np.int64


def test_classes_are_merged(tmp_path: Path) -> None:
    sources = Sources(three(tmp_path), merge_classes=True)
    assert sources.num_classes == 5
    labels = [0, 1, 1, 2, UNUSABLE, 0, 0, 0]
    assert sources.all_labels().tolist() == labels and sources.labels(np.arange(8)).tolist() == labels


def test_one_archive_is_as_it_is(tmp_path: Path) -> None:
    only = archive(tmp_path / "b", [2, -1, 0, 0])
    for merge in (False, True):
        sources = Sources([only], merge_classes=merge)
        assert sources.path == only.path and sources.num_classes == 3 and sources.sizes == [4]
        assert sources.all_labels() is only.all_labels()
        assert sources.locate(1) == only.locate(1) and sources.fault(1) == only.fault(1)
        assert sources.encoded(np.array([3]))[0].tobytes() == b"b-3"


def test_messages_name_the_archive(tmp_path: Path) -> None:
    data = bytearray(records.write_new(tmp_path / "d", [b"1234"] * 2, [0, 0]).joinpath("train.rec").read_bytes())
    data[36] = 0
    (tmp_path / "d" / "train.rec").write_bytes(data)
    sources = Sources([*three(tmp_path), open_archive(tmp_path / "d")])
    assert str(sources.path) == f"{tmp_path}/a/train.rec and 3 more"
    assert sources.locate(0) == f"{tmp_path}/a/train.rec, byte 32"
    assert sources.locate(7) == f"{tmp_path}/c/train.rec, byte 32"
    fault = sources.fault(4)
    assert fault is not None and fault.kind == "label" and fault.reason.startswith(f"{tmp_path}/b/train.rec: byte 36: ")
    assert [sample for sample in range(10) if sources.fault(sample)] == [4, 9]
    with pytest.raises(DataError, match=r"sample 1 can't be used: .*/d/train.rec: byte 36: no record starts there"):
        sources.encoded(np.array([0, 9]))


def test_ids_out_of_range(tmp_path: Path) -> None:
    sources = Sources(three(tmp_path))
    for ids in ([-1], [8], [0, 8]):
        for read in (sources.encoded, sources.labels, sources.lengths):
            with pytest.raises(IndexError, match=r"\[0, 8\)"):
                read(np.array(ids))
    for sample in (-1, 8):
        for ask in (sources.fault, sources.locate):
            with pytest.raises(IndexError, match=r"\[0, 8\)"):
                ask(sample)
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        Sources(three(tmp_path)[:1]).encoded(np.array([3]))


def test_no_archive_is_refused() -> None:
    with pytest.raises(ConfigError, match="no data set is given"):
        Sources([])


def test_data_sets_in_several_places_are_named_by_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [archive(Path(name), [0]) for name in ("a", "b")]
    assert Sources(parts[:1]).path == Path("a/train.rec")
    assert str(Sources(parts).path) == "a/train.rec and 1 more"


def test_names_of_classes_are_joined(tmp_path: Path) -> None:
    def named(folder: str, classes: list[str], num_classes: int | None = None) -> Archive:
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name / "1.jpg").write_bytes(b"x")
        return open_archive(tmp_path / folder, num_classes=num_classes)

    parts = [named("one", ["a", "b"]), named("two", ["c"]), named("three", ["d", "e", "f"])]
    names = Sources(parts).class_names
    assert names is not None and len(names) == 6 and list(names) == ["a", "b", "c", "d", "e", "f"]
    assert names[-1] == "f" and names[-6] == "a" and names[1:4] == ["b", "c", "d"]
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"index {index} of 6 names"):
            names[index]
    for sample, label in enumerate(Sources(parts).all_labels()):
        assert f"/{names[label]}/" in Sources(parts).locate(sample)
    for merge in (False, True):
        assert Sources(parts[:1], merge_classes=merge).class_names is parts[0].class_names
    assert Sources(parts, merge_classes=True).class_names is None
    assert Sources([parts[0], archive(tmp_path / "nameless", [0])]).class_names is None
    assert Sources([named("two", ["c"], num_classes=5), parts[0]]).class_names is None


@pytest.mark.parametrize("merge", [True, False])
def test_more_classes_than_there_can_be_are_refused(merge: bool, tmp_path: Path) -> None:
    def of(*counts: int) -> list[Archive]:
        return [archive(tmp_path / f"{number}", [0], count) for number, count in enumerate(counts)]

    most = 2**40
    assert Sources(of(1, most - 1), merge_classes=merge).num_classes == (most - 1 if merge else most)
    assert Sources(of(most), merge_classes=merge).labels(np.array([0])).tolist() == [0]
    for counts in ((2**40 + 1,), (3, 2**63 - 1, 5)):
        total = max(counts) if merge else sum(counts)
        message = (
            rf"^{tmp_path}/{len(counts) // 2}/train.rec has {max(counts)} classes, so .* {total} classes in all, "
            r"expected at most 2\*\*40: correct num_classes"
        )
        with pytest.raises(ConfigError, match=message):
            Sources(of(*counts), merge_classes=merge)
    if merge:
        assert Sources(of(most, most), merge_classes=True).num_classes == most
    else:
        with pytest.raises(ConfigError, match=f"/0/train.rec has {most} classes, .* {2 * most} classes in all"):
            Sources(of(most, most))


@pytest.mark.parametrize("label", [2**40, 2**61, 2**63 - 1])
def test_a_sample_with_a_mad_label_is_named(label: int, tmp_path: Path) -> None:
    members = [member for number in range(4) for member in ((f"{number}.jpg", b"x"), (f"{number}.cls", b"%d" % number))]
    members[5] = ("2.cls", b"%d" % label)
    (tmp_path / "a.tar").write_bytes(formats.tar(members))
    mad, good = open_archive(tmp_path / "a.tar"), archive(tmp_path / "b", [0, 1])
    for parts in ([mad], [good, mad]):
        with pytest.raises(
            ConfigError,
            match=rf"^sample 2 \({tmp_path}/a.tar, byte 4608\) has the label {label}, so that there are "
            rf"{label + 1 + (2 if len(parts) > 1 else 0)} classes in all, expected at most 2\*\*40: correct the label",
        ):
            Sources(parts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_agree_with_the_archives_one_by_one(data: st.DataObject, tmp_path: Path) -> None:
    names = []
    for number, sizes in enumerate(
        data.draw(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4))
    ):
        names.append((f"{number}", sizes))
    parts = []
    for name, lengths in names:
        (tmp_path / name).write_bytes(bytes(range(100)))
        count = len(lengths)
        label = np.array([data.draw(st.integers(UNUSABLE, 4)) for _ in range(count)], dtype=np.int64)
        table = Scan(
            file=np.zeros(count, dtype=np.int32),
            offset=np.arange(count, dtype=np.int64) * 7,
            length=np.array(lengths, dtype=np.int32),
            label=label,
            faults={row: Fault("label", f"{name} {row}") for row in np.flatnonzero(label == UNUSABLE).tolist()},
        )
        parts.append(Archive("tfrecord", MappedFiles(tmp_path, Names.of([name])), table, num_classes=5))
    merge = data.draw(st.booleans())
    sources = Sources(parts, merge_classes=merge)
    pairs = [(number, row) for number, part in enumerate(parts) for row in range(len(part))]
    assert len(sources) == len(pairs) and sources.num_classes == (5 if merge else 5 * len(parts))
    ids = np.array(data.draw(st.lists(st.integers(0, len(pairs) - 1), max_size=9)) if pairs else [], dtype=np.int64)
    for sample, label, image in zip(ids.tolist(), sources.labels(ids), sources.encoded(ids), strict=True):
        number, row = pairs[sample]
        own = int(parts[number].labels(np.array([row]))[0])
        assert label == (own if own == UNUSABLE or merge else own + 5 * number) == sources.all_labels()[sample]
        assert np.array_equal(image, parts[number].encoded(np.array([row]))[0])
        assert sources.fault(sample) == parts[number].fault(row)
        assert sources.locate(sample) == parts[number].locate(row)
