"""The chunk functions: compiled equals plain, both near float64; nothing is compiled again for another size."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_fc as pfc
from partial_fc import kernels
from partial_fc.kernels import choose_kernels, pack_numbers, reference
from partial_fc.kernels.compiled import works

CPU = torch.device("cpu")


def chunk(classes: int, batch: int, dtype: torch.dtype, coefficients: Any, above: float | None) -> dict[str, Any]:
    """Arguments of a chunk: some targets inside, some elsewhere."""
    generator = torch.Generator().manual_seed(classes)
    product = torch.randn(classes, batch, generator=generator, dtype=torch.float64)
    norm = torch.rand(classes, generator=generator, dtype=torch.float64) + 1.5
    rows = torch.rand(3, batch, generator=generator, dtype=torch.float64)
    like = torch.zeros((), dtype=dtype)
    return {
        "product_PB": product.to(dtype),
        "inverse_norm_P": norm.reciprocal().to(dtype),
        "target_B": torch.randint(-2, classes + 2, (batch,), generator=generator, dtype=torch.int32),
        "boundary_B": rows[0].sub(0.3).to(dtype),
        "numbers": pack_numbers(16.0, coefficients, above, like),
        "log_normalizer_B": rows[1].add(14).to(dtype),
        "row_factor_B": rows[2].mul(16).to(dtype),
        "target_gradient_B": rows[2].neg().to(dtype),
        "offset_P": norm.log().to(dtype),
    }


def run(functions: Any, dtype: torch.dtype, emphasis: Any, above: float | None, offset: bool) -> list[Tensor]:
    """Two chunks added to the normalizer, and the gradient of the second."""
    results: list[Tensor] = []
    maximum, total = torch.full((23,), -torch.inf, dtype=dtype), torch.zeros(23, dtype=dtype)
    count = None if emphasis is None else torch.zeros(23, dtype=dtype)
    for classes in (13, 31):
        given = chunk(classes, 23, dtype, emphasis, above)
        offsets = given["offset_P"] if offset else None
        functions.accumulate(
            given["product_PB"],
            given["inverse_norm_P"],
            offsets,
            given["target_B"],
            given["boundary_B"],
            given["numbers"],
            maximum,
            total,
            count,
        )
        peak = torch.empty_like(given["inverse_norm_P"]) if classes == 31 else None
        out = torch.empty_like(given["product_PB"]) if classes == 31 else None
        functions.gradient(
            given["product_PB"],
            given["inverse_norm_P"],
            offsets,
            given["target_B"],
            None if emphasis is None else given["boundary_B"],
            given["log_normalizer_B"],
            given["row_factor_B"],
            given["target_gradient_B"],
            given["numbers"],
            out,
            peak,
        )
        results += [given["product_PB"] if out is None else out] + ([] if peak is None else [peak])
    return [*results, maximum + total.log(), *([] if count is None else [count])]


@pytest.mark.parametrize(
    ("emphasis", "above", "offset"),
    [*itertools.product([None, (0.0, 1.2, 0.2), (1.0, 0.3, 0.0)], [None, 0.4], [False, True])],
)
def test_compiled_functions_equal_the_plain_ones(emphasis: Any, above: float | None, offset: bool) -> None:
    exact = run(choose_kernels("eager", CPU, torch.float64, 0), torch.float64, emphasis, above, offset)
    plain = run(choose_kernels("eager", CPU, torch.float32, 0), torch.float32, emphasis, above, offset)
    fused = run(choose_kernels("compiled", CPU, torch.float32, 0), torch.float32, emphasis, above, offset)
    for one, other, truth in zip(plain, fused, exact, strict=True):
        honest = (one.double() - truth).norm()
        assert (other.double() - truth).norm() <= 2 * honest + 1e-6 * truth.norm()


def test_nothing_is_compiled_again_when_sizes_change() -> None:
    compilations = torch._dynamo.utils.counters["stats"]
    head = pfc.PartialFC(8, 5000, kernels="compiled", sampled_classes=700, chunk_size=256)
    optimizer = pfc.optim.RowSGD(
        head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, kernels="compiled", in_backward=True
    )

    def step(batch: int) -> None:
        head(torch.randn(batch, 8, requires_grad=True), torch.randint(5000, (batch,))).backward()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()

    step(37)
    step(41)
    before, sampled = compilations["unique_graphs"], set()
    for batch in (37, 40, 53, 64, 101):
        step(batch)
        assert head.stats is not None
        sampled.add(head.stats.sampled_classes)
    assert len(sampled) > 3
    assert compilations["unique_graphs"] == before


def test_auto_compiles_what_is_large_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="partial_fc"):
        assert choose_kernels("auto", CPU, torch.float32, 1 << 10).name == "eager"
        assert choose_kernels("auto", CPU, torch.float64, 1 << 30).name == "eager"
        assert choose_kernels("auto", CPU, torch.float32, 1 << 30).name == "compiled"
        choose_kernels("auto", CPU, torch.float32, 1 << 30)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["elementwise kernels on cpu: eager", "elementwise kernels on cpu: compiled"]


def test_without_a_compiler_auto_is_eager_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore")

    works.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    try:
        with caplog.at_level(logging.WARNING, logger="partial_fc"):
            assert choose_kernels("auto", CPU, torch.float32, 1 << 30).name == "eager"
        assert "does not work on this machine's cpu (no C++ compiler)" in caplog.text
    finally:
        works.cache_clear()


def test_another_backend_is_refused() -> None:
    with pytest.raises(pfc.ConfigError, match="kernels='fast', expected one of auto"):
        choose_kernels("fast", CPU, torch.float32, 0)


def test_numbers_are_packed() -> None:
    like = torch.zeros(3, dtype=torch.float64)
    assert pack_numbers(64.0, None, None, like).tolist() == [64.0, 0.0, 1.0, 0.0, torch.inf]
    tau = torch.tensor(0.25)
    assert pack_numbers(8.0, (1.0, tau, 0.0), 0.5, like).tolist() == [8.0, 1.0, 0.25, 0.0, 0.5]


def test_the_k_largest_are_exact_among_ties() -> None:
    cosine = torch.tensor([[0.5, 0.7, 0.5, 0.5, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1]])
    values, columns = reference.largest_support_vectors(cosine, torch.tensor([0.2, 0.3]), 3)
    assert columns.tolist() == [[0, 1, 2], [5, 5, 5]]
    assert values[0].tolist() == pytest.approx([0.5, 0.7, 0.5]) and (values[1] == -torch.inf).all()
