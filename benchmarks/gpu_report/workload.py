"""A few steps for tools that observe kernels: ncu (`profiled`) and compute-sanitizer (`sanitized`).

`python -m benchmarks.gpu_report` runs this module under both. With `PYTORCH_NO_CUDA_MEMORY_CACHING=1` each tensor has
an allocation of its own, so that a sanitizer detects every access beyond a tensor.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, parameter_sets

SIZES = (1, 7, 33, 8191, 8193, 16384, 20001)
"""Sizes around the chunks and vectors of the kernels."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def profiled(parameters: str, device: torch.device, backend: str) -> fused_tricks.FusedSGD:
    """Takes four steps, and one step that also measures the norm of the gradients."""
    module = fused_tricks.cast_model(parameter_sets.build(parameters, device), torch.float16)
    params = list(module.parameters())
    optimizer = fused_tricks.FusedSGD(params, **HYPERPARAMETERS, backend=backend, loss_scale="dynamic")
    optimizer.scale(torch.ones((), device=device))
    _give_gradients(params)
    for _ in range(4):
        optimizer.step()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    return optimizer


def sanitized(device: torch.device, backend: str, many: int) -> fused_tricks.FusedSGD:
    """Takes steps over odd sizes of every type, with overflows, missing gradients, misaligned and `many` tensors."""
    torch.manual_seed(0)
    clipped: list[dict[str, Any]] = [
        {"loss_scale": "dynamic", "max_grad_norm": 1.0},
        {"loss_scale": "dynamic"},
        {},
    ]
    for dtype, options in itertools.product(DTYPES, clipped):
        params = [Parameter(torch.randn(size, device=device).to(dtype)) for size in SIZES]
        optimizer = fused_tricks.FusedSGD(params, **HYPERPARAMETERS, backend=backend, **options)
        optimizer.scale(torch.ones((), device=device))
        for step in range(3):
            _give_gradients(params)
            if step == 0 and options:
                params[-1].grad[-1] = torch.inf  # type: ignore[index]
            if step == 1:
                params[2].grad = None
            optimizer.step()
    flat = torch.randn(50_001, device=device).half()
    params = [Parameter(flat[1:]), *(Parameter(torch.zeros(3, device=device)) for _ in range(many))]
    optimizer = fused_tricks.FusedSGD(params, **HYPERPARAMETERS, backend=backend, loss_scale="dynamic")
    optimizer.scale(torch.ones((), device=device))
    _give_gradients(params)
    # One element into an allocation, like the weight.
    params[0].grad = torch.randn(50_001, device=device).half()[1:]
    optimizer.step()
    optimizer.step()
    return optimizer


def _give_gradients(params: Sequence[Parameter]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


def main(arguments: Sequence[str]) -> None:
    """Runs one of the two workloads and prints the counters of the optimizer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report.workload", description=__doc__)
    parser.add_argument("workload", choices=("profiled", "sanitized"))
    parser.add_argument("--parameters", type=command_line.parameter_set, default="resnet50", metavar="SET")
    parser.add_argument("--many", type=command_line.positive, default=4000, metavar="N")
    command_line.add_device_to(parser)
    backend_choice.add_to(parser)
    options = parser.parse_args(arguments)
    (backend, *_), _ = backend_choice.choose(parser, options.backend, options.device)
    gpu.use(options.device)
    if options.workload == "profiled":
        optimizer = profiled(options.parameters, options.device, backend)
    else:
        optimizer = sanitized(options.device, backend, options.many)
    print("steps done:", optimizer.stats())


if __name__ == "__main__":
    main(sys.argv[1:])
