"""The scheduler class: warm-up and cosine annealing, with or without restarts, for any torch optimizer."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from functools import wraps
from numbers import Real
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._torch import disable_dynamo
from ..step.shared_memory import missing_bytes
from ..user_warning import warn_user
from ..validation import as_double, integer, shown
from .applied_steps import AppliedCount
from .call_count import CallCount
from .curve import WarmupCosine

_COUNTERS = {counter.name: counter for counter in (CallCount, AppliedCount)}
# Less than 2**63, so that the difference from any applied count fits in an INT64.
LAST_UPDATE = 2**62


class WarmupCosineLR(LRScheduler):
    """A learning rate schedule for any torch optimizer: linear warm-up, then a cosine, once or with restarts.

    The learning rate of update `t` is the initial rate of the group times `factor(t)`. The first update is 0.

        t < warmup_steps    warmup_start + (1 - warmup_start) * (t + 1) / warmup_steps
        then                min_ratio + (1 - min_ratio) * (1 + cos(π u)) / 2
                            u = (t - warmup_steps) / (total_steps - warmup_steps)
        t >= total_steps    min_ratio

    With `T_0`, cycles of `T_0`, `T_0 * T_mult`, `T_0 * T_mult**2`, … updates follow the warm-up. Each length is
    rounded once from the exact value, to the nearest integer, and to even in a tie. Cycle `c` falls from
    `peak_decay**c` to `min_ratio` along the cosine above, while `u` goes from 0 to 1. Cycle 0 is the first. No peak
    is below `min_ratio`.

    The constructor sets the rates of the first update. Call `step` after each `optimizer.step()`.

    The initial rate of a group is `group["initial_lr"]`, as in torch's schedulers. A rate depends only on `t` and on
    the initial rate:

    - The ratio between the rates of two groups stays constant. A tensor `lr` is written in place.
    - A group added by `optimizer.add_param_group` is scheduled at once, from the rate of the new group. A group that
      user code puts into `param_groups` directly is scheduled from the next `step`.
    - A resumed run may build and load the optimizer and the schedule in any order: each load sets the rates for the
      position of the schedule. Initial rates that an optimizer has from a checkpoint or from an earlier schedule stay.
      Set `group["initial_lr"]` or `base_lrs` to start from other rates.
    - A first `step` before any `optimizer.step()` causes a warning, as with torch's schedulers. Exceptions are
      `count="applied"`, and optimizers whose call a `GradScaler` omits if gradients overflow.
    - In torch's `SequentialLR`, the schedule must be the last one. Once begun, the schedule sets the rates whenever the
      optimizer is loaded or a group is added.
    - In torch's `ChainedScheduler`, the schedule overwrites the rates of the schedulers listed before it. A scheduler
      listed after it multiplies a rate that each `step` writes anew. Multiply `base_lrs` instead.

    With `count="applied"`, `t` is the number of updates that a `FusedSGD` has applied since the schedule was built.
    Skipped steps leave `t` unchanged. The count and a table of the factors are on the optimizer's device, and the
    update reads its factor there. So neither `optimizer.step()` nor `step()` synchronises, and replays of a captured
    CUDA graph follow the schedule. Differences from `count="calls"`:

    - `group["lr"]` is a zero-dimensional FP64 tensor for user code to read. Each `step` refreshes it with the rate of
      the next update. The optimizer's state dict has this rate as a number.
    - The applied count is in the optimizer's state dict. A resumed run loads the optimizer and the schedule, in any
      order.
    - Assign a number to `group["lr"]` to set a rate by hand until the next `step`. A write into the tensor, as from
      torch's other schedulers, changes only the value that user code reads.
    - `last_epoch`, `get_lr`, `get_last_lr`, `state_dict`, `step(epoch)` and the constructor synchronise.
    - The schedule cannot be used in `SequentialLR`.

    Args:
        optimizer: The optimizer whose learning rates are set; a `FusedSGD` for `count="applied"`.
        total_steps: The number of updates, including the warm-up, at least 1. None means restarts without end, and
            requires `T_0`. If `total_steps` cuts the last cycle short, the cosine of the cycle keeps its full length.
        warmup_steps: The number of updates in the warm-up. Update `warmup_steps - 1` and the first update of the
            cosine both have the full rate.
        warmup_start: The factor at which the warm-up starts, in [0, 1]. Update 0 is already `1 / warmup_steps` of the
            way from `warmup_start` to 1.
        min_ratio: The floor, as a factor, in [0, 1].
        T_0: The number of updates in the first cosine. None means one cosine without restarts.
        T_mult: The ratio of the length of each cosine to that of the previous one: a real number, at least 1.
        peak_decay: The ratio of each peak to the previous one, in [0, 1].
        warmup_every_cycle: True if each later cycle also begins with a warm-up of `warmup_steps` updates, in addition
            to its cosine. The warm-up rises from `warmup_start`, or from the peak if the peak is lower, to the peak.
        count: The events that `t` counts: `"calls"` of `step`, or updates `"applied"` by a `FusedSGD`. `"applied"`
            requires `total_steps`.
        last_epoch: The number of the last update made, as in torch's schedulers. The next update is `last_epoch + 1`;
            -1 begins with update 0. Unlike in torch's schedulers, the initial rate of a group without `"initial_lr"` is
            its present rate.

    Attributes:
        curve: The `WarmupCosine`. `curve.factor(t)` is the factor of update `t`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range or conflicts with another argument, or an `initial_lr`
            is not finite.
        RuntimeError: The storage of a group's tensor `lr` was resized.

    Warns:
        UserWarning: `warmup_steps` equals `total_steps`, so no cosine follows the warm-up. Or, once, `step`
            moves `t` above `total_steps`; one call after each of `total_steps` updates does not. With
            `count="applied"`, the second warning requires a count in the host's memory.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), sections 3.1 (warm-up) and 5.1
    (cosine); restarts from "SGDR" (arXiv 1608.03983).

    Example:
        ```python
        import fused_tricks as ft
        import torch

        optimizer = ft.FusedSGD([torch.nn.Parameter(torch.zeros(3))], lr=0.4, momentum=0.9)
        schedule = ft.WarmupCosineLR(optimizer, total_steps=100, warmup_steps=4)
        rates = []
        for _ in range(100):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:4] == [0.1, 0.2, 0.30000000000000004, 0.4]
        ```
    """

    _is_beyond_end = False

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None,
        warmup_steps: int = 0,
        *,
        warmup_start: float = 0.0,
        min_ratio: float = 0.0,
        T_0: int | None = None,
        T_mult: float = 1.0,
        peak_decay: float = 1.0,
        warmup_every_cycle: bool = False,
        count: str = "calls",
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.curve = WarmupCosine(
            total_steps, warmup_steps, warmup_start, min_ratio, T_0, T_mult, peak_decay, warmup_every_cycle
        )
        if count not in _COUNTERS:
            raise ValueError(f"count must be 'calls' or 'applied', got {count!r}")
        _check_initial_rates(optimizer.param_groups)
        _check_rates_have_memory(optimizer.param_groups)
        first = integer("last_epoch", last_epoch, least=-1, most=LAST_UPDATE - 1) + 1
        self._counter: CallCount | AppliedCount = _COUNTERS[count](optimizer, self.curve)
        if self.curve.warmup_steps == self.curve.total_steps:
            warn_user(
                f"warmup_steps equals total_steps={self.curve.total_steps}, so no cosine follows the warm-up; "
                "total_steps must include the updates of the warm-up and of the cosine"
            )
        _separate_default_rate(optimizer)
        super().__init__(optimizer)
        if first > 0:
            self._counter.go_to(first)
            self._counter.expect_load(first)
            self._write_rates()
        self._watch_groups()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={shown(value)}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    @property
    def last_epoch(self) -> int:
        """The number of the next update, `t`. The name is torch's."""
        return self._counter.t

    @last_epoch.setter
    def last_epoch(self, t: int) -> None:
        # The assignment in the base class's constructor comes before `_step_count` exists, and has no effect here.
        if hasattr(self, "_step_count"):
            self._counter.assign(t)

    @property
    def base_lrs(self) -> list[float | Tensor]:
        """The initial rate of each group. Assigned rates take effect at the next `step`."""
        return [_initial_rate(group) for group in self.optimizer.param_groups]

    @base_lrs.setter
    def base_lrs(self, rates: list[float | Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rate of each group at `last_epoch`, in the type of the group's initial rate."""
        factor = self.curve.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    # torch.compile would guard on the number of calls, and recompile at each call.
    @disable_dynamo
    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rates of the next update.

        Args:
            epoch: The number of the update to go to. None means the update after the present one.

        Raises:
            TypeError: `epoch` is not an integer.
            ValueError: `epoch` is negative or above `2**62`.
            RuntimeError: The storage of a group's tensor `lr` was resized. The schedule stays unchanged.

        Warns:
            UserWarning: The number of the next update is above `total_steps`, or `optimizer.step()` has not been
                called; each warned once.
        """
        if epoch is None:
            self._warn_if_first()
        self._update_lr(epoch)
        self._step_count += 1
        total = self.curve.total_steps
        if total is not None and not self._is_beyond_end and self._counter.known_t > total:
            self._is_beyond_end = True
            warn_user(
                f"the schedule was stepped beyond total_steps={total}: further updates use the floor, "
                f"min_ratio={self.curve.min_ratio}; pass the number of all updates, with the warm-up, as total_steps"
            )

    def _warn_if_first(self) -> None:
        """Warns at the first call if the optimizer has not stepped. With `count="applied"` the order has no effect."""
        if self._step_count != 1 or not isinstance(self._counter, CallCount):
            return
        # A GradScaler calls the step of such an optimizer after an overflow too.
        always_steps = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        is_watched = hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        # torch's wrapper does not see a step that was compiled or saved earlier. The state shows such a step.
        has_stepped = getattr(self.optimizer, "_opt_called", False) or bool(self.optimizer.state)
        if always_steps and is_watched and not has_stepped:
            warn_user(
                "schedule.step() was called before the first optimizer.step(), so no update has the first rate of the "
                "schedule; call schedule.step() after optimizer.step()"
            )

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the learning rates set by the last `step`, or those of the next update with `count="applied"`."""
        return super().get_last_lr() if self._counter.sets_last_rates else self.get_lr()

    # torch's SequentialLR calls this method to begin a schedule.
    def _update_lr(self, epoch: int | None = None) -> None:
        _check_rates_have_memory(self.optimizer.param_groups)
        if epoch is None:
            self._counter.advance()
        else:
            self._counter.go_to(integer("epoch", epoch, least=0, most=LAST_UPDATE))
        self._write_rates()

    def _write_rates(self) -> None:
        if self._counter.write_rates(self.base_lrs):
            self._last_lr = self._current_rates()

    def _current_rates(self) -> list[float | Tensor]:
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def _watch_groups(self) -> None:
        """Makes the optimizer set the rates whenever a group is added or a state dict is loaded."""
        optimizer = self.optimizer
        # Weak references: the optimizer holds these functions, and a cycle would delay the release of tensors.
        optimizer_ref, schedule_ref = ref(optimizer), ref(self)
        add = type(optimizer).add_param_group
        wrapped = vars(optimizer).get("add_param_group")

        @wraps(add)
        def add_param_group(param_group: dict[str, Any]) -> None:
            optimizer, schedule = optimizer_ref(), schedule_ref()
            assert optimizer is not None
            if wrapped is None:
                add(optimizer, param_group)
            else:
                wrapped(param_group)
            if schedule is not None:
                schedule._enter(optimizer.param_groups[-1])

        def after_load(optimizer: Optimizer) -> None:
            schedule = schedule_ref()
            if schedule is not None:
                schedule._counter.after_load()
                schedule._write_rates()

        # torch has no hook for `add_param_group`. The base class replaces `step` in the same way.
        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
        optimizer.register_load_state_dict_post_hook(after_load)

    def _enter(self, group: dict[str, Any]) -> None:
        _separate_default_rate(self.optimizer)
        _separate_late_rate(group, self.optimizer.param_groups)
        if self._counter.enter(group, _initial_rate(group)):
            self._last_lr = self._current_rates()

    def state_dict(self) -> dict[str, Any]:
        """Returns `last_epoch` and the arguments, in types that JSON can hold.

        With `count="applied"`, the dict also has `origin`: the number of updates that the optimizer applied before
        update 0. The initial rates are in the optimizer's state dict.
        """
        return {"last_epoch": self.last_epoch, **self._arguments(), **self._counter.saved()}

    def _arguments(self) -> dict[str, Any]:
        return {**asdict(self.curve), "count": self._counter.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position of a schedule and sets the learning rates. Keeps the arguments of this schedule.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            KeyError: `state_dict` has no `last_epoch`.
            TypeError: `last_epoch` or `origin` is not an integer.
            ValueError: `last_epoch` is outside `[-1, 2**62]`, or `origin` is outside `[-2**62, 2**62]`.
            RuntimeError: The storage of a group's tensor `lr` was resized. After any error, the schedule is unchanged.

        Warns:
            UserWarning: `state_dict` comes from a schedule with other arguments.
        """
        if "last_epoch" not in state_dict:
            raise KeyError(
                "state_dict has no 'last_epoch'; pass a dict that the state_dict() of a schedule returned"
            )
        last_epoch = integer("last_epoch", state_dict["last_epoch"], least=-1, most=LAST_UPDATE)
        origin = None
        if "origin" in state_dict:
            origin = integer("origin", state_dict["origin"], least=-LAST_UPDATE, most=LAST_UPDATE)
        _check_rates_have_memory(self.optimizer.param_groups)
        different = [
            f"{name} was {state_dict[name]!r} and is {value!r}"
            for name, value in self._arguments().items()
            if name in state_dict and state_dict[name] != value
        ]
        if different:
            warnings.warn(
                "state_dict comes from a schedule with other arguments: "
                + ", ".join(different)
                + "; this schedule keeps its own arguments",
                UserWarning,
                stacklevel=2,
            )
        self._counter.restore(last_epoch, origin)
        self._step_count = last_epoch + 1
        self._write_rates()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A copy or a pickle of the optimizer has neither the wrapper nor the hook.
        self._watch_groups()


def _check_rates_have_memory(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        if isinstance(group["lr"], Tensor) and missing_bytes(group["lr"]):
            raise RuntimeError(
                f"the lr of group {index} has no memory: its storage was resized; assign another lr"
            )


def _check_initial_rates(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        rate = group.get("initial_lr", 0.0)
        if isinstance(rate, Real) and not math.isfinite(as_double(rate)):
            raise ValueError(
                f"initial_lr of group {index} must be a finite double, got {shown(rate)}; assign another initial_lr"
            )


def _initial_rate(group: dict[str, Any]) -> float | Tensor:
    if "initial_lr" not in group:
        group["initial_lr"] = _copy(group["lr"])
    rate: float | Tensor = group["initial_lr"]
    return rate


def _separate_default_rate(optimizer: Optimizer) -> None:
    """Clones a tensor default `lr`, which torch shares with every group: writes to groups must not change it."""
    if isinstance(optimizer.defaults.get("lr"), Tensor):
        optimizer.defaults["lr"] = optimizer.defaults["lr"].clone()


def _separate_late_rate(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Clones the tensor `lr` of an added group if a scheduled group shares it, and copies the initial rate."""
    for other in groups:
        if other is not group and isinstance(group["lr"], Tensor) and other["lr"] is group["lr"]:
            group["lr"] = group["lr"].clone()
            group["initial_lr"] = _copy(other["initial_lr"])
            return


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate
