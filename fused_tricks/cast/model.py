"""Low-precision training: a network in FP16 or BF16 whose norm layers stay in FP32."""

import inspect
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._torch import BatchNormBase, forward_hooks, leaves_of
from ..validation import check_module
from .nested import cast_nested
from .working_dtype import Cast, Surroundings, TensorDtype, WorkingDtype, is_norm

ModelT = TypeVar("ModelT", bound=nn.Module)
Keep = type | str | nn.Module

# Their kernels take FP16 or BF16 input with FP32 weights and statistics; autocast relies on the same.
_MIXED_FORWARDS = (BatchNormBase.forward, nn.SyncBatchNorm.forward)

# By this name in the pickles of models that an earlier version converted.
_WorkingDtype = TensorDtype


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the norm layers of `model`: what `cast_model` keeps in FP32 when not told otherwise.

    These are PyTorch's BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm and its two local
    response norms, with subclasses and lazy ones, and any module that owns a `running_var` buffer (a frozen
    BatchNorm, say).
    """
    return [module for module in model.modules() if is_norm(module)]


def cast_model(
    model: ModelT,
    dtype: torch.dtype = torch.float16,
    keep_fp32: Iterable[Keep] | Keep | None = None,
    output_dtype: torch.dtype | None = torch.float32,
    cast_inputs: bool | Iterable[str] = True,
) -> ModelT:
    """Converts `model` to low-precision training, in place, and returns it.

    Floating-point parameters, their gradients and floating-point buffers become `dtype`; those of the kept
    modules become FP32. Parameters stay the objects they were, so an optimizer built before and tied weights
    still refer to them. Calling the model casts every floating-point tensor among its arguments to `dtype`
    (FP64 ones too) and every floating-point tensor that it returns to `output_dtype`, within tuples, named
    tuples, lists, dicts and dataclasses. Containers in which nothing is cast are passed on as they are, so that
    the model can write into them; of others it gets a copy.

    A kept module gets its input in FP32 and gives its output in `dtype`; a BatchNorm, whose kernels take
    both precisions at once, reads and writes `dtype` directly. The casts are forward hooks: a method that
    does not go through `model(...)` or `kept_module(...)` runs without them. Convert first, then wrap the
    model in `torch.compile` or `DistributedDataParallel`.

    After `model.float()`, `model.half()` or `model.to(dtype)` the casts follow: the model works in the dtype
    that its weights have then, and returns `output_dtype` as before. Layers may be replaced or removed in between. A
    model whose weights are all kept works in their dtype, which is FP32 until it is converted again. A model that
    computes its loss itself, such as a detector, takes boxes and targets that `dtype` would round: convert a part, as
    in `cast_model(model.backbone)`, or choose by `cast_inputs` what is cast.

    Calling it again starts anew from the arguments given then; with `torch.float32` it undoes the
    conversion: everything is FP32, and nothing is cast on the way in or out.

    Args:
        model: the model to convert.
        dtype: `torch.float16`, `torch.bfloat16` or `torch.float32`.
        keep_fp32: the modules to keep in FP32, with all that they contain, instead of the default
            `norm_layers(model)`. One or several of: a type (its instances), a module, or a name pattern (as
            in `fnmatch`, case-sensitive, against the whole name in `model.named_modules()`; `*` matches
            dots too). To keep the classifier as well: `[*norm_layers(model), "fc"]`. A name pattern also keeps
            the buffers whose whole name in `model.named_buffers()` it matches, such as a table of 4096 positions,
            of which BF16 has 769; the code that reads such a buffer casts what it takes from it.
        output_dtype: a floating-point dtype; `None` leaves the outputs as the model computes them.
        cast_inputs: True, False, or the names of those arguments of `model.forward` that are cast to `dtype`. All
            others are passed on as they are; a kept module still gets its input in FP32.

    Raises:
        TypeError: `model` is not a module, or `keep_fp32` or `cast_inputs` holds something of another kind.
        ValueError: `dtype` or `output_dtype` is not one of the above; a name pattern or module in
            `keep_fp32` is not found in `model`, or a name in `cast_inputs` not among the arguments of its
            `forward`; a parameter to be cast is complex; a parameter belongs to a kept module and to another one;
            `model` contains itself, or is wrapped in `DistributedDataParallel` already. A refused call leaves
            the model as it was. Calling the model raises it for an input or output to be cast that contains itself,
            such as a list within itself.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.2, low-precision
    training; "Mixed Precision Training" (arXiv 1710.03740), section 3.3, for the norm layers in FP32.
    """
    check_module(model)
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
    _check_ends(model)
    casts_argument = _argument_names(model, cast_inputs)
    kept, buffers = _kept(model, norm_layers(model) if keep_fp32 is None else keep_fp32)
    fp32 = _fp32_tensors(model, kept) | {id(buffer): buffer for buffer in buffers}
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
        _add_casts(model, kept, dtype, output_dtype, casts_argument)
    return model


def _check_ends(model: nn.Module) -> None:
    """Raises if a module contains itself: torch's own recursions over modules do not end there."""
    around: dict[nn.Module, None] = {}
    finished: set[nn.Module] = set()

    def enter(module: nn.Module, name: str) -> None:
        if module in around:
            raise ValueError(
                f"{type(module).__name__} contains itself, as {name}, where torch's own to() and train() do not end: "
                "keep the reference in a plain list, which registers no module"
            )
        if module not in finished:
            around[module] = None
            for child_name, child in module.named_children():
                enter(child, f"{name}.{child_name}" if name else child_name)
            del around[module]
            finished.add(module)

    enter(model, "")


def _argument_names(model: nn.Module, cast_inputs: bool | Iterable[str]) -> frozenset[str] | bool:
    """`cast_inputs`, with the names checked against the arguments of `model.forward`."""
    if isinstance(cast_inputs, bool):
        return cast_inputs
    names: Any = [cast_inputs] if isinstance(cast_inputs, str) else cast_inputs
    names = [*names] if isinstance(names, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"cast_inputs must be True, False or names of forward's arguments, got {cast_inputs!r}"
        )
    arguments = inspect.signature(model.forward).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    unknown = [name for name in names if name not in arguments and not takes_any]
    if unknown:
        raise ValueError(
            f"cast_inputs: {type(model).__name__}.forward has no argument {unknown[0]!r}; it has "
            f"{', '.join(arguments) or 'none'}"
        )
    return frozenset(names)


def _kept(model: nn.Module, keep_fp32: Iterable[Keep] | Keep) -> tuple[set[nn.Module], list[Tensor]]:
    """The modules that `keep_fp32` asks for, with all that they contain, and the buffers that it names."""
    if isinstance(keep_fp32, Keep):
        keep_fp32 = (keep_fp32,)
    if not isinstance(keep_fp32, Iterable):
        raise TypeError(f"keep_fp32 takes types, name patterns and modules, got {keep_fp32!r}")
    named = list(model.named_modules(remove_duplicate=False))
    kept: set[nn.Module] = set()
    kept_buffers: list[Tensor] = []
    for keep in keep_fp32:
        found: list[nn.Module]
        if isinstance(keep, type):
            found = [module for _, module in named if issubclass(type(module), keep)]
        elif isinstance(keep, str):
            found = [module for name, module in named if fnmatchcase(name, keep)]
            named_buffers = model.named_buffers(remove_duplicate=False)
            buffers = [buffer for name, buffer in named_buffers if fnmatchcase(name, keep)]
            if not found and not buffers:
                raise ValueError(
                    f"keep_fp32: no module's name matches {keep!r}, and no buffer's; see model.named_modules() and "
                    "model.named_buffers()"
                )
            kept_buffers += buffers
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
    return kept, kept_buffers


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


class _CastInput(Cast):
    """Forward pre-hook: casts the arguments of the module it is on.

    Args:
        module: the module.
        dtype: the dtype to cast to.
        names: the arguments of the module's `forward` to cast; all without it.
    """

    dtype: WorkingDtype | TensorDtype
    names: frozenset[str] | None = None  # the default of a pickle of an earlier version, which has none

    def __init__(self, module: nn.Module, dtype: WorkingDtype, names: frozenset[str] | None = None) -> None:
        self.dtype = dtype
        self.names = names
        if names is not None:
            arguments = inspect.signature(module.forward).parameters.values()
            self.positional = [
                a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)
            ]
            self.rest = next((a.name for a in arguments if a.kind is a.VAR_POSITIONAL), "")
        # Pickled along, so that a process that loads the model gives the hook's key to no other hook.
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["dtype"], torch.dtype):
            self.dtype = WorkingDtype(state["dtype"])

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        dtype = self.dtype.now(module)
        names = self.names
        if names is None:
            return cast_nested((args, kwargs), dtype, {})
        done: dict[Tensor, Tensor] = {}
        of_args = self.positional + [self.rest] * (len(args) - len(self.positional))
        args = [
            cast_nested(value, dtype, done) if name in names else value for name, value in zip(of_args, args)
        ]
        kwargs = {
            name: cast_nested(value, dtype, done) if name in names else value
            for name, value in kwargs.items()
        }
        return tuple(args), kwargs


class _CastOutput(Cast):
    """Forward hook: casts what the module it is on returns.

    Args:
        module: the module.
        dtype: the dtype to cast to; `None` casts nothing.
        is_whole: True for the whole model, where an error about images in integers is given a line of advice.
    """

    def __init__(
        self, module: nn.Module, dtype: Surroundings | torch.dtype | None, is_whole: bool = False
    ) -> None:
        self.dtype: Surroundings | TensorDtype | torch.dtype | None = dtype
        self.handle = module.register_forward_hook(self, with_kwargs=True, always_call=is_whole)

    def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> Any:
        # Without kwargs where an earlier version registered it, before the model was pickled.
        *kwargs, output = kwargs_and_output
        if output is None and not torch.compiler.is_compiling():
            _explain_integers(sys.exc_info()[1], (args, kwargs))
        dtype = self.dtype
        if isinstance(dtype, Surroundings | TensorDtype):
            dtype = dtype.now(module)
        return None if dtype is None else cast_nested(output, dtype, {})


def _explain_integers(error: BaseException | None, inputs: Any) -> None:
    """Adds to the error of a forward pass what to write where it was given images in integers."""
    if error is None or [type(arg) for arg in error.args] != [str]:
        return
    try:
        leaves = leaves_of(inputs)
    except RecursionError:  # an input contains itself
        return
    if not any(isinstance(x, Tensor) and x.dtype is torch.uint8 and x.dim() >= 3 for x in leaves):
        return
    advice = (
        "The model was given torch.uint8 tensors, and cast_model casts floating-point tensors alone: for images write "
        "model(images.float() / 255)"
    )
    error.args = (f"{error.args[0]}\n{advice}",)


def _add_casts(
    model: nn.Module,
    kept: set[nn.Module],
    dtype: torch.dtype,
    output_dtype: torch.dtype | None,
    casts_argument: frozenset[str] | bool,
) -> None:
    whole = WorkingDtype.of(model, torch.float32 if model in kept else dtype)
    leaving: dict[nn.Module, tuple[str, ...]] = {}
    for path, parent in model.named_modules():
        if parent not in kept:
            names = tuple(path.split(".")) if path else ()
            leaving.update((child, names) for child in parent.children() if child in kept)
    for module, names in leaving.items():
        if module is not model and type(module).forward not in _MIXED_FORWARDS:
            _CastInput(module, WorkingDtype.of(module, torch.float32))
            _CastOutput(module, Surroundings(model, names, whole, dtype))
    if casts_argument is not False:
        _CastInput(model, whole, None if casts_argument is True else casts_argument)
    _CastOutput(model, output_dtype, is_whole=True)


def _remove_casts(model: nn.Module) -> None:
    for module in model.modules():
        for hook in forward_hooks(module):
            if isinstance(hook, Cast):
                hook.handle.remove()
