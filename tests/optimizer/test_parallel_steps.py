"""Steps whose loops run on several threads, and optimizers of several threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support import backends
from support.comparison import assert_all_same_bits, copies, gradients, parameters, set_gradients

# More elements than one thread updates alone, with partial last chunks.
SIZES = [(70_001,), (257, 129), (32_768,), (5,)]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "loss_scale": 8.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_parameters_get_the_reference_values_on_several_threads(dtype) -> None:
    params = parameters(SIZES, [dtype] * len(SIZES))
    expected = copies(params)
    ours = FusedSGD(params, backend="cpu", **OPTIONS)
    reference = FusedSGD(expected, backend="reference", **OPTIONS)
    for grads in gradients(params, 3):
        for optimizer, ps in ((ours, params), (reference, expected)):
            set_gradients(ps, grads)
            optimizer.step()
    assert_all_same_bits(params, expected)


def test_optimizers_of_several_threads_do_not_disturb_each_other(backend, device) -> None:
    if backends.is_slow(backend):
        pytest.skip("Triton's interpreter runs one kernel at a time")

    def train(seed: int) -> list[Parameter]:
        torch.manual_seed(seed)
        params = [Parameter(torch.ones(300, device=device)), Parameter(torch.ones(7, 5, device=device))]
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, loss_scale="dynamic", backend=backend)
        for step in range(5):
            for param in params:
                param.grad = torch.full_like(param, seed + step)
            optimizer.step()
        return params

    expected = [train(seed) for seed in range(4)]
    found: list[list[Parameter]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda s=s: found[s].extend(train(s))) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for params, others in zip(found, expected, strict=True):
        assert_all_same_bits(params, others)
