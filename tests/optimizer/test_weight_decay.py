"""`decay_groups`: the rule of `bias_decay=False` for other optimizers, with no parameter lost, doubled or renamed."""

from __future__ import annotations

import inspect
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from fused_tricks import FusedSGD, decay_groups
from support.comparison import assert_same_bits, wide_range


class Network(nn.Module):
    """Parameters of zero to four dimensions, attention, embeddings, tied, frozen and parametrized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.position = nn.Parameter(torch.ones(1, 3, 4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        self.again = self.conv


UNDECAYED = {
    "temperature",
    "conv.bias",
    "bn.weight",
    "bn.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "head.bias",
    "frozen.bias",
    "normed.bias",
}


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}], ids=str
)
def test_torch_sgd_over_these_groups_equals_fused_sgd_without_bias_decay_bit_for_bit(
    backend, device, options
):
    torch.manual_seed(0)
    model = Network()
    reference = deepcopy(model)
    model.to(device)
    optimizer = FusedSGD(model.parameters(), lr=0.05, weight_decay=0.1, backend=backend, **options)
    expected = torch.optim.SGD(decay_groups(reference, 0.1), lr=0.05, foreach=False, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            other.grad = wide_range(param.shape, generator)
            param.grad = other.grad.to(device)
        optimizer.step()
        expected.step()
    for (name, param), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_same_bits(param.cpu(), other, name)


def test_fused_sgd_decays_by_these_groups_as_it_does_without(backend, device):
    torch.manual_seed(0)
    model = Network().to(device).half()
    grouped = deepcopy(model)
    optimizers = [
        FusedSGD(model.parameters(), lr=0.05, weight_decay=0.1, backend=backend),
        FusedSGD(decay_groups(grouped, 0.1), lr=0.05, bias_decay=True, backend=backend),
    ]
    for param in (*model.parameters(), *grouped.parameters()):
        param.grad = torch.ones_like(param)
    for optimizer in optimizers:
        optimizer.step()
    for (name, param), other in zip(model.named_parameters(), grouped.parameters(), strict=True):
        assert_same_bits(param, other, name)


def test_every_parameter_is_in_one_group_under_its_name_in_the_models_order():
    model = Network()
    groups = decay_groups(model, 0.1)
    named = dict(model.named_parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert names(groups) == [[n for n in named if n not in UNDECAYED], [n for n in named if n in UNDECAYED]]
    assert all(param is named[name] for group in groups for name, param in group["params"])


def test_without_names_the_groups_have_the_parameters_alone():
    model = Network()
    bare = [group["params"] for group in decay_groups(model, 0.1, named=False)]
    pairs = [group["params"] for group in decay_groups(model, 0.1)]
    assert all(
        a is b for one, other in zip(bare, pairs, strict=True) for a, (_, b) in zip(one, other, strict=True)
    )


OPTIMIZERS = [
    cls
    for cls in vars(torch.optim).values()
    if inspect.isclass(cls) and "weight_decay" in inspect.signature(cls).parameters
]


@pytest.mark.parametrize("cls", [*OPTIMIZERS, FusedSGD], ids=lambda cls: cls.__name__)
def test_every_optimizer_of_torch_takes_the_groups_and_keeps_the_names(cls):
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=cls.__name__ != "Muon")  # Muon updates matrices only
    groups = decay_groups(model, 0.1)
    expected = names(groups)
    optimizer = cls(groups, lr=0.1)
    model.weight.square().sum().backward()
    optimizer.step()
    assert [group["param_names"] for group in optimizer.param_groups] == expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0][: len(expected)]


@pytest.mark.parametrize("model, decays", [(nn.BatchNorm1d(2), 0.0), (nn.Linear(2, 2, bias=False), 0.1)])
def test_a_group_that_would_be_empty_is_left_out(model, decays):
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [decays]
    torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize(
    "exclude, more",
    [
        ("position", ["position"]),
        (["*.bias_[kv]", "conv.weight"], ["attention.bias_k", "attention.bias_v", "conv.weight"]),
        ("embedding.*", ["embedding.weight"]),
        ("head.weight", ["embedding.weight"]),
        ("again.weight", ["conv.weight"]),
        ("*.bias", []),
        ((), []),
    ],
    ids=str,
)
def test_patterns_exclude_more_parameters_by_any_of_their_names(exclude, more):
    undecayed = names(decay_groups(Network(), 0.1, exclude))[1]
    assert set(undecayed) == UNDECAYED.union(more)


def test_a_frozen_parameter_trains_once_it_is_unfrozen():
    model = nn.Linear(2, 2, bias=False).requires_grad_(False)
    optimizer = torch.optim.SGD(decay_groups(model, 0.5), lr=1.0)
    before = model.weight.detach().clone()
    model.requires_grad_(True)
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before - 0.5 * before)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, r"model must be a torch\.nn\.Module, got list"),
        ({"model": nn.LazyLinear(2)}, ValueError, "parameter weight has no shape yet"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a number, got '0.1'"),
        ({"weight_decay": True}, TypeError, "weight_decay must be a number, got True"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0, got -0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite and at least 0, got nan"),
        ({"exclude": ["*.bias", "*.gamma"]}, ValueError, r"exclude: '\*\.gamma' matches no name"),
        ({"exclude": [nn.Linear]}, TypeError, "exclude must contain name patterns, got <class"),
        ({"exclude": 3}, TypeError, "exclude must be one or several name patterns, got 3"),
    ],
)
def test_a_bad_argument_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        decay_groups(**{"model": Network(), "weight_decay": 0.1, **arguments})
