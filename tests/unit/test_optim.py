"""Row optimizers against torch.optim; in backward against two phases; schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import partial_fc as pfc
from partial_fc.kernels.updates import Noise, _noise_bits, round_stochastically
from partial_fc.optim import RowAdamW, RowSGD, clip_shards
from partial_fc.schedule import Schedule

SGD: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
]
ADAMW: list[dict[str, Any]] = [{"lr": 0.01}, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}]
CASES = [(RowSGD, torch.optim.SGD, options) for options in SGD]
CASES += [(RowAdamW, torch.optim.AdamW, options) for options in ADAMW]


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_equals_torch_where_all_rows_are_touched(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    first = torch.nn.Parameter(torch.randn(9000, 3, dtype=torch.float64))
    second = torch.nn.Parameter(first.detach().clone())
    one, other = ours([first], **options), theirs([second], **options)
    for step in range(5):
        gradient = torch.randn_like(first)
        first.grad, second.grad = gradient.clone(), gradient.clone()
        if step % 2:
            first.grad = gradient.to_sparse(1)
        one.step()
        other.step()
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_untouched_rows_stay_bit_for_bit(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.randn(10, 3))
    optimizer = ours([param], **options)
    param.grad = torch.randn(10, 3)
    optimizer.step()
    before, state = param.detach().clone(), {k: v.clone() for k, v in optimizer.state[param].items()}
    rows = torch.tensor([1, 7])
    param.grad = torch.sparse_coo_tensor(rows[None], torch.randn(2, 3), (10, 3), is_coalesced=True)
    optimizer.step()
    others = torch.tensor([0, 2, 3, 4, 5, 6, 8, 9])
    assert torch.equal(param[others], before[others])
    assert not torch.equal(param[rows], before[rows])
    for name, value in optimizer.state[param].items():
        assert torch.equal(value[others], state[name][others])


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
def test_the_gradients_norm_is_looked_at_where_asked(kind: Any, in_backward: bool) -> None:
    head = pfc.PartialFC(8, 2003, sample_rate=0.2, chunk_size=100).double()
    embeddings, labels = torch.randn(16, 8, dtype=torch.float64, requires_grad=True), torch.randint(2003, (16,))
    plain = head(embeddings, labels)
    plain.backward()
    assert head.weight.grad is not None
    expected = head.weight.grad.coalesce().values().norm().item()
    head.weight.grad = None
    optimizer = kind(head.parameters(), lr=0.1, max_row_norm=1e-3, in_backward=in_backward)
    head.position.zero_()  # the same classes are drawn
    for factor in (None, 1.0, 8.0):
        with torch.no_grad():
            weight = head.weight.clone()
        optimizer.gradient_square = None if factor is None else torch.zeros((), dtype=torch.float64)
        optimizer.loss_scale = factor or 1.0
        (head(embeddings, labels) * optimizer.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.gradient_square is not None:
            assert optimizer.gradient_square.sqrt().item() == pytest.approx(expected, rel=1e-9)
        assert not torch.equal(head.weight, weight)
        with torch.no_grad():
            head.weight.copy_(weight)
        head.position.zero_()


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_the_state_can_be_made_before_the_first_step(
    ours: Any, theirs: Any, options: dict[str, Any], storage: torch.dtype
) -> None:
    kept = []
    for early in (False, True):
        param = torch.nn.Parameter(torch.ones(10, 3, dtype=storage))
        optimizer = ours([param], **options)
        if early:
            optimizer.init_state()
            assert all(not value.any() for value in optimizer.state[param].values())
        param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        kept.append({"param": param.detach(), **optimizer.state[param]})
    stepped, early_state = kept
    assert stepped.keys() == early_state.keys() and ("rounded" in stepped) == (storage == torch.bfloat16)
    for name, value in stepped.items():
        assert torch.equal(value, early_state[name]), name


def test_adamw_corrects_the_bias_of_each_row_by_its_own_count() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = RowAdamW([param], lr=0.1, weight_decay=0.0)
    for rows in ([0], [0], [0, 1]):
        index = torch.tensor([rows])
        param.grad = torch.sparse_coo_tensor(index, torch.ones(len(rows), 1, dtype=torch.float64), (2, 1))
        optimizer.step()
    # With a constant gradient every update is lr, also the first of a row that comes late.
    assert param.flatten().tolist() == pytest.approx([-0.3, -0.1], abs=1e-7)


def heads(optimizer: Any, rate: float, **options: Any) -> list[torch.Tensor]:
    """Weights after 6 steps, in two phases and in backward."""
    weights = []
    for in_backward in (False, True):
        head = pfc.PartialFC(8, 50, sample_rate=rate, seed=2, scale=16.0, chunk_size=7).double()
        optim = optimizer(head.parameters(), **options, in_backward=in_backward)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            embeddings = torch.randn(9, 8, generator=generator, dtype=torch.float64).requires_grad_()
            labels = torch.randint(50, (9,), generator=generator)
            head(embeddings, labels).backward()
            assert (head.weight.grad is None) == in_backward
            optim.step()
            optim.zero_grad()
        weights.append(head.weight.detach())
    return weights


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (RowSGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
        (RowSGD, {"lr": 0.5, "momentum": 0.9, "max_row_norm": 0.05}),
        (RowSGD, {"lr": 0.5, "max_value": 0.02, "max_row_norm": 0.05}),
        (RowAdamW, {"lr": 0.01}),
        (RowAdamW, {"lr": 0.01, "max_value": 0.02}),
    ],
)
def test_in_backward_equals_two_phases(optimizer: Any, options: dict[str, Any], rate: float) -> None:
    two_phase, in_backward = heads(optimizer, rate, **options)
    torch.testing.assert_close(in_backward, two_phase, rtol=1e-12, atol=1e-14)


def test_a_second_forward_before_backward_is_refused() -> None:
    head = pfc.PartialFC(4, 10)
    pfc.optim.RowSGD(head.parameters(), lr=0.1, in_backward=True)
    embeddings, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3])
    before = head.weight.detach().clone()
    first = head(embeddings, labels)
    second = head(embeddings, labels)
    with pytest.raises(RuntimeError, match="one forward a backward"):
        first.backward()
    assert torch.equal(head.weight, before)
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        second.backward()


def test_row_norms_are_clipped() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RowSGD([param], lr=1.0, max_row_norm=1.0)
    param.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    optimizer.step()
    torch.testing.assert_close(param.detach(), -torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_values_are_clipped_before_row_norms() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RowSGD([param], lr=1.0, max_value=1.0, max_row_norm=1.0)
    param.grad = torch.tensor([[3.0, -4.0], [0.3, 0.4]])
    optimizer.step()
    torch.testing.assert_close(param.detach(), -torch.tensor([[0.5**0.5, -(0.5**0.5)], [0.3, 0.4]]))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), [(RowSGD, {"momentum": 0.9, "max_row_norm": 0.05}), (RowAdamW, {})])
def test_a_loss_scale_is_divided_out(optimizer: Any, options: dict[str, Any], in_backward: bool) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        head = pfc.PartialFC(8, 50, scale=16.0).double()
        optim = optimizer(head.parameters(), lr=0.1, **options, in_backward=in_backward)
        optim.loss_scale = scale
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            embeddings = torch.randn(9, 8, generator=generator, dtype=torch.float64).requires_grad_()
            (head(embeddings, torch.arange(9)) * scale).backward()
            optim.step()
            optim.zero_grad()
        weights.append(head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(RowSGD, {"lr": 0.5, "momentum": 0.9}), (RowAdamW, {"lr": 0.01}), (RowSGD, {"lr": 0.5, "max_row_norm": 0.05})],
)
def test_compiled_updates_equal_eager_ones(optimizer: Any, options: dict[str, Any], rate: float) -> None:
    weights = []
    for kernels in ("eager", "compiled"):
        head = pfc.PartialFC(8, 50, sample_rate=rate, seed=2, scale=16.0, chunk_size=16)
        optim = optimizer(head.parameters(), **options, weight_decay=0.01, in_backward=True, kernels=kernels)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            embeddings = torch.randn(9, 8, generator=generator).requires_grad_()
            head(embeddings, torch.arange(9)).backward()
            optim.step()
        weights.append(head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_stochastic_rounding_is_right_on_average_and_never_off_by_more_than_a_step() -> None:
    # 1 + 2**-7 is the next number of bfloat16 after 1; a quarter of the way there rounds up once in four times.
    value = torch.full((400, 500), 1 + 2.0**-9)
    bits = _noise_bits(Noise(torch.tensor([5], dtype=torch.int32), torch.arange(400, dtype=torch.int32)), 500)
    for drawn in (bits, bits >> 16):
        for sign in (1.0, -1.0):
            rounded = round_stochastically(value * sign, drawn).float() * sign
            assert set(rounded.unique().tolist()) == {1.0, 1 + 2.0**-7}
            share = (rounded > 1).float().mean().item()
            assert abs(share - 0.25) < 5 * (0.25 * 0.75 / value.numel()) ** 0.5
    whole = torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(whole, bits[0, :5]).float(), whole)
    assert round_stochastically(torch.tensor([torch.nan]), bits[0, :1]).isnan().all()


def test_a_small_update_is_not_lost_in_bfloat16() -> None:
    # Rounding to nearest would leave 1 - 1e-4 at 1 for ever.
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = RowSGD([param], lr=1e-4)
    for _ in range(500):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.float().mean().item() == pytest.approx(0.95, abs=2e-3)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), [(RowSGD, {"lr": 0.2, "momentum": 0.9}), (RowAdamW, {"lr": 0.01})])
def test_bfloat16_rounding_follows_the_saved_state(optimizer: Any, options: dict[str, Any], in_backward: bool) -> None:
    def make() -> tuple[pfc.PartialFC, Any]:
        head = pfc.PartialFC(8, 50, scale=16.0, sample_rate=0.5, storage_dtype=torch.bfloat16)
        return head, optimizer(
            head.parameters(), **options, state_dtype=torch.bfloat16, seed=3, in_backward=in_backward
        )

    def train(head: pfc.PartialFC, optim: Any, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            embeddings = torch.randn(9, 8, generator=generator).requires_grad_()
            head(embeddings, torch.arange(9)).backward()
            optim.step()
            optim.zero_grad()

    whole, whole_optim = make()
    train(whole, whole_optim, 0, 6)
    half, half_optim = make()
    train(half, half_optim, 0, 3)
    resumed, resumed_optim = make()
    resumed.load_state_dict(half.state_dict())
    resumed_optim.load_state_dict(half_optim.state_dict())
    for name, value in resumed_optim.state[resumed.weight].items():
        assert value.dtype == half_optim.state[half.weight][name].dtype
    train(resumed, resumed_optim, 3, 6)
    assert torch.equal(resumed.weight, whole.weight)


def test_loaded_state_takes_the_dtype_that_is_configured() -> None:
    def make(state_dtype: Any) -> tuple[pfc.PartialFC, RowSGD]:
        head = pfc.PartialFC(8, 50)
        return head, RowSGD(head.parameters(), lr=0.1, momentum=0.9, state_dtype=state_dtype, in_backward=True)

    head, narrow = make(torch.bfloat16)
    head(torch.randn(9, 8, requires_grad=True), torch.arange(9)).backward()
    other, wide = make(None)
    wide.load_state_dict(narrow.state_dict())
    buffer = wide.state[other.weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, narrow.state[head.weight]["momentum_buffer"].float())


def test_float64_rows_with_bfloat16_state() -> None:
    head = pfc.PartialFC(8, 50).double()
    optimizer = RowSGD(head.parameters(), lr=0.1, momentum=0.9, state_dtype=torch.bfloat16, in_backward=True)
    head(torch.randn(9, 8, requires_grad=True), torch.arange(9)).backward()
    assert optimizer.state[head.weight]["momentum_buffer"].dtype == torch.bfloat16


def test_norm_over_shards_is_clipped() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[3.0, 0.0]]), (2, 2))
    norm = clip_shards(param, 1.0, lambda own: own + 16.0)
    assert norm.item() == pytest.approx(5.0)
    assert param.grad.to_dense()[1].tolist() == pytest.approx([0.6, 0.0])


def test_schedules() -> None:
    polynomial = Schedule("polynomial", 110, warmup_steps=10, power=2.0)
    assert [polynomial(step) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.25])
    cosine = Schedule("cosine", 100)
    assert [cosine(step) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    steps = Schedule("step", 100, milestones=(30, 60), gamma=0.1)
    assert [steps(step) for step in (29, 30, 60)] == pytest.approx([1.0, 0.1, 0.01])
    assert Schedule("constant", 5)(4) == 1.0
    with pytest.raises(pfc.ConfigError, match="warmup_steps=100, expected less than 100"):
        Schedule("cosine", 100, warmup_steps=100)
    with pytest.raises(pfc.ConfigError, match="kind='linear'"):
        Schedule("linear", 100)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: RowSGD(p, lr=-1), "lr=-1, expected at least 0"),
        (lambda p: RowSGD(p, lr=1, momentum=1), "momentum=1"),
        (lambda p: RowSGD(p, lr=1, nesterov=True), "nesterov=True"),
        (lambda p: RowSGD(p, lr=1, max_row_norm=0), "max_row_norm=0"),
        (lambda p: RowSGD(p, lr=1, max_value=-1), "max_value=-1"),
        (lambda p: RowSGD(p, lr=1, state_dtype=torch.float16), "state_dtype=torch.float16"),
        (lambda p: RowAdamW(p, kernels="fast"), "kernels='fast'"),
        (lambda p: RowAdamW(p, betas=(0.9, 1.0)), "betas"),
    ],
)
def test_bad_arguments(make: Any, match: str) -> None:
    with pytest.raises(pfc.ConfigError, match=match):
        make([torch.nn.Parameter(torch.zeros(2, 2))])


def test_in_backward_follows_the_groups_of_a_loaded_state() -> None:
    head = pfc.PartialFC(4, 10)
    optimizer = RowSGD(head.parameters(), lr=0.1, in_backward=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = head.weight.detach().clone()
    head(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
    assert torch.equal(head.weight, before)


def test_a_second_optimizer_in_backward_is_refused_until_the_first_is_removed() -> None:
    head = pfc.PartialFC(4, 10)
    first = RowSGD(head.parameters(), lr=0.1, in_backward=True)
    with pytest.raises(pfc.ConfigError, match="one a parameter"):
        RowSGD(head.parameters(), lr=0.1, in_backward=True)
    first.remove()
    RowSGD(head.parameters(), lr=0.1, in_backward=True)


@pytest.mark.parametrize(("optimizer", "options"), [(RowSGD, {"lr": 0.5, "momentum": 0.9}), (RowAdamW, {"lr": 0.01})])
def test_the_gate_of_deferred_checks_changes_no_number(optimizer: Any, options: dict[str, Any]) -> None:
    weights = []
    for defer in (False, True):
        head = pfc.PartialFC(8, 50, scale=16.0, defer_checks=defer).double()
        optim = optimizer(head.parameters(), **options, in_backward=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            embeddings = torch.randn(9, 8, generator=generator, dtype=torch.float64).requires_grad_()
            head(embeddings, torch.arange(9)).backward()
            optim.step()
        weights.append(head.weight.detach())
    assert torch.equal(*weights)
