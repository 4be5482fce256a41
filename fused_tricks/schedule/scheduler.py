"""The learning-rate scheduler: warm-up and cosine annealing, with or without restarts, for any torch optimizer."""

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
from ..step.diagnostics import warn_user
from ..step.shared_memory import missing_bytes
from ..validation import as_double, integer, shown
from .applied_steps import AppliedCount
from .call_count import CallCount
from .curve import WarmupCosine

_COUNTERS = {counter.name: counter for counter in (CallCount, AppliedCount)}
# The difference of two counts up to here fits INT64.
LAST_UPDATE = 2**62


class WarmupCosineLR(LRScheduler):
    """A learning-rate schedule: linear warm-up, then a cosine down to a floor, once or with restarts.

    The schedule works with any torch optimizer. The learning rate of update `t` (0 for the first) is the group's
    initial rate times `factor(t)`:

        t < warmup_steps    warmup_start + (1 - warmup_start) * (t + 1) / warmup_steps
        then                min_ratio + (1 - min_ratio) * (1 + cos(π u)) / 2
                            u = (t - warmup_steps) / (total_steps - warmup_steps)
        t >= total_steps    min_ratio, from then on

    With `T_0`, cycles of `T_0`, `T_0 * T_mult`, `T_0 * T_mult**2`, … updates follow the warm-up. Each length is the
    exact value rounded once, to the nearest integer, ties to even. Cycle `c` (0 for the first) falls from
    `peak_decay**c` to `min_ratio` as the cosine above, with `u` from 0 to 1 over the cycle. A peak below `min_ratio`
    becomes `min_ratio`.

    Call `step` after each `optimizer.step()`. The schedule is a closed form of `t` and of the initial rates, which the
    groups contain as `"initial_lr"`, as with all torch schedulers:

    - Groups keep the ratio of their rates. A tensor `lr` is written in place.
    - A group from `optimizer.add_param_group` is scheduled at once, from its own rate. A group that enters
      `param_groups` in another way is scheduled from the next `step`.
    - Optimizer and schedule of a resumed run may be built and loaded in any order. Each load sets the rates of the
      schedule's update. An optimizer that was loaded before, or that had another schedule, has initial rates already;
      set `group["initial_lr"]` or `base_lrs` to replace them.
    - `step` does not warn if `optimizer.step()` was not called before. torch's schedulers warn without reason under a
      `GradScaler`, which leaves out steps with an overflow.
    - In torch's `SequentialLR` the schedule can only be the last one, because it sets the rates from its first step on.
    - In torch's `ChainedScheduler` it overwrites the rates of schedulers before it, and schedulers after it multiply
      rates that it writes in each step. Multiply `base_lrs` instead.

    With `count="applied"`, `t` is the number of updates that a `FusedSGD` has applied since the schedule was built, so
    skipped steps do not move the schedule. The device of the parameters counts the updates and has the factors in a
    table, which the update kernel reads. No step synchronises, and a captured CUDA graph follows its schedule in
    replays. In this mode:

    - `group["lr"]` is a 0-dim FP64 tensor to read: the rate of the next update, as of the last `step`. A checkpoint of
      the optimizer contains the number.
    - The count is in the optimizer's state. A resumed run loads both, in any order.
    - To set a rate by hand until the next `step`, assign a number to `group["lr"]`. A write into the tensor, as by
      torch's other schedulers, does not change the rate of the update.
    - `last_epoch`, `get_lr`, `get_last_lr` and `state_dict` synchronise.
    - The schedule cannot be used in `SequentialLR`.

    Args:
        optimizer: The optimizer whose learning rates are set, starting with the rate of update 0.
        total_steps: The number of updates, warm-up included. None, only with `T_0`, restarts without end. A cycle that
            `total_steps` cuts short keeps its shape.
        warmup_steps: The number of updates of the warm-up. Update `warmup_steps - 1` has the full rate, and so has the
            first update of the cosine.
        warmup_start: The factor below the first update, in [0, 1]. The first update is `1 / warmup_steps` of the way
            to the full rate.
        min_ratio: The floor, as a factor in [0, 1].
        T_0: The number of updates in the first cosine. None is one cosine without restarts.
        T_mult: The ratio of each cosine's length to the length before, a real number of at least 1.
        peak_decay: The ratio of each peak to the peak before, in [0, 1].
        warmup_every_cycle: True for a warm-up before each later cosine as well: `warmup_steps` more updates from
            `warmup_start` (or from the peak, if the peak is lower) to the peak.
        count: The unit of `t`: `"calls"` of `step`, or updates `"applied"` by a `FusedSGD`, which requires
            `total_steps`.
        last_epoch: The number of the last update, as in torch's schedulers; the next update is `last_epoch + 1`. -1
            starts with update 0. Groups without `"initial_lr"` use their present rate; torch's schedulers raise if
            `last_epoch` is not -1.

    Attributes:
        curve: The `WarmupCosine`, whose `factor(t)` is the schedule.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, or contradicts another argument.

    Warns:
        UserWarning: `warmup_steps` equals `total_steps`, so that no cosine follows the warm-up; or, once, `step` goes
            beyond update `total_steps`. With `count="applied"` the second warning requires a count on the CPU.

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
                "total_steps includes the warm-up"
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
        """The number of the next update. The name is torch's."""
        return self._counter.t

    @last_epoch.setter
    def last_epoch(self, t: int) -> None:
        # The base class assigns -1 before it counts steps.
        if hasattr(self, "_step_count"):
            self._counter.assign(t)

    @property
    def base_lrs(self) -> list[float | Tensor]:
        """The initial rate of each group. Assigned rates apply from the next `step`."""
        return [_initial_rate(group) for group in self.optimizer.param_groups]

    @base_lrs.setter
    def base_lrs(self, rates: list[float | Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rate of each group at `last_epoch`, in the type of the group's initial rate."""
        factor = self.curve.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    # torch.compile would guard the number of calls, and compile anew in each step.
    @disable_dynamo
    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rates of the next update.

        Args:
            epoch: The number of the next update; None goes on by one.

        Raises:
            TypeError, ValueError: `epoch` is not an integer, or is outside [0, 2**62].

        Warns:
            UserWarning: The next update is beyond `total_steps`; once.
        """
        self._update_lr(epoch)
        self._step_count += 1
        total = self.curve.total_steps
        if total is not None and not self._is_beyond_end and self._counter.known_t > total:
            self._is_beyond_end = True
            warn_user(
                f"the schedule was stepped beyond total_steps={total}: later updates have the factor "
                f"min_ratio={self.curve.min_ratio}; total_steps must include all updates, also those of the warm-up"
            )

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the learning rates of the last `step`; with `count="applied"`, the rates of the next update."""
        return super().get_last_lr() if self._counter.sets_last_rates else self.get_lr()

    # torch's SequentialLR calls this method.
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
        """Sets the rates of groups that are added or loaded between two calls of `step`, which torch does not."""
        optimizer = self.optimizer
        # The optimizer holds these functions; strong references would be a cycle that keeps tensors alive.
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

        # torch has no hook for new groups. The base class replaces `step` in the same way.
        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
        optimizer.register_load_state_dict_post_hook(after_load)

    def _enter(self, group: dict[str, Any]) -> None:
        _separate_default_rate(self.optimizer)
        _separate_late_rate(group, self.optimizer.param_groups)
        if self._counter.enter(group, _initial_rate(group)):
            self._last_lr = self._current_rates()

    def state_dict(self) -> dict[str, Any]:
        """Returns `last_epoch` and the arguments, as JSON can represent them.

        The initial rates are in the optimizer's state. With `count="applied"` the state has `origin` as well: the
        number of updates that the optimizer had applied before update 0.
        """
        return {"last_epoch": self.last_epoch, **self._arguments(), **self._counter.saved()}

    def _arguments(self) -> dict[str, Any]:
        return {**asdict(self.curve), "count": self._counter.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the update of a saved state, and sets its learning rates. The arguments do not change.

        Args:
            state_dict: The result of `state_dict`.

        Warns:
            UserWarning: The state is from a schedule with other arguments.

        Raises:
            KeyError, TypeError, ValueError: `last_epoch` is missing, or `last_epoch` or `origin` is not an integer in
                its range. Nothing is changed then.
        """
        if "last_epoch" not in state_dict:
            raise KeyError("state_dict has no 'last_epoch'; pass the result of a schedule's state_dict()")
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
                "the loaded state is from a schedule with other arguments: "
                + ", ".join(different)
                + "; this schedule keeps its own",
                UserWarning,
                stacklevel=2,
            )
        self._counter.restore(last_epoch, origin)
        self._step_count = last_epoch + 1
        self._write_rates()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # The optimizer of a copy has lost the functions that watch its groups.
        self._watch_groups()


def _check_rates_have_memory(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        if isinstance(group["lr"], Tensor) and missing_bytes(group["lr"]):
            raise RuntimeError(
                f"the lr of group {index} has no memory, because its storage was resized; set another lr"
            )


def _check_initial_rates(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        rate = group.get("initial_lr", 0.0)
        if isinstance(rate, Real) and not math.isfinite(as_double(rate)):
            raise ValueError(f"group {index} has initial_lr={shown(rate)}, which is not a finite double")


def _initial_rate(group: dict[str, Any]) -> float | Tensor:
    if "initial_lr" not in group:
        group["initial_lr"] = _copy(group["lr"])
    rate: float | Tensor = group["initial_lr"]
    return rate


def _separate_default_rate(optimizer: Optimizer) -> None:
    """Copies a default `lr` tensor, which torch passes to all groups, so that writes to groups do not change it."""
    if isinstance(optimizer.defaults.get("lr"), Tensor):
        optimizer.defaults["lr"] = optimizer.defaults["lr"].clone()


def _separate_late_rate(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Copies the `lr` of a late group that shares the tensor with a group already scheduled."""
    for other in groups:
        if other is not group and isinstance(group["lr"], Tensor) and other["lr"] is group["lr"]:
            group["lr"] = group["lr"].clone()
            group["initial_lr"] = _copy(other["initial_lr"])
            return


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate
