"""The contestants of benchmarks.step: optimizer steps, and plain loops over memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_tricks
from benchmarks.lib import gpu
from benchmarks.lib.harness import Contestant
from benchmarks.lib.names import FUSED
from benchmarks.step.check import EMA_DECAY, HYPERPARAMETERS, LOSS_SCALE, Average, Check, Trained

CASTS = ", with casts"
FUSED_CASTS = f"{FUSED}{CASTS}"
FUSED_NEW_CASTS = f"{FUSED}, with casts into new tensors"
TWIN = "AveragedModel of an FP32 twin"
COPY = "copy loop"
SCALE = "in-place loop"

Casts = Callable[[Sequence[Tensor]], Callable[[], None]]
"""Returns, for parameters with gradients, the function that casts both."""

Averages = Callable[[nn.Module], tuple[Callable[[], object], Average]]
"""Returns, for a module, the function that updates the averages of its weights, and the averages."""

GRADIENT_SIZE = LOSS_SCALE / 16
"""The deviation of scaled gradients: an update changes every weight, and stays below FP16's largest number."""


@dataclass(frozen=True)
class Work:
    """The work of one step of a contestant, beside which its time is read.

    Attributes:
        keeps: The weights and the state between steps.
        low_bytes: The bytes that its kernels must read and write for an element in FP16 or BF16 after `cast_model`.
        fp32_bytes: The same for an element that stays FP32.
        overflow: The place where gradients are unscaled and checked, and the place of the skip decision.
        averages: True if the step also updates an average of the weights.
    """

    keeps: str
    low_bytes: float
    fp32_bytes: float
    overflow: str
    averages: bool = False

    def traffic(self, parameters: Iterable[Tensor]) -> int:
        """Returns the bytes of a step over `parameters`, as `cast_model` leaves them."""
        return round(
            sum(
                p.numel() * (self.fp32_bytes if p.dtype == torch.float32 else self.low_bytes)
                for p in parameters
            )
        )


# The scan reads the gradient (2); the update reads gradient, master and momentum (2 + 4 + 4) and writes master,
# momentum and weight (4 + 4 + 2). An FP32 element: 4, 4 + 4 + 4, 4 + 4.
OUR_WORK = Work("16-bit weights, FP32 masters, FP32 momentum", 22, 24, "in the step; the device decides")

# The reference uses operations of torch. It compares the weight with its master (12), tests the gradient for finite
# elements by five operations (16), converts the gradient to FP32 (6) and unscales it (8). Then come the operations of
# SGD, as below (12 + 8 + 12 + 12), and the weight is rounded from the master (6). An FP32 element: 26, 8, and SGD's.
REFERENCE_WORK = Work(OUR_WORK.keeps, 92, 78, "in the step; the host decides")

# Unscaling reads and writes the gradient (8). Then each operation of SGD reads its operands and writes its result:
# decay (12), momentum times factor (8), plus gradient (12), weight (12).
SEPARATE_WORK = Work("FP32 weights, FP32 momentum", 52, 52, "a pass before the step; the host decides")

# The check reads and writes the gradient (8), one kernel reads three tensors (12) and writes three (12), because it
# stores the unscaled gradient.
FUSED_WORK = Work("FP32 weights, FP32 momentum", 32, 32, "a pass before the step; the device decides")


def with_casts(work: Work) -> Work:
    """Returns the work plus, for each 16-bit element, casts of the weight (4 → 2) and of the gradient (2 → 4)."""
    return replace(work, keeps="FP32 weights, 16-bit copies, FP32 momentum", low_bytes=work.low_bytes + 12)


def with_average(work: Work, low_bytes: float, fp32_bytes: float) -> Work:
    """Returns the work plus the bytes that the average of an element moves."""
    return replace(
        work,
        keeps=f"{work.keeps}, FP32 averages",
        low_bytes=work.low_bytes + low_bytes,
        fp32_bytes=work.fp32_bytes + fp32_bytes,
        averages=True,
    )


# The update also reads and writes the average (4 + 4): 30 bytes for a 16-bit element, 32 for an FP32 element.
OUR_AVERAGE = (8, 8)

# The reference reads the average and the weight and writes the average.
REFERENCE_AVERAGE = (12, 12)

# torch._foreach_lerp_ reads the average and the weight (4 + 4) and writes the average (4).
LERP = (12, 12)

# fp32_state_dict copies the master (4 + 4), and compares its rounding (4 + 2) with the weight (2 + 2 + 1, and 1 to
# reduce). Then the twin is loaded (4 + 4) and averaged (12). An FP32 element: a copy (8), the load (8), the average.
TWIN_AVERAGE = (40, 28)


@dataclass(frozen=True)
class Entry:
    """A contestant of the step benchmark.

    Attributes:
        contestant: The step, and the function that sets new gradients.
        work: The work of the step.
        kept_bytes: The bytes of the gradients that are kept for the next steps. Training has no such copy.
        trained: The tensors of the contestant, for the check of the numbers.
        checked: The outcome of the check; None before it.
        compile_seconds: The time of the first steps, which compile; None for contestants that compile nothing.
    """

    contestant: Contestant
    work: Work
    kept_bytes: int
    trained: Trained
    checked: Check | None = None
    compile_seconds: float | None = None


class Gradients:
    """Random gradients, set again before each step because `GradScaler` overwrites them.

    Args:
        parameters: The parameters whose gradients are set.
        in_place: True copies into the same tensors, whose addresses a captured graph keeps. False creates new tensors,
            as a backward pass does.
        size: The standard deviation, including the loss scale.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, in_place: bool = False, size: float = GRADIENT_SIZE
    ) -> None:
        # Only the bits of BF16, so that casts to a 16-bit type and back change nothing.
        self.values = [(torch.randn_like(p) * size).bfloat16().to(p.dtype) for p in parameters]
        self._parameters = parameters
        self._in_place = [value.clone() for value in self.values] if in_place else []
        for parameter, gradient in zip(parameters, self._in_place or self.values):
            parameter.grad = gradient if in_place else gradient.clone()

    def renew(self) -> None:
        """Sets the gradients of the parameters again."""
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
    first_steps: int = 0,
    **trained: Any,
) -> Entry:
    """Returns the step as a contestant: called each time, or captured in a CUDA graph once and replayed.

    Args:
        name: The name of the contestant.
        step: The timed work.
        parameters: The updated parameters.
        gradients: The gradients of these parameters.
        work: The work of the step.
        graph: True replays the step as a CUDA graph.
        first_steps: The number of steps to take at once, before a capture. The first update of an average may copy.
        **trained: Attributes of `Trained` that differ from their defaults.
    """
    for _ in range(first_steps):
        step()
        gradients.renew()
    run = gpu.capture(step, prepare=gradients.renew) if graph else step
    contestant = Contestant(name, run, gradients.renew)
    steps = first_steps + (gpu.CAPTURE_WARMUP if graph else 0)
    computes_on = Trained(parameters, gradients.values, steps, **trained)
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
    average: bool = False,
) -> Entry:
    """Returns `FusedSGD` with a dynamic loss scale over the module as `cast_model` leaves it.

    Args:
        name: The name of the contestant.
        module: The module with the parameters.
        dtype: The dtype of low-precision weights.
        device: The device of the parameters.
        backend: The backend of fused_tricks.
        graph: True replays the step as a CUDA graph.
        max_grad_norm: The norm to clip to, or None.
        average: True averages the weights in the update.
    """
    module = fused_tricks.cast_model(module.to(device), dtype)
    parameters = list(module.parameters())
    optimizer = fused_tricks.FusedSGD(
        parameters,
        **HYPERPARAMETERS,
        bias_decay=True,
        loss_scale="dynamic",
        max_grad_norm=max_grad_norm,
        ema_decay=EMA_DECAY if average else None,
        backend=backend,
    )
    optimizer.scale(torch.ones((), device=device))
    gradients = Gradients(parameters, in_place=graph)
    work, of_average = (
        (REFERENCE_WORK, REFERENCE_AVERAGE) if backend == "reference" else (OUR_WORK, OUR_AVERAGE)
    )
    if average:
        work = with_average(work, *of_average)
    return entry(
        name,
        optimizer.step,
        parameters,
        gradients,
        work,
        graph=graph,
        first_steps=int(average),
        optimizer=optimizer,
    )


def averaged_twin(
    name: str, module: nn.Module, dtype: torch.dtype, device: torch.device, backend: str
) -> Entry:
    """Returns `FusedSGD` and torch's average of its FP32 weights, which an FP32 twin of the module takes each step."""
    module = fused_tricks.cast_model(module.to(device), dtype)
    parameters = list(module.parameters())
    optimizer = fused_tricks.FusedSGD(
        parameters, **HYPERPARAMETERS, bias_decay=True, loss_scale="dynamic", backend=backend
    )
    optimizer.scale(torch.ones((), device=device))
    twin = fused_tricks.cast_model(copy.deepcopy(module), torch.float32)
    update_average, average = averaged_model(twin)
    gradients = Gradients(parameters)

    def step() -> None:
        optimizer.step()
        twin.load_state_dict(fused_tricks.fp32_state_dict(module, optimizer))
        update_average()

    work = with_average(REFERENCE_WORK if backend == "reference" else OUR_WORK, *TWIN_AVERAGE)
    return entry(
        name,
        step,
        parameters,
        gradients,
        replace(work, keeps=f"{work.keeps}, FP32 twin"),
        first_steps=1,
        weights=list(twin.parameters()),
        average=average,
    )


def averaged_model(module: nn.Module) -> tuple[Callable[[], object], Average]:
    """Returns the update of torch's average of a module's weights, by foreach operations, and the averages."""
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    tensors = list(average.module.parameters())
    return partial(average.update_parameters, module), Average(tensors, copies_first=True)


def grad_scaler(
    name: str,
    module: nn.Module,
    device: torch.device,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    work: Work,
    *,
    casts: Casts | None = None,
    averages: Averages | None = None,
    graph: bool = False,
    **trained: Any,
) -> Entry:
    """Returns `GradScaler` and an optimizer over the module in FP32.

    Args:
        name: The name of the contestant.
        module: The module with the parameters.
        device: The device of the parameters.
        make_optimizer: Takes the parameters and the hyper-parameters, as `torch.optim.SGD`.
        work: The work of a step.
        casts: Returns, for the parameters, the function that casts them and their gradients. It runs before each step,
            timed.
        averages: Returns, for the module, the function that updates an average of the weights after each step, timed.
        graph: True replays the step as a CUDA graph.
        **trained: Attributes of `Trained` that differ from their defaults.
    """
    parameters = list(module.to(device).parameters())
    optimizer = make_optimizer(parameters, **HYPERPARAMETERS)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    gradients = Gradients(parameters, in_place=graph)
    cast = casts(parameters) if casts else None
    update_average, average = averages(module) if averages else (None, None)

    def step() -> None:
        if cast:
            cast()
        scaler.step(optimizer)
        scaler.update()
        if update_average:
            update_average()

    return entry(
        name,
        step,
        parameters,
        gradients,
        work,
        graph=graph,
        first_steps=int(average is not None),
        average=average,
        **trained,
    )


def casts_in_place(low: Sequence[bool], dtype: torch.dtype) -> Casts:
    """Returns the casts of autocast, weights down and gradients up, as bare traffic: into kept buffers."""

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
    """Returns the casts of autocast into new tensors, as autocast makes them. No low-precision weight is kept."""

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
    """Returns two plain loops over large FP32 buffers, and the bytes that each of them reads and writes."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.zeros_like(source)
    size = source.nbytes
    contestants = [
        Contestant(COPY, lambda: target.copy_(source)),
        Contestant(SCALE, lambda: torch.add(target, source, alpha=1e-3, out=target)),
    ]
    return contestants, {COPY: 2 * size, SCALE: 3 * size}


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """Returns a function that reads more memory than any cache holds, so that all contestants have cold caches."""
    size = max(2**28, 4 * gpu.cache_size(device) if gpu.is_gpu(device) else 0)
    buffer = torch.ones(size // 4, device=device)
    return lambda: buffer.sum()
