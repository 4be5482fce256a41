"""`zero_gamma_` on timm's ResNet-like networks, compared with timm's own zeros and with its blocks."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm, of the extra integrations, is not installed")
import timm
from timm.layers import BatchNormAct2d
from timm.models import _efficientnet_blocks as blocks

from benchmarks.lib.weightless import weightless
from fused_tricks import zero_gamma_names

pytestmark = pytest.mark.slow

# timm initialises γ = 0 in these networks, by a rule of each family.
INITIALISED_BY_TIMM = [
    "cspresnet50",
    "ecaresnet26t",
    "gcresnet33ts",
    "gernet_s",
    "levit_128s",
    "levit_conv_128s",
    "mobilevit_xs",
    "regnetx_002",
    "regnety_004",
    "res2net50_26w_4s",
    "res2next50",
    "resnest26d",
    "resnet18",
    "resnet33ts",
    "resnet50_gn",
    "resnet50d",
    "resnetblur18",
    "resnetrs50",
    "seresnet18",
    "seresnext26t_32x4d",
    "swinv2_cr_tiny_224",
]
INVERTED_RESIDUALS = [
    "efficientnet_b0",
    "efficientnet_b0_gn",
    "efficientnet_es",
    "fbnetc_100",
    "mixnet_s",
    "mnasnet_050",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "tf_efficientnetv2_b0",
]
# The branches of these networks end in a norm with an activation inside.
ACTIVE_BEFORE_THE_ADDITION = ["cs3darknet_s", "cspdarknet53", "darknet21", "sedarknet21", "ese_vovnet19b_dw"]

# Networks of other kinds; FUSED_TRICKS_ALL_MODELS=1 runs every model of timm.
TRIED = [
    "botnet26t_256",
    "convnextv2_atto",
    "dla34",
    "efficientformerv2_s0",
    "hrnet_w18_small",
    "naflexvit_base_patch16_gap",
]
if os.environ.get("FUSED_TRICKS_ALL_MODELS") == "1":
    TRIED = timm.list_models()


def build(name: str) -> nn.Module:
    with weightless():
        return timm.create_model(name)


def names(model: nn.Module) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return zero_gamma_names(model)


@pytest.mark.parametrize("name", INITIALISED_BY_TIMM)
def test_the_norms_found_are_those_that_timm_sets_to_zero(name: str) -> None:
    model = build(name)
    zeroed = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.GroupNorm | nn.LayerNorm)
        and module.weight.count_nonzero() == 0
    ]
    assert zeroed
    assert names(model) == zeroed


@pytest.mark.parametrize("name", INVERTED_RESIDUALS)
def test_the_norms_found_are_those_that_end_inverted_residuals(name: str) -> None:
    model = build(name)
    last = {blocks.DepthwiseSeparableConv: "bn2", blocks.EdgeResidual: "bn2", blocks.InvertedResidual: "bn3"}
    expected = [
        f"{block_name}.{last[type(block)]}"
        for block_name, block in model.named_modules()
        if type(block) in last and block.has_skip
    ]
    assert expected
    assert names(model) == expected


@pytest.mark.parametrize("name", ["skresnet18", "skresnet50"])
def test_selective_kernels_do_not_hide_a_branch(name: str) -> None:
    model = build(name)
    last = "conv3.bn" if name == "skresnet50" else "conv2.bn"
    assert names(model) == [
        block for block, _ in model.named_modules() if block.startswith("layer") and block.endswith(last)
    ]


@pytest.mark.parametrize("name", ACTIVE_BEFORE_THE_ADDITION)
def test_a_norm_with_an_activation_inside_is_never_found(name: str) -> None:
    assert names(build(name)) == []


@pytest.mark.parametrize("active", [True, False])
def test_a_fused_norm_is_found_when_its_activation_is_the_identity(active: bool) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn = BatchNormAct2d(4, apply_act=active)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.bn(self.conv(x))

    assert names(Residual()) == ([] if active else ["bn"])


@pytest.mark.parametrize("name", TRIED)
def test_no_model_is_too_much(name: str) -> None:
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero_gamma_names(model, torch.empty(2, *model.pretrained_cfg["input_size"], device="meta"))
