"""Low-precision training: a network in FP16 or BF16 whose norm layers stay in FP32."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

ModelT = TypeVar("ModelT", bound=nn.Module)
Keep = type | str | nn.Module

# _NormBase is the base of every BatchNorm (SyncBatchNorm and the lazy ones too) and every InstanceNorm.
_NORM_TYPES = (
    _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
)  # fmt: skip

# Their kernels take FP16 or BF16 input with FP32 weights and statistics; autocast relies on the same.
_MIXED_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

# True where torch.compile traces copy.copy of any object; torch 2.11 breaks the graph there.
_TRACES_COPY = torch.__version__ >= "2.14"


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the norm layers of ``model``: what `cast_model` keeps in FP32 when not told otherwise.

    These are PyTorch's BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm and its two local
    response norms, with subclasses and lazy ones, and any module that owns a ``running_var`` buffer (a frozen
    BatchNorm, say).
    """
    return [m for m in model.modules() if isinstance(m, _NORM_TYPES) or "running_var" in m._buffers]


def cast_model(
    model: ModelT,
    dtype: torch.dtype = torch.float16,
    keep_fp32: Iterable[Keep] | Keep | None = None,
    output_dtype: torch.dtype | None = torch.float32,
) -> ModelT:
    """Converts ``model`` to low-precision training, in place, and returns it.

    Floating-point parameters, their gradients and floating-point buffers become ``dtype``; those of the kept
    modules become FP32. Parameters stay the objects they were, so an optimizer built before and tied weights
    still refer to them. Calling the model casts every floating-point tensor among its arguments to ``dtype``
    (FP64 ones too) and every floating-point tensor that it returns to ``output_dtype``, within tuples, named
    tuples, lists, dicts and dataclasses. Containers in which nothing is cast are passed on as they are, so that
    the model can write into them; of others it gets a copy.

    A kept module gets its input in FP32 and gives its output in ``dtype``; a BatchNorm, whose kernels take
    both precisions at once, reads and writes ``dtype`` directly. The casts are forward hooks: a method that
    does not go through ``model(...)`` or ``kept_module(...)`` runs without them. Convert first, then wrap the
    model in `torch.compile` or `DistributedDataParallel`.

    Calling it again starts anew from the arguments given then; with ``torch.float32`` it undoes the
    conversion: everything is FP32, and nothing is cast on the way in or out.

    Args:
        model: the model to convert.
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``.
        keep_fp32: the modules to keep in FP32, with all that they contain, instead of the default
            ``norm_layers(model)``. One or several of: a type (its instances), a module, or a name pattern (as
            in `fnmatch`, case-sensitive, against the whole name in ``model.named_modules()``; ``*`` matches
            dots too). To keep the classifier as well: ``[*norm_layers(model), "fc"]``.
        output_dtype: a floating-point dtype; ``None`` leaves the outputs as the model computes them.

    Raises:
        TypeError: ``model`` is not a module, or ``keep_fp32`` holds something of another kind.
        ValueError: ``dtype`` or ``output_dtype`` is not one of the above; a name pattern or module in
            ``keep_fp32`` is not found in ``model``; a parameter to be cast is complex; a parameter belongs
            to a kept module and to another one; ``model`` is wrapped in ``DistributedDataParallel`` already.
            A refused call leaves the model as it was.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.2, low-precision
    training; "Mixed Precision Training" (arXiv 1710.03740), section 3.3, for the norm layers in FP32.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype!r}")
    if output_dtype is not None and not (
        isinstance(output_dtype, torch.dtype) and output_dtype.is_floating_point
    ):
        raise ValueError(f"output_dtype must be a floating-point dtype or None, got {output_dtype!r}")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would no longer see the gradients of converted "
            "parameters; convert the model first, then wrap it"
        )
    kept = _kept_modules(model, norm_layers(model) if keep_fp32 is None else keep_fp32)
    fp32 = _fp32_tensors(model, kept)
    converted: dict[int, tuple[Tensor, Tensor]] = {}

    def convert(tensor: Tensor) -> Tensor:
        target = torch.float32 if id(tensor) in fp32 else dtype
        if not tensor.is_floating_point() or tensor.dtype == target:
            return tensor
        # Once, so that a buffer which several modules share stays one. Keeping it keeps its id from being reused.
        if id(tensor) not in converted:
            converted[id(tensor)] = tensor, tensor.to(target)
        return converted[id(tensor)][1]

    model._apply(convert)
    _remove_casts(model)
    if dtype is not torch.float32:
        _add_casts(model, kept, dtype, output_dtype)
    return model


def _kept_modules(model: nn.Module, keep_fp32: Iterable[Keep] | Keep) -> set[nn.Module]:
    """The modules that `keep_fp32` asks for and all that they contain."""
    if isinstance(keep_fp32, Keep):
        keep_fp32 = (keep_fp32,)
    if not isinstance(keep_fp32, Iterable):
        raise TypeError(f"keep_fp32 takes types, name patterns and modules, got {keep_fp32!r}")
    named = list(model.named_modules(remove_duplicate=False))
    kept: set[nn.Module] = set()
    for keep in keep_fp32:
        found: list[nn.Module]
        if isinstance(keep, type):
            found = [module for _, module in named if issubclass(type(module), keep)]
        elif isinstance(keep, str):
            found = [module for name, module in named if fnmatchcase(name, keep)]
            if not found:
                raise ValueError(f"keep_fp32: no module's name matches {keep!r}; see model.named_modules()")
        elif isinstance(keep, nn.Module):
            found = [module for _, module in named if module is keep]
            if not found:
                raise ValueError(f"keep_fp32: this module is not in the model: {keep}")
        else:
            raise TypeError(f"keep_fp32 takes types, name patterns and modules, got {keep!r}")
        for module in found:
            kept.update(_inside(module))
    for _, module in named:
        # It computes with out_proj's weight without calling out_proj, so the two go together.
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in kept:
            kept.update(module.modules())
    return kept


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all that it contains; for a list or dict of modules, which is never called, its items."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for item in module.children():
            yield from _inside(item)
    else:
        yield from module.modules()


def _fp32_tensors(model: nn.Module, kept: set[nn.Module]) -> dict[int, Tensor]:
    """The kept modules' parameters, gradients and buffers by id; raises where a parameter cannot be cast."""
    fp32: dict[int, Tensor] = {}
    for module in kept:
        for param in module.parameters(recurse=False):
            fp32[id(param)] = param
            if param.grad is not None:
                fp32[id(param.grad)] = param.grad
        fp32.update((id(buffer), buffer) for buffer in module.buffers(recurse=False))
    for prefix, module in model.named_modules():
        if module in kept:
            continue
        for name, param in module.named_parameters(prefix, recurse=False):
            if param.is_complex():
                raise ValueError(f"parameter {name} is complex; name its module in keep_fp32")
            if id(param) in fp32:
                raise ValueError(f"parameter {name} is also in a module kept in FP32; keep both or neither")
    return fp32


class _CastInput:
    """Forward pre-hook: casts the arguments of the module it is on."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # Pickled along, so that a process that loads the model gives the hook's key to no other hook.
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), self.dtype, {})


class _CastOutput:
    """Forward hook: casts what the module it is on returns."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, self.dtype, {})


def _add_casts(
    model: nn.Module, kept: set[nn.Module], dtype: torch.dtype, output_dtype: torch.dtype | None
) -> None:
    casts: dict[nn.Module, tuple[torch.dtype, torch.dtype | None]] = {}
    for parent in model.modules():
        if parent not in kept:
            casts.update((child, (torch.float32, dtype)) for child in parent.children() if child in kept)
    casts = {module: c for module, c in casts.items() if type(module).forward not in _MIXED_FORWARDS}
    casts[model] = (torch.float32 if model in kept else dtype, output_dtype)
    for module, (entering, leaving) in casts.items():
        _CastInput(module, entering)
        if leaving is not None:
            _CastOutput(module, leaving)


def _remove_casts(model: nn.Module) -> None:
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _CastInput | _CastOutput):
                hook.handle.remove()


def _cast(value: Any, dtype: torch.dtype, done: dict[Tensor, Tensor]) -> Any:
    """`value` with every floating-point tensor in `dtype`; containers are rebuilt where one of theirs is cast.

    `done` holds what was cast so far, by the original: a tensor that occurs several times stays one
    tensor, which is how attention knows self-attention.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        if value not in done:
            done[value] = value.to(dtype)
        return done[value]
    if not _needs_cast(value, dtype):
        return value
    if isinstance(value, tuple):
        items = [_cast(item, dtype, done) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, list):
        items = [_cast(item, dtype, done) for item in value]
        if type(value) is list:
            return items
        sequence = _copy(value)
        sequence[:] = items
        return sequence
    if type(value) in (dict, OrderedDict):  # the copy below would break torch.compile's graph
        return type(value)((key, _cast(item, dtype, done)) for key, item in value.items())
    if isinstance(value, MutableMapping):
        mapping = _copy(value)
        for key, item in value.items():
            mapping[key] = _cast(item, dtype, done)
        return mapping
    rebuilt = _copy(value)
    for name in _field_names(value):
        object.__setattr__(rebuilt, name, _cast(getattr(value, name), dtype, done))
    return rebuilt


def _copy(value: Any) -> Any:
    """A shallow copy; in a compiled graph of an older torch, which cannot trace one, an object with the same fields."""
    if not torch.compiler.is_compiling() or _TRACES_COPY or not dataclasses.is_dataclass(value):
        return copy.copy(value)
    kind: Any = type(value)
    fields = kind.__new__(kind)
    for name in _field_names(value):
        object.__setattr__(fields, name, getattr(value, name))
    return fields


def _needs_cast(value: Any, dtype: torch.dtype) -> bool:
    """Whether there is a floating-point tensor of another type in `value`."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype != dtype
    if isinstance(value, tuple | list):
        return any(_needs_cast(item, dtype) for item in value)
    if isinstance(value, MutableMapping):
        return any(_needs_cast(item, dtype) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_needs_cast(getattr(value, name), dtype) for name in _field_names(value))
    return False


def _field_names(value: Any) -> list[str]:
    """Without those with init=False that are not set yet."""
    return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
