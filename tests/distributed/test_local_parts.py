"""DTensors in one process: the plan guards read local parts, and Python runs only if something has changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.step import stand_ins
from support.comparison import assert_same_bits

pytestmark = pytest.mark.both_watches
OPTIONS = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=[torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


class Pair:
    """A DTensor and an equal plain parameter, each with its optimizer."""

    def __init__(self, mesh: DeviceMesh, backend: str, dtype: torch.dtype) -> None:
        self._mesh = mesh
        self.plain = Parameter(torch.arange(12.0).reshape(3, 4).to(dtype))
        self.sharded = Parameter(distribute_tensor(self.plain.detach().clone(), mesh, [Shard(0)]))
        self.expected = FusedSGD([self.plain], **OPTIONS, backend=backend, loss_scale=1.0)
        self.optimizer = FusedSGD([self.sharded], **OPTIONS, backend=backend, loss_scale=1.0)

    @property
    def local(self) -> Tensor:
        return self.sharded._local_tensor

    def set_grads(self, step: int) -> None:
        grad = torch.full((3, 4), 1.0 + step, dtype=self.plain.dtype)
        self.plain.grad = grad
        self.sharded.grad = distribute_tensor(grad.clone(), self._mesh, [Shard(0)])

    def step(self) -> None:
        self.expected.step()
        self.optimizer.step()
        assert_same_bits(self.sharded.full_tensor().detach(), self.plain.detach())

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.set_grads(step)
            self.step()


@pytest.fixture
def pair(mesh: DeviceMesh, backend: str, dtype: torch.dtype) -> Pair:
    return Pair(mesh, backend, dtype)


def test_a_steady_step_over_shards_runs_no_python_for_each_of_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.train(2)
    if not pair.optimizer._prepared.stepper.reads_shards:
        pytest.skip("only the plan guard of the extension reads local parts")
    monkeypatch.setattr(stand_ins, "_fill", lambda *_: pytest.fail("a stand-in was filled"))
    monkeypatch.setattr(pair.optimizer, "_prepare", lambda: pytest.fail("a new plan was made"))
    pair.train(3)


@pytest.mark.parametrize("write", ["to the DTensor", "to its local part"])
def test_a_write_of_user_code_is_adopted(pair: Pair, write: str) -> None:
    pair.train(2)
    with torch.no_grad():
        pair.plain.fill_(3)
        (pair.sharded if write == "to the DTensor" else pair.local).fill_(3)
    pair.train(2)


def test_a_replaced_local_part_is_updated_in_place_of_the_former(pair: Pair) -> None:
    pair.train(2)
    former = pair.local
    before = former.clone()
    pair.sharded._local_tensor = former.clone()
    pair.train(2)
    assert_same_bits(former, before)


def test_a_local_part_with_new_memory_is_updated_there(pair: Pair) -> None:
    pair.train(2)
    pair.local.data = pair.local.clone()
    pair.train(2)


def test_a_gradient_placed_otherwise_is_redistributed(pair: Pair, mesh: DeviceMesh) -> None:
    for step in range(4):
        pair.set_grads(step)
        if step % 2:
            pair.sharded.grad = pair.sharded.grad.redistribute(mesh, [Replicate()])
        pair.step()


def test_a_gradient_whose_local_part_has_other_strides_is_read_in_order(pair: Pair) -> None:
    for step in range(4):
        pair.set_grads(step)
        if step % 2:
            local = torch.arange(12.0, dtype=pair.plain.dtype).reshape(4, 3).t()
            pair.plain.grad = local
            pair.sharded.grad = DTensor.from_local(local, pair.sharded.device_mesh, [Shard(0)])
        pair.step()


def test_a_negated_local_gradient_is_read_with_its_sign(pair: Pair) -> None:
    for step in range(3):
        pair.set_grads(step)
        if step:
            pair.sharded.grad._local_tensor = torch._neg_view(-pair.plain.grad)
        pair.step()


def test_an_overflow_in_a_local_part_skips_the_step(pair: Pair) -> None:
    pair.train(2)
    pair.plain.grad = torch.full((3, 4), float("inf"), dtype=pair.plain.dtype)
    pair.sharded.grad = distribute_tensor(pair.plain.grad.clone(), pair.sharded.device_mesh, [Shard(0)])
    pair.step()
    assert pair.optimizer.stats().skipped_steps == 1
    pair.train(1)


def test_a_replaced_local_part_of_the_state_is_used(pair: Pair) -> None:
    pair.train(2)
    buffer = pair.optimizer.state[pair.sharded]["momentum_buffer"]
    buffer._local_tensor = torch.zeros(3, 4)
    pair.expected.state[pair.plain]["momentum_buffer"].zero_()
    pair.train(2)


def test_an_update_increments_the_version_counters_of_the_dtensor_and_of_its_local_part(pair: Pair) -> None:
    for step in range(3):
        pair.set_grads(step)
        before = pair.sharded._version, pair.local._version
        pair.step()
        assert pair.sharded._version > before[0]
        assert pair.local._version > before[1]


def test_gradients_of_shards_that_take_turns_soon_need_no_new_plan(
    mesh: DeviceMesh, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        pytest.skip("the reference makes a plan for every step")
    params = [Parameter(distribute_tensor(torch.zeros(3, 4), mesh, [Shard(0)])) for _ in range(4)]
    optimizer = FusedSGD(params, lr=1.0, backend=backend)
    for step in range(8):
        if step == 4:
            monkeypatch.setattr(optimizer, "_prepare", lambda: pytest.fail("a new plan was made"))
        for index, param in enumerate(params):
            param.grad = torch.ones_like(param) if index % 2 == step % 2 else None
        optimizer.step()
    assert all((param.full_tensor() == -4).all() for param in params)


class Labelled(DTensor):
    """A subclass, which the plan guard of the extension does not read itself."""


def test_a_replaced_local_part_of_a_subclass_is_updated(mesh: DeviceMesh, backend: str) -> None:
    whole = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    param = torch.Tensor._make_wrapper_subclass(Labelled, whole.shape, dtype=whole.dtype)
    param._local_tensor, param._spec = whole._local_tensor, whole._spec
    param.requires_grad_(True)
    optimizer = FusedSGD([param], lr=0.5, backend=backend)
    values = []
    for step in range(3):
        param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        if step == 1:
            param._local_tensor = torch.full((4, 4), 10.0)
        optimizer.step()
        values.append(float(param._local_tensor[0, 0]))
    assert values == [0.5, 9.5, 9.0]


def test_an_update_of_an_empty_local_part_increments_the_version_counter(
    mesh: DeviceMesh, backend: str
) -> None:
    param = Parameter(distribute_tensor(torch.zeros(0, 4), mesh, [Shard(0)]))
    optimizer = FusedSGD([param], lr=0.5, backend=backend)
    for _ in range(2):
        param.grad = distribute_tensor(torch.zeros(0, 4), mesh, [Shard(0)])
        before = param._version
        optimizer.step()
        assert param._version > before
