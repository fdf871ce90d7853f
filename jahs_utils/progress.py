"""Progress in terminals and notebooks that leaves nothing behind in stored outputs."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any


class ProgressBar:
    """A bar over `total` units of work; `update` takes the amount done so far.

    A terminal gets a tqdm line that is cleared at the end; a notebook gets one display that is
    emptied at the end. With `JAHS_PROGRESS=0`, and where output is not a terminal, nothing is
    shown: runs by papermill, nbval and in logs stay clean.
    """

    def __init__(self, total: float, label: str) -> None:
        self.total, self.label = total, label
        self._bar: Any = None
        self._display = None
        self._shown = time.monotonic()
        if os.environ.get("JAHS_PROGRESS") == "0":
            return
        if "ipykernel" in sys.modules and _in_kernel():
            from IPython.display import display

            self._display = display({"text/plain": label}, raw=True, display_id=True)
        elif sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=total, desc=label, leave=False, bar_format=layout)

    def update(self, done: float, note: str = "") -> None:
        """Show `done` of `total`; redraws at most five times a second."""
        if self._bar is None and self._display is None:
            return
        now = time.monotonic()
        if now - self._shown < 0.2:
            return
        self._shown = now
        text = f"{self.label} {note}".strip()
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = min(done, self.total)
            self._bar.refresh()
        else:
            share = min(done / self.total, 1.0)
            line = f"{text} {share:4.0%} " + "#" * round(30 * share) + "." * round(30 * (1 - share))
            self._display.update({"text/plain": line}, raw=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._display is not None:
            self._display.update({}, raw=True)


def _in_kernel() -> bool:
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None
