"""The contestants of benchmarks.step from other packages: timm, Apex, Transformer Engine and FlashOptim."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.lib.names import FUSED
from benchmarks.step.check import EMA_DECAY, HYPERPARAMETERS, Average
from benchmarks.step.contestants import Entry, Gradients, Work, entry, grad_scaler

MODEL_EMA = f"{FUSED}, timm's ModelEmaV3"
APEX = "Apex FusedSGD"
APEX_MASTERS = "Apex kernels, with masters"
TRANSFORMER_ENGINE = "Transformer Engine FusedSGD"
FLASHOPTIM = "FlashOptim"
FLASHOPTIM_32 = "FlashOptim, 32-bit masters"

# The check reads and writes the gradient (8), one kernel reads three tensors (12) and writes two (8).
APEX_WORK = Work("FP32 weights, FP32 momentum", 28, 28, "a pass before the step; the host decides")

# The check reads and writes the gradient (2 + 2), the update moves the bytes of ours (2 + 4 + 4 and 4 + 4 + 2). An
# FP32 element: 4 + 4, 4 + 4 + 4, 4 + 4.
APEX_MASTERS_WORK = Work(
    "16-bit weights, FP32 masters, FP32 momentum",
    24,
    28,
    "a pass before the step; the device decides; the scale is not adjusted",
)

# Momentum has 8 bits, and 16 bits for each 32 elements: 1 1/16 bytes read and as many written. The gradient is read
# (2); the weight (2) and its correction (1 or 2) are read and written.
FLASHOPTIM_WORK = Work("16-bit weights, 8-bit corrections, 8-bit momentum", 10.125, 14.125, "neither")
FLASHOPTIM_32_WORK = Work("16-bit weights, 16-bit corrections, 8-bit momentum", 12.125, 14.125, "neither")


def model_ema(module: nn.Module) -> tuple[Callable[[], object], Average]:
    """Returns the update of timm's average of a module's weights and buffers, by foreach operations, and the averages.

    timm begins with the initial weights, and torch with those after the first step.
    """
    average = importlib.import_module("timm.utils").ModelEmaV3(module, decay=EMA_DECAY)
    tensors = list(average.module.parameters())
    return partial(average.update, module), Average(tensors, copies_first=False)


def apex(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns `apex.optimizers.FusedSGD` in place of `torch.optim.SGD`, under a `GradScaler`."""
    return grad_scaler(name, module, device, importlib.import_module("apex.optimizers").FusedSGD, APEX_WORK)


def transformer_engine(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns Transformer Engine's `FusedSGD`, a copy of Apex's, under a `GradScaler`."""
    make = importlib.import_module("transformer_engine.pytorch.optimizers").FusedSGD
    return grad_scaler(name, module, device, make, APEX_WORK)


def apex_masters(name: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Entry:
    """Returns Apex's check and update with FP32 masters, called as `apex.amp` did at O2 before Apex removed it.

    `apex.amp` also waited for `found_inf` and adjusted the scale on the host. Both are left out here.

    Raises:
        ValueError: `dtype` is not FP16; Apex has no such kernel for BF16.
    """
    if dtype != torch.float16:
        raise ValueError("Apex's update with masters takes FP16 only")
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernels = importlib.import_module("amp_C")
    parameters = list(fused_tricks.cast_model(module.to(device), dtype).parameters())
    found = torch.zeros(1, dtype=torch.int32, device=device)
    low = [parameter for parameter in parameters if parameter.dtype == dtype]
    fp32 = [parameter for parameter in parameters if parameter.dtype == torch.float32]
    masters = [parameter.detach().float() for parameter in low]
    low_momenta, fp32_momenta = ([torch.zeros_like(weight) for weight in group] for group in (masters, fp32))
    is_first = True

    def gradients(group: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.grad for parameter in group if parameter.grad is not None]

    @torch.no_grad()
    def step() -> None:
        nonlocal is_first
        found.zero_()
        low_gradients, fp32_gradients = gradients(low), gradients(fp32)
        sets = [
            [low_gradients, masters, low_momenta, low],
            [fp32_gradients, fp32, fp32_momenta],
        ]
        used = [tensors for tensors in sets if tensors[0]]
        for tensors in used:
            apply(kernels.multi_tensor_scale, found, [tensors[0], tensors[0]], 1.0)
        for tensors in used:
            apply(
                kernels.multi_tensor_sgd,
                found,
                tensors,
                HYPERPARAMETERS["weight_decay"],
                HYPERPARAMETERS["momentum"],
                0.0,  # dampening
                HYPERPARAMETERS["lr"],
                False,  # nesterov
                is_first,
                False,  # decay after momentum
                1 / 65536,  # of the loss scale
            )
        is_first = False

    kept = {id(parameter): master for parameter, master in zip(low, masters)}
    weights = [kept.get(id(parameter), parameter) for parameter in parameters]
    return entry(name, step, parameters, Gradients(parameters), APEX_MASTERS_WORK, weights=weights)


def flashoptim(
    name: str, module: nn.Module, dtype: torch.dtype, device: torch.device, *, bits: int, work: Work
) -> Entry:
    """Returns `flashoptim.FlashSGD`, which has no loss scaling, over the module as `cast_model` leaves it.

    Args:
        name: The name of the contestant.
        module: The module with the parameters.
        dtype: The dtype of the weights.
        device: The device of the parameters.
        bits: The bits of weight and correction together: 24, FlashOptim's default, or 32.
        work: The work of a step.
    """
    parameters = list(fused_tricks.cast_model(module.to(device), dtype).parameters())
    # A group has one dtype in FlashOptim.
    by_dtype = [[p for p in parameters if (p.dtype == torch.float32) == is_fp32] for is_fp32 in (False, True)]
    make: Callable[..., torch.optim.Optimizer] = importlib.import_module("flashoptim").FlashSGD
    optimizer = make(
        [{"params": group} for group in by_dtype if group], **HYPERPARAMETERS, master_weight_bits=bits
    )
    # FlashSGD does not unscale gradients, and keeps 8 bits of the momentum.
    gradients = Gradients(parameters, size=1.0)
    return entry(name, optimizer.step, parameters, gradients, work, scale=1.0, tolerance=0.1)
