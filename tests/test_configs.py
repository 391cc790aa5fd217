"""Every YAML in configs/ loads, and every key of the configuration is read by something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from partial_fc.config import Config, Section, load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# The axes of the loss go as a whole to the class of their name; test_config compares their keys with its arguments.
WHOLE = {"head.margin", "head.negatives", "head.mining"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads(path: Path, tmp_path: Path):
    # A file may leave the folder of the data to the command line.
    config = load_config(path, [f"data.path={tmp_path}"])
    config.dump(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert path.read_text().startswith("#"), "a header gives command, hardware, hours and the expected figure"


def sections() -> dict[str, type[Section]]:
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def keys() -> set[str]:
    return {f"{section}.{key}" for section, kind in sections().items() for key in kind.model_fields}


def keys_read(source: str) -> set[str]:
    """Keys that a module reads as ``<...>.section.key``, or as ``name.key`` where name holds a section.

    A name holds a section in the function that assigns it one (``optim = config.optim``) or takes it as a parameter
    of the section's type, or of a type that the section's is made from. ``f(**name.model_dump())`` reads all its keys:
    what ``f`` doesn't know it refuses.
    """
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = set(_read_in(tree, {}))
    for function in functions:
        found.update(_read_in(function, _held(function)))
    return found


def _held(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    kinds = {base.__name__: name for name, kind in sections().items() for base in kind.__mro__ if base is not Section}
    held = {}
    for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
        kind = ast.unparse(argument.annotation).split(".")[-1] if argument.annotation else ""
        if kind in kinds:
            held[argument.arg] = kinds[kind]
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Attribute) and value.attr in sections():
                    held[name.id] = value.attr
    return held


def _read_in(tree: ast.AST, held: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg is None and isinstance(node.value, ast.Call):
            method = node.value.func
            if isinstance(method, ast.Attribute) and method.attr == "model_dump" and not node.value.args:
                if isinstance(method.value, ast.Name) and (name := held.get(method.value.id)):
                    yield from (f"{name}.{key}" for key in sections()[name].model_fields)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr in sections():
                yield f"{owner.attr}.{node.attr}"
            elif isinstance(owner, ast.Name) and owner.id in held:
                yield f"{held[owner.id]}.{node.attr}"


def test_every_key_is_read():
    names = (
        "build",
        "ranks",
        "run_folder",
        "training_step",
        "verify",
        "keeper",
        "endpoint",
        "loop",
        "train",
        "cli",
        "plan",
        "bench",
    )
    readers = [ROOT / "partial_fc" / f"{name}.py" for name in names]
    if not readers[1].exists():
        pytest.skip("nothing trains from the configuration yet")
    found = set().union(*(keys_read(path.read_text()) for path in readers if path.exists()))
    assert sorted(keys() - found) == [], "these keys are read by nothing"


def test_how_reads_are_found():
    source = """
def build(config):
    optim, text = config.optim, config.data.path
    return optim.power, config.head.margin
def other(optim, section: config.TrainConfig):
    return optim.gamma, section.steps, nothing.seed
def third(source: SourceConfig, metrics: MetricsConfig):
    return source.weight, make(**metrics.model_dump())
"""
    whole = {f"metrics.{key}" for key in sections()["metrics"].model_fields}
    assert (
        keys_read(source) - {"metrics.model_dump"}
        == {"data.path", "data.weight", "optim.power", "head.margin", "train.steps"} | whole
    )
    assert keys_read(source) - {"metrics.model_dump"} <= keys() and WHOLE <= keys()
