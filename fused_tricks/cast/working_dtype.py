"""The present dtype of a model, read from its weights."""

import copy
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import NormBase, forward_hooks

_NORM_TYPES = (
    NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
)  # fmt: skip


def is_norm(module: nn.Module) -> bool:
    """True for PyTorch's norm layers and for modules that own running statistics."""
    return isinstance(module, _NORM_TYPES) or "running_var" in module._buffers


class Cast:
    """A hook that casts. `handle` removes the hook."""

    handle: torch.utils.hooks.RemovableHandle

    @property
    def __name__(self) -> str:
        # torch.jit.script reads this attribute first, and shows the error as the reason of its failure.
        raise AttributeError(
            "torch.jit.script cannot compile the casts of cast_model; use torch.jit.trace or torch.export, or undo the "
            "conversion first, by cast_model(model, torch.float32)"
        )


@dataclasses.dataclass(frozen=True)
class TensorDtype:
    """The dtype of one tensor of a module.

    Attributes:
        module: The module that owns the tensor; None without a tensor.
        name: The tensor's name in the module. `nn.Module.to` may replace the tensor itself.
        at_first: The dtype without a tensor.
    """

    module: nn.Module | None
    name: str
    at_first: torch.dtype

    def now(self, _: nn.Module) -> torch.dtype:
        """Returns the present dtype of the tensor."""
        return _dtype_of(self.module, self.name) or self.at_first


@dataclasses.dataclass(frozen=True)
class WorkingDtype:
    """The working dtype of a module: the dtype of one of its tensors.

    Attributes:
        at_first: The dtype of a module without floating-point tensors.
        path: The names that lead from the module to the owner of the tensor; None searches for the owner.
        name: The tensor's name in the owner.
        kind: The owner's type. Another layer in its place, such as a norm, may have another dtype.
    """

    at_first: torch.dtype
    path: tuple[str, ...] | None = None
    name: str = ""
    kind: type = nn.Module

    @staticmethod
    def of(root: nn.Module, at_first: torch.dtype) -> "WorkingDtype":
        """Returns the working dtype by the first tensor in `root` that has the dtype `at_first`."""
        for path, module in root.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.dtype == at_first:
                    return WorkingDtype(at_first, tuple(path.split(".")) if path else (), name, type(module))
        return WorkingDtype(at_first)

    def now(self, root: nn.Module) -> torch.dtype:
        """Returns the present dtype of `root`; without other weights, the dtype of its kept modules."""
        dtype = self.of_weights(root)
        if dtype is not None:
            return dtype
        for module in root.modules():
            dtype = _dtype_of(module, _first_name(module))
            if dtype is not None:
                return dtype
        return self.at_first

    def of_weights(self, root: nn.Module) -> torch.dtype | None:
        """Returns the present dtype of the weights in `root` that are not kept in FP32; None without such weights."""
        owner = None if self.path is None else _at(root, self.path)
        dtype = _dtype_of(owner, self.name) if isinstance(owner, self.kind) else None
        if dtype is None:
            owner = _first_owner(root)
            dtype = None if owner is None else _dtype_of(owner, _first_name(owner))
        return dtype


class Surroundings:
    """The working dtype of the modules around a kept module.

    References to modules are weak, so that a kept module that leaves the model does not hold the model in memory. A
    pickle names the tensor that has the dtype, so that the pickle of a part does not contain the model.

    Args:
        model: The whole model.
        path: The names that lead from the model to the kept module's parent.
        whole: The working dtype of the model.
        at_first: The dtype of the weights beside the kept module.
    """

    def __init__(
        self, model: nn.Module, path: tuple[str, ...], whole: WorkingDtype, at_first: torch.dtype
    ) -> None:
        parent = _at(model, path)
        assert parent is not None
        self.model = weakref.ref(model)
        self.parent = weakref.ref(parent)
        self.path = path
        self.whole = whole
        self.beside = WorkingDtype.of(parent, at_first)

    def now(self, kept: nn.Module) -> torch.dtype:
        """Returns the present dtype around a kept module, by the nearest weights."""
        model, parent = self.model(), self.parent()
        if model is not None and (parent is None or _at(model, self.path) is not parent):
            for module in model.modules():
                if _is_child(kept, module):
                    parent = module
                    break
        if parent is not None and _is_child(kept, parent):
            dtype = self.beside.of_weights(parent)
            if dtype is not None:
                return dtype
        return self.whole.at_first if model is None else self.whole.now(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Surroundings":
        """Refers to the copies of model and parent if the same deepcopy makes them."""
        twin = copy.copy(self)
        for name in ("model", "parent"):
            module = getattr(self, name)()
            setattr(twin, name, weakref.ref(memo.get(id(module), module)) if module is not None else _nothing)
        return twin

    def __copy__(self) -> "Surroundings":
        twin = Surroundings.__new__(Surroundings)
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        for root in (self.parent(), self.model()):
            owner = None if root is None else _first_owner(root)
            if owner is not None:
                break
        name = "" if owner is None else _first_name(owner)
        state = {"module": owner, "name": name}
        return TensorDtype, (None, "", self.whole.at_first), state


def _nothing() -> None:
    """Returns None, as a weak reference to a freed object does."""


def _at(root: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _is_child(module: nn.Module, parent: nn.Module) -> bool:
    return any(child is module for child in parent._modules.values())


def _dtype_of(module: nn.Module | None, name: str) -> torch.dtype | None:
    tensor = getattr(module, name, None) if name else None
    return tensor.dtype if isinstance(tensor, Tensor) and tensor.is_floating_point() else None


def _first_name(module: nn.Module) -> str:
    """Returns the name of a module's first floating-point tensor; empty without one."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point():
                return name
    return ""


def _first_owner(root: nn.Module) -> nn.Module | None:
    """Returns the first module in `root` with a floating-point tensor that is neither kept nor a norm."""
    todo, seen = [root], {root}
    while todo:
        module = todo.pop()
        if module is not root and (is_norm(module) or _has_casts(module)):
            continue
        if _first_name(module):
            return module
        children = [child for child in module._modules.values() if child is not None and child not in seen]
        seen.update(children)
        todo += reversed(children)
    return None


def _has_casts(module: nn.Module) -> bool:
    return any(isinstance(hook, Cast) for hook in forward_hooks(module))
