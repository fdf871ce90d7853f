"""Progress in terminals and notebooks that leaves nothing behind in stored outputs."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class ProgressBar:
    """A bar over `total` units of work, emptied at the end; `update` takes the amount done so far.

    With `JAHS_PROGRESS=0`, and where output is neither a terminal's nor a notebook's, nothing is
    shown: runs by papermill, nbval and in logs stay clean.
    """

    def __init__(self, total: float, label: str) -> None:
        self._total, self._label, self._shown = total, label, time.monotonic()
        self._in_terminal, self._in_notebook = False, None
        if os.environ.get("JAHS_PROGRESS") != "0":
            if _in_kernel():
                from IPython.display import display

                self._in_notebook = display({"text/plain": label}, raw=True, display_id=True)
            else:
                self._in_terminal = sys.stderr.isatty()

    def update(self, done: float, note: str = "") -> None:
        """Show `done` of the total; redraws at most five times a second."""
        now = time.monotonic()
        if now - self._shown >= 0.2:
            self._shown, share = now, min(done / self._total, 1.0)
            bar = "#" * round(30 * share)
            self._draw(f"{self._label} {share:4.0%} |{bar:.<30}| {note}")

    def _draw(self, text: str) -> None:
        if self._in_notebook is not None:
            self._in_notebook.update({"text/plain": text} if text else {}, raw=True)
        if self._in_terminal:
            print(f"\r\033[K{text[:79]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._draw("")


def _in_kernel() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None
