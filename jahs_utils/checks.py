"""Checks of arguments, with one-line errors: the value, the choices and the way out."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import reprlib
import textwrap
from collections.abc import Iterable
from pathlib import Path

__all__ = ["number", "one_of", "positive", "whole"]

PROFILES = ("quick", "standard", "gpu", "paper")
SCREEN = 200  # characters of a message


def shown(value: object) -> str:
    """`value` on one line of at most 40 characters, whatever it is."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def one_of(value: object, choices: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a one-line ValueError."""
    names = list(choices)
    if isinstance(value, str) and value in names:
        return str(value)
    close = difflib.get_close_matches(str(value)[:SCREEN], names, n=1)
    hint = f" (did you mean {shown(close[0])}?)" if close else ""
    start = f"unknown {what} {shown(value)}{hint}: choose one of "
    listed = ", ".join(names) or "none"
    width = max(20, SCREEN - len(start))
    raise ValueError(start + textwrap.shorten(listed, width, placeholder=" ..."))


def positive(value: float, what: str) -> float:
    """Return `value` if it is a finite number above zero; otherwise raise a ValueError."""
    if not (_is(numbers.Real, value) and 0 < value < math.inf):
        raise ValueError(f"{what} must be a finite number above 0, got {shown(value)}")
    return value


def whole(value: int, what: str, least: int = 1, most: float = math.inf) -> int:
    """Return `value` if it is a whole number in these bounds; otherwise raise a ValueError."""
    if not (_is(numbers.Integral, value) and least <= value <= most):
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {bounds}, got {shown(value)}")
    return value


def number(value: float, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Return `value` if it is a finite number in these bounds; otherwise raise a ValueError."""
    if not (_is(numbers.Real, value) and math.isfinite(value) and least <= value <= most):
        low, high = math.isfinite(least), math.isfinite(most)
        bounds = f" from {least} to {most}" if low and high else f" of at least {least}" * low
        bounds = bounds or f" of at most {most}" * high
        raise ValueError(f"{what} must be a finite number{bounds}, got {shown(value)}")
    return value


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def named_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, or None; it need not exist.

    `~` is the user's folder. What is relative counts from the working folder of the first call:
    from then on the variable holds the absolute path, also for notebooks and worker processes.
    """
    named = os.environ.get(variable)
    if not named:
        return None
    folder = Path(os.path.expanduser(named)).absolute()
    if os.path.expanduser(named).startswith("~"):
        raise ValueError(f"{variable} names {shown(named)}: there is no such home folder")
    os.environ[variable] = str(folder)
    return folder


def writable_folder(folder: Path) -> Path:
    """Make a folder in the cache; a ValueError names JAHS_CACHE where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}): name another folder in JAHS_CACHE"
        ) from None
    return folder
