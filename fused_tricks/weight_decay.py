"""Parameter groups without decay of biases and norms, for any optimizer."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .validation import check_module, real


def decay_groups(
    model: nn.Module, weight_decay: float, exclude: str | Iterable[str] = (), *, named: bool = True
) -> list[dict[str, Any]]:
    """Returns the parameter groups of "no bias decay", for any optimizer of `torch.optim`.

    Parameters of one dimension or fewer are not decayed; all others are. `FusedSGD` has the same rule by itself, with
    `bias_decay=False`, and needs no groups. The rule reads shapes only: biases and the γ and β of norms are not
    decayed. Embeddings are decayed, and so are `bias_k` and `bias_v` of `nn.MultiheadAttention`, which have three
    dimensions, unless `exclude` names them.

    Args:
        model: The model whose parameters are grouped.
        weight_decay: The decay of the decayed parameters; finite, zero or more.
        exclude: Name patterns of other parameters that are not decayed: one or several, matched as in `fnmatch`,
            case-sensitive, against whole names of `model.named_parameters()`; `*` matches dots too. Any name of a
            shared parameter excludes the parameter.
        named: True lists `(name, parameter)` pairs, which every `torch.optim.Optimizer` keeps as
            `group["param_names"]`. False lists bare parameters, for optimizers that take no names.

    Returns:
        A group with `weight_decay` and a group with 0, without an empty one. Each parameter is in one group, once
        however many modules share it. Frozen parameters are included, because they may be unfrozen later. The order
        within a group is that of `model.named_parameters()`.

    Raises:
        TypeError: An argument has another type.
        ValueError: `weight_decay` is out of its range, a pattern matches no parameter, or a parameter of a lazy
            module has no shape yet.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1, no bias decay.

    Example:
        ```python
        import fused_tricks as ft
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        optimizer = torch.optim.AdamW(ft.decay_groups(model, 0.05), lr=1e-3)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
        ```
    """
    check_module(model)
    weight_decay = real("weight_decay", weight_decay, least=0.0)
    excluded = _named_by(model, (exclude,) if isinstance(exclude, str) else exclude)
    decayed: list[Any] = []
    undecayed: list[Any] = []
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(f"parameter {name} has no shape yet; run a forward pass before grouping")
        group = undecayed if param.dim() <= 1 or id(param) in excluded else decayed
        group.append((name, param) if named else param)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    # torch.optim treats an empty group as one without names, and refuses it beside a group with names.
    return [group for group in groups if group["params"]]


def _named_by(model: nn.Module, patterns: Iterable[str]) -> set[int]:
    """Returns the ids of the parameters that a pattern matches."""
    if not isinstance(patterns, Iterable):
        raise TypeError(f"exclude must be one or several name patterns, got {patterns!r}")
    named = list(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must contain name patterns, got {pattern!r}")
        matches = {id(param) for name, param in named if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(
                f"exclude: {pattern!r} matches no name of a parameter; see model.named_parameters()"
            )
        found |= matches
    return found
