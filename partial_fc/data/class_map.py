"""Class maps: which new id each old class gets, read from the small text files that name classes, and kept as a CSV.

A class map is an int64 array ``[C]``: the new id of old class j, or ``REMOVED``. New ids are 0 to C' - 1, each at least
once; several old classes with one new id are merged. ``partial-fc head remap`` and ``head merge`` change the class
centres by one, and ``partial-fc prepare --class-map`` the labels of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from partial_fc.errors import ConfigError

REMOVED = -1
_HEADER = "old,new"
# 2**63 - 1 has 19 digits; longer numbers are no ids, and too long ones not even numbers to Python.
_MOST_DIGITS = 18


def read_order(path: str | os.PathLike[str], num_classes: int) -> np.ndarray:
    """The class map of a file whose line i (from 0) has the old id of new class i; old ids it doesn't name are removed.

    Args:
        path: text, one id a line.
        num_classes: C, of the old classes.

    Raises:
        ConfigError: the file can't be read, is empty, or a line has no id, one out of range, or one twice.
    """
    path = Path(path)
    class_map, lines = np.full(num_classes, REMOVED, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    count = 0
    for number, text in _lines(path):
        if not text.strip():
            wanted = f"the old id of class {count}"
            raise ConfigError(f"{path}:{number}: got an empty line, expected {wanted}: every line counts, remove it")
        old = _class_id(text.strip(), num_classes, path, number)
        if lines[old]:
            raise ConfigError(f"{path}:{number}: class {old} stands in line {lines[old]}, too: name each class once")
        class_map[old], lines[old] = count, number
        count += 1
    if not count:
        raise ConfigError(f"{path}: got no line, expected the old id of each new class")
    return class_map


def read_removed(path: str | os.PathLike[str], num_classes: int) -> np.ndarray:
    """The class map of a file that names classes to remove; those behind them move up.

    Args:
        path: text, ids separated by line ends, blanks or commas.
        num_classes: C, of the old classes.

    Raises:
        ConfigError: the file can't be read or is empty, an id is none, out of range or there twice, or no class stays.
    """
    path = Path(path)
    stays = np.ones(num_classes, dtype=bool)
    for number, ids in _id_lines(path, num_classes):
        for old in ids:
            if not stays[old]:
                raise ConfigError(f"{path}:{number}: class {old} is there for the second time: name each class once")
            stays[old] = False
    if not stays.any():
        raise ConfigError(f"{path}: names all {num_classes} classes, expected at least one that stays")
    return np.where(stays, np.cumsum(stays) - 1, REMOVED)


def read_groups(path: str | os.PathLike[str], num_classes: int) -> np.ndarray:
    """The class map of a file whose lines name classes that are one; it has the lowest one's place, the rest moves up.

    Args:
        path: text, two ids or more a line, separated by blanks or commas; empty lines don't count.
        num_classes: C, of the old classes.

    Raises:
        ConfigError: the file can't be read or is empty, or a line has one id only, none, one out of range or one that
            is there for the second time.
    """
    path = Path(path)
    first = np.arange(num_classes, dtype=np.int64)
    lines = np.zeros(num_classes, dtype=np.int64)
    for number, ids in _id_lines(path, num_classes):
        if len(ids) < 2:
            raise ConfigError(f"{path}:{number}: got class {ids[0]} alone, expected two or more that are one class")
        for old in ids:
            if lines[old]:
                raise ConfigError(
                    f"{path}:{number}: class {old} stands in line {lines[old]}, too: put a class into one group"
                )
            lines[old] = number
        first[ids] = min(ids)
    leads = first == np.arange(num_classes)
    return (np.cumsum(leads) - 1)[first]


def read_class_map(path: str | os.PathLike[str]) -> np.ndarray:
    """The class map that :func:`write_class_map` wrote: lines ``old,new`` in the order of the old ids.

    Raises:
        ConfigError: the file can't be read, has no class, a line that isn't of this form or isn't the next old class,
            or leaves a new id below the largest one out.
    """
    path = Path(path)
    new_ids: list[int] = []
    for number, text in _lines(path):
        if number == 1:
            if text.strip() != _HEADER:
                raise ConfigError(f"{path}:1: got {text.strip()[:40]!r}, expected {_HEADER!r}: name a class map")
            continue
        old, _, new = text.strip().partition(",")
        if old != str(len(new_ids)):
            raise ConfigError(
                f"{path}:{number}: got {text.strip()[:40]!r}, expected the new id of class {len(new_ids)}"
            )
        new_ids.append(REMOVED if new == str(REMOVED) else _number(new, path, number))
    class_map = np.array(new_ids, dtype=np.int64)
    if not (class_map != REMOVED).any():
        raise ConfigError(f"{path}: got no class that stays, expected a line {_HEADER} for each class")
    # A new id that no line has would be a class without a sample; one far too large must not cost memory.
    seen = np.unique(class_map[class_map != REMOVED])
    if seen[-1] + 1 != len(seen):
        gap = int(np.flatnonzero(seen != np.arange(len(seen)))[0])
        raise ConfigError(f"{path}: no class becomes {gap}, expected each new id from 0 to {seen[-1]}")
    return class_map


def write_class_map(path: str | os.PathLike[str], class_map: np.ndarray) -> None:
    """Write a class map as CSV: a header ``old,new``, then a line a class, -1 for one that is removed.

    Raises:
        OSError: the file is there already, or can't be written.
    """
    with open(path, "x", encoding="ascii") as file:
        file.write(f"{_HEADER}\n")
        file.writelines(f"{old},{new}\n" for old, new in enumerate(class_map.tolist()))
        file.flush()
        os.fsync(file.fileno())


def count_classes(class_map: np.ndarray) -> int:
    """C', the number of new classes."""
    return int(class_map.max()) + 1


def first_of_each(class_map: np.ndarray) -> np.ndarray:
    """The lowest old id of each new class, int64 ``[C']``."""
    kept = np.flatnonzero(class_map != REMOVED)
    first = np.empty(count_classes(class_map), dtype=np.int64)
    # Backwards, so that the lowest one is written last.
    first[class_map[kept[::-1]]] = kept[::-1]
    return first


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file and their numbers, from 1."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}): name a text file of class ids") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got bytes that aren't UTF-8, expected a text file of class ids") from error


def _id_lines(path: Path, num_classes: int) -> Iterator[tuple[int, list[int]]]:
    """Lines with ids, and their numbers; a ConfigError where there is none."""
    empty = True
    for number, text in _lines(path):
        ids = [_class_id(word, num_classes, path, number) for word in text.replace(",", " ").split()]
        if ids:
            empty = False
            yield number, ids
    if empty:
        raise ConfigError(f"{path}: got no class id, expected at least one")


def _class_id(text: str, num_classes: int, path: Path, line: int) -> int:
    value = _number(text, path, line)
    if value >= num_classes:
        raise ConfigError(f"{path}:{line}: got class {value}, expected 0 to {num_classes - 1}")
    return value


def _number(text: str, path: Path, line: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ConfigError(f"{path}:{line}: got {text[:40]!r}, expected a class id such as 17")
    return int(text)
