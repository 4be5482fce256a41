"""The host-time tricks of the CPU backend, and the changes that switch each of them off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from benchmarks.lib.variants import Edit
from fused_tricks import FusedSGD, extension
from fused_tricks.backends import compiled


@dataclass(frozen=True)
class Trick:
    """A host-time trick and the changes that switch it off.

    Attributes:
        name: The name in the table.
        where: The code of the trick.
        goes: The change of torch that would make the trick obsolete.
        edits: Edits of the C++ source.
        without: Functions of torch that the extension does not receive.
        patches: Values for attributes of the package, by object and attribute.
        optimizer: The class of the optimizer.
    """

    name: str
    where: str = ""
    goes: str = ""
    edits: tuple[Edit, ...] = ()
    without: tuple[str, ...] = ()
    patches: tuple[tuple[Any, str, Any], ...] = ()
    optimizer: type[FusedSGD] = FusedSGD


class _Wrapped(FusedSGD):
    """A FusedSGD with torch's wrapper around each step: hooks and a profiler range."""

    step = Optimizer.profile_hook_step(FusedSGD.step)
    step.hooked = True  # type: ignore[attr-defined]  # torch must not wrap the step twice


LEFT_OUT = (
    Edit("cpu/step.cpp", "if (request.scans()) {", "if (request.scans() && total_count_ <= kSmall) {"),
    Edit(
        "cpu/step.cpp",
        "\n  update(plan, request);",
        "\n  if (total_count_ <= kSmall) update(plan, request);",
    ),
)
"""Edits that leave the passes over memory out for large models."""

IS_NEGATIVE = "_ZN2at6native6is_negERKNS_6TensorE"


def _attribute(name: str, getter: str) -> Edit:
    """Returns the edit that reads a tensor's attribute by Python's look-up."""
    look_up = (
        f'PyObject_GetAttr(tensor, [] {{ static PyObject* const name = PyUnicode_InternFromString("{name}"); '
        "return name; }())"
    )
    return Edit(
        "python/tensors.cpp",
        f'torch_api.{getter}(tensor, nullptr) : PyObject_GetAttrString(tensor, "{name}")',
        f"{look_up} : {look_up}",
    )


TRICKS = (
    Trick(
        "torch's C functions and symbol is_neg, instead of DLPack and the method Tensor.is_neg",
        "csrc/python/torch_shim.cpp",
        "a DLPack exchange as fast as these functions",
        without=tuple(name for name in extension._STABLE_FUNCTIONS if name != "torch_parallel_for"),
    ),
    Trick(
        "the handle inside a tensor's object, instead of a new handle for each tensor",
        "offset_of_handle in csrc/python/torch_shim.cpp",
        "a stable function that borrows a handle",
        edits=(
            Edit(
                "python/torch_shim.h",
                "return reinterpret_cast<const char*>(tensor) + torch_api.handle_offset;",
                "static void* handle = nullptr;\n  if (handle != nullptr) torch_api.shim.delete_handle(handle);\n"
                "  torch_api.shim.from_object(tensor, &handle);\n  return handle;",
            ),
        ),
    ),
    Trick(
        "only torch's symbol is_neg, instead of the method Tensor.is_neg",
        "learn_negative in csrc/python/torch_shim.cpp",
        "a stable function for the negative bit",
        without=(IS_NEGATIVE,),
    ),
    Trick(
        "the getters of .grad and ._version, instead of Python's attribute look-up",
        "getter_of in csrc/python/torch_shim.cpp",
        "stable functions for both",
        edits=(_attribute("grad", "grad"), _attribute("_version", "version")),
    ),
    Trick(
        "only the address of a state tensor is read",
        "is_at in csrc/python/tensors.cpp",
        "an optimizer.state that reports changes",
        edits=(
            Edit(
                "python/tensors.cpp",
                "if (has_handle(tensor) && torch_api.shim.data(handle_of(tensor), &data) == 0) {",
                "if (false) {",
            ),
        ),
    ),
    Trick(
        "one walk through a parameter's state, instead of two look-ups",
        "has_state in csrc/python/plan_guard.cpp",
        "an optimizer.state that reports changes",
        edits=(
            Edit(
                "python/plan_guard.cpp",
                "  if (PyDict_Check(state)) {\n    PyObject *key",
                "  if (false) {\n    PyObject *key",
            ),
        ),
    ),
    Trick(
        "predicted version counters, instead of counters read after each update",
        "Counter::step in csrc/python/plan_guard.cpp",
        "an increment_version that returns the versions",
        edits=(Edit("python/plan_guard.cpp", "if (!same) counter.step =", "counter.step ="),),
    ),
    Trick(
        "the list for increment_version is kept between steps",
        "updated_ in csrc/python/plan_guard.cpp",
        "a stable function that increments one version",
        edits=(Edit("python/plan_guard.cpp", "if (!same) {\n    updated_", "{\n    updated_"),),
    ),
    Trick(
        "a second owner of each state tensor in C++",
        "_owner_of in fused_tricks/backends/compiled.py",
        "reading state and aliases without their Python objects",
        patches=((compiled, "_owner_of", lambda tensor: tensor),),
    ),
    Trick(
        "hooks only if there are any, instead of torch's wrapper around each step",
        "has_step_hooks in fused_tricks/_torch.py",
        "a cheaper Optimizer.profile_hook_step",
        optimizer=_Wrapped,
    ),
)
