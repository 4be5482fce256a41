"""Strides, views and storages: the update is correct for every layout of the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD, extension
from support.comparison import assert_same_bits, copies, gradients, set_gradients

pytestmark = pytest.mark.both_watches

DTYPES = [torch.float32, torch.float16, torch.float64]
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}


def base(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


PARAMETERS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: base(),
    "empty": lambda: base(0, 3),
    "transposed": lambda: base(6, 40).t(),
    "permuted": lambda: base(3, 4, 5, 6).permute(2, 0, 3, 1),
    "every second element": lambda: base(67)[::2],
    "every third column": lambda: base(9, 30)[:, 1::3],
    "unaligned": lambda: base(70)[1:],
    "unaligned by three": lambda: base(70)[3:-2],
    "channels_last": lambda: base(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    "channels_last with one channel": lambda: base(4, 1, 5, 5).contiguous(memory_format=torch.channels_last),
    "channels_last 1x1": lambda: base(8, 6, 1, 1).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: base(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "odd strides of size-1 dimensions": lambda: base(12).as_strided((4, 1, 3, 1), (3, 77, 1, 1000)),
    "a single element with odd strides": lambda: base(1).as_strided((1, 1), (5, 9)),
    "nine dimensions": lambda: base(2, 1, 3, 1, 2, 1, 2, 2, 3).transpose(0, 8).transpose(2, 5),
    "rows with gaps": lambda: base(7, 40)[:, :33],
}

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "reversed dimensions": lambda g: _reversed(_reversed(g).contiguous()),
    "gaps": lambda g: torch.stack([g, torch.full_like(g, torch.nan)], -1)[..., 0],
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


def _reversed(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


def strided_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the same values, strides and storage offset on another device in another dtype."""
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return storage.to(device, dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Every layout of a gradient is combined with a few layouts of a parameter, because all pairs take too long.
BESIDE = ("scalar", "permuted", "channels_last", "rows with gaps")
PAIRS = [(layout, gradient) for gradient in GRADIENTS for layout in BESIDE if gradient != "contiguous"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "gradient"), [*((layout, "contiguous") for layout in PARAMETERS), *PAIRS])
def test_any_layout_gives_the_values_of_the_contiguous_one(backend, device, layout, gradient, dtype):
    param = Parameter(strided_to(PARAMETERS[layout](), device, dtype))
    strides, pointer = param.stride(), param.data_ptr()
    expected = copies([param], wide(dtype))
    optimizer = FusedSGD([param], bias_decay=True, backend=backend, **OPTIONS)
    reference = torch.optim.SGD(expected, foreach=False, **OPTIONS)
    for (grad,) in gradients([param], 4):
        param.grad = GRADIENTS[gradient](grad.to(device))
        expected[0].grad = grad.to(wide(dtype)).contiguous()
        optimizer.step()
        reference.step()
    assert_same_bits(param, expected[0].to(dtype), "parameter")
    assert_same_bits(
        optimizer.state[param]["momentum_buffer"], reference.state[expected[0]]["momentum_buffer"], "buffer"
    )
    assert (param.stride(), param.data_ptr()) == (strides, pointer)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "gaps"])
@pytest.mark.parametrize("scaled", [{"loss_scale": 8.0}, {"max_grad_norm": 1.0}], ids=str)
def test_an_overflow_is_found_in_any_layout_and_padding_is_not_read(backend, device, layout, scaled):
    param = Parameter(base(4, 3, 5, 5).to(device))
    optimizer = FusedSGD([param], lr=0.1, backend=backend, **scaled)
    change = {
        **GRADIENTS,
        "transposed": lambda g: g.transpose(0, 3).contiguous().transpose(0, 3),
        "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    }[layout]
    good = base(4, 3, 5, 5).to(device)
    param.grad = change(good)
    optimizer.step()
    assert optimizer.stats().skipped_steps == 0
    bad = good.clone()
    bad[3, 2, 4, 4] = torch.inf
    param.grad = change(bad)
    optimizer.step()
    assert optimizer.stats().skipped_steps == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_a_view_is_written(backend, device, dtype):
    """Neighbours in one flat buffer, and the elements between strides, keep their values."""
    flat = torch.full((400,), 7.0, device=device, dtype=dtype)
    views = [flat[1:34], flat[40:41], flat[51:120:2], flat[130:250].view(10, 12)[:, 3:7], flat[301:399]]
    outside = torch.ones(400, dtype=torch.bool, device=device)
    for view in views:
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    params = [Parameter(view) for view in views]
    optimizer = FusedSGD(params, backend=backend, **OPTIONS)
    for _ in range(3):
        set_gradients(params, [torch.ones(p.shape, dtype=dtype) for p in params])
        optimizer.step()
    assert (flat[outside] == 7).all()
    assert all((view != 7).any() for view in views)


def test_parameters_side_by_side_in_one_buffer_are_updated_each_by_its_gradient(backend, device):
    flat = base(100).to(device)
    params = [Parameter(piece) for piece in flat.split([1, 7, 13, 3, 33, 43])]
    expected = copies(params)
    optimizer = FusedSGD(params, bias_decay=True, backend=backend, **OPTIONS)
    reference = torch.optim.SGD(expected, foreach=False, **OPTIONS)
    for grads in gradients(params, 3):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        optimizer.step()
        reference.step()
    assert_same_bits(flat, torch.cat([p.detach() for p in expected]))


def step_twice(backend: str, device: torch.device, make_gradient: Callable[[Tensor], Tensor]) -> Parameter:
    """Takes two steps over 33 elements, each with a gradient made from the parameter."""
    param = Parameter(base(33).to(device))
    optimizer = FusedSGD([param], backend=backend, **OPTIONS)
    for _ in range(2):
        param.grad = make_gradient(param.detach())
        optimizer.step()
    return param


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_gradient_of_zeros_without_memory_is_zero(backend, device, momentum):
    """Autograd uses such a tensor where the gradient is zero by definition."""
    param = Parameter(torch.zeros(3, device=device))
    optimizer = FusedSGD([param], lr=1.0, momentum=momentum, backend=backend)
    for step in range(4):
        param.grad = (torch._efficientzerotensor if step in (0, 2) else torch.ones)(3, device=device)
        optimizer.step()
    assert_same_bits(param, torch.full((3,), -2.75 if momentum else -2.0))


def test_an_expanded_gradient_counts_for_every_element(backend, device):
    expanded = step_twice(backend, device, lambda p: p.new_full((1,), 0.3).expand(33))
    dense = step_twice(backend, device, lambda p: torch.full_like(p, 0.3))
    assert_same_bits(expanded, dense)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_gradient_with_the_negative_bit_set_is_negated(backend, device, contiguous):
    def negative_view(p: Tensor) -> Tensor:
        values = torch.arange(33.0, device=p.device)
        grad = torch._neg_view(values) if contiguous else torch.complex(p, values).conj().imag
        assert grad.is_neg()
        assert grad.is_contiguous() is contiguous
        return grad

    negated = step_twice(backend, device, lambda p: -torch.arange(33.0, device=p.device))
    assert_same_bits(step_twice(backend, device, negative_view), negated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_that_gets_the_negative_bit_after_some_steps_is_negated(backend, device, dtype):
    param = Parameter(torch.zeros(1, device=device, dtype=dtype))
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    for step in range(4):
        ones = torch.ones(1, device=device, dtype=dtype)
        param.grad = torch.complex(ones, ones).conj().imag if step >= 2 else ones
        assert param.grad.is_neg() is (step >= 2)
        optimizer.step()
    assert param.item() == 0.0


NEGATIVE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "_neg_view": torch._neg_view,
    "as_strided": lambda values: (
        torch.complex(values, values).conj().imag.as_strided(values.shape, values.stride(), 1)
    ),
}


@pytest.mark.parametrize("count", [1, 2, 9, 40])
@pytest.mark.parametrize("view", NEGATIVE_VIEWS)
def test_a_dense_gradient_of_any_size_may_get_the_negative_bit_after_some_steps(backend, device, view, count):
    param = Parameter(torch.zeros(count, device=device))
    expected = copies([param])
    optimizer = FusedSGD([param], backend=backend, bias_decay=True, **OPTIONS)
    reference = torch.optim.SGD(expected, foreach=False, **OPTIONS)
    for step in range(5):
        values = torch.arange(1.0, count + 1)
        grad = NEGATIVE_VIEWS[view](values) if step in (2, 3) else values
        assert grad.is_neg() is (step in (2, 3)) and grad.is_contiguous()
        param.grad, expected[0].grad = grad.to(device), grad
        optimizer.step()
        reference.step()
    assert_same_bits(param, expected[0])


@pytest.mark.parametrize("functions", [(), extension._STABLE_FUNCTIONS], ids=["DLPack", "shim"])
@pytest.mark.parametrize("what", ["parameter", "momentum_buffer", "master_param"])
def test_a_parameter_and_its_state_may_get_the_negative_bit_in_place(
    backend, device, what, functions, monkeypatch
):
    """The negative bit changes neither the address nor the strides."""
    if extension.missing_because() is not None:
        pytest.skip(extension.missing_because())
    module = extension.load_extension()
    dtype = torch.float16 if what == "master_param" else torch.float32
    params = [Parameter(torch.arange(1.0, 10.0, device=device).to(dtype)) for _ in range(2)]
    optimizers = [FusedSGD([param], backend=backend, bias_decay=True, **OPTIONS) for param in params]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(extension, "_STABLE_FUNCTIONS", functions)
            extension.connect(module)
        for step in range(4):
            if step == 2:
                for optimizer, param, negate in zip(
                    optimizers, params, (torch._neg_view, torch.neg), strict=True
                ):
                    tensor = param if what == "parameter" else optimizer.state[param][what]
                    tensor.data = negate(tensor.data)
                    if what == "master_param":
                        # A parameter that differs from its master counts as written by user code.
                        param.data = param.data.neg()
            for optimizer, param in zip(optimizers, params, strict=True):
                param.grad = torch.ones_like(param)
                optimizer.step()
    finally:
        extension.connect(module)
    assert_same_bits(params[0], params[1].detach())


def test_a_learning_rate_with_the_negative_bit_is_read_as_it_is(backend, device):
    lr = torch._neg_view(torch.tensor(-0.5, device=device))
    param = Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    FusedSGD([param], lr=lr, backend=backend).step()
    assert_same_bits(param, torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_that_change_between_steps_are_noticed(backend, device, dtype):
    """The strides of the gradient change, and those of the parameter while its memory stays the same."""
    param = Parameter(base(6, 6).to(device, dtype))
    expected = copies([param], wide(dtype))
    optimizer = FusedSGD([param], bias_decay=True, backend=backend, **OPTIONS)
    reference = torch.optim.SGD(expected, foreach=False, **OPTIONS)
    for step, (grad,) in enumerate(gradients([param], 12)):
        if step in (4, 8):
            param.data = param.data.t()
            expected[0].data = expected[0].data.t().contiguous()
            for state, key in ((optimizer.state[param], k) for k in tuple(optimizer.state[param])):
                state[key] = state[key].t()
            buffer = reference.state[expected[0]]["momentum_buffer"]
            reference.state[expected[0]]["momentum_buffer"] = buffer.t().contiguous()
        param.grad = GRADIENTS["reversed dimensions" if step in (2, 5, 6, 10) else "contiguous"](
            grad.to(device)
        )
        expected[0].grad = grad.to(wide(dtype))
        optimizer.step()
        reference.step()
    assert_same_bits(param, expected[0].to(dtype))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_that_requires_grad_itself_works_as_in_torch(backend, device):
    param, expected = Parameter(base(5).to(device)), Parameter(base(5))
    optimizer, reference = FusedSGD([param], lr=0.1, backend=backend), torch.optim.SGD([expected], lr=0.1)
    for p, o in ((param, optimizer), (expected, reference)):
        (p**3).sum().backward(create_graph=True)
        assert p.grad.requires_grad
        o.step()
        p.grad = None
    assert_same_bits(param, expected)


def test_parameters_that_do_not_require_grad_are_updated_as_in_torch(backend, device):
    param, expected = base(5).to(device), base(5)
    optimizer, reference = FusedSGD([param], lr=0.1, backend=backend), torch.optim.SGD([expected], lr=0.1)
    set_gradients([param, expected], [torch.ones(5), torch.ones(5)])
    optimizer.step()
    reference.step()
    assert_same_bits(param, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [{}, {"loss_scale": 4.0}], ids=str)
def test_the_step_raises_the_version_so_that_autograd_notices(backend, device, dtype, scaled):
    params = [Parameter(base(5).to(device, dtype)), Parameter(base(3, 4).t().to(device, dtype))]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend, **scaled)
    for _ in range(2):
        loss = sum((p * p).sum() for p in params)
        set_gradients(params, [torch.ones(p.shape, dtype=dtype) for p in params])
        before = [p._version for p in params]
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_without_gradient_keeps_its_version(backend, device):
    used, unused = (Parameter(base(5).to(device)) for _ in range(2))
    optimizer = FusedSGD([used, unused], lr=0.1, backend=backend)
    loss = (unused * unused).sum()
    used.grad = torch.ones_like(used)
    optimizer.step()
    loss.backward()
    assert_same_bits(unused.grad, 2 * unused.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_parameter_whose_data_moved_to_new_storage_is_updated_there(backend, device, dtype):
    param = Parameter(base(6, 7).to(device, dtype))
    expected = copies([param], wide(dtype))
    optimizer = FusedSGD([param], bias_decay=True, backend=backend, **OPTIONS)
    reference = torch.optim.SGD(expected, foreach=False, **OPTIONS)
    old = []
    for index, (grad,) in enumerate(gradients([param], 7)):
        if index > 2:
            old.append((param.data, param.data.clone()))
            param.data = param.data.clone()
        set_gradients([param], [grad])
        expected[0].grad = grad.to(wide(dtype))
        optimizer.step()
        reference.step()
    assert_same_bits(param, expected[0].to(dtype))
    for kept, copy in old:
        assert_same_bits(kept, copy, "the former storage")


def test_a_parameter_resized_together_with_its_state_is_updated_at_its_new_size(backend, device):
    """Pruning and vocabulary growth replace the data by another shape, and drop the state."""
    param = Parameter(base(6).to(device))
    optimizer = FusedSGD([param], lr=0.5, momentum=0.9, backend=backend)
    set_gradients([param], [torch.ones(6)])
    optimizer.step()
    param.grad = None
    param.data = torch.zeros(90, device=device)
    del optimizer.state[param]
    set_gradients([param], [torch.ones(90)])
    optimizer.step()
    assert_same_bits(param, torch.full((90,), -0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_low_precision_parameter_changed_by_the_user_replaces_its_master_where_changed(
    backend, device, dtype
):
    param = Parameter(base(64).to(device, dtype))
    optimizer = FusedSGD([param], lr=0.05, backend=backend)
    stream = gradients([param], 4)
    for (grad,) in stream[:3]:
        set_gradients([param], [grad])
        optimizer.step()
    master = optimizer.state[param]["master_param"].detach().cpu().clone()
    assert (master != param.detach().cpu().float()).any()
    with torch.no_grad():
        param[::2] = 3.0
    expected = Parameter(master)
    with torch.no_grad():
        expected[::2] = 3.0
    set_gradients([param], stream[3])
    expected.grad = stream[3][0].float()
    optimizer.step()
    torch.optim.SGD([expected], lr=0.05, foreach=False).step()
    assert_same_bits(optimizer.state[param]["master_param"], expected, "master")
    assert_same_bits(param, expected.to(dtype), "parameter")


def test_loading_a_model_gives_the_loaded_weights_and_not_the_old_masters(backend, device):
    model = torch.nn.Linear(5, 3).to(device, torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=0.125, backend=backend)
    set_gradients(list(model.parameters()), [torch.ones(3, 5).half(), torch.ones(3).half()])
    optimizer.step()
    model.load_state_dict({"weight": torch.full((3, 5), 2.0), "bias": torch.full((3,), -2.0)})
    optimizer.step()
    assert_same_bits(model.weight, torch.full((3, 5), 1.875, dtype=torch.float16))
    assert_same_bits(model.bias, torch.full((3,), -2.125, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "gradient"),
    [("rows with gaps", "contiguous"), ("transposed", "contiguous"), ("transposed", "reversed dimensions")],
)
def test_new_data_with_other_values_is_what_the_next_step_updates(backend, device, layout, gradient, dtype):
    """The layouts include parameters that the kernels update in place, and parameters with a stand-in."""
    param = Parameter(strided_to(PARAMETERS[layout](), device, dtype))
    optimizer = FusedSGD([param], lr=0.5, backend=backend)
    for step in range(6):
        if step in (3, 5):
            new = strided_to(PARAMETERS[layout](), device, dtype)
            param.data = new.fill_(step)
        param.grad = GRADIENTS[gradient](torch.ones_like(param))
        optimizer.step()
    assert_same_bits(param, torch.full(param.shape, 4.5, dtype=dtype))


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "rows with gaps"])
def test_gradients_are_not_kept_alive(backend, device, layout, overflow):
    param = Parameter(strided_to(PARAMETERS[layout](), device, torch.float16))
    optimizer = FusedSGD([param], lr=0.5, momentum=0.9, loss_scale=1.0, backend=backend)
    for _ in range(3):
        grad = torch.full(param.shape, torch.inf if overflow else 1.0, dtype=torch.float16, device=device)
        watched = weakref.ref(grad)
        param.grad = grad
        optimizer.step()
        del grad
        param.grad = None
        assert watched() is None
