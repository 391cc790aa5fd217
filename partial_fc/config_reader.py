"""Reading a typed model from YAML and ``key=value`` overrides, with every problem on a line of its own.

This module knows no section and no key: it works on any pydantic model whose fields are values, models, unions of
models told apart by ``name``, or lists of values or models. What is expected of a key is told from the model's JSON
schema. Problems name a key as ``section.key``, and in the first entry of a list as ``section.list[0].key``.

YAML is read as version 1.2 has it: ``5e-4`` is a number, ``on`` and ``1:30`` are text. No tag, no merge key.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from partial_fc.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
# Names of keys, and places in lists.
Key = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
# Tag, form, first characters; the first match counts.
_SCALARS = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"), list("-+.0123456789")),
]
_TRUE = ("true", "True", "TRUE")
_LONGEST_VALUE = 60


class Contradiction(NamedTuple):
    """Values that are right one by one and wrong together.

    Attributes:
        keys: keys that take part, ``a.b`` or ``a.b[0].c``; the problem is reported at the first.
        text: what was got and what was expected.
    """

    keys: tuple[str, ...]
    text: str


def raise_contradictions(found: Sequence[Contradiction]) -> None:
    """For a model's validator: raise, if there are any, so that :func:`read_model` reports each on its own line."""
    if found:
        text = "; ".join(f"{each.keys[0]}: {each.text}" for each in found)
        raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": list(found)})


def read_model(model: type[Model], path: Path | None, overrides: Sequence[str], defaults: Mapping[str, Any]) -> Model:
    """Read a YAML file, apply overrides in order, validate all of it.

    Args:
        model: what to read.
        path: YAML file; None: there are the overrides only.
        overrides: ``a.b=value`` at any depth, the value in YAML.
        defaults: by dotted key, for keys that are absent or null.

    Raises:
        ConfigError: every problem found, one line each.
    """
    source = _Source(_Schema(model), "override" if path is None else str(path))
    source.read_file("" if path is None else _read_text(path))
    for override in overrides:
        source.read_override(override)
    for key, value in defaults.items():
        source.set_default(tuple(key.split(".")), value)
    result = _validate(model, source)
    if result is None or source.problems:
        raise ConfigError("\n".join(dict.fromkeys(source.problems)))
    return result


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected a YAML configuration") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}), expected a YAML configuration") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got bytes that aren't UTF-8 at offset {error.start}, expected YAML") from None


def write_yaml(data: Any) -> str:
    """YAML text that reads back equal, here and by readers of YAML 1.1."""

    class Dumper(yaml.SafeDumper):
        pass

    for tag, form, first in _SCALARS:
        Dumper.add_implicit_resolver(_TAG + tag, form, first)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        character: [(_TAG + tag, form) for tag, form, first in _SCALARS if character in first]
        for character in ["", *"~nNtTfF-+.0123456789"]
    }


class _Source:
    """The file and the overrides as one tree of plain values, which remembers where each key came from."""

    def __init__(self, schema: _Schema, file: str) -> None:
        self.schema = schema
        self.data: dict[str, Any] = {}
        self.problems: list[str] = []
        self._file = file
        self._origins: dict[Key, str] = {}

    def report(self, key: Key, text: str) -> None:
        """Add a problem of a key, at the place that gave it or the nearest one above it."""
        above = (self._origins[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self._origins)
        self.problems.append(f"{next(above, self._file)}: {_dotted(key)}: {text}")

    def read_file(self, text: str) -> None:
        """Take over a file's keys; text that isn't a mapping in YAML ends the reading."""
        node = _compose(text, self._file, lines=True)
        data = self._convert(node, (), lambda node: f"{self._file}:{node.start_mark.line + 1}", ())
        if data is not None and not isinstance(data, dict):
            raise ConfigError(f"{self._file}: got {_show(data)}, expected a mapping of sections")
        self.data = data or {}
        for key, node in self.schema.root["properties"].items():
            # An empty section is what is left when all its keys are commented out.
            if self.data.get(key) is None and "properties" in self.schema.resolve(node):
                self.data[key] = {}

    def read_override(self, text: str) -> None:
        """Set one key, making the mappings above it where they are missing."""
        name, equals, value = text.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(key):
            self.problems.append(f"override: got {_show(text)}, expected section.key=value")
            return
        if above := self.schema.list_above(key, self.data):
            where = _dotted(above)
            self.problems.append(f"override: {name}: {where} is a list, expected all of it: {where}=[...]")
            return
        parent: dict[str, Any] = self.data
        for end in range(1, len(key)):
            child = parent.get(key[end - 1])
            if isinstance(child, str) and "oneOf" in self.schema.at(key[:end], self.data):
                child = {"name": child}
            elif child is None:
                child = {}
                self._origins.setdefault(key[:end], "override")
            if not isinstance(child, dict):
                self.problems.append(f"override: {name}: {_dotted(key[:end])} is a value and has no keys")
                return
            parent[key[end - 1]] = child
            parent = child
        try:
            node = _compose(value, f"override: {name}", lines=False)
        except ConfigError as error:
            self.problems.append(str(error))
            return
        self._origins = {other: origin for other, origin in self._origins.items() if other[: len(key)] != key}
        self._origins[key] = "override"
        parent[key[-1]] = self._convert(node, key, lambda node: "override", ())

    def set_default(self, key: tuple[str, ...], value: Any) -> None:
        """Set a key that is absent or null."""
        parent = self.data
        for part in key[:-1]:
            parent = parent.get(part, {})
            if not isinstance(parent, dict):
                return
        if parent.get(key[-1]) is None:
            parent[key[-1]] = value

    def _convert(
        self, node: yaml.Node | None, key: Key, origin: Callable[[yaml.Node], str], above: tuple[yaml.Node, ...]
    ) -> Any:
        if node in above:
            self.report(key, "contains itself")
        elif isinstance(node, yaml.CollectionNode) and node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.report(key, f"got a value with the tag {node.tag}, expected a plain value")
        elif isinstance(node, yaml.MappingNode):
            result = {}
            for name, value in node.value:
                part = str(name.value) if isinstance(name, yaml.ScalarNode) else "?"
                inner = (*key, part)
                if part in result:
                    self.problems.append(f"{origin(name)}: {_dotted(inner)}: given twice, expected once")
                self._origins[inner] = origin(name)
                result[part] = self._convert(value, inner, origin, (*above, node))
            return result
        elif isinstance(node, yaml.SequenceNode):
            self._origins.update({(*key, place): origin(value) for place, value in enumerate(node.value)})
            return [
                self._convert(value, (*key, place), origin, (*above, node)) for place, value in enumerate(node.value)
            ]
        elif isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        return None

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        text = str(node.value)
        kinds: dict[str, Callable[[str], Any]] = {
            "null": lambda text: None,
            "bool": lambda text: text in _TRUE,
            "int": int,
            "float": float,
            "str": str,
        }
        try:
            return kinds[node.tag.removeprefix(_TAG)](text)
        except (KeyError, ValueError):
            self.report(key, f"got {_show(text)} with the tag {node.tag}, expected a plain value")
            return None


def _compose(text: str, place: str, lines: bool) -> yaml.Node | None:
    """The document's node; None where it is empty."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and lines else ""
        raise ConfigError(f"{place}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not YAML: {str(error).splitlines()[0]}") from None


class _Schema:
    """What the JSON schema of a model says of its keys."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.root: dict[str, Any] = model.model_json_schema()

    def resolve(self, node: dict[str, Any], value: Any = None) -> dict[str, Any]:
        """Follow references; of a union, take the member that the value (or else the default) names."""
        if "oneOf" in node and "discriminator" in node:
            members = node["discriminator"]["mapping"]
            name = value.get("name") if isinstance(value, dict) else value
            if not isinstance(name, str):
                name = (node["default"] or {}).get("name")
            node = {"$ref": members[name]} if name in members else node
        while "$ref" in node:
            node = self.root["$defs"][node["$ref"].rpartition("/")[2]]
        return node

    def at(self, key: Key, data: Any) -> dict[str, Any]:
        """The schema of a key, unions unresolved; empty where there is no such key."""
        node = self.root
        for part in key:
            node = self.resolve(node, data)
            if isinstance(part, int):
                places = node.get("prefixItems", [])
                node = places[part] if part < len(places) else node.get("items", {})
            else:
                node = _without_null(node.get("properties", {}).get(part, {}))
            data = _get(data, (part,))
        return node

    def list_above(self, key: tuple[str, ...], data: Any) -> Key:
        """The list of which a key means a part, ``list.0`` or ``list[0]``; empty where it means none."""
        for end in range(1, len(key) + 1):
            above = (*key[: end - 1], key[end - 1].partition("[")[0])
            if above != key and self.resolve(self.at(above, data), _get(data, above)).get("type") == "array":
                return above
        return ()

    def field(self, location: tuple[int | str, ...], data: Any) -> Key:
        """The key that a location of pydantic means: without names of union members and places behind a list's end."""
        key: Key = ()
        for part in location:
            value = _get(data, key)
            names = self.resolve(self.at(key, data), value).get("properties", {})
            if part in names or (isinstance(part, int) and isinstance(value, list) and part < len(value)):
                key = (*key, part)
        return key

    def keys(self, key: Key, data: Any) -> list[str]:
        """The names below a key."""
        return list(self.resolve(self.at(key, data), _get(data, key)).get("properties", {}))

    def leaves(self, node: dict[str, Any] | None = None, key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """All keys outside unions and lists."""
        inside = self.resolve(self.root if node is None else node).get("properties", {})
        for name, inner in inside.items():
            yield (*key, name)
            if "oneOf" not in _without_null(inner):
                yield from self.leaves(inner, (*key, name))

    def describe(self, node: dict[str, Any]) -> str:
        """In words: what values a schema admits."""
        if "oneOf" in node:
            null = " or null" if node.get("nullable") else ""
            return f"one of {', '.join(node['discriminator']['mapping'])}, alone or as the name of a mapping{null}"
        node = self.resolve(node)
        if "anyOf" in node:
            return " or ".join(self.describe(each) for each in node["anyOf"])
        if "enum" in node:
            return f"one of {', '.join(map(str, node['enum']))}"
        if "const" in node:
            return str(node["const"])
        if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}, each {self.describe(node['prefixItems'][0])}"
        if "items" in node:
            return f"a list, each {self.describe(node['items'])}"
        if "properties" in node:
            return f"a mapping with the keys {', '.join(node['properties'])}"
        words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
        kind = words.get(node.get("type", ""), str(node.get("type")))
        if "pattern" in node:
            kind += f" that matches {node['pattern']}"
        return kind + _limits(node)


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    """A union of named members that may be null, written as the union alone."""
    unions = [each for each in node.get("anyOf", []) if "discriminator" in each]
    return {**unions[0], "default": node.get("default"), "nullable": True} if unions else node


def _limits(node: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {node[name]:g}" for name, sign in signs.items() if name in node]
    if "multipleOf" in node:
        found.append(f"a multiple of {node['multipleOf']}")
    if node.get("minLength"):
        found.append("that isn't empty")
    return f" {' and '.join(found)}" if found else ""


def _validate(model: type[Model], source: _Source) -> Model | None:
    """Validate, report what is wrong, and look again without it for what it hid."""
    data = copy.deepcopy(source.data)
    wrong: set[Key] = set()
    while True:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            found = error.errors(include_url=False)
        new: set[Key] = set()
        for each in found:
            if each["type"] == "contradiction":
                _report_contradictions(source, each["ctx"]["found"], wrong)
                continue
            key = _key_of(source.schema, each, data)
            if key not in wrong | new:
                new.add(key)
                _report_error(source, each, key, data)
        # With a faulty entry all of a list is left out: the places of the others must not change.
        new |= {key[:-1] for key in new if key and isinstance(key[-1], int)}
        for key in new:
            _leave_out(source.schema, data, key)
        wrong |= new
        if not new:
            return None


def _report_contradictions(source: _Source, found: Sequence[Contradiction], wrong: set[Key]) -> None:
    """Those of which no key is wrong by itself."""
    for contradiction in found:
        keys = [_key(name) for name in contradiction.keys]
        if not any(_related(key, bad) for key in keys for bad in wrong):
            source.report(keys[0], contradiction.text)


def _key_of(schema: _Schema, error: Any, data: Any) -> Key:
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        return (*schema.field(location[:-1], data), str(location[-1]))
    return schema.field(location, data)


def _report_error(source: _Source, error: Any, key: Key, data: Any) -> None:
    schema, value = source.schema, _get(data, key)
    node = schema.at(key, data)
    if error["type"] == "extra_forbidden":
        source.report(key, _unknown_key(schema, key, data))
    elif error["type"] == "missing" and len(error["loc"]) == len(key):
        source.report(key, f"missing, expected {schema.describe(node)}")
    elif error["type"] == "union_tag_invalid":
        names = list(node["discriminator"]["mapping"])
        name = value.get("name") if isinstance(value, dict) else value
        text = f"got {_show(name)}, expected one of {', '.join(names)}{_nearest_value(name, names)}"
        source.report((*key, "name") if isinstance(value, dict) else key, text)
    else:
        near = _nearest_value(value, [str(each) for each in node.get("enum", [])])
        source.report(key, f"got {_show(value)}, expected {schema.describe(node)}{near}")


def _unknown_key(schema: _Schema, key: Key, data: Any) -> str:
    above, names, node = key[:-1], schema.keys(key[:-1], data), schema.at(key[:-1], data)
    last, text = str(key[-1]), "unknown key"
    if "oneOf" in node:
        text += f" of {schema.resolve(node, _get(data, above))['properties']['name']['const']}"
    everywhere: dict[str, list[str]] = {}
    for leaf in schema.leaves():
        everywhere.setdefault(leaf[-1], []).append(".".join(leaf))
    near = difflib.get_close_matches(last, names, n=1)
    # The very name, of another section, is nearer than one that only looks like it.
    if near and ("oneOf" in node or last not in everywhere):
        return f"{text}; did you mean {_dotted((*above, near[0]))}?"
    members = node.get("discriminator", {}).get("mapping", {})
    if having := [name for name, ref in members.items() if last in schema.resolve({"$ref": ref})["properties"]]:
        return f"{text}; {', '.join(having)} would have it"
    for wanted in [last, *difflib.get_close_matches(last, everywhere, 1, 0.8)]:
        if wanted in everywhere:
            return f"{text}; did you mean {' or '.join(everywhere[wanted])}?"
    return f"{text}, expected one of {', '.join(names)}"


def _nearest_value(value: Any, names: list[str]) -> str:
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _get(data: Any, key: Key) -> Any:
    for part in key:
        if isinstance(part, int):
            data = data[part] if isinstance(data, list) and part < len(data) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data


def _dotted(key: Key) -> str:
    """A key in words: ``a.b[0].c``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _key(dotted: str) -> Key:
    """What :func:`_dotted` wrote."""
    return tuple(int(place) if place else name for place, name in re.findall(r"\[(\d+)\]|([^.\[]+)", dotted))


def _leave_out(schema: _Schema, data: dict[str, Any], key: Key) -> None:
    """Fall back to the default of a key; where there is none, to any text, or to an empty section."""
    parent, above = _get(data, key[:-1]), schema.resolve(schema.at(key[:-1], data))
    if isinstance(parent, dict) and key:
        parent.pop(key[-1], None)
        if "$ref" in schema.at(key, data):
            parent[key[-1]] = {}
        elif key[-1] in above.get("required", []):
            parent[key[-1]] = "?"


def _related(one: Key, other: Key) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
