"""The norms that `zero_gamma_` finds, in blocks of every form."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fused_tricks import zero_gamma_, zero_gamma_names

CHANNELS = 4
Forward = Callable[["Block", Tensor], object]


def conv_norm(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS))


class Block(nn.Module):
    """A stem, and parts of a residual block that `forward` puts together.

    Attributes:
        long: Two convolutions and norms; the last norm is `long.3`.
        short, other: One convolution and its norm, `short.1` and `other.1`.
    """

    def __init__(self, forward: Forward, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.long = nn.Sequential(*conv_norm(norm), *conv_norm(norm))
        self.short, self.other = conv_norm(norm), conv_norm(norm)
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.1))
        self.matrix = nn.Parameter(torch.eye(CHANNELS))
        self.zeros = nn.Parameter(torch.zeros(CHANNELS, 1, 1))
        self._forward = forward

    def forward(self, x: Tensor) -> object:
        return self._forward(self, self.stem(x))


def add_in_place(block: Block, x: Tensor) -> Tensor:
    y = block.long(x)
    y += x
    return y


def add_to_shortcut_in_place(block: Block, x: Tensor) -> Tensor:
    x += block.long(x.clone())
    return x


def add_to_view_in_place(block: Block, x: Tensor) -> Tensor:
    y = block.long(x).flatten(2)
    y += x.flatten(2)
    return y


def add_to_view_of_shortcut_in_place(block: Block, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    tokens += block.long(tokens.view_as(x).clone()).flatten(2)
    return tokens


def add_three_in_place(block: Block, x: Tensor) -> Tensor:
    y = block.short(x).flatten(2)
    y += block.other(x).flatten(2)
    y += x.flatten(2)
    return y


def excited(block: Block, x: Tensor) -> Tensor:
    y = block.long(x)
    return x + block.excite(y) * y


def excited_at_full_size(block: Block, x: Tensor) -> Tensor:
    y = block.long(x)
    return x + y * block.excite(y).expand_as(y)


def stochastic_depth(block: Block, x: Tensor) -> Tensor:
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.8
    return x + block.long(x) / 0.8 * keep


def reshaped(block: Block, x: Tensor) -> Tensor:
    y = block.long(x).flatten(2).transpose(1, 2)
    return x + y.permute(0, 2, 1).unflatten(2, x.shape[2:]).to(torch.float64).contiguous()


def same_block_twice(block: Block, x: Tensor) -> Tensor:
    x = x + block.long(x)
    return x + block.long(x)


BRANCHES: dict[str, tuple[Forward, list[str]]] = {
    "branch second": (lambda block, x: x + block.long(x), ["long.3"]),
    "branch first": (lambda block, x: block.long(x) + x, ["long.3"]),
    "activation after the addition": (lambda block, x: F.relu(x + block.long(x)), ["long.3"]),
    "+= to the branch": (add_in_place, ["long.3"]),
    "+= to the shortcut": (add_to_shortcut_in_place, ["long.3"]),
    "+= to a view of the branch": (add_to_view_in_place, ["long.3"]),
    "+= to a view of the shortcut": (add_to_view_of_shortcut_in_place, ["long.3"]),
    "+= twice to a view": (add_three_in_place, ["short.1", "other.1"]),
    "torch.add": (lambda block, x: torch.add(x, block.long(x)), ["long.3"]),
    "torch.add with alpha": (lambda block, x: torch.add(x, block.long(x), alpha=0.5), ["long.3"]),
    "sum": (lambda block, x: sum([block.long(x), x]), ["long.3"]),
    "projection": (lambda block, x: block.short(x) + block.long(x), ["long.3"]),
    "pooled projection": (lambda block, x: block.short(F.max_pool2d(x, 3, 1, 1)) + block.long(x), ["long.3"]),
    "branch without layers": (lambda block, x: x + block.short[1](F.avg_pool2d(x, 3, 1, 1)), ["short.1"]),
    "branch broadcast": (lambda block, x: x + block.long(F.adaptive_avg_pool2d(x, 1)), ["long.3"]),
    "dropout": (lambda block, x: x + F.dropout(block.long(x), 0.5), ["long.3"]),
    "channel dropout": (lambda block, x: x + F.dropout2d(block.long(x), 0.5), ["long.3"]),
    "stochastic depth": (stochastic_depth, ["long.3"]),
    "squeeze and excitation": (excited, ["long.3"]),
    "squeeze and excitation, expanded": (excited_at_full_size, ["long.3"]),
    "layer scale": (lambda block, x: x + block.scale * block.long(x), ["long.3"]),
    "constant scale": (lambda block, x: x + block.long(x) * 0.1, ["long.3"]),
    "bias after the norm": (lambda block, x: x + (block.long(x) + block.zeros), ["long.3"]),
    "reshapes and casts": (reshaped, ["long.3"]),
    "parallel branches": (lambda block, x: x + block.short(x) + block.other(x), ["short.1", "other.1"]),
    "parallel branches first": (
        lambda block, x: block.short(x) + block.other(x) + x,
        ["short.1", "other.1"],
    ),
    "one block twice": (same_block_twice, ["long.3"]),
    "checkpointed branch": (
        lambda block, x: x + checkpoint(block.long, x, use_reentrant=False),
        ["long.3"],
    ),
    "checkpointed block, reentrant": (
        lambda block, x: checkpoint(lambda y: y + block.long(y), x, use_reentrant=True),
        ["long.3"],
    ),
    "input prepared without gradients": (
        lambda block, x: F.relu(add_in_place(block, block.short(x.detach()))),
        ["long.3"],
    ),
    "projection by a product of matrices": (
        lambda block, x: F.conv2d(x, (block.matrix @ block.matrix)[:, :, None, None]) + block.long(x),
        ["long.3"],
    ),
    "sum returned and used in a sum": (
        lambda block, x: (y := x + block.short(x), y + block.long(x)),
        ["long.3", "short.1"],
    ),
    "several outputs": (lambda block, x: {"out": [(x + block.long(x),)], "stem": x}, ["long.3"]),
}

NOTHING: dict[str, Forward] = {
    "no addition": lambda block, x: block.long(x),
    "norm before a ReLU": lambda block, x: x + F.relu(block.long(x)),
    "norm before a ReLU in place": lambda block, x: x + F.relu_(block.long(x)),
    "norm before a SiLU": lambda block, x: x + F.silu(block.long(x)),
    "norm before a clamp": lambda block, x: x + block.long(x).clamp(min=0),
    "norm before a written-out SiLU": lambda block, x: x + (lambda y: y * torch.sigmoid(y))(block.long(x)),
    "norm before a ReLU by its mask": lambda block, x: x + (lambda y: y * (y > 0))(block.long(x)),
    "norm squared": lambda block, x: x + (lambda y: y * y)(block.long(x)),
    "norm times its ReLU": lambda block, x: x + (lambda y: y * F.relu(y))(block.long(x)),
    "gate that can be zero": lambda block, x: x + (lambda y: y * F.relu(block.excite[:2](y)))(block.long(x)),
    "divided by a norm": lambda block, x: x + torch.ones_like(x.detach()) / block.long(x),
    "shortcut from a norm": lambda block, x: (y := block.short(x)) + F.avg_pool2d(y, 3, 1, 1),
    "pre-activation": lambda block, x: x + block.short[0](F.relu(block.short[1](x))),
    "convolution last": lambda block, x: x + block.long[2](block.long[:2](x)),
    "branch without gradients": lambda block, x: x + block.long(x).detach(),
    "addition to a part of a view": lambda block, x: _add_to_part(block.long(x).flatten(2), x.flatten(2)),
    "concatenation": lambda block, x: torch.cat([x, block.long(x)], dim=1),
    "same tensor twice": lambda block, x: (lambda y: y + y)(block.long(x)),
    "two inputs without a fork": lambda block, x: block.scale + block.long(x),
}


def _add_to_part(tensor: Tensor, other: Tensor) -> Tensor:
    tensor[:, :2] += other[:, :2]
    return tensor


LEFT_ALONE: dict[str, tuple[Forward, list[str], str]] = {
    "as many layers on both sides": (
        lambda block, x: block.short(x) + block.other(x),
        ["short.1", "other.1"],
        "as many convolutions and linear layers lead to the other side of the addition",
    ),
    "output used elsewhere": (
        lambda block, x: (x + (y := block.long(x)), block.short(y)),
        ["long.3"],
        "its output is also used elsewhere",
    ),
    "output returned": (
        lambda block, x: (x + (y := block.long(x)), y),
        ["long.3"],
        "its output is also used elsewhere",
    ),
    "γ used outside of a branch": (
        lambda block, x: (y := block.long(x)) + block.long(y),
        ["long.3"],
        "its γ is also used elsewhere",
    ),
    "γ used as a number": (
        lambda block, x: (x + block.long(x)) * block.long[3].weight.sum(),
        ["long.3"],
        "its γ is also used elsewhere",
    ),
    "scale with a zero": (
        lambda block, x: x + block.zeros * block.long(x),
        ["long.3"],
        "a parameter that has zeros scales its output, and both might stay zero",
    ),
    "gate by a parameter of zero": (
        lambda block, x: x + block.zeros.tanh() * block.long(x),
        ["long.3"],
        "a parameter that has zeros scales its output, and both might stay zero",
    ),
    "branch inside a branch": (
        lambda block, x: x + block.short(F.relu(x + block.long(x))),
        ["long.3"],
        "it is inside a branch whose last γ is zero, and its own γ would get no gradient",
    ),
}


@pytest.mark.parametrize("form", BRANCHES)
def test_the_last_norm_of_each_branch_is_found(form: str) -> None:
    forward, expected = BRANCHES[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zero_gamma_names(Block(forward)) == expected


@pytest.mark.parametrize("form", BRANCHES)
def test_every_zeroed_gamma_gets_a_gradient(form: str) -> None:
    torch.manual_seed(0)
    forward, expected = BRANCHES[form]
    model = zero_gamma_(Block(forward))
    output = model(torch.randn(8, 3, 6, 6))
    outputs = tree_leaves(output)
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    for name in expected:
        gamma = model.get_submodule(name).weight
        assert gamma.count_nonzero() == 0
        assert gamma.grad.count_nonzero() == CHANNELS


@pytest.mark.parametrize("form", NOTHING)
def test_nothing_is_found_where_no_branch_ends_in_a_norm(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zero_gamma_names(Block(NOTHING[form])) == []


@pytest.mark.parametrize("form", LEFT_ALONE)
def test_a_doubtful_norm_is_left_alone_and_reported(form: str) -> None:
    forward, names, reason = LEFT_ALONE[form]
    model = Block(forward)
    with pytest.warns(UserWarning, match=re.escape(f"left alone: {', '.join(names)} ({reason})")):
        zero_gamma_(model)
    assert all(model.get_submodule(name).weight.eq(1).all() for name in names)


@pytest.mark.parametrize("find", [zero_gamma_, zero_gamma_names])
def test_the_warning_points_at_the_caller(find: Callable[[nn.Module], object]) -> None:
    with pytest.warns(UserWarning) as caught:
        find(Block(LEFT_ALONE["output returned"][0]))
    assert [warning.filename for warning in caught] == [__file__]


NORMS = [
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    partial(nn.InstanceNorm2d, affine=True),
    partial(nn.GroupNorm, 2),
]


@pytest.mark.parametrize("norm", NORMS, ids=["BatchNorm", "SyncBatchNorm", "InstanceNorm", "GroupNorm"])
@pytest.mark.parametrize("form", ["branch second", "+= to the branch", "squeeze and excitation"])
def test_a_branch_may_end_in_any_norm(norm: Callable[[int], nn.Module], form: str) -> None:
    forward, expected = BRANCHES[form]
    assert zero_gamma_names(Block(forward, norm)) == expected


def test_a_branch_may_end_in_a_layer_norm() -> None:
    model = Block(lambda block, x: x + block.norm(block.long(x)))
    model.norm = nn.LayerNorm(224)
    assert zero_gamma_names(model) == ["norm"]


@pytest.mark.parametrize("norm", [partial(nn.BatchNorm2d, affine=False), nn.InstanceNorm2d])
def test_a_norm_without_gamma_is_not_listed(norm: Callable[[int], nn.Module]) -> None:
    assert zero_gamma_names(Block(BRANCHES["branch second"][0], norm)) == []


def test_a_gamma_shared_by_two_norms_is_set_when_both_end_a_branch() -> None:
    model = Block(lambda block, x: (y := F.relu(x + block.short(x))) + block.other(y))
    model.other[1].weight = model.short[1].weight
    assert zero_gamma_names(model) == ["short.1", "other.1"]


def test_a_gamma_shared_with_a_norm_elsewhere_is_left_alone() -> None:
    model = Block(lambda block, x: x + block.short(F.relu(block.other(x))))
    model.other[1].weight = model.short[1].weight
    with pytest.warns(UserWarning, match=r"short\.1, other\.1 \(its γ is also used elsewhere"):
        assert zero_gamma_names(model) == []


def test_a_frozen_gamma_is_left_alone() -> None:
    model = Block(BRANCHES["parallel branches"][0])
    model.short[1].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"short\.1 \(its γ is frozen \(requires_grad=False\)"):
        assert zero_gamma_names(model) == ["other.1"]


def test_frozen_layers_do_not_hide_a_branch() -> None:
    model = Block(BRANCHES["projection"][0])
    for name, param in model.named_parameters():
        param.requires_grad_(name == "long.3.weight")
    assert zero_gamma_names(model) == ["long.3"]


def test_a_branch_over_the_input_itself_is_found() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = conv_norm()

        def forward(self, x: Tensor) -> Tensor:
            x += self.branch(x)
            return x

    assert zero_gamma_names(Network()) == ["branch.1"]


def test_a_branch_over_embeddings_is_found() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, CHANNELS)
            self.branch = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 1), nn.BatchNorm1d(CHANNELS))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens).transpose(1, 2)
            return x + self.branch(x)

    assert zero_gamma_names(Network(), torch.zeros(2, 5, dtype=torch.long)) == ["branch.1"]


def test_two_inputs_without_a_fork_have_no_branch() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_norm = conv_norm()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.conv_norm(y)

    assert zero_gamma_names(Network(), (torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8))) == []


def test_the_names_are_in_the_order_of_the_modules() -> None:
    model = Block(lambda block, x: (y := F.relu(x + block.other(x))) + block.short(y))
    assert zero_gamma_names(model) == ["short.1", "other.1"]


def test_only_the_gammas_found_are_set() -> None:
    model = Block(BRANCHES["projection"][0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert zero_gamma_(model) is model
    before["long.3.weight"].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3)])
def test_a_single_norm_layer_is_the_one_that_is_set(norm: nn.Module) -> None:
    assert zero_gamma_names(norm) == [""]
    assert zero_gamma_(norm, strict=True) is norm
    assert norm.weight.count_nonzero() == 0


def test_a_container_of_one_norm_has_no_branch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert zero_gamma_names(model) == []


@pytest.mark.parametrize(
    "model", [Block(NOTHING["norm before a ReLU"]), nn.Linear(3, 3), nn.BatchNorm2d(3, affine=False)]
)
def test_a_model_in_which_nothing_is_found_is_warned_of_at_the_callers_line(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"changes nothing: {type(model).__name__} has no norm") as caught:
        assert zero_gamma_(model) is model
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "model, message",
    [
        (
            Block(NOTHING["norm before a ReLU"]),
            "^Block has no norm .* at the end of a residual branch; remove the call",
        ),
        (
            Block(LEFT_ALONE["output returned"][0]),
            r"the end of a residual branch; left alone: long\.3 \(its output",
        ),
        (nn.BatchNorm2d(3, affine=False), "BatchNorm2d has no norm"),
    ],
)
def test_strict_refuses_a_model_without_a_branch_to_zero(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_gamma_(model, strict=True)
