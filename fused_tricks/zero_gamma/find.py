"""Zero γ: residual blocks that start training as their shortcut."""

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

    With β = 0, every residual block then starts as its shortcut, and the network first trains like a shallower network.

    The branches are found in the autograd graph of one forward pass of a copy of the model, whatever the class of the
    model. The terms of an addition are compared by the number of convolutions and linear layers that lead to each. A
    term with more layers is a branch, and a term with fewer layers is the shortcut. With equal numbers, a
    term that depends on the other term is a branch.

    γ is set if the branch ends in a BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm or LayerNorm, whose γ is the
    `weight` of the layer. Between this norm and the addition there may only be reshapes, casts, dropout, stochastic
    depth, gates by a sigmoid (squeeze and excitation), scales (layer scale), and additions of constants or parameters.
    A norm before an activation is never set: before a ReLU, a γ of zero would never get a gradient.

    The model itself is not moved, cast or run. The model may be on any device, in any precision and in any mode. The
    copy is on the `meta` device. Call this function after loading the weights of the model, and before
    `torch.jit.script` or sharding. `DataParallel`, `DistributedDataParallel` and `torch.compile` may come before or
    after this call.

    Args:
        model: The model. If `model` itself is a norm layer, its γ is set.
        example_inputs: The arguments of the model: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. If a forward pass on `meta` fails, for example because control flow depends on data, a copy of
            the model runs on the given values, which must then be on the model's device. None means batches of two
            inputs for the first convolution or, without one, for the first linear layer. Images of 224×224 pixels are
            tried first, then other usual sizes, then images with 3 channels.
        strict: True to raise an error if no γ can be set.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: No γ can be set, with `strict`. Or the model has TorchScript modules, or lazy modules that have not
            run yet.
        RuntimeError: The copy could not be made or run. After any error, the model is unchanged.

    Warns:
        UserWarning: No γ can be set. Or the γ of a norm that ends, or may end, a branch is unchanged, for one of these
            reasons: as many layers lead to the other side of the addition; the output or γ is also used elsewhere; γ
            is frozen (`requires_grad=False`); a parameter that has zeros scales the output, and a product of two zeros
            has no gradient; the norm is deeper inside a branch whose last norm is set.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1, zero γ; the idea
    is from "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 5.1.

    Example:
        ```python
        from torch import nn
        from fused_tricks import zero_gamma_


        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

            def forward(self, x):
                return x + self.branch(x)


        model = zero_gamma_(nn.Sequential(Block(), Block()))
        assert model[0].branch[1].weight.count_nonzero() == 0
        ```
    """
    found = find(model, example_inputs)
    if found.gammas:
        found.warn()
    else:
        left_alone = f"; left alone: {found.describe_left_alone()}" if found.left_alone else ""
        nothing = f"{type(model).__name__} has no norm whose γ may be zero at the end of a residual branch{left_alone}"
        if strict:
            raise ValueError(f"{nothing}; remove the call, or pass strict=False")
        warnings.warn(
            f"zero_gamma_ changes nothing: {nothing}; remove the call, or pass strict=True for an error in its place",
            stacklevel=2,
        )
    with torch.no_grad():
        for gamma in found.gammas.values():
            gamma.zero_()
    return model


def zero_gamma_names(model: nn.Module, example_inputs: Any = None) -> list[str]:
    """Returns the names of the norm layers that `zero_gamma_` would set, in the order of `model.named_modules()`.

    `model.get_submodule(name)` returns the layer. If `model` itself is a norm layer, the name is `""`.

    Args:
        model: The model, as for `zero_gamma_`. The model is unchanged.
        example_inputs: The arguments of the model, as for `zero_gamma_`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: The model has TorchScript modules, or lazy modules that have not run yet.
        RuntimeError: A copy of the model could not be made or run.

    Warns:
        UserWarning: `zero_gamma_` would leave the γ of a norm that ends, or may end, a branch unchanged.

    Example:
        ```python
        from torch import nn
        from fused_tricks import zero_gamma_names


        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

            def forward(self, x):
                return x + self.branch(x)


        assert zero_gamma_names(Block()) == ["branch.1"]
        ```
    """
    found = find(model, example_inputs)
    found.warn()
    return list(found.gammas)


@dataclass(frozen=True)
class Found:
    """The result of the search for last norms in a model.

    Attributes:
        gammas: The γ to set to zero, by the name of the norm layer.
        left_alone: The reason to leave γ unchanged, by the name of a norm layer that ends, or may end, a branch.
    """

    gammas: dict[str, nn.Parameter]
    left_alone: dict[str, str]

    def describe_left_alone(self) -> str:
        """Returns the names of the norm layers in `left_alone`, grouped by reason."""
        names: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(which)} ({reason})" for reason, which in names.items())

    def warn(self) -> None:
        """Warns of `left_alone` at the line that calls the public function."""
        if self.left_alone:
            warnings.warn(f"zero γ left alone: {self.describe_left_alone()}", stacklevel=3)


def find(model: nn.Module, example_inputs: Any) -> Found:
    """Finds the last norms of the residual branches of `model`. Raises the errors of `zero_gamma_names`."""
    check_module(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "model has TorchScript modules, whose graph cannot be read; call this before torch.jit.script"
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
            reason = "a parameter that has zeros scales its output, and both might stay zero"
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
            refused[leaf] = "it is inside a branch whose last γ is zero, and its own γ would get no gradient"
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
    """True if `scale` has a zero. A tensor on `meta` has no values and counts as a tensor without zeros."""
    return not scale.is_meta and bool((scale == 0).any())
