"""Checks of arguments, with errors that name the value, the choices and the way out."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable

__all__ = ["number", "one_of", "positive", "whole"]

PROFILES = ("quick", "standard", "gpu", "paper")


def one_of(value: object, choices: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a one-line ValueError."""
    names = list(choices)
    if value in names:
        return str(value)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {what} {value!r}{hint}: choose one of {', '.join(names) or 'none'}")


def positive(value: float, what: str) -> float:
    """Return `value` if it is a finite number above zero; otherwise raise a ValueError."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and 0 < value < math.inf):
        raise ValueError(f"{what} must be a finite number above 0, got {value!r}")
    return value


def whole(value: int, what: str, least: int = 1, most: float = math.inf) -> int:
    """Return `value` if it is a whole number in these bounds; otherwise raise a ValueError."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (integer and least <= value <= most):
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {bounds}, got {value!r}")
    return value


def number(value: float, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Return `value` if it is a finite number in these bounds; otherwise raise a ValueError."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and least <= value <= most):
        low, high = math.isfinite(least), math.isfinite(most)
        bounds = f" from {least} to {most}" if low and high else f" of at least {least}" * low
        bounds = bounds or f" of at most {most}" * high
        raise ValueError(f"{what} must be a finite number{bounds}, got {value!r}")
    return value
