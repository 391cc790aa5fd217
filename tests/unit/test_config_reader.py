from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from partial_fc.config_reader import Contradiction, raise_contradictions, read_model, write_yaml
from partial_fc.errors import ConfigError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Round(Strict):
    name: Literal["Round"] = "Round"
    radius: float = 1.0


class Square(Strict):
    name: Literal["Square"] = "Square"
    side: Annotated[int, Field(ge=1)] = 1


class Paint(Strict):
    colour: Literal["red", "green"] = "red"
    label: str | None = None
    layers: Annotated[tuple[int, ...], Field(strict=False)] = ()


class Corner(Strict):
    x: Annotated[float, Field(gt=0)]
    weight: Annotated[float, Field(gt=0)] = 1.0


class Drawing(Strict):
    shape: Annotated[Round | Square, Field(discriminator="name")] = Round()
    weight: Annotated[float, Field(gt=0, le=2)] = 1.0
    title: str
    corners: Annotated[tuple[Corner, ...], Field(strict=False)] = ()
    middle: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 0.0)


class Model(Strict):
    drawing: Drawing
    paint: Paint = Paint()

    @model_validator(mode="after")
    def _agree(self) -> Model:
        if self.paint.colour == "green" and self.drawing.weight > 1:
            raise_contradictions([Contradiction(("drawing.weight", "paint.colour"), "too heavy for green")])
        for place, corner in enumerate(self.drawing.corners):
            if corner.x > 9:
                raise_contradictions([Contradiction((f"drawing.corners[{place}].x", "drawing.title"), "too far out")])
        return self


TITLE = "drawing: {title: t}\n"
CORNERS = "drawing:\n  title: t\n  corners:\n  - {x: 1}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Model:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return read_model(Model, path, overrides, {"paint.label": "m"})


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_a_file_and_overrides_become_a_model(tmp_path):
    text = "# a comment\ndrawing:\n  title: on\n  shape: {name: Square, side: 3}\npaint:\n"
    model = read(tmp_path, text, "drawing.weight=5e-1", "paint.layers=[1, 2]", "drawing.shape.side=4")
    assert model.drawing == Drawing(shape=Square(side=4), weight=0.5, title="on")
    assert model.paint == Paint(label="m", layers=(1, 2))


def test_overrides_go_in_order_and_a_mapping_replaces(tmp_path):
    text = "drawing: {title: t, shape: {name: Square, side: 3}}"
    replaced = read(tmp_path, text, "drawing.shape={name: Round}", "drawing.shape.radius=2")
    assert replaced.drawing.shape == Round(radius=2)
    assert read(tmp_path, text, "drawing.title=a", "drawing.title=b=c:d").drawing.title == "b=c:d"
    assert read(tmp_path, "", "drawing.title=x").drawing.title == "x"
    assert read(tmp_path, TITLE, "paint.label=x", "paint.label=").paint.label == "m"


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("1E+3", 1000.0), (".5", 0.5), ("2.", 2.0), ("-3", -3), ("007", 7), ("+1.5", 1.5)],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    class Any(BaseModel):
        x: object

    path = tmp_path / "m.yaml"
    path.write_text(f"x: {text}")
    got = read_model(Any, path, [], {}).x
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["on", "yes", "No", "1:30", "2026-01-02", "0x1f", "1_000", ".inf", "'5e-4'", '"null"'])
def test_the_rest_is_text(tmp_path, text):
    assert read(tmp_path, f"drawing: {{title: {text}}}").drawing.title == text.strip("'\"")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("drawing: [1\nb: 2", "m.yaml:2: not YAML: "),
        ("a: b: c", "m.yaml:1: not YAML: mapping values are not allowed"),
        ("a: \x01", "m.yaml: not YAML: unacceptable character"),
        ("a: 1\n---\nb: 2", "m.yaml:2: not YAML: but found another document"),
        ("- 1", "m.yaml: got [1], expected a mapping of sections"),
        ("drawing", 'm.yaml: got "drawing", expected a mapping'),
    ],
)
def test_text_that_is_no_configuration_is_one_line(tmp_path, text, line):
    (got,) = problems(tmp_path, text)
    assert got.startswith(line)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path, text in [(tmp_path / "no.yaml", "no.yaml: no such file"), (tmp_path, "can't be read")]:
        with pytest.raises(ConfigError, match=text) as caught:
            read_model(Model, path, [], {})
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "m.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="aren't UTF-8 at offset 3"):
        read_model(Model, tmp_path / "m.yaml", [], {})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("drawing: {title: t}\ndrwing: 3", "m.yaml:2: drwing: unknown key; did you mean drawing?"),
        ("drawing:\n  title: t\n  wieght: 1", "m.yaml:3: drawing.wieght: unknown key; did you mean drawing.weight?"),
        (TITLE + "colour: red", "m.yaml:2: colour: unknown key; did you mean paint.colour?"),
        (TITLE + "colou: red", "m.yaml:2: colou: unknown key; did you mean paint.colour?"),
        (TITLE + "paint: {x: 1}", "m.yaml:2: paint.x: unknown key, expected one of colour, label, layers"),
        ("drawing: {}", "m.yaml:1: drawing.title: missing, expected text"),
        ("", "m.yaml: drawing.title: missing, expected text"),
        ("drawing: {title: 3}", "m.yaml:1: drawing.title: got 3, expected text"),
        ("drawing: {title: t, weight: '1'}", 'm.yaml:1: drawing.weight: got "1", expected a number > 0 and <= 2'),
        ("drawing: {title: t, weight: true}", "m.yaml:1: drawing.weight: got true, expected a number > 0 and <= 2"),
        ("drawing: {title: t, weight: 3}", "m.yaml:1: drawing.weight: got 3, expected a number > 0 and <= 2"),
        (TITLE + "paint: {colour: rad}", 'paint.colour: got "rad", expected one of red, green; did you mean red?'),
        (TITLE + "paint: {label: 1}", "paint.label: got 1, expected text or null"),
        (TITLE + "paint:\n  layers:\n  - 1\n  - a", 'm.yaml:5: paint.layers[1]: got "a", expected a whole number'),
        (TITLE + "paint: {layers: 7}", "paint.layers: got 7, expected a list, each a whole number"),
        ("drawing: {title: t, middle: [1]}", "drawing.middle: got [1], expected a list of 2, each a number"),
        ("drawing: {title: t, middle: [1, 2, 3]}", "drawing.middle: got [1, 2, 3], expected a list of 2, each a"),
        ("drawing: {title: t, middle: [1, b]}", 'drawing.middle[1]: got "b", expected a number'),
        (CORNERS + "  - {x: 1, weight: b}", 'm.yaml:5: drawing.corners[1].weight: got "b", expected a number > 0'),
        (CORNERS + "  -\n    x: 1\n    wieght: 2", "m.yaml:7: drawing.corners[1].wieght: unknown key; did you mean"),
        (CORNERS + "  - {x: 1, wieght: 2}", "did you mean drawing.corners[1].weight?"),
        (CORNERS + "  - {x: 1, colour: 2}", "drawing.corners[1].colour: unknown key; did you mean paint.colour?"),
        (CORNERS + "  - {x: 1, y: 2}", "drawing.corners[1].y: unknown key, expected one of x, weight"),
        (CORNERS + "  - {weight: 2}", "m.yaml:5: drawing.corners[1].x: missing, expected a number > 0"),
        (CORNERS + "  - 3", "m.yaml:5: drawing.corners[1]: got 3, expected a mapping with the keys x, weight"),
        (CORNERS + "  - {x: 1, x: 2}", "m.yaml:5: drawing.corners[1].x: given twice"),
        (CORNERS + "  - {x: 10}", "m.yaml:5: drawing.corners[1].x: too far out"),
        ("drawing: {title: t, corners: {x: 1}}", 'drawing.corners: got {"x": 1}, expected a list, each a mapping'),
        (TITLE + "paint: 5", "m.yaml:2: paint: got 5, expected a mapping with the keys colour, label, layers"),
        (
            "drawing: {title: t, shape: {name: Sqare}}",
            'shape.name: got "Sqare", expected one of Round, Square; did you',
        ),
        ("drawing: {title: t, shape: 5}", "drawing.shape: got 5, expected one of Round, Square, alone or as the name"),
        (
            "drawing: {title: t, shape: {name: Round, side: 2}}",
            "shape.side: unknown key of Round; Square would have it",
        ),
        ("drawing: {title: t, shape: {name: Square, side: 0}}", "shape.side: got 0, expected a whole number >= 1"),
        ("drawing:\n  title: t\n  title: u", "m.yaml:3: drawing.title: given twice"),
        (TITLE + "paint: &a {label: *a}", "m.yaml:2: paint.label: contains itself"),
        (TITLE + "paint: !!python/object:os.system {}", "m.yaml:2: paint: got a value with the tag"),
        (TITLE + "paint: {label: !!int x}", 'm.yaml:2: paint.label: got "x" with the tag'),
        (TITLE + "paint: {colour: green}\n", None),
        ("drawing: {title: t, weight: 2}\npaint: {colour: green}", "m.yaml:1: drawing.weight: too heavy for green"),
        (TITLE + f"paint: {{layers: '{'x' * 100}'}}", f'got "{"x" * 59}..., expected'),
    ],
)
def test_a_problem_is_one_line(tmp_path, text, line):
    if line is None:
        read(tmp_path, text)
        return
    (got,) = problems(tmp_path, text)
    assert line in got


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("drawing.weight", 'override: got "drawing.weight", expected section.key=value'),
        ("drawing..weight=1", "expected section.key=value"),
        ("drawing.weight=[", "override: drawing.weight: not YAML: "),
        ("drawing.weight=fast", 'override: drawing.weight: got "fast", expected a number > 0 and <= 2'),
        ("drawng.weight=1", "override: drawng: unknown key; did you mean drawing?"),
        ("drawing.title.x=1", "override: drawing.title.x: drawing.title is a value and has no keys"),
        ("drawing={title: a, title: b}", "override: drawing.title: given twice"),
        ("drawing={}", "override: drawing.title: missing"),
        ("drawing.shape.radius=x", 'override: drawing.shape.radius: got "x", expected a number'),
        ("drawing.weight=", "override: drawing.weight: got null, expected a number > 0 and <= 2"),
        ("drawing.corners=[{x: 1}, {x: b}]", 'override: drawing.corners[1].x: got "b", expected a number > 0'),
        (
            "drawing.corners.0.x=2",
            "override: drawing.corners.0.x: drawing.corners is a list, expected all of it: drawing",
        ),
        ("drawing.corners[0].x=2", "drawing.corners is a list, expected all of it: drawing.corners=[...]"),
        ("drawing.corners[0]={x: 2}", "override: drawing.corners[0]: drawing.corners is a list, expected all of it"),
        ("drawing.corners.x=2", "override: drawing.corners.x: drawing.corners is a list, expected all of it"),
        ("drawing[0].weight=1", "override: drawing[0]: unknown key; did you mean drawing?"),
    ],
)
def test_a_problem_of_an_override_is_one_line(tmp_path, override, line):
    text = "drawing: {title: t, weight: 1, shape: {name: Round}}"
    (got,) = problems(tmp_path, text, override)
    assert line in got


def test_all_problems_are_reported_at_once_and_each_once(tmp_path):
    text = "drawing: {weight: 9}\npaint: {layers: 3, lable: x, colour: green}\nextra: 1"
    assert [line.split(": ")[:2] for line in problems(tmp_path, text, "drawing.shape=Sq", "paint.label=1")] == [
        ["override", "drawing.shape"],
        ["m.yaml:1", "drawing.weight"],
        ["m.yaml:1", "drawing.title"],
        ["override", "paint.label"],
        ["m.yaml:2", "paint.layers"],
        ["m.yaml:2", "paint.lable"],
        ["m.yaml:3", "extra"],
    ]


def test_contradictions_show_behind_other_problems_unless_one_of_their_keys_is_wrong(tmp_path):
    text = "drawing: {weight: 2}\npaint: {colour: green, label: 1}"
    assert [line.split(": ")[1] for line in problems(tmp_path, text)] == [
        "drawing.title",
        "paint.label",
        "drawing.weight",
    ]
    assert len(problems(tmp_path, "drawing: {weight: 9, title: t}\npaint: {colour: green}")) == 1


def test_all_problems_of_a_list_are_reported_and_its_places_stay(tmp_path):
    text = CORNERS + "  - 3\n  - {x: 10}\n  - {x: b, y: 1}\npaint: {layers: [a, 1, b], label: 1}"
    assert [line.split(": ")[:2] for line in problems(tmp_path, text)] == [
        ["m.yaml:5", "drawing.corners[1]"],
        ["m.yaml:7", "drawing.corners[3].x"],
        ["m.yaml:7", "drawing.corners[3].y"],
        ["m.yaml:8", "paint.label"],
        ["m.yaml:8", "paint.layers[0]"],
        ["m.yaml:8", "paint.layers[2]"],
    ]
    # One that shows behind another problem has its own place too.
    text = CORNERS + "  - {x: 10}\npaint: {label: 1}"
    assert [line.split(": ")[1] for line in problems(tmp_path, text)] == ["paint.label", "drawing.corners[1].x"]
    text = "drawing: {title: t, corners: [3], weight: 2}\npaint: {colour: green}"
    assert [line.split(": ")[1] for line in problems(tmp_path, text)] == ["drawing.corners[0]", "drawing.weight"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_what_is_written_reads_back_equal(tmp_path_factory, data):
    class Any(BaseModel):
        x: object

    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(write_yaml({"x": data}), encoding="utf-8")
    assert read_model(Any, path, [], {}).x == data
