"""The shared package of the book on joint architecture and hyperparameter search (JAHS).

What is a chapter's subject lives in the chapter; this package holds what several chapters share:
data on the device, the training engine, networks, recorded experiments, claims and plots.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Names that `from jahs_utils import ...` knows, and their modules. They are imported when first
# asked for: torch takes seconds, and the command line should not wait for it to report a typo.
_HOMES = {
    "Experiment": "experiments",
    "evaluate": "train",
    "fit": "train",
    "grid": "experiments",
    "load": "data",
    "load_chapter": "chapters",
    "read_results": "experiments",
}
__all__ = sorted(_HOMES)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def keep_allocator_pages() -> None:
    """Tell glibc to keep freed pages; does nothing on other C libraries.

    By default every activation above 32 MB is mapped anew and returned to the kernel, step after
    step, and the page faults are a measurable part of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


keep_allocator_pages()
