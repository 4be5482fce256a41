"""FusedSGD among torch's own training tools: schedulers, weight averages, clipping, freezing, hooks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fused_tricks import FusedSGD, cast_model, ema_state_dict, ema_weights, fp32_state_dict
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    both,
    copies,
    drive,
    gradients,
    masters,
    parameters,
    set_gradients,
)
from support.networks import Network

pytestmark = pytest.mark.integration

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR, with momentum": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR, with momentum": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=2), lrs.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_gives_torchs_bits(backend, device, name):
    pairs = both(backend, device, [(4, 3)], lr=0.05, momentum=0.9)
    schedulers = {id(optimizer): SCHEDULERS[name](optimizer) for optimizer, _ in pairs}
    rates: dict[int, list[tuple[float, float]]] = {id(optimizer): [] for optimizer, _ in pairs}

    def schedule(index: int, optimizer: torch.optim.Optimizer, _: list[Parameter]) -> None:
        if index:
            metrics = (1.0,) if name == "ReduceLROnPlateau" else ()
            schedulers[id(optimizer)].step(*metrics)
        (group,) = optimizer.param_groups
        rates[id(optimizer)].append((group["lr"], group["momentum"]))

    drive(pairs, 6, schedule)
    ours, torchs = rates.values()
    assert ours == torchs
    assert len({lr for lr, _ in ours}) > 1
    assert (len({momentum for _, momentum in ours}) > 1) == ("momentum" in name)


def inputs(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss = model(inputs(step)).square().mean()
    (optimizer.scale(loss) if isinstance(optimizer, FusedSGD) else loss).backward()
    optimizer.step()


def rivals(**options: Any) -> list[tuple[Network, torch.optim.Optimizer]]:
    """Returns the same network twice, with FusedSGD and with torch.optim.SGD."""
    ours, torchs = Network(), Network()
    return [
        (ours, FusedSGD(ours.parameters(), bias_decay=True, **options)),
        (torchs, torch.optim.SGD(torchs.parameters(), foreach=False, **options)),
    ]


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_averages_of_fp32_weights_have_the_bits_of_torchs(kind: str) -> None:
    results = []
    for model, optimizer in rivals(lr=0.1, momentum=0.9):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
        schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
        for step in range(5):
            train_step(model, optimizer, step)
            average.update_parameters(model)
            schedule.step()
        update_bn([inputs(step) for step in range(5)], average)
        results.append(list(average.state_dict().values()))
    assert_all_same_bits(*results)


def test_the_average_of_the_update_is_that_of_averaged_model() -> None:
    model = Network()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, ema_decay=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(5):
        train_step(model, optimizer, step)
        average.update_parameters(model)
    expected = average.module.state_dict()
    assert_all_same_bits(ema_state_dict(model, optimizer).values(), expected.values())
    before = [tensor.clone() for tensor in model.state_dict().values()]
    for module in (model, average):
        module.eval()
    with ema_weights(model, optimizer):
        assert_same_bits(model(inputs(9)), average(inputs(9)))
    assert_all_same_bits(model.state_dict().values(), before)


@pytest.mark.parametrize("kind", ["mean", "ema"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_twin_averages_the_masters_of_low_precision_weights(dtype: torch.dtype, kind: str) -> None:
    model = cast_model(Network(), dtype)
    optimizer = FusedSGD(model.parameters(), lr=1e-4, loss_scale=128.0)
    twin = cast_model(deepcopy(model), torch.float32)
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    history = []
    for step in range(6):
        train_step(model, optimizer, step)
        twin.load_state_dict(fp32_state_dict(model, optimizer))
        average.update_parameters(twin)
        history.append(optimizer.state[model.fc.weight]["master_param"].double())
    expected = history[0]
    for count, weights in enumerate(history[1:], start=1):
        expected = expected + (weights - expected) * (0.1 if kind == "ema" else 1 / (count + 1))
    torch.testing.assert_close(average.module.fc.weight.double(), expected, rtol=1e-6, atol=0)
    assert average(inputs(0)).dtype == torch.float32


def test_an_average_of_the_low_precision_weights_themselves_stands_still() -> None:
    """An exponential average in FP16 rounds small changes away, and ema_decay or an FP32 twin keeps the changes."""
    model = cast_model(Network(), torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=1e-2, loss_scale=128.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    for step in range(20):
        train_step(model, optimizer, step)
        average.update_parameters(model)
        if step == 0:
            first = average.module.fc.weight.detach().clone()
    assert not torch.equal(model.fc.weight, first)
    assert torch.equal(average.module.fc.weight, first)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_grad_norm_before_the_step_gives_torchs_bits(backend, device, max_norm):
    drive(
        both(backend, device, lr=0.05, momentum=0.9),
        4,
        lambda index, optimizer, params: clip_grad_norm_(params, max_norm, foreach=False),
    )


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_grad_norm_after_unscaling_by_a_grad_scaler_gives_torchs_bits(backend, device, max_norm):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    for optimizer, params in pairs:
        scaler = torch.amp.GradScaler(params[0].device.type, init_scale=256.0)
        scaler.scale(torch.ones((), device=params[0].device))
        for grads in gradients(params, 4):
            set_gradients(params, [g * 256 for g in grads])
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, max_norm, foreach=False)
            scaler.step(optimizer)
            scaler.update()
    assert_all_same_bits(pairs[0][1], pairs[1][1])


def test_clip_grad_norm_on_scaled_gradients_clips_to_a_fraction_and_max_grad_norm_does_not(backend, device):
    """Gradients are scaled until the step: `max_grad_norm` clips unscaled gradients, `clip_grad_norm_` scaled ones."""
    scale, max_norm = 1024.0, 1.0
    moved = {}
    for name in ("clip_grad_norm_", "max_grad_norm", "clip_grad_norm_ to the scaled norm"):
        (param,) = parameters([(9,)], device=device)
        before = param.detach().clone()
        limit = max_norm if name == "max_grad_norm" else None
        optimizer = FusedSGD([param], lr=1.0, loss_scale=scale, max_grad_norm=limit, backend=backend)
        set_gradients([param], [torch.full((9,), 4.0 * scale)])
        if limit is None:
            clip_grad_norm_([param], max_norm * (scale if "scaled" in name else 1.0))
        optimizer.step()
        moved[name] = float((param.detach() - before).norm())
    assert moved["max_grad_norm"] == pytest.approx(max_norm, rel=1e-5)
    assert moved["clip_grad_norm_ to the scaled norm"] == pytest.approx(max_norm, rel=1e-5)
    assert moved["clip_grad_norm_"] == pytest.approx(max_norm / scale, rel=1e-3)


def test_layers_frozen_and_unfrozen_during_a_run_are_trained_as_by_torch() -> None:
    (ours, _), (torchs, _) = pairs = rivals(lr=0.1, momentum=0.9, weight_decay=0.1, dampening=0.5)
    for model, optimizer in pairs:
        for step in range(9):
            model.body.requires_grad_(step not in (2, 3, 4))
            model.fc.requires_grad_(step > 1)
            train_step(model, optimizer, step)
    assert_all_same_bits(ours.parameters(), torchs.parameters())


def test_the_master_of_a_frozen_low_precision_layer_waits_for_it() -> None:
    model = cast_model(Network(), torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, loss_scale=128.0)
    train_step(model, optimizer, 0)
    kept = {key: value.clone() for key, value in optimizer.state[model.body.weight].items()}
    model.body.requires_grad_(False)
    for step in range(1, 4):
        train_step(model, optimizer, step)
    for key, value in optimizer.state[model.body.weight].items():
        assert_same_bits(value, kept[key], key)
    model.body.requires_grad_(True)
    train_step(model, optimizer, 4)
    assert not torch.equal(optimizer.state[model.body.weight]["master_param"], kept["master_param"])


def test_a_group_added_under_a_dynamic_scale_changes_neither_it_nor_the_masters(backend, device):
    old, late = (parameters([(6,), (2, 3)], torch.float16, device, seed) for seed in (0, 1))
    optimizer = FusedSGD(old, lr=0.1, momentum=0.9, loss_scale="dynamic", backend=backend)
    first, second = gradients(old, 2)
    set_gradients(old, first)
    optimizer.step()
    before, stats = [m.clone() for m in masters(optimizer, old)], optimizer.stats()
    optimizer.add_param_group({"params": late, "lr": 0.2})
    assert optimizer.stats() == stats
    assert_all_same_bits(masters(optimizer, old), before)
    set_gradients([*old, *late], [*second, *second])
    optimizer.step()
    assert optimizer.stats().applied_steps == 2
    expected = copies(parameters([(6,), (2, 3)], torch.float16, seed=1), torch.float32)
    set_gradients(expected, [g.float() / stats.scale for g in second])
    torch.optim.SGD(expected, lr=0.2, momentum=0.9, foreach=False).step()
    assert_all_same_bits(masters(optimizer, late), expected)


def test_a_whole_optimizer_saved_with_its_model_trains_on_alike(tmp_path):
    model = cast_model(Network(), torch.bfloat16)
    optimizer = FusedSGD(model.named_parameters(), lr=0.1, momentum=0.9)
    schedule = lrs.OneCycleLR(optimizer, 0.1, total_steps=8)
    for step in range(3):
        train_step(model, optimizer, step)
        schedule.step()
    torch.save((model, optimizer, schedule), tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=False)
    for step in range(3, 6):
        for m, o, s in ((model, optimizer, schedule), loaded):
            train_step(m, o, step)
            s.step()
    assert_all_same_bits(loaded[0].parameters(), model.parameters())
    assert loaded[1].param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_one_optimizer_a_parameter_may_step_inside_the_backward_pass(dtype: torch.dtype | None) -> None:
    results = []
    for inside in (False, True):
        model = Network() if dtype is None else cast_model(Network(), dtype)
        optimizers = {p: FusedSGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}
        if inside:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(lambda p, own=optimizers: own[p].step())
        for step in range(3):
            for param in model.parameters():
                param.grad = None
            model(inputs(step)).square().mean().backward()
            if not inside:
                for optimizer in optimizers.values():
                    optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert_all_same_bits(*results)


def test_a_state_of_named_parameters_moves_to_torch_and_back() -> None:
    ours, torchs = Network(), Network()
    fused = FusedSGD(ours.named_parameters(), lr=0.1, momentum=0.9, bias_decay=True)
    plain = torch.optim.SGD(torchs.named_parameters(), lr=0.7, foreach=False)
    train_step(ours, fused, 0)
    torchs.load_state_dict(ours.state_dict())
    # torch loads the tensors of a state without a copy.
    plain.load_state_dict(deepcopy(fused.state_dict()))
    assert plain.param_groups[0]["param_names"] == fused.param_groups[0]["param_names"]
    train_step(ours, fused, 1)
    train_step(torchs, plain, 1)
    fused.load_state_dict(plain.state_dict())
    train_step(ours, fused, 2)
    train_step(torchs, plain, 2)
    assert_all_same_bits(ours.parameters(), torchs.parameters())
