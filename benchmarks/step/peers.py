"""The contestants of benchmarks.step from other packages."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.lib import gpu
from benchmarks.lib.names import FUSED
from benchmarks.step.check import EMA_DECAY, HYPERPARAMETERS, Average
from benchmarks.step.contestants import Entry, Gradients, Work, entry, grad_scaler

MODEL_EMA = f"{FUSED}, timm's ModelEmaV3"
APEX = "Apex FusedSGD"
APEX_MASTERS = "Apex kernels, with masters"
TRANSFORMER_ENGINE = "Transformer Engine FusedSGD"
FLASHOPTIM = "FlashOptim"
FLASHOPTIM_32 = "FlashOptim, 32-bit masters"
HEAVYBALL = "HeavyBall SGD"
OPTIMI = "optimi SGD"
OPTIMI_KAHAN = "optimi SGD, Kahan sum"
SGDW = "timm SGDW"
BITSANDBYTES = "bitsandbytes SGD"

PACKAGES = ("heavyball", "torch-optimi", "timm", "bitsandbytes", "transformer_engine")
"""The distributions whose versions belong to a result."""

FP32 = "FP32 weights, FP32 momentum"
HOST_DECIDES = "a pass before the step; the host decides"

# The check reads and writes the gradient (8), one kernel reads three tensors (12) and writes two (8).
APEX_WORK = Work(FP32, 28, 28, HOST_DECIDES)

# The check (8), a copy of the gradient (8). One compiled kernel reads momentum and copy and writes both (16), one reads
# weight and copy and writes the weight (12).
HEAVYBALL_WORK = Work(FP32, 44, 44, HOST_DECIDES)

# The check (8), and on a GPU a kernel for each tensor, as Apex's. On a CPU the operations of SGD: gradient plus decay
# (12), momentum times factor (8), plus gradient (12), weight (12).
OPTIMI_GPU_WORK = APEX_WORK
OPTIMI_WORK = Work(FP32, 52, 52, HOST_DECIDES)

# A kernel on a GPU reads gradient, momentum, weight and correction (2 + 2 + 2 + 2) and writes the last three (6). On a
# CPU: gradient plus decay (6), momentum times factor (4), plus gradient (6), correction plus momentum (6), copy of the
# weight (4), weight plus correction (6), their difference (6), correction plus difference (6). An FP32 element has no
# correction: 12 + 8, or the operations of SGD.
KAHAN = "16-bit weights, 16-bit corrections, 16-bit momentum"
OPTIMI_KAHAN_GPU_WORK = Work(KAHAN, 14, 20, "neither")
OPTIMI_KAHAN_WORK = Work(KAHAN, 44, 44, "neither")

# The check (8), weight times factor (8), momentum times factor (8), plus gradient (12), weight (12).
SGDW_WORK = Work(FP32, 48, 48, HOST_DECIDES)

# The check (8), and on a GPU a kernel for each tensor, as Apex's. On a CPU: gradient times 1 (8), plus decay (12),
# momentum times factor (8), plus gradient (12), weight (12).
BITSANDBYTES_GPU_WORK = APEX_WORK
BITSANDBYTES_WORK = Work(FP32, 60, 60, HOST_DECIDES)

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


class CannotRun(Exception):
    """A contestant cannot run on the device. The message is the reason."""


def require_gpu(device: torch.device) -> None:
    """Raises `CannotRun` unless the device is a GPU."""
    if not gpu.is_gpu(device):
        raise CannotRun("runs on a GPU only")


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages of contestants."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_ema(module: nn.Module) -> tuple[Callable[[], object], Average]:
    """Returns the update of timm's average of a module's weights and buffers, by foreach operations, and the averages.

    timm begins with the initial weights, and torch with those after the first step.
    """
    average = importlib.import_module("timm.utils").ModelEmaV3(module, decay=EMA_DECAY)
    tensors = list(average.module.parameters())
    return partial(average.update, module), Average(tensors, copies_first=False)


def apex(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns `apex.optimizers.FusedSGD` in place of `torch.optim.SGD`, under a `GradScaler`."""
    require_gpu(device)
    return grad_scaler(name, module, device, importlib.import_module("apex.optimizers").FusedSGD, APEX_WORK)


def transformer_engine(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns Transformer Engine's `FusedSGD`, a copy of Apex's, under a `GradScaler`."""
    require_gpu(device)
    make = importlib.import_module("transformer_engine.pytorch.optimizers").FusedSGD
    return grad_scaler(name, module, device, make, APEX_WORK)


def apex_masters(name: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Entry:
    """Returns Apex's check and update with FP32 masters, called as `apex.amp` did at O2 before Apex removed it.

    `apex.amp` also waited for `found_inf` and adjusted the scale on the host. Both are left out here.

    Raises:
        ValueError: `dtype` is not FP16; Apex has no such kernel for BF16.
    """
    require_gpu(device)
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
    require_gpu(device)
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


def heavyball(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns HeavyBall's `SGD`, which compiles its update and decouples the weight decay, under a `GradScaler`."""
    sgd = importlib.import_module("heavyball").SGD

    def make(parameters: list[Tensor], *, lr: float, momentum: float, weight_decay: float) -> Any:
        return sgd(parameters, lr=lr, beta=momentum, weight_decay=weight_decay)

    return grad_scaler(name, module, device, make, HEAVYBALL_WORK, decoupled_weight_decay=True)


def optimi(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns optimi's `SGD` under a `GradScaler`: Triton on a GPU, a loop over the tensors on a CPU."""
    work = OPTIMI_GPU_WORK if gpu.is_gpu(device) else OPTIMI_WORK
    return grad_scaler(name, module, device, importlib.import_module("optimi").SGD, work)


def optimi_kahan(name: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Entry:
    """Returns optimi's `SGD` for low precision, which has no loss scaling, over the module as `cast_model` leaves it.

    A correction beside each weight sums up the updates that the weight rounds away, in place of a master.
    """
    parameters = list(fused_tricks.cast_model(module.to(device), dtype).parameters())
    by_dtype = [[p for p in parameters if (p.dtype == torch.float32) == is_fp32] for is_fp32 in (False, True)]
    optimizer = importlib.import_module("optimi").SGD(
        [{"params": group} for group in by_dtype if group], **HYPERPARAMETERS
    )
    work = OPTIMI_KAHAN_GPU_WORK if gpu.is_gpu(device) else OPTIMI_KAHAN_WORK
    # SGD does not unscale gradients.
    return entry(name, optimizer.step, parameters, Gradients(parameters, size=1 / 16), work, scale=1.0)


def sgdw(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns timm's `SGDW`, which decouples the weight decay, under a `GradScaler`."""
    make = importlib.import_module("timm.optim").SGDW
    return grad_scaler(name, module, device, make, SGDW_WORK, decoupled_weight_decay=True)


def bitsandbytes(name: str, module: nn.Module, device: torch.device) -> Entry:
    """Returns bitsandbytes' `SGD` with momentum in 32 bits, under a `GradScaler`."""
    work = BITSANDBYTES_GPU_WORK if gpu.is_gpu(device) else BITSANDBYTES_WORK
    return grad_scaler(name, module, device, importlib.import_module("bitsandbytes").optim.SGD, work)
