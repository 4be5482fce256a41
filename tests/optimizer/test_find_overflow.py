"""find_overflow() names the parameters whose gradients have an element that is not finite, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks._torch import is_zero_tensor, negative_view
from support.comparison import (
    VECTOR_EDGES,
    assert_unchanged,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)
from support.networks import Network

NON_FINITE = {"inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def searched(*grads: Tensor) -> list[str]:
    """The names that are found where parameters have these gradients."""
    params = [Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return FusedSGD(params, lr=0.1, backend="reference").find_overflow()


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
def test_after_a_skipped_step_the_parameters_that_overflowed_are_named(backend, device, value):
    model = Network().to(device)
    optimizer = FusedSGD(model.named_parameters(), lr=0.1, loss_scale="dynamic", backend=backend)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.fc.weight.grad[1, 2] = value
    model.norm.bias.grad[-1] = value
    optimizer.step()
    assert optimizer.stats().last_step_skipped
    assert optimizer.find_overflow() == ["norm.bias", "fc.weight"]


def test_after_an_applied_step_no_parameter_is_named(backend, device):
    params = parameters([(3,), (2, 2)], torch.float16, device)
    optimizer = FusedSGD(params, lr=0.1, loss_scale="dynamic", backend=backend)
    set_gradients(params, [torch.ones(3).half(), torch.ones(2, 2).half()])
    optimizer.step()
    assert optimizer.find_overflow() == []


def test_a_parameter_without_a_name_is_named_by_its_position():
    params = parameters([(2,)] * 4)
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    set_gradients(params, [torch.full((2,), torch.inf if index in (0, 2) else 1.0) for index in range(4)])
    assert optimizer.find_overflow() == ["parameter 0 of group 0", "parameter 1 of group 1"]


def test_a_group_that_is_added_later_has_its_own_names():
    first, second = Network(), Network()
    optimizer = FusedSGD(first.named_parameters(prefix="first"), lr=0.1)
    optimizer.add_param_group({"params": list(second.named_parameters(prefix="second"))})
    first.fc.bias.grad = torch.full((3,), torch.nan)
    second.fc.bias.grad = torch.full((3,), torch.nan)
    assert optimizer.find_overflow() == ["first.fc.bias", "second.fc.bias"]


def test_gradients_that_are_gone_do_not_count():
    params = parameters([(2,)])
    optimizer = FusedSGD(params, lr=0.1)
    assert optimizer.find_overflow() == []
    set_gradients(params, [torch.full((2,), torch.nan)])
    optimizer.zero_grad()
    assert optimizer.find_overflow() == []


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_at_any_position_counts(dtype, value):
    for size in (*VECTOR_EDGES, 5000):
        for element in range(size) if size < 100 else (0, 2500, 4999):
            grad = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
            grad[element] = value
            assert searched(grad), f"element {element} of {size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_extremes_do_not_count(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, 0.0], dtype=dtype)
    assert searched(values.repeat(100)) == []


def test_a_large_fp64_gradient_beside_others_does_not_count():
    grads = [torch.full((3,), torch.finfo(dtype).max, dtype=dtype) for dtype in DTYPES]
    assert searched(*grads, torch.tensor([torch.inf]).half()) == ["parameter 4 of group 0"]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda grad: grad.T.contiguous().T,
    "every second column": lambda grad: grad.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda grad: grad[-1:].expand(4, 5),
    "negative view": negative_view,
    "sparse": lambda grad: grad.to_sparse(),
    "conjugate view": lambda grad: torch.complex(grad, grad).conj(),
    "float8_e5m2": lambda grad: grad.to(torch.float8_e5m2),
    "float8_e4m3fn": lambda grad: grad.mul(torch.nan if grad.isinf().any() else 1).to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_any_form_is_searched(form):
    good = torch.ones(4, 5)
    bad = good.clone()
    bad[-1, -1] = torch.inf
    assert searched(FORMS[form](good), FORMS[form](bad)) == ["parameter 1 of group 0"]


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_gradient_whose_elements_add_up_to_infinity_counts():
    values = torch.full((2,), 60000.0, dtype=torch.float16)
    assert searched(torch.sparse_coo_tensor(torch.tensor([[1, 1]]), values, (3,)))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_gradient_without_elements_is_finite():
    grad = torch.zeros(3).to_sparse()
    assert grad._nnz() == 0
    assert searched(grad, torch.full((3,), torch.inf)) == ["parameter 1 of group 0"]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc], ids=str)
def test_a_gradient_of_a_compressed_layout_is_searched(layout):
    params = [Parameter(torch.eye(3).to_sparse(layout=layout)) for _ in range(2)]
    for param, value in zip(params, (1.0, torch.inf), strict=True):
        param.grad = torch.eye(3).mul(value).nan_to_num(0.0, posinf=value).to_sparse(layout=layout)
    assert FusedSGD(params, lr=0.1).find_overflow() == ["parameter 1 of group 0"]


def test_a_gradient_that_wraps_other_tensors_is_searched():
    from torch.testing._internal.two_tensor import TwoTensor

    wrapped = [TwoTensor(torch.full((3,), value), torch.full((3,), value)) for value in (1.0, torch.inf)]
    assert searched(*wrapped, torch.full((3,), torch.nan)) == [
        "parameter 1 of group 0",
        "parameter 2 of group 0",
    ]


def test_a_gradient_of_zeros_without_memory_is_finite():
    zeros = torch._efficientzerotensor((3,))
    assert is_zero_tensor(zeros)
    assert searched(zeros, torch.full((3,), torch.inf)) == ["parameter 1 of group 0"]


def test_a_gradient_without_elements_is_finite():
    assert searched(torch.ones(0), torch.ones(3, 0), torch.full((3,), torch.inf)) == [
        "parameter 2 of group 0"
    ]


def test_fp32_gradients_of_fp16_parameters_are_searched():
    param = Parameter(torch.zeros(2, dtype=torch.float16))
    param.grad_dtype = torch.float32
    param.grad = torch.tensor([1e38, 1.0])
    optimizer = FusedSGD([param], lr=0.1)
    assert optimizer.find_overflow() == []
    param.grad[1] = torch.inf
    assert optimizer.find_overflow() == ["parameter 0 of group 0"]


def fake(value: float) -> Tensor:
    with FakeTensorMode():
        return torch.full((2,), value)


def freed(value: float) -> Tensor:
    grad = torch.full((2,), value)
    grad.untyped_storage().resize_(0)
    return grad


@pytest.mark.parametrize("without_memory", [fake, freed])
def test_a_gradient_without_memory_does_not_count(without_memory):
    found = searched(without_memory(torch.inf), torch.full((2,), torch.inf))
    assert found == [
        "parameter 1 of group 0"
    ]  # separate, because pytest prints the arguments of a call that fails


def test_a_model_without_memory_has_no_overflow():
    model = nn.Linear(2, 2, device="meta")
    model.weight.grad = torch.full_like(model.weight, torch.inf)
    assert FusedSGD(model.parameters(), lr=0.1).find_overflow() == []


def test_real_gradients_are_searched_in_a_fake_mode():
    params = parameters([(2,)])
    set_gradients(params, [torch.full((2,), torch.inf)])
    optimizer = FusedSGD(params, lr=0.1)
    with FakeTensorMode():
        assert optimizer.find_overflow() == ["parameter 0 of group 0"]


def test_a_search_changes_nothing(backend, device):
    params = parameters([(3,), (2, 2)], [torch.float16, torch.float32], device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, loss_scale="dynamic", backend=backend)
    good, bad = gradients(params, 2)
    for grads in (good, [grad * torch.nan for grad in bad]):
        set_gradients(params, grads)
        optimizer.step()
    before = snapshot(optimizer)
    kept = [(param.grad, param.grad._version, param._version) for param in params]
    assert len(optimizer.find_overflow()) == 2
    assert_unchanged(optimizer, before)
    for param, (grad, grad_version, version) in zip(params, kept, strict=True):
        assert param.grad is grad
        assert (grad._version, param._version) == (grad_version, version)


def test_gradients_that_grad_scaler_has_unscaled_are_named(backend, device):
    params = parameters([(3,), (3,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    set_gradients(params, [torch.ones(3), torch.tensor([1.0, torch.inf, 1.0])])
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.stats().last_step_skipped
    assert optimizer.find_overflow() == ["parameter 1 of group 0"]


def test_micro_batches_that_overflow_together_are_named(backend, device):
    (param,) = parameters([(3,)], torch.float16, device)
    optimizer = FusedSGD([("weight", param)], lr=0.1, loss_scale="dynamic", backend=backend)
    for _ in range(2):
        assert optimizer.find_overflow() == []
        (param * 40000.0).sum().backward()
    optimizer.step()
    assert optimizer.stats().last_step_skipped
    assert optimizer.find_overflow() == ["weight"]


READS = ("tolist", "item", "__bool__", "__float__", "cpu", "to", "numpy")


def counting(name: str, original: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    def called(*args: object, **options: object) -> object:
        calls.append(name)
        return original(*args, **options)

    return called


def test_the_host_reads_once_for_any_number_of_gradients(monkeypatch):
    params = parameters([(5,)] * 50, [torch.float16, torch.float32] * 25)
    set_gradients(params, gradients(params, 1)[0])
    optimizer = FusedSGD(params, lr=0.1)
    calls: list[str] = []
    for name in READS:
        monkeypatch.setattr(Tensor, name, counting(name, getattr(Tensor, name), calls))
    assert optimizer.find_overflow() == []
    assert calls == ["tolist"]


def test_a_search_holds_the_lock_of_the_steps(monkeypatch):
    optimizer = FusedSGD(parameters([(2,)]), lr=0.1)
    monkeypatch.setattr(
        "fused_tricks.optimizer.overflowing_parameters", lambda groups: [str(optimizer._lock._is_owned())]
    )
    assert optimizer.find_overflow() == ["True"]
