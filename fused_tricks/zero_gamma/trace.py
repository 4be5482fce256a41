"""The dry run: one forward pass of a copy of a model, which records its autograd graph."""

import copy
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .._torch import ConvBase, NormBase, clear_backward_hooks
from .autograd_graph import leaf_tensor

# By the number of dimensions. The first size is the usual one; the rest is for networks that take a single size.
_SPATIAL_SIZES = {1: ((1024,),), 2: ((224, 224), (256, 256), (384, 384), (32, 32)), 3: ((16, 112, 112),)}


@dataclass(frozen=True)
class DryRun:
    """The autograd graph of one forward pass.

    Attributes:
        roots: The nodes of the model's outputs.
        inputs: The nodes of the differentiable input tensors.
        additions: Nodes that are additions under another name.
        originals: The model's own parameter for each parameter of the copy, by the copy's id.
        keep_alive: The copy, held because nodes do not own their parameters.
    """

    roots: list[Node]
    inputs: list[Node]
    additions: list[Node]
    originals: dict[int, nn.Parameter]
    keep_alive: nn.Module

    def original(self, leaf: Node) -> Tensor:
        """Returns the model's own parameter for a leaf of the graph."""
        tensor = leaf_tensor(leaf)
        return self.originals.get(id(tensor), tensor)


def dry_run(model: nn.Module, example_inputs: Any) -> DryRun:
    """Runs a copy of `model` once and returns the graph; the model and the random states do not change.

    The copy is on the `meta` device, which computes no values. If this run fails and the caller passed
    `example_inputs`, a copy on the model's own device runs on them. In the copy, every parameter is trainable and every
    module is in eval mode, where nothing is random and running statistics are not updated. If eval mode fails, training
    mode follows.

    Args:
        model: The model.
        example_inputs: As in `zero_gamma_`; `None` for default inputs.

    Raises:
        RuntimeError: Every attempt failed, or returned no tensor that depends on a parameter.
    """
    if example_inputs is None:
        attempts = [(inputs, _to_meta) for inputs in _default_inputs(model)]
    else:
        attempts = [(example_inputs, _to_meta), (example_inputs, _clone)]
    failures: list[tuple[Any, Exception]] = []
    for inputs, duplicate in attempts:
        for training in (False, True):
            try:
                return _run_copy(model, inputs, duplicate, training)
            except Exception as error:
                failures.append((inputs, error))
    # Report the attempt in eval mode, on the likeliest default input or on the caller's values.
    inputs, failure = failures[0 if example_inputs is None else -2]
    on = "example_inputs"
    hint = "they must be inputs of the model, on its device"
    if example_inputs is None:
        on = f"{inputs.dtype} of shape {tuple(inputs.shape)} on the meta device"
        hint = "pass example_inputs: inputs of the model, on its device"
    raise RuntimeError(
        f"a copy of the model could not run on {on}; {hint}. {type(failure).__name__}: {failure}"
    ) from failure


def _default_inputs(model: nn.Module) -> list[Tensor]:
    """Returns batches of two in the usual shapes for a model with this first layer, the likeliest first."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    conv = next((m for m in model.modules() if isinstance(m, ConvBase)), None)
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    shapes: list[tuple[int, ...]] = []
    if conv is not None:
        shapes += [(conv.in_channels, *size) for size in _SPATIAL_SIZES[len(conv.kernel_size)]]
    elif linear is not None:
        shapes += [(linear.in_features,)]
    # The first module of a model is not always its first layer.
    shapes += [(3, *size) for size in _SPATIAL_SIZES[2]]
    return [torch.empty(2, *shape, dtype=dtype, device="meta") for shape in dict.fromkeys(shapes)]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _run_copy(
    model: nn.Module, example_inputs: Any, duplicate: Callable[[Tensor], Tensor], training: bool
) -> DryRun:
    entries: list[Tensor] = []

    def duplicate_input(tensor: Tensor) -> Tensor:
        twin = duplicate(tensor)
        if _differentiable(twin):
            # A model may write to its inputs in place, which autograd does not allow for a leaf.
            twin = twin.requires_grad_().clone()
            entries.append(twin)
        return twin

    with _isolated(model):
        twins = {
            param: nn.Parameter(twin := duplicate(param), _differentiable(twin))
            for param in model.parameters()
        }
        with _Duplicating(duplicate):
            copied = _copy_module(model, {id(param): twin for param, twin in twins.items()})
        for module in copied.modules():
            # Models override train(). Norms stay in eval mode, because batch statistics refuse a batch of one.
            module.training = training and not isinstance(module, NormBase)
            # Backward hooks would add nodes of their own to the graph.
            clear_backward_hooks(module)
        with _Duplicating(duplicate_input):
            arguments = copy.deepcopy(example_inputs)
        inputs = _nodes(entries)
        with _ViewAdditions() as additions:
            if isinstance(arguments, tuple):
                output = copied(*arguments)
            elif isinstance(arguments, Mapping):
                output = copied(**arguments)
            else:
                output = copied(arguments)
        roots = _nodes(_tensors_in(output))
    if not roots:
        raise RuntimeError("it returned no tensor that depends on a parameter")
    originals = {id(twin): param for param, twin in twins.items()}
    return DryRun(roots, inputs, additions.nodes, originals, copied)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _nodes(tensors: Iterable[Tensor]) -> list[Node]:
    """Returns the nodes of `tensors`; tensors without history have none."""
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in the containers and attributes of `value`, each once."""
    seen: dict[int, Any] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif not isinstance(item, type | types.ModuleType | types.FunctionType):
            stack.extend(getattr(item, "__dict__", {}).values())


class _Duplicating(TorchFunctionMode):
    """A mode in which `copy.deepcopy` copies tensors with `duplicate`; parameters are copied beforehand."""

    def __init__(self, duplicate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.duplicate = duplicate

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.duplicate(tensor)
        return memo[id(tensor)]


def _copy_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Returns a deep copy without data-parallel wrappers, which would communicate or check their devices."""
    for module in reversed(list(model.modules())):  # inner wrappers first, for the memo of the outer ones
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            memo[id(module)] = copy.deepcopy(module.module, memo)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


class _ViewAdditions(TorchFunctionMode):
    """A mode that records in-place additions to a view of a whole tensor, whose nodes are named `CopySlices`.

    Attributes:
        nodes: The recorded nodes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.add_, Tensor.__iadd__) and torch.is_grad_enabled() and result._is_view():
            base = result._base
            if base.grad_fn is not None and base.numel() == result.numel():
                self.nodes.append(base.grad_fn)
        return result


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """Records gradients, runs everything eagerly, and restores the random states afterwards."""
    gpus = {param.device.index for param in model.parameters() if param.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # also enables gradients
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_checkpoints_recorded())
        yield


@contextmanager
def _checkpoints_recorded() -> Iterator[None]:
    """Replaces reentrant checkpoints, which run their function without gradients, by direct calls of the function."""
    function = checkpoint.CheckpointFunction
    function.apply = staticmethod(lambda run, preserve_rng_state, *args: run(*args))
    try:
        yield
    finally:
        del function.apply  # restores the inherited torch.autograd.Function.apply
