"""How much is fuzzed: `ELM_FUZZ_EXAMPLES=1000 python -m pytest -m fuzz` draws so many new examples for each test."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings


EXAMPLES = os.environ.get("ELM_FUZZ_EXAMPLES")


def fuzz(few: int) -> Callable:
    """Mark a test as one of these; without the variable it draws `few` examples, the same each time."""
    drawn = settings(
        max_examples=int(EXAMPLES or few),
        deadline=None,
        derandomize=EXAMPLES is None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.fuzz(drawn(test))
