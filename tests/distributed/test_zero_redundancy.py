"""Optimizers that each hold a part of the model: torch's ZeroRedundancyOptimizer, and `partition_group` alone."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import LayerNorm, Linear, Module, Parameter, ReLU, Sequential
from torch.nn.parallel import DistributedDataParallel

from fused_tricks import DynamicLossScale, FusedSGD, cast_model
from support import ranks
from support.comparison import assert_all_same_bits

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "ema_decay": 0.5}
STEPS = 8


def network(dtype: torch.dtype) -> Module:
    torch.manual_seed(0)
    return cast_model(Sequential(Linear(6, 9), ReLU(), Linear(9, 5), ReLU(), Linear(5, 3)), dtype)


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def overflow_once(model: Module, step: int) -> None:
    """Writes an infinity to a gradient of one optimizer in steps 2 and 5, after DDP's reduction."""
    params = list(model.parameters())
    if step in (2, 5):
        params[0 if step == 2 else -1].grad.view(-1)[0] = torch.inf


def gathered(model: Module) -> list[list[Tensor]]:
    """Returns the weights of every process."""
    everywhere = [[torch.empty_like(p) for _ in range(dist.get_world_size())] for p in model.parameters()]
    for copies, param in zip(everywhere, model.parameters(), strict=True):
        dist.all_gather(copies, param.detach().contiguous())
    return [list(of_one) for of_one in zip(*everywhere, strict=True)]


def train_partitioned(dtype: torch.dtype, max_norm: float | None, bucket_views: bool) -> None:
    """Trains with a partitioned optimizer, and compares with a whole optimizer on every process."""
    models = [network(dtype) for _ in range(2)]
    replicas = [DistributedDataParallel(model) for model in models]
    options = {**OPTIONS, "max_grad_norm": max_norm}
    scales = [DynamicLossScale(init_scale=64.0, growth_interval=2) for _ in range(2)]
    constructor = functools.partial(
        FusedSGD, loss_scale=scales[0], max_grad_norm=max_norm, partition_group=dist.group.WORLD
    )
    zero = ZeroRedundancyOptimizer(
        models[0].parameters(), constructor, parameters_as_bucket_view=bucket_views, **OPTIONS
    )
    whole = FusedSGD(models[1].parameters(), loss_scale=scales[1], **options)
    for step in range(STEPS):
        for model, replica, optimizer, scaling in (
            (models[0], replicas[0], zero, zero.optim),
            (models[1], replicas[1], whole, whole),
        ):
            optimizer.zero_grad()
            scaling.scale(replica(batch(step)).square().mean()).backward()
            overflow_once(model, step)
            optimizer.step()
        assert zero.optim.stats() == whole.stats()
        assert_all_same_bits(models[0].parameters(), models[1].parameters())
    assert whole.stats().skipped_steps == 2
    first, *others = gathered(models[0])
    for other in others:
        assert_all_same_bits(other, first)


@pytest.mark.parametrize("count", [2, 4])
def test_an_overflow_in_the_partition_of_one_process_skips_the_step_of_all(count):
    ranks.run(count, train_partitioned, torch.float16, None, False)


@pytest.mark.parametrize("bucket_views", [False, True])
def test_the_norm_is_that_of_all_partitions(bucket_views):
    ranks.run(2, train_partitioned, torch.bfloat16, 0.5, bucket_views)


def train_without_a_part() -> None:
    """Takes two steps over two parameters on four processes. In the first step, the first parameter overflows."""
    params = [Parameter(torch.ones(2, dtype=torch.float16)) for _ in range(2)]
    constructor = functools.partial(
        FusedSGD,
        loss_scale=DynamicLossScale(init_scale=4.0),
        max_grad_norm=torch.inf,
        partition_group=dist.group.WORLD,
    )
    zero = ZeroRedundancyOptimizer(params, constructor, lr=0.5)
    for value in (torch.inf, 6.0):
        for param, grad in zip(params, (value, 8.0), strict=True):
            param.grad = torch.full_like(param, grad)
        zero.step()
    stats = zero.optim.stats()
    assert (stats.scale, stats.applied_steps, stats.skipped_steps) == (2.0, 1, 1)
    assert stats.grad_norm == pytest.approx(50**0.5)
    assert [param.tolist() for param in params] == [[-0.5] * 2, [-1.0] * 2]


def test_a_process_without_parameters_decides_with_the_others():
    ranks.run(4, train_without_a_part)


def find_biases_apart() -> None:
    """Checks groups that may have biases only, into which ZeroRedundancyOptimizer writes its own weight decay."""
    torch.manual_seed(0)
    model = Sequential(Linear(6, 9), Linear(9, 3))
    for params in (model.parameters(), [{"params": model.parameters(), "weight_decay": 0.2}]):
        zero = ZeroRedundancyOptimizer(params, FusedSGD, lr=0.1, weight_decay=0.1)
        assert [group["bias_decay"] for group in zero.optim.param_groups] == [False]


def test_a_partition_that_happens_to_have_biases_alone_does_not_decay_them():
    ranks.run(4, find_biases_apart)


def train_with_norms() -> None:
    """Trains a model with cast norms, because ZeroRedundancyOptimizer requires parameters of one dtype."""
    torch.manual_seed(0)
    layers = Sequential(Linear(6, 9), LayerNorm(9), ReLU(), Linear(9, 3))
    kept = cast_model(deepcopy(layers), torch.float16)
    with pytest.raises(ValueError, match="same dense type"):
        ZeroRedundancyOptimizer(kept.parameters(), FusedSGD, lr=0.1)
    model = cast_model(layers, torch.float16, keep_fp32=[])
    before = [p.detach().clone() for p in model.parameters()]
    zero = train_zero(model, list(range(STEPS)))
    assert zero.optim.stats().skipped_steps == 2
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    first, second = gathered(model)
    assert_all_same_bits(first, second)


def test_a_model_with_norms_is_cast_whole():
    ranks.run(2, train_with_norms)


def train_under_grad_scaler() -> None:
    models = [network(torch.float32) for _ in range(2)]
    replicas = [DistributedDataParallel(model) for model in models]
    zero = ZeroRedundancyOptimizer(models[0].parameters(), FusedSGD, **OPTIONS)
    whole = FusedSGD(models[1].parameters(), **OPTIONS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(STEPS):
        for index, optimizer in enumerate((zero, whole)):
            optimizer.zero_grad()
            scalers[index].scale(replicas[index](batch(step)).square().mean()).backward()
            overflow_once(models[index], step)
            scalers[index].step(optimizer)
            scalers[index].update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert_all_same_bits(models[0].parameters(), models[1].parameters())


def test_a_grad_scaler_around_it_needs_no_group():
    """GradScaler checks the gradients of all parameters, which are the same on every process after DDP's reduction."""
    ranks.run(2, train_under_grad_scaler)


def resume() -> None:
    """Resumes at step 4 with new objects and a saved state, and compares with a run without a stop."""
    straight, first = network(torch.float16), network(torch.float16)
    steps = list(range(STEPS))
    train_zero(straight, steps)
    zero = train_zero(first, steps[:4])
    zero.consolidate_state_dict(to=0)
    saved = [zero.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    second = network(torch.float16)
    second.load_state_dict(first.state_dict())
    train_zero(second, steps[4:], saved[0], zero.optim.loss_scale.state_dict())
    assert_all_same_bits(second.parameters(), straight.parameters())


def train_zero(
    model: Module, steps: list[int], saved: dict[str, Any] | None = None, scale: dict[str, Any] | None = None
) -> ZeroRedundancyOptimizer:
    replica = DistributedDataParallel(model)
    constructor = functools.partial(
        FusedSGD,
        loss_scale=DynamicLossScale(init_scale=64.0, growth_interval=2),
        partition_group=dist.group.WORLD,
    )
    zero = ZeroRedundancyOptimizer(model.parameters(), constructor, **OPTIONS)
    if saved is not None:
        zero.load_state_dict(saved)
        zero.optim.loss_scale.load_state_dict(scale)
    for step in steps:
        zero.zero_grad()
        zero.optim.scale(replica(batch(step)).square().mean()).backward()
        overflow_once(model, step)
        zero.step()
    return zero


def test_its_checkpoint_resumes_with_the_loss_scale_beside_it():
    ranks.run(2, resume)


def step_on_a_grid() -> None:
    """Takes steps in two stages of a pipeline. Each stage has one parameter, divided over two processes."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    stage, data = grid.get_local_rank("stage"), grid["data"]
    grads = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])]
    param = Parameter(distribute_tensor(torch.zeros(3), data, [Shard(0)]))
    plain = Parameter(torch.zeros(1))
    optimizer = FusedSGD(
        [param, plain] if stage else [param],
        lr=1.0,
        max_grad_norm=1.0,
        partition_group=grid.get_group("stage"),
    )
    for step in range(3):
        grad = grads[stage].clone()
        if step == 1 + stage:
            grad[0] = torch.nan
        param.grad = distribute_tensor(grad, data, [Shard(0)])
        plain.grad = torch.full((1,), 12.0)
        optimizer.step()
        assert optimizer.stats().skipped_steps == step
        if step == 0:
            assert optimizer.stats().grad_norm == 13.0
    expected = -grads[stage] * torch.tensor(1.0 / (13.0 + 1e-6))
    torch.testing.assert_close(param.full_tensor().detach(), expected, rtol=1e-6, atol=0)


def test_stages_of_a_pipeline_decide_together_although_each_is_divided_in_its_own_way():
    ranks.run(4, step_on_a_grid)


def copy_with_a_group() -> None:
    param = Parameter(torch.zeros(2))
    optimizer = FusedSGD([param], lr=1.0, loss_scale=1.0, partition_group=dist.group.WORLD)
    copied = deepcopy(optimizer)
    (other,) = copied.param_groups[0]["params"]
    other.grad = torch.full((2,), torch.nan if dist.get_rank() else 1.0)
    copied.step()
    assert copied.stats().skipped_steps == 1


def test_a_copy_decides_with_the_same_processes():
    ranks.run(2, copy_with_a_group)


def refuse_what_is_no_group() -> None:
    param = Parameter(torch.zeros(2))
    groups = [dist.new_group([rank]) for rank in range(2)]
    for group in ("world", groups[1 - dist.get_rank()]):
        with pytest.raises(TypeError, match="partition_group must be a .*ProcessGroup"):
            FusedSGD([param], lr=1.0, partition_group=group)


def test_a_group_is_one_that_the_process_belongs_to():
    ranks.run(2, refuse_what_is_no_group)
