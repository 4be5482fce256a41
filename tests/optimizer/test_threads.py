"""One optimizer in several threads, and in code that a step calls: the results of one step after the other."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support.backends import is_slow
from support.comparison import assert_all_same_bits, copies, momentum_buffers, parameters

THREADS = 4


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Switches threads as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_in_threads(work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(index: int) -> None:
        start.wait()
        try:
            work(index)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_steps_of_several_threads_are_taken_one_after_the_other(backend, device, dtype):
    steps = 2 if is_slow(backend) else 25
    shapes = [(3,)] if is_slow(backend) else [(3,), (70_000,)] * 2
    params, alone = (parameters(shapes, dtype, device) for _ in range(2))
    options = {"lr": 0.01, "momentum": 0.9, "loss_scale": 8.0, "max_grad_norm": 1.0, "backend": backend}
    optimizer, expected = FusedSGD(params, **options), FusedSGD(alone, **options)
    for param in (*params, *alone):
        param.grad = torch.ones_like(param)
    run_in_threads(lambda index: [optimizer.step() for _ in range(steps)] and None)
    for _ in range(THREADS * steps):
        expected.step()
    assert optimizer.stats() == expected.stats()
    assert_all_same_bits(params, alone)
    assert_all_same_bits(momentum_buffers(optimizer, params), momentum_buffers(expected, alone))


def test_state_may_be_read_and_loaded_while_others_step(backend, device):
    rounds = 2 if is_slow(backend) else 15
    params = parameters([(5,)] * 4, torch.float16, device)
    optimizer = FusedSGD(params, lr=1e-3, momentum=0.9, loss_scale="dynamic", backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    def work(index: int) -> None:
        for _ in range(rounds):
            if index == 0:
                optimizer.load_state_dict(saved)
            elif index == 1:
                state = optimizer.state_dict()
                assert len(state["state"]) == len(params)
                assert all(
                    entry.keys() == {"momentum_buffer", "master_param"} for entry in state["state"].values()
                )
            else:
                optimizer.step()

    run_in_threads(work)
    optimizer.load_state_dict(saved)
    assert optimizer.stats().applied_steps == 1


def test_groups_may_be_added_while_others_step(backend, device):
    rounds = 2 if is_slow(backend) else 10
    params = parameters([(5,)] * (rounds + 1), device=device)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = FusedSGD(params[:1], lr=1e-3, momentum=0.9, backend=backend)

    def work(index: int) -> None:
        for added in params[1:]:
            if index == 0:
                optimizer.add_param_group({"params": [added]})
            else:
                optimizer.step()

    run_in_threads(work)
    optimizer.step()
    assert optimizer.stats().applied_steps == 3 * rounds + 1
    assert all(optimizer.state[param] for param in params)


def test_a_closure_may_step_the_same_optimizer(backend, device):
    (param,) = parameters([(5,)], device=device)
    (expected,) = copies([param])

    def nested(optimizer: torch.optim.Optimizer, tensor: Parameter) -> None:
        def closure() -> None:
            tensor.grad = torch.ones_like(tensor)
            optimizer.step()
            tensor.grad = torch.full_like(tensor, 2.0)

        optimizer.step(closure)

    nested(FusedSGD([param], lr=0.1, momentum=0.9, backend=backend), param)
    nested(torch.optim.SGD([expected], lr=0.1, momentum=0.9, foreach=False), expected)
    assert_all_same_bits([param], [expected])


class NumberThatSteps:
    """A momentum that steps its optimizer the first time it is read."""

    def __init__(self, optimizer: FusedSGD) -> None:
        self.optimizer = optimizer
        self.has_stepped = False

    def __float__(self) -> float:
        if not self.has_stepped:
            self.has_stepped = True
            self.optimizer.step()
        return 0.5

    def __ne__(self, other: object) -> bool:
        return True


def test_a_step_within_a_step_is_taken_as_a_whole():
    (param,) = parameters([(5,)])
    (expected,) = copies([param])
    optimizer = FusedSGD([param], lr=0.1, momentum=0.5, backend="cpu")
    reference = torch.optim.SGD([expected], lr=0.1, momentum=0.5, foreach=False)
    for tensor in (param, expected):
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = NumberThatSteps(optimizer)
    optimizer.step()
    for _ in range(3):
        reference.step()
    assert optimizer.stats().applied_steps == 3
    assert_all_same_bits([param], [expected])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_has_a_lock_of_its_own(duplicate):
    class Exposed(FusedSGD):
        def __getstate__(self) -> dict[str, object]:
            return self.__dict__.copy() if duplicate is copy.deepcopy else super().__getstate__()

    kind = FusedSGD if duplicate not in (copy.copy, copy.deepcopy) else Exposed
    optimizer = kind(parameters([(3,)]), lr=0.1)
    twin = duplicate(optimizer)
    assert twin._lock is not optimizer._lock
    with optimizer._lock:
        thread = threading.Thread(target=twin.step)
        thread.start()
        thread.join()
    assert twin.stats().applied_steps == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_in_the_middle_of_a_step_can_step():
    optimizer = FusedSGD(parameters([(3,)]), lr=0.1, backend="cpu")
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with optimizer._lock:
            held.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        # The child must not wait for a lock that its parent's thread held at the fork.
        is_free = optimizer._lock.acquire(blocking=False)
        if is_free:
            optimizer.step()
        os._exit(0 if is_free else 1)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_hook_may_fork():
    optimizer = FusedSGD(parameters([(3,)]), lr=0.1, backend="cpu")
    children: list[int] = []
    optimizer.register_state_dict_post_hook(lambda *_: children.append(os.fork()))
    try:
        optimizer.state_dict()
    finally:
        if children == [0]:
            # In the child, the release raises if the fork has taken the lock from its holder.
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_memory_replaced_while_a_step_is_prepared_is_refused_and_then_updated(backend, device, monkeypatch):
    (param,) = parameters([(3,)], device=device)
    optimizer = FusedSGD([param], lr=0.5, backend=backend)
    replacement = torch.full((3,), 8.0, device=device)
    move_to = optimizer._step_state.move_to

    def replace_meanwhile(target: torch.device) -> None:
        param.data = replacement
        move_to(target)

    param.grad = torch.ones(3, device=device)
    with monkeypatch.context() as patched:
        patched.setattr(optimizer._step_state, "move_to", replace_meanwhile)
        with pytest.raises(RuntimeError, match="changed while the step was being prepared"):
            optimizer.step()
    optimizer.step()
    assert torch.equal(replacement, torch.full((3,), 7.5, device=device))
    assert param.data_ptr() == replacement.data_ptr()
