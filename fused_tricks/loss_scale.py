"""Dynamic loss scaling, computed on the device."""

from __future__ import annotations

import math
import weakref
from copy import deepcopy
from operator import attrgetter
from typing import Any, NamedTuple

from .step.device_state import StepState, to_float32
from .validation import as_double, check_number, integer, shown

_INT32_MAX = 2**31 - 1
_SMALLEST_NORMAL = 2.0**-126


class ScaleRule(NamedTuple):
    """The numbers of the scale adjustment after a step. Each number is an argument of `DynamicLossScale`."""

    growth_factor: float
    backoff_factor: float
    min_scale: float
    max_scale: float
    growth_interval: int
    hysteresis: int


_rule_fields = attrgetter(*ScaleRule._fields)


class DynamicLossScale:
    """A dynamic loss scale: the rules of `torch.amp.GradScaler`, with a floor, a ceiling and Apex's hysteresis.

    - After a step with a gradient that is not finite, the scale is multiplied by `backoff_factor`.
    - After `growth_interval` good steps in a row, the scale is multiplied by `growth_factor`, if the product is finite.
    - Both results are clamped to `[min_scale, max_scale]`. Products are computed in FP64 and rounded to FP32.
    - A step without gradients counts as a good step.

    An instance belongs to one `FusedSGD`, which adjusts the scale in its step, on the device. The attributes with the
    names of the arguments may be assigned at any time, with the same checks. The growth tracker is compared with `>=`.
    If `growth_interval` is set below the tracker, the scale therefore grows in the next good step.

    Args:
        init_scale: The initial scale, in `[min_scale, max_scale]`.
        growth_factor: The factor of growth, greater than 1.
        backoff_factor: The factor of backoff, greater than 0 and less than 1.
        growth_interval: The number of good steps in a row before the scale grows, at least 1.
        hysteresis: The number of overflows before the scale backs off, at least 1. A good step resets the count.
            Without a good step, every further overflow backs off (as in Apex `update_scale_hysteresis`).
        min_scale: The floor, greater than 0.
        max_scale: The ceiling, at least `min_scale`.

    Raises:
        TypeError: An argument is not a number, or a count is not an integer.
        ValueError: An argument is outside its range.

    Example:
        ```python
        import torch
        import fused_tricks as ft

        model = torch.nn.Linear(4, 2)
        loss_scale = ft.DynamicLossScale(init_scale=2.0**14, growth_interval=1000)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1, loss_scale=loss_scale)
        ```
    """

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    min_scale: float
    max_scale: float

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
    ) -> None:
        rules = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
            "hysteresis": hysteresis,
            "min_scale": min_scale,
            "max_scale": max_scale,
        }
        rules = _checked_rules(rules)
        if not min_scale <= init_scale <= max_scale:
            raise ValueError(
                f"init_scale={init_scale} is outside [min_scale, max_scale] = [{min_scale}, {max_scale}]"
            )
        self.__dict__.update(rules)
        self._step_state = StepState(scale=init_scale, hysteresis=hysteresis)
        self._owner: weakref.ref[Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RULES:
            value = _checked_rules({rule: getattr(self, rule) for rule in _RULES} | {name: value})[name]
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}

    def __copy__(self) -> DynamicLossScale:
        # Two instances cannot share one step state, so a shallow copy is a deep copy.
        return deepcopy(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{rule}={getattr(self, rule)}' for rule in _RULES)})"

    def rule(self) -> ScaleRule:
        """Returns the numbers of the scale adjustment after a step."""
        return ScaleRule._make(_rule_fields(self))

    def is_free_for(self, owner: object) -> bool:
        """True unless the scale belongs to another optimizer that is still alive."""
        current = self._owner() if self._owner is not None else None
        return current is None or current is owner

    def bind(self, owner: object) -> StepState:
        """Binds the scale to the optimizer `owner`, and returns the step state that the optimizer updates.

        Raises:
            ValueError: The scale belongs to another optimizer that is still alive.
        """
        if not self.is_free_for(owner):
            raise ValueError(
                "loss_scale must belong to one optimizer, but this DynamicLossScale serves another optimizer; give "
                "each optimizer its own DynamicLossScale, because each step updates the scale"
            )
        self._owner = weakref.ref(owner)
        return self._step_state

    def get_scale(self) -> float:
        """Returns the loss scale of the next `scale(loss)`. Synchronises with the device."""
        self._step_state.scale_was_read = True
        return self._step_state.scale.item()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state with the keys of `torch.amp.GradScaler.state_dict()`, and four more keys. Synchronises.

        `torch.amp.GradScaler.load_state_dict()` can load the state.

        Returns:
            A dict with GradScaler's keys `scale`, `growth_factor`, `backoff_factor`, `growth_interval` and
            `_growth_tracker`, and with `hysteresis`, `min_scale`, `max_scale` and `_hysteresis_tracker`.
        """
        now = self._step_state.read()
        return {
            "scale": now.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": now.growth_tracker,
            "hysteresis": self.hysteresis,
            "min_scale": self.min_scale,
            "max_scale": self.max_scale,
            "_hysteresis_tracker": now.hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a `DynamicLossScale` or of a `torch.amp.GradScaler`.

        Rules that the state lacks keep their values. The scale is clamped to `[min_scale, max_scale]`.

        Args:
            state_dict: The result of `state_dict()` of either class.

        Raises:
            KeyError: A key of GradScaler is missing, as in the empty state of a disabled GradScaler. Nothing is
                changed then.
            TypeError, ValueError: A value has the wrong type or is outside its range. Nothing is changed then.
        """
        missing = [key for key in _GRAD_SCALER_KEYS if key not in state_dict]
        if missing:
            raise KeyError(f"state_dict has no {', '.join(missing)}; save it from an enabled GradScaler")
        rules = {rule: state_dict.get(rule, getattr(self, rule)) for rule in _RULES}
        rules = _checked_rules(rules)
        saved = (
            state_dict["scale"],
            state_dict["_growth_tracker"],
            state_dict.get("_hysteresis_tracker", rules["hysteresis"]),
        )
        _check_state(*saved)
        self.__dict__.update(rules)
        self.restore(*saved)

    def restore(self, scale: float, growth_tracker: int, hysteresis_tracker: int) -> None:
        """Sets the scale, clamped to `[min_scale, max_scale]`, and the trackers.

        Args:
            scale: The scale, positive.
            growth_tracker: The number of good steps since growth or an overflow last reset the tracker.
            hysteresis_tracker: The number of overflows left until the scale backs off.

        Raises:
            TypeError, ValueError: An argument has the wrong type or is outside its range. Nothing is changed then.
        """
        _check_state(scale, growth_tracker, hysteresis_tracker)
        self._step_state.scale.fill_(min(max(scale, self.min_scale), self.max_scale))
        self._step_state.growth_tracker.fill_(growth_tracker)
        self._step_state.hysteresis_tracker.fill_(hysteresis_tracker)


_RULES = tuple(DynamicLossScale.__annotations__)
_GRAD_SCALER_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def parse_loss_scale(loss_scale: Any) -> float | DynamicLossScale | None:
    """Returns the loss scaling for an argument `FusedSGD(loss_scale=...)`: None, a static scale, or a dynamic scale.

    Raises:
        TypeError: The argument is not None, a number, a string or a `DynamicLossScale`.
        ValueError: The argument is another string than `"dynamic"`, or a number outside the range of a scale.
    """
    if loss_scale is None or isinstance(loss_scale, DynamicLossScale):
        return loss_scale
    if isinstance(loss_scale, str):
        if loss_scale != "dynamic":
            raise ValueError(
                f"loss_scale={loss_scale!r} is unknown; use None, a number, 'dynamic' or DynamicLossScale"
            )
        return DynamicLossScale()
    check_scale("loss_scale", loss_scale)
    return float(loss_scale)


def check_scale(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless a scale is a positive normal number in FP32."""
    check_number(name, value)
    if not (value > 0 and _SMALLEST_NORMAL <= to_float32(as_double(value)) < math.inf):
        raise ValueError(
            f"{name} must be positive, finite and a normal number in FP32 (at least 2**-126), got {shown(value)}"
        )


def _check_state(scale: Any, growth_tracker: Any, hysteresis_tracker: Any) -> None:
    check_scale("scale", scale)
    integer("_growth_tracker", growth_tracker, 0, _INT32_MAX)
    integer("_hysteresis_tracker", hysteresis_tracker, 0, _INT32_MAX)


def _checked_rules(rules: dict[str, Any]) -> dict[str, Any]:
    """Checks the rules, and returns them with counts as `int`."""
    for name in ("init_scale", "min_scale", "max_scale"):
        check_scale(name, rules[name])
    for name in ("growth_factor", "backoff_factor"):
        check_number(name, rules[name])
    counts = {name: integer(name, rules[name], 1, _INT32_MAX) for name in ("growth_interval", "hysteresis")}
    growth_factor, backoff_factor = rules["growth_factor"], rules["backoff_factor"]
    if not 1 < as_double(growth_factor) < math.inf:
        raise ValueError(
            f"growth_factor must be greater than 1 and a finite double, got {shown(growth_factor)}"
        )
    if not 0 < as_double(backoff_factor) < 1:
        raise ValueError(
            f"backoff_factor must be greater than 0 and less than 1, got {shown(backoff_factor)}"
        )
    if rules["min_scale"] > rules["max_scale"]:
        raise ValueError(
            f"min_scale must be at most max_scale={shown(rules['max_scale'])}, got {shown(rules['min_scale'])}"
        )
    return rules | counts
