"""No bias decay for any optimizer: parameter groups that leave biases and norms undecayed."""

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

    Parameters of one dimension or fewer are not decayed, all others are: the rule of `FusedSGD`'s
    `bias_decay=False`, which needs no groups. It looks at the shape alone: biases and norms' γ and β are undecayed;
    embeddings are decayed, and so are `bias_k` and `bias_v` of `nn.MultiheadAttention`, which have three
    dimensions, unless `exclude` names them.

        optimizer = torch.optim.AdamW(decay_groups(model, 0.05, exclude="*embedding*"), lr=1e-3)

    Args:
        model: the model whose parameters are grouped.
        weight_decay: of the parameters that are decayed; finite, zero or more.
        exclude: name patterns of more parameters that are not decayed: one or several, as in `fnmatch`,
            case-sensitive, against the whole name in `model.named_parameters()` (`*` matches dots too). A
            shared parameter is excluded by any of its names.
        named: list `(name, parameter)` pairs, which every `torch.optim.Optimizer` keeps as
            `group["param_names"]`; False lists bare parameters, for optimizers that take no names.

    Returns:
        A group with `weight_decay` and one with 0, or only the one that is not empty. Each parameter is in one of
        them, once however many modules share it, and also where it is frozen: it may be unfrozen later. Within a
        group the order is that of `model.named_parameters()`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: `weight_decay` is out of its range, a pattern matches no parameter, or a parameter of a lazy
            module has no shape yet.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1, no bias decay.
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
    # torch.optim takes an empty group for one without names, and refuses it beside one with names.
    return [group for group in groups if group["params"]]


def _named_by(model: nn.Module, patterns: Iterable[str]) -> set[int]:
    """The ids of the parameters that a pattern matches."""
    if not isinstance(patterns, Iterable):
        raise TypeError(f"exclude takes name patterns, got {patterns!r}")
    named = list(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude takes name patterns, got {pattern!r}")
        matches = {id(param) for name, param in named if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(
                f"exclude: no parameter's name matches {pattern!r}; see model.named_parameters()"
            )
        found |= matches
    return found
