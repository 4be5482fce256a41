"""`zero_gamma_` on every classification model of torchvision, compared with the models' own classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision has the networks")
from torchvision import models
from torchvision.models import mnasnet, regnet, resnet, swin_transformer
from torchvision.ops import StochasticDepth

from benchmarks.lib.weightless import weightless
from fused_tricks import zero_gamma_, zero_gamma_names

pytestmark = pytest.mark.slow

NAMES = models.list_models(models)
WITH_FLAG = [name for name in NAMES if "resne" in name]


def build(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # the initialisation takes seconds
    with weightless():
        return models.get_model(name, **options)


def last_norms(model: nn.Module) -> Iterator[str]:
    """Yields the last norm of every residual branch, by the classes of torchvision's blocks."""
    for name, block in model.named_modules():
        if isinstance(block, resnet.BasicBlock):
            yield f"{name}.bn2"
        elif isinstance(block, resnet.Bottleneck):
            yield f"{name}.bn3"
        elif isinstance(block, regnet.ResBottleneckBlock):
            yield f"{name}.f.c.1"
        elif isinstance(block, mnasnet._InvertedResidual) and block.apply_residual:
            yield f"{name}.layers.7"
        elif isinstance(block, swin_transformer.SwinTransformerBlockV2):
            yield from (f"{name}.norm1", f"{name}.norm2")
        elif getattr(block, "use_res_connect", False):  # MobileNets and EfficientNets
            layers = [(n, m) for n, m in block.named_modules() if not isinstance(m, StochasticDepth)]
            last, layer = layers[-1]
            if isinstance(layer, nn.BatchNorm2d):
                yield f"{name}.{last}"


def test_all_classification_models_are_tried() -> None:
    assert len(NAMES) >= 80
    assert len(WITH_FLAG) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_the_norms_found_are_those_that_end_the_residual_blocks(name: str) -> None:
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zero_gamma_names(model) == list(last_norms(model))


def norm_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize("name", WITH_FLAG)
def test_the_result_is_that_of_zero_init_residual(name: str) -> None:
    weights = norm_weights(zero_gamma_(build(name)))
    expected = norm_weights(build(name, zero_init_residual=True))
    assert any(weight.count_nonzero() == 0 for weight in expected.values())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[norm], expected[norm]) for norm in expected)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5"]
)
def test_one_backward_pass_gives_every_zeroed_gamma_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name)
    names = zero_gamma_names(model)
    zero_gamma_(model)
    output = model(torch.randn(4, 3, 64, 64))
    (output * torch.randn_like(output)).sum().backward()
    for gamma in (model.get_submodule(norm).weight for norm in names):
        assert gamma.count_nonzero() == 0
        assert gamma.grad.count_nonzero() > 0.9 * gamma.numel()
