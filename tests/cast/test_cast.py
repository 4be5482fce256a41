"""`cast_model`: the tensors that are cast, the tensors that stay FP32, and the unchanged behaviour of the module."""

import copy
import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks.cast import cast_model, norm_layers

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [FP16, BF16])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


class Network(nn.Module):
    """Layers to cast, a BatchNorm, norms with casts around them, a list of modules, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.gn = nn.GroupNorm(2, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.ln = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4,), 1.5))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.bn(self.conv(x)).relu()).mean((2, 3)) * self.scale
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(self.ln(x))


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def dtypes_at(module: nn.Module, run: Callable[[], object]) -> tuple[torch.dtype, torch.dtype]:
    """Returns the input dtype of `module`'s forward and the output dtype of the module, during `run`."""
    seen: list[torch.dtype] = []
    with module.register_forward_hook(lambda _, args, output: seen.extend((args[0].dtype, output.dtype))):
        run()
    received, returned = seen
    return received, returned


def hook_counts(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@both_dtypes
def test_floating_tensors_are_cast_and_those_of_norms_stay_fp32(dtype: torch.dtype) -> None:
    for name, found in dtypes(cast_model(Network(), dtype)).items():
        if name in ("steps", "bn.num_batches_tracked"):
            assert found == torch.int64
        else:
            assert found == (FP32 if name.split(".")[0] in ("bn", "gn", "ln") else dtype), name


def test_the_model_itself_is_returned_in_fp16_by_default() -> None:
    model = nn.Linear(2, 2)
    assert cast_model(model) is model
    assert model.weight.dtype == FP16


def test_a_norm_in_low_precision_comes_back_to_fp32() -> None:
    assert set(dtypes(cast_model(nn.Sequential(nn.LayerNorm(4)).half())).values()) == {FP32}


@both_dtypes
@pytest.mark.parametrize(
    "make, shape",
    [
        (nn.BatchNorm1d, (4, 4)),
        (nn.BatchNorm2d, (4, 4, 3, 3)),
        (nn.BatchNorm3d, (4, 4, 2, 2, 2)),
        (nn.LayerNorm, (4, 4)),
        (nn.RMSNorm, (4, 4)),
        (functools.partial(nn.GroupNorm, 2), (4, 4, 3)),
        (functools.partial(nn.InstanceNorm1d, affine=True, track_running_stats=True), (4, 4, 3)),
        (functools.partial(nn.InstanceNorm2d, affine=True), (4, 4, 3, 3)),
        (functools.partial(nn.InstanceNorm3d, affine=True), (4, 4, 2, 2, 2)),
        (lambda _: nn.LazyBatchNorm1d(), (4, 4)),
        (lambda _: nn.LazyInstanceNorm1d(affine=True), (4, 4, 3)),
    ],
)
def test_every_norm_works_in_fp32_between_low_precision_layers(
    make: Callable[[int], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    norm = make(4)
    model = cast_model(nn.Sequential(nn.Linear(shape[-1], shape[-1]), norm, nn.Linear(shape[-1], 2)), dtype)
    is_batch_norm = "BatchNorm" in type(norm).__name__
    x = torch.randn(shape)
    assert dtypes_at(norm, lambda: model(x).sum().backward()) == (dtype if is_batch_norm else FP32, dtype)
    assert {t.dtype for p in norm.parameters() for t in (p, p.grad)} == {FP32}
    assert {b.dtype for b in norm.buffers()} <= {FP32, torch.int64}
    assert model[0].weight.grad.dtype == dtype


def test_a_batch_norm_gets_no_casts_around_it() -> None:
    assert hook_counts(cast_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), BF16)) == [2, 0, 0]


def test_a_batch_norm_with_a_forward_of_its_own_computes_in_fp32() -> None:
    class Affine(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.diag())

    model = cast_model(nn.Sequential(nn.Linear(4, 4), Affine(4), nn.Linear(4, 2)), BF16)
    assert dtypes_at(model[1], lambda: model(torch.randn(2, 4))) == (FP32, BF16)


def test_norm_layers_are_torch_norms_subclasses_and_whatever_has_running_statistics() -> None:
    class OwnNorm(nn.LayerNorm):
        pass

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(4))

    model = nn.Sequential(OwnNorm(4), nn.SyncBatchNorm(4), Frozen(), nn.LocalResponseNorm(2), nn.Linear(4, 4))
    assert norm_layers(model) == list(model)[:-1]


@both_dtypes
@pytest.mark.parametrize(
    "name", ["torchvision.ops.FrozenBatchNorm2d", "torchvision.models.convnext.LayerNorm2d"]
)
def test_a_torchvision_norm_computes_in_fp32(name: str, dtype: torch.dtype) -> None:
    module, _, attribute = name.rpartition(".")
    norm = getattr(pytest.importorskip(module), attribute)(4)
    model = cast_model(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)), dtype)
    assert dtypes_at(norm, lambda: model(images())) == (FP32, dtype)
    assert norm.weight.dtype == FP32


def test_a_sync_batch_norm_made_afterwards_stays_fp32() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(cast_model(Network(), BF16))
    assert type(model.bn) is nn.SyncBatchNorm
    assert model.bn.weight.dtype == model.bn.running_var.dtype == FP32


def test_running_statistics_are_those_of_an_fp32_batch_norm_on_the_same_input() -> None:
    model = cast_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), BF16)
    reference = nn.BatchNorm2d(4)
    for step in range(5):
        reference(model[0]((images() + step).bfloat16()).float())
        model(images() + step)
    torch.testing.assert_close(model[1].running_mean, reference.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, reference.running_var, rtol=1e-5, atol=1e-6)


def test_running_statistics_are_close_to_those_of_an_fp32_network() -> None:
    reference = Network()
    model = cast_model(copy.deepcopy(reference), BF16)
    for step in range(5):
        reference(images() + step)
        model(images() + step)
    torch.testing.assert_close(model.bn.running_mean, reference.bn.running_mean, rtol=0.02, atol=0.01)
    torch.testing.assert_close(model.bn.running_var, reference.bn.running_var, rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    "keep, kept",
    [
        ((), set()),
        (nn.Linear, {"blocks.0", "blocks.1", "fc"}),
        ([nn.LayerNorm, "fc"], {"ln", "fc"}),
        ("?n", {"bn", "gn", "ln"}),
        ("blocks", {"blocks.0", "blocks.1"}),
        ("bl*.1", {"blocks.1"}),
        ("", {"conv", "bn", "gn", "ln", "blocks.0", "blocks.1", "fc"}),
    ],
    ids=[
        "nothing",
        "a type",
        "a type and a name",
        "a pattern",
        "a list",
        "a pattern across dots",
        "the model",
    ],
)
def test_modules_are_kept_by_type_and_by_name_pattern(keep: Any, kept: set[str]) -> None:
    model = cast_model(Network(), BF16, keep_fp32=keep)
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dtype == FP32} == kept
    assert torch.isfinite(model(images())).all()


def test_a_module_is_kept_in_addition_to_the_norms() -> None:
    model = Network()
    cast_model(model, BF16, keep_fp32=[*norm_layers(model), model.fc])
    assert [m.weight.dtype for m in (model.fc, model.ln, model.conv)] == [FP32, FP32, BF16]
    assert dtypes_at(model.fc, lambda: model(images())) == (FP32, BF16)


def test_nothing_is_rounded_inside_a_kept_module() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    reference = copy.deepcopy(head)
    model = cast_model(nn.Sequential(nn.Linear(4, 4), head), BF16, keep_fp32=["1", "1.2", nn.LayerNorm])
    x = torch.randn(8, 4).bfloat16()
    assert torch.equal(model(x), reference(model[0](x).float()).bfloat16().float())


def test_a_kept_embedding_gives_the_low_precision() -> None:
    model = cast_model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), FP16, keep_fp32="0")
    assert dtypes_at(model[0], lambda: model(torch.tensor([1, 2]))) == (torch.int64, FP16)


def test_gradients_flow_to_an_fp32_input() -> None:
    x = images().requires_grad_()
    cast_model(Network(), BF16)(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == FP32 and torch.isfinite(x.grad).all()


def test_parameters_stay_the_objects_they_were_with_their_settings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    model[1].bias.requires_grad_(False)
    before = list(model.parameters())
    cast_model(model, BF16)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert [p.requires_grad for p in before] == [True, True, True, False]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_cast_with_their_parameters() -> None:
    model = Network()
    model(images()).sum().backward()
    cast_model(model, BF16)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    cast_model(model, BF16)
    assert model[1].weight is model[0].weight
    assert model(torch.tensor([1, 2])).dtype == FP32


def test_a_buffer_that_modules_share_stays_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    for module in model:
        module.register_buffer("shared", torch.ones(2))
    model[1].shared = model[0].shared
    cast_model(model, BF16)
    assert model[1].shared is model[0].shared
    assert [module.shared.dtype for module in model] == [BF16, BF16, FP32]


def test_a_model_that_is_half_already_becomes_what_an_fp32_one_becomes() -> None:
    model, fresh = cast_model(Network().half(), BF16), cast_model(Network(), BF16)
    assert (hook_counts(model), dtypes(model)) == (hook_counts(fresh), dtypes(fresh))


def test_casting_twice_is_the_same_as_once() -> None:
    once = cast_model(Network(), BF16)
    twice = cast_model(copy.deepcopy(once), BF16)
    assert (hook_counts(twice), dtypes(twice)) == (hook_counts(once), dtypes(once))
    assert torch.equal(twice(images()), once(images()))


def test_casting_again_starts_anew() -> None:
    model = cast_model(cast_model(Network(), FP16, keep_fp32="fc"), BF16, output_dtype=None)
    fresh = cast_model(Network(), BF16, output_dtype=None)
    assert (hook_counts(model), dtypes(model)) == (hook_counts(fresh), dtypes(fresh))
    assert model(images()).dtype == BF16


def test_a_part_cast_before_gives_low_precision_within_the_whole() -> None:
    part = cast_model(nn.Linear(4, 4), FP16)
    model = cast_model(nn.Sequential(part, nn.Linear(4, 2)), FP16)
    assert dtypes_at(part, lambda: model(torch.ones(2, 4))) == (FP16, FP16)


def test_casting_to_fp32_undoes_the_conversion() -> None:
    model = cast_model(cast_model(Network(), BF16), FP32)
    assert set(dtypes(model).values()) == {FP32, torch.int64}
    assert sum(hook_counts(model)) == 0


def test_the_state_dict_has_the_same_keys_and_loads_fp32_weights() -> None:
    source, model = Network(), cast_model(Network(), BF16)
    before = dtypes(model)
    assert model.state_dict().keys() == source.state_dict().keys()
    model.load_state_dict(source.state_dict())
    assert dtypes(model) == before
    assert torch.equal(model.fc.weight, source.fc.weight.bfloat16())


def test_a_deep_copy_is_independent() -> None:
    model = cast_model(Network(), BF16).eval()
    expected = model(images())
    clone = copy.deepcopy(model)
    assert torch.equal(clone(images()), expected)
    cast_model(clone, FP32)
    assert sum(hook_counts(clone)) == 0
    assert torch.equal(model(images()), expected)


def test_a_saved_model_loads_with_its_casts() -> None:
    model = cast_model(Network(), BF16).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images()), model(images()))
    assert hook_counts(cast_model(loaded, BF16)) == hook_counts(model)


def test_a_hook_added_in_a_process_that_loaded_the_model_replaces_no_cast(tmp_path: Path) -> None:
    torch.save(cast_model(nn.Sequential(nn.Linear(2, 2)), BF16), tmp_path / "model.pt")
    script = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
[key], [pre_key] = model._forward_hooks, model._forward_pre_hooks
for _ in range(key + 2):
    model.register_forward_pre_hook(lambda module, args: None)
    model.register_forward_hook(lambda module, args, output: None)
print(model(torch.ones(1, 2)).dtype)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "torch.float32", run.stderr


@both_dtypes
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_to_one_graph(backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = cast_model(Network(), dtype, keep_fp32=(nn.BatchNorm2d, nn.LayerNorm, "blocks")).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))
    compiled(images()).sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_it_exports(training: bool, strict: bool) -> None:
    model = cast_model(Network(), BF16).train(training)
    exported = torch.export.export(model, (images(),), strict=strict).module()
    torch.testing.assert_close(exported(images()), model(images()))


@both_dtypes
@pytest.mark.parametrize("keep", ["scale", ["sc*", nn.LayerNorm], "*"])
def test_a_buffer_is_kept_by_its_name(keep: Any, dtype: torch.dtype) -> None:
    model = Network()
    model.scale = torch.full((4,), 1.0 + 2.0**-20)
    assert torch.equal(cast_model(model, dtype, keep_fp32=keep).scale, torch.full((4,), 1.0 + 2.0**-20))
    assert model.conv.weight.dtype == (FP32 if keep == "*" else dtype)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _complex() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model


@pytest.mark.parametrize(
    "model, arguments, error, message",
    [
        (Network(), {"dtype": torch.float64}, ValueError, "dtype must be .* got torch.float64"),
        (Network(), {"dtype": "float16"}, ValueError, "dtype must be .* got 'float16'"),
        (Network(), {"output_dtype": torch.int32}, ValueError, "output_dtype must be .* got torch.int32"),
        (
            Network(),
            {"keep_fp32": ["bn", "head.*"]},
            ValueError,
            r"keep_fp32: 'head\.\*' matches no name of a module",
        ),
        (
            Network(),
            {"keep_fp32": nn.Linear(3, 5)},
            ValueError,
            r"keep_fp32: .* not in the model: Linear\(.*3",
        ),
        (Network(), {"keep_fp32": [3]}, TypeError, "keep_fp32 must contain .* got 3"),
        (Network(), {"keep_fp32": 3}, TypeError, "keep_fp32 must contain .* got 3"),
        (_tied(), {"keep_fp32": "0"}, ValueError, r"parameter 1\.weight is also in a module kept in FP32"),
        (_complex(), {}, ValueError, r"parameter 0\.phase is complex"),
        (Network(), {"cast_inputs": ["x", "y"]}, ValueError, "forward has no argument 'y'; it has x"),
        (Network(), {"cast_inputs": 3}, TypeError, "cast_inputs must be True, False or names .* got 3"),
        (Network(), {"cast_inputs": [FP32]}, TypeError, "cast_inputs must be True, False or names"),
    ],
)
def test_a_refused_call_says_why_and_changes_nothing(
    model: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = dtypes(model)
    with pytest.raises(error, match=message):
        cast_model(model, **arguments)
    assert dtypes(model) == before
    assert sum(hook_counts(model)) == 0


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        cast_model([nn.Linear(2, 2)])  # type: ignore[type-var]


def test_a_model_that_contains_itself_is_refused_and_one_that_contains_a_part_twice_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].blocks = nn.ModuleList([nn.Linear(2, 2), model])
    with pytest.raises(ValueError, match=r"Sequential contains itself, as 0\.blocks\.1"):
        cast_model(model, BF16)
    assert model[0].weight.dtype == model[0].blocks[0].weight.dtype == FP32
    model[0].blocks[1] = model[0].blocks[0]
    assert cast_model(model, BF16)(torch.ones(1, 2)).isfinite().all()


def test_torch_script_is_refused_with_what_to_do() -> None:
    model = cast_model(Network(), BF16).eval()
    with pytest.raises(AttributeError, match=r"jit.script cannot compile the casts of cast_model"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.trace(model, (images(),))(images()), model(images()))
    torch.jit.script(cast_model(model, FP32))
