"""Malformed checkpoints: loading refuses them with the parameter's name, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from fused_tricks import FusedSGD
from support.comparison import assert_unchanged, parameters, set_gradients, snapshot


def trained(loss_scale: Any = "dynamic") -> FusedSGD:
    """Returns an optimizer of three named parameters after one update."""
    params = parameters([(3,), (2, 2), (4,)], [torch.float16, torch.bfloat16, torch.float32])
    named = list(zip(("stem", "conv", "head"), params, strict=True))
    optimizer = FusedSGD(
        [{"params": named[:2]}, {"params": named[2:]}], lr=0.1, momentum=0.9, loss_scale=loss_scale
    )
    set_gradients(params, [torch.ones_like(p) for p in params])
    optimizer.step()
    return optimizer


NO_TENSORS: dict[str, Any] = {
    "dict": {"a": 1},
    "list": [1.0, 2.0],
    "number": 0.5,
    "text": "momentum",
    "bool": False,
    "NumPy array": np.ones((2, 2), dtype=np.float32),
}
NO_STATE_TENSORS: dict[str, torch.Tensor] = {
    "complex": torch.ones(2, 2, dtype=torch.complex64),
    "integer": torch.ones(2, 2, dtype=torch.int64),
    "sparse": torch.ones(2, 2).to_sparse(),
    "meta": torch.ones(2, 2, device="meta"),
    "wrong shape": torch.ones(2, 3),
}


@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
@pytest.mark.parametrize("kind", [*NO_TENSORS, *NO_STATE_TENSORS])
def test_state_that_is_no_tensor_for_the_parameter_is_refused_by_its_name(key, kind):
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.7
    checkpoint["param_groups"][0]["applied_steps"] = 99
    checkpoint["state"][1][key] = NO_TENSORS.get(kind, NO_STATE_TENSORS.get(kind))
    before = snapshot(optimizer)
    with pytest.raises(TypeError if kind in NO_TENSORS else ValueError, match=f"{key}.*parameter 'conv'"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "entry", [[torch.ones(2, 2)], torch.ones(2, 2), 3, None, "text"], ids=lambda v: type(v).__name__
)
def test_an_entry_that_is_no_dict_is_refused_by_the_parameters_name(entry):
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["state"][1] = entry
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="parameter 'conv'"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "nothing", [{}, {"momentum_buffer": {}, "master_param": {}}, {"momentum_buffer": None}], ids=str
)
def test_empty_state_counts_as_none(nothing):
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["state"][1] = nothing
    optimizer.load_state_dict(checkpoint)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert not optimizer.state.get(params[1])
    optimizer.step()
    assert optimizer.state[params[1]].keys() == {"momentum_buffer", "master_param"}


def put_names(names: Any) -> Callable[[dict[str, Any]], None]:
    def put(checkpoint: dict[str, Any]) -> None:
        checkpoint["param_groups"][0]["param_names"] = names

    return put


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["param_groups"][0][key] = value

    return change


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no names": (put_names(None), ValueError, "group 0 .*param_names"),
    "too few names": (put_names(["stem"]), ValueError, "group 0 .*param_names"),
    "too many names": (put_names(["a", "b", "c"]), ValueError, "group 0 .*param_names"),
    "names that are none": (put_names([1, 2]), ValueError, "group 0 .*param_names"),
    "one text for names": (put_names("ab"), ValueError, "group 0 .*param_names"),
    "initial_lr": (put("initial_lr", "fast"), TypeError, "initial_lr"),
    "tensor as a flag": (put("nesterov", torch.ones(2)), TypeError, "nesterov must be True or False"),
    "tensor as differentiable": (put("differentiable", torch.ones(2)), ValueError, "differentiable"),
    "other state without values": (
        lambda c: c["state"][1].update(note=torch.ones(2, device="meta")),
        ValueError,
        "a note for parameter 'conv'",
    ),
    "huge lr": (put("lr", 10**400), ValueError, "lr must fit a double"),
    "params": (put("params", 3), ValueError, "match the size"),
    "group": (
        lambda c: c["param_groups"].__setitem__(1, [1]),
        TypeError,
        "group 1 .*must be a dict, got list",
    ),
    "groups": (lambda c: c.update(param_groups=7), TypeError, "param_groups of type int"),
    "state": (lambda c: c.update(state=[]), TypeError, "state of type list"),
    "no state": (lambda c: c.pop("state"), KeyError, "state"),
    "applied_steps": (put("applied_steps", 1.5), TypeError, "applied_steps"),
    "huge count": (put("skipped_steps", 10**5000), ValueError, "skipped_steps"),
    "scale": (put("loss_scale", 10**400), ValueError, "scale"),
    "scale that is no number": (put("loss_scale", "big"), TypeError, "scale"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_refused_and_changes_nothing(case):
    spoil, error, message = MALFORMED[case]
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.7
    spoil(checkpoint)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("checkpoint", [None, [], "state"], ids=repr)
def test_a_checkpoint_that_is_no_dict_is_refused(checkpoint):
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        trained().load_state_dict(checkpoint)


def test_state_that_is_no_dict_is_refused_where_it_is_assigned():
    optimizer = trained()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="optimizer.state must be a dict"):
        optimizer.state = None
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("option", ["lr", "momentum", "dampening", "weight_decay"])
def test_an_option_beyond_fp32_is_refused_by_name(option):
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][1][option] = 1e39
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{option}=1e\+39 does not fit FP32"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


def test_an_option_without_a_value_is_refused_by_name():
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    freed = torch.ones(())
    freed.untyped_storage().resize_(0)
    before = snapshot(optimizer)
    for value in (torch.ones((), device="meta"), freed):
        checkpoint["param_groups"][1]["lr"] = value
        with pytest.raises(ValueError, match="lr without a value"):
            optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


def test_a_group_that_lists_a_parameter_twice_is_refused():
    optimizer = trained()
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["params"] = [0, 0]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lists a parameter twice"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)
