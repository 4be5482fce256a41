"""The norms that `zero_gamma_` finds in the networks of torchvision and timm.

`python -m benchmarks.zero_gamma --output benchmarks/results/zero_gamma.md` writes the kept page: all
classification models of torchvision and, if timm is installed, the first model of each of its families.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torchvision import models

from benchmarks.lib import machine, progress
from benchmarks.lib.report import OUTPUT, output_file, table, write_page
from benchmarks.lib.weightless import weightless
from fused_tricks import norm_layers
from fused_tricks.zero_gamma.find import find

TEXT = """\
# What `zero_gamma_` finds

`zero_gamma_` reads the graph of a forward pass, and has no rule for a class of a library. The tables have its result
for the networks of two libraries:

| column | content |
| --- | --- |
| found | the number of norms that get γ = 0, of all norms |
| where | their names, with `*` for numbers |
| in doubt | the number of norms that `zero_gamma_` does not change and names in its warning |
| the last column | the difference from the norms that the library itself sets to zero, if any |

Command: `{command}`. Date: {date}. Versions: {versions}.
"""
PATTERNS_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """The norms of one network that `zero_gamma_` finds, and the norms that its library sets to zero."""

    network: str
    found: set[str]
    norms: int
    in_doubt: int
    theirs: set[str]

    def row(self) -> list[str]:
        count = f"{len(self.found)} of {self.norms}"
        return [self.network, count, where(self.found), str(self.in_doubt or "–"), self.comparison()]

    def comparison(self) -> str:
        if not self.theirs:
            return "–"
        only_theirs, only_ours = len(self.theirs - self.found), len(self.found - self.theirs)
        differences = [f"{only_theirs} only theirs"] * bool(only_theirs) + [f"{only_ours} only ours"] * bool(
            only_ours
        )
        return ", ".join(differences) or "the same"


def where(names: Iterable[str]) -> str:
    split = (name.rpartition(".") for name in names)
    patterns = sorted({"`" + re.sub(r"\d+", "*", parents) + dot + last + "`" for parents, dot, last in split})
    return ", ".join(patterns[:PATTERNS_SHOWN] + ["…"] * (len(patterns) > PATTERNS_SHOWN)) or "–"


def zeroed(model: nn.Module) -> set[str]:
    """Returns the norms of `model` whose γ is zero."""
    norms = set(norm_layers(model))
    gammas = {name: m._parameters.get("weight") for name, m in model.named_modules() if m in norms}
    return {name for name, gamma in gammas.items() if gamma is not None and not gamma.any()}


def in_torchvision(names: Iterable[str]) -> Iterator[Finding]:
    for name in names:
        # The initialisation of these networks takes seconds.
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with weightless():
            model = models.get_model(name, **options)
            flagged = (
                models.get_model(name, zero_init_residual=True) if isinstance(model, models.ResNet) else None
            )
        found = find(model, None)
        theirs = set() if flagged is None else zeroed(flagged)
        yield Finding(name, set(found.gammas), len(norm_layers(model)), len(found.left_alone), theirs)


def in_timm(names: Iterable[str]) -> Iterator[Finding]:
    import timm

    for name in names:
        with weightless():
            model: Any = timm.create_model(name)
        example = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
        found = find(model, example)
        yield Finding(name, set(found.gammas), len(norm_layers(model)), len(found.left_alone), zeroed(model))


def section(title: str, findings: Iterable[Finding], theirs: str) -> str:
    """Returns a table of the networks with a result, and the names of networks without one."""
    findings = list(findings)
    told = [finding for finding in findings if finding.found or finding.in_doubt or finding.theirs]
    others = [finding.network for finding in findings if finding not in told]
    text = f"\n## {title}\n\n"
    text += (
        table(["network", "found", "where", "in doubt", theirs], [finding.row() for finding in told]) + "\n"
    )
    return text + (f"\nNo norms found in: {', '.join(others)}.\n" if others else "")


def timm_families() -> list[str]:
    """Returns the first model of each of timm's modules; none if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    families = (timm.list_models(module=module) for module in timm.list_modules())
    return [family[0] for family in families if family]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_gamma", description=__doc__)
    parser.add_argument("--torchvision", nargs="*", default=models.list_models(models), metavar="MODEL")
    parser.add_argument("--timm", nargs="*", default=timm_families(), metavar="MODEL")
    parser.add_argument("--output", type=output_file, default=f"{OUTPUT}/zero_gamma.md", metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    record = machine.describe("benchmarks.zero_gamma", arguments, torch.device("cpu"))
    packages = ["torch", "torchvision", *(["timm"] if options.timm else [])]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    text = TEXT.format(command=record["command"], date=record["date"], versions=versions)
    names = progress.bar(options.torchvision, desc="torchvision")
    text += section("torchvision", in_torchvision(names), "`zero_init_residual`")
    if options.timm:
        names = progress.bar(options.timm, desc="timm")
        text += section("timm, one model of each family", in_timm(names), "timm's own")
    write_page(options.output, text)


if __name__ == "__main__":
    main(sys.argv[1:])
