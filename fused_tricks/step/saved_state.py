"""The base class of `FusedSGD` for state, state dicts, copies and pickles."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
from .options import FLAGS, NUMBERS
from .ordinary_tensors import outside_all_modes, outside_inference_mode
from .plan import Plan
from .shared_memory import has_memory
from .state_dict import (
    SCALE_KEYS,
    finish_state_dict,
    import_groups,
    import_state,
    never_updated,
    progress_of,
    restore_progress,
)


class Prepared(NamedTuple):
    """A plan and its stepper."""

    plan: Plan
    stepper: Stepper


class SavedState(Optimizer):
    """The state, state dicts, copies and pickles of `FusedSGD`. `FusedSGD.__init__` sets the attributes."""

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
    _lends_weights: bool

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state of each parameter, as in `torch.optim.Optimizer.state`.

        The keys are `momentum_buffer`, `master_param` and `ema_param`. A parameter has its state from its first step
        on. A momentum buffer is zero and an average is NaN until the first applied update. Until then, `state_dict`
        leaves the tensor out, and the first update ignores values that user code writes into it. A tensor that user
        code puts in its place counts as written. Assigning a dict replaces the state.
        """
        if is_asked_for_state():
            with self._lock:
                # torch.distributed.checkpoint completes the state only if no parameter has any.
                if self._new_state and len(self._drop_unwritten(list(self._state))) == 0:
                    self._prepared = None
                # torch.distributed.checkpoint loads only options that a group has already.
                self._note_progress()
        return self._state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"optimizer.state must be a dict, got {type(state).__name__}")
        with self._lock:
            self._state = state
            # The plan uses the masters and buffers of the former state.
            self._prepared = None

    def _lend_weights(self) -> None:
        """Notes that the parameters have other values for a while. Steps raise until `_take_weights_back`."""
        self._check_has_its_weights()
        # The next step must see that the weights are lent.
        self._prepared = None
        self._lends_weights = True

    def _take_weights_back(self) -> None:
        self._lends_weights = False

    def _check_has_its_weights(self) -> None:
        """Raises RuntimeError between `_lend_weights` and `_take_weights_back`."""
        if self._lends_weights:
            raise RuntimeError(
                "the model has the averages in place of its weights; leave the context of ema_weights first"
            )

    def _unwritten(self) -> set[int]:
        """Returns the ids of the state tensors that no update has written. Synchronises if the state is new."""
        return (
            {id(tensor) for tensor in self._new_state.unwritten(self._step_state)}
            if self._new_state
            else set()
        )

    def _drop_unwritten(self, params: list[Any]) -> dict[Any, Any]:
        """Removes the state of the given parameters if no update has written any of it; returns the state."""
        unwritten = self._unwritten()
        held = [self._state[param] for param in params]
        if all(
            isinstance(own, dict) and all(id(value) in unwritten for value in own.values()) for own in held
        ):
            for param in params:
                del self._state[param]
        return self._state

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of `torch.optim.SGD`, which can load the result. Synchronises.

        `state` has a `momentum_buffer` for each parameter with momentum and an `ema_param` for each parameter with
        `ema_decay`, in FP32 (FP64 for an FP64 parameter), and a `master_param` for each FP16 or BF16 parameter, in
        FP32. State that no update has written yet, as after a skipped first step, is left out. `optimizer.state` may
        therefore have more tensors.

        Each group also has `applied_steps`, `skipped_steps` and, with a loss scale, `loss_scale`, `growth_tracker` and
        `hysteresis_tracker`. These numbers are in the groups because some tools save only `state` and `param_groups`.
        `optimizer.param_groups` does not have them.

        Returns:
            A dict with `state` and `param_groups`.

        Raises:
            RuntimeError: The call is inside `ema_weights` of this optimizer.

        Example:
            ```python
            import torch
            import fused_tricks as ft

            model = torch.nn.Linear(4, 2)
            optimizer = ft.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, loss_scale="dynamic")
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
            ```
        """
        self._check_has_its_weights()
        self._drop_progress()
        progress = progress_of(self._step_state, with_scale=self._loss_scale is not None)

        def finish(optimizer: Optimizer, packed: dict[str, Any]) -> None:
            unwritten = self._new_state.unwritten(self._step_state)
            finish_state_dict(packed, self.param_groups, unwritten, progress)

        if self._new_state:
            listed = {id(param) for group in self.param_groups for param in group["params"]}
            # The base class cannot save the state of a parameter that is no longer in a group.
            for param in list(self._state):
                if isinstance(param, Tensor) and id(param) not in listed:
                    self._drop_unwritten([param])
        with first_state_dict_hook(self, finish):
            return super().state_dict()

    def _note_progress(self) -> None:
        progress = progress_of(self._step_state, with_scale=self._loss_scale is not None)
        for group in self.param_groups:
            group.update(progress)

    def _drop_progress(self) -> None:
        """Removes the numbers of `_note_progress` from the groups: the next step would make them wrong."""
        for group in self.param_groups:
            for key in SCALE_KEYS:
                group.pop(key, None)

    @one_at_a_time
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state dict of a `FusedSGD` or of a `torch.optim.SGD`.

        Tensors are copied. The state of an FP16 or BF16 parameter stays FP32, where `torch.optim.Optimizer` would cast
        it to the parameter's dtype. Options and a loss scale that the state dict lacks keep their values. A
        `DynamicLossScale` loads a saved scale, clamped to its floor and ceiling. A static `loss_scale` keeps its value.

        Args:
            state_dict: A dict with `state` and `param_groups`, as `state_dict` returns it.

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
        unwritten = never_updated(state, progress)
        self._new_state.add([], unwritten, self._step_state, self._step_state.block.device)
        for post_hook in load_state_dict_post_hooks(self):
            post_hook(self)

    def _ordinary_tensors(self) -> AbstractContextManager[None]:
        """Returns a context for new tensors: they have memory if the parameters have, and can be written later."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        in_fake_mode = not has_memory(torch.empty(0, device="cpu"))
        return (
            outside_all_modes() if in_fake_mode and all(map(has_memory, params)) else outside_inference_mode()
        )

    def __getstate__(self) -> dict[str, Any]:
        self._check_has_its_weights()
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
        # The base class updates __dict__ directly and would bypass the property `state`.
        super().__setstate__({"_state" if key == "state" else key: value for key, value in state.items()})
        self._prepared = None
        # `load_state_dict` calls this method, too.
        self.__dict__.setdefault("_lends_weights", False)
        # The pickle may be older than an option.
        for options in (self.defaults, *self.param_groups):
            for name in (*NUMBERS, *FLAGS):
                options.setdefault(name, False if name in FLAGS else NUMBERS[name].off)
        if "_step_state" in state:
            # A shallow copy shares parameters and state with the original, but counts its own steps.
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
