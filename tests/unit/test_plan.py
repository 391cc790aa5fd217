"""What plan says, beside what a real head takes and sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

import partial_fc as pfc
from partial_fc import collectives, footprint, kernels, optim
from partial_fc.build import Place, build_head, build_optimizers
from partial_fc.chunks import KeptProducts, KeptRows, Walk, cpu_cache
from partial_fc.cli import app
from partial_fc.config import Config, load_config
from partial_fc.errors import ConfigError
from partial_fc.footprint import HeadPlan, total
from partial_fc.plan import (
    GPUS,
    Machine,
    choose_machine,
    plan_backbone,
    plan_run,
    read_memory,
    show_bytes,
    show_count,
)
from partial_fc.plan_report import make_plan
from tests.ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
CPU = Machine("CPU", 24 * 10**9, cpu_cache() // 2, gpu=False)

MEMORY = """
import re, sys, torch, partial_fc as pfc
from partial_fc.kernels.compiled import works
torch.set_num_threads(1)
def memory(name): return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def train(classes, batch, backend, make, in_backward, **options):
    head = pfc.PartialFC(512, classes, kernels=backend, **options)
    optimizer = make(head.parameters(), lr=0.1, kernels=backend, in_backward=in_backward)
    for _ in range(3):
        embeddings = torch.randn(batch, 512, requires_grad=True)
        head(embeddings, torch.randint(classes, (batch,))).backward()
        optimizer.step()
        optimizer.zero_grad()
def momentum(*args, **options): return pfc.optim.RowSGD(*args, momentum=0.9, weight_decay=5e-4, **options)
classes, batch, make, in_backward, options = eval(sys.argv[1])
# What the libraries take once: the products' buffers, the compiler's modules. See test_head.
works("cpu")
train(3000, 64, "compiled", make, in_backward, **{**options, **({"sampled_classes": 1000} if options else {})})
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
train(classes, batch, "auto", make, in_backward, **options)
print(memory("VmHWM") - before)
"""


@pytest.mark.memory
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak memory in Linux's /proc")
@pytest.mark.parametrize(
    ("num_classes", "batch", "optimizer", "in_backward", "drawn"),
    [
        (60_000, 64, "sgd", True, None),
        (200_000, 128, "sgd", True, 20_000),
        (100_000, 256, "adamw", False, None),
    ],
)
def test_memory_is_within_a_tenth_of_what_a_run_takes(
    num_classes: int, batch: int, optimizer: Any, in_backward: bool, drawn: int | None
) -> None:
    plan = HeadPlan(
        num_classes=num_classes,
        ranks=1,
        batch=batch,
        size=512,
        cache=CPU.cache,
        drawn=drawn,
        optimizer=optimizer,
        in_backward=in_backward,
        emphasizes=True,
    )
    options = {} if drawn is None else {"sampled_classes": drawn}
    make = "momentum" if optimizer == "sgd" else "pfc.optim.RowAdamW"
    call = f"({num_classes}, {batch}, {make}, {in_backward}, {options})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, call], capture_output=True, text=True, check=True, env=environment, timeout=200
    )
    measured, planned = int(done.stdout), total(footprint.head_memory(plan))
    print(f"measured {measured / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB")
    assert planned == pytest.approx(measured, rel=0.1)


def sent_by(rank: int, world_size: int, options: dict[str, Any], rows: list[int]) -> dict[str, int]:
    """Bytes of the tensors of each collective in one step of a real head."""
    found: Counter[str] = Counter()
    gather, scatter, sums = collectives.HeadGroup._gather, collectives._reduce_scatter, dist.all_reduce

    def counted_gather(self: Any, name: str, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found[name] += output.nbytes
        return gather(self, name, output, *args, **kwargs)

    def counted_scatter(output: torch.Tensor, whole: torch.Tensor, **kwargs: Any) -> Any:
        found["embedding_gradient"] += whole.nbytes
        return scatter(output, whole, **kwargs)

    def counted_sum(tensor: torch.Tensor, **kwargs: Any) -> Any:
        found["target_cosines"] += tensor.nbytes
        return sums(tensor, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.HeadGroup, "_gather", counted_gather)
        patch.setattr(collectives, "_reduce_scatter", counted_scatter)
        patch.setattr(collectives.dist, "all_reduce", counted_sum)
        head = pfc.PartialFC(16, 300, uneven_batches=rows[0] != rows[1], **options)
        embeddings = torch.randn(rows[rank], 16, requires_grad=True)
        head(embeddings, torch.randint(300, (rows[rank],))).backward()
    assert set(found) == set(head.group.calls)
    # What a trainer tells of a run is what the plan said of it.
    assert head.group.bytes == {name: footprint.on_the_wire(name, size, world_size) for name, size in found.items()}
    return dict(found)


@pytest.mark.parametrize(
    ("options", "rows", "planned"),
    [
        ({"negatives": pfc.Plain()}, [6, 6], {}),
        ({"negatives": pfc.Plain()}, [5, 6], {}),
        ({"negatives": pfc.SupportVectors()}, [6, 6], {"emphasizes": True}),
        ({"negatives": pfc.Curricular(top_k=4)}, [6, 6], {"emphasizes": True, "top_k": 4}),
        (
            {"negatives": pfc.SupportVectors(top_k=4), "sampled_classes": 100, "correct_sampling": True},
            [6, 6],
            {"emphasizes": True, "top_k": 4, "drawn": 100, "corrects": True},
        ),
        (
            {"negatives": pfc.SupportVectors(), "margin": pfc.MagFace(), "compute_dtype": torch.bfloat16},
            [6, 6],
            {"emphasizes": True, "norms": True, "compute": 2},
        ),
    ],
)
def test_bytes_sent_are_those_that_a_head_sends(
    ranks: Callable[[int], RankPool], options: dict[str, Any], rows: list[int], planned: dict[str, Any]
) -> None:
    plan = HeadPlan(num_classes=300, ranks=2, batch=sum(rows), size=16, cache=CPU.cache, **planned)
    assert ranks(2).run(sent_by, options, rows) == [footprint.payload(plan)] * 2


def test_one_rank_sends_nothing() -> None:
    assert footprint.payload(HeadPlan(num_classes=300, ranks=1, batch=12, size=16, cache=CPU.cache)) == {}


def test_bytes_on_the_wire_by_the_ring() -> None:
    assert footprint.on_the_wire("embeddings", 800, 8) == 700
    assert footprint.on_the_wire("target_cosines", 800, 8) == 1400
    assert footprint.on_the_wire("embeddings", 800, 1) == 0


@pytest.mark.parametrize("budget", [0, 4 * 30 * 100, 4 * 30 * 200 - 1, 10**9])
@pytest.mark.parametrize("drawn", [None, 300])
def test_chunks_and_kept_products_are_those_of_a_walk(budget: int, drawn: int | None) -> None:
    weight = torch.empty(1003, 8)
    plan = HeadPlan(
        num_classes=1003, ranks=1, batch=30, size=8, cache=1, chunk_size=100, logits_budget=budget, drawn=drawn
    )
    ids = None if drawn is None else torch.arange(plan.walked)
    walk = Walk(weight, ids, 30, 100)
    places = KeptProducts(budget).take(walk, 30, torch.float32, weight.device)
    assert plan.chunks == (len(walk), walk.longest)
    assert plan.kept == sum(len(place) for place in places if place is not None)


@pytest.mark.parametrize("drawn", [90, 96, 97, 200])
def test_kept_rows_are_those_that_a_head_keeps(drawn: int) -> None:
    plan = HeadPlan(num_classes=1003, ranks=1, batch=29, size=8, cache=1, drawn=drawn)
    rows = KeptRows()
    rows.take(None, torch.empty(1003, 8), plan.walked)
    assert plan.kept_rows == (0 if rows._block is None else len(rows._block))


def test_numbers_of_other_modules_are_theirs() -> None:
    assert footprint.WORTH_COMPILING == kernels._WORTH_COMPILING
    assert footprint.ROWS_OF_AN_UPDATE == optim._ROWS


def settings(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["head.negatives=Plain", "optim.head_name=adamw"],
        ["head.storage=bf16", "head.sample_rate=0.1", "optim.head_state=fp32"],
        ["head.margin=MagFace", "head.negatives={name: SupportVectors, top_k: 3}", "optim.momentum=0"],
        ["head.sampled_classes=50", "train.accumulate=2", "head.precision=bf16"],
    ],
)
def test_the_plan_reads_the_configuration_as_build_does(overrides: list[str]) -> None:
    config = settings("train.device=cpu", *overrides)
    run = plan_run(config, CPU, 1)
    plan = run.at(1000)
    place = Place(0, 1, 0, torch.device("cpu"))
    head = build_head(config, 1000, place, torch.float32)
    backbone = torch.nn.Linear(2, 2)
    _, optimizer = build_optimizers(config, backbone, head)
    rows = config.train.batch_size // config.train.accumulate
    head(torch.randn(rows, plan.size, requires_grad=True), torch.randint(1000, (rows,))).backward()
    optimizer.step()
    state = {name: value.nbytes for name, value in optimizer.state[head.weight].items() if value.dim()}
    resident = footprint.resident(plan)
    assert resident["class centres"] == head.weight.nbytes
    names = {"momentum_buffer": "momentum", "exp_avg": "running means", "exp_avg_sq": "running squares"}
    assert {names.get(name, name): size for name, size in state.items()} == {
        name: resident[name] for name in (*names.values(), "steps") if name in resident
    }
    assert plan.batch == rows and plan.in_backward == optimizer.in_backward
    assert plan.norms == head.margin.needs_norms and plan.top_k == head.negatives.candidates
    assert plan.emphasizes != isinstance(head.negatives, pfc.Plain)
    assert plan.samples == head._samples and (not plan.samples or plan.drawn == head.sampled_classes)
    assert plan.compute == head._engine.dtypes(head.weight)[0].itemsize
    gradient = head.weight.grad
    if gradient is not None:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        assert values.nbytes <= footprint.phases(plan)["update"]["gradient of the centres"]


def test_the_backbone_is_measured() -> None:
    config = settings("data.image_size=64")
    whole, half = (plan_backbone(config, dtype) for dtype in (torch.float32, torch.bfloat16))
    # Of a small net's forward, what is saved is at least each convolution's output.
    assert whole.parameters == half.parameters and whole.per_image > 100_000
    assert 0.4 < half.per_image / whole.per_image < 0.8 and half.fixed > whole.fixed
    assert whole.activations(8) == whole.fixed + 8 * whole.per_image
    assert whole.largest <= whole.per_image / 2 and whole.state == 2 * whole.parameters


def test_the_most_classes_just_fit() -> None:
    for overrides in ([], ["head.sample_rate=0.1"], ["head.in_backward=false"]):
        run = plan_run(settings("train.device=cpu", *overrides), CPU, 4)
        for count in (1, 4):
            most = run.most_classes(count)
            assert run.memory(run.at(most, count)).together <= CPU.memory
            assert run.memory(run.at(most + 4, count)).together > CPU.memory
    assert footprint.largest(lambda count: False) == 0
    assert footprint.largest(lambda count: count <= 12345) == 12345


def test_operations() -> None:
    plan = HeadPlan(num_classes=1000, ranks=2, batch=10, size=8, cache=1, chunk_size=100)
    assert footprint.operations(plan) == 4 * 2 * 10 * 500 * 8
    kept = HeadPlan(num_classes=1000, ranks=2, batch=10, size=8, cache=1, chunk_size=100, logits_budget=10**9)
    assert footprint.operations(kept) == 3 * 2 * 10 * 500 * 8


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("141GiB", 141 << 30), ("1.5 gb", 1_500_000_000), ("80e9", 80 * 10**9), ("7", 7)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert read_memory(text) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "-"), (999, "999 B"), (1_500, "1.5 kB"), (85_520_809_984, "85.5 GB"), (10**15, "1,000 TB")]
)
def test_bytes_are_shown_in_decimal_units(size: int, text: str) -> None:
    assert show_bytes(size) == text


def test_powers_of_ten_are_shown_as_such() -> None:
    assert [show_count(count) for count in (10**5, 10**6, 10**9, 2 * 10**6)] == ["100,000", "10^6", "10^9", "2,000,000"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"memory": "80XB"}, "--memory is '80XB', expected bytes above 0"),
        ({"memory": "0GB"}, "--memory is '0GB'"),
        ({"gpu": "h101"}, "--gpu is 'h101', expected one of v100-16"),
        ({"ranks": 0}, "--ranks is 0, expected 1 to 64"),
        ({"ranks": 65}, "--ranks is 65"),
        ({"classes": [1]}, "--classes is 1, expected 2"),
        ({"json_file": Path("/proc/none/plan.json")}, "--json /proc/none/plan.json: "),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_plan(settings(), **arguments)


def test_a_gpu_for_a_run_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.device=cpu"):
        choose_machine(True, "h100", None)
    assert choose_machine(False, "H200", None).memory == GPUS["h200"].memory << 20
    assert choose_machine(False, "h200", "100GB").memory == 100 * 10**9
    assert choose_machine(False, None, None).memory == 80 * 10**9


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_are_readable(tmp_path: Path, width: int) -> None:
    with (tmp_path / "plan.txt").open("w+") as file:
        console = Console(file=file, width=width, highlight=False)
        make_plan(settings("data.num_classes=2000"), json_file=tmp_path / "plan.json", console=console)
        file.seek(0)
        text = file.read()
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    for words in ("class centres", "normalizers", "most classes that fit", "8 ranks: ", "1 rank: ", "10^9"):
        assert words in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [size["num_classes"] for size in found["sizes"]] == [2000, 10**6, 10**7, 10**8, 10**9]
    assert all(sum(size["memory"].values()) == size["memory_total"] for size in found["sizes"])
    assert set(found["sent"]) >= {"embeddings", "normalizers", "backbone_gradient"}
    assert found["largest"][0]["num_classes"] > found["largest"][1]["num_classes"] > 10**6


def test_the_command() -> None:
    done = CliRunner().invoke(
        app, ["plan", str(DEMO), "train.batch_size=32", "--classes", "5000", "--ranks", "1", "--gpu", "l40s"]
    )
    assert done.exit_code == 0, done.output
    assert "5,000" in done.output and "L40S" in done.output and "Sent a step" not in done.output
    bad = subprocess.run(
        [sys.executable, "-m", "partial_fc", "plan", str(DEMO), "--memory", "80XB"], capture_output=True, text=True
    )
    assert bad.returncode == 1 and bad.stderr.startswith("error: --memory is '80XB'") and bad.stderr.count("\n") == 1
