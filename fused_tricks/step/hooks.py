"""Step hooks that run once, even if several classes of an optimizer override `step`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.optim import Optimizer

_P = ParamSpec("_P")
_R = TypeVar("_R")


def runs_hooks(step: Callable[..., object], optimizer: object) -> bool:
    """True if `step` must run the hooks. False if the `step` of a subclass, which calls `super()`, runs them."""
    steps = (base.__dict__.get("step") for base in type(optimizer).__mro__)
    # functools.wraps copies the mark to a wrapper, so the mark counts only on the function that it names.
    return (
        next((outer for outer in steps if outer and getattr(outer, "runs_hooks_of", None) is outer), step)
        is step
    )


def with_hooks(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Returns a `step` that runs the hooks as `Optimizer.profile_hook_step` does, unless an outer `step` runs them.

    The hooks run once, around the outermost `step` of an optimizer's classes.
    """
    observed = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def hooked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return (observed if runs_hooks(hooked, args[0]) else func)(*args, **kwargs)

    hooked.runs_hooks_of = hooked  # type: ignore[attr-defined]
    return hooked
