"""How long a state machine runs: the same examples each time in CI, new ones in the long suite."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def quick(examples: int, steps: int) -> Any:
    """For CI, which must not fail on one day and pass on another."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=_SLOW,
    )


def long(examples: int, steps: int) -> Any:
    """For the long suite, which is to find what nobody thought of."""
    return settings(quick(examples, steps), derandomize=False)
