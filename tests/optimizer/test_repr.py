"""The text form of an optimizer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from fused_tricks import DynamicLossScale, FusedSGD
from support import backends
from support.comparison import parameters, set_gradients


@pytest.mark.parametrize("loss_scale", [None, 8.0, "dynamic"], ids=str)
def test_an_optimizer_shows_backend_loss_scale_and_clipping_before_its_groups(loss_scale):
    optimizer = FusedSGD(
        parameters([(2,)]), lr=0.1, loss_scale=loss_scale, max_grad_norm=2.5, backend="reference"
    )
    shown = repr(DynamicLossScale()) if loss_scale == "dynamic" else str(loss_scale)
    assert repr(optimizer).startswith(
        f"FusedSGD (\nbackend: reference\nloss_scale: {shown}\nmax_grad_norm: 2.5\nParameter Group 0\n"
    )
    assert repr(optimizer).endswith("    weight_decay: 0\n)")


def test_a_subclass_shows_its_own_name():
    class Mine(FusedSGD):
        pass

    assert repr(Mine(parameters([(2,)]), lr=0.1)).startswith("Mine (\nbackend: auto\n")


def test_showing_an_optimizer_does_not_count_as_use_of_its_scale():
    params = parameters([(2,)])
    optimizer = FusedSGD(params, lr=0.1, loss_scale=8.0, backend="reference")
    set_gradients(params, [torch.ones(2)])
    repr(optimizer)
    with pytest.warns(UserWarning, match="optimizer.scale"):
        optimizer.step()


def test_the_backend_is_the_one_asked_for_and_then_the_one_that_runs(backend, device):
    params = parameters([(2,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    assert optimizer.backend == backend
    set_gradients(params, [torch.ones(2)])
    optimizer.step()
    assert optimizer.backend == backend


def test_auto_becomes_the_backend_that_was_chosen_and_stays_it():
    if backends.unusable_because("cpu") is not None:
        pytest.skip(f"backend cpu: {backends.unusable_because('cpu')}")
    params = parameters([(2,)])
    optimizer = FusedSGD(params, lr=0.1)
    assert optimizer.backend == "auto"
    set_gradients(params, [torch.ones(2)])
    optimizer.step()
    assert optimizer.backend == "cpu"
    assert "backend: cpu\n" in repr(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": parameters([(3,)])})
    assert optimizer.backend == "cpu"
    assert deepcopy(optimizer).backend == "auto"
    with pytest.raises(AttributeError):
        optimizer.backend = "reference"
