"""What benchmarks/step.py times: the optimizer step of each contestant, and plain loops over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.harness import Contestant

OURS = "fused_tricks"
FOR_LOOP = "torch.amp, for-loop"
FOREACH = "torch.amp, foreach"
FUSED = "torch.amp, fused"
FUSED_CASTS = "torch.amp, fused, with casts"
FUSED_NEW_CASTS = "torch.amp, fused, with casts into new tensors"
COPY = "copy loop"
SCALE = "in-place loop"

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


def _give_gradients(parameters: Sequence[Tensor]) -> Callable[[], None]:
    """Gives every parameter a gradient; returns what does so again, in new tensors, as a backward pass does.

    `GradScaler` overwrites gradients, so each step needs them anew.
    """
    values = [torch.randn_like(parameter) for parameter in parameters]

    def give() -> None:
        for parameter, value in zip(parameters, values):
            parameter.grad = value.clone()

    give()
    return give


def ours(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Contestant:
    """`FusedSGD` with a dynamic loss scale over the module as `cast_model` leaves it."""
    module = fused_tricks.cast_model(module.to(device), dtype)
    parameters = list(module.parameters())
    optimizer = fused_tricks.FusedSGD(parameters, **HYPERPARAMETERS, bias_decay=True, loss_scale="dynamic")
    optimizer.scale(torch.ones((), device=device))
    return Contestant(OURS, optimizer.step, _give_gradients(parameters))


def torch_amp(
    name: str,
    module: nn.Module,
    device: torch.device,
    *,
    casts: Callable[[Sequence[Tensor]], Callable[[], None]] | None = None,
    **form: bool,
) -> Contestant:
    """`GradScaler` and `torch.optim.SGD` over the module in FP32.

    Args:
        name: of the contestant.
        module: holds the parameters.
        device: where they live.
        casts: makes, from the parameters, what casts them and their gradients; runs, timed, before each step.
        **form: `foreach` and `fused`, as `torch.optim.SGD` takes them.
    """
    parameters = list(module.to(device).parameters())
    optimizer = torch.optim.SGD(parameters, **HYPERPARAMETERS, **form)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    give_gradients = _give_gradients(parameters)
    cast = casts(parameters) if casts else None

    def run() -> None:
        if cast:
            cast()
        scaler.step(optimizer)
        scaler.update()

    return Contestant(name, run, give_gradients)


def casts_in_place(
    low: Sequence[bool], dtype: torch.dtype
) -> Callable[[Sequence[Tensor]], Callable[[], None]]:
    """Autocast's casts, weights down and gradients up, as bare traffic: into buffers that are kept."""

    def build(parameters: Sequence[Tensor]) -> Callable[[], None]:
        weights = [parameter for parameter, is_low in zip(parameters, low) if is_low]
        low_weights = [weight.detach().to(dtype) for weight in weights]
        low_gradients = [weight.grad.to(dtype) for weight in weights if weight.grad is not None]

        @torch.no_grad()
        def cast() -> None:
            for weight, low_weight in zip(weights, low_weights):
                low_weight.copy_(weight)
            for weight, low_gradient in zip(weights, low_gradients):
                assert weight.grad is not None
                weight.grad.copy_(low_gradient)

        return cast

    return build


def casts_to_new(low: Sequence[bool], dtype: torch.dtype) -> Callable[[Sequence[Tensor]], Callable[[], None]]:
    """Autocast's casts as autocast does them: each makes a new tensor, and low-precision weights die each step."""

    def build(parameters: Sequence[Tensor]) -> Callable[[], None]:
        weights = [parameter for parameter, is_low in zip(parameters, low) if is_low]
        low_gradients = [weight.grad.to(dtype) for weight in weights if weight.grad is not None]

        @torch.no_grad()
        def cast() -> None:
            low_weights = [weight.to(dtype) for weight in weights]
            for weight, low_gradient in zip(weights, low_gradients):
                weight.grad = low_gradient.to(weight.dtype)
            del low_weights

        return cast

    return build


def loops(mebibytes: int, device: torch.device) -> tuple[list[Contestant], dict[str, int]]:
    """Two plain loops over large FP32 buffers, and the bytes each of them reads and writes."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.zeros_like(source)
    size = source.nbytes
    contestants = [
        Contestant(COPY, lambda: target.copy_(source)),
        Contestant(SCALE, lambda: torch.add(target, source, alpha=1e-3, out=target)),
    ]
    return contestants, {COPY: 2 * size, SCALE: 3 * size}


def traffic(parameters: Sequence[Tensor]) -> int:
    """The bytes that one step of `FusedSGD` with momentum and a dynamic scale has to read and write.

    22 for a low-precision element: the scan reads the gradient (2), the update reads gradient, master and
    momentum (2 + 4 + 4) and writes master, momentum and weight (4 + 4 + 2). 24 for an FP32 element: 4, 4 + 4 + 4,
    4 + 4.
    """
    return sum(p.numel() * (24 if p.dtype == torch.float32 else 22) for p in parameters)


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """Reads more memory than any cache holds, so that every contestant starts with the same cold caches."""
    buffer = torch.ones(2**26, device=device)
    return lambda: buffer.sum()
