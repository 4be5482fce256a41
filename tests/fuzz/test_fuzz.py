"""A bounded number of random histories; `make fuzz` runs as many as it has time for."""

from __future__ import annotations

import pytest

from support import backends

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

from .machine import histories_of  # noqa: E402

# Interpreted kernels take longer.
EXAMPLES = {"cpu": 60, "emulated_cuda": 60, "triton": 15, "cuda": 60}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_random_histories_are_the_references_bit_for_bit(name: str) -> None:
    reason = backends.unusable_because(name)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    run_state_machine_as_test(
        histories_of(name),
        settings=settings(
            max_examples=EXAMPLES[name],
            stateful_step_count=12,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
