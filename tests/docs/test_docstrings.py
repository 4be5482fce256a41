"""The examples in the docstrings of public names and of their methods run."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest

import fused_tricks


def documented() -> Iterator[tuple[str, str]]:
    """Yields public names, and the methods that the package defines for them, with their docstrings."""
    for name in fused_tricks.__all__:
        value = getattr(fused_tricks, name)
        yield name, inspect.getdoc(value) or ""
        if isinstance(value, type):
            for base in value.__mro__:
                if base.__module__.startswith("fused_tricks"):
                    for member in vars(base):
                        yield f"{name}.{member}", inspect.getdoc(getattr(value, member)) or ""


EXAMPLES = {
    f"{name}-{index}": textwrap.dedent(code)
    for name, text in documented()
    for index, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S))
}


@pytest.mark.parametrize("name", fused_tricks.__all__)
def test_a_public_name_has_an_example(name: str) -> None:
    assert f"{name}-0" in EXAMPLES


def test_examples_of_methods_are_found() -> None:
    assert "FusedSGD.find_overflow-0" in EXAMPLES
    assert "FusedSGD.state_dict-0" in EXAMPLES


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_runs_as_it_stands(code: str) -> None:
    exec(compile(code, "docstring", "exec"), {})
