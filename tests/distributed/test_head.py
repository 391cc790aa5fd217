"""The head against the dense float64 definition: losses, gradients, statistics, on 1 to 4 ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_fc as pfc
from tests.oracle import dense_gradients, dense_stats, next_state, topk

MARGINS: list[dict[str, Any]] = [
    {"name": "NormFace"},
    {"name": "CosFace", "m": 0.35},
    {"name": "CosFace", "m": 0.2, "easy_margin": True},
    {"name": "ArcFace", "m": 0.5},
    {"name": "ArcFace", "m": 0.8, "easy_margin": True},
    {"name": "CombinedMargin", "m1": 1.3, "m2": 0.4, "m3": 0.1},
    {"name": "CombinedMargin", "m1": 1.0, "m2": 0.5, "m3": 0.0, "easy_margin": True},
    {"name": "SphereFace", "m": 3, "lambda_start": 50.0},
    {"name": "MagFace", "l_a": 1.0, "u_a": 5.0},
    {"name": "AdaFace", "m": 0.4, "momentum": 0.7},
]
NEGATIVES: list[dict[str, Any]] = [
    *({"name": "Plain", "filter_above": above} for above in (None, 0.4)),
    *(
        {"name": "SupportVectors", "t": 1.2, "mode": mode, "top_k": k, "filter_above": above}
        for mode, k, above in itertools.product(("adaptive", "fixed"), (None, 3), (None, 0.4))
    ),
    {"name": "Curricular", "momentum": 0.6},
    {"name": "Curricular", "momentum": 0.6, "top_k": 3, "filter_above": 0.4},
]
MININGS: list[dict[str, Any]] = [{"name": "FocalLoss", "gamma": 2.0}, {"name": "HardMining", "keep": 0.55}]
RATES = (1.0, 0.3)
CASES = [*itertools.product(MARGINS, NEGATIVES, RATES)]
SCALE = 16.0
STEP = 7


def build(name: str, **settings: Any) -> Any:
    return getattr(pfc, name)(**settings)


def problem(num_classes: int, batch: int, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels, weight: some rows near their class centre, some opposite to it, some anywhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    noise = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    pull = torch.tensor([1.0, 0.5, 0.0, -1.5], dtype=torch.float64).repeat(batch)[:batch, None]
    return weight[labels] * pull + 0.7 * noise, labels, weight


def local_rows(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def make_head(weight: Tensor, rank: int, world_size: int, **settings: Any) -> pfc.PartialFC:
    head = pfc.PartialFC(weight.shape[1], len(weight), **settings).double()
    start, end = head.shards.bounds(rank)
    with torch.no_grad():
        head.weight.copy_(weight[start:end])
    return head


def run_case(rank: int, world_size: int, case: Any, data: Any, sizes: list[int], **extra: Any) -> dict[str, Any]:
    margin, negatives, rate = case
    embeddings, labels, weight = data
    extra = {"chunk_size": 7, "scale": SCALE, **extra}
    head = make_head(
        weight,
        rank,
        world_size,
        margin=build(**margin),
        negatives=build(**negatives),
        sample_rate=rate,
        uneven_batches=len(set(sizes)) > 1,
        **{key: build(**value) if key == "mining" else value for key, value in extra.items()},
    )
    head.position.fill_(41)
    head.step.fill_(STEP)
    rows = local_rows(sizes, rank)
    mine = embeddings[rows].clone().requires_grad_()
    loss = head(mine, labels[rows])
    loss.backward()
    start, end = head.shards.bounds(rank)
    gradient = head.weight.grad
    assert gradient is not None and mine.grad is not None and head.stats is not None
    ids = torch.arange(start, end)
    if gradient.is_sparse:
        ids = gradient.coalesce().indices()[0] + start
        gradient = gradient.to_dense()
    stats = head.stats
    return {
        "loss": loss.detach(),
        "embeddings": mine.grad,
        "weight": gradient,
        "ids": ids,
        "support_vectors": stats.support_vectors,
        "share": stats.support_vector_share,
        "cosine": stats.target_cosine,
        "position": int(head.position),
        "step": int(head.step),
        "state": {
            name.split("_", 1)[1]: value.item()
            for name, value in head.named_buffers()
            if name not in ("position", "step")
        },
        "calls": dict(head.group.calls),
        "norms": stats.centre_norms,
        "positives": int(stats.positive_classes),
    }


def run_cases(
    rank: int, world_size: int, cases: Any, data: Any, sizes: list[int], extras: Any = None
) -> list[dict[str, Any]]:
    extras = extras or [{}] * len(cases)
    return [run_case(rank, world_size, case, data, sizes, **extra) for case, extra in zip(cases, extras, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    error = (actual - expected).norm().item()
    assert error <= tolerance * max(expected.norm().item(), 1e-6), f"{what}: error {error}, norm {expected.norm()}"


def compare(
    case: Any, data: Any, parts: list[dict[str, Any]], world_size: int, corrected: bool = False, **axes: Any
) -> None:
    margin, negatives, rate = case
    embeddings, labels, weight = data
    ids = torch.cat([part["ids"] for part in parts])
    settings = {"margin": margin, "negatives": negatives, "scale": SCALE, "sampled": ids, "step": STEP, **axes}
    settings["state"] = state = next_state(embeddings, labels, weight, margin=margin, negatives=negatives)
    if corrected:
        positive = torch.isin(ids, labels)
        missing = len(weight) - len(labels.unique())
        weight_of_drawn = missing / int((~positive).sum())
        settings["log_weight"] = torch.where(positive, 0.0, torch.tensor(weight_of_drawn, dtype=torch.float64).log())
    loss, by_embeddings, by_weight = dense_gradients(embeddings, labels, weight, world_size=world_size, **settings)
    name = f"{margin} {negatives} {rate}"
    for part in parts:
        assert_close(part["loss"], loss, f"loss of {name}")
        assert (part["position"], part["step"]) == (41 + len(labels), STEP + 1)
        assert part["state"] == pytest.approx(state, rel=1e-12)
    assert sum(part["positives"] for part in parts) == len(labels.unique())
    for part in parts:
        norms = weight[part["ids"]].norm(dim=1)
        found = part["norms"]
        assert (found is None) == (len(norms) == 0)
        assert found is None or found.tolist() == pytest.approx([norms.min().item(), norms.max().item()], rel=1e-12)
    assert_close(torch.cat([part["embeddings"] for part in parts]), by_embeddings, f"embeddings of {name}")
    assert_close(torch.cat([part["weight"] for part in parts]), by_weight, f"weight of {name}")
    stats = dense_stats(embeddings, labels, weight, **settings)
    assert parts[0]["cosine"].item() == pytest.approx(stats["target_cosine"].mean().item(), rel=1e-9)
    if negatives["name"] != "Plain":
        counts = stats["support_vectors"].double()
        assert parts[0]["support_vectors"].item() == pytest.approx(counts.mean().item(), rel=1e-6)
        assert parts[0]["share"].item() == pytest.approx((counts > 0).double().mean().item(), rel=1e-6)
    else:
        assert parts[0]["support_vectors"] is None


@pytest.mark.parametrize(("num_classes", "world_size"), [(101, 1), (101, 2), (101, 3), (4, 3), (9, 4)])
def test_every_axis_agrees_with_the_definition(ranks: Any, num_classes: int, world_size: int) -> None:
    batch = 6
    data = problem(num_classes, batch * world_size)
    by_rank = ranks(world_size).run(run_cases, CASES, data, [batch] * world_size, timeout=240)
    for index, case in enumerate(CASES):
        compare(case, data, [results[index] for results in by_rank], world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mining_correction_and_kept_products_agree_with_the_definition(ranks: Any, world_size: int) -> None:
    data = problem(101, 6 * world_size, seed=8)
    losses = [
        (MARGINS[1], NEGATIVES[2]),
        (MARGINS[8], NEGATIVES[4]),
        (MARGINS[9], NEGATIVES[10]),
        (MARGINS[3], {"name": "Plain"}),
    ]
    axes: list[dict[str, Any]] = [{"mining": mining} for mining in MININGS]
    axes += [{"correct_sampling": True}, {"logits_budget": 8 * 7 * 6 * world_size * 2}, {"logits_budget": 1 << 20}]
    axes += [{"mining": MININGS[1], "correct_sampling": True, "logits_budget": 1 << 20}]
    chosen = [((*loss, rate), extra) for loss in losses for extra in axes for rate in RATES]
    chosen = [(case, extra) for case, extra in chosen if case[2] < 1 or "correct_sampling" not in extra]
    cases, extras = zip(*chosen, strict=True)
    by_rank = ranks(world_size).run(run_cases, cases, data, [6] * world_size, extras, timeout=240)
    for index, (case, extra) in enumerate(chosen):
        compare(
            case,
            data,
            [results[index] for results in by_rank],
            world_size,
            corrected="correct_sampling" in extra,
            mining=extra.get("mining"),
        )


def two_steps(rank: int, world_size: int, data: Any) -> tuple[list[float], list[dict[str, float]]]:
    embeddings, labels, weight = data
    head = make_head(weight, rank, world_size, margin=pfc.AdaFace(), negatives=pfc.Curricular())
    rows = local_rows([6 // world_size] * world_size, rank)
    losses, states = [], []
    for factor in (1.0, 3.0):
        losses.append(head(embeddings[rows] * factor, labels[rows]).item())
        states.append({name: getattr(head, name).item() for name in ("margin_mean", "margin_std", "negatives_tau")})
    with torch.no_grad():
        head(embeddings[rows], labels[rows])
    head.eval()(embeddings[rows], labels[rows])
    states.append({name: getattr(head, name).item() for name in ("margin_mean", "margin_std", "negatives_tau")})
    return losses, states


def test_running_state_is_global_and_moves_in_training_only(ranks: Any) -> None:
    data = problem(101, 6, seed=9)
    losses, states = ranks(1).run(two_steps, data)[0]
    assert states[0] != states[1] == states[2]
    for world_size in (2, 3):
        for other_losses, other_states in ranks(world_size).run(two_steps, data):
            assert other_losses == pytest.approx(losses, rel=1e-12)
            for one, other in zip(states, other_states, strict=True):
                assert other == pytest.approx(one, rel=1e-12)


def test_uneven_batches(ranks: Any) -> None:
    sizes = [5, 0, 3]
    data = problem(101, sum(sizes), seed=3)
    cases = [(MARGINS[3], NEGATIVES[4], 1.0), (MARGINS[1], NEGATIVES[2], 0.3), (MARGINS[8], NEGATIVES[10], 0.3)]
    by_rank = ranks(3).run(run_cases, cases, data, sizes)
    for index, case in enumerate(cases):
        compare(case, data, [results[index] for results in by_rank], 3)


def test_a_shard_without_sampled_classes(ranks: Any) -> None:
    embeddings, _, weight = problem(101, 6, seed=4)
    data = embeddings, torch.tensor([0, 1, 2, 3, 4, 5]), weight
    cases = [(MARGINS[1], negatives, 0.02) for negatives in NEGATIVES]
    by_rank = ranks(3).run(run_cases, cases, data, [2, 2, 2])
    assert any(len(results[0]["ids"]) == 0 for results in by_rank), "every shard drew a class: choose another seed"
    for index, case in enumerate(cases):
        compare(case, data, [results[index] for results in by_rank], 3)


def test_top_k_breaks_ties_by_the_lowest_class_on_any_shards(ranks: Any) -> None:
    # Corners of a cube: all cosines are multiples of 1/2, exactly, so ties abound within and across shards.
    corners = torch.tensor([*itertools.product((-1.0, 1.0), repeat=4)], dtype=torch.float64)
    weight = corners.repeat(3, 1)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    labels = torch.arange(0, 48, 6)
    data = corners[[0, 3, 5, 7, 8, 9, 12, 15]], labels, weight
    negatives = [{"name": "SupportVectors", "t": 1.2, "mode": "adaptive", "top_k": k} for k in (1, 2, 5, 60)]
    cases = [({"name": "CosFace", "m": 0.35}, negative, rate) for negative in negatives for rate in (1.0, 0.3)]
    for world_size in (1, 2, 4):
        by_rank = ranks(world_size).run(run_cases, cases, data, [8 // world_size] * world_size)
        for index, case in enumerate(cases):
            compare(case, data, [results[index] for results in by_rank], world_size)


def run_topk(rank: int, world_size: int, data: Any, sizes: list[int], k: int) -> tuple[Tensor, Tensor]:
    embeddings, _, weight = data
    head = make_head(weight, rank, world_size, chunk_size=4)
    return head.topk(embeddings[local_rows(sizes, rank)], k)


@pytest.mark.parametrize(("num_classes", "sizes", "k"), [(101, [3, 4], 5), (4, [1, 0, 2], 4), (9, [2, 2, 2, 1], 3)])
def test_topk_over_all_shards(ranks: Any, num_classes: int, sizes: list[int], k: int) -> None:
    data = problem(num_classes, sum(sizes), seed=7)
    parts = ranks(len(sizes)).run(run_topk, data, sizes, k)
    values, classes = topk(data[0], data[2], k)
    assert_close(torch.cat([part[0] for part in parts]), values, "cosines")
    assert torch.equal(torch.cat([part[1] for part in parts]), classes)


def count_collectives(rank: int, world_size: int, data: Any) -> dict[str, int]:
    embeddings, labels, weight = data
    head = make_head(weight, rank, world_size, sample_rate=0.3, negatives=pfc.SupportVectors(top_k=3))
    rows = local_rows([4] * world_size, rank)
    mine = labels[rows]
    head.prepare(mine)
    early = head.group.calls.copy()
    head(embeddings[rows].clone().requires_grad_(), mine).backward()
    assert early == {"labels": 1}
    return dict(head.group.calls - early)


def test_a_step_needs_four_collectives(ranks: Any) -> None:
    expected = {"embeddings": 1, "target_cosines": 1, "normalizers": 1, "embedding_gradient": 1}
    assert ranks(2).run(count_collectives, problem(101, 8)) == [expected, expected]


def initial_centres(rank: int, world_size: int) -> Tensor:
    return pfc.PartialFC(3, 10_007, seed=5).weight.detach()


def test_initial_centres_do_not_depend_on_the_world_size(ranks: Any) -> None:
    whole = ranks(1).run(initial_centres)[0]
    assert not torch.equal(whole[:100], whole[3336:3436]), "shards start alike"
    assert whole.std().item() == pytest.approx(0.01, rel=0.02)
    for world_size in (2, 3):
        assert torch.equal(torch.cat(ranks(world_size).run(initial_centres)), whole)


def sampled_at(rank: int, world_size: int, position: int) -> Tensor:
    head = pfc.PartialFC(3, 10_007, sample_rate=0.05, seed=5)
    head.position.fill_(position)
    head(torch.ones(12 // world_size, 3), torch.full((12 // world_size,), 77)).backward()
    assert head.weight.grad is not None
    return head.weight.grad.coalesce().indices()[0] + head.shards.bounds(rank)[0]


def test_samples_are_a_function_of_the_position(ranks: Any) -> None:
    draws = {}
    for position in (0, 12, 24):
        draws[position] = ranks(1).run(sampled_at, position)[0]
        for world_size in (2, 3, 4):
            assert torch.equal(torch.cat(ranks(world_size).run(sampled_at, position)), draws[position])
    # 500 of 10,007 drawn twice: about 25 in common.
    assert len(set(draws[0].tolist()) & set(draws[12].tolist())) < 60


def bad_input(rank: int, world_size: int, kind: str, defer: bool) -> str:
    head = pfc.PartialFC(4, 10, defer_checks=defer)
    before = head.weight.detach().clone()
    optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, in_backward=True)
    embeddings, labels = torch.ones(3, 4), torch.tensor([1, 2, 3])
    if kind == "label" and rank == 1:
        labels[2] = 10
    if kind == "embedding" and rank == 1:
        embeddings[0, 1] = torch.nan
    if kind == "weight" and rank == 1:
        with torch.no_grad():
            head.weight[0, 0] = before[0, 0] = torch.inf
    try:
        loss = head(embeddings.requires_grad_(), labels)
        loss.backward()
        optimizer.step()
        assert defer and loss.isnan()
        assert embeddings.grad is not None and not embeddings.grad.any()
        head.check()
    except (pfc.LabelError, pfc.NonFiniteError) as error:
        assert torch.equal(head.weight, before)
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("label", "LabelError: label 10 in row 2 of rank 1 is outside"),
        ("embedding", "NonFiniteError: "),
        ("weight", "NonFiniteError: "),
    ],
)
def test_bad_input_is_an_error_on_every_rank_and_trains_nothing(ranks: Any, kind: str, named: str, defer: bool) -> None:
    for message in ranks(2).run(bad_input, kind, defer):
        assert message.startswith(named)
        if kind == "embedding":
            assert "row 0 of rank 1" in message
