"""A fixed number of random histories. `make fuzz` runs histories for a given time."""

from __future__ import annotations

import pytest

from support import backends

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

from .machine import histories_of  # noqa: E402

pytestmark = pytest.mark.slow

# Interpreted kernels take longer.
EXAMPLES = {"cpu": 60, "emulated_cuda": 60, "triton": 12, backends.WITHOUT_EXTENSION: 6, "cuda": 60}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backend", "examples"), sorted(EXAMPLES.items()), indirect=["backend"], ids=lambda value: str(value)
)
def test_random_histories_are_the_references_bit_for_bit(backend: str, examples: int) -> None:
    run_state_machine_as_test(
        histories_of(backend),
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
