"""A run of FlashOptim, continued with FusedSGD. Without a GPU, FlashOptim has FP32 weights and momentum only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support.comparison import assert_same_bits, gradients, parameters, set_gradients

flashoptim = pytest.importorskip(
    "flashoptim", reason="needs FlashOptim: pip install fused_tricks[integrations]"
)

pytestmark = pytest.mark.integration

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def flash(params: list[Parameter], **options: Any) -> torch.optim.Optimizer:
    return flashoptim.FlashSGD(
        params,
        quantize=False,
        fused=False,
        master_weight_bits=None,
        compress_state_dict=False,
        **{**OPTIONS, **options},
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_goes_on_from_its_state_as_with_itself(nesterov: bool) -> None:
    params, expected = parameters([(5,), (4, 3)]), parameters([(5,), (4, 3)])
    first, whole = flash(params, nesterov=nesterov), flash(expected, nesterov=nesterov)
    second = FusedSGD(params, bias_decay=True, nesterov=nesterov, **{**OPTIONS, "lr": 0.9})
    for step, grads in enumerate(gradients(params, 6)):
        if step == 3:
            second.load_state_dict(first.state_dict())
        for optimizer, of in ((first if step < 3 else second, params), (whole, expected)):
            set_gradients(of, grads)
            optimizer.step()
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_it_applies_dampening_to_the_first_step() -> None:
    params = parameters([(5,)])
    optimizer = flash(params, dampening=0.5, weight_decay=0.0)
    set_gradients(params, [torch.ones(5)])
    optimizer.step()
    assert_same_bits(optimizer.state_dict()["state"][0]["momentum_buffer"], torch.full((5,), 0.5))
