"""The head on one process: gradcheck, modes, position, precision, memory, messages."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import partial_fc as pfc

MARGINS = [
    pfc.NormFace(),
    pfc.CosFace(0.35),
    pfc.ArcFace(0.5),
    pfc.CombinedMargin(1.2, 0.3, 0.1),
    pfc.ArcFace(0.5, easy_margin=True),
]
NEGATIVES = [
    pfc.Plain(),
    pfc.Plain(filter_above=0.2),
    pfc.SupportVectors(1.2),
    pfc.SupportVectors(1.2, "fixed", top_k=3),
    pfc.SupportVectors(1.2, top_k=2, filter_above=0.3),
]


def loss_of(head: pfc.PartialFC, labels: torch.Tensor) -> Any:
    def loss(embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        head.position.zero_()
        result: torch.Tensor = torch.func.functional_call(head, {"weight": weight}, (embeddings, labels))
        return result

    return loss


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradcheck(margin: Any, negatives: Any) -> None:
    torch.manual_seed(3)
    head = pfc.PartialFC(4, 11, margin, negatives, scale=8.0, chunk_size=4).double()
    embeddings = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_of(head, torch.tensor([0, 3, 3, 10, 7])), (embeddings, weight))


def test_gradients_stay_finite_where_cosines_are_one() -> None:
    for dtype in (torch.float32, torch.float64):
        for margin in MARGINS:
            head = pfc.PartialFC(4, 6, margin).to(dtype)
            weight = head.weight.detach()
            embeddings = torch.stack([weight[0], -weight[1], weight[2] * 1e3]).requires_grad_()
            loss = head(embeddings, torch.tensor([0, 1, 2]))
            loss.backward()
            assert loss.isfinite() and embeddings.grad is not None and embeddings.grad.isfinite().all()
            assert head.weight.grad is not None and head.weight.grad.isfinite().all()


def test_a_zero_embedding_has_a_finite_loss() -> None:
    embeddings = torch.zeros(2, 4, requires_grad=True)
    loss = pfc.PartialFC(4, 6)(embeddings, torch.tensor([0, 5]))
    loss.backward()
    assert loss.isfinite() and embeddings.grad is not None and embeddings.grad.isfinite().all()


def test_eval_and_no_grad_use_all_classes_and_change_nothing() -> None:
    head = pfc.PartialFC(4, 100, sample_rate=0.1)
    embeddings, labels = torch.randn(3, 4), torch.tensor([1, 2, 3])
    whole = pfc.PartialFC(4, 100)(embeddings, labels)
    with torch.no_grad():
        assert torch.equal(head(embeddings, labels), whole)
    assert torch.equal(head.eval()(embeddings, labels), whole)
    assert int(head.position) == 0
    sampled = head.train()(embeddings, labels)
    assert int(head.position) == 3 and sampled < whole
    assert head.stats is not None and head.stats.positive_classes == 3
    assert 10 <= head.stats.sampled_classes <= 13


def test_position_is_saved_and_stays_on_the_cpu() -> None:
    head = pfc.PartialFC(4, 100)
    head(torch.randn(3, 4), torch.tensor([1, 2, 3]))
    assert head.state_dict()["position"].item() == 3
    other = pfc.PartialFC(4, 100)
    other.load_state_dict(head.state_dict())
    assert int(other.position) == 3
    assert int(head.double().position) == 3 and head.position.dtype == torch.int64


def test_one_class_and_one_row() -> None:
    head = pfc.PartialFC(4, 1)
    assert head(torch.randn(1, 4), torch.tensor([0])).item() == 0.0


def test_half_precision_products_stay_near() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(16, 32), torch.randint(200, (16,))
    exact = pfc.PartialFC(32, 200, scale=16.0).double()(embeddings.double(), labels).item()
    for dtype in (torch.bfloat16, torch.float16):
        head = pfc.PartialFC(32, 200, scale=16.0, compute_dtype=dtype)
        half = embeddings.to(dtype).requires_grad_()
        loss = head(half, labels)
        loss.backward()
        assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == dtype
        assert loss.item() == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda h: h(torch.ones(2, 3), torch.tensor([0, 1])), ValueError, r"shape \(2, 3\), expected \[2, 4\]"),
        (lambda h: h(torch.ones(2, 4), torch.tensor([0.0, 1.0])), ValueError, "expected int64"),
        (lambda h: h(torch.ones(2, 4), torch.tensor([0, 10])), pfc.LabelError, "label 10 in row 1 of rank 0"),
        (lambda h: h(torch.ones(2, 4), torch.tensor([-1, 0])), pfc.LabelError, "label -1 in row 0 of rank 0"),
        (lambda h: h(torch.full((1, 4), torch.nan), torch.tensor([0])), pfc.NonFiniteError, "row 0 of rank 0"),
        (lambda h: h(torch.full((1, 4), torch.inf), torch.tensor([0])), pfc.NonFiniteError, "row 0 of rank 0"),
        (lambda h: h(torch.ones(0, 4), torch.ones(0, dtype=torch.int64)), ValueError, "batch is empty"),
        (lambda h: h.topk(torch.ones(1, 4), 11), ValueError, "k=11, expected 1 to 10"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(pfc.PartialFC(4, 10))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"mining": "hard"}, "mining='hard'"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(pfc.ConfigError, match=match):
        pfc.PartialFC(**{"embedding_size": 4, "num_classes": 10, **options})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pfc.CosFace(-0.1), "CosFace: m=-0.1"),
        (lambda: pfc.ArcFace(4.0), "ArcFace: m=4.0"),
        (lambda: pfc.CombinedMargin(m1=0.0), "CombinedMargin: m1=0.0"),
        (lambda: pfc.SupportVectors(0.9), "SupportVectors: t=0.9"),
        (lambda: pfc.SupportVectors(mode="soft"), "SupportVectors: mode='soft'"),
        (lambda: pfc.SupportVectors(top_k=0), "SupportVectors: top_k=0"),
        (lambda: pfc.Plain(filter_above=1.5), "Plain: filter_above=1.5"),
    ],
)
def test_bad_margins_and_negatives(make: Any, match: str) -> None:
    with pytest.raises(pfc.ConfigError, match=match):
        make()


MEMORY = """
import re, torch, partial_fc as pfc
torch.set_num_threads(1)
torch.mm(torch.randn(256, 512), torch.randn(512, 256))  # what the library itself takes once
# Not getrusage: its peak begins with that of the process that forked this one.
def memory(name): return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
head = pfc.PartialFC(512, 200_000)
optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, in_backward=True)
for _ in range(2):
    embeddings = torch.randn(256, 512, requires_grad=True)
    head(embeddings, torch.randint(200_000, (256,))).backward()
    optimizer.step()
print((memory("VmHWM") - before) / (2 * head.weight.numel() * 4))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from Linux's /proc")
def test_a_step_needs_little_more_than_weights_and_momentum() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment, timeout=300
    )
    assert 1.0 <= float(done.stdout) < 1.3, f"peak / (weights + momentum) is {done.stdout}"


def test_a_deferred_failure_is_raised_by_the_next_forward() -> None:
    head = pfc.PartialFC(4, 10, defer_checks=True)
    head(torch.ones(2, 4), torch.tensor([0, 99])).backward()
    with pytest.raises(pfc.LabelError, match="label 99 in row 1 of rank 0"):
        head(torch.ones(2, 4), torch.tensor([0, 1]))
    head(torch.ones(2, 4), torch.tensor([0, 1])).backward()
    head.check()


def test_prepare_and_forward_may_differ_in_mode() -> None:
    head, labels = pfc.PartialFC(4, 100, sample_rate=0.1), torch.tensor([1, 2])
    with torch.no_grad():
        head.prepare(labels)
    head(torch.ones(2, 4), labels)
    assert head.stats is not None and head.stats.sampled_classes <= 12
    head.prepare(labels)
    with torch.no_grad():
        head(torch.ones(2, 4), labels)
    assert head.stats.sampled_classes == 100


def test_topk_refuses_what_is_not_finite() -> None:
    with pytest.raises(pfc.NonFiniteError, match="row 1 of rank 0"):
        pfc.PartialFC(4, 10).topk(torch.tensor([[1.0, 0, 0, 0], [torch.nan, 0, 0, 0]]), 2)


def test_autocast_leaves_the_products_alone() -> None:
    head, embeddings = pfc.PartialFC(16, 50), torch.randn(4, 16)
    values, _ = head.topk(embeddings, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.topk(embeddings, 3)[0], values)
