"""The commands ``partial-fc head ...`` as a user calls them: what they write and say, and each end in one line."""

from __future__ import annotations

import errno
import os
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from partial_fc import cli_head, head_tools, models
from partial_fc.checkpoint import read_whole, surgery, tensor_shapes
from partial_fc.checkpoint.commits import read_commit
from partial_fc.checkpoint.surgery import write_commit
from partial_fc.config import data_config
from partial_fc.data import Sources, decode_images, open_archive
from partial_fc.data.class_map import read_class_map
from partial_fc.head import PartialFC
from partial_fc.machine import HostMemory
from tests import records
from tests.commands import Commands

SIDE, SIZE, CLASSES = 32, 8, 5


pytestmark = pytest.mark.usefixtures("leaves_by_raising")

commands = Commands(cli_head.app)
call, done, refused = commands.call, commands.done, commands.refused


def whole(folder: Path) -> dict[str, Tensor]:
    return read_whole(folder, tensor_shapes(folder))


def network() -> models.SmallNet:
    torch.manual_seed(0)
    backbone = models.SmallNet(SIZE, SIDE, width=8)
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(16, 3, SIDE, SIDE))
    return backbone.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with commits after 10 and 20 steps; the configuration is whole, as a training writes it."""
    config = data_config(
        tmp_path / "old", [f"data.image_size={SIDE}", f"backbone={{name: small, embedding_size: {SIZE}, width: 8}}"]
    ).model_dump(mode="json")
    config["train"]["seed"] = 4
    for step in (10, 20):
        draw = torch.Generator().manual_seed(step)
        state = {f"backbone.{name}": value for name, value in network().state_dict().items()}
        state |= {
            "head.weight": torch.randn(CLASSES, SIZE, generator=draw),
            "head.step": torch.tensor(step),
            "head_optimizer.momentum_buffer": torch.randn(CLASSES, SIZE, generator=draw),
        }
        info = {
            "format": 1,
            "step": step,
            "samples": step * 8,
            "num_classes": CLASSES,
            "embedding_size": SIZE,
            "contents": ["backbone", "head", "head_optimizer"],
            "config": config,
        }
        write_commit(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", state, info)
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images of two classes."""
    images = [records.encode(records.smooth_image(i, SIDE, SIDE)) for i in range(6)]
    records.write_new(tmp_path / "data", images, [i % 2 for i in range(6)], 2)
    return tmp_path / "data"


def expected_centres(data: Path, rows: list[int]) -> np.ndarray:
    """Unit mean directions of the two classes, of these rows, float64."""
    archive = Sources([open_archive(data)])
    ids = np.array(rows)
    with torch.no_grad():
        embeddings = network()(decode_images(archive.encoded(ids), SIDE)).double().numpy()
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = np.stack([units[archive.labels(ids) == label].mean(0) for label in (0, 1)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.parametrize("limit", [None, 2])
def test_extend_makes_centres_of_images(run: Path, data: Path, tmp_path: Path, limit: int | None) -> None:
    options = [] if limit is None else ["--limit-per-class", limit]
    said = done("extend", run, tmp_path / "new", "--data", data, "--batch-size", 4, *options, "data.threads=1")
    old, new = whole(run / "checkpoints" / "step-00000020"), whole(tmp_path / "new")
    order = [0, 1, 2, 3] if limit else range(6)
    norm = np.linalg.norm(old["head.weight"].double().numpy(), axis=1).mean()
    assert torch.equal(new["head.weight"][:CLASSES], old["head.weight"])
    np.testing.assert_allclose(new["head.weight"][CLASSES:], expected_centres(data, list(order)) * norm, atol=1e-5)
    assert not new["head_optimizer.momentum_buffer"][CLASSES:].any()
    assert f"{tmp_path / 'new'}: step 20, 7 classes; new are 5 to 6, in the order of their labels\n" in said
    assert f"data.more=[{{path: {data}}}]" in said and f"train.resume={tmp_path / 'new'}" in said
    info = read_commit(tmp_path / "new").info
    assert (info["step"], info["samples"], info["num_classes"]) == (20, 160, 7)
    assert info["history"][0]["operation"] == "extend" and info["history"][0]["data"] == str(data)


def test_extend_follows_the_configuration_of_the_new_images(run: Path, data: Path, tmp_path: Path) -> None:
    # What the commit was trained with stands above the file's, and what the user says above both.
    (tmp_path / "x.yaml").write_text(f"data: {{path: {data}, image_size: 112}}\nbackbone: {{name: iresnet18}}\n")
    done("extend", run, tmp_path / "a", "--data", tmp_path / "x.yaml")
    done("extend", run, tmp_path / "b", "--data", data)
    assert torch.equal(whole(tmp_path / "a")["head.weight"], whole(tmp_path / "b")["head.weight"])
    said = refused("extend", run, tmp_path / "c", "--data", data, "backbone.width=16")
    assert "the saved model doesn't fit the configuration" in said


def test_extend_draws_centres_as_a_new_head_does(run: Path, tmp_path: Path) -> None:
    done("extend", run / "checkpoints" / "step-00000010", tmp_path / "new", "--count", 3)
    expected = PartialFC(SIZE, CLASSES + 3, seed=4).weight.detach()[CLASSES:]
    new = whole(tmp_path / "new")
    assert torch.equal(new["head.weight"][CLASSES:], expected) and int(new["head.step"]) == 10


def test_extend_is_refused_in_a_line(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert "got --data None and --count None, expected one of them" in refused("extend", run, out)
    assert "expected one of them" in refused("extend", run, out, "--data", data, "--count", 2)
    assert "got 'data.threads=1' with --count" in refused("extend", run, out, "data.threads=1", "--count", 2)
    assert "is there already" in refused("extend", run, run, "--count", 2)
    assert "expected the folder of the new commit" in refused("extend", run, "data.threads=1", "--count", 2)
    assert "no commit is there" in refused("extend", tmp_path / "no", out, "--count", 2)
    assert "No such file or directory" in refused("extend", run, out, "--data", tmp_path / "no")
    records.write_new(tmp_path / "bad", [b"not an image at all"], [0], 1)
    assert "1 of 1 classes have no usable image" in refused("extend", run, out, "--data", tmp_path / "bad")
    assert "backbone.widht" in refused("extend", run, out, "--data", data, "backbone.widht=8")
    assert call("extend", run, out, "--count", 0).exit_code == 2
    assert not out.exists()


def test_extend_says_how_the_new_images_are_trained_on(run: Path, data: Path, tmp_path: Path) -> None:
    # The names are those of a user's files: blanks, brackets and quotes.
    odd = data.rename(tmp_path / "it's {new}, a: b")
    records.write_new(tmp_path / "third", [records.encode(records.smooth_image(9, SIDE, SIDE))], [0], 1)
    file = tmp_path / "new.yaml"
    sets = [{"path": str(odd), "format": "recordio", "threads": 1}, {"path": str(tmp_path / "third"), "weight": 0.5}]
    file.write_text(yaml.safe_dump({"data": {**sets[0], "more": sets[1:]}}))
    said = done("extend", run, tmp_path / "new", "--data", file)
    (line,) = [line for line in said.splitlines() if "data.more=" in line]
    (word,) = [word for word in shlex.split(line) if word.startswith("data.more=")]
    del sets[0]["threads"]
    trained = data_config(tmp_path / "old", [word]).data.more
    assert [one.model_dump(exclude_defaults=True) for one in trained] == sets
    assert "8 classes; new are 5 to 7" in said
    file.write_text(yaml.safe_dump({"data": {**sets[0], "more": sets[1:], "merge_classes": True}}))
    said = done("extend", run, tmp_path / "merged", "--data", file)
    assert f"one set made of them (partial-fc prepare {file} NEW_SET), data.more=[{{path: NEW_SET}}] behind" in said
    assert "7 classes; new are 5 to 6" in said


def test_extend_needs_a_backbone_for_images(run: Path, data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(5, SIZE)).astype(np.float32))
    done("import-weights", tmp_path / "w.npy", tmp_path / "w")
    said = refused("extend", tmp_path / "w", tmp_path / "new", "--data", data)
    assert "has no backbone, expected one for --data: use --count, or another commit" in said
    done("extend", tmp_path / "w", tmp_path / "new", "--count", 2)
    assert torch.equal(whole(tmp_path / "new")["head.weight"][5:], PartialFC(SIZE, 7).weight.detach()[5:])


def test_remap_reorders_and_removes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "order").write_text("4\n0\n2\n")
    (tmp_path / "remove").write_text("1, 3\n")
    old = whole(run / "checkpoints" / "step-00000020")
    for option, order in (("order", [4, 0, 2]), ("remove", [0, 2, 4])):
        out = tmp_path / f"by-{option}"
        said = done("remap", run, out, f"--{option}", tmp_path / option)
        new = whole(out)
        for name in ("head.weight", "head_optimizer.momentum_buffer"):
            assert torch.equal(new[name], old[name][order])
        assert f"{out}: step 20, 3 classes of 5 (2 removed, 0 merged into others)\n" in said
        assert f"--class-map {out}.classes.csv\n" in said
        class_map = read_class_map(f"{out}.classes.csv").tolist()
        assert [class_map.index(new) for new in range(3)] == order and class_map.count(-1) == 2


def test_merge_makes_one_class_of_several(run: Path, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("4 1\n")
    old = whole(run / "checkpoints" / "step-00000020")["head.weight"].double().numpy()
    said = done("merge", run, tmp_path / "new", "--groups", tmp_path / "groups")
    assert "4 classes of 5 (0 removed, 1 merged into others)" in said
    norms = np.linalg.norm(old[[1, 4]], axis=1)
    direction = (old[[1, 4]] / norms[:, None]).sum(0)
    expected = old[:4].copy()
    expected[1] = direction / np.linalg.norm(direction) * norms.mean()
    np.testing.assert_allclose(whole(tmp_path / "new")["head.weight"], expected, atol=1e-6)
    assert read_class_map(tmp_path / "new.classes.csv").tolist() == [0, 1, 2, 3, 1]


def test_a_change_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ids").write_text("7\n")
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "new"
    assert f"{tmp_path / 'ids'}:1: got class 7, expected 0 to 4" in refused(
        "remap", run, out, "--order", tmp_path / "ids"
    )
    assert "got class 7, expected 0 to 4" in refused("merge", run, out, "--groups", tmp_path / "ids")
    assert "expected one of them: name one file" in refused("remap", run, out)
    (tmp_path / "ids").write_text("1\n")
    monkeypatch.setattr(surgery, "host_memory", lambda: HostMemory(1, 2))
    assert "GB of memory" in refused("remap", run, out, "--remove", tmp_path / "ids")
    assert sorted(os.listdir(tmp_path)) == before
    Path(f"{out}.classes.csv").touch()
    assert "new.classes.csv: is there already" in refused("remap", run, out, "--remove", tmp_path / "ids")
    assert Path(f"{out}.classes.csv").exists()


@pytest.mark.parametrize("late", [False, True])
def test_a_folder_that_cant_be_written_is_a_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    def refuse(path: Any, *rest: Any, **options: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    (tmp_path / "ids").write_text("1\n")
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(*((surgery, "seal") if late else (head_tools, "write_class_map")), refuse)
    said = refused("remap", run, tmp_path / "new", "--remove", tmp_path / "ids")
    assert "can't be written (Read-only file system)" in said and "Traceback" not in said


def test_an_unusable_commit_is_told_and_passed_over(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step-00000020" / ".metadata").unlink()
    said = done("extend", run, tmp_path / "new", "--count", 1)
    assert "step-00000020: .metadata is missing: it is not used" in said
    assert read_commit(tmp_path / "new").step == 10


def test_a_converted_model_can_be_extended(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    backbone = models.iresnet18(embedding_size=SIZE, image_size=SIDE).eval()
    (tmp_path / "arcface").mkdir()
    for rank in range(2):
        torch.save(
            {
                "global_step": 5,
                "state_dict_backbone": backbone.state_dict(),
                "state_dict_softmax_fc": {"weight": torch.randn(3 - rank, SIZE)},
            },
            tmp_path / "arcface" / f"checkpoint_gpu_{rank}.pt",
        )
    said = done("import-arcface", tmp_path / "arcface", tmp_path / "a")
    assert f"{tmp_path / 'a'}: 5 classes of 8 from 2 ranks, and iresnet18\n" in said
    assert "not used: global_step; the run begins at step 0" in said
    done("extend", tmp_path / "a", tmp_path / "b", "--data", data)
    files = [tmp_path / "arcface" / f"checkpoint_gpu_{rank}.pt" for rank in range(2)]
    done("import-arcface", *files, tmp_path / "c", "--backbone-name", "iresnet18")
    assert torch.equal(whole(tmp_path / "c")["head.weight"], whole(tmp_path / "b")["head.weight"][:5])
    history = read_commit(tmp_path / "b").info["history"]
    assert [entry["operation"] for entry in history] == ["import-arcface", "extend"]


def test_import_weights_says_what_it_made(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(3, 2), "b": torch.randn(4, 2)}, tmp_path / "w.pt")
    assert "has 2 matrices" in refused("import-weights", tmp_path / "w.pt", tmp_path / "new")
    said = done("import-weights", tmp_path / "w.pt", tmp_path / "new", "--key", "b")
    assert said.startswith(f"{tmp_path / 'new'}: 4 classes of 2, no backbone\n")


def test_the_commands_of_the_page_work(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "faces")
    (tmp_path / "data").rename(tmp_path / "people")
    (tmp_path / "data").mkdir()
    (tmp_path / "people").rename(tmp_path / "data" / "new_people")
    (tmp_path / "order.txt").write_text("4\n0\n")
    (tmp_path / "removed.txt").write_text("1, 3")
    (tmp_path / "same_people.txt").write_text("0 4\n1 2\n")
    np.save(tmp_path / "centres.npy", np.ones((5, 4), dtype=np.float32))
    save_file({"weight": torch.ones(5, 4), "other": torch.ones(5, 4)}, tmp_path / "centres.safetensors")
    folder = tmp_path / "work_dirs" / "ms1mv3_r100"
    folder.mkdir(parents=True)
    state = {"state_dict_backbone": models.iresnet18(SIZE, 16).state_dict()}
    torch.save({**state, "state_dict_softmax_fc": {"weight": torch.ones(3, SIZE)}}, folder / "checkpoint_gpu_0.pt")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
    commands = re.findall(r"^partial-fc head (.*)$", page, flags=re.MULTILINE)
    for command in commands:
        done(*command.split())
        assert read_commit(Path(command.split()[2]))
    assert {command.split()[0] for command in commands} == {
        info.name or info.callback.__name__ for info in cli_head.app.registered_commands
    }
