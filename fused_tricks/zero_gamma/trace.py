"""One forward pass of a copy of a model, which returns the autograd graph."""

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

# By the number of dimensions, the usual size first. The other sizes are for networks that accept only one size.
_SPATIAL_SIZES = {1: ((1024,),), 2: ((224, 224), (256, 256), (384, 384), (32, 32)), 3: ((16, 112, 112),)}


@dataclass(frozen=True)
class DryRun:
    """The result of one forward pass.

    Attributes:
        roots: The nodes of the tensors in the output.
        inputs: The nodes of the floating-point and complex tensors in the input.
        additions: The additions whose nodes have another name.
        originals: The parameters of the model, by the `id` of their copy.
        keep_alive: The copy of the model. Nodes do not own the parameters that they refer to.
    """

    roots: list[Node]
    inputs: list[Node]
    additions: list[Node]
    originals: dict[int, nn.Parameter]
    keep_alive: nn.Module

    def original(self, leaf: Node) -> Tensor:
        """Returns the parameter whose copy `leaf` represents, or else the tensor of `leaf`."""
        tensor = leaf_tensor(leaf)
        return self.originals.get(id(tensor), tensor)


def dry_run(model: nn.Module, example_inputs: Any) -> DryRun:
    """Runs a copy of `model` once and returns the graph. The model and the random states stay unchanged.

    The copy is on the `meta` device, where nothing is computed. If all attempts on `meta` fail and `example_inputs` are
    given, a copy on the model's device runs on the given values. Every floating-point or complex parameter of the copy
    is trainable. The copy first runs in eval mode, where modules neither draw random numbers nor update running
    statistics. If eval mode fails, all modules except batch and instance norms run in training mode.

    Raises:
        RuntimeError: No attempt succeeded, or no attempt returned a tensor that depends on a parameter.
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
    # The most useful failure: in eval mode, on the likeliest default input or on the given values.
    inputs, failure = failures[0 if example_inputs is None else -2]
    on = "example_inputs"
    hint = "example_inputs must be arguments that the model accepts, on its device"
    if example_inputs is None:
        on = f"{inputs.dtype} of shape {tuple(inputs.shape)} on the meta device"
        hint = "pass example_inputs that the model accepts, on its device"
    raise RuntimeError(
        f"a copy of the model could not run on {on}; {hint}. {type(failure).__name__}: {failure}"
    ) from failure


def _default_inputs(model: nn.Module) -> list[Tensor]:
    """Returns batches of two inputs that models with this first layer usually accept, the likeliest first."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    conv = next((m for m in model.modules() if isinstance(m, ConvBase)), None)
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    shapes: list[tuple[int, ...]] = []
    if conv is not None:
        shapes += [(conv.in_channels, *size) for size in _SPATIAL_SIZES[len(conv.kernel_size)]]
    elif linear is not None:
        shapes += [(linear.in_features,)]
    # The module registered first is not the first to run in every model.
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
            twin = twin.requires_grad_().clone()  # a leaf cannot be written in place
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
            # Not train(), which models override. Norms stay in eval mode: batch statistics require more than one value.
            module.training = training and not isinstance(module, NormBase)
            # Backward hooks would add nodes to the graph.
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
    """Returns the nodes of the `tensors` that have one."""
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
    """A mode in which `copy.deepcopy` copies tensors by `duplicate`, except parameters."""

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
    """Returns a deep copy without data-parallel wrappers, which would communicate or require certain devices."""
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            memo[id(module)] = copy.deepcopy(module.module, memo)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


class _ViewAdditions(TorchFunctionMode):
    """A mode that records in-place additions to a view of a whole tensor, whose nodes are named `CopySlices`."""

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
    """Records gradients and runs everything eagerly. Restores the random states on exit."""
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
    """Makes reentrant checkpoints, which run without gradients, call their function directly."""
    function = checkpoint.CheckpointFunction
    function.apply = staticmethod(lambda run, preserve_rng_state, *args: run(*args))
    try:
        yield
    finally:
        del function.apply  # restores the method inherited from torch.autograd.Function
