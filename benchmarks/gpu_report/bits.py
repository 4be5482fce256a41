"""Checks that the GPU backends give the bits of the CPU backend and of torch, and the same bits each time.

`python -m benchmarks.gpu_report.bits` compares them. benchmarks/README.md describes the comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, machine, parameter_sets, progress, report
from benchmarks.step.check import bits
from fused_tricks.backends import BACKENDS

HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
STEPS = 4
CLIP = "loss scale, clipped"
# Backends add up the norm in different orders.
MOST_OF_NORM = 1e-5


@dataclass(frozen=True)
class Finding:
    """One comparison: the number of elements that differ in a bit, or of different results beyond the first."""

    backend: str
    what: str
    differing: int
    of: int
    passed: bool
    note: str = ""


def against_cpu(
    parameters: str, dtype: torch.dtype, backend: str, other: str, device: torch.device, norm: float | None
) -> tuple[int, int, bool]:
    """Takes a few steps with two backends. The first and the third step overflow.

    Returns:
        The number of elements of weights and state that differ, the number of all elements, and True if loss scale,
        counters and norm are equal.
    """
    options = {**HYPERPARAMETERS, "loss_scale": "dynamic", "max_grad_norm": norm}
    sides = []
    for name, where in ((backend, device), (other, torch.device("cpu"))):
        module = fused_tricks.cast_model(parameter_sets.build(parameters, where), dtype)
        params = list(module.parameters())
        optimizer = fused_tricks.FusedSGD(params, **options, backend=name)
        optimizer.scale(torch.ones((), device=where))
        sides.append((params, optimizer))
    (ours, optimizer), (expected, reference) = sides
    generator = torch.Generator().manual_seed(0)
    agree = True
    for step in range(STEPS):
        gradients = [(torch.randn(p.shape, generator=generator) * 8).to(p.dtype) for p in expected]
        if step == 0:
            gradients[-1].view(-1)[-1] = torch.nan
        if step == 2:
            gradients[len(gradients) // 2].view(-1)[0] = -torch.inf
        for params in (ours, expected):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.to(param.device, copy=True)
        optimizer.step()
        reference.step()
        agree &= _same_stats(optimizer.stats(), reference.stats())
    differing = elements = 0
    for one, other_param in zip(ours, expected, strict=True):
        pairs = [(one, other_param)]
        pairs += [(optimizer.state[one][k], value) for k, value in reference.state[other_param].items()]
        differing += sum(int((bits(a) != bits(b)).sum()) for a, b in pairs)
        elements += sum(a.numel() for a, _ in pairs)
    return differing, elements, agree


def _same_stats(one: fused_tricks.StepStats, other: fused_tricks.StepStats) -> bool:
    a, b = one._asdict(), other._asdict()
    norm, expected = a.pop("grad_norm"), b.pop("grad_norm")
    if norm is None or expected is None:
        return a == b and norm is expected
    is_close = norm == expected or abs(norm - expected) <= MOST_OF_NORM * abs(expected)
    return a == b and (is_close or (norm != norm and expected != expected))


def against_torch(backend: str, device: torch.device) -> tuple[int, int]:
    """Counts the elements in FP32 that differ from `torch.optim.SGD(foreach=False)` on the same device."""
    torch.manual_seed(0)
    ours = [
        Parameter(torch.randn(s, device=device)) for s in ((64, 3, 7, 7), (300, 100), (10,), (1,), (8193,))
    ]
    expected = [Parameter(param.detach().clone()) for param in ours]
    options = {**HYPERPARAMETERS, "nesterov": True}
    optimizer = fused_tricks.FusedSGD(ours, **options, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, **options, foreach=False)
    for _ in range(20):
        for one, other in zip(ours, expected, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    differing = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(ours, expected, strict=True))
    return differing, sum(param.numel() for param in ours)


def repeats(parameters: str, backend: str, device: torch.device, times: int, norm: float | None) -> int:
    """Counts the different results of the same three steps. More than one shows a race."""
    module = fused_tricks.cast_model(parameter_sets.build(parameters, device), torch.float16)
    params = list(module.parameters())
    start = [param.detach().clone() for param in params]
    gradients = [torch.randn_like(param) * 4 for param in params]
    seen = set()
    for _ in range(times):
        with torch.no_grad():
            for param, weight, gradient in zip(params, start, gradients, strict=True):
                param.copy_(weight)
                param.grad = gradient
        optimizer = fused_tricks.FusedSGD(
            params, **HYPERPARAMETERS, loss_scale="dynamic", max_grad_norm=norm, backend=backend
        )
        optimizer.scale(torch.ones((), device=device))
        for _ in range(3):
            optimizer.step()
        seen.add(_fingerprint(params, optimizer))
    return len(seen)


def _fingerprint(params: Sequence[Tensor], optimizer: fused_tricks.FusedSGD) -> tuple[int, ...]:
    """Returns weighted sums of the bit patterns, computed on the tensors' device."""
    widths = {2: torch.int16, 4: torch.int32}
    tensors = [*params, *(value for param in params for value in optimizer.state[param].values())]
    sums = []
    for tensor in tensors:
        pattern = tensor.detach().reshape(-1).view(widths[tensor.element_size()]).long()
        sums.append((pattern * torch.arange(1, len(pattern) + 1, device=pattern.device)).sum())
    return tuple(torch.stack(sums).tolist())


def compare(options: argparse.Namespace) -> Iterator[Finding]:
    """Yields every comparison of every backend."""
    device, sets = options.device, options.parameters
    for backend in options.backends:
        has_cpu = backend != "cpu" and BACKENDS["cpu"].unavailable_because() is None
        other = "cpu" if has_cpu else "reference"
        for dtype, norm in (
            (torch.float16, None),
            (torch.bfloat16, None),
            (torch.float32, None),
            (torch.float16, 1.0),
        ):
            differing, of, agree = against_cpu(sets, dtype, backend, other, device, norm)
            name = str(dtype).removeprefix("torch.")
            what = f"{name}, {CLIP if norm else 'loss scale'}: elements that differ from backend {other}"
            passed = agree and (norm is not None or not differing)
            yield Finding(
                backend, what, differing, of, passed, "" if agree else "other loss scale, counters or norm"
            )
        differing, of = against_torch(backend, device)
        yield Finding(
            backend, "float32: elements that differ from torch.optim.SGD", differing, of, not differing
        )
        for norm in (None, 1.0):
            count = repeats(sets, backend, device, options.repeats, norm)
            what = (
                f"float16, {CLIP if norm else 'loss scale'}: results of the same three steps beyond the first"
            )
            yield Finding(backend, what, count - 1, options.repeats, count == 1)


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    rows = [
        [row["backend"], row["what"], f"{row['differing']:,} of {row['of']:,}", _result_of(row)]
        for row in result["findings"]
    ]
    return "\n\n".join(
        [
            "# Bits of the backends",
            f"{result['setting']}. Clipping scales all gradients by their norm, which backends add up in different "
            "orders: there the bits may differ, and the norm has to agree.",
            report.table(["backend", "what", "differing", "right"], rows),
            report.machine_note(result["machine"]) + "\n",
        ]
    )


def _result_of(row: dict[str, Any]) -> str:
    return ("yes" if row["passed"] else "**no**") + (f" ({row['note']})" if row["note"] else "")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report.bits", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--parameters", type=command_line.parameter_set, default="resnet18", metavar="SET")
    parser.add_argument(
        "--repeats",
        type=command_line.positive,
        default=60,
        help="repeats of the same steps, which find races",
    )
    command_line.add_device_to(parser)
    backend_choice.add_to(parser)
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    options.backends, _ = backend_choice.choose(parser, options.backend, options.device)
    return options


def main(arguments: Sequence[str]) -> int:
    """Compares and writes gpu_bits.json and gpu_bits.md. Returns 1 if a comparison failed."""
    options = parse(arguments)
    gpu.use(options.device)
    findings = list(progress.bar(compare(options), desc="comparisons", total=7 * len(options.backends)))
    result = {
        "benchmark": "gpu_bits",
        "machine": machine.describe("benchmarks.gpu_report.bits", arguments, options.device),
        "setting": f"{options.parameters}, {STEPS} steps, of which two overflow; {options.repeats} repeats",
        "findings": [asdict(finding) for finding in findings],
    }
    report.write(options.output, result, markdown(result))
    return int(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
