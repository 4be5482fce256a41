"""FP32 equals torch.optim.SGD bit for bit, FP16 and BF16 follow the same FP32 path, FP64 is torch's FP64."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.step.parameters import GRAD_DTYPES
from support.backends import is_slow
from support.comparison import (
    VECTOR_EDGES,
    assert_all_same_bits,
    assert_same_bits,
    bits,
    copies,
    fma,
    gradients,
    masters,
    momentum_buffers,
    parameters,
    rounding_cases,
    set_gradients,
)

HYPER_PARAMETERS: list[dict[str, Any]] = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": decay,
        "maximize": maximize,
    }
    for (momentum, dampening, nesterov), decay, maximize in product(
        [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)], [0, 1e-3], [False, True]
    )
]
"""Every valid on/off combination of SGD's options."""

LEARNING_RATES = {
    "float": lambda: 0.05,
    "scalar tensor": lambda: torch.tensor(0.05),
    "one-element tensor": lambda: torch.tensor([0.05]),
    "FP64 tensor": lambda: torch.tensor(0.05, dtype=torch.float64),
}

SHAPES = [
    *((n,) for n in VECTOR_EDGES),
    (),
    (0,),
    (3, 0, 2),
    (5, 7),
    (4, 3, 3, 3),
    (1023,),
    (4099,),
    (70_001,),
]
LOW_PRECISION = [torch.float16, torch.bfloat16]


def name_of(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


def run(optimizer, params, stream, steps: int) -> None:
    for step in range(steps):
        set_gradients(params, stream[step % len(stream)])
        optimizer.step()


def run_torch(params, stream, steps: int, **options) -> torch.optim.SGD:
    """Runs torch.optim.SGD over `params` with the gradients cast to the parameters' dtypes."""
    optimizer = torch.optim.SGD(params, foreach=False, **options)
    run(
        optimizer,
        params,
        [[g.to(p.dtype) for g, p in zip(grads, params, strict=True)] for grads in stream],
        steps,
    )
    return optimizer


@pytest.mark.parametrize("options", HYPER_PARAMETERS, ids=name_of)
def test_fp32_equals_torch_bit_for_bit_after_a_long_run(backend, device, long_run, options):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    stream = gradients(params, 12)
    optimizer = FusedSGD(params, lr=0.05, bias_decay=True, backend=backend, **options)
    run(optimizer, params, stream, long_run)
    reference = run_torch(expected, stream, long_run, lr=0.05, **options)
    assert_all_same_bits(params, expected, "parameter")
    if options["momentum"]:
        assert_all_same_bits(
            momentum_buffers(optimizer, params), momentum_buffers(reference, expected), "momentum buffer"
        )


@pytest.mark.parametrize("kind", LEARNING_RATES)
def test_a_learning_rate_of_any_type_equals_torch_bit_for_bit(backend, device, kind):
    params = parameters(SHAPES[:-1], device=device)
    expected = copies(params)
    stream = gradients(params, 5)
    options = {"momentum": 0.9, "weight_decay": 1e-3}
    run(
        FusedSGD(params, LEARNING_RATES[kind](), bias_decay=True, backend=backend, **options),
        params,
        stream,
        5,
    )
    run_torch(expected, stream, 5, lr=LEARNING_RATES[kind](), **options)
    assert_all_same_bits(params, expected, "parameter")


def test_a_tensor_learning_rate_changed_in_place_takes_effect(backend, device):
    params = parameters([(33,)], device=device)
    expected = copies(params)
    stream = gradients(params, 4)
    for group, make in (
        (params, lambda p, lr: FusedSGD(p, lr, backend=backend)),
        (expected, torch.optim.SGD),
    ):
        lr = torch.tensor(0.1)
        optimizer = make(group, lr)
        for grads in stream:
            set_gradients(group, grads)
            optimizer.step()
            lr.mul_(0.7)
    assert_all_same_bits(params, expected)


def test_a_tensor_learning_rate_is_not_written(backend, device):
    params = parameters([(9,)], device=device)
    lr = torch.tensor(0.1)
    optimizer = FusedSGD(params, lr, momentum=0.9, backend=backend)
    run(optimizer, params, gradients(params, 3), 3)
    assert lr.item() == torch.tensor(0.1).item()
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.every_case
@pytest.mark.parametrize("options", HYPER_PARAMETERS, ids=name_of)
def test_the_update_is_the_documented_arithmetic(backend, device, options):
    """Fused multiply-adds computed in NumPy are independent of torch and of the machine."""
    (param,) = parameters([(1000,)], device=device)
    w = param.detach().cpu().numpy().copy()
    b = None
    lr, momentum, decay = (np.float32(x) for x in (0.05, options["momentum"], options["weight_decay"]))
    undamped = np.float32(1 - options["dampening"])
    optimizer = FusedSGD([param], lr=0.05, bias_decay=True, backend=backend, **options)
    for (grad,) in gradients([param], 4):
        set_gradients([param], [grad])
        optimizer.step()
        g = -grad.numpy() if options["maximize"] else grad.numpy()
        if decay:
            g = fma(decay, w, g)
        d = g
        if momentum:
            b = g if b is None else fma(undamped, g, momentum * b)
            d = fma(momentum, b, g) if options["nesterov"] else b
        w = fma(-lr, d, w)
    assert_same_bits(param, torch.from_numpy(w), "parameter")


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", HYPER_PARAMETERS, ids=name_of)
def test_low_precision_masters_follow_the_fp32_path_bit_for_bit(backend, device, long_run, dtype, options):
    params = parameters(SHAPES[:-1], dtype, device)
    expected = copies(params, torch.float32)
    stream = gradients(params, 12)
    optimizer = FusedSGD(params, lr=0.05, bias_decay=True, backend=backend, **options)
    run(optimizer, params, stream, long_run)
    reference = run_torch(expected, stream, long_run, lr=0.05, **options)
    assert_all_same_bits(masters(optimizer, params), expected, "master")
    assert_all_same_bits(params, [p.to(dtype) for p in expected], "parameter")
    if options["momentum"]:
        assert_all_same_bits(
            momentum_buffers(optimizer, params), momentum_buffers(reference, expected), "momentum buffer"
        )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_masters_keep_what_the_low_precision_parameter_loses(backend, device, dtype):
    param = Parameter(torch.ones(5, dtype=dtype, device=device))
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    for _ in range(64):
        param.grad = torch.full_like(param, 2.0**-13)
        optimizer.step()
    assert_same_bits(param, torch.full((5,), 1 - 2.0**-7, dtype=dtype))


@pytest.mark.parametrize("options", HYPER_PARAMETERS, ids=name_of)
def test_fp64_equals_torch_bit_for_bit(backend, device, options):
    params = parameters([(1,), (17,), (4, 3, 3, 3), (1023,)], torch.float64, device)
    expected = copies(params)
    stream = gradients(params, 20)
    optimizer = FusedSGD(params, lr=0.05, bias_decay=True, backend=backend, **options)
    run(optimizer, params, stream, 20)
    reference = run_torch(expected, stream, 20, lr=0.05, **options)
    assert_all_same_bits(params, expected, "parameter")
    if options["momentum"]:
        assert_all_same_bits(
            momentum_buffers(optimizer, params), momentum_buffers(reference, expected), "buffer"
        )


def test_state_holds_only_what_the_dtype_and_options_need(backend, device):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for momentum in (0, 0.9):
        params = parameters([(5,)] * 4, dtypes, device)
        optimizer = FusedSGD(params, lr=0.1, momentum=momentum, backend=backend)
        run(optimizer, params, gradients(params, 2), 2)
        for param, master, buffer in zip(
            params,
            [torch.float32, torch.float32, None, None],
            [torch.float32, torch.float32, torch.float32, torch.float64],
            strict=True,
        ):
            found = {key: value.dtype for key, value in optimizer.state[param].items()}
            wanted = {"master_param": master, "momentum_buffer": buffer if momentum else None}
            assert found == {key: dtype for key, dtype in wanted.items() if dtype is not None}


def test_all_dtypes_in_one_optimizer_each_follow_their_own_path(backend, device):
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16]
    shapes = [(65,), (3, 5), (130,), (7,), (9, 3, 2)]
    params = parameters(shapes, dtypes, device)
    wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
    expected = [copies([p], d)[0] for p, d in zip(params, wide, strict=True)]
    stream = gradients(params, 10)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    run(FusedSGD(params, bias_decay=True, backend=backend, **options), params, stream, 10)
    run_torch(expected, stream, 10, **options)
    assert_all_same_bits(params, [e.to(p.dtype) for e, p in zip(expected, params, strict=True)])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_an_fp32_gradient_beside_a_low_precision_parameter_is_used_unrounded(backend, device, dtype):
    params = parameters([(33,), (70,)], dtype, device)
    for param in params:
        param.grad_dtype = torch.float32
    expected = copies(params, torch.float32)
    stream = gradients(expected, 10)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = FusedSGD(params, bias_decay=True, backend=backend, **options)
    run(optimizer, params, stream, 10)
    run_torch(expected, stream, 10, **options)
    assert_all_same_bits(masters(optimizer, params), expected, "master")
    assert_all_same_bits(params, [p.to(dtype) for p in expected])


@pytest.mark.parametrize("size", [3, 33, 70, 40_000])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "ema_decay": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_low_precision_gradient_beside_an_fp32_parameter_equals_its_fp32_value(
    backend, device, dtype, options, size
):
    params = parameters([(size,), (size, 2)], device=device)
    widened = parameters([(size,), (size, 2)], device=device)
    for param in params:
        param.grad_dtype = dtype
    common = {"lr": 0.05, "weight_decay": 1e-3, "bias_decay": True, "loss_scale": 8.0, "backend": backend}
    optimizer, expected = FusedSGD(params, **common, **options), FusedSGD(widened, **common, **options)
    for grads in gradients(params, 4):
        low = [grad.to(dtype) for grad in grads]
        set_gradients(params, low)
        set_gradients(widened, [grad.float() for grad in low])
        optimizer.step()
        expected.step()
    assert_all_same_bits(params, widened)
    for one, other in zip(params, widened, strict=True):
        assert "master_param" not in optimizer.state.get(one, {})
        assert_all_same_bits(
            optimizer.state.get(one, {}).values(), expected.state.get(other, {}).values(), "state"
        )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("offset", [1, 8])
def test_a_low_precision_gradient_at_any_address_is_read_beside_an_fp32_parameter(
    backend, device, dtype, offset
):
    (param,) = parameters([(1000,)], device=device)
    expected = param.detach().clone()
    param.grad_dtype = dtype
    grad = torch.arange(1000 + offset, device=device).to(dtype)[offset:]
    param.grad = grad
    FusedSGD([param], lr=0.5, loss_scale=1.0, backend=backend).step()
    assert_same_bits(param, expected.add(grad.float(), alpha=-0.5))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_of_a_low_precision_gradient_beside_an_fp32_parameter_skips_the_step(
    backend, device, dtype, value
):
    (param,) = parameters([(300,)], device=device)
    before = param.detach().clone()
    param.grad_dtype = dtype
    param.grad = torch.ones(300, dtype=dtype, device=device)
    param.grad[299] = value
    optimizer = FusedSGD([param], lr=0.5, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.stats().skipped_steps == 1
    assert_same_bits(param, before)


def test_parameters_and_gradients_of_every_pair_of_dtypes_are_updated_together(backend, device):
    pairs = [(dtype, grad_dtype) for dtype, allowed in GRAD_DTYPES.items() for grad_dtype in allowed]
    params = parameters([(70,)] * len(pairs), [dtype for dtype, _ in pairs], device)
    twins = parameters([(70,)] * len(pairs), [dtype for dtype, _ in pairs], device)
    common = {"lr": 0.05, "momentum": 0.9, "loss_scale": 2.0}
    optimizer = FusedSGD(params, **common, backend=backend)
    expected = FusedSGD(twins, **common, backend="reference")
    for step in range(3):
        for one, other, (_, grad_dtype) in zip(params, twins, pairs, strict=True):
            grad = torch.linspace(-1, 1, 70, device=device).add(step).to(grad_dtype)
            for param in (one, other):
                param.grad_dtype = grad_dtype
                param.grad = grad.clone()
        optimizer.step()
        expected.step()
    assert_all_same_bits(params, twins)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_every_low_precision_gradient_is_read_exactly(backend, device, dtype):
    """The gradient has every finite bit pattern, subnormals included."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = grad[grad.isfinite()]
    param = Parameter(torch.zeros(len(grad), dtype=dtype, device=device))
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    run(optimizer, [param], [[grad]], 1)
    expected = Parameter(torch.zeros(len(grad)))
    run_torch([expected], [[grad]], 1, lr=1.0)
    assert_same_bits(optimizer.state[param]["master_param"], expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_the_parameter_is_the_master_rounded_to_nearest_even(backend, device, dtype):
    values = rounding_cases(dtype)
    param = Parameter(torch.zeros(len(values), dtype=dtype, device=device))
    param.grad_dtype = torch.float32
    param.grad = -values.to(device)
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    optimizer.step()
    assert_same_bits(optimizer.state[param]["master_param"], 0.0 + values, "master")
    assert_same_bits(param, (0.0 + values).to(dtype), "parameter")


@pytest.mark.parametrize("decayed", [False, True])
def test_signed_zeros_and_subnormals_equal_torch(backend, device, decayed):
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38])
    param = Parameter(tiny.repeat_interleave(6).to(device))
    expected = copies([param])
    grads = [[tiny.repeat(6)]] * 2
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.25 * decayed}
    run(FusedSGD([param], bias_decay=True, backend=backend, **options), [param], grads, 2)
    run_torch(expected, grads, 2, **options)
    assert_same_bits(param, expected[0])


def test_without_weight_decay_an_infinite_weight_stays_infinite(backend, device):
    param = Parameter(torch.tensor([torch.inf, -torch.inf, 1.0], device=device))
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, bias_decay=True, backend=backend)
    run(optimizer, [param], [[torch.ones(3)]], 2)
    assert param[0] == torch.inf
    assert param[1] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_without_scale_and_clipping_non_finite_gradients_flow_through_as_in_torch(backend, device, dtype):
    params = parameters([(6,)], dtype, device)
    expected = copies(params, torch.float64 if dtype == torch.float64 else torch.float32)
    grads = [[torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 0.0, -1.0], dtype=dtype)]] * 3
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    run(optimizer, params, grads, 3)
    run_torch(expected, grads, 3, lr=0.1, momentum=0.9)
    torch.testing.assert_close(params[0].cpu(), expected[0].to(dtype), rtol=0, atol=0, equal_nan=True)
    assert optimizer.stats().skipped_steps == 0


def test_the_gradient_reads_the_same_after_the_step(backend, device):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    params = parameters([(37,)] * 4, dtypes, device)
    optimizer = FusedSGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True, bias_decay=True,
        loss_scale=1024.0, max_grad_norm=0.5, backend=backend,
    )  # fmt: skip
    for grads in gradients(params, 3):
        set_gradients(params, grads)
        before = [bits(p.grad).clone() for p in params]
        storages = [p.grad.data_ptr() for p in params]
        optimizer.step()
        assert all(torch.equal(bits(p.grad), b) for p, b in zip(params, before, strict=True))
        assert [p.grad.data_ptr() for p in params] == storages


def test_the_momentum_buffer_is_not_the_gradient_itself(backend, device):
    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    set_gradients(params, [torch.ones(5)])
    optimizer.step()
    params[0].grad.zero_()
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], torch.ones(5))


def test_a_thousand_parameters_in_many_groups_equal_torch(backend, device):
    count = 100 if is_slow(backend) else 1000
    params = parameters([(n % 13,) for n in range(count)], device=device)
    expected = copies(params)
    stream = gradients(params, 3)

    def groups(of):
        return [
            {"params": of[i : i + count // 100], "lr": 0.01 + i / 1e4, "weight_decay": i / 1e5}
            for i in range(0, count, count // 100)
        ]

    run(FusedSGD(groups(params), momentum=0.9, bias_decay=True, backend=backend), params, stream, 3)
    run(torch.optim.SGD(groups(expected), momentum=0.9, foreach=False), expected, stream, 3)
    assert_all_same_bits(params, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("momentum", [0, 0.5])
def test_the_signs_of_zeros_are_torchs(backend, device, dtype, maximize, momentum):
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    weights, grads = (each.flatten() for each in torch.meshgrid(zeros, zeros, indexing="ij"))
    param, expected = (Parameter(weights.clone().to(place)) for place in (device, "cpu"))
    options = {"lr": 0.0, "momentum": momentum, "maximize": maximize, "weight_decay": 0.1}
    ours = FusedSGD([param], bias_decay=True, backend=backend, **options)
    reference = torch.optim.SGD([expected], foreach=False, **options)
    for sign in (1.0, 1.0, -1.0, -1.0):
        param.grad, expected.grad = (grads * sign).to(device), grads * sign
        ours.step()
        reference.step()
        assert_all_same_bits([param], [expected])
        if momentum:
            assert_all_same_bits(momentum_buffers(ours, [param]), momentum_buffers(reference, [expected]))
