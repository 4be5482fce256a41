"""Parameters divided over processes as DTensors, by hand and by FSDP2: the same updates as of whole parameters.

The sums of gradients are exact, so that the tests compare bit for bit. One test has rounded sums.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import BatchNorm1d, Linear, Parameter, Sequential

from fused_tricks import DynamicLossScale, FusedSGD, cast_model, fp32_state_dict, load_fp32_state_dict
from fused_tricks.distributed import found_inf_reduction
from fused_tricks.step import planned_steps
from support import ranks
from support.comparison import assert_all_same_bits, assert_same_bits
from support.products import OPTIONS, SHAPES, Products, Shapes, inputs_of, mean_of, with_overflow

pytestmark = pytest.mark.slow

OVERFLOWS = (0, 3)
STEPS = 6


def inputs_in(step: int, rank: int | None = None, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Returns the inputs of a process, by default of this one. In some steps, the inputs of the last rank overflow."""
    rank = dist.get_rank() if rank is None else rank
    inputs = inputs_of(rank, step, shapes)
    return with_overflow(inputs) if rank == dist.get_world_size() - 1 and step in OVERFLOWS else inputs


def set_whole_gradients(optimizer: FusedSGD, step: int, scale: float, shapes: Shapes = SHAPES) -> None:
    """Sets the gradients of the mean loss of all processes."""
    mean = mean_of([inputs_in(step, rank, shapes) for rank in range(dist.get_world_size())])
    for param, grad in zip(optimizer.param_groups[0]["params"], mean, strict=True):
        param.grad = (grad * scale).to(param.dtype)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_training(optimizer: FusedSGD, expected: FusedSGD) -> None:
    """Asserts that both optimizers have the same weights, state and statistics."""
    pairs = zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True)
    for index, (param, other) in enumerate(pairs):
        assert_same_bits(whole(param.detach()), other.detach(), f"parameter {index}")
        state, other_state = optimizer.state.get(param, {}), expected.state.get(other, {})
        assert state.keys() == other_state.keys()
        for key in state:
            assert isinstance(state[key], DTensor) == isinstance(param, DTensor)
            assert_same_bits(whole(state[key]), other_state[key], f"{key} {index}")
    assert optimizer.stats() == expected.stats()


def small_scale() -> DynamicLossScale:
    return DynamicLossScale(init_scale=64.0, growth_interval=2)


def train_with_fsdp(
    backend: str,
    mesh_shape: tuple[int, ...],
    dtype: torch.dtype,
    shapes: Shapes = SHAPES,
    policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> None:
    """Trains with FSDP2, and compares every step with an optimizer over whole parameters."""
    names = ("shards",) if len(mesh_shape) == 1 else ("replicas", "shards")
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = Products(dtype, shapes)
    expected = FusedSGD(
        [Parameter(p.detach().clone()) for p in model.parameters()],
        backend="reference",
        **{**OPTIONS, **options, "loss_scale": small_scale()},
    )
    fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    optimizer = FusedSGD(
        model.parameters(), backend=backend, **{**OPTIONS, **options, "loss_scale": small_scale()}
    )
    for step in range(STEPS):
        optimizer.scale(model(inputs_in(step, shapes=shapes))).backward()
        set_whole_gradients(expected, step, expected.loss_scale.get_scale(), shapes)
        optimizer.step()
        expected.step()
        assert_same_training(optimizer, expected)
        optimizer.zero_grad()
    assert optimizer.stats().skipped_steps == len(OVERFLOWS)


@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_fsdp_trains_as_one_process_does(backend, max_norm):
    ranks.run(2, train_with_fsdp, backend, (2,), torch.float16, max_grad_norm=max_norm)


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=["four shards", "two replicas of two shards"])
def test_four_processes_train_as_one_does(mesh_shape):
    for dtype in (torch.bfloat16, torch.float32):
        ranks.run(4, train_with_fsdp, "cpu", mesh_shape, dtype, max_grad_norm=2.0)


def test_a_process_without_any_element_takes_part():
    ranks.run(4, train_with_fsdp, "cpu", (4,), torch.float16, [(2, 3), (1, 2), (2,)], max_grad_norm=2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fsdp_computes_in_low_precision_and_trains_its_fp32_parameters(dtype):
    """The gradients are FP32, because a mixed-precision policy casts copies of the parameters."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ranks.run(2, train_with_fsdp, "cpu", (2,), torch.float32, policy=policy, max_grad_norm=2.0)


def placed_by_hand() -> list[tuple[Parameter, Parameter]]:
    """Returns pairs on four processes: a whole parameter, and the same parameter as a DTensor or a plain tensor."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    line = init_device_mesh("cpu", (4,))
    places = [
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Replicate(), Replicate()]),
        (grid["data"], [Shard(0)]),
        (line, [Shard(1)]),
        None,
    ]
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for place in places:
        weight = Parameter(torch.randn(5, 3, generator=generator))
        weight.grad = torch.randint(-4, 5, (5, 3), generator=generator).float()
        own = weight.detach().clone()
        placed = Parameter(own if place is None else distribute_tensor(own, *place))
        placed.grad = weight.grad if place is None else distribute_tensor(weight.grad, *place)
        pairs.append((weight, placed))
    return pairs


def step_over_several_meshes(backend: str) -> None:
    pairs = placed_by_hand()
    options = {**OPTIONS, "max_grad_norm": 2.0, "loss_scale": 4.0}
    expected = FusedSGD([weight for weight, _ in pairs], backend="reference", **options)
    optimizer = FusedSGD([placed for _, placed in pairs], backend=backend, **options)
    for _ in range(3):
        expected.step()
        optimizer.step()
        assert_same_training(optimizer, expected)


def test_each_parameter_counts_once_whatever_mesh_it_is_placed_on(backend):
    ranks.run(4, step_over_several_meshes, backend)


def overflow_in_each_place() -> None:
    pairs = placed_by_hand()
    optimizer = FusedSGD([placed for _, placed in pairs], lr=0.1, momentum=0.9, loss_scale="dynamic")
    optimizer.step()
    before = [whole(placed.detach()).clone() for _, placed in pairs]
    for skipped, (index, row, column) in enumerate(itertools.product(range(len(pairs)), (0, 4), (0, 2)), 1):
        good = pairs[index][1].grad
        bad = pairs[index][0].grad.clone()
        bad[row, column] = torch.nan
        is_placed = isinstance(good, DTensor)
        pairs[index][1].grad = distribute_tensor(bad, good.device_mesh, good.placements) if is_placed else bad
        optimizer.step()
        pairs[index][1].grad = good
        assert optimizer.stats().skipped_steps == skipped
    assert_all_same_bits([whole(placed.detach()) for _, placed in pairs], before)


def test_an_overflow_anywhere_skips_the_step_everywhere():
    ranks.run(4, overflow_in_each_place)


def step_beside_a_smaller_mesh() -> None:
    """Takes steps in which the last two of four processes have no shard of the first parameter."""
    meshes = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2, 3])
    weights = [torch.ones(4, 3), torch.ones(5)]
    grads = [torch.full((4, 3), 2.0), torch.full((5,), 4.0)]
    params = [Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w, mesh in zip(weights, meshes)]
    params.append(Parameter(torch.ones(1)))
    optimizer = FusedSGD(params, lr=1.0, max_grad_norm=1.0)
    for step in range(3):
        for param, grad, mesh in zip(params, grads, meshes):
            overflows = step == 1 and grad is grads[0]
            param.grad = distribute_tensor(grad * torch.inf if overflows else grad, mesh, [Shard(0)])
        params[2].grad = torch.ones(1)
        optimizer.step()
    stats = optimizer.stats()
    assert (stats.applied_steps, stats.skipped_steps) == (2, 1)
    assert stats.grad_norm == pytest.approx((12 * 4 + 5 * 16 + 1) ** 0.5)
    clip = torch.tensor(1.0) / (torch.tensor(stats.grad_norm) + 1e-6)
    assert_same_bits(params[1].full_tensor().detach(), torch.ones(5) - 4 * clip - 4 * clip)
    assert_same_bits(params[2].detach(), torch.ones(1) - clip - clip)


def test_processes_outside_a_mesh_clip_by_its_norm_too():
    ranks.run(4, step_beside_a_smaller_mesh)


def clip_random_gradients() -> tuple[float | None, ...]:
    generator = torch.Generator().manual_seed(dist.get_rank() // 4)
    grads = [torch.randn(500, 7, generator=generator) * 10**power for power in (-2, 0, 1)]
    mesh = init_device_mesh("cpu", (2, 2))
    params, expected = ([Parameter(torch.zeros_like(grad)) for grad in grads] for _ in range(2))
    placed = [Parameter(distribute_tensor(p, mesh, [Replicate(), Shard(0)])) for p in params]
    optimizers = [FusedSGD(of, lr=1.0, max_grad_norm=1.0) for of in (placed, expected)]
    for sharded, plain, grad in zip(placed, expected, grads, strict=True):
        sharded.grad, plain.grad = distribute_tensor(grad, mesh, [Replicate(), Shard(0)]), grad
    for optimizer in optimizers:
        optimizer.step()
    weights = [p.full_tensor().detach() for p in placed]
    torch.testing.assert_close(weights, [p.detach() for p in expected], rtol=2e-7, atol=0)
    return tuple(optimizer.stats().grad_norm for optimizer in optimizers)


def test_the_norm_is_that_of_one_process_but_for_the_order_in_which_squares_are_added():
    """The FP64 sums may differ, and with them the last bit of the FP32 norm. All processes have the same norm."""
    norms = ranks.run(4, clip_random_gradients)
    assert len({sharded for sharded, _ in norms}) == 1
    for sharded, plain in norms:
        assert sharded == pytest.approx(plain, rel=2**-23, abs=0)


def step_with_partial_gradients() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    optimizer = FusedSGD([param], lr=1.0, max_grad_norm=torch.inf)
    for _ in range(2):
        own = torch.full((3,), 1.0 + dist.get_rank())
        param.grad = DTensor.from_local(own, mesh, [Partial()], run_check=False)
        optimizer.step()
    assert_same_bits(whole(param.detach()), torch.full((3,), -6.0))
    assert optimizer.stats().grad_norm == pytest.approx(27**0.5)


def test_gradients_that_are_still_to_be_summed_over_processes_are_summed():
    ranks.run(2, step_with_partial_gradients)


def count_reductions_and_plans(max_norm: float | None) -> None:
    model = Products(torch.float16)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, loss_scale=4.0, max_grad_norm=max_norm)
    with (
        mock.patch.object(planned_steps, "build_plan", wraps=planned_steps.build_plan) as build_plan,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
    ):
        for step in range(6):
            optimizer.scale(model(inputs_of(dist.get_rank(), step))).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all_reduce.call_count == step + 1
            assert build_plan.call_count == 1


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_costs_one_reduction_and_soon_no_new_plan(max_norm):
    ranks.run(2, count_reductions_and_plans, max_norm)


def write_between_steps() -> None:
    mesh = init_device_mesh("cpu", (2,))
    ones = torch.ones(30, dtype=torch.float16)
    param = Parameter(distribute_tensor(ones.clone(), mesh, [Shard(0)]))
    param.grad = distribute_tensor(ones.clone(), mesh, [Shard(0)])
    optimizer = FusedSGD([param], lr=2.0**-12)
    expected = torch.ones(30)
    for value in (None, None, -2.0, 4.0):
        with torch.no_grad():
            if value == -2.0:
                param.fill_(value)
            elif value == 4.0:
                param.to_local().fill_(value)
        expected = (expected if value is None else torch.full((30,), value)) - 2.0**-12
        optimizer.step()
        assert_same_bits(whole(optimizer.state[param]["master_param"]), expected)


def test_masters_follow_what_others_write_to_the_parameter_or_to_its_local_part():
    ranks.run(2, write_between_steps)


def refuse_what_is_placed_otherwise() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = FusedSGD({"weight": param}.items(), lr=1.0)
    for _ in range(2):
        param.grad = torch.ones(4)
        with pytest.raises(
            RuntimeError, match="parameter 'weight' is a DTensor and its gradient is a plain tensor"
        ):
            optimizer.step()
        param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        optimizer.step()
    assert_same_bits(whole(param.detach()), torch.full((4,), -1.0))


def test_a_plain_gradient_of_a_dtensor_is_refused():
    ranks.run(2, refuse_what_is_placed_otherwise)


def train_with_grad_scaler(dtype: torch.dtype, max_norm: float | None) -> None:
    model = Products(dtype)
    expected = FusedSGD(
        [Parameter(p.detach().clone()) for p in model.parameters()], max_grad_norm=max_norm, **OPTIONS
    )
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = FusedSGD(model.parameters(), max_grad_norm=max_norm, **OPTIONS)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2))
    for step in range(STEPS):
        scaler.scale(model(inputs_in(step))).backward()
        other.scale(torch.ones(()))
        set_whole_gradients(expected, step, other.get_scale())
        for s, o in ((scaler, optimizer), (other, expected)):
            s.step(o)
            s.update()
        assert_same_training(optimizer, expected)
        assert scaler.state_dict() == other.state_dict()
        optimizer.zero_grad()


@pytest.mark.parametrize("max_norm", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sharded_parameters_train_under_a_grad_scaler(dtype, max_norm):
    ranks.run(2, train_with_grad_scaler, dtype, max_norm)


def train_a_cast_model() -> None:
    torch.manual_seed(0)
    model = cast_model(Sequential(Linear(6, 8), BatchNorm1d(8), Linear(8, 2)), torch.float16)
    fully_shard(model[1])
    fully_shard(model)
    optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, loss_scale="dynamic")
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(30):
        loss = (model(inputs) - inputs[:, :2]).square().mean()
        optimizer.zero_grad()
        optimizer.scale(loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}


def test_a_cast_model_trains_where_each_norm_layer_is_sharded_by_itself():
    """FSDP2 requires parameters of one dtype in each of its groups."""
    ranks.run(2, train_a_cast_model)


def step_with_strides(backend: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(24, dtype=torch.float16).view(4, 6)
    transposed = weight.t().contiguous().t()
    grads = [torch.full((4, 6), 2.0, dtype=torch.float16), torch.full((6, 4), 3.0, dtype=torch.float16).t()]
    params = [
        Parameter(DTensor.from_local(local.clone(memory_format=torch.preserve_format), mesh, [Shard(0)]))
        for local in (weight, transposed, torch.stack((weight, weight), -1)[..., 0])
    ]
    optimizer = FusedSGD(params, lr=1.0, momentum=0.5, max_grad_norm=torch.inf, backend=backend)
    for step in range(4):
        for index, param in enumerate(params):
            param.grad = DTensor.from_local(grads[(index + step) % 2], mesh, [Shard(0)])
        optimizer.step()
    for index, param in enumerate(params):
        buffer = 0.0
        expected = weight.float()
        for step in range(4):
            buffer = 0.5 * buffer + (2.0, 3.0)[(index + step) % 2]
            expected = expected - buffer
        assert_same_bits(param.to_local().detach(), expected.half())
        assert_same_bits(optimizer.state[param]["master_param"].to_local(), expected)


def test_local_parts_and_gradients_may_have_any_strides(backend):
    ranks.run(2, step_with_strides, backend)


def test_the_reduction_uses_a_device_on_which_the_processes_can_communicate(monkeypatch):
    """Parameters may be offloaded to the CPU, which NCCL does not reach."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert found_inf_reduction._device_within_reach(None, torch.device("cpu")) == torch.device("cuda", 3)
    assert found_inf_reduction._device_within_reach(None, torch.device("cuda", 1)) == torch.device("cuda", 1)


def load_weights_in_training() -> None:
    model, plain = Products(torch.float16), Products(torch.float16)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer, expected = (FusedSGD(m.parameters(), loss_scale=4.0, **OPTIONS) for m in (model, plain))
    weights: dict[str, Tensor] = {}
    for step in (1, 2, 4, 5):
        if step == 4:
            weights = {key: value + 1 for key, value in fp32_state_dict(model, optimizer).items()}
            whole_weights = {key: whole(value) for key, value in weights.items()}
            for of, state in ((optimizer, weights), (expected, whole_weights)):
                network = model if of is optimizer else plain
                with pytest.raises(RuntimeError, match="Unexpected"):
                    load_fp32_state_dict(network, of, {**state, "other": state["weights.0"]})
                load_fp32_state_dict(network, of, state)
        optimizer.scale(model(inputs_in(step))).backward()
        set_whole_gradients(expected, step, 4.0)
        for of in (optimizer, expected):
            of.step()
            of.zero_grad()
        assert_same_training(optimizer, expected)


def test_full_precision_weights_are_exported_and_loaded_while_fsdp_trains():
    ranks.run(2, load_weights_in_training)
