"""The commands ``prepare``, ``validate`` and ``show``: each option has its effect, each end its exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from partial_fc import cli, tools
from partial_fc.data.archives import open_archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.contact_sheet import contact_sheet
from partial_fc.errors import ConfigError, DataError
from tests import formats, records
from tests.commands import Commands

SIDE = 48
ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("leaves_by_raising")

commands = Commands(cli.app)
call, done, refused = commands.call, commands.done, commands.refused


def image(seed: int, side: int = SIDE) -> bytes:
    return records.encode(records.smooth_image(seed, side, side))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight images of four classes, the last one larger."""
    images = [image(i) for i in range(7)] + [image(7, 2 * SIDE)]
    records.write_new(tmp_path / "data", images, [i // 2 for i in range(8)], 4)
    return tmp_path / "data"


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """What a function of the tools is called with."""
    calls: list[dict[str, Any]] = []
    function = getattr(tools, name)

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return function(*args, **options)

    monkeypatch.setattr(tools, name, spy)
    return calls


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def test_prepare_copies_into_recordio(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    said = done("prepare", data, out)
    assert said.startswith(f"8 of 8 images of 4 classes in {out} (0 encoded anew, 8 copied; ")
    old, new = open_archive(data), open_archive(out)
    ids = np.arange(8)
    assert new.format == "recordio"
    assert [a.tobytes() for a in new.encoded(ids)] == [b.tobytes() for b in old.encoded(ids)]
    assert done("prepare", data, out) == said


def test_each_option_of_prepare_has_its_effect(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch, "prepare")
    options = ["--format", "webdataset", "--size", 32, "--workers", 3, "--shard-size", 5]
    done("prepare", data, tmp_path / "a", *options, "--quality", 40)
    assert calls[0]["workers"] == 3
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.tar"))
    assert shards == ["train-000000.tar", "train-000001.tar"]
    first = members(tmp_path / "a" / shards[0])
    assert [name for name, _ in first[::2]] == [f"{i:09d}.jpg" for i in range(5)]
    assert Image.open(io.BytesIO(first[0][1])).size == (32, 32)
    done("prepare", data, tmp_path / "b", *options, "--quality", 90)
    assert len(members(tmp_path / "b" / shards[0])[0][1]) > len(first[0][1])
    done("prepare", data, tmp_path / "c", *options, "--shuffle-seed", 1)
    shuffled = [name for shard in shards for name, _ in members(tmp_path / "c" / shard)[::2]]
    assert sorted(shuffled) == [f"{i:09d}.jpg" for i in range(8)] != shuffled


def test_prepare_says_what_it_leaves_out(data: Path, tmp_path: Path) -> None:
    said = done("prepare", data, tmp_path / "new", f"data.max_image_pixels={SIDE * SIDE}")
    assert said.startswith("7 of 8 images of 4 classes in ")
    assert "\nleft out: 1 (oversized)\n" in said and "train.rec, byte " in said


def test_prepare_says_that_weights_do_not_matter(data: Path, tmp_path: Path) -> None:
    said = "data.weight doesn't matter here: every sample is written once\n"
    assert said not in done("prepare", data, tmp_path / "a")
    assert said in done("prepare", data, tmp_path / "b", "data.weight=0.5")
    more = f"data.more=[{{path: {data}, weight: 3}}]"
    assert done("prepare", data, tmp_path / "c", more).startswith(f"{said}16 of 16 images of 8 classes in ")


def test_an_override_in_the_place_of_the_destination_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        refused("prepare", data, "data.cache=cc") == "error: got 'data.cache=cc', expected the folder of the new "
        "data set: name it before what is changed in the configuration\n"
    )
    assert "got 'augment.flip=0', expected a data set: name it" in refused("show", "augment.flip=0")
    assert os.listdir(tmp_path) == ["data"]
    os.mkdir("data.cache=cc")
    done("prepare", data, "data.cache=cc")
    done("validate", "data.cache=cc")


def test_validate_of_a_good_set(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch, "validate")
    said = done("validate", data, "--workers", 3, "--json", tmp_path / "found.json", "data.image_size=96")
    assert calls[0]["threads"] == 3
    assert said.startswith(f"OK: {data / 'train.rec'}: all 8 samples can be used\n")
    assert "not 96 x 96, training resizes them: 7 (" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] is True and found["samples"] == 8
    assert done("validate", data, "--limit", 3).startswith(f"OK: {data / 'train.rec'}: all 3 samples (of 8)")


def test_validate_of_a_bad_set_ends_with_1(data: Path, tmp_path: Path) -> None:
    result = call("validate", data, f"data.max_image_pixels={SIDE * SIDE}", "--json", tmp_path / "found.json")
    assert result.exit_code == 1
    assert result.output.startswith("NOT OK: ") and "1 sample: more pixels than are allowed" in result.output
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is False


def test_a_record_that_cannot_be_read_is_called_so(data: Path) -> None:
    whole = (data / "train.rec").read_bytes()
    (data / "train.rec").write_bytes(bytes(4) + whole[4:])
    result = call("validate", data)
    assert result.exit_code == 1 and "1 sample: its record is damaged, or its file can't be read" in result.output


def test_validate_of_no_set_ends_with_2(tmp_path: Path) -> None:
    assert "nothere" in refused("validate", tmp_path / "nothere", code=2)
    assert "nothere" in refused("show", tmp_path / "nothere")
    ended = subprocess.run(
        [sys.executable, "-m", "partial_fc", "validate", tmp_path / "nothere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_to_ends_it_before_the_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("validate", "contact_sheet"):
        monkeypatch.setattr(tools, name, lambda *_, **__: pytest.fail("the work was done"))
    for place in (tmp_path / "no folder" / "x", tmp_path / "data" / "train.rec" / "x"):
        line = refused("validate", data, "--json", f"{place}.json", code=2)
        assert f"{place}.json: can't be written (N" in line and line.endswith("): name another file\n")
        assert f"{place}.png: can't be written (N" in refused("show", data, "--out", f"{place}.png")
    os.mkdir(tmp_path / "folder.png")
    assert "folder.png: can't be written (Is a directory)" in refused(
        "show", data, "--out", tmp_path / "folder.png", code=1
    )
    assert "ends in '.bmp', expected .png, .jpg or .webp" in refused("show", data, "--out", tmp_path / "x.bmp")


def test_a_target_is_left_as_it_is_until_there_is_something_to_write(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        refused("validate", tmp_path / "nothere", "--json", tmp_path / name, code=2)
    assert os.listdir(tmp_path) == ["old.json"] and (tmp_path / "old.json").read_text() == "old"


def test_findings_go_into_a_pipe(data: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    done("validate", data, "--json", f"/dev/fd/{write}")
    os.close(write)
    with open(read, encoding="utf-8") as file:
        assert json.load(file)["ok"] is True


def test_checksums_are_left_out_with_a_limit(tmp_path: Path) -> None:
    messages = [formats.example({"image/encoded": image(i), "image/class/label": i % 2}) for i in range(4)]
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages)
    assert "checksums   0 wrong" in done("validate", path)
    assert "checksums   not checked (--limit)" in done("validate", path, "--limit", 2)


def test_each_option_of_show_has_its_effect(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    overrides = ["data.image_size=32", "augment.rotate=0.5", "train.seed=7"]
    said = done("show", data, *overrides, "--out", out, "--columns", 5, "--class-id", 2, "--class-id", 0)
    expected = contact_sheet(
        open_archive(data), Augmentation(rotate=0.5), image_size=32, seed=7, columns=5, class_ids=[2, 0]
    )
    with Image.open(out) as picture:
        assert said == f"{out}: {picture.width} x {picture.height} pixels\n"
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    done("show", data, *overrides, "--out", out, "--columns", 5, "--classes", 3)
    expected = contact_sheet(open_archive(data), Augmentation(rotate=0.5), image_size=32, seed=7, columns=5, classes=3)
    with Image.open(out) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    done("show", data, *overrides, "data.max_image_pixels=100", "--out", out, "--columns", 5, "--classes", 3)
    with Image.open(out) as picture:
        assert not np.array_equal(np.asarray(picture), np.asarray(expected))


def test_show_refuses_what_the_format_has_no_room_for(data: Path, tmp_path: Path) -> None:
    line = refused("show", data, "--columns", 200, "--out", tmp_path / "x.webp")
    assert "expected at most 16383 a side" in line and "show fewer classes or columns" in line
    done("show", data, "--columns", 200, "--classes", 1, "--out", tmp_path / "x.jpg")
    assert "expected at most 65500 a side" in refused(
        "show", data, "--columns", 700, "--out", tmp_path / "y.jpg", code=1
    )
    assert not (tmp_path / "y.jpg").exists()


def test_a_picture_that_the_library_cannot_write_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any) -> NoReturn:
        raise ValueError("encoding error 5")

    monkeypatch.setattr(Image.Image, "save", save)
    line = refused("show", data, "--out", tmp_path / "x.webp")
    assert line == f"error: {tmp_path / 'x.webp'}: can't be written (encoding error 5): name another file\n"


@pytest.mark.parametrize(
    "words",
    [
        ["validate", "x", "--limit", 0],
        ["validate", "x", "--workers", 0],
        ["prepare", "x", "y", "--size", 0],
        ["prepare", "x", "y", "--quality", 0],
        ["prepare", "x", "y", "--quality", 101],
        ["prepare", "x", "y", "--workers", 0],
        ["prepare", "x", "y", "--shard-size", 0],
        ["show", "x", "--classes", 0],
        ["show", "x", "--columns", 1],
        ["show", "x", "--class-id", -1],
    ],
)
def test_an_option_out_of_range_is_named(words: list[object]) -> None:
    result = call(*words)
    assert result.exit_code == 2 and "Invalid value for" in result.stderr and str(words[-2]) in result.stderr


def test_a_tilde_is_the_home(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done("prepare", "~/data", "~/new")
    done("validate", "~/new", "--json", "~/found.json")
    done("show", "~/new", "--out", "~/sheet.png")
    assert {"new", "found.json", "sheet.png"} < set(os.listdir(tmp_path))


def test_a_configuration_with_nothing_but_the_data_will_do(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(f"data: {{path: {data}, image_size: 96}}\n")
    assert "not 96 x 96" in done("validate", tmp_path / "data.yaml")


def test_the_commands_raise_what_a_program_can_catch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found\.json: can't be written"):
        tools.run_validate(tmp_path, [], limit=None, workers=None, json_file=tmp_path / "no" / "found.json")


def test_a_class_map_is_read_from_its_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("old,new\n0,1\n1,-1\n2,0\n3,1\n")
    options: dict[str, Any] = {"format": "recordio", "size": None, "quality": None, "workers": 1, "shard_size": 9}
    tools.run_prepare(data, tmp_path / "new", [], **options, shuffle_seed=None, class_map=tmp_path / "x.csv")
    said = capsys.readouterr().out
    assert said.startswith("6 of 8 images of 2 classes in ")
    assert "left out: 2 (removed)\n  of 1 classes that the class map removes\n" in said
    assert open_archive(tmp_path / "new").all_labels().tolist() == [0, 0, 1, 1, 1, 1]
    (tmp_path / "x.csv").write_text("0\n")
    with pytest.raises(ConfigError, match="x.csv:1: got '0', expected 'old,new'"):
        tools.run_prepare(data, tmp_path / "b", [], **options, shuffle_seed=None, class_map=tmp_path / "x.csv")
