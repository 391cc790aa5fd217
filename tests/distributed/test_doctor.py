"""The preflight as torchrun starts it: a job in order, and one where something is wrong on one rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from partial_fc.data.synthetic import make_dataset
from partial_fc.doctor.links import measure_links

DEADLINE = 180
CLASSES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    make_dataset(
        folder, identities=CLASSES, images_per_identity=4, validation_identities=20, pairs=60, image_size=32, workers=1
    )
    return folder


def write_config(folder: Path, data: Path) -> Path:
    content = {
        "data": {"path": str(data), "image_size": 32, "threads": 1},
        "backbone": {"name": "small", "embedding_size": 16, "width": 8},
        "train": {"batch_size": 10, "steps": 4, "device": "cpu", "run_dir": str(folder / "runs")},
        "evaluate": {"sets": ["demo_val.bin"]},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def examine(
    folder: Path,
    data: Path,
    ranks: int | None,
    change: str = "",
    *overrides: str,
    shares_store: bool = False,
    on: int = 1,
) -> tuple[int, dict[str, Any], str]:
    """(exit code, what --json has, standard output) of a job, in which ``change`` runs on one rank first.

    Args:
        folder: of the configuration and what the job writes.
        data: the data set.
        ranks: started by torchrun; None: alone, without it.
        change: code that sees ``overrides``.
        overrides: of the configuration.
        shares_store: whether torchrun's agent keeps the store of the job (else rank 0 does).
        on: that rank.
    """
    script, out = folder / "job.py", folder / "out.json"
    script.write_text(f"""
import os, sys, time
from pathlib import Path
from partial_fc import doctor
overrides = {list(overrides)!r}
if os.environ.get("RANK") == "{on}":
{textwrap.indent(textwrap.dedent(change) or "pass", "    ")}
path = Path({str(write_config(folder, data))!r})
ready = doctor.run_doctor(path, overrides, megabytes=1, json_file=Path({str(out)!r}), join_seconds=20)
sys.stdout.flush()
os._exit(0 if ready else 1)
""")
    command = [sys.executable, str(script)]
    if ranks is not None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend"]
        command += ["c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(script)]
    switch = {} if shares_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **switch}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    finally:
        # A rank that hangs would outlive its agent.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert out.is_file(), f"{output}\n{errors}"
    assert "partial_fc/doctor" not in errors, f"a trace through the package: {errors}"
    return process.returncode, json.loads(out.read_text(encoding="utf-8")), output


def problems(content: dict[str, Any], level: str = "fail") -> list[tuple[str, list[int], str]]:
    return [(one["check"], one["ranks"], one["text"]) for one in content["findings"] if one["level"] == level]


@pytest.mark.torchrun
@pytest.mark.parametrize(("ranks", "shares_store"), [(None, False), (1, False), (2, False), (3, True)])
def test_a_job_in_order_is_ready(tmp_path: Path, data: Path, ranks: int | None, shares_store: bool) -> None:
    code, content, output = examine(tmp_path, data, ranks, shares_store=shares_store)
    assert code == 0, output
    assert content["ready"] and not problems(content)
    assert output.splitlines()[-1].startswith("ready")
    switch = [text for check, _, text in problems(content, "warn") if check == "environment"]
    assert len(switch) == (1 if shares_store else 0)
    assert len(content["ranks"]) == (ranks or 1)
    checks = {one["check"] for one in content["findings"]}
    assert {"configuration", "versions", "run folder", "data"} <= checks
    assert ({"bandwidth", "links", "clocks"} <= checks) == (ranks is not None and ranks > 1)
    assert f"{CLASSES} classes" in output and "4 commits take" in output and "verification: demo_val" in output
    assert not (tmp_path / "runs").exists(), "no trace is left"


@pytest.mark.torchrun
def test_data_missing_and_another_version_on_one_rank(tmp_path: Path, data: Path) -> None:
    change = """
        import partial_fc
        partial_fc.__version__ = "0.0.9"
        overrides.append("data.path=/nowhere/faces")
    """
    code, content, output = examine(tmp_path, data, 2, change)
    found = problems(content)
    assert code != 0 and output.splitlines()[-1].startswith("3 problems")
    assert ["configuration", "versions", "data"] == [check for check, _, _ in found]
    assert "data.path is" in found[0][2] and "/nowhere/faces on rank 1" in found[0][2]
    assert "partial_fc is" in found[1][2] and "0.0.9 on rank 1" in found[1][2]
    assert found[2][1] == [1] and found[2][2].startswith("/nowhere/faces: can't read the data set")
    assert content["measured"]["0"]["links"], "what is wrong with the data doesn't hide the network"


@pytest.mark.torchrun
def test_a_run_folder_that_isnt_shared(tmp_path: Path, data: Path) -> None:
    change = f"""
        doctor.SHARED_SECONDS = 0.5
        overrides.append("train.run_dir={tmp_path / "other"}")
    """
    _, content, _ = examine(tmp_path, data, 2, change)
    ((_, _, configuration), (check, ranks, text)) = problems(content)
    assert configuration.startswith("train.run_dir is")
    assert check == "run folder" and ranks == [1] and text.startswith(f"{tmp_path / 'other'} is another folder here")


@pytest.mark.torchrun
def test_a_run_folder_that_cant_be_made(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    code, content, _ = examine(tmp_path, data, 2, "", f"train.run_dir={tmp_path / 'file' / 'runs'}")
    ((check, ranks, text),) = problems(content)
    assert code != 0 and check == "run folder" and ranks == [0]
    assert text == f"{tmp_path / 'file' / 'runs'}: Not a directory: check the path and its permissions"


@pytest.mark.torchrun
def test_a_configuration_that_one_rank_cant_read(tmp_path: Path, data: Path) -> None:
    code, content, output = examine(tmp_path, data, 2, 'overrides.append("train.stepz=3")')
    ((check, ranks, text),) = problems(content)
    assert code != 0 and check == "configuration" and ranks == [1] and "train.stepz: unknown key" in text
    assert any("not joined" in text for _, _, text in problems(content, "warn"))


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_rank_that_never_comes_is_named(tmp_path: Path, data: Path) -> None:
    code, content, output = examine(tmp_path, data, 3, "time.sleep(10_000)")
    ((check, ranks, text),) = problems(content)
    assert code != 0 and check == "ranks" and ranks == [1] and text.startswith("1 of 3 did not come within 20 s")
    assert [one["rank"] for one in content["ranks"]] == [0, 2], "the others' findings are there"


TOLD = """
    board = doctor.open_board(doctor.read_identity(os.environ, "here"), 60)
    assert board.wait("{name}", 0, 60) and board.wait("report", 1, 60)
    # Not before rank 0's file is there, which must go.
    assert list(Path({runs!r}).glob(".doctor-*"))
    os._exit(3)
"""


@pytest.mark.torchrun
@pytest.mark.parametrize("shares_store", [False, True])
def test_a_rank_that_stops_doesnt_cost_what_the_others_found(tmp_path: Path, data: Path, shares_store: bool) -> None:
    change = TOLD.format(name="report", runs=str(tmp_path / "runs"))
    code, content, output = examine(tmp_path, data, 3, change, shares_store=shares_store, on=2)
    ((check, ranks, text),) = problems(content)
    assert code != 0 and check == "ranks" and ranks == [2]
    assert text.startswith("told nothing before the launcher ended all ranks (SIGTERM)")
    assert [one["rank"] for one in content["ranks"]] == [0, 1] and f"{CLASSES} classes" in output
    assert output.splitlines()[-1].startswith("1 problem")
    assert not (tmp_path / "runs").exists(), "no trace is left"


@pytest.mark.torchrun
def test_a_rank_that_stops_while_they_join(tmp_path: Path, data: Path) -> None:
    change = f"""
        def stop(config):
{textwrap.indent(textwrap.dedent(TOLD.format(name="go", runs=str(tmp_path / "runs"))), " " * 12)}
        doctor.joined_ranks = stop
    """
    code, content, output = examine(tmp_path, data, 3, change, on=2)
    ((check, ranks, text),) = problems(content)
    assert code != 0 and check == "ranks" and 2 in ranks
    assert text.startswith("had not joined and measured yet when the launcher ended all ranks (SIGTERM)")
    assert [one["rank"] for one in content["ranks"]] == [0, 1, 2]
    assert not (tmp_path / "runs").exists(), "no trace is left"


@pytest.mark.torchrun
def test_a_rank_that_cant_join_the_group(tmp_path: Path, data: Path) -> None:
    change = """
        def refuse(config):
            raise RuntimeError("connectFullMesh failed: Connection refused")
        doctor.joined_ranks = refuse
    """
    code, content, _ = examine(tmp_path, data, 2, change, "train.timeout_seconds=3")
    found = problems(content)
    assert code != 0 and [check for check, _, _ in found] == ["group", "group"]
    assert found[1][1] == [1] and "connectFullMesh failed: Connection refused" in found[1][2]


def measure(rank: int, world_size: int) -> dict[str, Any]:
    return measure_links(torch.device("cpu"), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_measured(ranks: Any, world_size: int) -> None:
    found = ranks(world_size).run(measure)
    if world_size == 1:
        assert found == [{}]
        return
    for one in found:
        assert one["all_reduce"] == found[0]["all_reduce"] and one["all_gather"] == found[0]["all_gather"]
        assert one["ring"]["bytes"] == 250_000 and one["ring"]["seconds"] > 0
    assert set(found[0]["clock"]) == {str(rank) for rank in range(1, world_size)}
    # One machine has one clock; the error is half of a round trip.
    assert all(abs(ahead) <= trip for ahead, trip in found[0]["clock"].values())
    assert all(one["clock"] == {} for one in found[1:])
