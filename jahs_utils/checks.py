"""Checks of arguments, with errors that name the value, the choices and the way out."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable

PROFILES = ("quick", "standard", "paper")


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
    if not (isinstance(value, numbers.Real) and 0 < value < float("inf")):
        raise ValueError(f"{what} must be a finite number above 0, got {value!r}")
    return value


def whole(value: int, what: str, least: int = 1, most: float = float("inf")) -> int:
    """Return `value` if it is a whole number in these bounds; otherwise raise a ValueError."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (integer and least <= value <= most):
        bounds = f"of at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {bounds}, got {value!r}")
    return value
