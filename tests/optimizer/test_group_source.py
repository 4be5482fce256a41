"""An optimizer made from the groups of another one, as wrappers make them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from support.comparison import parameters


def wrapped(optimizer: torch.optim.Optimizer) -> Any:
    """Returns an optimizer of a subclass, made from the groups alone, as Horovod's `DistributedOptimizer`."""

    def __init__(self: Any, params: Any) -> None:
        super(self.__class__, self).__init__(params)

    kind = type(optimizer)
    return type(kind.__name__, (kind,), {"__init__": __init__})(optimizer.param_groups)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"loss_scale": "dynamic"}, "loss_scale='dynamic'"),
        ({"loss_scale": 8.0, "max_grad_norm": 1.0}, "loss_scale=8.0, max_grad_norm=1.0"),
        ({"max_grad_norm": torch.inf}, "which has max_grad_norm=inf;"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        wrapped,
        lambda optimizer: FusedSGD(optimizer.param_groups),
        lambda optimizer: FusedSGD(iter(optimizer.param_groups)),
        lambda optimizer: FusedSGD([dict(group) for group in optimizer.param_groups], lr=0.5),
        lambda optimizer: wrapped(copy.copy(optimizer)),
    ],
    ids=["wrapped", "again", "iterator", "copied groups", "copied optimizer"],
)
def test_losing_a_setting_is_refused_by_its_name(make, settings, named):
    optimizer = FusedSGD(parameters([(2, 2), (3,)]), lr=0.1, **settings)
    with pytest.raises(
        RuntimeError, match="groups of another FusedSGD, which has .*subclass of FusedSGD"
    ) as refused:
        make(optimizer)
    assert named in str(refused.value)
    assert not any("params" not in group for group in optimizer.param_groups)


def test_without_such_a_setting_nothing_is_refused():
    optimizer = FusedSGD(parameters([(2, 2)]), lr=0.1, momentum=0.9)
    assert wrapped(optimizer).param_groups[0]["momentum"] == 0.9


def test_settings_that_are_passed_as_well_are_taken():
    optimizer = FusedSGD(parameters([(2, 2)]), lr=0.1, loss_scale="dynamic", max_grad_norm=1.0)
    assert FusedSGD(optimizer.param_groups, loss_scale=2.0).loss_scale == 2.0


def test_a_subclass_that_sets_them_can_be_wrapped():
    class Scaled(FusedSGD):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, loss_scale="dynamic", **options)

    optimizer = wrapped(Scaled(parameters([(2, 2)]), lr=0.1))
    assert isinstance(optimizer.loss_scale, DynamicLossScale)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_groups_written_by_hand_for_the_same_parameters_are_taken():
    params = [Parameter(torch.ones(2, 2))]
    optimizer = FusedSGD(params, lr=0.1, loss_scale="dynamic")
    again = FusedSGD([{"params": params, "lr": 0.2, "bias_decay": True}])
    assert (optimizer.param_groups[0]["lr"], again.param_groups[0]["lr"]) == (0.1, 0.2)
