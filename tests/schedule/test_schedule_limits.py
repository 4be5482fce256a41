"""The end, the resumption and the text form of a schedule."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR

from fused_tricks import FusedSGD, WarmupCosineLR
from support.comparison import parameters
from support.scheduled import FACTORS, parameter, rates, run

BEYOND = "beyond total_steps=7"


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter()], lr=1.0)


def fused() -> FusedSGD:
    return FusedSGD([parameter()], lr=1.0, backend="reference")


@pytest.mark.parametrize("count", ["calls", "applied"])
def test_one_step_after_every_update_is_not_beyond_the_end(count):
    optimizer = fused()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count=count)
        run(optimizer, schedule, 7)
    assert rates(optimizer) == [0.0]


@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_step_beyond_the_end_is_warned_of_once_at_the_users_line(count):
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count=count)
    run(optimizer, schedule, 7)
    with pytest.warns(UserWarning, match=BEYOND) as caught:
        optimizer.step()
        schedule.step()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, schedule, 3)


@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_jump_beyond_the_end_is_warned_of(count):
    schedule = WarmupCosineLR(fused(), total_steps=7, count=count)
    schedule.step(7)
    with pytest.warns(UserWarning, match=BEYOND):
        schedule.step(8)


def test_steps_that_are_skipped_are_not_beyond_the_end():
    param = parameter()
    optimizer = FusedSGD([param], lr=1.0, loss_scale=8.0, backend="reference")
    schedule = WarmupCosineLR(optimizer, total_steps=7, count="applied")
    param.grad = torch.full((2, 2), torch.inf)
    optimizer.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, schedule, 12)


def test_restarts_without_end_have_no_step_beyond_it():
    optimizer = sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, WarmupCosineLR(optimizer, total_steps=None, T_0=2), 20)


def test_a_step_beyond_the_end_is_warned_of_through_sequential_lr():
    optimizer = sgd()
    constant = ConstantLR(optimizer, factor=1.0)
    both = SequentialLR(optimizer, [constant, WarmupCosineLR(optimizer, total_steps=7)], milestones=[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, both, 9)
    with pytest.warns(UserWarning, match=BEYOND) as caught:
        both.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("options", [{}, {"T_0": 3}, {"count": "applied"}], ids=str)
def test_a_warm_up_that_takes_all_updates_is_warned_of(options):
    with pytest.warns(UserWarning, match="warmup_steps equals total_steps=7") as caught:
        WarmupCosineLR(fused(), total_steps=7, warmup_steps=7, **options)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("count", ["calls", "applied"])
@pytest.mark.parametrize("done", range(8))
def test_last_epoch_resumes_after_that_many_updates(count, done):
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count=count, last_epoch=done - 1)
    assert schedule.last_epoch == done
    used = []
    for factor in FACTORS[done:7]:
        used.append((rates(optimizer), factor))
        optimizer.step()
        schedule.step()
    assert all(rate == pytest.approx([factor]) for rate, factor in used)


def test_an_optimizer_that_is_loaded_after_its_schedule_was_made_brings_its_count():
    trained = fused()
    for _ in range(3):
        trained.step()
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count="applied", last_epoch=2)
    optimizer.load_state_dict(trained.state_dict())
    optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
    for factor in FACTORS[3:7]:
        assert rates(optimizer) == pytest.approx([factor])
        optimizer.step()
        schedule.step()


def test_last_epoch_takes_the_initial_rates_that_the_optimizer_brings():
    optimizer = sgd()
    optimizer.param_groups[0].update(lr=0.25, initial_lr=2.0)
    WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, last_epoch=1)
    assert rates(optimizer) == [1.5]


@pytest.mark.parametrize("rate", [10**400, float("nan"), float("inf")], ids=lambda v: str(v)[:8])
@pytest.mark.parametrize("count", ["calls", "applied"])
def test_an_initial_rate_that_is_no_finite_double_is_refused_by_name(rate, count):
    optimizer = fused()
    optimizer.param_groups[0]["initial_lr"] = rate
    with pytest.raises(ValueError, match="initial_lr of group 0 must be a finite double, got "):
        WarmupCosineLR(optimizer, total_steps=7, count=count)


@pytest.mark.parametrize("last_epoch", [-2, 2**62, 10**400, 1.0, True, None], ids=lambda v: str(v)[:8])
def test_a_last_epoch_that_is_none_is_refused(last_epoch):
    with pytest.raises((TypeError, ValueError), match="last_epoch"):
        WarmupCosineLR(fused(), total_steps=7, count="applied", last_epoch=last_epoch)


@pytest.mark.parametrize("key", ["last_epoch", "origin"])
@pytest.mark.parametrize(
    "value", [2**63, 2**64, 10**400, -(2**63), -(10**400), 1.5], ids=lambda v: str(v)[:8]
)
@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_state_beyond_64_bits_is_refused_and_changes_nothing(key, value, count):
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count=count)
    run(optimizer, schedule, 2)
    state, before = schedule.state_dict(), rates(optimizer)
    with pytest.raises((TypeError, ValueError), match=key):
        schedule.load_state_dict({**state, key: value})
    assert schedule.state_dict() == state
    assert rates(optimizer) == before
    assert run(optimizer, schedule, 2) == [[FACTORS[2]], [FACTORS[3]]]


@pytest.mark.parametrize("epoch", [2**63, 10**400, -1], ids=lambda v: str(v)[:8])
@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_jump_beyond_64_bits_is_refused_and_changes_nothing(epoch, count):
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4, count=count)
    run(optimizer, schedule, 2)
    with pytest.raises(ValueError, match="epoch"):
        schedule.step(epoch)
    assert run(optimizer, schedule, 2) == [[FACTORS[2]], [FACTORS[3]]]


def test_the_largest_numbers_of_a_state_can_be_gone_on_from():
    optimizer = fused()
    schedule = WarmupCosineLR(optimizer, total_steps=7, count="applied")
    for origin in (2**62, -(2**62)):
        schedule.load_state_dict({**schedule.state_dict(), "origin": origin})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(optimizer, schedule, 2)
    assert rates(optimizer) == [0.0]


def test_a_schedule_shows_its_arguments():
    schedule = WarmupCosineLR(fused(), total_steps=70, warmup_steps=4, min_ratio=0.25, T_0=5, count="applied")
    assert repr(schedule) == (
        "WarmupCosineLR(total_steps=70, warmup_steps=4, warmup_start=0.0, min_ratio=0.25, T_0=5, T_mult=1.0, "
        "peak_decay=1.0, warmup_every_cycle=False, count='applied')"
    )


def test_in_a_chained_scheduler_it_overwrites_those_before_it():
    """`WarmupCosineLR` computes each rate from the base rate."""
    optimizer = torch.optim.SGD(parameters([(2,)]), lr=1.0)
    halved = ConstantLR(optimizer, factor=0.5, total_iters=100)
    chained = ChainedScheduler([halved, WarmupCosineLR(optimizer, total_steps=7, warmup_steps=4)])
    assert [rate for (rate,) in run(optimizer, chained, 7)] == pytest.approx(FACTORS[:7])
