"""Compiles the kernels and launches them past Triton's dispatch, which finds out anew what is known here."""

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

# One warp a program, and what keeps every architecture within its budget of registers. Without fusion ptxas contracts
# no multiplication with an addition.
OPTIONS = {"num_warps": 1, "maxnreg": 64, "enable_fp_fusion": False}

# Numbers of groups that a launch carries in its arguments; more are read from a table.
MAX_GROUPS = 8
# Words that one launch of write_kernel writes.
WORDS = 128

_GROUP = tuple(WORD_TYPES.values())
_SCALE_RULE = tuple({float: "fp64", int: "i32"}[kind] for kind in get_type_hints(ScaleRule).values())
_RULES = {"max_norm": "fp64", "in_double": "i32", "is_dynamic": "i32", "scale_rule": _SCALE_RULE}
_REQUEST = {"state": "i64", "unscales": "i32", "grad_scale": "i64", "found_inf": "i64"}


def kind_bits(kinds: Iterable[int]) -> int:
    """Returns a bit for each kind of elements."""
    return sum(1 << kind for kind in {*kinds})


def pair_bits(pairs: Iterable[tuple[int, int]]) -> int:
    """Returns a bit for each pair of the kinds of a parameter and of its gradient."""
    return kind_bits(kind * KINDS + grad_kind for kind, grad_kind in pairs)


def scan_source(grad_kinds: int, wants_norm: bool, shard_classes: int) -> ASTSource:
    """The scan for gradients of these kinds (`kind_bits`), with or without the norm.

    `shard_classes`: the sums of squares that it writes for a reduction; 0: it decides by itself.
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
    """The decision by itself, after a reduction over processes."""
    signature = {**_REQUEST, "partials": "i64", **_RULES}
    return ASTSource(decide_kernel, signature, {"WANTS_NORM": wants_norm, "SHARD_CLASSES": shard_classes})


def update_source(kinds: int, group_count: int) -> ASTSource:
    """The update for these pairs of kinds (`pair_bits`), and this many groups in the arguments; 0: in a table."""
    signature = {
        "chunks": "i64",
        "tensors": "i64",
        "grads": "i64",
        "chunk_count": "i32",
        **_REQUEST,
        "is_scanned": "i32",
        "groups": (_GROUP,) * group_count if group_count else "i64",
    }
    return ASTSource(update_kernel, signature, {"KINDS": kinds, "GROUPS": group_count})


def write_source() -> ASTSource:
    """The kernel that fills a table."""
    signature = {"table": "i64", "begin": "i32", "count": "i32", "words": ("i64",) * WORDS}
    return ASTSource(write_kernel, signature, {"WORDS": WORDS})


def compile_for(source: ASTSource, target: GPUTarget) -> CompiledKernel:
    """Compiles; no GPU is needed."""
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
        device: Where.
        source: One of the functions above.
        constants: Its arguments.
        blocks: How many programs.
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
    """Makes ready for a launch, so that nothing but the launch itself can fail then; the arguments are launch()'s."""
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
    """A kernel is loaded into one device: the one that is current now."""
    return compile_for(_source(source, constants), triton.runtime.driver.active.get_current_target())


@functools.cache
def _launcher(
    index: int, source: Callable[..., ASTSource], constants: tuple[Any, ...], blocks: int
) -> Callable[..., None]:
    launcher: Callable[..., None] = _compiled(index, source, constants)[(blocks, 1, 1)]
    return launcher
