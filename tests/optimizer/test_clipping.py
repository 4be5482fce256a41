"""Clipping by the global norm, and the norm itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    bits,
    copies,
    gradients,
    parameters,
    set_gradients,
)

SHAPES = [(33,), (0,), (5, 7), (1,), (1023,)]
MIXED = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float32]


def exact_norm(grads) -> float:
    """Returns the L2 norm, summed without rounding error."""
    return math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.double().flatten()))


def clip_of(norm: float, max_norm: float) -> torch.Tensor:
    """Returns min(1, max_norm / (norm + 1e-6)) in FP32, with each operation rounded."""
    quotient = np.float32(max_norm) / (np.float32(norm) + np.float32(1e-6))
    return torch.tensor(min(np.float32(1), quotient))


def norm_after_step(optimizer: FusedSGD, params, grads) -> float:
    set_gradients(params, grads)
    optimizer.step()
    norm = optimizer.stats().grad_norm
    assert isinstance(norm, float)
    return norm


@pytest.mark.parametrize("scale", [None, 1024.0, 1000.0])
def test_the_norm_is_the_unscaled_l2_norm_over_all_gradients(backend, device, scale):
    params = parameters(SHAPES, MIXED, device)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1e9, loss_scale=scale, backend=backend)
    for grads in gradients(params, 3):
        norm = norm_after_step(optimizer, params, grads)
        assert norm == pytest.approx(exact_norm(grads) / (scale or 1), rel=2**-23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_without_fp64_gradients_the_norm_is_an_fp32_number(backend, device, dtype):
    params = parameters(SHAPES, dtype, device)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1e9, backend=backend)
    (grads,) = gradients(params, 1)
    assert norm_after_step(optimizer, params, grads) == float(np.float32(exact_norm(grads)))


@pytest.mark.parametrize("dtypes", [[torch.float64] * 5, MIXED], ids=["FP64", "mixed"])
def test_with_an_fp64_gradient_the_norm_is_an_fp64_number(backend, device, dtypes):
    params = parameters(SHAPES, dtypes, device)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1e9, backend=backend)
    (grads,) = gradients(params, 1)
    assert norm_after_step(optimizer, params, grads) == pytest.approx(exact_norm(grads), rel=1e-14)


def test_only_gradients_of_this_step_make_the_norm_one_in_fp64(backend, device):
    params = parameters([(33,), (5,)], [torch.float32, torch.float64], device)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1e9, backend=backend)
    (grads,) = gradients(params, 1)
    norm_after_step(optimizer, params, grads)
    norm = norm_after_step(optimizer, params, [grads[0], None])
    assert norm == float(np.float32(exact_norm(grads[:1])))


@pytest.mark.parametrize("magnitude", [1.0, 1e50, 1e-50], ids=str)
@pytest.mark.parametrize(
    "dtypes", [[torch.float64] * 2, [torch.float64, torch.float32]], ids=["FP64", "mixed"]
)
def test_clipping_with_fp64_gradients_is_that_of_torch(backend, device, dtypes, magnitude):
    """Each gradient has one element, so that the order of the sum has no effect."""
    params = parameters([(1,), (1,)], dtypes, device)
    expected = copies(params)
    grads = [torch.tensor([0.75 * magnitude], dtype=torch.float64), torch.tensor([0.25], dtype=dtypes[1])]
    optimizer = FusedSGD(params, lr=0.3, momentum=0.9, max_grad_norm=0.7, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.3, momentum=0.9, foreach=False)
    for _ in range(3):
        norm = norm_after_step(optimizer, params, grads)
        set_gradients(expected, grads)
        total = torch.nn.utils.clip_grad_norm_(expected, 0.7, foreach=False)
        reference.step()
        assert norm == total.item()
    assert_all_same_bits(params, expected)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30], ids=str)
def test_squares_outside_fp32_do_not_spoil_the_norm(backend, device, magnitude):
    params = parameters([(1000,), (24,)], device=device)
    optimizer = FusedSGD(params, lr=0.0, max_grad_norm=1.0, backend=backend)
    norm = norm_after_step(optimizer, params, [torch.full(p.shape, magnitude) for p in params])
    assert norm == pytest.approx(float(np.float32(magnitude)) * 32, rel=2**-23)


def test_many_small_gradients_beside_a_large_one_all_count(backend, device):
    """An FP32 sum of squares would lose every small gradient."""
    params = parameters([(2**18,)], device=device)
    grad = torch.full((2**18,), 2.0**-13)
    grad[0] = 1.0
    optimizer = FusedSGD(params, lr=0.0, max_grad_norm=1.0, backend=backend)
    assert norm_after_step(optimizer, params, [grad]) == pytest.approx(exact_norm([grad]), rel=2**-23)


def test_the_norm_has_the_same_bits_whatever_the_number_of_threads(backend, device):
    params = parameters([(300_001,), (17,), (70_001,)], [torch.float16, torch.float32, torch.float32], device)
    (grads,) = gradients(params, 1)
    optimizer = FusedSGD(params, lr=0.0, max_grad_norm=1.0, backend=backend)
    threads = torch.get_num_threads()
    norms = []
    try:
        for count in (1, 2, 1, 2, 3):
            torch.set_num_threads(count)
            norms.append(norm_after_step(optimizer, params, grads))
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


def test_the_update_has_the_same_bits_whatever_the_number_of_threads(backend, device):
    stream = gradients(parameters([(140_001,), (17,)], torch.float16), 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = parameters([(140_001,), (17,)], torch.float16, device)
            optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=0.5, backend=backend)
            for grads in stream:
                norm_after_step(optimizer, params, grads)
            results.append([bits(p) for p in params])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("scale", [None, 512.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_multiplied_by_the_documented_coefficient(backend, device, dtype, scale, max_norm):
    params = parameters(SHAPES, dtype, device)
    expected = copies(params, torch.float32)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    optimizer = FusedSGD(
        params, max_grad_norm=max_norm, loss_scale=scale, bias_decay=True, backend=backend, **options
    )
    reference = torch.optim.SGD(expected, foreach=False, **options)
    for grads in gradients(params, 4):
        norm = norm_after_step(optimizer, params, grads)
        set_gradients(expected, [g.float() / (scale or 1) * clip_of(norm, max_norm) for g in grads])
        reference.step()
    assert_all_same_bits(params, [p.to(dtype) for p in expected])


def test_clipped_gradients_have_the_given_norm(backend, device):
    params = parameters(SHAPES, device=device)
    before = [p.detach().clone() for p in params]
    optimizer = FusedSGD(params, lr=1.0, max_grad_norm=0.25, backend=backend)
    (grads,) = gradients(params, 1)
    norm_after_step(optimizer, params, [1000 * g for g in grads])
    moved = [(b - p.detach()).cpu() for b, p in zip(before, params, strict=True)]
    assert exact_norm(moved) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("max_norm", [1e9, torch.inf])
def test_a_norm_below_the_limit_changes_no_bit(backend, device, max_norm):
    params, unclipped = (parameters(SHAPES, MIXED, device) for _ in range(2))
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=max_norm, backend=backend)
    plain = FusedSGD(unclipped, lr=0.1, momentum=0.9, backend=backend)
    for grads in gradients(params, 3):
        norm_after_step(optimizer, params, grads)
        set_gradients(unclipped, grads)
        plain.step()
    assert_all_same_bits(params, unclipped)


@pytest.mark.parametrize("max_norm", [1.0, torch.inf])
def test_gradients_of_zero_have_norm_zero_and_move_nothing(backend, device, max_norm):
    params = parameters(SHAPES, MIXED, device)
    before = [p.detach().clone() for p in params]
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=max_norm, backend=backend)
    assert norm_after_step(optimizer, params, [torch.zeros_like(p, device="cpu") for p in params]) == 0.0
    assert_all_same_bits(params, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["usual", "tiny", "huge", "mixed", "subnormal", "mostly zero"])
def test_the_norm_is_that_of_fp64_to_a_last_bit(backend, device, dtype, kind):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40_003, generator=generator, dtype=torch.float64)
    limits = torch.finfo(dtype)
    factor = {
        "usual": 1.0,
        "tiny": 4.0 * limits.tiny,
        "huge": limits.max / 16,
        "mixed": 10.0
        ** torch.linspace(*((-4, 4) if dtype == torch.float16 else (-30, 30)), 40_003, dtype=torch.float64),
        "subnormal": 64 * limits.smallest_normal * limits.eps,
        "mostly zero": (torch.arange(40_003) % 1009 == 0).double(),
    }[kind]
    grad = (values * factor).to(dtype)
    param = Parameter(torch.zeros(40_003, dtype=dtype, device=device))
    param.grad = grad.to(device)
    optimizer = FusedSGD([param], lr=0.0, max_grad_norm=float("inf"), backend=backend)
    optimizer.step()
    expected = float(torch.linalg.vector_norm(grad.double()).float())
    assert optimizer.stats().grad_norm == pytest.approx(expected, rel=2.0**-23, abs=2.0**-149)


def test_fp64_parameters_are_clipped_with_the_global_coefficient(backend, device):
    params = parameters([(9,), (9,)], [torch.float64, torch.float32], device)
    before = params[0].detach().cpu().clone()
    optimizer = FusedSGD(params, lr=1.0, max_grad_norm=0.5, backend=backend)
    grads = [torch.full((9,), 4.0, dtype=torch.float64), torch.full((9,), 3.0)]
    norm = norm_after_step(optimizer, params, grads)
    assert norm == 15.0
    assert_same_bits(params[0], before - grads[0] * (0.5 / (norm + 1e-6)))


def test_maximizing_clips_the_same_norm(backend, device):
    up, down = (parameters([(9,)], device=device) for _ in range(2))
    (grads,) = gradients(up, 1)
    norm_after_step(FusedSGD(up, lr=0.1, max_grad_norm=0.1, maximize=True, backend=backend), up, grads)
    norm_after_step(FusedSGD(down, lr=0.1, max_grad_norm=0.1, backend=backend), down, [-g for g in grads])
    assert_all_same_bits(up, down)


def test_parameters_without_gradient_do_not_enter_the_norm(backend, device):
    params = parameters([(3,), (4,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0, backend=backend)
    assert norm_after_step(optimizer, params, [torch.ones(3) * 4, torch.ones(4) * 2]) == 8.0
    assert norm_after_step(optimizer, params, [None, torch.ones(4) * 2]) == 4.0


def test_the_norm_is_over_all_groups(backend, device):
    params = parameters([(3,), (4,)], device=device)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = FusedSGD(groups, lr=0.1, max_grad_norm=1.0, backend=backend)
    assert norm_after_step(optimizer, params, [torch.ones(3) * 4, torch.ones(4) * 2]) == 8.0


def test_without_max_grad_norm_there_is_no_norm(backend, device):
    param = Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([param], lr=0.1, loss_scale="dynamic", backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.stats().grad_norm is None


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_agrees_with_clip_grad_norm_followed_by_sgd(backend, device, max_norm):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=max_norm, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    for grads in gradients(params, 5):
        norm = norm_after_step(optimizer, params, grads)
        set_gradients(expected, grads)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(expected, max_norm)), rel=1e-6)
        reference.step()
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), other, rtol=1e-5, atol=1e-6)
