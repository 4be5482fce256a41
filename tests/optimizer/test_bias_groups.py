"""Groups of biases and norms only: decayed if the group has its own weight decay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks import FusedSGD, decay_groups
from support.comparison import assert_all_same_bits, wide_range


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.ones(()))


def groups_by_kind(model: nn.Module, **decay: float) -> list[dict[str, Any]]:
    """Returns a group for each kind in `decay`, and a group without a weight decay for all other parameters."""
    kinds: dict[str, list[nn.Parameter]] = {"other": []}
    for name, param in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        kind = "norm" if isinstance(module, nn.BatchNorm2d) else "bias" if param.dim() <= 1 else "other"
        kinds.setdefault(kind if kind in decay else "other", []).append(param)
    return [
        {"params": params} | ({"weight_decay": decay[kind]} if kind in decay else {})
        for kind, params in kinds.items()
    ]


def decays(optimizer: FusedSGD) -> list[bool]:
    """Returns one value per group: True if its parameters of one dimension decay."""
    return [bool(group["bias_decay"] and group["weight_decay"]) for group in optimizer.param_groups]


def train(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for param in model.parameters():
            param.grad = wide_range(param.shape, generator).to(param.device)
        optimizer.step()
    return [param.detach().cpu() for param in model.parameters()]


@pytest.mark.parametrize(
    "decay, default",
    [
        ({"norm": 0.01, "bias": 0.3}, 1e-4),
        ({"norm": 0.0, "bias": 0.3}, 0.0),
        ({"norm": 0.3, "bias": 0.3}, 0.3),
    ],
    ids=str,
)
def test_with_groups_for_norms_and_biases_the_bits_are_those_of_sgd(backend, device, decay, default):
    torch.manual_seed(0)
    model = Network()
    reference = copy.deepcopy(model)
    model.to(device)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": default}
    expected = torch.optim.SGD(groups_by_kind(reference, **decay), foreach=False, **options)
    optimizer = FusedSGD(groups_by_kind(model, **decay), backend=backend, **options)
    assert_all_same_bits(train(optimizer, model), train(expected, reference))


def test_biases_in_a_group_that_mixes_stay_undecayed(backend, device):
    torch.manual_seed(0)
    model = Network().to(device)
    reference = copy.deepcopy(model)
    optimizer = FusedSGD(
        [{"params": model.parameters(), "weight_decay": 0.1}], lr=0.1, momentum=0.9, backend=backend
    )
    expected = FusedSGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    assert decays(optimizer) == [False]
    assert_all_same_bits(train(optimizer, model), train(expected, reference))


def _named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{index}", param) for index, param in enumerate(params)]


def _generated(params: list[nn.Parameter]) -> Iterator[nn.Parameter]:
    yield from params


@pytest.mark.parametrize("given", [list, tuple, _named, _generated, lambda params: params[0]])
@pytest.mark.parametrize("decay", [0.1, torch.tensor(0.1)], ids=str)
def test_it_holds_however_the_parameters_are_given(given, decay):
    group = {
        "params": given([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))]),
        "weight_decay": decay,
    }
    assert decays(FusedSGD([group], lr=0.1)) == [True]


def test_it_holds_for_a_group_that_is_added_later():
    optimizer = FusedSGD([nn.Parameter(torch.ones(3, 3))], lr=0.1, weight_decay=0.2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.1})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert decays(optimizer) == [False, True, False]


@pytest.mark.parametrize(
    "group, options",
    [
        ({"weight_decay": 0.1, "bias_decay": False}, {}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.1}),
        ({"weight_decay": 0}, {}),
        ({"lr": 0.2}, {"weight_decay": 0.1}),
        ({}, {"weight_decay": 0.1}),
    ],
    ids=str,
)
def test_other_groups_of_biases_stay_undecayed(group, options):
    groups = [{"params": [nn.Parameter(torch.ones(3))], **group}]
    assert FusedSGD(groups, lr=0.1, **options).param_groups[0]["bias_decay"] is False


def test_the_groups_of_decay_groups_and_an_empty_group_stay_as_they_are():
    assert decays(FusedSGD(decay_groups(Network(), 0.1), lr=0.1)) == [False, False]
    assert decays(FusedSGD([{"params": [], "weight_decay": 0.1}], lr=0.1)) == [False]


def test_a_checkpoint_decides_where_it_says_so_and_the_group_where_it_does_not():
    groups = [{"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.1}]
    optimizer = FusedSGD(groups, lr=0.1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(
        torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1).state_dict()
    )
    assert decays(optimizer) == [True]
    saved["param_groups"][0]["bias_decay"] = False  # as in a checkpoint of a run without bias decay
    optimizer.load_state_dict(saved)
    assert decays(optimizer) == [False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_decays_what_the_original_does(copied):
    group = {"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.1}
    assert decays(copied(FusedSGD([group], lr=0.1))) == [True]
