from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from partial_fc import config as module
from partial_fc import emphasis, margins, mining, norm_margins
from partial_fc.config import Config, Section, data_config, load_config
from partial_fc.errors import ConfigError

MINIMAL = "data: {path: faces}\ntrain: {steps: 100}\n"
UNIONS = {
    margins: ["NormFace", "CosFace", "ArcFace", "CombinedMargin", "SphereFace"],
    norm_margins: ["MagFace", "AdaFace"],
    emphasis: ["Plain", "SupportVectors", "Curricular"],
    mining: ["FocalLoss", "HardMining"],
}


def write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "run7.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path), overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def sections() -> list[type[Section]]:
    return [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Section)]


def test_defaults(tmp_path):
    config = load_config(write(tmp_path))
    assert config.train.name == "run7"
    assert (config.data.path, config.data.num_classes, config.data.image_size) == ("faces", None, 112)
    assert config.head.margin == module.CosFaceConfig(m=0.35)
    assert config.head.negatives == module.PlainConfig()
    assert (config.head.scale, config.head.sample_rate, config.head.in_backward) == (64.0, 1.0, "auto")
    assert (config.optim.learning_rate, config.optim.weight_decay, config.optim.betas) == (0.1, 5e-4, (0.9, 0.999))
    assert (config.train.steps, config.train.epochs, config.train.batch_size) == (100, None, 512)
    assert (config.metrics.port, config.metrics.address) == (9400, "127.0.0.1")


def test_the_choices_of_a_loss(tmp_path):
    text = MINIMAL + "head:\n  margin: ArcFace\n  negatives:\n    name: SupportVectors\n    top_k: 100\n"
    path = write(tmp_path, text)
    head = load_config(path, ["head.margin.m=0.4", "head.negatives.t=1.1"]).head
    assert head.margin == module.ArcFaceConfig(m=0.4)
    assert head.negatives == module.SupportVectorsConfig(t=1.1, top_k=100)
    head = load_config(path, ["head.margin={name: CombinedMargin, m1: 1.2}", "head.negatives=Plain"]).head
    assert head.margin == module.CombinedMarginConfig(m1=1.2)
    assert head.negatives == module.PlainConfig()
    assert load_config(write(tmp_path), ["head.margin.m=0.4"]).head.margin == module.CosFaceConfig(m=0.4)
    assert load_config(write(tmp_path), ["head.in_backward=true"]).head.in_backward is True


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    overrides = [
        "head.margin={name: ArcFace, easy_margin: true}",
        "head.negatives={name: SupportVectors, mode: fixed, filter_above: 0.9}",
        "optim={schedule: step, milestones: [10, 20], learning_rate: 1e-9}",
        "evaluate.sets=[lfw.bin, /x/cfp.bin]",
        "train.name='5e-4'",
        "train.timeout_seconds=1e22",
    ]
    config = load_config(write(tmp_path), overrides)
    config.dump(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "milestones:\n  - 10\n  - 20\n" in (tmp_path / "config.yaml").read_text()


def test_it_is_frozen_and_checked_when_built_in_python(tmp_path):
    config = load_config(write(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    with pytest.raises(ValidationError, match="expected train.steps or train.epochs"):
        Config(data=module.DataConfig(path="x"), train=module.TrainConfig())


@pytest.mark.parametrize("section", sections())
def test_every_key_is_described(section: type[BaseModel]):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description and field.description[-1] == ".", f"{section.__name__}.{name} has no description"


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in UNIONS for name in UNIONS[package]])
def test_margins_and_negatives_take_what_the_classes_take(package, name):
    fields = {key: field.default for key, field in getattr(module, f"{name}Config").model_fields.items()}
    assert fields.pop("name") == name
    assert fields == {field.name: field.default for field in dataclasses.fields(getattr(package, name))}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "data.image_size=100",
            "override: data.image_size: got 100, expected a whole number >= 16 and a multiple of 16",
        ),
        ("data.num_classes=0", "data.num_classes: got 0, expected a whole number >= 2 or null"),
        ("data.weight=0", "data.weight: got 0, expected a number > 0 and <= 1e+06"),
        ("data.weight=1e7", "data.weight: got 10000000.0, expected a number > 0 and <= 1e+06"),
        ("data.more=[{path: b, weight: x}]", 'data.more[0].weight: got "x", expected a number > 0 and <= 1e+06'),
        ("data.more=[{path: b}, {weight: 2}]", "data.more[1].path: missing, expected text that isn't empty"),
        ("data.more=[{path: b, wieght: 2}]", "data.more[0].wieght: unknown key; did you mean data.more[0].weight?"),
        (
            "data.more=[{path: b, image_size: 64}]",
            "data.more[0].image_size: unknown key; did you mean data.image_size?",
        ),
        ("data.more=[b]", 'data.more[0]: got "b", expected a mapping with the keys path, format, num_classes, weight'),
        ("data.more.0.weight=2", "data.more.0.weight: data.more is a list, expected all of it: data.more=[...]"),
        ("data.max_bad_share=2", "data.max_bad_share: got 2, expected a number >= 0 and <= 1"),
        ("data.path=", "data.path: got null, expected text that isn't empty"),
        ("data.decoder=dally", 'got "dally", expected one of auto, dali, python; did you mean dali?'),
        ("augment.rotate=45", "augment.rotate: got 45, expected a number >= 0 and <= 3.14159"),
        ("backbone.name=resnet50", "did you mean iresnet50?"),
        ("backbone.dropout=1", "expected a number >= 0 and < 1"),
        ("head.sample_rate=0", "head.sample_rate: got 0, expected a number > 0 and <= 1"),
        (
            "head.margin=ArcFase",
            'head.margin: got "ArcFase", expected one of AdaFace, ArcFace, CombinedMargin',
        ),
        ("head.margin.m=3", "head.margin.m: got 3, expected a number >= 0 and <= 2"),
        ("head.margin={name: ArcFace, m: 3.2}", "head.margin.m: got 3.2, expected a number >= 0 and < 3.14159"),
        ("head.negatives.t=1.2", "head.negatives.t: unknown key of Plain; SupportVectors would have it"),
        ("head.negatives={name: SupportVectors, t: 0.9}", "head.negatives.t: got 0.9, expected a number >= 1 and <= 2"),
        ("head.negatives={name: SupportVectors, top_k: 0}", "top_k: got 0, expected a whole number >= 1 or null"),
        ("head.mining={name: HardMining, keep: 0}", "head.mining.keep: got 0, expected a number > 0 and <= 1"),
        (
            "head.mining=Focal",
            'head.mining: got "Focal", expected one of FocalLoss, HardMining; did you mean FocalLoss?',
        ),
        ("head.mining=3", "expected one of FocalLoss, HardMining, alone or as the name of a mapping or null"),
        ("head.mining={name: FocalLoss, keep: 1}", "head.mining.keep: unknown key of FocalLoss; HardMining would have"),
        ("head.precision=int8", 'head.precision: got "int8", expected one of auto, fp32, tf32, bf16, fp16'),
        ("head.in_backward=maybe", 'head.in_backward: got "maybe", expected auto or true or false'),
        ("optim.betas=[0.9]", "optim.betas: got [0.9], expected a list of 2, each a number >= 0 and < 1"),
        ("train.learning_rate=1", "train.learning_rate: unknown key; did you mean optim.learning_rate?"),
        ("train.steps=1.5", "train.steps: got 1.5, expected a whole number >= 1 or null"),
        ("train.name=a/b", "train.name: got"),
        ("train.name=targets", "train.name: got 'targets', expected another name"),
        ("metrics.port=70000", "metrics.port: got 70000, expected a whole number >= 1 and <= 65535"),
        ("evaluate.sets=lfw.bin", 'evaluate.sets: got "lfw.bin", expected a list, each text'),
    ],
)
def test_an_impossible_value_is_one_line(tmp_path, override, line):
    (got,) = problems(tmp_path, override)
    assert line in got


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.steps="], "override: train.steps: missing, expected train.steps or train.epochs"),
        (["train.epochs=2"], "run7.yaml:2: train.steps: got 100 next to train.epochs=2, expected only one of them"),
        (["train.accumulate=3"], "run7.yaml:2: train.batch_size: got 512, expected a multiple of train.accumulate=3"),
        (["optim.warmup_steps=100"], "override: optim.warmup_steps: got 100, expected fewer than train.steps=100"),
        (["backbone.width=8"], "backbone.width: got 8, expected null with backbone.name=iresnet50"),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov: got true, expected false with optim.name=sgd"),
        (["optim.nesterov=true", "optim.name=adamw"], "expected false with optim.name=adamw"),
        (["optim.schedule=step"], "optim.milestones: got [], expected at least one step"),
        (["optim.milestones=[5]"], "optim.milestones: got [5], expected an empty list with optim.schedule=polynomial"),
        (["optim={schedule: step, milestones: [9, 9]}"], "optim.milestones: got [9, 9], expected steps that rise"),
        (["head.sampled_classes=5", "head.sample_rate=0.1"], "got 5 next to head.sample_rate=0.1, expected only one"),
        (["head.correct_sampling=true"], "head.correct_sampling: got true, expected false where all classes are used"),
        (["head.margin={name: MagFace, l_a: 200}"], "head.margin: got bounds of MagFace that don't rise"),
        (["head.in_backward=true", "optim.head_clip_norm=1"], "expected auto or false with optim.head_clip_norm=1"),
        (["head.in_backward=true", "train.accumulate=2"], "head.in_backward: got true, expected auto or false with"),
        (["head.in_backward=true", "train.precision=fp16"], "expected auto or false with train.precision=fp16"),
        (
            ["data.weight=2", "data.order=balanced"],
            "override: data.weight: got 2, expected 1 with data.order=balanced (weights are for order shuffled)",
        ),
        (
            ["data.more=[{path: b}, {path: c, weight: 0.5}]", "data.order=identities"],
            "override: data.more[1].weight: got 0.5, expected 1 with data.order=identities",
        ),
        (
            ["data.balance=0.5"],
            "data.balance: got 0.5, expected 1 with data.order=shuffled (only balanced has a balance)",
        ),
        (["data.balance=0", "data.order=identities"], "data.balance: got 0, expected 1 with data.order=identities"),
        (
            ["data.images_per_identity=8", "data.order=balanced"],
            "data.images_per_identity: got 8, expected 4 with data.order=balanced (only identities needs it)",
        ),
        (
            ["data.images_per_identity=5", "data.order=identities", "train.accumulate=2"],
            "data.images_per_identity: got 5, expected a divisor of the 256 samples that go through the network",
        ),
        (["data.merge_classes=true"], "data.merge_classes: got true, expected false without data.more"),
    ],
)
def test_a_contradiction_is_one_line(tmp_path, overrides, line):
    (got,) = problems(tmp_path, *overrides)
    assert line in got


def test_what_agrees_passes(tmp_path):
    for overrides in [
        ["train.steps=", "train.epochs=0.5", "optim.warmup_steps=1000"],
        ["backbone={name: small, width: 8}"],
        ["optim={schedule: step, milestones: [9, 19]}"],
        ["head.in_backward=false", "optim.head_clip_norm=1", "train.accumulate=2", "train.precision=fp16"],
        ["head.in_backward=true", "optim.head_clip_row_norm=1"],
        ["data.order=balanced", "data.balance=0.5"],
        ["data.order=identities", "data.images_per_identity=8"],
        ["data.weight=0.5", "data.more=[{path: b, weight: 2}]", "data.merge_classes=true"],
    ]:
        load_config(write(tmp_path), overrides)


@pytest.mark.parametrize(
    "text",
    [
        "data: {path: faces}\n",
        "data: {path: faces}\ntrain: {epochs: 3}\n",
        "data: {path: faces}\ntrain: {steps: 10}\noptim: {warmup_steps: 5}\n",
    ],
)
def test_a_tool_needs_no_length_of_the_run(tmp_path, text):
    config = data_config(write(tmp_path, text), ["data.image_size=64", "train.seed=5", "train.steps=7"])
    assert (config.data.path, config.data.image_size, config.train.seed) == ("faces", 64, 5)


def test_a_tool_takes_a_data_set_in_place_of_a_configuration():
    config = data_config("a: b # {c", ["train.epochs=2", "data.format=folder"])
    assert (config.data.path, config.data.format) == ("a: b # {c", "folder")


def test_a_wrong_source_does_not_make_another_key_wrong(tmp_path):
    (got,) = problems(tmp_path, "data.more=[b]", "data.merge_classes=true")
    assert "data.more[0]: got" in got


def test_what_a_tool_reads_is_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"run7\.yaml:1: data\.imagesize: unknown key; did you mean data\.image_size"):
        data_config(write(tmp_path, "data: {path: faces, imagesize: 3}\n"))
