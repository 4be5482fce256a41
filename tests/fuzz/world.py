"""Several optimizers with one history, and the comparison of their results."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD, WarmupCosineLR
from support import emulation  # noqa: F401  # adds a backend
from support.comparison import assert_same_bits, bits

from .tensors import DTYPES, Described, gradient, laid_out, parameters, write

# A write by one of these routes is unnoticed until `refresh_masters`.
UNNOTICED = ("data in place", "numpy", "dlpack", "storage", "parameter of its data")

# Options that torch.optim.SGD lacks, with the value at which FusedSGD does the same.
OWN_OPTIONS = {"bias_decay": True, "decoupled_weight_decay": False}


class AveragingSGD(torch.optim.SGD):
    """`torch.optim.SGD` with the options `ema_decay` and `ema_warmup` of a group.

    The averages and the number of applied steps are in the state and the groups, which checkpoints and copies contain.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step, then moves the average of each parameter with a gradient."""
        super().step(closure)
        applied = self.param_groups[0].get("applied_steps", 0) + 1
        self.param_groups[0]["applied_steps"] = applied
        for group in self.param_groups:
            decay = group.get("ema_decay")
            if decay is None:
                continue
            if group.get("ema_warmup", False):
                decay = min(decay, (1 + applied) / (10 + applied))
            for param in group["params"]:
                if param.grad is None:
                    continue
                if "ema_param" in self.state[param]:
                    self.state[param]["ema_param"].lerp_(param, 1 - decay)
                else:
                    self.state[param]["ema_param"] = param.detach().clone()


class Life:
    """One optimizer with its parameters.

    Attributes:
        name: A backend, or `"torch"` for `AveragingSGD(foreach=False)`.
        params: Its parameters, in the order in which the world made them.
        optimizer: The optimizer.
        schedule: Its schedule, or None.
        scaler: Its `GradScaler`, or None.
    """

    def __init__(self, name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> None:
        self.name = name
        self.params: list[Parameter] = []
        self.options = options
        made = [self.group(group) for group in groups]
        self.optimizer = self.optimizer_over(made)
        self.schedule: WarmupCosineLR | None = None
        self.scaler: torch.amp.GradScaler | None = None

    def group(self, described: dict[str, Any]) -> dict[str, Any]:
        """Makes a group's parameters, and returns the group."""
        options = dict(described)
        params = parameters(options.pop("params"), options.pop("storage", "apart"))
        self.params += params
        if self.name == "torch":
            options = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
        else:
            options = OWN_OPTIONS | options
        return options | {"params": params}

    def optimizer_over(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Makes an optimizer with the world's options."""
        if self.name == "torch":
            return AveragingSGD(groups, lr=0.1, foreach=False)
        options = dict(self.options)
        if isinstance(options.get("loss_scale"), dict):
            options["loss_scale"] = DynamicLossScale(**options["loss_scale"])
        return FusedSGD(groups, lr=0.1, backend=self.name, **options)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by name, and the state of parameters with a gradient.

        After a change of the dtype or a write by user code, a parameter's state is adapted at its next use. An update
        uses the master, and a skipped step may not.
        """
        found = {}
        skipped = self.name != "torch" and self.optimizer.stats().last_step_skipped
        for index, param in enumerate(self.params):
            found[f"parameter {index}"] = param.detach()
            if param.grad is None:
                continue
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and not (skipped and key == "master_param"):
                    found[f"{key} {index}"] = value
        return found

    def written(self) -> set[str]:
        """Names of the state tensors that a checkpoint contains, which are those that an update has written."""
        saved = self.optimizer.state_dict()["state"]
        return {f"{key} {index}" for index, state in saved.items() for key in state}


class World:
    """Optimizers that share one history. Each event happens to every optimizer, and steps are compared.

    Args:
        backends: The backends that take part beside the reference.
        groups: Dicts with `params`, a list of `Described`, options, and `storage`, which is "apart" by default.
        **options: Of the optimizers: `loss_scale` (a dict is a `DynamicLossScale`'s arguments), `max_grad_norm`.
    """

    def __init__(self, backends: tuple[str, ...], groups: list[dict[str, Any]], **options: Any) -> None:
        groups = [group | {"params": [Described(*each) for each in group["params"]]} for group in groups]
        self.options = options
        names = ["reference", *backends]
        if not options and _is_torchs(groups):
            names.append("torch")
        self.lives = [Life(name, copy.deepcopy(groups), options) for name in names]

    @property
    def is_exact(self) -> bool:
        """True if the norm of the gradients must be independent of the order of summation."""
        return self.lives[0].options.get("max_grad_norm") is not None

    def step(self, kinds: list[str], seed: int) -> None:
        """Sets gradients, takes a step, and compares."""
        for life in self.lives:
            for index, param in enumerate(life.params):
                kind = kinds[index % len(kinds)]
                if kind == "negated view" and life.scaler is not None:
                    kind = "dense"  # torch's scaler cannot unscale a negated view
                grad = None
                if param.requires_grad:
                    grad = gradient(param, kind, seed + index, self.is_exact)
                param.grad = None
                if grad is not None and life.name == "torch" and grad.dtype != param.dtype:
                    grad = grad.to(param.dtype)  # torch.optim.SGD would make a momentum buffer in 16 bits
                if grad is not None:
                    param.grad_dtype = grad.dtype
                param.grad = grad
            before = [None if p.grad is None else bits(p.grad).clone() for p in life.params]
            if life.scaler is None:
                life.optimizer.step()
            elif any(param.grad is not None for param in life.params):
                life.scaler.scale(torch.ones(()))
                life.scaler.step(life.optimizer)
                life.scaler.update()
            if life.schedule is not None:
                life.schedule.step()
            for param, was in zip(life.params, before, strict=True):
                if was is not None and life.scaler is None:
                    assert torch.equal(bits(param.grad), was), f"{life.name} wrote to a gradient"
        self.check()

    def refused_step(self, seed: int) -> None:
        """Takes a step with a gradient that every backend refuses, and checks that nothing changes."""
        for life in self.lives:
            if life.name == "torch" or not life.params or not life.params[-1].requires_grad:
                continue
            for index, param in enumerate(life.params):
                param.grad = None
                if param.requires_grad:
                    param.grad_dtype = param.dtype
                    param.grad = gradient(param, "dense", seed + index, self.is_exact)
            last = life.params[-1]
            last.grad = None
            last.grad_dtype = None
            last.grad = torch.zeros(last.shape).to_sparse()
            before = {name: bits(tensor).clone() for name, tensor in life.tensors().items()}
            stats = repr(life.optimizer.stats())
            try:
                life.optimizer.step()
            except RuntimeError:
                pass
            else:
                raise AssertionError(f"{life.name} took a sparse gradient")
            after = {name: bits(tensor) for name, tensor in life.tensors().items()}
            assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), (
                life.name
            )
            assert repr(life.optimizer.stats()) == stats, life.name
            last.grad = None
            last.grad_dtype = last.dtype
        for life in self.lives:
            for param in life.params:
                param.grad = None
        self.check()

    def add_group(self, group: dict[str, Any]) -> None:
        """Adds a group of parameters."""
        group = group | {"params": [Described(*each) for each in group["params"]]}
        if not _is_torchs([group]):
            self.lives = [life for life in self.lives if life.name != "torch"]
        for life in self.lives:
            life.optimizer.add_param_group(life.group(copy.deepcopy(group)))

    def set_option(self, group: int, name: str, value: Any) -> None:
        """Sets an option of a group."""
        for life in self.lives:
            groups = life.optimizer.param_groups
            if not (name in OWN_OPTIONS and life.name == "torch"):
                groups[group % len(groups)][name] = value
        if name in OWN_OPTIONS and value != OWN_OPTIONS[name]:
            self.lives = [life for life in self.lives if life.name != "torch"]

    def clip(self, max_grad_norm: float | None) -> None:
        """Sets `max_grad_norm`, and ends the comparison with torch.optim.SGD."""
        self.lives = [life for life in self.lives if life.name != "torch"]
        for life in self.lives:
            life.options = life.options | {"max_grad_norm": max_grad_norm}
            life.optimizer.max_grad_norm = max_grad_norm

    def write(self, index: int, route: str, seed: int) -> None:
        """Writes to a parameter."""
        for life in self.lives:
            if life.params:
                write(life.params[index % len(life.params)], route, seed)
            if route in UNNOTICED and life.name != "torch":
                life.optimizer.refresh_masters()

    def change_dtype(self, index: int, dtype: str) -> None:
        """Gives a parameter another dtype. Ends the comparison with torch.optim.SGD, whose buffers keep their dtype."""
        self.lives = [life for life in self.lives if life.name != "torch"]
        for life in self.lives:
            if life.params:
                param = life.params[index % len(life.params)]
                param.grad = None
                param.grad_dtype = None
                param.data = param.data.to(DTYPES[dtype])

    def change_layout(self, index: int, layout: str) -> None:
        """Gives a parameter other strides."""
        for life in self.lives:
            if life.params:
                param = life.params[index % len(life.params)]
                param.grad = None
                param.data = laid_out(param.data.contiguous(), layout)

    def freeze(self, index: int) -> None:
        """Freezes a parameter, or ends the freeze."""
        for life in self.lives:
            if life.params:
                param = life.params[index % len(life.params)]
                param.requires_grad_(not param.requires_grad)

    def reload(self, route: str) -> None:
        """Replaces each optimizer by a new optimizer with the saved state."""
        for life in self.lives:
            if life.schedule is not None or life.scaler is not None:
                return
            if route in ("copy", "pickle"):
                both = (life.params, life.optimizer)
                life.params, life.optimizer = (
                    copy.deepcopy(both) if route == "copy" else pickle.loads(pickle.dumps(both))
                )
                continue
            file = io.BytesIO()
            torch.save(life.optimizer.state_dict(), file)
            file.seek(0)
            groups = [
                {name: value for name, value in group.items() if name not in ("applied_steps", "loss_scale")}
                for group in life.optimizer.param_groups
            ]
            life.optimizer = life.optimizer_over(groups)
            life.optimizer.load_state_dict(torch.load(file))
        self.check()

    def follow_schedule(self, count: str) -> None:
        """Attaches a schedule."""
        if count == "applied":
            self.lives = [life for life in self.lives if life.name != "torch"]
        for life in self.lives:
            if life.schedule is None and life.params:
                life.schedule = WarmupCosineLR(life.optimizer, total_steps=9, warmup_steps=2, count=count)

    def use_scaler(self) -> None:
        """Steps through a GradScaler from then on, if the optimizers have no loss scale."""
        for life in self.lives:
            if self.options.get("loss_scale") is None and life.scaler is None:
                life.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)

    def check(self) -> None:
        """Asserts that every optimizer equals the reference, bit for bit."""
        expected, *others = self.lives
        wanted = expected.tensors()
        for life in others:
            found = life.tensors()
            surplus = sorted(found.keys() - wanted.keys())
            assert not surplus, f"{life.name} has {surplus}, which {expected.name} lacks"
            for name, tensor in wanted.items():
                if life.name == "torch" and name not in found:
                    # FusedSGD counts a buffer without elements as written after the first applied step.
                    may_lack = name.startswith("master") or tensor.numel() == 0
                    assert may_lack or name not in expected.written(), f"torch has no {name}"
                    continue
                assert_same_bits(_one_nan(found[name]), _one_nan(tensor), f"{life.name}: {name}")
            if life.name != "torch":
                # The comparison is by text, in which NaN equals NaN.
                found_stats, expected_stats = repr(life.optimizer.stats()), repr(expected.optimizer.stats())
                assert found_stats == expected_stats, f"{life.name}: {found_stats}, expected {expected_stats}"


def _one_nan(tensor: Tensor) -> Tensor:
    """Returns the tensor with one form of NaN, because IEEE 754 leaves sign and payload to the processor."""
    return torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)


def _is_torchs(groups: list[dict[str, Any]]) -> bool:
    """True if torch.optim.SGD does the same."""
    dtypes = {each.dtype for group in groups for each in group["params"]}
    return dtypes <= {"f32", "f64"} and all(
        group.get(name, value) == value for group in groups for name, value in OWN_OPTIONS.items()
    )
