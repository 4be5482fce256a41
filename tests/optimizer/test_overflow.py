"""A step with a non-finite gradient changes nothing but the scale and the counters."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import is_slow
from support.comparison import (
    VECTOR_EDGES,
    assert_all_same_bits,
    assert_unchanged,
    gradients,
    masters,
    momentum_buffers,
    parameters,
    set_gradients,
    snapshot,
)

pytestmark = pytest.mark.both_watches

NON_FINITE = {"inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}
NAN_PATTERNS = {
    torch.float16: [0x7C01, 0x7E00, 0x7FFF, -0x3FF, -1],
    torch.bfloat16: [0x7F81, 0x7FC0, 0x7FFF, -0x7F, -1],
    torch.float32: [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -1],
    torch.float64: [0x7FF0000000000001, 0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, -0xFFFFFFFFFFFFF, -1],
}
"""Signalling and quiet NaN of both signs, the first and the last pattern of each."""
INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
DTYPES = list(INTEGERS)

MOMENTUM: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "maximize": True},
]

SHAPES = [(0,), (33,), (4, 5), (2, 0), (1,), (0, 3)]
MIXED = [torch.float16, torch.float16, torch.float16, torch.float32, torch.float32, torch.bfloat16]


def poisoned(grads: list[torch.Tensor], tensor: int, value: float, element: int = -1) -> list[torch.Tensor]:
    grads = [g.clone() for g in grads]
    grads[tensor].view(-1)[element] = value
    return grads


def optimizer_over(params, backend: str, *, init_scale: float = 1024.0, **options) -> FusedSGD:
    scale = DynamicLossScale(init_scale=init_scale)
    return FusedSGD(params, lr=0.1, loss_scale=scale, backend=backend, **options)


def step_with(optimizer: FusedSGD, params, grads) -> None:
    set_gradients(params, grads)
    optimizer.step()


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("options", MOMENTUM, ids=str)
def test_an_overflow_in_the_first_step_changes_nothing_and_the_next_step_is_first(
    backend, device, options, value
):
    params, twins = (parameters(SHAPES, MIXED, device) for _ in range(2))
    bad, *good = gradients(params, 4)
    optimizer = optimizer_over(params, backend, **options)
    set_gradients(params, poisoned(bad, 1, value))
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before, but=("counters", "options", "state"))
    twin = optimizer_over(twins, backend, init_scale=512.0, **options)
    for grads in good:
        step_with(optimizer, params, grads)
        step_with(twin, twins, grads)
    assert_all_same_bits(params, twins, "parameter")
    if options:
        assert_all_same_bits(momentum_buffers(optimizer, params), momentum_buffers(twin, twins), "buffer")


@pytest.mark.parametrize("options", MOMENTUM, ids=str)
def test_an_overflow_between_good_steps_leaves_no_trace(backend, device, options):
    params, twins = (parameters(SHAPES, MIXED, device) for _ in range(2))
    stream = gradients(params, 6)
    optimizer, twin = (
        FusedSGD(p, lr=0.1, loss_scale=256.0, backend=backend, **options) for p in (params, twins)
    )
    for index, grads in enumerate(stream):
        step_with(optimizer, params, grads)
        step_with(twin, twins, grads)
        step_with(optimizer, params, poisoned(grads, (1, 2, 4)[index % 3], torch.nan))
    assert_all_same_bits(params, twins, "parameter")
    low = [index for index, dtype in enumerate(MIXED) if dtype != torch.float32]
    assert_all_same_bits(
        masters(optimizer, [params[i] for i in low]), masters(twin, [twins[i] for i in low]), "master"
    )
    assert optimizer.stats().applied_steps == 6
    assert optimizer.stats().skipped_steps == 6


@pytest.mark.parametrize("skip_first", [True, False])
def test_stats_tell_of_a_skip(backend, device, skip_first):
    params = parameters([(3,)], device=device)
    optimizer = optimizer_over(params, backend)
    applied = skipped = 0
    assert not optimizer.stats().last_step_skipped
    for skip in (skip_first, not skip_first, skip_first, skip_first):
        step_with(optimizer, params, [torch.full((3,), torch.inf if skip else 1.0)])
        applied, skipped = applied + (not skip), skipped + skip
        stats = optimizer.stats()
        assert (stats.applied_steps, stats.skipped_steps) == (applied, skipped)
        assert stats.last_step_skipped is skip
        assert stats.scale == 1024.0 * 0.5**skipped


@pytest.mark.parametrize(
    "shapes", [[(5,), (0,)], [(0,), (5,)], [(0,), (5,), (0, 7)], [(2, 3), (0,), (0,), (1,)]], ids=str
)
def test_the_last_element_of_the_last_tensor_counts_between_empty_neighbours(backend, device, shapes):
    params = parameters(shapes, torch.float16, device)
    last = max(i for i, p in enumerate(params) if p.numel())
    optimizer = optimizer_over(params, backend)
    (grads,) = gradients(params, 1)
    set_gradients(params, poisoned(grads, last, torch.inf))
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before, but=("counters", "options", "state"))
    assert optimizer.stats().skipped_steps == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_position_around_the_vector_width_counts(backend, device, dtype):
    for size in VECTOR_EDGES:
        params = parameters([(size,)], dtype, device)
        optimizer = FusedSGD(params, lr=0.1, loss_scale=8.0, backend=backend)
        for element in {0, size // 2, size - 1} if is_slow(backend) else range(size):
            grad = torch.ones(size, dtype=dtype)
            grad[element] = torch.inf
            step_with(optimizer, params, [grad])
            assert optimizer.stats().last_step_skipped, f"element {element} of {size}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_chunk_of_a_large_tensor_counts(backend, device, dtype):
    size = 140_001
    params = parameters([(size,)], dtype, device)
    optimizer = FusedSGD(params, lr=0.1, loss_scale=8.0, backend=backend)
    for power in range(8, 18):
        for element in (2**power - 1, 2**power, size - 2**power):
            grad = torch.ones(size, dtype=dtype)
            grad[element] = torch.nan
            step_with(optimizer, params, [grad])
            assert optimizer.stats().last_step_skipped, f"element {element}"


def test_every_tensor_of_many_counts(backend, device):
    params = parameters([(n % 5 + 1,) for n in range(300)], torch.float16, device)
    optimizer = FusedSGD(
        [{"params": params[:100]}, {"params": params[100:]}], lr=0.1, loss_scale=8.0, backend=backend
    )
    grads = [torch.ones_like(p, device="cpu") for p in params]
    for tensor in (99, 100, 299) if is_slow(backend) else (0, 1, 99, 100, 101, 255, 256, 299):
        step_with(optimizer, params, poisoned(grads, tensor, -torch.inf))
        assert optimizer.stats().last_step_skipped, f"tensor {tensor}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_nan_counts(backend, device, dtype):
    params = parameters([(9,)], dtype, device)
    optimizer = FusedSGD(params, lr=0.1, loss_scale=8.0, backend=backend)
    for pattern in NAN_PATTERNS[dtype]:
        grad = torch.ones(9, dtype=dtype)
        grad.view(INTEGERS[dtype])[4] = pattern
        assert grad.isnan().any()
        step_with(optimizer, params, [grad])
        assert optimizer.stats().last_step_skipped, hex(pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", ["max", "min", "tiny", "smallest_normal"])
def test_finite_extremes_do_not_count(backend, device, dtype, limit):
    """FP64 gradients beyond the range of FP32, and gradients whose unscaled values underflow, are finite."""
    params = parameters([(33,)], dtype, device)
    optimizer = FusedSGD(params, lr=0.0, loss_scale=8.0, backend=backend)
    step_with(optimizer, params, [torch.full((33,), getattr(torch.finfo(dtype), limit), dtype=dtype)])
    assert optimizer.stats().skipped_steps == 0


def test_finite_gradients_whose_sum_overflows_do_not_count(backend, device):
    params = parameters([(4096,), (4096,)], [torch.float16, torch.float32], device)
    optimizer = FusedSGD(params, lr=0.0, loss_scale=8.0, backend=backend)
    step_with(optimizer, params, [torch.full((4096,), 65504.0).half(), torch.full((4096,), 3e38)])
    assert optimizer.stats().skipped_steps == 0


def test_an_overflow_in_an_fp32_norm_parameter_skips_the_fp16_weights(backend, device):
    params = parameters([(8, 4), (4,)], [torch.float16, torch.float32], device)
    optimizer = optimizer_over(params, backend, momentum=0.9)
    (grads,) = gradients(params, 1)
    set_gradients(params, poisoned(grads, 1, torch.inf))
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before, but=("counters", "options", "state"))


def test_an_overflow_in_a_group_with_zero_learning_rate_skips_every_group(backend, device):
    params = parameters([(5,), (5,)], device=device)
    optimizer = optimizer_over([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], backend)
    (grads,) = gradients(params, 1)
    set_gradients(params, poisoned(grads, 1, torch.nan))
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before, but=("counters", "options"))


@pytest.mark.parametrize(
    "options", [{"loss_scale": 64.0}, {"max_grad_norm": 1.0}, {"max_grad_norm": torch.inf}], ids=str
)
def test_a_static_scale_or_clipping_also_skips(backend, device, options):
    params = parameters(SHAPES, MIXED, device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend, **options)
    good, bad = gradients(params, 2)
    step_with(optimizer, params, good)
    set_gradients(params, poisoned(bad, 2, torch.inf))
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before, but=("counters", "options"))
    assert optimizer.stats().skipped_steps == 1
    assert optimizer.stats().scale == options.get("loss_scale")


def test_a_parameter_without_gradient_is_not_searched(backend, device):
    params = parameters([(5,), (5,)], device=device)
    optimizer = optimizer_over(params, backend)
    step_with(optimizer, params, [torch.full((5,), torch.inf), torch.ones(5)])
    step_with(optimizer, params, [None, torch.ones(5)])
    assert optimizer.stats().applied_steps == 1


def test_a_parameter_first_seen_after_a_skip_is_first_then(backend, device):
    params, twins = (parameters([(5,), (6,)], torch.float16, device) for _ in range(2))
    optimizer, twin = (
        FusedSGD(p, lr=0.1, momentum=0.9, dampening=0.5, loss_scale=4.0, backend=backend)
        for p in (params, twins)
    )
    one, two, three = gradients(params, 3)
    for o, p in ((optimizer, params), (twin, twins)):
        step_with(o, p, [one[0], None])
    step_with(optimizer, params, poisoned(two, 1, torch.inf))
    for grads in (two, three):
        step_with(optimizer, params, grads)
        step_with(twin, twins, grads)
    assert_all_same_bits(params, twins)


def test_a_copy_made_after_a_skip_is_still_first(backend, device):
    params, twins = (parameters([(5,)], device=device) for _ in range(2))
    optimizer, twin = (
        FusedSGD(p, lr=0.1, momentum=0.9, dampening=0.5, loss_scale=4.0, backend=backend)
        for p in (params, twins)
    )
    step_with(optimizer, params, [torch.full((5,), torch.inf)])
    optimizer, params = deepcopy((optimizer, params))
    for grads in gradients(params, 2):
        step_with(optimizer, params, grads)
        step_with(twin, twins, grads)
    assert_all_same_bits(params, twins)


def test_training_recovers_from_a_scale_that_is_far_too_large(backend, device):
    weight = Parameter(torch.full((4,), 0.5, device=device, dtype=torch.float16))
    optimizer = optimizer_over([weight], backend, init_scale=2.0**24, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (weight.float() * 8).sum()
        optimizer.scale(loss).backward()
        optimizer.step()
    stats = optimizer.stats()
    assert 0 < stats.skipped_steps < 30
    assert stats.scale * 8 <= torch.finfo(torch.float16).max < stats.scale * 16
    assert weight.isfinite().all()
    assert (weight < 0.5).all()
