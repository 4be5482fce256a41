"""`zero_gamma_` on any device and under any wrapper: only γ changes."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from fused_tricks import cast_model, zero_gamma_, zero_gamma_names

pytestmark = pytest.mark.slow

ON_CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
)


class Network(nn.Module):
    """A residual block whose forward pass writes to everything that a forward pass can write to."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 4, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.history: list[Tensor] = [torch.zeros(2)]

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.calls.add_(1)
        self.history[0].add_(1)
        random.random()
        np.random.rand()
        torch.rand(())
        x = self.stem(x)
        return x + F.dropout(self.branch(x), 0.5)


class DataDependent(Network):
    """A network that runs the branch only if the sum of its input is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else self.stem(x)


class Sum(nn.Module):
    """A module that adds the output of `branch` to the input's first channel."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.branch(x)


@pytest.fixture(params=[Network, DataDependent], ids=["meta", "example inputs"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def images(device: str = "cpu") -> Tensor:
    return torch.ones(2, 3, 8, 8, device=device)


def random_states() -> tuple[object, ...]:
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]


def everything(model: nn.Module) -> dict[str, Any]:
    """Returns everything that a forward or backward pass can change in a `Network`, except γ of the branch's norm."""
    tensors = dict(model.state_dict(keep_vars=True))
    tensors.pop("branch.1.weight", None)
    return {
        "identities": [id(tensor) for tensor in tensors.values()],
        "versions": [tensor._version for tensor in tensors.values()],
        "values": [tensor.tolist() for tensor in tensors.values()],
        "devices": [tensor.device for tensor in tensors.values()],
        "dtypes": [tensor.dtype for tensor in tensors.values()],
        "requires_grad": [tensor.requires_grad for tensor in tensors.values()],
        "gradients": [None if t.grad is None else t.grad.tolist() for t in tensors.values()],
        "history": [tensor.tolist() for tensor in getattr(model, "history", [])],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [list(hooks.items()) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ],
        "random": random_states(),
    }


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_gamma_changes(network: nn.Module, training: bool) -> None:
    network.stem.requires_grad_(False)
    network.branch[1].register_full_backward_hook(lambda *args: None)
    network.branch.register_forward_hook(lambda *args: None)
    network(images()).sum().backward()
    network.train(training)
    example, before = images(), everything(network)
    zero_gamma_(network, example)
    assert everything(network) == before
    assert torch.equal(example, images())
    assert network.branch[1].weight.count_nonzero() == 0


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_model_stays_where_and_what_it_is(dtype: torch.dtype, device: str) -> None:
    model = Network().to(device, dtype)
    before = everything(model)
    zero_gamma_(model)
    assert everything(model) == before
    assert model.branch[1].weight.count_nonzero() == 0


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_model_whose_path_depends_on_data_runs_where_it_is(device: str) -> None:
    model = DataDependent().to(device)
    assert zero_gamma_names(model, images(device)) == ["branch.1"]
    assert zero_gamma_names(model, -images(device)) == []


class OnlyOnMeta(TorchDispatchMode):
    """A mode that raises if an operation computes with values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:
            results = result if isinstance(result, tuple) else (result,)
            assert all(r.is_meta for r in results if isinstance(r, Tensor)), func
        return result


def test_no_value_is_copied_or_computed() -> None:
    model = Sum(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with OnlyOnMeta():
        assert zero_gamma_names(model) == ["branch.1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_converted_to_low_precision_works(dtype: torch.dtype) -> None:
    model = cast_model(Network(), dtype)
    before = everything(model)
    zero_gamma_(model, strict=True)
    assert everything(model) == before
    assert model.branch[1].weight.dtype == torch.float32
    assert model.branch[1].weight.count_nonzero() == 0


@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["none", "no_grad", "inference_mode", "autocast"],
)
def test_it_works_in_any_context(
    network: nn.Module, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    example = images()
    with context():
        assert zero_gamma_names(network, example) == ["branch.1"]


def test_a_model_on_meta_works() -> None:
    class Scaled(Network):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.scale * self.branch(x)

    assert zero_gamma_names(Scaled().to("meta")) == ["branch.1"]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled in parallel": lambda model: nn.DataParallel(WRAPPERS["torch.compile"](model)),
    "compiled in a container": lambda model: nn.Sequential(WRAPPERS["torch.compile"](model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_a_wrapped_model_fit_the_wrapper(network: nn.Module, wrapper: str) -> None:
    model = WRAPPERS[wrapper](network)
    [name] = zero_gamma_names(model, images())
    assert model.get_submodule(name) is not None
    assert dict(model.named_modules())[name] is model.get_submodule(name)
    assert isinstance(model.get_submodule(name), nn.BatchNorm2d)


def test_names_of_a_distributed_model_fit_it_and_no_process_waits(network: nn.Module, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network)
    finally:
        torch.distributed.destroy_process_group()
    assert zero_gamma_names(model, images()) == ["module.branch.1"]


def test_data_parallel_is_not_run(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.DataParallel(nn.DataParallel(network)))
    monkeypatch.setattr(nn.DataParallel, "forward", None)
    assert zero_gamma_names(model, images()) == ["0.module.module.branch.1"]


def test_a_model_compiled_in_place_works(network: nn.Module) -> None:
    network.compile()
    assert zero_gamma_names(network, images()) == ["branch.1"]


def test_a_compiled_function_on_the_way_is_followed() -> None:
    @torch.compile
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    class Compiled(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return add(x[:, :1], self.branch(x))

    assert zero_gamma_names(Compiled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))) == ["branch.1"]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "parametrized"])
def test_computed_weights_on_the_way_are_followed(kind: str) -> None:
    model = Network()
    normalise = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "parametrized": nn.utils.parametrizations.weight_norm,
    }[kind]
    normalise(model.branch[0])
    model(images())
    assert zero_gamma_names(model) == ["branch.1"]


@pytest.mark.parametrize(
    "example",
    [images(), (images(),), {"x": images()}, (images("meta"),)],
    ids=["tensor", "tuple", "dict", "on meta"],
)
def test_example_inputs_come_in_several_forms(example: object) -> None:
    assert zero_gamma_names(Network(), example) == ["branch.1"]


def test_example_inputs_may_be_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, batch: dict[str, list[Tensor]], scale: float) -> Tensor:
            output: Tensor = self.network(batch["images"][0])
            return output * scale

    assert zero_gamma_names(Nested(), ({"images": [images()]}, 2.0)) == ["network.branch.1"]


def test_a_batch_of_one_pixel_is_enough() -> None:
    assert zero_gamma_names(DataDependent(), torch.ones(1, 3, 1, 1)) == ["branch.1"]


@pytest.mark.parametrize(
    "first, branch",
    [
        (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)),
        (nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 1)),
        (nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 1)),
        (nn.Linear(5, 4), nn.Linear(4, 4)),
    ],
    ids=["grey images", "signals", "volumes", "vectors"],
)
def test_the_input_is_what_the_first_layer_takes(first: nn.Module, branch: nn.Module) -> None:
    model = nn.Sequential(first, Sum(nn.Sequential(branch, nn.GroupNorm(1, 4))))
    assert zero_gamma_names(model) == ["1.branch.1"]


@pytest.mark.parametrize("size", [224, 256, 384, 32])
def test_networks_that_take_one_size_only_are_tried_with_the_usual_ones(size: int) -> None:
    model = nn.Sequential(Network(), nn.Flatten(), nn.Linear(4 * size * size, 2, device="meta"))
    assert zero_gamma_names(model) == ["0.branch.1"]


def test_a_block_that_training_may_skip_is_found() -> None:
    class Skipping(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x) if self.training else super().forward(x)

    assert zero_gamma_names(Skipping()) == ["branch.1"]


def test_what_fails_in_eval_mode_is_tried_in_training_mode() -> None:
    class OnlyTraining(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else super().forward(x).detach()

    model = OnlyTraining().eval()
    assert zero_gamma_names(model, torch.ones(1, 3, 1, 1)) == ["branch.1"]
    assert not model.training


def test_the_first_layer_may_be_made_after_another() -> None:
    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.first = Network(in_channels=8), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.network(self.first(x))
            return output

    assert zero_gamma_names(Reordered()) == ["network.branch.1"]


def test_reentrant_checkpoints_are_restored() -> None:
    apply = CheckpointFunction.apply
    zero_gamma_names(Network())
    assert CheckpointFunction.apply == apply
    assert "apply" not in vars(CheckpointFunction)


class Locked(Network):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class WithoutGraph(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


REFUSED: dict[str, tuple[Callable[[], object], object, type[Exception], str]] = {
    "no module": (
        lambda: [nn.BatchNorm2d(3)],
        None,
        TypeError,
        r"model must be a torch\.nn\.Module, got list",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 1)),
        None,
        ValueError,
        r"parameter 0\.weight has no shape yet; run a forward pass",
    ),
    "data-dependent": (
        DataDependent,
        None,
        RuntimeError,
        r"torch\.float32 of shape \(2, 3, 224, 224\) on the meta device; pass example_inputs .*item",
    ),
    "data-dependent, examples without values": (
        DataDependent,
        images("meta"),
        RuntimeError,
        r"could not run on example_inputs.* meta tensors",
    ),
    "wrong channels": (
        Network,
        torch.ones(2, 5, 8, 8),
        RuntimeError,
        r"could not run on example_inputs; .* on its device\. RuntimeError: .*5 channels",
    ),
    "wrong arguments": (Network, {"image": images()}, RuntimeError, "unexpected keyword argument 'image'"),
    "no output": (WithoutGraph, None, RuntimeError, "it returned no tensor that depends on a parameter"),
    "cannot be copied": (Locked, None, RuntimeError, "TypeError: cannot pickle '_thread.lock' object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_says_what_to_do_and_changes_nothing(case: str) -> None:
    build, example, error, message = REFUSED[case]
    model: Any = build()
    before = everything(model) if isinstance(model, Network) else random_states()
    gamma = copy.copy(model.branch[1].weight._version) if isinstance(model, Network) else None
    with pytest.raises(error, match=message):
        zero_gamma_(model, example)
    assert (everything(model) if isinstance(model, Network) else random_states()) == before
    assert gamma is None or model.branch[1].weight._version == gamma


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_torchscript_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"call this before torch\.jit\.script"):
        zero_gamma_names(model)
