"""Compilation and launch of the kernels.

The launch bypasses Triton's dispatch, which specialises the arguments anew at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ..._torch import current_raw_stream
from ...loss_scale import ScaleRule
from . import IS_INTERPRETED
from .groups import WORD_TYPES
from .records import KINDS, write_kernel
from .scan import decide_kernel, scan_kernel
from .update import update_kernel

# Each program is one warp of at most 64 registers a thread. FP fusion would contract a multiplication and an addition
# into an fma, which changes roundings.
OPTIONS = {"num_warps": 1, "maxnreg": 64, "enable_fp_fusion": False}

# The largest number of groups in the arguments of a launch. More groups are read from a table.
MAX_GROUPS = 8
# The number of words that one launch of write_kernel writes.
WORDS = 128

_GROUP = tuple(WORD_TYPES.values())
_SCALE_RULE = tuple({float: "fp64", int: "i32"}[kind] for kind in get_type_hints(ScaleRule).values())
_RULES = {"max_norm": "fp64", "in_double": "i32", "is_dynamic": "i32", "scale_rule": _SCALE_RULE}
_REQUEST = {"state": "i64", "unscales": "i32", "grad_scale": "i64", "found_inf": "i64"}


def kind_bits(kinds: Iterable[int]) -> int:
    """Returns the set of kinds of elements as bits."""
    return sum(1 << kind for kind in {*kinds})


def pair_bits(pairs: Iterable[tuple[int, int]]) -> int:
    """Returns the set of pairs (kind of a parameter, kind of its gradient) as bits."""
    return kind_bits(kind * KINDS + grad_kind for kind, grad_kind in pairs)


def scan_source(grad_kinds: int, wants_norm: bool, shard_classes: int) -> ASTSource:
    """Returns the source of the scan kernel.

    Args:
        grad_kinds: The kinds of gradients, from `kind_bits`.
        wants_norm: True to sum the squares.
        shard_classes: The number of sums of squares that the scan writes for a reduction; 0 to decide in the scan.
    """
    signature = {
        "chunks": "i64",
        "tensors": "i64",
        "grads": "i64",
        "chunk_count": "i32",
        **_REQUEST,
        "partial_squares": "i64",
        "partials": "i64",
        **_RULES,
    }
    return ASTSource(
        scan_kernel,
        signature,
        {"GRAD_KINDS": grad_kinds, "WANTS_NORM": wants_norm, "SHARD_CLASSES": shard_classes},
    )


def decide_source(wants_norm: bool, shard_classes: int) -> ASTSource:
    """Returns the source of the kernel that decides after a reduction over processes."""
    signature = {**_REQUEST, "partials": "i64", **_RULES}
    return ASTSource(decide_kernel, signature, {"WANTS_NORM": wants_norm, "SHARD_CLASSES": shard_classes})


def update_source(kinds: int, group_count: int, averages: bool) -> ASTSource:
    """Returns the source of the update kernel.

    Args:
        kinds: The pairs of kinds of parameters and gradients, from `pair_bits`.
        group_count: The number of groups in the arguments; 0 for groups in a table.
        averages: True if a group has an average of the weights.
    """
    signature = {
        "chunks": "i64",
        "tensors": "i64",
        "grads": "i64",
        "chunk_count": "i32",
        **_REQUEST,
        "is_scanned": "i32",
        "groups": (_GROUP,) * group_count if group_count else "i64",
    }
    return ASTSource(update_kernel, signature, {"KINDS": kinds, "GROUPS": group_count, "AVERAGES": averages})


def write_source() -> ASTSource:
    """Returns the source of the kernel that fills a table."""
    signature = {"table": "i64", "begin": "i32", "count": "i32", "words": ("i64",) * WORDS}
    return ASTSource(write_kernel, signature, {"WORDS": WORDS})


def compile_for(source: ASTSource, target: GPUTarget) -> CompiledKernel:
    """Returns the compiled kernel. Compilation requires no GPU."""
    return triton.compile(source, target=target, options=OPTIONS)


def launch(
    device: torch.device,
    source: Callable[..., ASTSource],
    constants: tuple[Any, ...],
    blocks: int,
    *args: Any,
) -> None:
    """Runs a kernel on the device's current stream.

    Args:
        device: The device.
        source: A function of this module that returns the source of a kernel.
        constants: The arguments of `source`.
        blocks: The number of programs.
        *args: The kernel's arguments, in the order of its signature.
    """
    if IS_INTERPRETED:
        made = _source(source, constants)
        made.fn[(blocks,)](*args, **{made.fn.arg_names[at]: value for (at,), value in made.constants.items()})
    elif torch.cuda.current_device() == device.index:
        _launcher(device.index, source, constants, blocks)(*args, stream=_stream(device.index))
    else:
        with torch.cuda.device(device):
            _launcher(device.index, source, constants, blocks)(*args, stream=_stream(device.index))


def load(
    device: torch.device, source: Callable[..., ASTSource], constants: tuple[Any, ...], blocks: int
) -> None:
    """Compiles and loads a kernel, so that only the launch itself can fail later. Takes the arguments of `launch`."""
    if not IS_INTERPRETED:
        with torch.cuda.device(device):
            _launcher(device.index, source, constants, blocks)


def _stream(index: int) -> int:
    return current_raw_stream(index)


@functools.cache
def _source(source: Callable[..., ASTSource], constants: tuple[Any, ...]) -> ASTSource:
    return source(*constants)


@functools.cache
def _compiled(index: int, source: Callable[..., ASTSource], constants: tuple[Any, ...]) -> CompiledKernel:
    """Returns a compiled kernel, cached for each device because a kernel is loaded into the current device."""
    return compile_for(_source(source, constants), triton.runtime.driver.active.get_current_target())


@functools.cache
def _launcher(
    index: int, source: Callable[..., ASTSource], constants: tuple[Any, ...], blocks: int
) -> Callable[..., None]:
    launcher: Callable[..., None] = _compiled(index, source, constants)[(blocks, 1, 1)]
    return launcher
