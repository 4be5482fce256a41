"""Optimizers that are made from the groups of another one, which carry its options but not its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from ..loss_scale import DynamicLossScale

_sources: WeakSet[Any] = WeakSet()


def register_source(optimizer: Optimizer) -> None:
    """Has `check_nothing_is_lost` know the optimizer's groups."""
    _sources.add(optimizer)


def check_nothing_is_lost(params: Any, settings: dict[str, Any]) -> Any:
    """Checks that a new optimizer does not train without what the optimizer has that its groups come from.

    Args:
        params: The `params` of the new optimizer.
        settings: Its settings that belong to no group, by name.

    Returns:
        The `params`; a list of them in place of an iterator.

    Raises:
        RuntimeError: They are groups of another optimizer that has such a setting, and the new one has none.
    """
    if isinstance(params, Iterator):
        params = list(params)
    if not isinstance(params, list | tuple) or any(value is not None for value in settings.values()):
        return params
    # No one writes all options into a group by hand.
    groups = [
        group for group in params if isinstance(group, dict) and {"bias_decay", "differentiable"} <= {*group}
    ]
    given = {id(param) for group in groups for param in group["params"]}
    for source in _sources if given else ():
        own = {
            "loss_scale": source._loss_scale,
            "max_grad_norm": source._max_grad_norm,
            "partition_group": source._partition.group,
        }
        lost = [f"{name}={_shown(value)}" for name, value in own.items() if value is not None]
        if lost and any(id(param) in given for group in source.param_groups for param in group["params"]):
            raise RuntimeError(
                f"params are the groups of another FusedSGD, which has {', '.join(lost)}; groups do not carry that, "
                "and this optimizer would train without it. Pass it as well; where a wrapper makes the optimizer from "
                "groups alone, as Horovod's does, set it in a subclass of FusedSGD whose __init__ takes params"
            )
    return params


def _shown(value: Any) -> str:
    return "'dynamic'" if type(value) is DynamicLossScale else repr(value)
