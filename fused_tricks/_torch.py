"""The private names of torch in use, each with the reason why no public name suffices.

A release of torch that changes a private name breaks this module, which `make test-torches` detects. Other modules read
these attributes in place: `Module._parameters`, `_buffers` and `_modules`, because the public iterators leave out
duplicates; `Tensor._version` and `_is_view`, which torch documents; and in a subclass of `LRScheduler` the protected
attributes of the base class.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# torch.compiler.disable does the same, but imports the compiler at once.
disable_dynamo = _disable_dynamo

# The base classes of all convolutions, of all BatchNorms (with SyncBatchNorm and lazy BatchNorms), and of all
# BatchNorms and InstanceNorms. torch has no public base classes.
ConvBase = _ConvNd
BatchNormBase = _BatchNorm
NormBase = _NormBase

# The oldest supported torch has no public module for pytrees.
leaves_of = tree_leaves

# Copies each tensor of a list. torch has no public function for a list.
copy_all: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_

# True for a tensor whose elements are in other tensors. torch has no public check.
is_wrapper_subclass: Callable[[object], bool] = is_traceable_wrapper_subclass


def without_modes() -> AbstractContextManager[Any]:
    """Returns a context outside every `TorchDispatchMode`, such as `FakeTensorMode`. torch has no public context."""
    context: AbstractContextManager[Any] = _disable_current_modes()
    return context


def has_modes() -> bool:
    """True inside a `TorchDispatchMode`."""
    return torch._C._len_torch_dispatch_stack() > 0


def current_raw_stream(index: int) -> int:
    """Returns the handle of a GPU's current stream. The public function builds an object in every call."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def library_path() -> str:
    """Returns the path of a library that links all libraries of torch, for lookups of functions in its C interface."""
    assert torch._C.__file__ is not None
    return torch._C.__file__


def negative_view(tensor: Tensor) -> Tensor:
    """Returns a dense view with the negative bit set. No public function returns a dense one."""
    return torch._neg_view(tensor)


def is_zero_tensor(tensor: Tensor) -> bool:
    """True for a tensor of zeros without memory, as autograd creates."""
    return tensor._is_zerotensor()


def is_fake(tensor: Tensor) -> bool:
    """True for a `FakeTensor`."""
    # A FakeTensor exists only after an import of the module. The import takes long.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def wrapped_by(tensor: Tensor) -> tuple[Tensor, object]:
    """Returns the local tensor of a `DTensor`, and its `DTensorSpec`. The public method returns a new view."""
    parts: Any = tensor
    return parts._local_tensor, parts._spec


def has_step_hooks(optimizer: Optimizer) -> bool:
    """True if an optimizer has step hooks or a profiler is active. torch's decorator does not check this first."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    )


@contextmanager
def first_state_dict_hook(
    optimizer: Optimizer, hook: Callable[[Optimizer, dict[str, Any]], None]
) -> Iterator[None]:
    """Runs a hook before the registered `state_dict` hooks, because a registered hook may replace the dict."""
    hooks = optimizer._optimizer_state_dict_post_hooks
    optimizer._optimizer_state_dict_post_hooks = OrderedDict({-1: hook, **hooks})
    try:
        yield
    finally:
        optimizer._optimizer_state_dict_post_hooks = hooks


def load_state_dict_pre_hooks(optimizer: Optimizer) -> Iterable[Callable[..., Any]]:
    """Returns the `load_state_dict` pre-hooks. A class that overrides `load_state_dict` must run the hooks itself."""
    return optimizer._optimizer_load_state_dict_pre_hooks.values()


def load_state_dict_post_hooks(optimizer: Optimizer) -> Iterable[Callable[..., Any]]:
    """Returns the `load_state_dict` post-hooks."""
    return optimizer._optimizer_load_state_dict_post_hooks.values()


def run_load_state_dict_hooks(module: nn.Module) -> None:
    """Runs a module's `load_state_dict` post-hooks. FSDP2 updates its shards in such a hook."""
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys([], []))


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the forward pre-hooks and forward hooks of a module. torch has no public function for the hooks."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def clear_backward_hooks(module: nn.Module) -> None:
    """Removes a module's backward hooks. The public way requires the handles, which user code has."""
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


def is_flattened_by_fsdp1(tensor: Tensor) -> bool:
    """True if FSDP1 has flattened a parameter. A flattened parameter has no public type."""
    return getattr(tensor, "_fsdp_flattened", False)


def is_called_by(module: str, code: CodeType | None = None) -> bool:
    """True if the call stack contains a function of the module `module`, or the function with the code `code`."""
    frame = sys._getframe()
    caller: Any = frame
    while caller is not None:
        if caller.f_code is code or (code is None and caller.f_globals.get("__name__") == module):
            return True
        caller = caller.f_back
    return False


ZERO_REDUNDANCY_OPTIMIZER = "torch.distributed.optim.zero_redundancy_optimizer"
_DISTRIBUTED_CHECKPOINT = "torch.distributed.checkpoint.state_dict"


def is_called_by_distributed_checkpoint() -> bool:
    """True inside a call from `torch.distributed.checkpoint`."""
    return _DISTRIBUTED_CHECKPOINT in sys.modules and is_called_by(_DISTRIBUTED_CHECKPOINT)


def is_asked_for_state() -> bool:
    """True while `torch.distributed.checkpoint` reads or initialises optimizer state.

    The initialisation is a dummy step with gradients of zero and `lr=0`. Only the call stack identifies the dummy step,
    because a first step of training may have the same gradients and `lr`, perhaps on one process only.
    """
    init_optim_state = getattr(sys.modules.get(_DISTRIBUTED_CHECKPOINT), "_init_optim_state", None)
    return init_optim_state is not None and is_called_by(_DISTRIBUTED_CHECKPOINT, init_optim_state.__code__)
