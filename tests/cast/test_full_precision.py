"""`fp32_state_dict` and `load_fp32_state_dict`: the weights of an FP32 model with the same training."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks import FusedSGD, cast_model, fp32_state_dict, load_fp32_state_dict
from support import emulation
from support.comparison import assert_same_bits, assert_unchanged, rounding_cases, snapshot, wide_range

FP16, BF16 = torch.float16, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)


class Network(nn.Module):
    """Weights to cast, a norm that stays FP32, tied weights, FP64, a frozen layer, and buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("scale", torch.randn(4))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.register_buffer("absent", None)


def fp32_model(seed: int = 0) -> Network:
    """Returns a model whose tensors without a master, the frozen layer and `scale`, have values of FP16 and BF16."""
    torch.manual_seed(seed)
    model = Network()
    with torch.no_grad():
        for trained in (*model.parameters(), model.bn.running_mean):
            trained.copy_(wide_range(trained.shape, torch.default_generator))
        for other in (*model.frozen.parameters(), model.scale):
            other.copy_(torch.randint(-32, 32, other.shape) / 16)
    return model


def low_precision(model: nn.Module, dtype: torch.dtype = FP16) -> nn.Module:
    """Returns a copy in `dtype`, with the FP64 parameter restored after `cast_model` has cast it."""
    cast = cast_model(deepcopy(model), dtype)
    for name, param in model.named_parameters():
        if param.dtype == torch.float64:
            cast.get_parameter(name).data = param.detach().clone()
    return cast


def sgd(model: nn.Module, backend: str, device: torch.device, **options: Any) -> FusedSGD:
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    return FusedSGD(trained, lr=0.01, momentum=0.9, backend=backend, **options)


class Twins:
    """A low-precision model with `FusedSGD`, and an FP32 one with `torch.optim.SGD` that gets the same gradients."""

    def __init__(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        self.low, self.full = low_precision(fp32_model(1), dtype), fp32_model(2)
        options: dict[str, Any] = {"weight_decay": 0.1, "dampening": 0.5}
        self.optimizer = sgd(self.low, backend, device, bias_decay=True, loss_scale=1.0, **options)
        trained = [p for p in self.full.parameters() if p.requires_grad]
        self.reference = torch.optim.SGD(trained, lr=0.01, momentum=0.9, foreach=False, **options)
        self.generator = torch.Generator().manual_seed(0)

    def load(self, state: dict[str, Any]) -> None:
        load_fp32_state_dict(self.low, self.optimizer, state)
        self.full.load_state_dict(state)

    def step(self, *, overflow: bool = False) -> None:
        for low, full in zip(self.low.parameters(), self.full.parameters(), strict=True):
            if low.requires_grad:
                grad = torch.randn(low.shape, generator=self.generator).to(low.dtype)
                if overflow:
                    grad.fill_(torch.inf)
                low.grad, full.grad = grad.to(low.device), grad.to(full.dtype)
        self.optimizer.step()
        if not overflow:
            self.reference.step()


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts equal keys in equal order, with equal metadata and bits."""
    assert list(actual) == list(expected)
    assert actual._metadata == expected._metadata
    for name, value in expected.items():
        assert_same_bits(actual[name].cpu(), value.cpu(), name)


def trained(backend: str, device: torch.device, dtype: torch.dtype = FP16) -> Twins:
    twins = Twins(backend, device, dtype)
    twins.load(fp32_model().state_dict())
    twins.step()
    return twins


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


@both_dtypes
@pytest.mark.parametrize("before", ["nothing", "a skipped step", "steps", "an export"])
def test_a_run_from_an_fp32_checkpoint_has_the_weights_of_fp32_training(backend, device, dtype, before):
    twins = Twins(backend, device, dtype)
    if before == "steps":
        twins.load(fp32_model(3).state_dict())
        twins.step()
        twins.step()
    elif before == "a skipped step":
        twins.step(overflow=True)
    elif before == "an export":
        fp32_state_dict(twins.low, twins.optimizer)
    twins.load(fp32_model().state_dict())
    for _ in range(3):
        assert_same_state(fp32_state_dict(twins.low, twins.optimizer), twins.full.state_dict())
        twins.step()
    assert_same_state(fp32_state_dict(twins.low, twins.optimizer), twins.full.state_dict())


def test_every_value_becomes_the_master_and_its_rounding_the_parameter(backend, device):
    for dtype in (FP16, BF16):
        values = rounding_cases(dtype)
        model = nn.Linear(1, len(values), bias=False).to(device, dtype)
        optimizer = sgd(model, backend, device)
        load_fp32_state_dict(model, optimizer, {"weight": values.view(-1, 1)})
        assert_same_bits(optimizer.state[model.weight]["master_param"].cpu(), values.view(-1, 1))
        assert_same_bits(model.weight.cpu(), values.view(-1, 1).to(dtype))
        assert_same_bits(fp32_state_dict(model, optimizer)["weight"].cpu(), values.view(-1, 1))


@both_dtypes
def test_an_export_loaded_elsewhere_is_exported_again_bit_for_bit(backend, device, dtype):
    twins = trained(backend, device, dtype)
    state = fp32_state_dict(twins.low, twins.optimizer)
    other = low_precision(fp32_model(7), dtype)
    optimizer = sgd(other, backend, device)
    load_fp32_state_dict(other, optimizer, state)
    assert_same_state(fp32_state_dict(other, optimizer), state)
    for name, value in tensors(twins.low).items():
        assert_same_bits(other.state_dict()[name].cpu(), value, name)


def test_a_checkpoint_may_go_through_a_file(backend, device):
    twins = trained(backend, device)
    state = fp32_state_dict(twins.low, twins.optimizer)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_state(loaded, state)
    load_fp32_state_dict(twins.low, twins.optimizer, loaded)
    fp32_model(7).load_state_dict(loaded)


def test_without_masters_an_export_has_the_exact_values_in_fp32(backend, device):
    model = low_precision(fp32_model())
    state = fp32_state_dict(model, sgd(model, backend, device))
    for name, value in tensors(model).items():
        assert_same_bits(state[name].cpu(), value.float() if value.dtype == FP16 else value, name)


def test_an_export_has_the_values_that_others_wrote_to_parameters_since(backend, device):
    twins = trained(backend, device)
    weight = twins.low.conv.weight
    expected = fp32_state_dict(twins.low, twins.optimizer)["conv.weight"]
    with torch.no_grad():
        weight[0] = 0.1
    expected[0] = weight[0, 0, 0, 0].float()
    assert_same_bits(fp32_state_dict(twins.low, twins.optimizer)["conv.weight"], expected)
    twins.optimizer.param_groups[0]["lr"] = 0.0
    twins.step()
    assert_same_bits(fp32_state_dict(twins.low, twins.optimizer)["conv.weight"], expected)


def test_an_export_changes_nothing(backend, device):
    twins = trained(backend, device)
    before, weights = snapshot(twins.optimizer), tensors(twins.low)
    objects = [*twins.low.named_parameters(remove_duplicate=False), *twins.low.named_buffers()]
    fp32_state_dict(twins.low, twins.optimizer)
    assert_unchanged(twins.optimizer, before)
    after = [*twins.low.named_parameters(remove_duplicate=False), *twins.low.named_buffers()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(after, objects, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(twins.low).values(), weights.values(), strict=True))


def test_an_export_is_a_copy_in_which_tied_weights_are_tied(backend, device):
    twins = trained(backend, device)
    state = fp32_state_dict(twins.low, twins.optimizer)
    before = {name: tensor.clone() for name, tensor in state.items()}
    twins.step()
    for tensor in (*twins.low.parameters(), *twins.low.buffers()):
        tensor.data.zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def test_loading_leaves_all_of_the_optimizer_but_the_masters(backend, device):
    twins = trained(backend, device)
    before = snapshot(twins.optimizer)
    load_fp32_state_dict(twins.low, twins.optimizer, fp32_model(5).state_dict())
    assert_unchanged(twins.optimizer, before, but=["params", "state", "saved state"])
    for state, old in zip(snapshot(twins.optimizer)["state"], before["state"], strict=True):
        assert state.keys() == old.keys()
        assert torch.equal(state["momentum_buffer"], old["momentum_buffer"])


def test_only_low_precision_parameters_get_masters(backend, device):
    model = low_precision(fp32_model())
    optimizer = sgd(model, backend, device)
    load_fp32_state_dict(model, optimizer, fp32_model(5).state_dict())
    with_master = {
        name for name, param in model.named_parameters() if "master_param" in optimizer.state[param]
    }
    assert with_master == {"conv.weight", "conv.bias", "embedding.weight", "head.bias"}


def test_masters_loaded_before_the_first_step_are_in_the_optimizers_checkpoint(backend, device):
    model = low_precision(fp32_model(1))
    optimizer = sgd(model, backend, device)
    load_fp32_state_dict(model, optimizer, fp32_model().state_dict())
    other = deepcopy(model)
    resumed = sgd(other, backend, device)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(fp32_state_dict(other, resumed), fp32_model().state_dict())


@pytest.mark.parametrize("published", [True, False], ids=["after a step", "after a skipped step"])
def test_a_captured_graph_goes_on_from_the_loaded_weights(published):
    reason = emulation.unusable_because()
    if reason is not None:
        pytest.skip(reason)
    model = nn.Linear(3, 1, bias=False).half()
    optimizer = FusedSGD(model.parameters(), lr=2.0**-13, loss_scale=1.0, backend="emulated_cuda")
    model.weight.grad = torch.full_like(model.weight, 1.0 if published else torch.inf)
    optimizer.step()
    graph = emulation.Graph()
    with graph.capture():
        optimizer.step()
    loaded = torch.tensor([[0.1, 0.2, 0.3]])
    load_fp32_state_dict(model, optimizer, {"weight": loaded})
    model.weight.grad.fill_(1.0)
    graph.replay()
    assert_same_bits(fp32_state_dict(model, optimizer)["weight"], loaded - 2.0**-13)


def test_a_parameter_that_the_optimizer_does_not_have_takes_the_rounding(backend, device):
    model = low_precision(fp32_model(1))
    optimizer = sgd(model, backend, device)
    state = fp32_model().state_dict()
    values = state["frozen.weight"] = torch.randn(2, 3)
    load_fp32_state_dict(model, optimizer, state)
    assert_same_bits(model.frozen.weight.cpu(), values.half())
    assert_same_bits(fp32_state_dict(model, optimizer)["frozen.weight"].cpu(), values.half().float())
    assert model.frozen.weight not in optimizer.state


@pytest.mark.parametrize(
    "arrange",
    [lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.repeat(1, 2, 1, 1)[:, ::2]],
    ids=["channels last", "gaps"],
)
def test_loading_keeps_the_layout_of_a_parameter(backend, device, arrange):
    model = nn.Conv2d(2, 3, 4, bias=False).to(device).half()
    model.weight.data = arrange(model.weight.data)
    strides = model.weight.stride()
    optimizer = sgd(model, backend, device)
    values = torch.randn(3, 2, 4, 4)
    load_fp32_state_dict(model, optimizer, {"weight": values})
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert model.weight.stride() == strides
    assert_same_bits(fp32_state_dict(model, optimizer)["weight"].cpu(), values)


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "torch.compile"])
def test_a_wrapped_model_has_the_keys_of_its_own_state_dict(wrap, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    source = {
        name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    wrapped, prefix = _wrapped(cast_model(model, BF16), wrap, tmp_path)
    try:
        state = {f"{prefix}.{name}": value for name, value in source.items()}
        optimizer = FusedSGD(wrapped.parameters(), lr=0.0)
        load_fp32_state_dict(wrapped, optimizer, state)
        wrapped(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        exported = fp32_state_dict(wrapped, optimizer)
        assert list(exported) == list(wrapped.state_dict())
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            assert_same_bits(exported[f"{prefix}.{name}"], source[name], name)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _wrapped(model: nn.Module, wrap: str, folder: Path) -> tuple[Any, str]:
    if wrap == "torch.compile":
        torch._dynamo.reset()
        return torch.compile(model, backend="eager"), "_orig_mod"
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model), "module"


class Renamed(nn.Linear):
    """A layer whose weight has the name `kernel` in checkpoints."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update(kernel=state.pop("weight"))
        )
        self.register_load_state_dict_pre_hook(lambda _, state, *__: state.update(weight=state.pop("kernel")))


def test_the_hooks_of_a_module_see_full_precision():
    model = Renamed().half()
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    values = torch.randn(2, 2)
    load_fp32_state_dict(model, optimizer, {"kernel": values})
    state = fp32_state_dict(model, optimizer)
    assert list(state) == ["kernel"]
    assert_same_bits(state["kernel"], values)


class Sized(nn.Module):
    """A module that resizes one buffer to the checkpoint's size, and replaces another by a new one of this size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("resized", torch.ones(size))
        self.register_buffer("replaced", torch.ones(size))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.resized.resize_(state[prefix + "resized"].shape)
        self.replaced = torch.empty_like(state[prefix + "replaced"])
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_module_may_take_the_size_of_its_buffers_from_the_checkpoint():
    source, model = Sized(3), Sized(2).half()
    load_fp32_state_dict(model, FusedSGD(model.parameters(), lr=0.1), source.state_dict())
    assert_same_bits(model.resized, source.resized.half())
    assert_same_bits(model.replaced, source.replaced)


class Counting(nn.Linear):
    """A layer whose extra state is always the same dict."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra = {"count": 1}

    def get_extra_state(self) -> dict[str, int]:
        return self.extra

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.extra.update(state)


def test_extra_states_are_exported_and_loaded():
    source, model = Counting(), Counting().half()
    source.extra["count"] = 5
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    load_fp32_state_dict(model, optimizer, source.state_dict())
    assert model.extra == fp32_state_dict(model, optimizer)["_extra_state"] == {"count": 5}


SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a missing key": lambda state: state.pop("1.weight"),
    "an unexpected key": lambda state: state.update({"1.gamma": torch.ones(2)}),
    "another shape": lambda state: state.update({"1.weight": torch.ones(3)}),
    "something that is no tensor": lambda state: state.update({"1.weight": "text"}),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_state_that_does_not_fit_is_refused_in_torchs_words_and_changes_nothing(spoil):
    model = nn.Sequential(Counting(), nn.BatchNorm1d(2))
    state = {name: v + 1 if isinstance(v, Tensor) else {"count": 9} for name, v in model.state_dict().items()}
    SPOILT[spoil](state)
    with pytest.raises(RuntimeError) as expected:
        deepcopy(model).load_state_dict(state)
    optimizer = FusedSGD(cast_model(model, FP16).parameters(), lr=0.1)
    before, weights = snapshot(optimizer), deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as refused:
        load_fp32_state_dict(model, optimizer, state)
    assert str(refused.value) == str(expected.value)
    assert_unchanged(optimizer, before)
    assert str(model.state_dict()) == str(weights)
    assert not optimizer.state


@pytest.mark.parametrize(
    "model, optimizer, error, message",
    [
        ([], None, TypeError, r"model must be a torch\.nn\.Module, got list"),
        (nn.Linear(2, 2), torch.optim.SGD, TypeError, "optimizer must be a FusedSGD, got SGD"),
        (nn.Linear(2, 2), FusedSGD, ValueError, "optimizer has no parameter of this model"),
        (nn.LazyLinear(2), None, ValueError, "weight has no shape yet"),
        (nn.Sequential(nn.LazyBatchNorm1d()), None, ValueError, "0.weight has no shape yet"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(model, optimizer, error, message):
    made = optimizer or (lambda params, lr: FusedSGD(model.parameters(), lr=lr))
    others = made(nn.Linear(2, 2).parameters(), lr=0.1) if not isinstance(model, list) else None
    for call in (fp32_state_dict, lambda *arguments: load_fp32_state_dict(*arguments, {})):
        with pytest.raises(error, match=message):
            call(model, others)


def test_a_state_that_is_no_mapping_is_refused():
    model = nn.Linear(2, 2).half()
    with pytest.raises(TypeError, match="state_dict to be dict-like"):
        load_fp32_state_dict(model, FusedSGD(model.parameters(), lr=0.1), [torch.ones(2)])


def test_a_buffer_that_is_not_in_the_checkpoint_is_not_written() -> None:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1).expand(4), persistent=False)

    model = cast_model(nn.Sequential(nn.Linear(3, 3), Mask()), torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    state = {key: torch.full_like(value, 7.0) for key, value in fp32_state_dict(model, optimizer).items()}
    load_fp32_state_dict(model, optimizer, state)
    assert (model[0].weight == 7).all() and (model[1].mask == 1).all()
