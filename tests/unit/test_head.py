"""The head on one process: gradcheck, modes, position, precision, memory, messages."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

import partial_fc as pfc
from partial_fc import step

MARGINS = [
    pfc.NormFace(),
    pfc.CosFace(0.35),
    pfc.ArcFace(0.5),
    pfc.CombinedMargin(1.2, 0.3, 0.1),
    pfc.ArcFace(0.5, easy_margin=True),
    pfc.SphereFace(3, lambda_start=20.0),
    pfc.MagFace(l_a=0.5, u_a=4.0),
]
NEGATIVES = [
    pfc.Plain(),
    pfc.Plain(filter_above=0.2),
    pfc.SupportVectors(1.2),
    pfc.SupportVectors(1.2, "fixed", top_k=3),
    pfc.SupportVectors(1.2, top_k=2, filter_above=0.3),
    pfc.Curricular(),
    pfc.Curricular(top_k=3),
]
MININGS = [None, pfc.FocalLoss(), pfc.HardMining(0.5)]


@dataclasses.dataclass(frozen=True)
class HeldCurricular(pfc.Curricular):
    """Curricular whose tau stays."""

    def advance(self, state: Any, target_cosine: torch.Tensor) -> Any:
        return dict(state)


def loss_of(head: pfc.PartialFC, labels: torch.Tensor) -> Any:
    def loss(embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        head.position.zero_()
        head.step.zero_()
        result: torch.Tensor = torch.func.functional_call(head, {"weight": weight}, (embeddings, labels))
        return result

    return loss


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradcheck(margin: Any, negatives: Any, mining: Any) -> None:
    torch.manual_seed(3)
    head = pfc.PartialFC(4, 11, margin, negatives, mining, scale=8.0, chunk_size=4).double()
    if isinstance(negatives, pfc.Curricular):
        # tau follows the batch, but the definition takes it as given: hold it.
        head.negatives = HeldCurricular(top_k=negatives.top_k)
        head.negatives_tau.fill_(0.3)
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
        ({"margin": 0.5}, "margin=0.5"),
        ({"negatives": None}, "negatives=None"),
        ({"sampled_classes": 11}, "sampled_classes=11, expected 1 to 10"),
        ({"sampled_classes": 5, "sample_rate": 0.5}, "sampled_classes=5, expected None beside sample_rate=0.5"),
        ({"logits_budget": -1}, "logits_budget=-1"),
        ({"logits_budget": 1e6}, "logits_budget=1000000.0, expected a whole number, or None"),
        ({"seed": 1.5}, "seed=1.5, expected a whole number"),
        ({"chunk_size": 2.5}, "chunk_size=2.5, expected a whole number"),
        ({"scale": "64"}, "scale='64', expected a number"),
        ({"correct_sampling": True}, "correct_sampling=True, expected False where all classes are used"),
        ({"filter_gradient": 0.0}, "filter_gradient=0.0"),
        ({"kernels": "fast"}, "kernels='fast'"),
        ({"compute_dtype": torch.int8}, "compute_dtype=torch.int8"),
        ({"storage_dtype": torch.float16}, "storage_dtype=torch.float16"),
        ({"margin_warmup_steps": -1}, "margin_warmup_steps=-1"),
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
import re, sys, torch, partial_fc as pfc
from partial_fc.kernels.compiled import works
torch.set_num_threads(1)
# Not getrusage: its peak begins with that of the process that forked this one.
def memory(name): return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def train(classes, batch, backend, **options):
    head = pfc.PartialFC(512, classes, kernels=backend, **options)
    optimizer = pfc.optim.RowSGD(
        head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, kernels=backend, in_backward=True
    )
    for _ in range(3):
        embeddings = torch.randn(batch, 512, requires_grad=True)
        head(embeddings, torch.randint(classes, (batch,))).backward()
        optimizer.step()
    return 2 * head.weight.numel() * 4
options = eval(sys.argv[3])
# What the libraries take once: the products' buffers, the compiler's modules.
works("cpu")
train(3000, 64, "compiled", **{**options, **({"sampled_classes": 1000} if "sampled_classes" in options else {})})
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
state = train(int(sys.argv[1]), int(sys.argv[2]), "auto", **options)
print(memory("VmHWM") - before, state)
"""


@pytest.mark.memory
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak memory in Linux's /proc")
@pytest.mark.parametrize(
    ("num_classes", "batch", "options"),
    [
        (200_000, 256, {}),
        (100_000, 512, {"logits_budget": 100_000 * 256 * 4}),
        (300_000, 128, {"sampled_classes": 30_000}),
    ],
)
def test_a_step_needs_little_more_than_weights_and_momentum(
    num_classes: int, batch: int, options: dict[str, Any]
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", MEMORY, str(num_classes), str(batch), repr(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment, timeout=300)
    peak, state = map(int, done.stdout.split())
    assert state <= peak <= 1.15 * state + (64 << 20) + options.get("logits_budget", 0)


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


def step_of(head: pfc.PartialFC, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss, and gradients of embeddings and weight; the same position each time."""
    head.position.zero_()
    head.step.zero_()
    head.weight.grad = None
    leaf = embeddings.clone().requires_grad_()
    loss = head(leaf, labels)
    loss.backward()
    assert leaf.grad is not None and head.weight.grad is not None
    return loss.detach(), leaf.grad, head.weight.grad.to_dense()


def two_heads(first: dict[str, Any], second: dict[str, Any], **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """The same step with two sets of options."""
    torch.manual_seed(1)
    embeddings, labels = torch.randn(37, 24), torch.randint(211, (37,))
    return [
        step_of(pfc.PartialFC(24, 211, scale=16.0, chunk_size=48, **options, **extra), embeddings, labels)
        for extra in (first, second)
    ]


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("negatives", [pfc.Plain(), pfc.SupportVectors(1.2), pfc.SupportVectors(1.2, top_k=3)])
def test_kept_products_change_no_bit(negatives: Any, rate: float) -> None:
    kept = {"logits_budget": 4 * 37 * 48 * 2 + 5}
    for one, other in zip(*two_heads({}, kept, negatives=negatives, sample_rate=rate), strict=True):
        assert torch.equal(one, other)


def test_kept_products_are_made_again_for_a_second_backward() -> None:
    head = pfc.PartialFC(24, 211, logits_budget=1 << 20)
    embeddings = torch.randn(5, 24, requires_grad=True)
    loss = head(embeddings, torch.arange(5))
    (first,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    head(embeddings, torch.arange(5)).backward()  # takes the memory over
    (second,) = torch.autograd.grad(loss, embeddings)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["margin", "negatives"])
def test_warm_up_grows_to_the_whole_axis(name: str) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 4), torch.arange(8)
    warm = pfc.PartialFC(4, 50, **{f"{name}_warmup_steps": 4})
    plain = {"margin": pfc.NormFace(), "negatives": pfc.SupportVectors(1.2)}
    bare = pfc.PartialFC(4, 50, **(plain if name == "margin" else {"negatives": pfc.Plain()}))
    whole = pfc.PartialFC(4, 50)
    losses = [warm(embeddings, labels).item() for _ in range(6)]
    first, last = bare(embeddings, labels).item(), whole(embeddings, labels).item()
    assert first < losses[0] < losses[1] < losses[2] < losses[3] == losses[4] == losses[5] == last
    assert int(warm.step) == 6 and warm.state_dict()["step"].item() == 6


def test_filtered_gradients_err_by_less_than_the_bound() -> None:
    epsilon = 0.1
    (loss, by_embeddings, by_weight), (other, filtered_embeddings, filtered) = two_heads(
        {}, {"filter_gradient": epsilon}, negatives=pfc.Plain()
    )
    assert torch.equal(loss, other) and torch.equal(by_embeddings, filtered_embeddings)
    left_out = (filtered == 0).all(1)
    assert 0 < left_out.sum() < 211
    assert torch.allclose(filtered[~left_out], by_weight[~left_out], rtol=1e-4, atol=1e-7)
    # Of a class that is left out every row misses less than scale x epsilon, divided by the norm of the centre.
    norms = pfc.PartialFC(24, 211).weight.norm(dim=1)
    assert (by_weight[left_out].norm(dim=1) <= 16.0 * epsilon / norms[left_out]).all()


def test_filtered_classes_keep_momentum_and_decay() -> None:
    head = pfc.PartialFC(4, 50, scale=4.0, filter_gradient=0.9)
    optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.5, weight_decay=0.1, in_backward=True)
    before = head.weight.detach().clone()
    head(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    others = torch.tensor([0, *range(4, 50)])
    torch.testing.assert_close(head.weight[others], before[others] * (1 - 0.5 * 0.1))


def test_corrected_sampling_estimates_the_loss_of_all_classes() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(16, 8), torch.randint(4000, (16,))
    options: dict[str, Any] = {"margin": pfc.NormFace(), "negatives": pfc.Plain(), "scale": 4.0}
    whole = pfc.PartialFC(8, 4000, **options)(embeddings, labels).item()
    corrected = pfc.PartialFC(8, 4000, **options, sampled_classes=400, correct_sampling=True)
    bare = pfc.PartialFC(8, 4000, **options, sampled_classes=400)
    draws = [corrected(embeddings, labels).item() for _ in range(20)]
    assert sum(draws) / 20 == pytest.approx(whole, rel=2e-3)
    assert bare(embeddings, labels).item() < whole - 2  # about log 10


def test_bfloat16_centres_train() -> None:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(64, 16))
    labels = torch.arange(64)
    final = {}
    for storage in (torch.float32, torch.bfloat16):
        head = pfc.PartialFC(16, 64, scale=16.0, storage_dtype=storage)
        optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.05, momentum=0.9, state_dtype=storage, in_backward=True)
        for _ in range(60):
            loss = head(embeddings, labels)
            loss.backward()
            optimizer.step()
        assert head.weight.dtype == optimizer.state[head.weight]["momentum_buffer"].dtype == storage
        final[storage] = float(loss.detach())
    assert final[torch.bfloat16] == pytest.approx(final[torch.float32], rel=0.05)


def test_kept_rows_belong_to_the_step_that_gathered_them() -> None:
    def train(interrupted: bool) -> list[torch.Tensor]:
        head = pfc.PartialFC(8, 400, sampled_classes=20)
        embeddings = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        first = head(embeddings, torch.arange(5))
        if interrupted:
            head(embeddings, torch.arange(5) + 300)  # gathers other rows into the same memory
        return list(torch.autograd.grad(first, [embeddings, head.weight]))

    for one, other in zip(train(False), train(True), strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_products_may_come_in_memory_of_their_own(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    # As on a GPU in half precision.
    options = {"sample_rate": rate, "negatives": pfc.SupportVectors(1.2, top_k=3)}
    variants: list[dict[str, Any]] = [{}, {"logits_budget": 1 << 20}, {"filter_gradient": 1e-9}]
    expected = [two_heads(extra, extra, **options)[0] for extra in variants]
    multiply = step.multiply

    def elsewhere(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, out: Any = None, **more: Any) -> Any:
        return multiply(left, right, dtype, None, **more)

    monkeypatch.setattr(step, "multiply", elsewhere)
    for extra, right in zip(variants, expected, strict=True):
        for one, other in zip(two_heads(extra, extra, **options)[0], right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_filtered_gradients_are_near_for_every_emphasis(negatives: Any, rate: float) -> None:
    exact, filtered = two_heads({}, {"filter_gradient": 1e-4}, negatives=negatives, sample_rate=rate)
    assert (filtered[2] - exact[2]).norm() <= 1e-3 * exact[2].norm()
    assert torch.equal(filtered[1], exact[1])


def test_labels_may_be_filled_anew_before_the_backward() -> None:
    head, labels = pfc.PartialFC(4, 50, sample_rate=0.5), torch.tensor([1, 2, 3])
    embeddings = torch.randn(3, 4, requires_grad=True)
    loss = head(embeddings, labels)
    (right,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    labels.fill_(7)
    (again,) = torch.autograd.grad(loss, embeddings)
    assert torch.equal(again, right)


def test_a_trained_head_is_pickled_and_freed() -> None:
    head = pfc.PartialFC(4, 400, sampled_classes=20)
    head(torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3])).backward()
    other = pickle.loads(pickle.dumps(head))
    assert torch.equal(other.weight, head.weight) and int(other.position) == 3
    gone = weakref.ref(head)
    del head
    assert gone() is None


def test_half_precision_products_stay_finite_for_tiny_centres() -> None:
    torch.manual_seed(0)
    head = pfc.PartialFC(16, 50, compute_dtype=torch.float16)
    with torch.no_grad():
        head.weight.mul_(1e-3)
        head.weight[7] = 0
    embeddings = torch.randn(8, 16, requires_grad=True)
    head(embeddings, torch.arange(8)).backward()
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()
