"""Parameters and gradients of the fuzzer, made from short descriptions, so that a history can be printed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
SHAPES = ((), (0,), (1,), (3,), (17,), (65,), (5, 7), (4, 3, 2), (2, 3, 3, 3), (300,), (33, 41))
LAYOUTS = ("dense", "transposed", "channels_last", "gaps", "view")
STORAGES = ("apart", "side by side", "in turns")
GRADIENTS = (
    "dense",
    "fp32",
    "fp16",
    "bf16",
    "other strides",
    "gaps",
    "view",
    "zero",
    "none",
    "infinite",
    "nan",
    "negated view",
)
ROUTES = (
    "no_grad",
    "new data",
    "data in place",
    "numpy",
    "load",
    "dlpack",
    "storage",
    "parameter of the same tensor",
    "parameter of its data",
)


class Described(NamedTuple):
    """A parameter: its dtype, shape and layout by name, and the seed of its values."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = "dense"
    seed: int = 0


def values(shape: tuple[int, ...], seed: int, exact: bool = False) -> Tensor:
    """Returns FP64 values over four decades. With `exact`, multiples of 1/8, whose squares add up without rounding."""
    generator = torch.Generator().manual_seed(seed)
    if exact:
        return torch.randint(-8, 9, shape, generator=generator).double() / 8
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return normal * 10 ** (4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3)


def laid_out(dense: Tensor, layout: str) -> Tensor:
    """Returns the same values with other strides, if the shape allows other strides."""
    if layout == "transposed" and dense.dim() >= 2:
        return dense.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and dense.dim() == 4:
        return dense.contiguous(memory_format=torch.channels_last)
    if layout == "gaps" and dense.dim() >= 1:
        return torch.stack([dense, dense + 1], dim=-1)[..., 0]
    if layout == "view":
        return torch.cat([dense.new_ones(3), dense.flatten(), dense.new_ones(2)])[3:-2].view(dense.shape)
    return dense


def parameters(described: list[Described], storage: str) -> list[Parameter]:
    """Makes parameters.

    Args:
        described: One description for each parameter.
        storage: One of the `STORAGES`. "apart" gives each parameter a storage and its own layout. Otherwise the
            parameters of one dtype are views into one storage, without overlap: one after the other ("side by side"),
            or as columns of a matrix ("in turns").
    """
    dense = [values(each.shape, each.seed).to(DTYPES[each.dtype]) for each in described]
    if storage == "apart":
        return [Parameter(laid_out(own, each.layout)) for own, each in zip(dense, described, strict=True)]
    made: dict[int, Parameter] = {}
    for dtype in DTYPES.values():
        indices = [index for index, own in enumerate(dense) if own.dtype == dtype]
        if not indices:
            continue
        sizes = [dense[index].numel() for index in indices]
        if storage == "side by side":
            views = torch.empty(sum(sizes), dtype=dtype).split(sizes)
        else:
            columns = torch.empty(max(sizes), len(sizes), dtype=dtype).unbind(1)
            views = tuple(column[:size] for column, size in zip(columns, sizes, strict=True))
        for index, view in zip(indices, views, strict=True):
            made[index] = Parameter(view.view(dense[index].shape).copy_(dense[index]))
    return [made[index] for index in range(len(dense))]


def gradient(param: Tensor, kind: str, seed: int, exact: bool) -> Tensor | None:
    """Makes a gradient of one of the `GRADIENTS` for a parameter. Returns None for `"none"`."""
    if kind == "none":
        return None
    dense = values(tuple(param.shape), seed, exact)
    if kind == "zero":
        dense = dense * 0
    if kind in ("infinite", "nan") and dense.numel():
        dense.view(-1)[seed % dense.numel()] = math.nan if kind == "nan" else math.inf * (-1) ** seed
    low = param.dtype in (torch.float16, torch.bfloat16)
    dtype = param.dtype
    if kind == "fp32" and low:
        dtype = torch.float32
    elif kind in ("fp16", "bf16") and dtype == torch.float32:
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    grad = dense.to(dtype)
    if kind == "other strides":
        return laid_out(grad, "transposed" if param.dim() != 4 else "channels_last")
    if kind in ("gaps", "view"):
        return laid_out(grad, kind)
    if kind == "negated view":
        return torch._neg_view(-grad)
    # Autograd gives a gradient the strides of a dense parameter.
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)


def write(param: Parameter, route: str, seed: int) -> None:
    """Writes new values to about half of a parameter's elements, as user code may do."""
    new = values(tuple(param.shape), seed)
    new = torch.where(new.abs() < 0.1, param.detach(), new.to(param.dtype))
    if route == "new data":
        param.data = new
    elif route == "data in place":
        param.data.copy_(new)
    elif route == "numpy" and param.dtype != torch.bfloat16:
        array: Any = param.detach().numpy()
        array[...] = new.numpy()
    elif route == "load":
        module = torch.nn.Module()
        module.weight = param
        module.load_state_dict({"weight": new})
    elif route == "dlpack":
        torch.from_dlpack(param.detach()).copy_(new)
    elif route == "storage":
        storage = param.untyped_storage()
        written = storage.clone()
        new.new_empty(0).set_(written, param.storage_offset(), param.shape, param.stride()).copy_(new)
        storage.copy_(written)
    else:
        of = {"parameter of the same tensor": param.detach(), "parameter of its data": param.data}
        target = Parameter(of[route]) if route in of else param
        with torch.no_grad():
            target.copy_(new)
