"""FusedSGD saved and restored by torch.distributed.checkpoint, also on another number of processes.

If an optimizer has no state, `get_optimizer_state_dict` takes a step with zero gradients. The step must change
nothing.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from support import ranks
from support.comparison import assert_all_same_bits, assert_same_bits
from support.products import OPTIONS, Products, inputs_of, with_overflow

# torch gives this warning when a process saves or loads alone.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

OVERFLOWS = (0, 4, 7)
FORMATS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def optimizer_of(model: Module, backend: str = "cpu", **options: Any) -> FusedSGD:
    scale = DynamicLossScale(init_scale=64.0, growth_interval=3)
    return FusedSGD(
        model.parameters(),
        **{**OPTIONS, "loss_scale": scale, "max_grad_norm": 2.0, "backend": backend, **options},
    )


def train(model: Module, optimizer: FusedSGD, steps: range) -> None:
    """Trains on the same inputs on all processes, so that the mean does not depend on the number of processes."""
    for step in steps:
        inputs = inputs_of(0, step)
        optimizer.zero_grad()
        optimizer.scale(model(with_overflow(inputs) if step in OVERFLOWS else inputs)).backward()
        optimizer.step()
    optimizer.zero_grad()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def contents(model: Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns weights, state and statistics, with whole tensors."""
    return {
        "weights": [whole(p.detach()).clone() for p in model.parameters()],
        "state": [
            {key: whole(value).clone() for key, value in optimizer.state.get(p, {}).items()}
            for p in model.parameters()
        ],
        "stats": optimizer.stats(),
        "scale": optimizer.loss_scale.state_dict(),
    }


def assert_same_contents(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_all_same_bits(actual["weights"], expected["weights"], "weight")
    for index, (state, other) in enumerate(zip(actual["state"], expected["state"], strict=True)):
        assert state.keys() == other.keys()
        for key in state:
            assert_same_bits(state[key], other[key], f"{key} {index}")
    assert actual["stats"] == expected["stats"]
    assert actual["scale"] == expected["scale"]


def restore(saved_in: str, model: Module, optimizer: FusedSGD, options: StateDictOptions) -> None:
    """Loads a checkpoint into the states of the new objects, as torch's tutorial does."""
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(states, checkpoint_id=saved_in)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)


def save(folder: str, model: Module, optimizer: FusedSGD, options: StateDictOptions) -> None:
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(states, checkpoint_id=folder)


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0, "dampening": 0.0}, {"loss_scale": 8.0, "max_grad_norm": None}], ids=str
)
def test_to_ask_for_the_state_changes_nothing(backend, device, options, before):
    """The cases are: before the first step, after a skipped first step, and later."""
    models = [Products(torch.float16).to(device) for _ in range(2)]
    optimizers = [optimizer_of(model, backend, **options) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_on(device, model, optimizer, range(before))
    stats = optimizers[0].stats()
    get_optimizer_state_dict(models[0], optimizers[0])
    assert optimizers[0].stats() == stats
    assert [group["lr"] for group in optimizers[0].param_groups] == [OPTIONS["lr"]]
    assert_all_same_bits(models[0].parameters(), models[1].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):
        train_on(device, model, optimizer, range(before, 3))
    assert_all_same_bits(models[0].parameters(), models[1].parameters())
    assert optimizers[0].stats() == optimizers[1].stats()


def train_on(device: torch.device, model: Module, optimizer: FusedSGD, steps: range) -> None:
    for step in steps:
        inputs = inputs_of(0, step)
        inputs = [x.to(device) for x in (with_overflow(inputs) if step in OVERFLOWS else inputs)]
        optimizer.scale(model(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [False, True])
def test_a_parameter_without_a_gradient_at_first_is_still_new_after_the_state_was_asked_for(
    backend, device, copied
):
    """Dampening does not apply to the parameter's first update, although a buffer of zeros exists."""
    model = Products(torch.float16, ((3,), (3,))).to(device)
    optimizer = FusedSGD(model.parameters(), lr=1.0, momentum=0.5, dampening=0.5, backend=backend)
    get_optimizer_state_dict(model, optimizer)
    if copied:
        model, optimizer = deepcopy((model, optimizer))
    first, second = model.weights
    start = second.detach().float()
    for step in range(3):
        first.grad = torch.ones_like(first)
        second.grad = torch.ones_like(second) if step else None
        optimizer.step()
    assert optimizer.state[first]["momentum_buffer"].tolist() == [1.0] * 3
    assert optimizer.state[second]["momentum_buffer"].tolist() == [1.0] * 3
    assert_same_bits(optimizer.state[second]["master_param"], start - 2)


def test_a_first_step_of_training_with_zero_gradients_and_rate_counts(backend, device):
    """The step counts as in torch.optim.SGD, although `get_optimizer_state_dict` takes a similar step."""
    model = Products(torch.float32, ((3, 2),)).to(device)
    optimizer = FusedSGD(
        model.parameters(), lr=0.0, momentum=0.9, weight_decay=0.5, loss_scale="dynamic", backend=backend
    )
    (weight,) = model.weights
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.stats().applied_steps == 1
    assert_same_bits(optimizer.state[weight]["momentum_buffer"], weight.detach() * 0.5)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_run_resumes_bit_for_bit_from_any_step(tmp_path, form, step, momentum):
    options = FORMATS[form]
    rules = {"momentum": momentum, "dampening": 0.25 if momentum else 0.0}
    model = Products(torch.float16)
    optimizer = optimizer_of(model, **rules)
    train(model, optimizer, range(step))
    save(str(tmp_path), model, optimizer, options)
    resumed = Products(torch.float16)
    other = optimizer_of(resumed, **rules)
    restore(str(tmp_path), resumed, other, options)
    assert other.stats()[:3] == optimizer.stats()[:3]
    assert other.loss_scale.state_dict() == optimizer.loss_scale.state_dict()
    for of in ((model, optimizer), (resumed, other)):
        train(*of, range(step, 9))
    assert_same_contents(contents(resumed, other), contents(model, optimizer))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_state_dict_is_set_in_a_new_optimizer_and_in_the_same(form, momentum):
    """The state dict passes through no file. Its FP32 parameters have no state without momentum."""
    rules = {"momentum": momentum, "dampening": 0.0}
    models = []
    for _ in range(2):
        models.append(Products(torch.float16))
        models[-1].weights[1] = Parameter(models[-1].weights[1].float())
    optimizers = [optimizer_of(model, **rules) for model in models]
    train(models[0], optimizers[0], range(3))
    saved = get_optimizer_state_dict(models[0], optimizers[0], options=FORMATS[form])
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        set_optimizer_state_dict(model, optimizer, deepcopy(saved), options=FORMATS[form])
        train(model, optimizer, range(3, 6))
    assert_same_contents(contents(models[1], optimizers[1]), contents(models[0], optimizers[0]))
    assert optimizers[1].stats().applied_steps == 4


def train_sharded(folder: str, form: str, steps: range) -> dict[str, Any]:
    """Runs some steps of the training on all processes, and saves a checkpoint."""
    model = Products(torch.float16)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    if steps.start:
        restore(f"{folder}/{steps.start}", model, optimizer, FORMATS[form])
    train(model, optimizer, steps)
    save(f"{folder}/{steps.stop}", model, optimizer, FORMATS[form])
    return contents(model, optimizer)


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_goes_from_two_processes_to_four_to_one_bit_for_bit(tmp_path, form):
    model = Products(torch.float16)
    optimizer = optimizer_of(model)
    for count, steps in ((2, range(3)), (4, range(3, 6)), (1, range(6, 9)), (2, range(9, 11))):
        train(model, optimizer, steps)
        expected = contents(model, optimizer)
        for actual in ranks.run(count, train_sharded, str(tmp_path), form, steps):
            assert_same_contents(actual, expected)
    assert optimizer.stats().skipped_steps == len(OVERFLOWS)


def load_whole(folder: str, broadcast: bool) -> None:
    """Saves everything in a file of rank 0, and loads the file. With `broadcast`, only rank 0 reads the file."""
    sharded = Products(torch.float16)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh)
    optimizer = optimizer_of(sharded)
    train(sharded, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = (
        get_model_state_dict(sharded, options=options),
        get_optimizer_state_dict(sharded, optimizer, options=options),
    )
    if dist.get_rank() == 0:
        torch.save(states, f"{folder}/whole.pt")
    dist.barrier()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    reads = dist.get_rank() == 0 or not broadcast
    states = torch.load(f"{folder}/whole.pt", weights_only=True) if reads else ({}, {})
    resumed = Products(torch.float16)
    fully_shard(resumed, mesh=mesh)
    other = optimizer_of(resumed)
    set_model_state_dict(resumed, states[0], options=options)
    set_optimizer_state_dict(resumed, other, states[1], options=options)
    for of in ((sharded, optimizer), (resumed, other)):
        train(*of, range(3, 6))
    assert_same_contents(contents(resumed, other), contents(sharded, optimizer))


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_whole_state_dict_is_divided_again(tmp_path, broadcast):
    ranks.run(2, load_whole, str(tmp_path), broadcast)


def load_plainly() -> None:
    """Loads optimizer states by `load_state_dict`, without torch.distributed.checkpoint."""
    plain = Products(torch.float16)
    optimizer = optimizer_of(plain)
    train(plain, optimizer, range(3))
    sharded = Products(torch.float16)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    other = optimizer_of(sharded)
    set_model_state_dict(sharded, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    other.load_state_dict(optimizer.state_dict())
    back = Products(torch.float16)
    back.load_state_dict(plain.state_dict())
    third = optimizer_of(back)
    third.load_state_dict(other.state_dict())
    for of in ((plain, optimizer), (sharded, other), (back, third)):
        train(*of, range(3, 6))
    assert_same_contents(contents(sharded, other), contents(plain, optimizer))
    assert_same_contents(contents(back, third), contents(plain, optimizer))


def test_a_plain_checkpoint_is_divided_and_a_divided_one_gathered():
    ranks.run(2, load_plainly)


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_after_a_skipped_first_step_has_the_state_of_every_parameter(form):
    """The second parameter has no gradient in the skipped step."""
    model, other = (Products(torch.float16, ((3,), (3,))) for _ in range(2))
    optimizer, resumed = (FusedSGD(each.parameters(), loss_scale=1.0, **OPTIONS) for each in (model, other))
    model.weights[0].grad = torch.full_like(model.weights[0], float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    saved = deepcopy(get_optimizer_state_dict(model, optimizer, options=FORMATS[form]))
    set_optimizer_state_dict(other, resumed, saved, options=FORMATS[form])
    for each, of in ((model, optimizer), (other, resumed)):
        for weight in each.weights:
            weight.grad = torch.ones_like(weight)
        of.step()
    assert_all_same_bits(other.parameters(), model.parameters())
    assert resumed.stats() == optimizer.stats()
