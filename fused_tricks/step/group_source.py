"""The check of a new optimizer that is built from the groups of another optimizer.

Groups carry options. Groups do not carry the settings of the whole optimizer, such as `loss_scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from ..loss_scale import DynamicLossScale

_sources: WeakSet[Any] = WeakSet()


def register_source(optimizer: Optimizer) -> None:
    """Registers an optimizer for `check_nothing_is_lost`."""
    _sources.add(optimizer)


def check_nothing_is_lost(params: Any, settings: dict[str, Any]) -> Any:
    """Checks that a new optimizer does not lose the settings of the optimizer that its groups come from.

    Args:
        params: The `params` of the new optimizer.
        settings: The settings of the new optimizer that belong to no group, by name.

    Returns:
        `params`; an iterator is converted to a list.

    Raises:
        RuntimeError: `params` are groups of another optimizer that has such a setting, and the new optimizer has
            none.
    """
    if isinstance(params, Iterator):
        params = list(params)
    if not isinstance(params, list | tuple) or any(value is not None for value in settings.values()):
        return params
    # User code rarely writes all options into a group, so these two keys mark a group of another FusedSGD.
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
                f"params are the groups of another FusedSGD, which has {', '.join(lost)}; groups do not carry this "
                "setting, and the new optimizer would train without it. Pass the setting to the new optimizer as well; "
                "if a wrapper builds the optimizer from groups alone, as Horovod's does, set it in a subclass of "
                "FusedSGD whose __init__ takes params"
            )
    return params


def _shown(value: Any) -> str:
    return "'dynamic'" if type(value) is DynamicLossScale else repr(value)
