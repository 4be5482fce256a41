"""Zero γ: residual blocks that begin training as the identity."""

import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy

from ..cast import norm_layers
from ..validation import check_module
from .autograd_graph import AutogradGraph
from .residual_branches import last_norms
from .trace import dry_run

ModelT = TypeVar("ModelT", bound=nn.Module)


def zero_gamma_(model: ModelT, example_inputs: Any = None, *, strict: bool = False) -> ModelT:
    """Sets γ = 0 in the last norm of every residual branch of `model`, in place, and returns the model.

    Every residual block then begins as its shortcut, and the network trains at first like one of fewer layers.

    The branches are found in the graph that autograd builds in one forward pass of a copy of the model, not
    from its class. At an addition, the terms to which more convolutions and linear layers lead are the
    branches; a term to which fewer lead is the shortcut. A branch counts when it ends in a norm (BatchNorm,
    SyncBatchNorm, InstanceNorm, GroupNorm or LayerNorm, whose γ is the layer's `weight`) and nothing follows
    up to the addition but reshapes, casts, dropout, stochastic depth, gates by a sigmoid (squeeze and
    excitation) and scales (layer scale). A norm before an activation is never set: behind a ReLU, a γ of zero
    would have no gradient for ever.

    The model is not moved, cast or run, and may be on any device, in any precision and in any mode; the copy is
    on the `meta` device. Call it after loading the model's weights, and before `torch.jit.script` or
    sharding; `DataParallel`, `DistributedDataParallel` and `torch.compile` may come before or after it.

    Args:
        model: the model; or a single norm layer, which is then the one to be set.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments. By default a batch of two of what the model's first layer takes, as images of
            224×224 pixels and then of other usual sizes. Where a forward pass on `meta` fails, as it does if
            the model's path depends on its data, a copy of the model runs on the values themselves, so
            then they must be on the model's device.
        strict: raise where nothing is found.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing was found, with `strict`; or the model has TorchScript modules, or lazy ones that
            have not run yet.
        RuntimeError: the copy could not be made or run. A refused call changes nothing.

    Warns:
        UserWarning: nothing was found (`zero_gamma_` alone); or norms that end a branch, or may, were left alone: as
            many layers lead to the other side of the addition; the output or γ is used elsewhere, too; γ is frozen
            (`requires_grad=False`); the norm is scaled by a parameter that has zeros, and a product of two zeros
            has no gradient; or the norm is deeper inside of a branch whose last norm is set.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1, zero γ; the idea
    is from "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 5.1.
    """
    found = find(model, example_inputs)
    if found.gammas:
        found.warn()
    else:
        left_alone = f"; left alone: {found.describe_left_alone()}" if found.left_alone else ""
        nothing = f"{type(model).__name__} has no norm with a γ that ends a residual branch{left_alone}"
        if strict:
            raise ValueError(nothing)
        warnings.warn(
            f"zero_gamma_ changes nothing: {nothing}. Leave the call out; with strict=True it raises",
            stacklevel=2,
        )
    with torch.no_grad():
        for gamma in found.gammas.values():
            gamma.zero_()
    return model


def zero_gamma_names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    """Returns the names of the norm layers that `zero_gamma_` would set, in the order of `named_modules()`.

    `model.get_submodule(name)` is the layer. The name of a single norm layer in itself is `""`.

    Args, errors and warnings: those of `zero_gamma_`.
    """
    found = find(model, example_inputs)
    found.warn()
    return list(found.gammas)


@dataclass(frozen=True)
class Found:
    """What `zero_gamma_` does to a model.

    Attributes:
        gammas: by the name of the norm layer, γ to be set to zero.
        left_alone: by the name of the norm layer, why its γ is not, though it may end a branch.
    """

    gammas: dict[str, nn.Parameter]
    left_alone: dict[str, str]

    def describe_left_alone(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(which)} ({reason})" for reason, which in names.items())

    def warn(self) -> None:
        if self.left_alone:
            warnings.warn(f"zero γ left alone: {self.describe_left_alone()}", stacklevel=3)


def find(model: nn.Module, example_inputs: Any) -> Found:
    check_module(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("TorchScript modules cannot be followed; call this before torch.jit.script")
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(f"parameter {name} has no shape yet; run a forward pass of the model first")
    if any(layer is model for layer in norm_layers(model)):
        gamma = model._parameters.get("weight")
        return Found({} if gamma is None else {"": gamma}, {})
    run = dry_run(model, example_inputs)
    graph = AutogradGraph(run.roots, run.inputs, run.additions)
    accepted: dict[Node, set[Node]] = {}
    refused: dict[Node, str] = {}
    for norm in last_norms(graph):
        reason = norm.problem
        if reason is None and any(_has_zeros(run.original(leaf)) for leaf in norm.scales):
            reason = "it is scaled by a parameter that has zeros, and both might stay zero"
        if reason is None:
            accepted.setdefault(norm.gamma, set()).add(norm.node)
        else:
            refused.setdefault(norm.gamma, reason)
    for leaf, norms in accepted.items():
        if graph.uses(leaf) != norms:
            refused.setdefault(leaf, "its γ is used elsewhere, too")
        elif not run.original(leaf).requires_grad:
            refused.setdefault(leaf, "its γ is frozen (requires_grad=False) and would stay zero")
    to_zero = {leaf: norms for leaf, norms in accepted.items() if leaf not in refused}
    reached = graph.nodes_with_gradients(passing_none=set().union(*to_zero.values()))
    for leaf, norms in to_zero.items():
        if reached.isdisjoint(norms):
            refused[leaf] = "it is inside of a branch that begins as zero and would pass no gradient to it"
    reasons = {id(run.original(leaf)): refused.get(leaf) for leaf in [*accepted, *refused]}
    found = Found({}, {})
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in reasons:
            reason = reasons[id(weight)]
            if reason is None:
                found.gammas[name] = weight
            else:
                found.left_alone[name] = reason
    return found


def _has_zeros(scale: Tensor) -> bool:
    """Where the values are not known, on `meta`, a scale is taken for one without zeros."""
    return not scale.is_meta and bool((scale == 0).any())
