"""Parameters that the kernels cannot update in place: stand-ins for unusual strides, and their end."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.zeros(0, 3, 2, 2).to(memory_format=torch.channels_last), torch.zeros(0, 3, 2, 2)),
        (torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2).to(memory_format=torch.channels_last)),
        (torch.zeros(0, 6)[..., ::2], torch.zeros(0, 3)),
        (torch.zeros(0, 3), torch.zeros(0, 6)[..., ::2]),
        (torch.zeros(0, 3), torch.zeros(0, 1).expand(0, 3)),
    ],
    ids=["channels_last", "channels_last gradient", "gaps", "gradient with gaps", "expanded gradient"],
)
def test_a_parameter_without_elements_may_have_any_strides(backend, device, param, grad):
    empty, other = Parameter(param.to(device)), Parameter(torch.ones(2, device=device))
    optimizer = FusedSGD([empty, other], lr=0.5, momentum=0.5, backend=backend)
    for _ in range(3):
        empty.grad, other.grad = grad.to(device), torch.ones(2, device=device)
        optimizer.step()
    assert other.tolist() == [-1.125, -1.125]


@pytest.mark.parametrize(
    "then", [torch.ones(3, 4, device="meta"), torch.ones(4, 3, device="meta").t()], ids=["same", "other"]
)
def test_a_parameter_whose_gradient_had_other_strides_may_move_to_another_device(then):
    param = Parameter(torch.ones(3, 4))
    optimizer = FusedSGD([param], lr=0.5)
    for _ in range(2):
        param.grad = torch.ones(4, 3).t()
        optimizer.step()
    param.grad = None
    torch.utils.swap_tensors(param, Parameter(torch.ones(3, 4, device="meta")))
    param.grad = then
    optimizer.step()
    assert optimizer.stats().applied_steps == 3
