"""Hazards of a GPU: steps that overlap, and memory that another stream still reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.backends import gpu
from fused_tricks.step.device_state import OFFSETS
from support import backends

GPU_BACKENDS = ["emulated_cuda", "cuda", "triton"]
# The modules that read the current stream.
MODULES = ["fused_tricks.backends.gpu", "fused_tricks.backends.cuda", "fused_tricks.backends.triton.stepper"]


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Returns each usable backend that decides a step on the device."""
    reason = backends.unusable_because(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    name: str = request.param
    return name


def prepared(backend: str, sizes: tuple[int, ...], **options: object) -> tuple[list[Parameter], FusedSGD]:
    """Returns parameters with gradients, and an optimizer that has taken a step."""
    params = [Parameter(torch.zeros(size, device=backends.device_of(backend))) for size in sizes]
    optimizer = FusedSGD(params, lr=1.0, backend=backend, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("arrivals", [1, 2, 5])
def test_a_counter_that_overlapping_scans_left_wrong_heals(backend: str, arrivals: int) -> None:
    params, optimizer = prepared(backend, (8193, 40_000, 3), loss_scale="dynamic")
    at = OFFSETS["arrivals"]
    optimizer._step_state.block[at : at + 4].view(torch.int32).fill_(arrivals)
    optimizer.step()
    applied = optimizer.stats().applied_steps
    # The decision includes the overflow of every block only if the deciding block is the last.
    for skipped, param in enumerate(params, start=1):
        param.grad[-1] = float("inf")
        optimizer.step()
        param.grad[-1] = 1.0
        assert optimizer.stats().skipped_steps == skipped
    optimizer.step()
    assert optimizer.stats().applied_steps == applied + 1


@pytest.mark.parametrize("options", [{}, {"loss_scale": "dynamic"}], ids=["unscanned", "scanned"])
def test_a_new_plan_begins_with_its_counter_at_zero(backend: str, options: dict[str, object]) -> None:
    params, optimizer = prepared(backend, (8193, 40_000), **options)
    at = OFFSETS["arrivals"]
    optimizer._step_state.block[at : at + 4].view(torch.int32).fill_(3)
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert optimizer.stats().applied_steps == 2
    assert optimizer._step_state.block[at : at + 4].tolist() == [0] * 4


def test_the_stream_of_a_handle_is_looked_up_so_that_the_default_one_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_stream_from_external", lambda *handle: asked.append(handle))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    gpu.record_stream(torch.zeros(1), 0)
    assert asked == [(0, torch.device("cpu"))]


def test_stand_ins_are_recorded_with_the_other_memory_of_their_plan(backend: str) -> None:
    param = Parameter(torch.zeros(6, 4, device=backends.device_of(backend))[:, ::2])
    param.grad = torch.ones(6, 2, device=param.device)
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    optimizer.step()
    addresses = {tensor.data_ptr() for tensor in optimizer._prepared.stepper._memory}
    assert {entry.source.data_ptr() for entry in optimizer._prepared.plan.entries} <= addresses


def test_the_counter_is_zero_between_steps(backend: str) -> None:
    for options in ({}, {"loss_scale": "dynamic"}, {"max_grad_norm": 1.0}):
        _, optimizer = prepared(backend, (8193, 40_000, 3), **options)
        block = optimizer._step_state.block
        for field in ("found_inf", "arrivals"):
            assert block[OFFSETS[field] :][:4].tolist() == [0] * 4


def test_memory_that_a_step_on_another_stream_reads_is_recorded_when_its_plan_is_replaced(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[int, int]] = []

    def record(tensor: Tensor, stream: int) -> None:
        recorded.append((tensor.data_ptr(), stream))

    present = [1]
    for module in MODULES:
        monkeypatch.setattr(f"{module}.current_stream", lambda device: present[0])
    monkeypatch.setattr(gpu, "record_stream", record)
    params, optimizer = prepared(backend, (10, 20), loss_scale="dynamic", momentum=0.9)
    memory = {tensor.data_ptr() for tensor in optimizer._prepared.stepper._memory}
    present[0] = 2
    optimizer.step()
    assert recorded == []
    params[0].data = params[0].data.clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert len(memory) >= 3
    assert set(recorded) == {(address, 2) for address in memory}
