"""The part of the optimizer that saves and restores it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from .._torch import (
    first_state_dict_hook,
    is_asked_for_state,
    load_state_dict_post_hooks,
    load_state_dict_pre_hooks,
)
from ..backends import Stepper
from ..distributed.found_inf_reduction import SharedGroup
from ..loss_scale import DynamicLossScale
from .device_state import StepState
from .diagnostics import StepDiagnostics
from .group_source import register_source
from .lock import StepLock, one_at_a_time
from .new_state import NewState
from .optimizer_state import (
    SCALE_KEYS,
    finish_state_dict,
    import_groups,
    import_state,
    never_updated_buffers,
    progress_of,
    restore_progress,
)
from .options import FLAGS
from .ordinary_tensors import outside_all_modes, outside_inference_mode
from .plan import Plan
from .shared_memory import has_memory


class Prepared(NamedTuple):
    """A plan, and the stepper that runs steps over it."""

    plan: Plan
    stepper: Stepper


class SavedState(Optimizer):
    """State, state dicts, copies and pickles of `FusedSGD`, which sets the attributes."""

    _state: defaultdict[Any, Any]
    _loss_scale: float | DynamicLossScale | None
    _max_grad_norm: float | None
    _partition: SharedGroup
    _step_state: StepState
    _diagnostics: StepDiagnostics
    _backend: str
    _backend_in_use: str | None
    _prepared: Prepared | None
    _new_state: NewState
    _lock: StepLock

    @property
    def state(self) -> defaultdict[Any, Any]:
        """`torch.optim.Optimizer.state`: `momentum_buffer` and `master_param` of each parameter.

        A parameter's state is there from its first step on. A momentum buffer is zero until an update is applied, and
        values that user code writes into it before that are ignored; `state_dict` leaves it out.
        """
        if is_asked_for_state():
            # torch.distributed.checkpoint loads no option that a group does not have.
            self._note_progress()
        return self._state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"optimizer.state must be a dict, got {type(state).__name__}")
        with self._lock:
            self._state = state
            # The plan holds the masters and buffers of the former state.
            self._prepared = None

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """The state in the format of `torch.optim.SGD`, which can load it.

        `state` has `momentum_buffer` where there is momentum and `master_param` beside FP16 and BF16
        parameters, both FP32 (FP64 beside FP64 parameters). State that no update has written yet, as after a skipped
        first step, is left out, so that `optimizer.state` may have more. Each group also carries
        `applied_steps`, `skipped_steps` and, with a loss scale, `loss_scale`, `growth_tracker` and
        `hysteresis_tracker`: there they survive tools that keep only `state` and `param_groups`.
        `optimizer.param_groups` does not have them. Synchronises.
        """
        self._drop_progress()
        progress = progress_of(self._step_state, with_scale=self._loss_scale is not None)

        def finish(optimizer: Optimizer, packed: dict[str, Any]) -> None:
            unwritten = self._new_state.unwritten(self._step_state)
            finish_state_dict(packed, self.param_groups, unwritten, progress)

        with first_state_dict_hook(self, finish):
            return super().state_dict()

    def _note_progress(self) -> None:
        progress = progress_of(self._step_state, with_scale=self._loss_scale is not None)
        for group in self.param_groups:
            group.update(progress)

    def _drop_progress(self) -> None:
        """Removes what the next step would make untrue."""
        for group in self.param_groups:
            for key in SCALE_KEYS:
                group.pop(key, None)

    @one_at_a_time
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of `torch.optim.SGD`.

        FP32 state stays FP32 beside an FP16 parameter, where `torch.optim.Optimizer` would cast it. Tensors are
        copied. Options that the state lacks, and the scale where it has none, keep their values. So does a static
        `loss_scale`: only a `DynamicLossScale` takes over a saved scale, within its floor and ceiling.

        Raises:
            KeyError, TypeError, ValueError: The state does not fit the optimizer. Nothing is changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = state_dict.copy()
        for pre_hook in load_state_dict_pre_hooks(self):
            replacement = pre_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        groups, progress = import_groups(state_dict, self.param_groups, self.defaults)
        with self._ordinary_tensors():
            state = import_state(state_dict["state"], state_dict["param_groups"], self.param_groups)
            restore_progress(progress, self._step_state, self._loss_scale)
        self.__setstate__({"state": state, "param_groups": groups})
        unwritten = never_updated_buffers(state, progress)
        self._new_state.add([], unwritten, self._step_state, self._step_state.block.device)
        for post_hook in load_state_dict_post_hooks(self):
            post_hook(self)

    def _ordinary_tensors(self) -> AbstractContextManager[None]:
        """Returns a context whose tensors have memory wherever the parameters do, and may be written later."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        in_fake_mode = not has_memory(torch.empty(0, device="cpu"))
        return (
            outside_all_modes() if in_fake_mode and all(map(has_memory, params)) else outside_inference_mode()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_max_grad_norm": self._max_grad_norm,
            "_backend": self._backend,
            "_partition": self._partition,
            "_loss_scale": self._loss_scale,
            "_step_state": self._step_state,
            "_new_state": self._new_state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_lock", StepLock())
        # The base class writes attributes without regard to properties.
        super().__setstate__({"_state" if key == "state" else key: value for key, value in state.items()})
        self._prepared = None
        # An optimizer that was pickled before an option was added.
        for options in (self.defaults, *self.param_groups):
            for flag in FLAGS:
                options.setdefault(flag, False)
        if "_step_state" in state:
            # A shallow copy shares parameters and state with the original, but takes steps of its own.
            self._step_state = copy(self._step_state)
            self._new_state = copy(self._new_state)
            if isinstance(self._loss_scale, DynamicLossScale) and not self._loss_scale.is_free_for(self):
                self._loss_scale = copy(self._loss_scale)
        if isinstance(self._loss_scale, DynamicLossScale):
            self._step_state = self._loss_scale.bind(self)
        if "_step_state" in state:
            register_source(self)
            self._backend_in_use = None
            self._diagnostics = StepDiagnostics(self._loss_scale, self._step_state)
