"""Zero γ: sets the last norms of residual branches to zero, so that blocks begin training as their shortcuts."""

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

    Every residual block then begins as its shortcut, and the network at first trains like a network with fewer layers.

    The branches are found in the autograd graph of one forward pass of a copy of the model; the model's class is not
    used. In an addition, the terms with more convolutions and linear layers before them are the branches, and the term
    with fewer is the shortcut. A branch ends in a norm if only the following operations are between the norm and the
    addition: reshapes, casts, dropout, stochastic depth, gates by a sigmoid (squeeze and excitation) and scales (layer
    scale). Norms are BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm and LayerNorm, with γ in the layer's `weight`. A
    norm before an activation is never set: before a ReLU, γ = 0 and β = 0 would never receive a gradient.

    The model itself is not moved, cast or run. It may be on any device, in any precision and in any mode. The copy is
    on the `meta` device. Call `zero_gamma_` after the model's weights are loaded, and before `torch.jit.script` or
    sharding. `DataParallel`, `DistributedDataParallel` and `torch.compile` may come before or after the call.

    Args:
        model: The model, or a single norm layer, whose own γ is then set.
        example_inputs: The model's inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            By default a batch of two in the shape that the model's first layer takes; for images 224×224 pixels, then
            other usual sizes. If the forward pass on `meta` fails, for example because the model branches on values, a
            copy of the model runs on `example_inputs` themselves, which must then be on the model's device.
        strict: Raises if no norm is found.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `strict` is set and no norm is found; or the model has TorchScript modules, or lazy modules that
            have not run yet.
        RuntimeError: The model cannot be copied, or the copy cannot run. A refused call changes nothing.

    Warns:
        UserWarning: No norm was found (only `zero_gamma_` warns of this); or a norm that ends a branch, or may end one,
            was left alone. Reasons: the other side of the addition has as many layers; the norm's output or its γ is
            also used elsewhere; γ is frozen (`requires_grad=False`); a parameter that scales the norm has zeros, and a
            product of two zeros has no gradient; the norm is inside a branch whose last norm is set.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1, zero γ; the idea
    is from "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 5.1.

    Example:
        ```python
        import torch
        from torch import nn
        from fused_tricks import zero_gamma_

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

            def forward(self, x):
                return torch.relu(x + self.branch(x))

        block = zero_gamma_(Block())
        assert block.branch[1].weight.eq(0).all()
        ```
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
            f"zero_gamma_ changes nothing: {nothing}; remove the call, or pass strict=True to get an error",
            stacklevel=2,
        )
    with torch.no_grad():
        for gamma in found.gammas.values():
            gamma.zero_()
    return model


def zero_gamma_names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    """Returns the names of the norm layers that `zero_gamma_` would set, in the order of `model.named_modules()`.

    `model.get_submodule(name)` returns the layer. The name is `""` if `model` itself is the norm layer.

    Args:
        model: The model, or a single norm layer.
        example_inputs: The model's inputs, as in `zero_gamma_`.

    Returns:
        The names; empty if no norm is found.

    Raises:
        TypeError: `model` is not a module.
        ValueError: The model has TorchScript modules, or lazy modules that have not run yet.
        RuntimeError: The model cannot be copied, or the copy cannot run.

    Warns:
        UserWarning: A norm that ends a branch, or may end one, would be left alone.

    Source: as `zero_gamma_`.

    Example:
        ```python
        import torch
        from torch import nn
        from fused_tricks import zero_gamma_names

        assert zero_gamma_names(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))) == []
        assert zero_gamma_names(nn.BatchNorm2d(3)) == [""]
        ```
    """
    found = find(model, example_inputs)
    found.warn()
    return list(found.gammas)


@dataclass(frozen=True)
class Found:
    """The last norms of a model's residual branches.

    Attributes:
        gammas: The γ to set to zero, by the name of the norm layer.
        left_alone: The reason why γ stays unchanged, by the name of the norm layer.
    """

    gammas: dict[str, nn.Parameter]
    left_alone: dict[str, str]

    def describe_left_alone(self) -> str:
        """Returns the norms left alone, grouped by reason, for a message."""
        names: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(which)} ({reason})" for reason, which in names.items())

    def warn(self) -> None:
        """Warns the caller of the public function of norms left alone."""
        if self.left_alone:
            warnings.warn(f"zero γ left alone: {self.describe_left_alone()}", stacklevel=3)


def find(model: nn.Module, example_inputs: Any) -> Found:
    """Returns the last norms of the residual branches; arguments and errors are those of `zero_gamma_`."""
    check_module(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "model has TorchScript modules, which are not supported; call this before torch.jit.script"
        )
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
            reason = "a parameter that scales it has zeros, and both might stay zero"
        if reason is None:
            accepted.setdefault(norm.gamma, set()).add(norm.node)
        else:
            refused.setdefault(norm.gamma, reason)
    for leaf, norms in accepted.items():
        if graph.uses(leaf) != norms:
            refused.setdefault(leaf, "its γ is also used elsewhere")
        elif not run.original(leaf).requires_grad:
            refused.setdefault(leaf, "its γ is frozen (requires_grad=False) and would stay zero")
    to_zero = {leaf: norms for leaf, norms in accepted.items() if leaf not in refused}
    reached = graph.nodes_with_gradients(passing_none=set().union(*to_zero.values()))
    for leaf, norms in to_zero.items():
        if reached.isdisjoint(norms):
            refused[leaf] = "it is inside a branch that begins as zero and would not receive a gradient"
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
    """True if a scale has zeros; False on `meta`, where values are unknown."""
    return not scale.is_meta and bool((scale == 0).any())
