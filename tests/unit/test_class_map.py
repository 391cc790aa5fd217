"""Class maps: the files that name classes, and each line that can't be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.data.class_map import (
    REMOVED,
    count_classes,
    first_of_each,
    read_class_map,
    read_groups,
    read_order,
    read_removed,
    write_class_map,
)
from partial_fc.errors import ConfigError


def text(folder: Path, content: str | bytes) -> Path:
    path = folder / "ids.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@st.composite
def permuted(draw: st.DrawFn) -> tuple[int, list[int]]:
    """C, and some of its classes in any order."""
    classes = draw(st.integers(1, 40))
    order = draw(st.permutations(range(classes)))
    return classes, order[: draw(st.integers(1, classes))]


@given(permuted())
def test_an_order_says_where_each_class_goes(tmp_path_factory: pytest.TempPathFactory, drawn: tuple) -> None:
    classes, order = drawn
    path = text(tmp_path_factory.mktemp("a"), "".join(f"{old}\n" for old in order))
    expected = [order.index(old) if old in order else REMOVED for old in range(classes)]
    assert read_order(path, classes).tolist() == expected
    assert first_of_each(np.array(expected)).tolist() == order
    assert count_classes(np.array(expected)) == len(order)


@given(permuted(), st.sampled_from(["\n", " ", ",", ", ", "\r\n", "\n\n"]))
def test_classes_behind_removed_ones_move_up(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple, between: str
) -> None:
    classes, gone = drawn
    path = text(tmp_path_factory.mktemp("a"), between.join(map(str, gone)))
    left = [old for old in range(classes) if old not in gone]
    if not left:
        with pytest.raises(ConfigError, match=f"names all {classes} classes"):
            read_removed(path, classes)
        return
    expected = [left.index(old) if old in left else REMOVED for old in range(classes)]
    assert read_removed(path, classes).tolist() == expected


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    classes, ids = draw(permuted())
    groups = []
    while len(ids) >= 2:
        size = draw(st.integers(2, len(ids)))
        groups.append(ids[:size])
        ids = ids[size:]
    return classes, groups


@given(grouped())
def test_a_group_has_the_place_of_its_lowest_class(tmp_path_factory: pytest.TempPathFactory, drawn: tuple) -> None:
    classes, groups = drawn
    path = text(tmp_path_factory.mktemp("a"), "".join(f"{' '.join(map(str, group))}\n" for group in groups))
    if not groups:
        with pytest.raises(ConfigError, match="got no class id"):
            read_groups(path, classes)
        return
    lead = {old: min(group) for group in groups for old in group}
    leads = [old for old in range(classes) if lead.get(old, old) == old]
    assert read_groups(path, classes).tolist() == [leads.index(lead.get(old, old)) for old in range(classes)]


@given(grouped())
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, drawn: tuple) -> None:
    classes, groups = drawn
    lead = {old: min(group) for group in groups for old in group}
    leads = sorted({lead.get(old, old) for old in range(classes)})
    class_map = np.array([leads.index(lead.get(old, old)) for old in range(classes)])
    folder = tmp_path_factory.mktemp("a")
    write_class_map(folder / "x.csv", class_map)
    assert (folder / "x.csv").read_text() == "old,new\n" + "".join(f"{o},{n}\n" for o, n in enumerate(class_map))
    assert read_class_map(folder / "x.csv").tolist() == class_map.tolist()
    assert first_of_each(class_map).tolist() == leads
    with pytest.raises(FileExistsError):
        write_class_map(folder / "x.csv", class_map)


def test_a_removed_class_reads_back(tmp_path: Path) -> None:
    write_class_map(tmp_path / "x.csv", np.array([1, REMOVED, 0, 1]))
    assert read_class_map(tmp_path / "x.csv").tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize(
    ("read", "content", "match"),
    [
        (read_order, "", "ids.txt: got no line, expected the old id of each new class"),
        (read_order, "0\n\n1\n", "ids.txt:2: got an empty line, expected the old id of class 1: every line counts"),
        (read_order, "0\n5\n", "ids.txt:2: got class 5, expected 0 to 4"),
        (read_order, "3\n0\n3\n", "ids.txt:3: class 3 stands in line 1, too: name each class once"),
        (read_order, "0\n-1\n", "ids.txt:2: got '-1', expected a class id"),
        (read_order, "0 1\n", "ids.txt:1: got '0 1', expected a class id"),
        (read_order, "1_0\n", "ids.txt:1: got '1_0', expected"),
        (read_order, "9" * 5000, "ids.txt:1: got '9{40}', expected"),
        (read_order, b"\xff\n", "ids.txt: got bytes that aren't UTF-8"),
        (read_removed, "\n \n", "ids.txt: got no class id, expected at least one"),
        (read_removed, "1\n2, 1", "ids.txt:2: class 1 is there for the second time"),
        (read_removed, "1\n5", "ids.txt:2: got class 5, expected 0 to 4"),
        (read_removed, "0 1 2 3 4", "names all 5 classes, expected at least one that stays"),
        (read_groups, "0 1\n2\n", "ids.txt:2: got class 2 alone, expected two or more"),
        (read_groups, "0 1\n\n2,1\n", "ids.txt:3: class 1 stands in line 1, too: put a class into one group"),
        (read_groups, "2 2", "ids.txt:1: class 2 stands in line 1, too"),
        (read_groups, "a b", "ids.txt:1: got 'a', expected a class id"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    tmp_path: Path, read: Callable[[Path, int], np.ndarray], content: str | bytes, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        read(text(tmp_path, content), 5)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "got no class that stays"),
        ("0,1\n", "ids.txt:1: got '0,1', expected 'old,new': name a class map"),
        ("old,new\n", "got no class that stays"),
        ("old,new\n0,-1\n", "got no class that stays"),
        ("old,new\n0,0\n2,1\n", "ids.txt:3: got '2,1', expected the new id of class 1"),
        ("old,new\n0,0\n1\n", "ids.txt:3: got '', expected a class id"),
        ("old,new\n0,0\n1,-2\n", "ids.txt:3: got '-2', expected a class id"),
        ("old,new\n0,0\n1,2\n", "no class becomes 1, expected each new id from 0 to 2"),
        ("old,new\n0,1\n", "no class becomes 0"),
        ("old,new\n0,99999999999999999\n", "no class becomes 0"),
    ],
)
def test_a_class_map_that_is_none_is_refused(tmp_path: Path, content: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_class_map(text(tmp_path, content))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: can't be read \(No such file or directory\)"):
        read_order(tmp_path / "nowhere", 3)
    with pytest.raises(ConfigError, match="can't be read"):
        read_class_map(tmp_path)
