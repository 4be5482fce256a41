"""The schedule: warm-up and cosine annealing, with or without restarts, for any torch optimizer."""

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

# So that an INT64 holds its difference to any number of updates made.
_COUNTERS = {counter.name: counter for counter in (CallCount, AppliedCount)}
LAST_UPDATE = 2**62


class WarmupCosineLR(LRScheduler):
    """Linear warm-up, then a cosine down to a floor; or cosines that restart. Works with any torch optimizer.

    The learning rate of update `t` (0 for the first) is the group's own initial rate times `factor(t)`:

        t < warmup_steps    warmup_start + (1 - warmup_start) * (t + 1) / warmup_steps
        then                min_ratio + (1 - min_ratio) * (1 + cos(π u)) / 2
                            u = (t - warmup_steps) / (total_steps - warmup_steps)
        t >= total_steps    min_ratio, for ever

    With `T_0` there are cycles, of `T_0`, `T_0 * T_mult`, `T_0 * T_mult**2`, … updates after the warm-up. Each
    length is rounded once, to the nearest integer and to even in a tie, from the exact value. Cycle `c` (0 for
    the first) goes from `peak_decay**c` to `min_ratio` as the cosine above, with `u` running from 0 to 1 over the
    cycle. A peak that would be below `min_ratio` is `min_ratio`.

    Call `step` after each `optimizer.step()`:

        schedule = WarmupCosineLR(optimizer, total_steps=epochs * len(loader), warmup_steps=5 * len(loader))

    The schedule is a closed form of `t` and the groups' initial rates, which are kept in the groups as
    `"initial_lr"`, as all torch schedulers do:

    - A group keeps its ratio to the others. A tensor `lr` is written in place.
    - A group added by `optimizer.add_param_group` is scheduled at once, from the rate it comes with. One that gets
      into `param_groups` in another way is scheduled from the next `step`.
    - A resumed run may build and load optimizer and schedule in any order: each load sets the rates of the update
      that the schedule is at. An optimizer that was loaded before the schedule is built, or had another one before,
      brings its initial rates with it. To start from others, set `group["initial_lr"]` or `base_lrs`.
    - `step` does not warn when `optimizer.step()` was not called before. Under a `GradScaler`, which leaves
      out steps that overflow, torch's schedulers warn without cause.
    - In torch's `SequentialLR` it can only be the last: it takes the rates as its own whenever it has begun.
    - In torch's `ChainedScheduler` it overwrites the rates of the schedulers listed before it, and those listed after
      it multiply rates that it writes anew in each step. Multiply `base_lrs` instead.

    With `count="applied"` `t` is the number of updates that a `FusedSGD` has applied since the
    schedule was built, so that steps which overflow do not move it. They are counted where the parameters live; the
    factors lie there in a table, from which the update takes the one that is due. So nothing synchronises, and a
    captured CUDA graph follows the schedule as it is replayed. Then:

    - `group["lr"]` is an FP64 tensor of no dimension for others to read: the rate of the next update, as of the last
      `step`. A checkpoint of the optimizer has the number.
    - The count is in the optimizer's state: a resumed run loads both, in any order.
    - To set a rate by hand until the next `step`, assign a number to `group["lr"]`. Writing into the tensor, as
      torch's other schedulers do, changes only what it reads.
    - `last_epoch`, `get_lr`, `get_last_lr` and `state_dict` synchronise.
    - It cannot be used in `SequentialLR`.

    Args:
        optimizer: The optimizer whose learning rates are set, beginning with the one of update 0.
        total_steps: Updates in all, with the warm-up. None, only with `T_0`: restarts without end. A cycle that
            `total_steps` cuts short is not squeezed.
        warmup_steps: Updates of the warm-up. Update `warmup_steps - 1` has the full rate, and so has the first of
            the cosine.
        warmup_start: The factor that the warm-up leaves behind, in [0, 1]; the first update is already
            `1 / warmup_steps` of the way above it.
        min_ratio: The floor, as a factor, in [0, 1].
        T_0: Updates in the cosine of the first cycle. None: one cosine, no restarts.
        T_mult: How much longer each cosine is than the one before, at least 1, and any real number.
        peak_decay: How much lower each peak is than the one before, in [0, 1].
        warmup_every_cycle: Whether each later cycle has a warm-up as well: `warmup_steps` updates from
            `warmup_start` (or its peak, if that is lower) to its peak, before its cosine and in addition to it.
        count: What `t` counts: `"calls"` of `step`, or updates `"applied"` by a `FusedSGD`, which needs
            `total_steps`.
        last_epoch: The number of the last update that was made, as torch's schedulers take it: the next one is
            `last_epoch + 1`. -1 begins with update 0. Groups without `"initial_lr"` take their present rate as the
            initial one, where torch's schedulers raise.

    Attributes:
        curve: The `WarmupCosine`, whose `factor(t)` is the schedule.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, or does not go with the others.

    Warns:
        UserWarning: `warmup_steps` equals `total_steps`, so that no cosine follows the warm-up; or, once, a
            `step` goes beyond update `total_steps`, where one call after each update ends. With
            `count="applied"` this is noticed where the optimizer counts on the CPU.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), sections 3.1 (warm-up) and 5.1
    (cosine); restarts from "SGDR" (arXiv 1608.03983).
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
                f"warmup_steps equals total_steps={self.curve.total_steps}: the warm-up takes all updates and no "
                "cosine follows; total_steps counts the warm-up as well"
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
        """`t` of the next update. The name is torch's."""
        return self._counter.t

    @last_epoch.setter
    def last_epoch(self, t: int) -> None:
        # The base class assigns it once before it counts steps.
        if hasattr(self, "_step_count"):
            self._counter.assign(t)

    @property
    def base_lrs(self) -> list[float | Tensor]:
        """The initial rate of each group. They may be assigned, and count from the next `step`."""
        return [_initial_rate(group) for group in self.optimizer.param_groups]

    @base_lrs.setter
    def base_lrs(self, rates: list[float | Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at `last_epoch`, in the type of the group's initial rate."""
        factor = self.curve.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    # torch.compile would guard the number of calls, which is another one each time.
    @disable_dynamo
    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rates of the next update.

        Args:
            epoch: The update to go to instead of the next one, 0 for the first.

        Raises:
            TypeError, ValueError: `epoch` is not an integer, negative, or beyond 64 bits.

        Warns:
            UserWarning: The next update is beyond `total_steps`; once.
        """
        self._update_lr(epoch)
        self._step_count += 1
        total = self.curve.total_steps
        if total is not None and not self._is_beyond_end and self._counter.known_t > total:
            self._is_beyond_end = True
            warn_user(
                f"the schedule was stepped beyond total_steps={total}: further updates are made at its floor, "
                f"min_ratio={self.curve.min_ratio}; total_steps counts all updates, those of the warm-up included"
            )

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates that the last `step` set; with `count="applied"`, those of the next update."""
        return super().get_last_lr() if self._counter.sets_last_rates else self.get_lr()

    # torch's SequentialLR enters a schedule here.
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
        """Sets the rates of groups that are added or loaded between two calls of `step`, where torch leaves them."""
        optimizer = self.optimizer
        # Weak references, because the optimizer holds these functions: a cycle would keep its tensors past their time.
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

        # There is no hook for this one; the base class replaces `step` in the same way.
        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
        optimizer.register_load_state_dict_post_hook(after_load)

    def _enter(self, group: dict[str, Any]) -> None:
        _separate_default_rate(self.optimizer)
        _separate_late_rate(group, self.optimizer.param_groups)
        if self._counter.enter(group, _initial_rate(group)):
            self._last_lr = self._current_rates()

    def state_dict(self) -> dict[str, Any]:
        """`last_epoch` and the arguments; JSON can hold it. The initial rates are in the optimizer's state.

        With `count="applied"` also `origin`: how many updates the optimizer had applied before update 0.
        """
        return {"last_epoch": self.last_epoch, **self._arguments(), **self._counter.saved()}

    def _arguments(self) -> dict[str, Any]:
        return {**asdict(self.curve), "count": self._counter.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the update that the state is of, and sets its learning rates.

        The arguments stay those that this schedule was built with.

        Warns:
            UserWarning: The state is of a schedule with other arguments.

        Raises:
            KeyError, TypeError, ValueError: The state has no `last_epoch`, or one that is not an integer or outside
                `[-1, 2**62]`, or such an `origin`. Nothing is changed then.
        """
        if "last_epoch" not in state_dict:
            raise KeyError(
                "state_dict has no 'last_epoch'; it must be what a schedule's state_dict() returned"
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
                "the loaded state is of a schedule with other arguments: "
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
        if "_counter" not in state:
            # A schedule that was pickled before its counters were classes.
            self._counter = state["_applied"] or CallCount(self.optimizer, self.curve)
            self._counter.restore(state["_calls"], getattr(state["_applied"], "origin", None))
        # The optimizer of a copy has lost what watched it.
        self._watch_groups()


def _check_rates_have_memory(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        if isinstance(group["lr"], Tensor) and missing_bytes(group["lr"]):
            raise RuntimeError(
                f"the lr of group {index} has no memory: its storage was resized; set another lr"
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
    """Keeps writes to groups out of the default that later groups get: torch hands the same tensor to all of them."""
    if isinstance(optimizer.defaults.get("lr"), Tensor):
        optimizer.defaults["lr"] = optimizer.defaults["lr"].clone()


def _separate_late_rate(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Gives a late group a tensor of its own where it came with that of another, which is scheduled already."""
    for other in groups:
        if other is not group and isinstance(group["lr"], Tensor) and other["lr"] is group["lr"]:
            group["lr"] = group["lr"].clone()
            group["initial_lr"] = _copy(other["initial_lr"])
            return


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate
