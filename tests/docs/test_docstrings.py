"""The examples in the docstrings of public names run."""

from __future__ import annotations

import inspect
import re
import textwrap

import pytest

import fused_tricks

EXAMPLES = {
    f"{name}-{index}": textwrap.dedent(code)
    for name in fused_tricks.__all__
    for index, code in enumerate(
        re.findall(
            r"^ *```python\n(.*?)^ *```$", inspect.getdoc(getattr(fused_tricks, name)) or "", re.M | re.S
        )
    )
}


@pytest.mark.parametrize("name", fused_tricks.__all__)
def test_a_public_name_has_an_example(name: str) -> None:
    if name == "StepStats":
        pytest.skip("FusedSGD.stats() returns it, and nobody makes one")
    assert f"{name}-0" in EXAMPLES


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_runs_as_it_stands(code: str) -> None:
    exec(compile(code, "docstring", "exec"), {})
