"""Make jahs_utils/fashion_mnist_mini.npz from the official Fashion-MNIST files.

The first 600 training and 200 test images of each class, in the official order.
Usage: python tools/make_fashion_mnist_mini.py [OUT.npz]
"""

import sys
from pathlib import Path

import numpy as np

from jahs_utils.data import load

DEFAULT = Path(__file__).parents[1] / "jahs_utils" / "fashion_mnist_mini.npz"


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices, in order, of the first `count` entries of every class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)]))


def make(out: Path) -> None:
    data = load("fashion_mnist", device="cpu")
    arrays = {}
    for part, count in (("train", 600), ("test", 200)):
        images = getattr(data, f"{part}_images").numpy()
        labels = getattr(data, f"{part}_labels").numpy()
        keep = first_of_each_class(labels, count)
        arrays |= {f"{part}_images": images[keep], f"{part}_labels": labels[keep]}
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
