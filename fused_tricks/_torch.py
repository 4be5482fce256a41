"""Torch's private names, each with the reason why no public one serves.

A release of torch that changes one of them breaks it here, and `make test-torches` finds out. `Module._parameters`,
`_buffers` and `_modules` are used where modules are walked: the public iterators leave out duplicates, which a
module may have.
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

# The base classes of every convolution, of every BatchNorm (SyncBatchNorm and the lazy ones too), and of these and
# every InstanceNorm.
ConvBase = _ConvNd
BatchNormBase = _BatchNorm
NormBase = _NormBase

# The public module of pytrees came after the oldest torch that is served.
leaves_of = tree_leaves

# Tensors whose elements are in other tensors; torch has no public question for it.
is_wrapper_subclass: Callable[[object], bool] = is_traceable_wrapper_subclass


def without_modes() -> AbstractContextManager[Any]:
    """Returns a context outside every `TorchDispatchMode`, such as `FakeTensorMode`; no public one leaves them."""
    context: AbstractContextManager[Any] = _disable_current_modes()
    return context


def has_modes() -> bool:
    """True inside a `TorchDispatchMode`."""
    return torch._C._len_torch_dispatch_stack() > 0


def current_raw_stream(index: int) -> int:
    """Returns the handle of a GPU's current stream. The public function makes an object at each call."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def library_path() -> str:
    """Returns the path of the library that links all others of torch, to look up functions of its C interface."""
    assert torch._C.__file__ is not None
    return torch._C.__file__


def negative_view(tensor: Tensor) -> Tensor:
    """Returns a view with the negative bit; no public function makes a dense one."""
    return torch._neg_view(tensor)


def is_zero_tensor(tensor: Tensor) -> bool:
    """True for a tensor of zeros without memory, as autograd makes them."""
    return tensor._is_zerotensor()


def is_fake(tensor: Tensor) -> bool:
    """True for a `FakeTensor`."""
    # Code that made one has imported the module, which takes long.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """True if an optimizer's steps have hooks or are profiled; torch's decorator opens a profiler range to find out."""
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
    """Runs a hook before all others that are registered for `state_dict`, which may replace the dict."""
    hooks = optimizer._optimizer_state_dict_post_hooks
    optimizer._optimizer_state_dict_post_hooks = OrderedDict({-1: hook, **hooks})
    try:
        yield
    finally:
        optimizer._optimizer_state_dict_post_hooks = hooks


def load_state_dict_pre_hooks(optimizer: Optimizer) -> Iterable[Callable[..., Any]]:
    """Returns the hooks of an optimizer that overrides `load_state_dict` and has to run them itself."""
    return optimizer._optimizer_load_state_dict_pre_hooks.values()


def load_state_dict_post_hooks(optimizer: Optimizer) -> Iterable[Callable[..., Any]]:
    """As `load_state_dict_pre_hooks`."""
    return optimizer._optimizer_load_state_dict_post_hooks.values()


def run_load_state_dict_hooks(module: nn.Module) -> None:
    """Runs a module's hooks as if a state had been loaded: FSDP2 looks for its shards in them."""
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys([], []))


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the hooks before and after a module's forward; a module cannot be asked for them."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def clear_backward_hooks(module: nn.Module) -> None:
    """Removes a module's backward hooks, whose handles belong to user code."""
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


def is_flattened_by_fsdp1(tensor: Tensor) -> bool:
    """True if FSDP1 has flattened a parameter, which has no type of its own."""
    return getattr(tensor, "_fsdp_flattened", False)


def is_called_by(module: str, code: CodeType | None = None) -> bool:
    """True if a caller is that function, or with None any function, of a module of torch that asks in no other way."""
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
    """True in what `torch.distributed.checkpoint` calls."""
    return _DISTRIBUTED_CHECKPOINT in sys.modules and is_called_by(_DISTRIBUTED_CHECKPOINT)


def is_asked_for_state() -> bool:
    """True while `torch.distributed.checkpoint` looks for an optimizer's state, or has a step create it.

    That step has gradients of zero and `lr=0`. Only its caller sets it apart: a first step of training may look the
    same, and on one process of several alone.
    """
    init_optim_state = getattr(sys.modules.get(_DISTRIBUTED_CHECKPOINT), "_init_optim_state", None)
    return init_optim_state is not None and is_called_by(_DISTRIBUTED_CHECKPOINT, init_optim_state.__code__)
