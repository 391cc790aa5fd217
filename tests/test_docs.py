"""The documentation says what the code does: every configuration key with its meaning, and a README that runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pydantic import BaseModel

from partial_fc import config, emphasis, metrics, mining

ROOT = Path(__file__).resolve().parent.parent


def sections() -> dict[str, type[BaseModel]]:
    """Headings of the page and the models that they describe."""
    found = {f"## {name}": field.annotation for name, field in config.Config.model_fields.items()}
    for kind in vars(config).values():
        if isinstance(kind, type) and issubclass(kind, config.Section) and "name" in kind.model_fields:
            name = kind.model_fields["name"].default
            if f"{name}Config" == kind.__name__:
                axis = "negatives" if hasattr(emphasis, name) else "mining" if hasattr(mining, name) else "margin"
                found[f"### {axis}: {name}"] = kind
    return found  # type: ignore[return-value]


def test_the_configuration_page_has_every_key_and_its_meaning() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    parts = re.split(r"^(#{2,3} .*)$", page, flags=re.MULTILINE)[1:]
    described = {
        heading: dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", body, flags=re.MULTILINE))
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }
    expected = {
        heading: {key: " ".join((field.description or "").split()) for key, field in model.model_fields.items()}
        for heading, model in sections().items()
    }
    assert described == expected


def test_the_page_of_the_metrics_is_what_a_rank_serves() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    described = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in re.findall(
            r"^\| `(partial_fc_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", page, re.MULTILINE
        )
    }
    served = metrics.TrainingMetrics()
    served.record_evaluation({"lfw": 0.5}, 1.0)
    found = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
            family.documentation,
        )
        for family in served.registry.collect()
        if family.name.startswith("partial_fc_")
    }
    assert described == found
    rows = re.findall(r"^\| (`\w+`(?: of `\w+`)?) \| (.*) \|$", page.split("## Values of labels")[1], re.MULTILINE)
    values = {heading: set(re.findall(r"`(\w+)`", cell)) for heading, cell in rows}
    used: dict[str, set[str]] = {}
    for family in served.registry.collect():
        for sample in family.samples:
            for label in sample.labels.keys() & {"group", "bound", "nearest", "phase", "collective", "kind"}:
                name = family.name.removeprefix("partial_fc_") + ("_total" if family.type == "counter" else "")
                heading = f"`{label}` of `{name}`" if label == "kind" else f"`{label}`"
                used.setdefault(heading, set()).add(sample.labels[label])
    assert values == used


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    dead = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if "://" in link:
                continue
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                dead.append(f"{page.name}: {link}")
    assert dead == []


def test_the_readme_example_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    # A million classes take 4 GB; the example's meaning does not depend on how many there are.
    names: dict[str, object] = {}
    exec(example.replace("1_000_000", "10_000"), names)
    values, classes = names["values"], names["classes"]
    assert isinstance(values, torch.Tensor) and isinstance(classes, torch.Tensor)
    assert values.shape == classes.shape == (64, 5)
