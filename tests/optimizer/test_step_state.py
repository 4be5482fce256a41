"""The optimizer's numbers on the device, when the device changes."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch.nn import Parameter

from fused_tricks.backends.request import StepRequest
from fused_tricks.extension import load_extension, missing_because
from fused_tricks.loss_scale import ScaleRule
from fused_tricks.plan import build_plan
from fused_tricks.step_state import OFFSETS, StepState


def test_what_is_known_of_first_updates_survives_a_move() -> None:
    state = StepState()
    buffer = torch.zeros(3)
    state.first_steps[buffer] = torch.tensor(-1)
    state.move_to(torch.device("meta"))
    assert state.block.device.type == "meta"
    assert state.first_steps[buffer].item() == -1


def test_a_buffer_that_follows_its_parameter_to_a_device_takes_the_number_of_its_first_update_along() -> None:
    state = StepState()
    buffer = torch.zeros(3)
    state.first_steps[buffer] = torch.tensor(-1)
    param = Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    groups = [{"params": [param], "lr": 0.1, "momentum": 0.9}]
    (entry,) = build_plan(groups, {param: {"momentum_buffer": buffer}}, state).entries
    assert entry.buffer is not None and entry.buffer.device.type == "meta"
    assert state.first_steps[entry.buffer].device.type == "meta"


def test_a_copy_of_the_state_keeps_nothing_of_the_graphs_that_use_the_first() -> None:
    state = StepState()
    kept = torch.zeros(3)
    state.keep(kept)
    twin = copy.deepcopy(state)
    alive = weakref.ref(kept)
    del kept
    assert alive() is not None
    del state
    assert alive() is None
    assert twin.scale.item() == 1.0


def test_the_layout_is_that_of_the_kernels() -> None:
    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    assert load_extension().step_state_offsets() == OFFSETS


def test_the_extension_reads_the_request_by_its_own_order():
    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    extension = load_extension()
    assert tuple(extension.REQUEST_FIELDS) == StepRequest._fields
    assert tuple(extension.SCALE_RULE_FIELDS) == ScaleRule._fields
