"""The CUDA kernels in emulation: exact counts of bytes and launches, and sizes beyond those of the test models.

Every optimizer test also runs on the emulation, and checks the numbers.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD, WarmupCosineLR
from fused_tricks.step.device_state import StepState
from fused_tricks.step.entry import Entry
from fused_tricks.step.plan import Plan
from fused_tricks.step.request import StepRequest
from support import backends, emulation
from support.comparison import assert_same_bits, bits, fill_gradients, parameters

pytestmark = pytest.mark.skipif(
    emulation.unusable_because() is not None, reason=f"no emulation of CUDA: {emulation.unusable_because()}"
)

# Sizes from a few layers of ResNet-50, so that the costs per tensor have the same weight as in this network.
SIZES = (64 * 3 * 7 * 7, 64, 64, 512 * 256, 512, 2048 * 64, 1000)
SHAPES = [(size,) for size in SIZES]


def test_the_optimizer_tests_run_on_the_emulation() -> None:
    assert "emulated_cuda" in backends.NAMES


def steady_step(
    params: list[Parameter], grad_dtype: torch.dtype | None = None, **options: object
) -> emulation.Traffic:
    """Returns the traffic of one step, after buffers and plan exist."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4} | options
    optimizer = FusedSGD(params, backend="emulated_cuda", **options)
    for _ in range(3):
        for param in params:
            param.grad_dtype = grad_dtype or param.dtype
            param.grad = torch.ones_like(param, dtype=grad_dtype)
        emulation.take_traffic()
        optimizer.step()
    return emulation.take_traffic()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_step_of_16_bit_parameters_moves_22_bytes_an_element(dtype: torch.dtype) -> None:
    traffic = steady_step(parameters(SHAPES, dtype), loss_scale="dynamic")
    assert traffic.element_bytes_read == (2 + 10) * sum(SIZES)
    assert traffic.element_bytes_written == 10 * sum(SIZES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_step_with_an_average_moves_30_bytes_an_element(dtype: torch.dtype) -> None:
    traffic = steady_step(parameters(SHAPES, dtype), loss_scale="dynamic", ema_decay=0.999)
    assert traffic.element_bytes_read == (2 + 14) * sum(SIZES)
    assert traffic.element_bytes_written == 14 * sum(SIZES)
    assert traffic.launches == 2


def test_an_average_adds_8_bytes_to_an_fp32_element_and_16_to_an_fp64_element() -> None:
    for dtype, without in ((torch.float32, 20), (torch.float64, 40)):
        traffic = steady_step(parameters(SHAPES, dtype), ema_decay=0.999)
        moved = traffic.element_bytes_read + traffic.element_bytes_written
        assert moved == (without + 2 * dtype.itemsize) * sum(SIZES)


def test_a_step_of_fp32_parameters_without_a_scale_moves_20_bytes_an_element() -> None:
    traffic = steady_step(parameters(SHAPES, torch.float32))
    assert traffic.element_bytes_read == 12 * sum(SIZES)
    assert traffic.element_bytes_written == 8 * sum(SIZES)


def test_a_step_of_fp64_parameters_moves_40_bytes_an_element() -> None:
    traffic = steady_step(parameters(SHAPES, torch.float64))
    assert traffic.element_bytes_read == 24 * sum(SIZES)
    assert traffic.element_bytes_written == 16 * sum(SIZES)


def test_a_step_without_momentum_does_not_touch_a_buffer() -> None:
    traffic = steady_step(parameters(SHAPES, torch.float16), momentum=0)
    assert traffic.element_bytes_read == 6 * sum(SIZES)
    assert traffic.element_bytes_written == 6 * sum(SIZES)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_warps_request_whole_sectors(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    with emulation.counted_sectors():
        traffic = steady_step(parameters(SHAPES, dtype), grad_dtype, loss_scale="dynamic")
    assert 32 * traffic.element_sectors_read <= 1.1 * traffic.element_bytes_read
    assert 32 * traffic.element_sectors_written <= 1.1 * traffic.element_bytes_written


@pytest.mark.parametrize("ema_decay", [None, 0.999])
def test_a_skipped_step_reads_the_gradients_once_and_writes_no_element(ema_decay: float | None) -> None:
    params = parameters(SHAPES, torch.float16)
    options = {"momentum": 0.9, "loss_scale": "dynamic", "ema_decay": ema_decay}
    optimizer = FusedSGD(params, lr=0.1, **options, backend="emulated_cuda")
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    emulation.take_traffic()
    optimizer.step()
    traffic = emulation.take_traffic()
    assert traffic.element_bytes_read == 2 * sum(SIZES)
    assert traffic.element_bytes_written == 0


@pytest.mark.parametrize("options", [{"loss_scale": "dynamic"}, {"loss_scale": 8.0}, {"max_grad_norm": 1.0}])
def test_a_step_that_scans_takes_two_launches(options: dict[str, object]) -> None:
    assert steady_step(parameters(SHAPES, torch.float16), **options).launches == 2


def test_a_step_that_does_not_scan_takes_one_launch() -> None:
    assert steady_step(parameters(SHAPES, torch.float32)).launches == 1


def test_a_schedule_of_applied_updates_costs_no_launch() -> None:
    params = parameters(SHAPES, torch.float16)
    optimizer = FusedSGD(params, lr=0.1, loss_scale="dynamic", backend="emulated_cuda")
    WarmupCosineLR(optimizer, 8, 4, count="applied")
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        emulation.take_traffic()
        optimizer.step()
    traffic = emulation.take_traffic()
    assert traffic.launches == 2
    assert traffic.table_bytes_read <= 0.5 * sum(SIZES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tables_and_scalars_cost_at_most_half_a_byte_an_element(dtype: torch.dtype) -> None:
    traffic = steady_step(
        parameters(SHAPES, dtype), lr=torch.tensor(0.1), loss_scale="dynamic", max_grad_norm=1.0
    )
    assert traffic.table_bytes_read <= 0.5 * sum(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 256, 257, 1024, 1025, 3585])
def test_any_number_of_tensors_is_updated_in_two_launches(count: int) -> None:
    params = [Parameter(torch.full((3,), float(i), dtype=torch.float16)) for i in range(count)]
    optimizer = FusedSGD(params, lr=0.5, loss_scale=8.0, backend="emulated_cuda")
    for param in params:
        param.grad = torch.full_like(param, 8.0)
    optimizer.step()
    emulation.take_traffic()
    optimizer.step()
    assert emulation.take_traffic().launches == 2
    masters = torch.stack([optimizer.state[param]["master_param"] for param in params])
    assert_same_bits(
        masters, (torch.arange(count, dtype=torch.float32).half().float() - 1.0)[:, None].expand(-1, 3)
    )


def many_parameters() -> list[Parameter]:
    """Returns more parameters than a kernel's argument has gradient addresses for."""
    return [Parameter(torch.zeros(1)) for _ in range(3600)]


@pytest.mark.slow
def test_gradient_addresses_that_do_not_fit_the_argument_are_written_only_when_they_change() -> None:
    params = many_parameters()
    optimizer = FusedSGD(params, lr=0.5, backend="emulated_cuda")
    fill_gradients(params, 1.0)
    optimizer.step()
    launches = []
    for renews in (False, True, False):
        former = [param.grad for param in params]  # so that new gradients get other addresses
        if renews:
            fill_gradients(params, 1.0)
        emulation.take_traffic()
        optimizer.step()
        launches.append(emulation.take_traffic().launches)
        del former
    assert launches == [1, 2, 1]


@pytest.mark.slow
def test_a_replay_reads_the_gradients_of_its_capture_and_an_eager_step_its_own() -> None:
    params = many_parameters()
    optimizer = FusedSGD(params, lr=1.0, backend="emulated_cuda")
    fill_gradients(params, 1.0)
    captured = [param.grad for param in params]
    optimizer.step()
    graph = emulation.Graph()
    with graph.capture():
        optimizer.step()
    fill_gradients(params, 100.0)
    expected = [-101.0, -102.0, -202.0, -203.0]
    for step, value in zip((optimizer.step, graph.replay) * 2, expected, strict=True):
        step()
        assert all(param.item() == value for param in params)
    del captured


def test_a_graph_can_be_replayed_after_its_plan_was_replaced() -> None:
    param = Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.5, backend="emulated_cuda")
    param.grad = torch.ones_like(param)
    optimizer.step()
    graph = emulation.Graph()
    with graph.capture():
        optimizer.step()
    used = [weakref.ref(state) for state in optimizer.state[param].values()]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(tensor() is not None for tensor in used)
    graph.replay()
    del optimizer
    # The constructor of a process's first optimizer imports torch's compiler, which leaves a reference cycle.
    gc.collect()
    assert all(tensor() is None for tensor in used)


def test_memory_is_not_set_up_within_a_capture() -> None:
    param = Parameter(torch.zeros(4))
    optimizer = FusedSGD([param], lr=1.0, backend="emulated_cuda")
    param.grad = torch.ones(4)
    with emulation.Graph().capture(), pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()
    optimizer.step()
    assert param.tolist() == [-1.0] * 4


@pytest.mark.parametrize("count", [4, 5, 48, 49, 100])
def test_any_number_of_groups_keeps_its_own_options(count: int) -> None:
    params = [Parameter(torch.zeros(2)) for _ in range(count)]
    optimizer = FusedSGD(
        [{"params": [param], "lr": float(i + 1)} for i, param in enumerate(params)], backend="emulated_cuda"
    )
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert [param[0].item() for param in params] == [-(i + 1.0) for i in range(count)]


def test_elements_past_two_to_the_31_are_found_by_64_bit_indices() -> None:
    size = 2**31 + 8192 + 5
    param, grad = (untouched_zeros(size, np.float16) for _ in range(2))
    master, buffer = (untouched_zeros(size, np.float32) for _ in range(2))
    tail = slice(2**31 + 8192, size)
    before = slice(2**31 - 8192, 2**31)
    grad[tail] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    run_one_update(param, master, buffer, grad, blocks=1)
    assert_same_bits(master[tail], torch.tensor([-0.5, -1.0, -1.5, -2.0, -2.5]))
    assert_same_bits(param[tail], torch.tensor([-0.5, -1.0, -1.5, -2.0, -2.5], dtype=torch.float16))
    assert not bits(master[before]).any() and not bits(param[before]).any()


def untouched_zeros(size: int, dtype: type) -> Tensor:
    """Returns zeros whose pages the system provides at the first use, so that 26 GB cost next to nothing."""
    return torch.from_numpy(np.zeros(size, dtype))


def run_one_update(param: Tensor, master: Tensor, buffer: Tensor, grad: Tensor, blocks: int) -> None:
    """Runs an update without the optimizer, which would read the whole tensor to make its master."""
    param.grad = grad
    local_state = {"master_param": master, "momentum_buffer": buffer}
    entry = Entry(0, param, live=True, source=param, local=param, local_state=local_state)
    entry.grad_dtype = grad.dtype
    entry.first_updates = {"momentum_buffer": torch.ones((), dtype=torch.int64)}
    group = {**FusedSGD([param]).defaults, "params": [param], "lr": 0.5, "momentum": 0.9}
    stepper = emulation.EmulatedCudaStepper(Plan([entry], [group["lr"]]), StepState())
    with emulation.only_first_blocks(blocks):
        stepper.step([group], {}, StepRequest(False, None, None, None, None))
