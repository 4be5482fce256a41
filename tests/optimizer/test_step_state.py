"""The optimizer's numbers on the device, when the device changes."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from fused_tricks.distributed.found_inf_reduction import PARTIALS
from fused_tricks.extension import load_extension, missing_because
from fused_tricks.step.device_state import OFFSETS, StepState
from fused_tricks.step.options import FLAGS, NUMBERS
from fused_tricks.step.parameters import STATE_TENSORS


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


def test_the_extension_has_the_same_state_tensors_in_the_same_order() -> None:
    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    assert tuple(load_extension().STATE_TENSORS) == STATE_TENSORS


def test_the_extension_has_the_same_partials() -> None:
    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    assert tuple(load_extension().PARTIALS) == PARTIALS


def test_the_extension_has_the_same_options() -> None:
    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    assert {"lr", *load_extension().NUMBERS} == set(NUMBERS)
    assert set(load_extension().FLAGS) == set(FLAGS)
