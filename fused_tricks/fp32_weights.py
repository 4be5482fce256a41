"""Export and import of a low-precision model's weights in FP32, from and to the masters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import run_load_state_dict_hooks
from .distributed.sharding import is_distributed
from .optimizer import FusedSGD
from .step.masters import masters_in_use
from .step.model_weights import check_model, full_precision, with_weights
from .step.ordinary_tensors import outside_inference_mode
from .step.parameters import LOW_PRECISION, MASTER_PARAM
from .step.shared_memory import missing_bytes


@outside_inference_mode()
def fp32_state_dict(model: nn.Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns `model.state_dict()` in full precision, as after a training in FP32.

    Keys, order and metadata are those of `model.state_dict()`; `DistributedDataParallel` adds `module.` to the keys. An
    FP16 or BF16 parameter with a master is replaced by the master, with the values that user code has written to the
    parameter since the last update. Other FP16 and BF16 parameters and buffers are converted to FP32. FP32 norms,
    running statistics, FP64 tensors and integers are unchanged.

    All tensors are copies, so a later step does not change them. A parameter that several modules share is one tensor.
    The result is for another run or for inference. To resume the same run, save `model.state_dict()` and
    `optimizer.state_dict()`, which contains masters and momentum.

    Args:
        model: The model, on any device, converted by `cast_model` or otherwise.
        optimizer: The optimizer of the model's parameters. The optimizer may have other parameters, and the model may
            have parameters without an optimizer.

    Returns:
        The state dict, with FP32 in place of FP16 and BF16.

    Raises:
        TypeError: `model` is not a module, or `optimizer` is not a `FusedSGD`.
        ValueError: `optimizer` has no parameter of `model`, or a parameter of a lazy module has no shape yet.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.2; `Module.state_dict`.

    Example:
        ```python
        import fused_tricks as ft
        import torch

        model = ft.cast_model(torch.nn.Linear(4, 2), torch.bfloat16)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1)
        assert ft.fp32_state_dict(model, optimizer)["weight"].dtype == torch.float32
        ```
    """
    check_model(model, optimizer)
    with with_weights(model, optimizer, full_precision):
        state: dict[str, Any] = model.state_dict()
    return state


@outside_inference_mode()
def load_fp32_state_dict(model: nn.Module, optimizer: FusedSGD, state: Mapping[str, Any]) -> None:
    """Loads full-precision weights of `fp32_state_dict` or of any FP32 model, without a loss by rounding.

    An FP16 or BF16 parameter of the optimizer gets the values as its FP32 master, bit for bit, and their rounding to
    nearest even as its own values. The master is in the optimizer's state from then on, also before the first step.
    All other tensors are copied in their own dtype, so an FP16 parameter outside the optimizer keeps only the rounding.
    Momentum, options and loss scale do not change.

    Keys and shapes are checked as by `model.load_state_dict(state)`. Hooks and extra states work as there.

    Args:
        model: The model, already in low precision.
        optimizer: The optimizer of the model's parameters, as for `fp32_state_dict`.
        state: The weights, in any floating-point dtype, on any device.

    Raises:
        RuntimeError: Keys or shapes do not match, with the message of `Module.load_state_dict`.
        TypeError: `state` is not a mapping, `model` is not a module, or `optimizer` is not a `FusedSGD`.
        ValueError: As in `fp32_state_dict`. Model and optimizer are unchanged after every error.

    Source: `Module.load_state_dict`; for masters "Mixed Precision Training" (arXiv 1710.03740), section 3.1.

    Example:
        ```python
        import fused_tricks as ft
        import torch

        pretrained = torch.nn.Linear(4, 2).state_dict()
        model = ft.cast_model(torch.nn.Linear(4, 2), torch.bfloat16)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1)
        ft.load_fp32_state_dict(model, optimizer, pretrained)
        assert torch.equal(ft.fp32_state_dict(model, optimizer)["weight"], pretrained["weight"])
        ```
    """
    check_model(model, optimizer)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor) and missing_bytes(value):
            raise ValueError(f"the {name} to load has no memory: its storage was resized")
    with (
        _shards_found_again(model),
        with_weights(model, optimizer, full_precision) as copies,
        _extra_states_kept(model),
    ):
        model.load_state_dict(state)
    optimizer_state = optimizer.state
    masters = masters_in_use(optimizer.param_groups, optimizer_state)
    with torch.no_grad():
        for tensor, value in copies.items():
            # The checkpoint lacks this buffer, whose memory may be read-only.
            if value._version == 0 and not isinstance(tensor, nn.Parameter):
                continue
            if tensor in masters and tensor.dtype in LOW_PRECISION:
                master = masters[tensor]
                if master is None or (master.shape, master.dtype) != (value.shape, value.dtype):
                    master = value
                optimizer._new_state.forget(master)
                optimizer_state.setdefault(tensor, {})[MASTER_PARAM] = master.copy_(value)
            if tensor.shape == value.shape:
                tensor.copy_(value)
            else:
                # The module resizes this buffer to the checkpoint's size.
                tensor.data = value.to(tensor.dtype)


@contextmanager
def _extra_states_kept(model: nn.Module) -> Iterator[None]:
    """Restores the modules' extra states if loading raises."""
    saved = [
        (module, deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).set_extra_state is not nn.Module.set_extra_state
    ]
    try:
        yield
    except BaseException:
        for module, extra_state in saved:
            module.set_extra_state(extra_state)
        raise


@contextmanager
def _shards_found_again(model: nn.Module) -> Iterator[None]:
    """Lets FSDP2 register the modules' parameters as its shards again, as after every load."""
    try:
        yield
    finally:
        for module in model.modules():
            if any(param is not None and is_distributed(param) for param in module._parameters.values()):
                run_load_state_dict_hooks(module)
