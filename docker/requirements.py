"""What an image installs, sorted by how often it changes: pyproject.toml and constraints.txt -> files for pip.

``requirements.py PYPROJECT CONSTRAINTS FOLDER [EXTRA]...`` writes into FOLDER

=====================  ===================================================================
build.txt              what builds the package
build-constraints.txt  its constraints
torch.txt              torch in the constrained version, gigabytes with what it needs
torch-constraints.txt  the constraints of what it needs
others.txt             the other dependencies, those of the extras among them
constraints.txt        the constraints, without those of extras that weren't asked for
=====================  ===================================================================

A line that doesn't matter to an image (a test tool, a linter's setting) changes none of these files, and so no layer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import tomllib

# What torch needs, in its builds for CPUs or for CUDA, and doesn't fix itself; triton it does, as constraints.txt does.
NEEDED_BY_TORCH = frozenset(
    (
        "cuda-bindings",
        "cuda-pathfinder",
        "filelock",
        "fsspec",
        "jinja2",
        "markupsafe",
        "mpmath",
        "networkx",
        "nvidia-nvjitlink",
        "setuptools",
        "sympy",
        "triton",
        "typing-extensions",
    )
)


def sort(pyproject: str, constraints: str, extras: Sequence[str]) -> dict[str, list[str]]:
    """The lines of each file by its name.

    Args:
        pyproject: text of pyproject.toml.
        constraints: text of constraints.txt.
        extras: names of optional dependencies.

    Raises:
        ValueError: an extra isn't there, or torch isn't constrained to one version.
    """
    content = tomllib.loads(pyproject)
    project, optional = content["project"], content["project"]["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise ValueError(f"EXTRAS has {', '.join(unknown)}, expected some of {', '.join(optional)}")
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    build = content["build-system"]["requires"]
    left_out = {_name(line) for lines in optional.values() for line in lines} - {_name(line) for line in wanted}
    pins = [line for line in constraints.splitlines() if line.strip() and not line.startswith("#")]
    torch = [line for line in pins if _name(line) == "torch"]
    if len(torch) != 1 or "==" not in torch[0]:
        raise ValueError(f"constraints.txt has {torch or 'no line'} for torch, expected one line, torch==VERSION")
    return {
        "build.txt": build,
        "build-constraints.txt": _of(pins, {_name(line) for line in build}),
        "torch.txt": torch,
        "torch-constraints.txt": _of(pins, NEEDED_BY_TORCH),
        "others.txt": [line for line in wanted if _name(line) != "torch"],
        "constraints.txt": [line for line in pins if _name(line) not in left_out],
    }


def _of(pins: Sequence[str], names: Collection[str]) -> list[str]:
    return [line for line in pins if _name(line) in names]


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    assert match is not None, f"no requirement: {line!r}"
    return re.sub(r"[._-]+", "-", match[0]).lower()


def main() -> None:
    """Write the files that the command line asks for."""
    pyproject, constraints, folder, *extras = sys.argv[1:]
    texts = [Path(path).read_text(encoding="utf-8") for path in (pyproject, constraints)]
    try:
        files = sort(*texts, extras)
    except ValueError as error:
        sys.exit(f"error: {error}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (Path(folder) / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
