"""The conversion of a model to FP16 or BF16, with its norm layers in FP32."""

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

# The kernels take FP16 or BF16 input beside FP32 weights and statistics. autocast relies on the same.
_MIXED_FORWARDS = (BatchNormBase.forward, nn.SyncBatchNorm.forward)


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the norm layers of a model, which `cast_model` keeps in FP32 by default.

    Norm layers are PyTorch's BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm, LocalResponseNorm
    and CrossMapLRN2d, their subclasses and lazy forms, and every module with a buffer `running_var` (such as a frozen
    BatchNorm).

    Args:
        model: The model.

    Example:
        ```python
        import fused_tricks as ft
        from torch import nn

        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        assert ft.norm_layers(model) == [model[1]]
        ```
    """
    return [module for module in model.modules() if is_norm(module)]


def cast_model(
    model: ModelT,
    dtype: torch.dtype = torch.float16,
    keep_fp32: Iterable[Keep] | Keep | None = None,
    output_dtype: torch.dtype | None = torch.float32,
    cast_inputs: bool | Iterable[str] = True,
) -> ModelT:
    """Converts a model to low-precision training, in place, and returns the model.

    Floating-point parameters, their gradients and floating-point buffers become `dtype`. The same tensors of kept
    modules become FP32. Parameters stay the same objects, so optimizers that exist and tied weights stay valid.

    A call of the model casts every floating-point argument to `dtype`, FP64 included, and every floating-point output
    to `output_dtype`. Tensors inside tuples, named tuples, lists, dicts and dataclasses are cast as well. A container
    without a tensor to cast is passed on as the same object, so the model can write into the container. A container
    with one is copied.

    A kept module receives FP32 input, and its output becomes `dtype`. BatchNorm reads and writes `dtype` directly,
    because its kernels take both precisions at once. The casts are forward hooks, so they run in `model(...)` and
    `kept_module(...)` and not in other methods. Convert the model before `torch.compile` or `DistributedDataParallel`
    wraps it.

    The casts follow the model: after `model.float()`, `model.half()` or `model.to(dtype)` the model works in the dtype
    of its weights and returns `output_dtype` as before. Layers may be replaced or removed. A model whose weights are
    all kept works in their dtype.

    A model that computes its own loss, such as a detector, receives boxes and targets that `dtype` would round. For
    such a model, convert a part (`cast_model(model.backbone)`) or name the inputs to cast (`cast_inputs`).

    Another call starts from its own arguments. With `torch.float32` it undoes the conversion: all tensors are FP32, and
    nothing is cast.

    Args:
        model: The model.
        dtype: `torch.float16`, `torch.bfloat16` or `torch.float32`.
        keep_fp32: The modules to keep in FP32, with all that they contain, in place of `norm_layers(model)`. One or
            several of: a type (its instances), a module, or a name pattern. A name pattern is matched as in `fnmatch`,
            case-sensitive, against whole names of `model.named_modules()`; `*` matches dots too. To keep the
            classifier as well: `[*norm_layers(model), "fc"]`. A name pattern also keeps matching buffers of
            `model.named_buffers()`, such as a table of 4096 positions, of which BF16 represents 769. Code that reads a
            kept buffer must cast its values.
        output_dtype: A floating-point dtype; None leaves outputs in the dtype of the computation.
        cast_inputs: True casts all arguments of `model.forward`, False none, and names cast these arguments only. A
            kept module receives FP32 input in every case.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a module, or `keep_fp32` or `cast_inputs` contains a value of another kind.
        ValueError: `dtype` or `output_dtype` is not one of the above; a pattern or module in `keep_fp32` is not found
            in the model; a name in `cast_inputs` is not an argument of `forward`; a parameter to cast is complex; a
            parameter belongs to a kept module and to another one; the model contains itself, or
            `DistributedDataParallel` wraps the model already. The model is unchanged then. A call of the model raises
            ValueError for an input or output that contains itself, such as a list within itself.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.2, low-precision
    training; "Mixed Precision Training" (arXiv 1710.03740), section 3.3, for norm layers in FP32.

    Example:
        ```python
        import fused_tricks as ft
        import torch
        from torch import nn

        model = ft.cast_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.bfloat16)
        assert model[0].weight.dtype == torch.bfloat16
        assert model[1].weight.dtype == torch.float32
        assert model(torch.ones(4, 8)).dtype == torch.float32
        ```
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
            "model is wrapped in DistributedDataParallel, which would miss the gradients of converted parameters; "
            "convert the model first, then wrap it"
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
        # A buffer that several modules share stays one tensor. The original is kept so that its id is not reused.
        if id(tensor) not in converted:
            converted[id(tensor)] = tensor, tensor.to(target)
        return converted[id(tensor)][1]

    model._apply(convert)
    _remove_casts(model)
    if dtype is not torch.float32:
        _add_casts(model, kept, dtype, output_dtype, casts_argument)
    return model


def _check_ends(model: nn.Module) -> None:
    """Raises if a module contains itself, because torch's recursions over modules would not end."""
    around: dict[nn.Module, None] = {}
    finished: set[nn.Module] = set()

    def enter(module: nn.Module, name: str) -> None:
        if module in around:
            raise ValueError(
                f"{type(module).__name__} contains itself, as {name}, and torch's to() and train() would not end; keep "
                "the reference in a plain list, which registers no module"
            )
        if module not in finished:
            around[module] = None
            for child_name, child in module.named_children():
                enter(child, f"{name}.{child_name}" if name else child_name)
            del around[module]
            finished.add(module)

    enter(model, "")


def _argument_names(model: nn.Module, cast_inputs: bool | Iterable[str]) -> frozenset[str] | bool:
    """Returns `cast_inputs`, with its names checked against the arguments of `model.forward`."""
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
    """Returns the modules that `keep_fp32` selects, with all that they contain, and the buffers that it names."""
    if isinstance(keep_fp32, Keep):
        keep_fp32 = (keep_fp32,)
    if not isinstance(keep_fp32, Iterable):
        raise TypeError(f"keep_fp32 must contain types, name patterns and modules, got {keep_fp32!r}")
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
                    f"keep_fp32: {keep!r} matches no name of a module or buffer; see model.named_modules() and "
                    "model.named_buffers()"
                )
            kept_buffers += buffers
        elif isinstance(keep, nn.Module):
            found = [module for _, module in named if module is keep]
            if not found:
                raise ValueError(f"keep_fp32: this module is not in the model: {keep}")
        else:
            raise TypeError(f"keep_fp32 must contain types, name patterns and modules, got {keep!r}")
        for module in found:
            kept.update(_inside(module))
    for _, module in named:
        # MultiheadAttention reads out_proj's weight without a call of out_proj, so both have one dtype.
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in kept:
            kept.update(module.modules())
    return kept, kept_buffers


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and all that it contains; of a list or dict of modules, which is never called, the items."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for item in module.children():
            yield from _inside(item)
    else:
        yield from module.modules()


def _fp32_tensors(model: nn.Module, kept: set[nn.Module]) -> dict[int, Tensor]:
    """Returns the parameters, gradients and buffers of kept modules by id.

    Raises:
        ValueError: A parameter cannot be cast, or is in a kept module and in another one.
    """
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
    """A forward pre-hook that casts the arguments of its module.

    Args:
        module: The module.
        dtype: The dtype to cast to.
        names: The arguments of the module's `forward` to cast; None casts all.
    """

    def __init__(self, module: nn.Module, dtype: WorkingDtype, names: frozenset[str] | None = None) -> None:
        self.dtype = dtype
        self.names = names
        if names is not None:
            arguments = inspect.signature(module.forward).parameters.values()
            self.positional = [
                a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)
            ]
            self.rest = next((a.name for a in arguments if a.kind is a.VAR_POSITIONAL), "")
        # Pickled as well: a process that loads the model must not use the hook's key for another hook.
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

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
    """A forward hook that casts the outputs of its module.

    Args:
        module: The module.
        dtype: The dtype to cast to; None casts nothing.
        is_whole: True for the whole model, where an error about integer images gets a line of advice.
    """

    def __init__(
        self, module: nn.Module, dtype: Surroundings | torch.dtype | None, is_whole: bool = False
    ) -> None:
        self.dtype: Surroundings | TensorDtype | torch.dtype | None = dtype
        self.handle = module.register_forward_hook(self, with_kwargs=True, always_call=is_whole)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if output is None and not torch.compiler.is_compiling():
            _explain_integers(sys.exc_info()[1], (args, kwargs))
        dtype = self.dtype
        if isinstance(dtype, Surroundings | TensorDtype):
            dtype = dtype.now(module)
        return None if dtype is None else cast_nested(output, dtype, {})


def _explain_integers(error: BaseException | None, inputs: Any) -> None:
    """Adds advice to the error of a forward pass whose input is images in integers."""
    if error is None or [type(arg) for arg in error.args] != [str]:
        return
    try:
        leaves = leaves_of(inputs)
    except RecursionError:  # an input contains itself
        return
    if not any(isinstance(x, Tensor) and x.dtype is torch.uint8 and x.dim() >= 3 for x in leaves):
        return
    advice = (
        "The input has torch.uint8 tensors, and cast_model casts floating-point tensors only: for images write "
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
