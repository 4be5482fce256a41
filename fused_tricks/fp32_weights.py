"""Weights in full precision: from and to the masters of a low-precision model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._torch import run_load_state_dict_hooks
from .distributed.sharding import is_distributed, local_part, placed_like
from .optimizer import FusedSGD
from .step.masters import masters_in_use
from .step.ordinary_tensors import outside_inference_mode
from .step.parameters import LOW_PRECISION, MASTER_PARAM
from .step.plan import adopt_foreign_values
from .step.shared_memory import missing_bytes
from .validation import check_module


@outside_inference_mode()
def fp32_state_dict(model: nn.Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns `model.state_dict()` in full precision, as if the model had been trained in FP32.

    Keys, their order and the metadata are those of `model.state_dict()`, with `module.` in front where the model is
    wrapped in `torch.nn.parallel.DistributedDataParallel`. For an FP16 or BF16 parameter that `optimizer` updates
    there is its FP32 master, with whatever others have written to the parameter since; for one without a master, and
    for a buffer, its own values in FP32. All else is as it is: FP32 norms and running statistics, FP64, integers.

    Tensors are copies, which the next step does not change; a parameter that modules share is one tensor here too. This
    is for another run or for inference: to resume the same run, save `model.state_dict()` and
    `optimizer.state_dict()`, which has masters and momentum.

    Args:
        model: the model, on any device, cast by `cast_model` or otherwise.
        optimizer: the optimizer of its parameters. It may have others as well, and the model may have parameters
            that it does not update.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not a `FusedSGD`.
        ValueError: `optimizer` has no parameter of `model`, or a parameter of a lazy module has no shape yet.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.2; `Module.state_dict`.
    """
    _check_types(model, optimizer)
    with _in_full_precision(model, optimizer):
        state: dict[str, Any] = model.state_dict()
    return state


@outside_inference_mode()
def load_fp32_state_dict(model: nn.Module, optimizer: FusedSGD, state: Mapping[str, Any]) -> None:
    """Loads full-precision weights, those of `fp32_state_dict` or of any FP32 model, without rounding them away.

    FP16 and BF16 parameters that `optimizer` updates get the values of `state` as their FP32 masters, bit for bit,
    and their rounding to nearest even as their own; the masters are in the optimizer's state from then on, also before
    its first step. Every other tensor is copied, into the type that it has in the model: a frozen low-precision
    parameter keeps only the rounding. Nothing else of the optimizer changes: not its momentum, options or scale.

    Keys and shapes are checked as strictly as by `model.load_state_dict(state)`, whose hooks and extra states work.

    Args:
        model: the model, already in low precision.
        optimizer: the optimizer of its parameters, as for `fp32_state_dict`.
        state: the weights, in any floating-point type, on any device.

    Raises:
        RuntimeError: keys or shapes do not match, in the words of `Module.load_state_dict`.
        TypeError: `state` is not a mapping, or as `fp32_state_dict`.
        ValueError: as `fp32_state_dict`. A refused call leaves model and optimizer as they were.

    Source: `Module.load_state_dict`; for the masters "Mixed Precision Training" (arXiv 1710.03740), section 3.1.
    """
    _check_types(model, optimizer)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor) and missing_bytes(value):
            raise ValueError(f"the {name} to load has no memory: its storage was resized")
    with (
        _shards_found_again(model),
        _in_full_precision(model, optimizer) as copies,
        _extra_states_kept(model),
    ):
        model.load_state_dict(state)
    optimizer_state = optimizer.state
    masters = masters_in_use(optimizer.param_groups, optimizer_state)
    with torch.no_grad():
        for tensor, value in copies.items():
            # A buffer that is not in the checkpoint, which may be of memory that cannot be written.
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
                # The module takes the size of this buffer from the checkpoint.
                tensor.data = value.to(tensor.dtype)


def _check_types(model: nn.Module, optimizer: FusedSGD) -> None:
    check_module(model)
    if not isinstance(optimizer, FusedSGD):
        raise TypeError(
            f"optimizer must be a FusedSGD, got {type(optimizer).__name__}: others have no masters"
        )
    masters = masters_in_use(optimizer.param_groups, optimizer.state)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            continue
        master = masters.get(tensor)
        if missing_bytes(tensor) or (isinstance(master, Tensor) and missing_bytes(master)):
            raise ValueError(f"{name} or its master has no memory: its storage was resized; restore it first")


@contextmanager
def _in_full_precision(model: nn.Module, optimizer: FusedSGD) -> Iterator[dict[Tensor, Tensor]]:
    """Has copies in full precision where modules have parameters and buffers, and yields them by the originals.

    Giving the parameters themselves other data would cost them their autograd hooks, on which DistributedDataParallel
    relies.
    """
    # FSDP puts its shards where the modules' parameters are before it lists them.
    model.state_dict()
    if set(_parameters(optimizer)).isdisjoint(model.parameters()):
        raise ValueError("optimizer has no parameter of this model; give the optimizer that trains it")
    # Once: on a GPU it may have to wait for the device.
    state = optimizer.state
    places = list(_places(model))
    # In the same order in every process, which may have to take part in placing a sharded master.
    tensors = dict.fromkeys(tensor for _, _, tensor in places)
    copies = {tensor: _full_precision(tensor, state.get(tensor, {})) for tensor in tensors}
    try:
        for table, key, tensor in places:
            table[key] = copies[tensor]
        yield copies
    finally:
        for table, key, tensor in places:
            # Unless the module itself has put another tensor there.
            if table.get(key) is copies[tensor]:
                table[key] = tensor


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Every parameter and buffer of every module: the dict that has it, its key there, and itself."""
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if is_lazy(tensor):
                    name = f"{prefix}.{key}" if prefix else key
                    raise ValueError(f"{name} has no shape yet; run a forward pass first")
                if tensor is not None:
                    yield table, key, tensor


@torch.no_grad()
def _full_precision(tensor: Tensor, own_state: dict[str, Any]) -> Tensor:
    if tensor.dtype not in LOW_PRECISION:
        return tensor.detach().clone()
    master: Tensor | None = own_state.get(MASTER_PARAM)
    if master is None or master.shape != tensor.shape:
        return tensor.detach().to(torch.float32)
    value = placed_like(master.detach(), tensor).to(tensor.device, torch.float32, copy=True)
    adopt_foreign_values(local_part(value), local_part(tensor))
    return value


@contextmanager
def _extra_states_kept(model: nn.Module) -> Iterator[None]:
    """Gives modules their extra states back when loading is refused."""
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
    """Has FSDP2 take the modules' parameters for its shards again: it looks at them whenever they are loaded."""
    try:
        yield
    finally:
        for module in model.modules():
            if any(param is not None and is_distributed(param) for param in module._parameters.values()):
                run_load_state_dict_hooks(module)


def _parameters(optimizer: FusedSGD) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
