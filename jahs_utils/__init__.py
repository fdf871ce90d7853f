"""The shared package of the book on joint architecture and hyperparameter search (JAHS).

What is a chapter's subject lives in the chapter; this package holds what several chapters share:
data on the device, the training engine, networks, recorded experiments, claims and plots.
"""

from jahs_utils.device import keep_allocator_pages

keep_allocator_pages()  # before the first large tensor: see jahs_utils.device

from jahs_utils.chapters import load_chapter  # noqa: E402
from jahs_utils.data import load  # noqa: E402
from jahs_utils.experiments import Experiment, grid, read_results  # noqa: E402
from jahs_utils.train import evaluate, fit, seed_everything  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Experiment",
    "evaluate",
    "fit",
    "grid",
    "load",
    "load_chapter",
    "read_results",
    "seed_everything",
]
