"""The contestants of benchmarks.step that `torch.compile` compiles: torch's SGD, and masters by hand."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.step.check import HYPERPARAMETERS, LOSS_SCALE
from benchmarks.step.contestants import Entry, Gradients, Work, entry, grad_scaler

SGD = "torch.amp, compiled"
MASTERS = "compiled masters, by hand"

# The check reads and writes the gradient (8), the compiled kernel reads three tensors (12) and writes two (8).
SGD_WORK = Work("FP32 weights, FP32 momentum", 28, 28, "a pass before the step; the host decides")

# As ours: the check reads the gradient (2), the update reads gradient, master and momentum (2 + 4 + 4) and writes
# momentum, master and weight (4 + 4 + 2). An FP32 element: 4, 4 + 4 + 4, 4 + 4.
MASTERS_WORK = Work("16-bit weights, FP32 masters, FP32 momentum", 22, 24, "in the step; the device decides")


@contextmanager
def cold_cache() -> Iterator[None]:
    """Compiles into an empty folder, because code from an earlier run would shorten the time of compilation."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def sgd(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns `torch.optim.SGD` with a compiled step, under a `GradScaler`.

    The learning rate is a tensor: a number is a constant of the compiled code, and a schedule would compile each step.
    """

    def make(parameters: Sequence[Tensor], **options: Any) -> torch.optim.Optimizer:
        rate = torch.tensor(options.pop("lr"), device=device)
        optimizer = torch.optim.SGD(parameters, lr=rate, **options, foreach=True)
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
        return optimizer

    return grad_scaler(name, module, device, make, SGD_WORK)


def masters(name: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Entry:
    """Returns a step with FP32 masters and dynamic loss scaling as one compiled function, over the module after casts.

    The host never waits: an overflow keeps the old values by `torch.where`. Neither the learning rate nor the scale is
    a constant of the compiled code.
    """
    parameters = list(fused_tricks.cast_model(module.to(device), dtype).parameters())
    weights = [parameter.detach() for parameter in parameters]
    # For an FP32 parameter this is its own memory.
    full = [weight.float() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in full]
    rate = torch.tensor(HYPERPARAMETERS["lr"], device=device)
    scale = torch.tensor(LOSS_SCALE, device=device)
    growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
    update = _compiled_update()

    @torch.no_grad()
    def step() -> None:
        gradients = [parameter.grad for parameter in parameters]
        found_inf = update(weights, full, momenta, gradients, rate, scale)
        # As in GradScaler: growth factor, backoff factor, growth interval.
        torch._amp_update_scale_(scale, growth_tracker, found_inf, 2.0, 0.5, 2000)

    return entry(name, step, parameters, Gradients(parameters), MASTERS_WORK, weights=full)


@functools.cache
def _compiled_update() -> Callable[..., Tensor]:
    return torch.compile(_update, dynamic=False)


def _update(
    weights: Sequence[Tensor],
    masters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: Tensor,
    scale: Tensor,
) -> Tensor:
    """Checks, unscales and updates every tensor, and returns `found_inf` as a float.

    A loop of this form is compiled into faster CPU code than foreach operations, and `isfinite` than a norm.
    """
    applies = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    inverse_scale = 1 / scale
    for weight, master, momentum, gradient in zip(weights, masters, momenta, gradients):
        unscaled = gradient.float() * inverse_scale
        decayed = unscaled + HYPERPARAMETERS["weight_decay"] * master
        new_momentum = HYPERPARAMETERS["momentum"] * momentum + decayed
        new_master = master - rate * new_momentum
        momentum.copy_(torch.where(applies, new_momentum, momentum))
        master.copy_(torch.where(applies, new_master, master))
        if weight.dtype != master.dtype:
            weight.copy_(master)
    return (~applies).float()
