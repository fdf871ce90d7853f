"""What tests by properties share: how many examples, and seeds."""

from hypothesis import settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def few(examples: int) -> settings:
    """Settings of a property whose examples take longer than usual."""
    return settings(max_examples=examples, deadline=None)
