"""The backends of fused_tricks that a benchmark measures: all fast ones, or those of `--backend`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import fused_tricks
from benchmarks.lib.command_line import first_line
from fused_tricks.backends import BACKENDS


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds `--backend`, which may be repeated."""
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="a backend of fused_tricks, by default the fastest usable one; can be repeated where several are "
        "measured. The slow 'reference' is measured only if it is named",
    )


def usable(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Returns the fast backends for a type of device.

    Returns:
        The usable backends, the fastest first; and by name, the reasons why others are not usable.
    """
    reasons = {
        name: backend.missing_on(device)
        for name, backend in BACKENDS.items()
        if backend.is_automatic and backend.device_type == device.type
    }
    return (
        [name for name, reason in reasons.items() if reason is None],
        {name: reason for name, reason in reasons.items() if reason is not None},
    )


def choose(
    parser: argparse.ArgumentParser, names: Sequence[str] | None, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Returns the backends to measure, as `usable` does, or those of `--backend`.

    Ends the program if a named backend is unknown or does not serve the device, or if no fast backend is usable.
    """
    if names:
        _check(parser, names, device)
        return list(dict.fromkeys(names)), {}
    found, reasons = usable(device)
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        parser.error(
            f"no fast backend of fused_tricks is usable on {device.type} ({why}), and the slow 'reference' is not what "
            f"users run. fused_tricks comes from {Path(fused_tricks.__file__).parent}: pip install -e . in the "
            "checkout compiles it there. To measure the reference, add --backend reference"
        )
    return found, reasons


def _check(parser: argparse.ArgumentParser, names: Sequence[str], device: torch.device) -> None:
    for name in names:
        if name not in BACKENDS:
            parser.error(f"--backend {name}: unknown; choose from {', '.join(BACKENDS)}")
        try:
            parameter = torch.zeros(1, device=device, requires_grad=True)
            fused_tricks.FusedSGD([parameter], lr=1.0, backend=name)
        except RuntimeError as error:
            parser.error(f"--backend {name}: {first_line(error)}")
