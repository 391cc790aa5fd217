"""Triton's kernels beside the plain functions, on a GPU or, in Triton's interpreter, on the CPU.

The interpreter is chosen by the environment while Triton is imported, so a process of its own runs all checks there
(``python -m tests.unit.test_triton``) and prints what failed. Another one compiles the kernels for an H100, which takes
no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import partial_fc as pfc
from partial_fc.errors import ConfigError
from partial_fc.kernels import choose_kernels, pack_numbers, reference

SCALE = 64.0
ABOVE = 0.8
COEFFICIENTS = {"adaptive": (0.0, 1.2, 0.2), "fixed": (0.0, 1.0, 0.2), "curricular": (1.0, 0.3, 0.0), "none": None}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton isn't here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Case(NamedTuple):
    """What a chunk is like."""

    classes: int
    rows: int
    emphasis: str = "adaptive"
    filtered: bool = False
    with_offset: bool = False


class Chunk(NamedTuple):
    """Arguments of both functions; ``boundary`` is given without emphasis, too."""

    product: Tensor
    inverse: Tensor
    offset: Tensor | None
    target: Tensor
    boundary: Tensor
    numbers: Tensor
    emphasizes: bool

    def double(self) -> Chunk:
        """The same numbers in float64."""
        return self._replace(
            product=self.product.double(),
            inverse=self.inverse.double(),
            offset=None if self.offset is None else self.offset.double(),
            boundary=self.boundary.double(),
            numbers=self.numbers.double(),
        )

    def part(self, begin: int, end: int) -> Chunk:
        """Some of its classes."""
        return self._replace(
            product=self.product[begin:end],
            inverse=self.inverse[begin:end],
            offset=None if self.offset is None else self.offset[begin:end],
            target=self.target - begin,
        )


def make(case: Case, device: str) -> Chunk:
    """Cosines past -1 and 1, none so near to a boundary that rounding decides; per-class tensors that are unaligned."""
    random = torch.Generator().manual_seed(case.classes * 1000 + case.rows)
    shape = case.classes, case.rows
    boundary = torch.rand(case.rows, generator=random) * 0.8 - 0.2
    cosine = torch.rand(shape, generator=random) * 2.1 - 1.05
    for edge in (boundary, torch.tensor(ABOVE)):
        cosine = torch.where((cosine - edge).abs() < 1e-3, edge + 2e-3, cosine)
    inverse = torch.rand(case.classes + 3, generator=random)[3:] + 0.5
    offset = torch.rand(case.classes + 1, generator=random)[1:] * 2 if case.with_offset else None
    target = torch.randint(-3, case.classes + 3, (case.rows,), generator=random, dtype=torch.int32)
    for row, outside in enumerate([-(1 << 31), case.classes, -1][: case.rows // 5]):
        target[row] = outside
    product = cosine / inverse[:, None]
    coefficients = COEFFICIENTS[case.emphasis]
    numbers = pack_numbers(SCALE, coefficients, ABOVE if case.filtered else None, product)
    on = functools.partial(torch.Tensor.to, device=device)
    placed_offset = None if offset is None else on(torch.cat([torch.zeros(1), offset]))[1:]
    placed_inverse = on(torch.cat([torch.zeros(3), inverse]))[3:]
    return Chunk(
        on(product), placed_inverse, placed_offset, on(target), on(boundary), on(numbers), coefficients is not None
    )


def start(chunk: Chunk) -> list[Tensor | None]:
    """(maximum, total, count) before the first chunk."""
    zeros = torch.zeros_like(chunk.boundary)
    return [torch.full_like(zeros, -torch.inf), zeros, zeros.clone() if chunk.emphasizes else None]


def accumulate(function: Callable[..., None], chunk: Chunk, state: list[Tensor | None]) -> list[Tensor | None]:
    function(*chunk[:6], *state)
    return state


def log_sum(state: list[Tensor | None]) -> Tensor:
    maximum, total = state[:2]
    assert maximum is not None and total is not None
    return torch.where(total > 0, maximum + total.log(), -torch.inf)


def gradient(
    function: Callable[..., None], chunk: Chunk, dtype: torch.dtype | None, *, peak: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient and the peaks, for normalizers as the chunk's own and for weights that vary over the rows.

    Without a dtype the gradient takes the product's place.
    """
    state = accumulate(reference.accumulate, chunk, start(chunk))
    normalizer = torch.logaddexp(log_sum(state), torch.full_like(chunk.boundary, 0.3 * SCALE))
    row = torch.linspace(0.5, 1.5, len(normalizer), dtype=normalizer.dtype, device=normalizer.device)
    out = None if dtype is None else torch.empty_like(chunk.product, dtype=dtype)
    peaks = torch.empty(len(chunk.product) + 1, dtype=normalizer.dtype, device=row.device)[1:] if peak else None
    boundary = chunk.boundary if chunk.emphasizes else None
    function(*chunk[:4], boundary, normalizer, row * SCALE, -row * SCALE, chunk.numbers, out, peaks)
    return chunk.product if out is None else out, peaks


def assert_as_exact(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Against float64 our error is at most twice that of the plain function in the same dtype; infinities agree."""
    finite = exact.isfinite()
    assert torch.equal(ours.double()[~finite], exact[~finite])
    if not finite.any():
        return
    error, honest = ((other.double() - exact)[finite].abs().max() for other in (ours, plain))
    bound = 2 * honest + 1e-7 * exact[finite].abs().max()
    assert error <= bound, f"error {error:.3g}, of the plain function {honest:.3g}"


CASES = [
    Case(1, 1),
    Case(1, 1, "none", with_offset=True),
    Case(1, 37, "curricular", filtered=True),
    Case(211, 1, "fixed", with_offset=True),
    *(Case(37, 13, e, f, o) for e in COEFFICIENTS for f in (False, True) for o in (False, True)),
    # Larger than a tile both ways: 8 or 4 classes x 512 rows.
    Case(41, 523, "adaptive", with_offset=True),
    Case(41, 523, "none", filtered=True),
    Case(1031, 61, "curricular", filtered=True),
    Case(256, 64, "fixed"),
]
CHECKS: dict[str, Callable[[str], None]] = {}


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    """Checks take the kind of device; the name has to say enough."""
    CHECKS[function.__name__] = function
    return function


def kernels() -> Any:
    """Imported late: not before the environment is set, and not where Triton isn't."""
    return importlib.import_module("partial_fc.kernels.triton")


@check
def accumulates_as_the_plain_function(device: str) -> None:
    for case in CASES:
        chunk = make(case, device)
        ours = accumulate(kernels().accumulate, chunk, start(chunk))
        plain = accumulate(reference.accumulate, chunk, start(chunk))
        exact = accumulate(reference.accumulate, chunk.double(), start(chunk.double()))
        torch.testing.assert_close(ours, plain, msg=lambda message, case=case: f"{case}: {message}")
        assert ours[2] is None or torch.equal(ours[2], plain[2])
        assert_as_exact(log_sum(ours), log_sum(plain), log_sum(exact))


@check
def two_chunks_are_one(device: str) -> None:
    for case in (Case(37, 13, with_offset=True), Case(41, 523, "curricular", filtered=True), Case(67, 5, "none")):
        chunk = make(case, device)
        whole, parts = start(chunk), start(chunk)
        accumulate(kernels().accumulate, chunk, whole)
        for begin, end in ((0, 19), (19, case.classes)):
            accumulate(kernels().accumulate, chunk.part(begin, end), parts)
        torch.testing.assert_close(parts, whole)
        assert parts[2] is None or torch.equal(parts[2], whole[2])


@check
def rows_without_terms_have_the_sum_zero(device: str) -> None:
    only_targets = make(Case(1, 37), device)._replace(target=torch.zeros(37, dtype=torch.int32, device=device))
    filtered = make(Case(29, 37), device)
    filtered.numbers[4] = -2.0
    for chunk in (only_targets, filtered):
        state = accumulate(kernels().accumulate, chunk, start(chunk))
        assert (state[0] == -torch.inf).all() and (state[1] == 0).all() and (state[2] == 0).all()
        earlier = make(Case(31, 37), device)
        state = accumulate(kernels().accumulate, earlier, start(earlier))
        kept = [value.clone() for value in state if value is not None]
        accumulate(kernels().accumulate, chunk, state)
        assert all(map(torch.equal, state, kept))
    some = make(Case(1, 37), device)
    some.target[::2] = 0
    state = accumulate(kernels().accumulate, some, start(some))
    assert (state[1][::2] == 0).all() and (state[1][1::2] == (some.target[1::2] != 0)).all()


@check
def a_slab_of_many_tiles_is_walked(device: str) -> None:
    ours = kernels()
    chunk = make(Case(1031, 61, with_offset=True), device)
    before = ours._PROGRAMS
    results = []
    try:
        for programs in (1, 3, 512):
            ours._PROGRAMS = programs
            results.append(accumulate(ours.accumulate, chunk, start(chunk)))
    finally:
        ours._PROGRAMS = before
    for result in results:
        torch.testing.assert_close(result, accumulate(reference.accumulate, chunk, start(chunk)))
    assert ours._slab_length(1031, 64, 1) == 64 and ours._slab_length(10**8, 8, 2) == 8 * 48829
    assert all(-(-p // ours._slab_length(p, 8, 2)) <= 256 for p in (1, 8, 2047, 2048, 2049, 6400, 10**8))


@check
def gradient_as_the_plain_function(device: str) -> None:
    for number, case in enumerate(CASES):
        chunk = make(case, device)
        exact, exact_peak = gradient(reference.gradient, chunk.double(), torch.float64, peak=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            peak = (number + dtype.itemsize) % 4 != 0
            ours, our_peak = gradient(kernels().gradient, chunk, dtype, peak=peak)
            plain, plain_peak = gradient(reference.gradient, chunk, dtype, peak=True)
            if dtype == torch.bfloat16 and kernels().interpreted():
                # The interpreter drops the low bits (and what is subnormal); a GPU rounds to nearest.
                single, _ = gradient(kernels().gradient, chunk, torch.float32)
                cut = (single.view(torch.int32) & -0x10000).view(torch.float32)
                torch.testing.assert_close(ours.float(), cut, rtol=0, atol=2e-38)
            else:
                assert_as_exact(ours, plain, exact)
            if our_peak is not None:
                assert_as_exact(our_peak, plain_peak, exact_peak)
                has_target = torch.isin(torch.arange(case.classes, device=device), chunk.target)
                assert (our_peak[has_target] == 1).all()


@check
def gradient_takes_the_place_of_the_product(device: str) -> None:
    for case, peak in ((Case(37, 13), False), (Case(41, 523, filtered=True), True), (Case(1, 1), False)):
        chunk = make(case, device)
        apart, apart_peak = gradient(kernels().gradient, chunk, torch.float32, peak=peak)
        memory = torch.full((case.classes + 1, case.rows), 7.0, device=device)
        memory[:-1] = chunk.product
        _, peaks = gradient(kernels().gradient, chunk._replace(product=memory[:-1]), None, peak=peak)
        assert torch.equal(memory[:-1], apart) and (memory[-1] == 7).all()
        assert apart_peak is None or torch.equal(peaks, apart_peak)


@check
def the_same_input_gives_the_same_bits(device: str) -> None:
    chunk = make(Case(1031, 61), device)
    first, second = (accumulate(kernels().accumulate, chunk, start(chunk)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@check
def what_is_not_finite_reaches_the_sum(device: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for emphasis in ("none", "adaptive"):
            chunk = make(Case(37, 13, emphasis), device)
            chunk.target[4] = -1
            chunk.product[17, 4] = value
            ours = accumulate(kernels().accumulate, chunk, start(chunk))
            plain = accumulate(reference.accumulate, chunk, start(chunk))
            torch.testing.assert_close(ours[1], plain[1], equal_nan=True)
            assert ours[1].isnan().nonzero().tolist() == ([[4]] if value != value else [])
            accumulate(kernels().accumulate, make(Case(37, 13, emphasis), device), ours)
            assert ours[1][4].isnan() == (value != value)
    chunk.inverse[3] = torch.nan
    assert accumulate(kernels().accumulate, chunk, start(chunk))[1][chunk.target != 3].isnan().all()


@check
def entries_are_counted_past_two_to_the_31(device: str) -> None:
    small = make(Case(3, 37), device)
    with far_apart(3, 37, 1 << 30, device) as product:
        product.copy_(small.product)
        large = small._replace(product=product)
        expected = accumulate(kernels().accumulate, small, start(small))
        assert all(map(torch.equal, accumulate(kernels().accumulate, large, start(large)), expected))
        expected_gradient, _ = gradient(kernels().gradient, small, torch.float32)
        gradient(kernels().gradient, large, None)
        assert torch.equal(product, expected_gradient)


@contextlib.contextmanager
def far_apart(classes: int, rows: int, stride: int, device: str) -> Iterator[Tensor]:
    """``[classes, rows]`` in a space of classes x stride numbers; on a CPU in a file that is all holes."""
    size = (classes - 1) * stride + rows
    if device == "cuda":
        yield torch.empty(size, device=device).as_strided((classes, rows), (stride, 1))
        return
    with tempfile.TemporaryDirectory() as folder:
        memory = torch.from_file(str(Path(folder, "sparse")), shared=True, size=size)
        yield memory.as_strided((classes, rows), (stride, 1))


@check
def the_head_is_as_with_the_plain_functions(device: str) -> None:
    for negatives, options in (
        (pfc.SupportVectors(1.2), {"filter_gradient": 1e-3}),
        (pfc.Curricular(filter_above=0.5), {"sample_rate": 0.5, "correct_sampling": True}),
        (pfc.Plain(), {}),
        (pfc.SupportVectors(1.2, top_k=3), {"logits_budget": 1 << 20}),
    ):
        results = []
        for backend in ("eager", "triton"):
            torch.manual_seed(5)
            head = pfc.PartialFC(
                16, 83, pfc.ArcFace(0.5), negatives, chunk_size=31, kernels=backend, device=device, **options
            )
            embeddings = torch.randn(13, 16, device=device, requires_grad=True)
            loss = head(embeddings, torch.arange(13, device=device) * 6)
            loss.backward()
            weight_gradient = head.weight.grad
            assert weight_gradient is not None
            results.append([loss.detach(), embeddings.grad, weight_gradient.to_dense()])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@check
def the_backend_is_chosen(device: str) -> None:
    chosen = choose_kernels("triton", torch.device(device), torch.float32, 1)
    assert chosen.name == "triton"
    assert chosen.accumulate is kernels().accumulate and chosen.gradient is kernels().gradient
    assert choose_kernels("triton", torch.device(device), torch.float64, 1).name == "eager"
    assert choose_kernels("auto", torch.device(device), torch.float32, 1 << 30).name != "triton"


def outcomes(device: str) -> Iterator[tuple[str, str | None]]:
    """(check, its traceback or None)."""
    for name, function in CHECKS.items():
        try:
            function(device)
            yield name, None
        except Exception:  # a report, which the test raises again
            yield name, traceback.format_exc()


def child(*arguments: str, **environment: str) -> Any:
    """What this file, run with ``arguments``, prints in its last line."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_triton", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    found: dict[str, str | None] = child("interpret", TRITON_INTERPRET="1")
    return found


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    if interpreted[name] is not None:
        pytest.fail(f"in Triton's interpreter:\n{interpreted[name]}", pytrace=False)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


@needs_triton
def test_no_size_of_a_chunk_is_compiled_anew(tmp_path: Path) -> None:
    """Real compilation for an H100, of what the calls ask for; counted."""
    found = child("compile", TRITON_CACHE_DIR=str(tmp_path))
    once = {"_accumulate_slabs": 1, "_merge_slabs": 1, "_write_gradient": 1}
    assert found["one size"] == found["other classes and places"] == once
    assert found["a gradient in half precision"] == {**once, "_write_gradient": 2}
    assert found["imported with the package"] is False
    assert all(size > 0 for size in found["bytes of code"])
    # That instruction makes a number of NaN, which the interpreter doesn't show.
    assert found["min.f32 where cosines are clamped"] == 0


def test_on_a_cpu_the_interpreter_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"kernels='triton' on cpu, expected tensors on cuda .*: use kernels='comp"):
        choose_kernels("triton", torch.device("cpu"), torch.float32, 1)
    head = pfc.PartialFC(4, 5, kernels="triton")
    with pytest.raises(ConfigError, match="on cpu, expected tensors on cuda"):
        head(torch.randn(2, 4), torch.tensor([0, 1]))


@needs_triton
def test_asking_for_the_interpreter_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 before Python starts"):
        choose_kernels("triton", torch.device("cpu"), torch.float32, 1)


def test_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "partial_fc.kernels.triton", raising=False)
    monkeypatch.delattr("partial_fc.kernels.triton", raising=False)
    with pytest.raises(ConfigError, match=r"Triton can't be imported .*: pip install triton, or use kernels='comp"):
        choose_kernels("triton", torch.device("cuda"), torch.float32, 1)


def compiled_variants() -> dict[str, Any]:
    """How many variants of each kernel are compiled for an H100 by some calls, which launch nothing."""
    lazy = "triton" not in sys.modules and "partial_fc.kernels.triton" not in sys.modules
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class H100:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made: dict[str, dict[str, int]] = {}
    assembly: dict[str, str] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        made.setdefault(self.__name__, {})[kernel.hash] = len(kernel.asm["cubin"])
        assembly[self.__name__] = kernel.asm["ptx"]
        return kernel

    driver.set_active(H100())
    JITFunction.run = compile_only

    def count() -> dict[str, int]:
        return {name: len(variants) for name, variants in made.items()}

    def call(classes: int, shift: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rows = 64
        product, by_class, by_row = torch.zeros(classes, rows), torch.zeros(classes + 4), torch.zeros(rows)
        inverse, target = by_class[shift : shift + classes], torch.zeros(rows, dtype=torch.int32)
        state = [torch.zeros(rows) for _ in range(3)]
        numbers = pack_numbers(SCALE, COEFFICIENTS["adaptive"], None, product)
        kernels().accumulate(product, inverse, inverse, target, by_row, numbers, *state)
        out = torch.zeros_like(product, dtype=dtype)
        kernels().gradient(product, inverse, inverse, target, *[by_row] * 4, numbers, out, inverse)

    found: dict[str, Any] = {"imported with the package": not lazy}
    call(640)
    found["one size"] = count()
    for classes in (1, 2, 16, 17, 255, 256, 100_000):
        call(classes)
        call(classes, shift=1)
    found["other classes and places"] = count()
    call(640, dtype=torch.bfloat16)
    found["a gradient in half precision"] = count()
    found["min.f32 where cosines are clamped"] = sum("min.f32" in assembly[name] for name in made)
    found["bytes of code"] = [size for variants in made.values() for size in variants.values()]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compiled_variants() if sys.argv[1] == "compile" else dict(outcomes("cpu"))))
