"""docs/migration.md: the code runs, other libraries' checkpoints resume bit for bit, every row of a table holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import fused_tricks as ft
from fused_tricks import DynamicLossScale, FusedSGD
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    copies,
    gradients,
    masters,
    parameters,
    set_gradients,
)
from support.networks import Network

GUIDE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def sections() -> dict[str, list[str]]:
    """Returns this package's blocks of code for each section of the guide."""
    parts = re.split(r"^## From (.+)$", GUIDE, flags=re.MULTILINE)
    return {
        name: re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def loader() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def of_torch_amp() -> dict[str, Any]:
    """Returns a checkpoint of training in FP32 under a GradScaler."""
    model = Network(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    for images, labels in loader():
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


def of_apex() -> dict[str, Any]:
    """Returns a checkpoint as Apex writes it with O2: the parameters of the optimizer are the masters."""
    checkpoint = of_torch_amp()
    del checkpoint["scaler"]
    return {**checkpoint, "amp": {"loss_scaler0": {"loss_scale": 8192.0, "unskipped": 1999}}}


def of_flash() -> dict[str, Any]:
    """Returns a checkpoint as FlashOptim writes it: with the correction of the weights, and options of its own."""
    checkpoint = of_torch_amp()
    del checkpoint["scaler"]
    for state in checkpoint["optimizer"]["state"].values():
        state["error_bits"] = torch.zeros_like(state["momentum_buffer"], dtype=torch.bfloat16)
    (group,) = checkpoint["optimizer"]["param_groups"]
    checkpoint["optimizer"]["param_groups"] = [
        {key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "params")}
        | {"initial_lr": 0.1, "master_bytewidth": 3, "quantize": True}
    ]
    return checkpoint


CHECKPOINTS = {
    "torch": of_torch_amp,
    "Apex": of_apex,
    "Transformer Engine": of_torch_amp,
    "FlashOptim": of_flash,
}


@pytest.mark.parametrize("section", sections(), ids=lambda name: name.split()[0].strip(":"))
def test_the_code_of_the_guide_takes_a_run_over_without_losing_a_bit(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = sections()[section]
    (checkpoint,) = [make() for name, make in CHECKPOINTS.items() if section.startswith(name)]
    torch.save(checkpoint, "apex.pt")
    torch.save(checkpoint, "flash.pt")
    names = {
        "torch": torch,
        "ft": ft,
        "model": Network(),
        "loader": list(loader()),
        "criterion": nn.functional.cross_entropy,
        "checkpoint": deepcopy(checkpoint),
    }
    for block in blocks:
        exec(compile(block, "docs/migration.md", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    trained = dict(model.named_parameters())
    for name, weight in checkpoint["model"].items():
        if name in trained and trained[name].dtype != torch.float32:
            assert_same_bits(optimizer.state[trained[name]]["master_param"], weight, name)
            assert_same_bits(trained[name], weight.to(trained[name].dtype), name)
    for index, param in enumerate(model.parameters()):
        state = optimizer.state[param]
        assert_same_bits(state["momentum_buffer"], checkpoint["optimizer"]["state"][index]["momentum_buffer"])
        assert "error_bits" not in state
    if section.startswith(("torch", "Transformer Engine")):
        assert optimizer.stats().scale == 4096.0
    if section.startswith("Apex"):
        assert optimizer.stats().scale == 8192.0
        set_gradients(list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()])
        optimizer.step()
        assert optimizer.stats().scale == 16384.0, "after the 2000th good step"


def test_every_row_names_its_test_and_every_test_of_a_row_exists() -> None:
    rows = [line for line in GUIDE.splitlines() if line.startswith("| ") and " | " in line]
    headings = [line for line in rows if "<!--" not in line]
    assert len(headings) == len(sections()), headings
    named = set(re.findall(r"<!-- (test_\w+) -->", GUIDE))
    files = Path(__file__).parent.glob("test_migration*.py")
    defined = {
        name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    assert named <= defined, named - defined


def updated(optimizer: torch.optim.Optimizer, *grads: Tensor) -> None:
    """Takes one step with the gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, grads)
    optimizer.step()


@pytest.mark.parametrize("bias_decay", [False, True])
def test_biases_and_norms_do_not_decay_unless_asked_for(backend, device, bias_decay):
    params = parameters([(4, 3), (4,)], device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.1, weight_decay=0.5, bias_decay=bias_decay, backend=backend)
    updated(optimizer, torch.zeros(4, 3), torch.zeros(4))
    updated(torch.optim.SGD(expected, lr=0.1, weight_decay=0.5), torch.zeros(4, 3), torch.zeros(4))
    assert_same_bits(params[0], expected[0])
    assert torch.equal(params[1].cpu(), expected[1]) is bias_decay


def test_fp16_parameters_are_trained_where_grad_scaler_refuses_them_for_sgd(backend, device):
    ours, torchs = parameters([(5,)], torch.float16, device), parameters([(5,)], torch.float16, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    scaler.scale(torch.ones((), device=device))
    optimizer = FusedSGD(ours, lr=0.1, backend=backend)
    set_gradients([*ours, *torchs], [torch.full((5,), 8.0).half()] * 2)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(torch.optim.SGD(torchs, lr=0.1))
    scaler.step(optimizer)
    assert_same_bits(*masters(optimizer, ours), parameters([(5,)], torch.float16)[0].float() - 0.1)


def test_state_beside_fp16_parameters_is_fp32(backend, device):
    ours, torchs = parameters([(5,)], torch.float16, device), parameters([(5,)], torch.float16, device)
    sgd = torch.optim.SGD(torchs, lr=0.1, momentum=0.9)
    updated(sgd, torch.ones(5).half())
    assert sgd.state[torchs[0]]["momentum_buffer"].dtype == torch.float16
    optimizer = FusedSGD(ours, lr=0.1, momentum=0.9, backend=backend)
    optimizer.load_state_dict(sgd.state_dict())
    updated(optimizer, torch.ones(5).half())
    dtypes = {key: value.dtype for key, value in optimizer.state[ours[0]].items()}
    assert dtypes == {"master_param": torch.float32, "momentum_buffer": torch.float32}


def test_gradients_are_still_scaled_after_the_step(backend, device):
    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, loss_scale=8.0, backend=backend)
    optimizer.scale((3 * params[0]).sum()).backward()
    optimizer.step()
    assert_same_bits(params[0].grad, torch.full((5,), 24.0))
    (param,) = parameters([(5,)])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((3 * param).sum()).backward()
    scaler.step(torch.optim.SGD([param], lr=0.1))
    assert_same_bits(param.grad, torch.full((5,), 3.0))


def test_max_grad_norm_clips_unscaled_gradients(backend, device):
    moved = []
    for limit in (1.0, None):
        (param,) = parameters([(9,)], device=device)
        before = param.detach().clone()
        optimizer = FusedSGD([param], lr=1.0, loss_scale=1024.0, max_grad_norm=limit, backend=backend)
        set_gradients([param], [torch.full((9,), 4096.0)])
        if limit is None:
            torch.nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()
        moved.append(float((param.detach() - before).norm()))
    assert moved == pytest.approx([1.0, 1 / 1024], rel=1e-3)


@pytest.mark.parametrize("scale", [None, 8.0, "dynamic"])
def test_an_infinite_norm_skips_the_step(backend, device, scale):
    (ours,), (torchs,) = parameters([(5,)], device=device), parameters([(5,)])
    before = ours.detach().clone()
    grad = torch.tensor([1.0, torch.inf, 1.0, 1.0, 1.0])
    optimizer = FusedSGD([ours], lr=0.1, loss_scale=scale, max_grad_norm=1.0, backend=backend)
    updated(optimizer, grad)
    assert_same_bits(ours, before)
    assert optimizer.stats().skipped_steps == 1
    torchs.grad = grad
    torch.nn.utils.clip_grad_norm_([torchs], 1.0)
    assert torchs.grad[1].isnan()


def test_hooks_run_around_a_skipped_step(backend, device):
    calls = {}
    for kind in (FusedSGD, torch.optim.SGD):
        options = {"backend": backend} if kind is FusedSGD else {}
        params = parameters([(5,)], device=device)
        optimizer = kind(params, lr=0.1, **options)
        calls[kind] = 0

        def count(*_: Any, kind: Any = kind) -> None:
            calls[kind] += 1

        optimizer.register_step_post_hook(count)
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(torch.ones((), device=device))
        set_gradients(params, [torch.full((5,), torch.inf)])
        scaler.step(optimizer)
    assert calls == {FusedSGD: 1, torch.optim.SGD: 0}


def test_statistics_tell_of_a_skipped_step(backend, device):
    optimizer = FusedSGD(parameters([(5,)], device=device), lr=0.1, loss_scale="dynamic", backend=backend)
    updated(optimizer, torch.full((5,), torch.nan))
    assert optimizer.stats() == (32768.0, 0, 1, None, True, 1)
    updated(optimizer, torch.ones(5))
    assert optimizer.stats() == (32768.0, 1, 1, None, False, 0)


def test_after_an_overflow_in_the_first_step_the_next_is_the_first(backend, device):
    params = parameters([(5,)], device=device)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = FusedSGD(params, loss_scale=8.0, backend=backend, **options)
    updated(optimizer, torch.full((5,), torch.inf))
    updated(optimizer, torch.full((5,), 8.0))
    expected = parameters([(5,)])
    updated(torch.optim.SGD(expected, foreach=False, **options), torch.ones(5))
    assert_all_same_bits(params, expected)


def test_the_scale_has_a_floor_and_a_ceiling(backend, device):
    scale = DynamicLossScale(init_scale=2.0, growth_interval=1)
    optimizer = FusedSGD(parameters([(5,)], device=device), lr=0.0, loss_scale=scale, backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0, growth_interval=1)
    scaler.scale(torch.ones((), device=device))
    params = parameters([(5,)], device=device)
    unscaled = FusedSGD(params, lr=0.0, backend=backend)
    for value, bounded, unbounded in ((torch.inf, 1.0, 0.25), (1.0, 2.0**24, 2.0**25)):
        for _ in range(3 if value == torch.inf else 27):
            updated(optimizer, torch.full((5,), value))
            set_gradients(params, [torch.full((5,), value)])
            scaler.step(unscaled)
            scaler.update()
        assert (optimizer.stats().scale, scaler.get_scale()) == (bounded, unbounded)
    rule = DynamicLossScale()
    assert (rule.min_scale, rule.max_scale) == (1.0, 2.0**24)
    assert (rule.init_scale, rule.growth_interval, rule.growth_factor) == (2.0**16, 2000, 2.0)


def test_a_loss_scale_serves_one_optimizer() -> None:
    scale = DynamicLossScale()
    first = FusedSGD(parameters([(5,)]), loss_scale=scale)
    with pytest.raises(ValueError, match="serves another optimizer"):
        FusedSGD(parameters([(5,)]), loss_scale=scale)
    assert first.loss_scale is scale


@pytest.mark.parametrize("scale", [8.0, "dynamic"])
def test_a_closure_together_with_loss_scaling_is_refused(backend, device, scale):
    optimizer = FusedSGD(parameters([(5,)], device=device), loss_scale=scale, backend=backend)
    with pytest.raises(RuntimeError, match="a closure cannot be combined with loss scaling"):
        optimizer.step(lambda: 0.0)


def test_a_parameter_listed_twice_is_refused(backend, device):
    (param,) = parameters([(5,)], device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = FusedSGD([param, param], lr=0.1, backend=backend)
        torch.optim.SGD([param, param], lr=0.1)
    assert len([w for w in caught if "duplicate parameters" in str(w.message)]) == 2
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is also parameter 0 of group 0"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_foreach_and_fused_choose_nothing(backend, device, options):
    params, expected = (parameters([(5,), (2, 3)], device=device) for _ in range(2))
    (grads,) = gradients(params, 1)
    updated(FusedSGD(params, backend=backend, **OPTIONS, **options), *grads)
    updated(FusedSGD(expected, backend=backend, **OPTIONS), *grads)
    assert_all_same_bits(params, expected)


def test_what_sgd_takes_and_this_does_not_is_refused(backend, device):
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        FusedSGD(parameters([(5,)], device=device), differentiable=True, backend=backend)
    embedding = nn.Embedding(4, 3, sparse=True, device=device)
    optimizer = FusedSGD(embedding.named_parameters(), backend=backend)
    embedding(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="parameter 'weight' has a gradient of layout torch.sparse"):
        optimizer.step()
    wave = Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    optimizer = FusedSGD([("wave", wave)], backend=backend)
    wave.grad = torch.ones_like(wave)
    with pytest.raises(RuntimeError, match="parameter 'wave' has dtype torch.complex64"):
        optimizer.step()


def test_a_loaded_state_is_copied(backend, device):
    params = parameters([(5,)], device=device)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    updated(sgd, torch.ones(5))
    optimizer, other = FusedSGD(params, backend=backend), torch.optim.SGD(params)
    optimizer.load_state_dict(sgd.state_dict())
    other.load_state_dict(sgd.state_dict())
    (param,) = params
    theirs = sgd.state[param]["momentum_buffer"]
    assert other.state[param]["momentum_buffer"] is theirs
    assert optimizer.state[param]["momentum_buffer"].data_ptr() != theirs.data_ptr()


def test_a_parameter_written_under_no_grad_goes_on_from_there(backend, device):
    (param,) = parameters([(5,)], torch.float16, device)
    optimizer = FusedSGD([param], lr=0.5, backend=backend)
    updated(optimizer, torch.ones(5).half())
    with torch.no_grad():
        param.fill_(2.0)
    updated(optimizer, torch.ones(5).half())
    assert_same_bits(optimizer.state[param]["master_param"], torch.full((5,), 1.5))


def trained_in_fp16() -> tuple[nn.Module, FusedSGD]:
    model = ft.cast_model(Network(), torch.float16)
    optimizer = FusedSGD(model.parameters(), loss_scale=128.0, **OPTIONS)
    for images, labels in loader():
        optimizer.zero_grad()
        optimizer.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        optimizer.step()
    return model, optimizer


def test_a_checkpoint_has_the_masters() -> None:
    (model, optimizer), (other, resumed) = trained_in_fp16(), trained_in_fp16()
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    low = [p for p in model.parameters() if p.dtype == torch.float16]
    others = [p for p in other.parameters() if p.dtype == torch.float16]
    assert_all_same_bits(masters(resumed, others), masters(optimizer, low))


def test_groups_list_the_models_parameters() -> None:
    model, optimizer = trained_in_fp16()
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    assert optimizer.state[model.fc.weight]["master_param"].dtype == torch.float32


def test_decoupled_weight_decay_is_an_option(backend, device):
    (param,) = parameters([(4, 3)], device=device)
    expected = param.detach().cpu() * (1 - 0.1 * 0.5)
    optimizer = FusedSGD([param], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True, backend=backend)
    updated(optimizer, torch.zeros(4, 3))
    assert_same_bits(param, expected)


@pytest.mark.parametrize(
    "option", ["wd_after_momentum", "materialize_master_grads", "set_grad_none", "decouple_lr", "quantize"]
)
def test_options_of_other_optimizers_are_refused_by_name(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        FusedSGD(parameters([(5,)]), **{option: True})


def test_loading_the_optimizer_last_would_round_the_weights() -> None:
    """The guide therefore loads the optimizer first."""
    model, optimizer = trained_in_fp16()
    checkpoint = of_torch_amp()
    ft.load_fp32_state_dict(model, optimizer, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert "master_param" not in optimizer.state[model.fc.weight]


def test_compressed_momentum_begins_anew(backend, device):
    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    state = optimizer.state_dict()
    compressed = {"momentum_buffer::quantized": torch.ones(5, dtype=torch.int8)}
    optimizer.load_state_dict({**state, "state": {0: compressed}})
    updated(optimizer, torch.ones(5))
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], torch.ones(5))


def test_dampening_does_not_apply_to_the_first_update(backend, device):
    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    updated(optimizer, torch.ones(5))
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], torch.ones(5))


def test_a_flash_state_leaves_nesterov_as_it_is() -> None:
    model = Network()
    optimizer = FusedSGD(model.parameters(), nesterov=True, **OPTIONS)
    optimizer.load_state_dict(of_flash()["optimizer"])
    assert optimizer.param_groups[0]["nesterov"] is True


def test_strided_parameters_are_updated(backend, device):
    param = Parameter(torch.arange(6.0, device=device).view(2, 3).t())
    updated(FusedSGD([param], lr=1.0, backend=backend), torch.ones(3, 2))
    assert_same_bits(param, torch.arange(6.0).view(2, 3).t() - 1)


def test_parameters_can_be_updated_during_the_backward_pass(backend, device):
    params = parameters([(5,), (5,)], device=device)
    optimizers = {p: FusedSGD([p], lr=0.5, backend=backend) for p in params}
    before = [p.detach().clone() for p in params]
    for param in params:
        param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    (params[0] + params[1]).sum().backward()
    assert_all_same_bits(params, [b - 0.5 for b in before])
