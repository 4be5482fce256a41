"""Warnings about training that goes wrong without an error: one per optimizer, and none for good training."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from fused_tricks.step import diagnostics
from support.comparison import assert_unchanged, parameters, snapshot

UNUSED = "optimizer.scale\\(\\) has never been called"
UNSCALED = "float16 gradients without a loss scale"
STUCK = "optimizer steps were skipped"


@pytest.fixture(autouse=True)
def every_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets few steps between two readings, because an interpreted step is slow."""
    monkeypatch.setattr(diagnostics, "STEPS_PER_READING", 12)
    monkeypatch.setattr(diagnostics, "STEPS_UNTIL_ARRIVAL", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def optimizer_of(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float16, **options: Any
) -> FusedSGD:
    params = parameters([(2,)], dtype, device)
    params[0].grad = torch.ones_like(params[0])
    return FusedSGD(params, backend=backend, **{"lr": 0.1, **options})


def warnings_of(steps: int, optimizer: FusedSGD, gradient: float | None = None) -> list[str]:
    """Takes steps, and returns the messages of their warnings."""
    param = optimizer.param_groups[0]["params"][0]
    if gradient is not None:
        param.grad = torch.full_like(param, gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("loss_scale", ["dynamic", 128.0], ids=str)
def test_a_loss_scale_that_is_never_used_is_warned_of_once_at_the_users_line(backend, device, loss_scale):
    optimizer = optimizer_of(backend, device, loss_scale=loss_scale)
    with pytest.warns(UserWarning, match=UNUSED) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert warnings_of(2, optimizer) == []


READERS: dict[str, Callable[[FusedSGD, DynamicLossScale], Any]] = {
    "scale()": lambda optimizer, rule: optimizer.scale(torch.ones(())),
    "stats()": lambda optimizer, rule: optimizer.stats().scale,
    "loss_scale": lambda optimizer, rule: optimizer.loss_scale,
    "get_scale() of the rule": lambda optimizer, rule: rule.get_scale(),
}


@pytest.mark.parametrize("reader", READERS)
def test_code_that_reads_the_scale_may_multiply_by_itself(backend, device, reader):
    rule = DynamicLossScale()
    optimizer = optimizer_of(backend, device, loss_scale=rule)
    READERS[reader](optimizer, rule)
    assert warnings_of(2, optimizer) == []


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["copy", "deep", "pickle"],
)
def test_a_copy_of_an_optimizer_whose_scale_is_used_does_not_warn(copied):
    optimizer = optimizer_of("reference", torch.device("cpu"), torch.float32, loss_scale="dynamic")
    optimizer.scale(torch.ones(()))
    twin = copied(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(2)
    assert warnings_of(2, twin) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_stage_of_a_pipeline_does_not_scale_the_loss_itself():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        optimizer = optimizer_of(
            "reference", torch.device("cpu"), loss_scale="dynamic", partition_group=group
        )
        assert warnings_of(2, optimizer) == []
    finally:
        distributed.destroy_process_group()


def test_a_scale_of_one_states_that_no_scaling_is_wanted(backend, device):
    assert warnings_of(2, optimizer_of(backend, device, loss_scale=1.0)) == []


def test_a_step_with_a_loss_scale_and_without_gradients_is_warned_of_once(backend, device):
    optimizer = optimizer_of(backend, device, loss_scale="dynamic")
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert warnings_of(2, optimizer) == []


@pytest.mark.parametrize("case", ["nothing is scaled", "nothing has elements", "nothing is trained"])
def test_a_step_without_gradients_is_silent_like_that_of_sgd(backend, device, case):
    params = parameters([(0,) if case == "nothing has elements" else (2,)], torch.float16, device)
    loss_scale = None if case == "nothing is scaled" else "dynamic"
    optimizer = FusedSGD(params, lr=0.1, backend=backend, loss_scale=loss_scale)
    optimizer.zero_grad()
    params[0].requires_grad_(case != "nothing is trained")
    assert warnings_of(2, optimizer) == []


def test_float16_gradients_without_a_scale_are_warned_of_once(backend, device):
    optimizer = optimizer_of(backend, device)
    with pytest.warns(UserWarning, match=UNSCALED) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.add_param_group({"params": parameters([(3,)], torch.float16, device)})
    assert warnings_of(2, optimizer) == []


def test_a_search_for_an_overflow_is_no_use_of_the_scale():
    optimizer = optimizer_of("reference", torch.device("cpu"), loss_scale="dynamic")
    optimizer.find_overflow()
    with pytest.warns(UserWarning, match=UNUSED):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_of_a_wide_range_need_no_scale(backend, device, dtype):
    assert warnings_of(2, optimizer_of(backend, device, dtype)) == []


def test_float32_gradients_of_float16_parameters_need_no_scale(backend, device):
    optimizer = optimizer_of(backend, device)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = torch.ones(2, device=device)
    assert warnings_of(2, optimizer) == []


def test_float16_gradients_under_a_grad_scaler_have_one(backend, device):
    param = Parameter(torch.ones(2, dtype=torch.float16, device=device))
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(param.float().sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)


def test_the_warning_points_through_a_schedulers_wrapper(backend, device):
    optimizer = optimizer_of(backend, device)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match=UNSCALED) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_refused_step_is_not_warned_of(backend, device):
    optimizer = optimizer_of(backend, device)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(
        2, dtype=torch.float16, device=device
    ).to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


@pytest.mark.parametrize("options", [{}, {"loss_scale": "dynamic"}], ids=str)
def test_a_warning_that_is_made_an_error_changes_nothing(backend, device, options):
    optimizer = optimizer_of(backend, device, **options)
    before = [p.clone() for p in optimizer.param_groups[0]["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            optimizer.step()
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))
    assert optimizer.stats().applied_steps == 0
    assert warnings_of(1, optimizer) == []
    assert optimizer.stats().applied_steps == 1


def is_late(backend: str) -> bool:
    return backend not in ("reference", "cpu")


STUCK_OPTIONS = {
    "static": ({"loss_scale": 1e9}, " with the static loss scale of 1e\\+09, because"),
    "at the floor": (
        {"loss_scale": DynamicLossScale(init_scale=2.0, min_scale=2.0)},
        " with the loss scale at its floor of 2, because",
    ),
    "clipped": ({"max_grad_norm": 1.0}, ", because a gradient was inf or NaN"),
}


@pytest.mark.parametrize("case", STUCK_OPTIONS)
def test_steps_that_are_skipped_for_ever_are_warned_of_once(backend, device, case):
    options, message = copy.deepcopy(STUCK_OPTIONS[case])
    optimizer = optimizer_of(backend, device, torch.float32, **options)
    optimizer.stats()
    assert warnings_of(24, optimizer, float("nan")) == []
    with pytest.warns(UserWarning, match=f"{STUCK}{message}") as caught:
        for _ in range(36 if is_late(backend) else 1):
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert warnings_of(30, optimizer) == []


def test_the_warning_of_steps_that_are_skipped_for_ever_says_how_to_find_the_parameters(backend, device):
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    optimizer.stats()
    (message,) = warnings_of(60 if is_late(backend) else 25, optimizer, float("nan"))
    assert "optimizer.find_overflow(), called before zero_grad(), names the parameters" in message


def test_a_scale_that_still_falls_is_no_reason_to_warn(backend, device):
    rule = DynamicLossScale(init_scale=2.0**50, max_scale=2.0**50, min_scale=1.0)
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=rule)
    optimizer.stats()
    assert warnings_of(49, optimizer, float("inf")) == []


def test_a_step_that_is_applied_ends_the_count(backend, device):
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    optimizer.stats()
    for _ in range(3):
        assert warnings_of(24, optimizer, float("inf")) == []
        assert optimizer.stats().skipped_in_a_row == 24
        assert warnings_of(1, optimizer, 1.0) == []
        assert optimizer.stats().skipped_in_a_row == 0
    assert optimizer.stats().skipped_steps == 72


def test_a_step_waits_for_no_reading(backend, device, monkeypatch):
    if not is_late(backend):
        pytest.skip(f"backend {backend} knows the outcome of a step at once")
    monkeypatch.setattr(diagnostics.LateReading, "read", lambda self: None)
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    optimizer.stats()
    assert warnings_of(60, optimizer, float("nan")) == []


def test_nothing_is_read_while_a_graph_is_captured(backend, device, monkeypatch):
    if not is_late(backend):
        pytest.skip(f"backend {backend} knows the outcome of a step at once")
    made = []
    monkeypatch.setattr(diagnostics, "is_capturing", lambda device: True)
    monkeypatch.setattr(diagnostics, "LateReading", lambda block: made.append(block))
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    optimizer.stats()
    assert warnings_of(30, optimizer, float("nan")) == []
    assert made == []


class FakeEvent:
    """An event that happens when the test sets `has_happened`."""

    has_happened = False

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.has_happened


def test_a_reading_is_there_once_its_event_has_happened():
    optimizer = optimizer_of("reference", torch.device("cpu"), torch.float32, loss_scale=8.0)
    reading = diagnostics.LateReading(optimizer._step_state.block)
    reading._event = event = FakeEvent()
    assert reading.read() is None
    event.has_happened = True
    assert reading.read() == optimizer._step_state.read()


def test_a_state_dict_says_nothing_of_the_steps_skipped_in_a_row(backend, device):
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    before = snapshot(optimizer)
    warnings_of(3, optimizer, float("nan"))
    assert optimizer.stats().skipped_in_a_row == 3
    assert_unchanged(optimizer, before, but=["options", "counters", "grads"])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats().skipped_in_a_row == 0
    assert optimizer.stats().skipped_steps == 3


def test_the_count_of_steps_skipped_in_a_row_stays_within_its_type(backend, device):
    optimizer = optimizer_of(backend, device, torch.float32, loss_scale=8.0)
    optimizer._step_state.skipped_in_a_row.fill_(2**31 - 2)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full_like(param, torch.inf)
    optimizer.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.step()
            assert optimizer.stats().skipped_in_a_row == 2**31 - 1
    param.grad.fill_(1.0)
    optimizer.step()
    assert optimizer.stats().skipped_in_a_row == 0
