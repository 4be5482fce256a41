"""`python -m fuzz`, in the folder tests: random histories for a given time, and a script of the first failure."""

from __future__ import annotations

import argparse
import time
import warnings

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from support import backends

from .machine import histories_of


def main() -> None:
    """Runs histories on each backend in turn until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="how long, at least one round (default: 60)"
    )
    parser.add_argument("--backend", action="append", help="default: every backend that is usable here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    usable = [
        name for name in backends.NAMES if name != "reference" and backends.unusable_because(name) is None
    ]
    names = arguments.backend or usable
    began, rounds = time.monotonic(), 0
    while rounds == 0 or time.monotonic() - began < arguments.seconds:
        for name in names:
            run_state_machine_as_test(
                histories_of(name),
                settings=settings(
                    max_examples=25,
                    stateful_step_count=30,
                    database=None,
                    deadline=None,
                    print_blob=False,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        rounds += 1
        print(f"{rounds * 25} histories on each of {', '.join(names)}: no difference", flush=True)


if __name__ == "__main__":
    main()
