"""What benchmarks.step times: the optimizer step of each contestant, and plain loops over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.lib import gpu
from benchmarks.lib.harness import Contestant
from benchmarks.lib.names import FUSED
from benchmarks.step.check import HYPERPARAMETERS, LOSS_SCALE, Check, Trained

CASTS = ", with casts"
FUSED_CASTS = f"{FUSED}{CASTS}"
FUSED_NEW_CASTS = f"{FUSED}, with casts into new tensors"
COPY = "copy loop"
SCALE = "in-place loop"

Casts = Callable[[Sequence[Tensor]], Callable[[], None]]
"""Makes, from parameters with gradients, what casts them and their gradients."""

GRADIENT_SIZE = LOSS_SCALE / 16
"""Of scaled gradients: large enough for an update to show in every weight, and below FP16's largest number."""


@dataclass(frozen=True)
class Work:
    """What one step of a contestant does, which its time has to be judged by.

    Attributes:
        keeps: what it trains in, and what it remembers between steps.
        low_bytes: bytes its kernels have to read and write for an element that is FP16 or BF16 after `cast_model`.
        fp32_bytes: the same for an element that stays FP32.
        overflow: where gradients are unscaled and checked, and who decides to skip the step.
    """

    keeps: str
    low_bytes: float
    fp32_bytes: float
    overflow: str

    def traffic(self, parameters: Iterable[Tensor]) -> int:
        """The bytes of a step over `parameters`, as `cast_model` leaves them."""
        return round(
            sum(
                p.numel() * (self.fp32_bytes if p.dtype == torch.float32 else self.low_bytes)
                for p in parameters
            )
        )


# The scan reads the gradient (2); the update reads gradient, master and momentum (2 + 4 + 4) and writes master,
# momentum and weight (4 + 4 + 2). An FP32 element: 4, 4 + 4 + 4, 4 + 4.
OUR_WORK = Work("16-bit weights, FP32 masters, FP32 momentum", 22, 24, "in the step; the device decides")

# The reference does it by operations of torch. It compares the weight with its master (12); asks whether the gradient
# is finite, which is five operations (16); makes the gradient FP32 (6) and unscales it (8); then come SGD's, as below
# (12 + 8 + 12 + 12), and the weight is made of the master (6). An FP32 element: 26, 8, and SGD's.
REFERENCE_WORK = Work(OUR_WORK.keeps, 92, 78, "in the step; the host decides")

# Unscaling reads and writes the gradient (8). Then each operation of SGD reads its operands and writes its result:
# decay (12), momentum times factor (8), plus gradient (12), weight (12).
SEPARATE_WORK = Work("FP32 weights, FP32 momentum", 52, 52, "a pass before the step; the host decides")

# The check reads and writes the gradient (8), what torch.compile makes reads three tensors (12) and writes two (8).
COMPILED_WORK = Work("FP32 weights, FP32 momentum", 28, 28, "a pass before the step; the host decides")

# The check reads and writes the gradient (8), one kernel reads three tensors (12) and writes them (12), because it
# leaves the gradient unscaled.
FUSED_WORK = Work("FP32 weights, FP32 momentum", 32, 32, "a pass before the step; the device decides")


def with_casts(work: Work) -> Work:
    """The work and, for each 16-bit element, casts of the weight (4 → 2) and of the gradient (2 → 4)."""
    return replace(work, keeps="FP32 weights, 16-bit copies, FP32 momentum", low_bytes=work.low_bytes + 12)


@dataclass(frozen=True)
class Entry:
    """A contestant of the step benchmark.

    Attributes:
        contestant: the step, and what gives it new gradients.
        work: what the step does.
        kept_bytes: of the gradients that are kept to be given again, which training would not have.
        trained: what it computes on, for a check of the numbers.
        checked: what that check found; None before it.
    """

    contestant: Contestant
    work: Work
    kept_bytes: int
    trained: Trained
    checked: Check | None = None


class Gradients:
    """Random gradients that parameters get before each step, as `GradScaler` overwrites them.

    Args:
        parameters: whose gradients to set.
        in_place: copy into the same tensors, whose addresses a captured graph keeps, and not into new ones, as a
            backward pass does.
        size: their standard deviation. The loss scale is in it.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, in_place: bool = False, size: float = GRADIENT_SIZE
    ) -> None:
        # With the few bits of BF16, so that casts to a 16-bit type and back change nothing.
        self.values = [(torch.randn_like(p) * size).bfloat16().to(p.dtype) for p in parameters]
        self._parameters = parameters
        self._in_place = [value.clone() for value in self.values] if in_place else []
        for parameter, gradient in zip(parameters, self._in_place or self.values):
            parameter.grad = gradient if in_place else gradient.clone()

    def renew(self) -> None:
        """Gives the parameters their gradients again."""
        if self._in_place:
            torch._foreach_copy_(self._in_place, self.values)
            return
        for parameter, value in zip(self._parameters, self.values):
            parameter.grad = value.clone()


def entry(
    name: str,
    step: Callable[[], object],
    parameters: Sequence[Tensor],
    gradients: Gradients,
    work: Work,
    *,
    graph: bool = False,
    **trained: Any,
) -> Entry:
    """Returns the step as a contestant: called each time, or captured in a CUDA graph once and replayed.

    Args:
        name: of the contestant.
        step: the work that is timed.
        parameters: that it updates.
        gradients: of these parameters.
        work: what the step does.
        graph: replay the step as a CUDA graph.
        **trained: as the attributes of `Trained`, where they differ from their defaults.
    """
    run = gpu.capture(step, prepare=gradients.renew) if graph else step
    contestant = Contestant(name, run, gradients.renew)
    computes_on = Trained(parameters, gradients.values, gpu.CAPTURE_WARMUP if graph else 0, **trained)
    return Entry(contestant, work, sum(parameter.nbytes for parameter in parameters), computes_on)


def ours(
    name: str,
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    *,
    graph: bool = False,
    max_grad_norm: float | None = None,
) -> Entry:
    """`FusedSGD` with a dynamic loss scale over the module as `cast_model` leaves it."""
    module = fused_tricks.cast_model(module.to(device), dtype)
    parameters = list(module.parameters())
    optimizer = fused_tricks.FusedSGD(
        parameters,
        **HYPERPARAMETERS,
        bias_decay=True,
        loss_scale="dynamic",
        max_grad_norm=max_grad_norm,
        backend=backend,
    )
    optimizer.scale(torch.ones((), device=device))
    gradients = Gradients(parameters, in_place=graph)
    work = REFERENCE_WORK if backend == "reference" else OUR_WORK
    return entry(name, optimizer.step, parameters, gradients, work, graph=graph, optimizer=optimizer)


def grad_scaler(
    name: str,
    module: nn.Module,
    device: torch.device,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    work: Work,
    *,
    casts: Casts | None = None,
    graph: bool = False,
    compiled: bool = False,
) -> Entry:
    """`GradScaler` and an optimizer over the module in FP32.

    Args:
        name: of the contestant.
        module: holds the parameters.
        device: where they live.
        make_optimizer: takes the parameters and the hyper-parameters, as `torch.optim.SGD`.
        work: what a step does.
        casts: makes, from the parameters, what casts them and their gradients; runs, timed, before each step.
        graph: replay the step as a CUDA graph.
        compiled: compile the optimizer's step with `torch.compile`.
    """
    parameters = list(module.to(device).parameters())
    optimizer = make_optimizer(parameters, **HYPERPARAMETERS)
    if compiled:
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign, assignment]
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    gradients = Gradients(parameters, in_place=graph)
    cast = casts(parameters) if casts else None

    def step() -> None:
        if cast:
            cast()
        scaler.step(optimizer)
        scaler.update()

    return entry(name, step, parameters, gradients, work, graph=graph)


def casts_in_place(low: Sequence[bool], dtype: torch.dtype) -> Casts:
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


def casts_to_new(low: Sequence[bool], dtype: torch.dtype) -> Casts:
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


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """Reads more memory than any cache holds, so that every contestant starts with the same cold caches."""
    size = max(2**28, 4 * gpu.cache_size(device) if gpu.is_gpu(device) else 0)
    buffer = torch.ones(size // 4, device=device)
    return lambda: buffer.sum()
