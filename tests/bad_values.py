"""Values that no number of a kind may have: what `tests/arguments/*.py` are made of."""

import math

LONG = ["x" * 50] * 1000  # whatever is refused, the message fits a screen
NO_NUMBER = [math.nan, math.inf, -math.inf, "3", None, True, [1], LONG, "x" * 1000]

COUNT = [*NO_NUMBER, 0, -1, 2.5]  # whole, at least 1
POSITIVE = [*NO_NUMBER, 0, -1]
NOT_NEGATIVE = [*NO_NUMBER, -1]
NOT_NEGATIVE_COUNT = [*NO_NUMBER, -1, 2.5]
SEED = [*NO_NUMBER, -1, 0.5, 2**64]
COUNTS = [[value] for value in COUNT] + [5, "88", None]  # several of them


def or_none(values: list) -> list:
    """The same for a parameter that may be None."""
    return [value for value in values if value is not None]
