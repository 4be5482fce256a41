"""Training resumes from a checkpoint bit for bit, in this process, in a new one, and to and from torch."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from copy import copy as shallow_copy
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import NAMES, device_of, is_slow, takes_no_step, unusable_because
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    assert_unchanged,
    copies,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)

SHAPES = [(65,), (3, 5), (4,), (0,), (9,)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.float64]
STEPS = 12
CHECKPOINTS = (0, 1, 2, 3, 5, 8, 11)
"""Steps before the first update, after a skipped first step, and while hysteresis and growth are under way."""
OVERFLOWS = (0, 4, 5)


class Run:
    """A training run whose gradients depend on the number of the step only."""

    def __init__(self, backend: str, seed: int = 0) -> None:
        self.params = parameters(SHAPES, DTYPES, device_of(backend), seed)
        self.stream = gradients(self.params, STEPS)
        rule = DynamicLossScale(init_scale=64.0, growth_interval=3, hysteresis=2, growth_factor=1.5)
        self.optimizer = FusedSGD(
            [{"params": self.params[:2], "lr": 0.02}, {"params": self.params[2:], "weight_decay": 0.0}],
            lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-2, loss_scale=rule, backend=backend,
        )  # fmt: skip

    def go(self, first: int, last: int) -> None:
        for step in range(first, last):
            grads = [g.clone() for g in self.stream[step]]
            if step in OVERFLOWS:
                grads[0][-1] = torch.inf
            set_gradients(self.params, grads)
            self.optimizer.step()

    def save(self) -> dict[str, Any]:
        return {"params": [p.detach().clone() for p in self.params], "optimizer": self.optimizer.state_dict()}

    def load(self, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            for param, value in zip(self.params, checkpoint["params"], strict=True):
                param.copy_(value)
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def result(self) -> list[Tensor]:
        """Returns everything that training has changed, as tensors."""
        saved = self.optimizer.state_dict()
        state = [saved["state"].get(index, {}) for index in range(len(self.params))]
        stats = self.optimizer.stats()
        groups = saved["param_groups"]
        keys = ("loss_scale", "growth_tracker", "hysteresis_tracker", "applied_steps", "skipped_steps")
        numbers = [float(group[key]) for group in groups for key in keys]
        numbers += [stats.scale, stats.applied_steps, stats.skipped_steps]
        tensors = [p.detach() for p in self.params] + [s[key] for s in state for key in sorted(s)]
        return [*tensors, torch.tensor(numbers, dtype=torch.float64)]


def through_a_file(checkpoint: Any) -> Any:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume_all(folder: str) -> None:
    """Runs each checkpoint in `folder` to the end, in the new process, and writes the result beside the checkpoint."""
    for path in sorted(Path(folder).glob("*/*.checkpoint")):
        run = Run(path.parent.name, seed=99)
        run.load(torch.load(path, weights_only=True))
        run.go(int(path.stem), STEPS)
        torch.save(run.result(), path.with_suffix(".result"))


@pytest.mark.slow
def test_a_new_process_resumes_bit_for_bit_from_any_step(request, tmp_path):
    """One process resumes on all backends, because a process takes seconds to start."""
    names = request.config.getoption("backend") or NAMES
    runs = {name: Run(name) for name in names if unusable_because(name) is None}
    for name, run in runs.items():
        (tmp_path / name).mkdir()
        for step in range(STEPS):
            if step in (CHECKPOINTS[-1:] if is_slow(name) else CHECKPOINTS):
                torch.save(run.save(), tmp_path / name / f"{step}.checkpoint")
            run.go(step, step + 1)
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-c", "import sys, test_checkpoint as t; t.resume_all(sys.argv[1])", tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    for name, run in runs.items():
        results = sorted((tmp_path / name).glob("*.result"))
        assert len(results) == (1 if is_slow(name) else len(CHECKPOINTS))
        for path in results:
            assert_all_same_bits(torch.load(path), run.result(), f"{name}, from step {path.stem}, value")


@pytest.mark.parametrize("step", CHECKPOINTS)
def test_another_optimizer_resumes_bit_for_bit_from_any_step(backend, step):
    run, other = Run(backend), Run(backend, seed=99)
    other.go(0, 2)
    run.go(0, step)
    other.load(through_a_file(run.save()))
    assert_all_same_bits(other.result(), run.result())
    run.go(step, STEPS)
    other.go(step, STEPS)
    assert_all_same_bits(other.result(), run.result())


def test_weights_loaded_after_the_optimizer_give_the_same_run(backend):
    run, other = Run(backend), Run(backend, seed=99)
    run.go(0, 6)
    checkpoint = through_a_file(run.save())
    other.optimizer.load_state_dict(checkpoint["optimizer"])
    with torch.no_grad():
        for param, value in zip(other.params, checkpoint["params"], strict=True):
            param.copy_(value)
    run.go(6, STEPS)
    other.go(6, STEPS)
    assert_all_same_bits(other.result(), run.result())


def test_saving_changes_nothing(backend):
    run, other = Run(backend), Run(backend)
    for step in range(STEPS):
        run.go(step, step + 1)
        other.go(step, step + 1)
        before = snapshot(run.optimizer)
        run.save()
        assert_unchanged(run.optimizer, before)
    assert_all_same_bits(other.result(), run.result())


def test_loading_a_checkpoint_goes_back_in_time(backend):
    run, twin = Run(backend), Run(backend)
    run.go(0, 3)
    checkpoint = deepcopy(run.save())
    run.go(3, 9)
    run.load(checkpoint)
    run.go(3, STEPS)
    twin.go(0, STEPS)
    assert_all_same_bits(run.result(), twin.result())


def test_the_state_dict_holds_the_documented_keys(backend):
    run = Run(backend)
    run.go(0, 4)
    checkpoint = run.optimizer.state_dict()
    assert set(checkpoint) == {"state", "param_groups"}
    for index, (param, dtype) in enumerate(zip(run.params, DTYPES, strict=True)):
        low = dtype in (torch.float16, torch.bfloat16)
        assert set(checkpoint["state"][index]) == {"momentum_buffer", *(["master_param"] if low else [])}, (
            param
        )
    for group in checkpoint["param_groups"]:
        assert (group["applied_steps"], group["skipped_steps"]) == (3, 1)
        assert float(group["loss_scale"]) == 96.0
        assert (group["growth_tracker"], group["hysteresis_tracker"]) == (0, 2)


def test_without_a_scale_the_state_dict_has_counters_only(backend, device):
    params = parameters([(3,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    set_gradients(params, [torch.ones(3)])
    optimizer.step()
    (group,) = optimizer.state_dict()["param_groups"]
    assert (group["applied_steps"], group["skipped_steps"]) == (1, 0)
    assert not {"loss_scale", "growth_tracker", "hysteresis_tracker"} & set(group)


def test_loaded_fp32_state_stays_fp32_beside_low_precision_parameters(backend):
    run, other = Run(backend), Run(backend, seed=99)
    run.go(0, 6)
    other.load(through_a_file(run.save()))
    for param, source, dtype in zip(other.params, run.params, DTYPES, strict=True):
        for key, value in other.optimizer.state[param].items():
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_same_bits(value, run.optimizer.state[source][key], key)


@takes_no_step
def test_a_loaded_static_scale_does_not_replace_the_one_asked_for_elsewhere(backend, device):
    params = parameters([(3,)], device=device)
    unscaled = FusedSGD(params, lr=0.1, backend=backend)
    unscaled.load_state_dict(FusedSGD(params, lr=0.1, loss_scale=8.0, backend=backend).state_dict())
    assert unscaled.stats().scale is None
    scaled = FusedSGD(params, lr=0.1, loss_scale=DynamicLossScale(init_scale=4.0), backend=backend)
    scaled.load_state_dict(unscaled.state_dict())
    assert scaled.stats().scale == 4.0


def test_counters_survive_a_checkpoint(backend):
    run, other = Run(backend), Run(backend)
    run.go(0, 7)
    other.load(through_a_file(run.save()))
    assert (other.optimizer.stats().applied_steps, other.optimizer.stats().skipped_steps) == (4, 3)


TORCH_OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-2},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "maximize": True},
]


def torch_like(params: list[Parameter], **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, foreach=False, **options)


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_fp32_training_moves_between_torch_and_here_bit_for_bit(backend, device, direction, options):
    shapes = [(65,), (3, 5), (0,)]
    params = parameters(shapes, device=device)
    expected = copies(params)

    def ours(p: list[Parameter], **kwargs: Any) -> FusedSGD:
        return FusedSGD(p, bias_decay=True, backend=backend, **kwargs)

    make = (torch_like, ours) if direction == "from torch" else (ours, torch_like)
    stream = gradients(params, 8)
    first = make[0](params, lr=0.05, **options)
    for grads in stream[:4]:
        set_gradients(params, grads)
        first.step()
    second = make[1](params, lr=0.9)
    second.load_state_dict(through_a_file(first.state_dict()))
    for grads in stream[4:]:
        set_gradients(params, grads)
        second.step()
    reference = torch_like(expected, lr=0.05, **options)
    for grads in stream:
        set_gradients(expected, grads)
        reference.step()
    assert_all_same_bits(params, expected)


def test_a_torch_checkpoint_of_fp16_training_becomes_fp32_state(backend, device):
    params = parameters([(65,)], torch.float16, device)
    reference = torch_like(params, lr=0.05, momentum=0.9)
    for grads in gradients(params, 3):
        set_gradients(params, grads)
        reference.step()
    before = params[0].detach().clone()
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    optimizer.load_state_dict(reference.state_dict())
    buffer = reference.state[params[0]]["momentum_buffer"]
    assert buffer.dtype == torch.float16
    set_gradients(params, [torch.zeros(65).half()])
    optimizer.step()
    state = optimizer.state[params[0]]
    assert_same_bits(state["momentum_buffer"], buffer.float().mul(0.9).add(0.0))
    expected = before.float().add(state["momentum_buffer"], alpha=-0.05)
    assert_same_bits(state["master_param"], expected)


def test_a_torch_checkpoint_leaves_the_scale_alone(backend, device):
    params = parameters([(5,)], device=device)
    rule = DynamicLossScale(init_scale=8.0, growth_interval=2)
    optimizer = FusedSGD(params, lr=0.05, loss_scale=rule, backend=backend)
    set_gradients(params, [torch.ones(5)])
    optimizer.step()
    optimizer.load_state_dict(torch_like(params, lr=0.7).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert optimizer.stats().scale == 8.0
    optimizer.step()
    assert optimizer.stats().scale == 16.0


def test_a_torch_checkpoint_keeps_the_bias_decay_that_was_asked_for(backend, device):
    for bias_decay in (True, False):
        params = parameters([(5,)], device=device)
        optimizer = FusedSGD(params, lr=0.5, bias_decay=bias_decay, backend=backend)
        optimizer.load_state_dict(torch_like(params, lr=0.5, weight_decay=0.5).state_dict())
        before = params[0].detach().clone()
        set_gradients(params, [torch.zeros(5)])
        optimizer.step()
        assert torch.equal(params[0], before) is not bias_decay


@takes_no_step
def test_a_torch_checkpoint_keeps_the_bias_decay_of_each_group(backend, device):
    params = parameters([(5,), (5,)], device=device)
    groups = [{"params": params[:1]}, {"params": params[1:], "bias_decay": True}]
    optimizer = FusedSGD(groups, lr=0.5, weight_decay=0.5, backend=backend)
    plain = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer.load_state_dict(torch_like(plain, lr=0.5, weight_decay=0.5).state_dict())
    assert [group["bias_decay"] for group in optimizer.param_groups] == [False, True]


def test_a_checkpoint_of_the_other_dtype_keeps_its_values(backend, device):
    """A run may continue in another precision, because the momentum is FP32 in both."""
    low, high = parameters([(33,)], torch.float16, device), parameters([(33,)], device=device)
    source = FusedSGD(low, lr=0.05, momentum=0.9, backend=backend)
    for grads in gradients(low, 3):
        set_gradients(low, grads)
        source.step()
    target = FusedSGD(high, lr=0.05, momentum=0.9, backend=backend)
    target.load_state_dict(through_a_file(source.state_dict()))
    assert_same_bits(target.state[high[0]]["momentum_buffer"], source.state[low[0]]["momentum_buffer"])
    set_gradients(high, [torch.zeros(33)])
    target.step()


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("step", CHECKPOINTS)
def test_a_copy_of_the_optimizer_trains_on_by_itself(backend, copy, step):
    run = Run(backend)
    run.go(0, step)
    twin = copy(run)
    assert {p.data_ptr() for p in twin.params if p.numel()}.isdisjoint(p.data_ptr() for p in run.params)
    before = run.result()
    before = [t.clone() for t in before]
    twin.go(step, STEPS)
    assert_all_same_bits(run.result(), before, "of the original")
    run.go(step, STEPS)
    assert_all_same_bits(twin.result(), run.result())


@pytest.mark.parametrize("scale", [None, 8.0, "dynamic"], ids=str)
def test_a_shallow_copy_shares_weights_and_momentum_and_has_its_own_scale(backend, device, scale):
    params = parameters([(5,)], torch.float16, device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, loss_scale=scale, backend=backend)
    set_gradients(params, [torch.ones(5).half()])
    optimizer.step()
    twin = shallow_copy(optimizer)
    before = optimizer.stats()
    assert twin.stats() == before
    assert twin.param_groups is optimizer.param_groups
    set_gradients(params, [torch.full((5,), torch.inf).half()])
    if scale is not None:
        twin.step()
        assert twin.stats().skipped_steps == 1
    set_gradients(params, [torch.ones(5).half()])
    twin.step()
    assert optimizer.stats() == before
    assert_same_bits(twin.state[params[0]]["momentum_buffer"], optimizer.state[params[0]]["momentum_buffer"])


def test_a_shallow_copy_of_a_loss_scale_has_its_own_state(backend, device):
    run = Run(backend)
    rule = shallow_copy(run.optimizer.loss_scale)
    run.go(0, 6)
    assert rule.get_scale() == 64.0
    FusedSGD(parameters([(5,)], device=device), lr=0.1, loss_scale=rule, backend=backend)


def test_a_copy_has_the_same_public_attributes(backend):
    run = Run(backend)
    run.go(0, 3)
    names = {name for name in vars(run.optimizer) if not name.startswith("_")}
    assert {name for name in vars(deepcopy(run.optimizer)) if not name.startswith("_")} == names


def test_a_copy_has_its_own_loss_scale(backend):
    run = Run(backend)
    copy = deepcopy(run)
    copy.go(0, 6)
    assert copy.optimizer.loss_scale is not run.optimizer.loss_scale
    assert copy.optimizer.loss_scale.state_dict() != run.optimizer.loss_scale.state_dict()
    assert run.optimizer.stats().scale == 64.0


@pytest.mark.parametrize("options", [{}, {"loss_scale": 8.0}, {"max_grad_norm": 0.5}], ids=str)
def test_a_pickled_optimizer_keeps_its_options(backend, device, options):
    params = parameters([(5,)], torch.float16, device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend, **options)
    copied, (copy,) = pickle.loads(pickle.dumps((optimizer, params)))
    set_gradients([*params, copy], [torch.ones(5).half()] * 2)
    optimizer.step()
    copied.step()
    assert_same_bits(copy, params[0])
    assert copied.stats() == optimizer.stats()
    assert repr(copied) == repr(optimizer)
