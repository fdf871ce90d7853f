"""Image sets that live whole on the device: uint8 pixels, int64 labels, nothing read per batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jahs_utils import data_files
from jahs_utils.checks import number, one_of, whole
from jahs_utils.data_files import Arrays, DataError, check_shapes
from jahs_utils.device import pick_device

MAX_SEED = 2**32 - 1  # of scikit-learn's splits

DATASETS: dict[str, Callable[[], Arrays]] = {
    "fashion_mnist": data_files.fashion_mnist,
    "fashion_mnist_mini": data_files.fashion_mnist_mini,
    "cifar10": functools.partial(data_files.cifar, "cifar10"),
    "cifar100": functools.partial(data_files.cifar, "cifar100"),
    "stl10": data_files.stl10,
    "digits": data_files.digits,
}


def data_set(read: Callable[[], Arrays]) -> Callable[[], Arrays]:
    """Decorator: let `load` know a set that a chapter reads itself, by the function's name."""
    DATASETS[read.__name__] = read
    return read


@dataclasses.dataclass(frozen=True)
class ImageData:
    """An image classification set on one device.

    Images are uint8 (n, channels, height, width), labels int64 (n,). `mean` and `std` are per
    channel, of all official training images, in units of 0 to 255; parts of a set keep them.
    `checksum` is the SHA-256 (16 hex digits) of the set as loaded; `source` says which copy it is.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    checksum: str
    source: str
    mean: Tensor
    std: Tensor

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train_images.shape[1:])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images to float32 with mean 0 and standard deviation 1 per channel."""
        shape = (1, -1, 1, 1)
        return (images.float() - self.mean.view(shape)) / self.std.view(shape)

    def subset(self, n: int, seed: int = 0) -> ImageData:
        """The same set with `n` training images, class shares kept; the test images stay."""
        images, classes = len(self.train_labels), len(self.classes)
        if whole(n, "subset", classes, images) == images:
            return self
        whole(n, f"subset, unless it is all {images} images,", classes, images - classes)
        return self._restrict(self._stratified(n, seed)[0])

    def hold_out(self, n: int, seed: int = 0) -> ImageData:
        """Set `n` training images aside: they become the `test` part of the set returned."""
        images, classes = len(self.train_labels), len(self.classes)
        whole(n, "the number of images to hold out", classes, images - classes)
        return self._restrict(*self._stratified(images - n, seed))

    def folds(self, k: int = 5, seed: int = 0) -> list[ImageData]:
        """Stratified `k`-fold splits of the training images; `test` is the fold left out."""
        from sklearn.model_selection import StratifiedKFold

        labels = self.train_labels.cpu().numpy()
        most = np.unique(labels, return_counts=True)[1].min()  # each fold has every class
        whole(k, "k, at most the images of the rarest class,", 2, most)
        split = StratifiedKFold(k, shuffle=True, random_state=whole(seed, "seed", 0, MAX_SEED))
        return [self._restrict(train, held) for train, held in split.split(labels, labels)]

    def _stratified(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.model_selection import train_test_split

        whole(seed, "seed", 0, MAX_SEED)
        labels = self.train_labels.cpu().numpy()
        everything = np.arange(len(labels))
        first, rest = train_test_split(everything, train_size=n, stratify=labels, random_state=seed)
        return np.sort(first), np.sort(rest)

    def _restrict(self, train: np.ndarray, held: np.ndarray | None = None) -> ImageData:
        keep = torch.as_tensor(train, device=self.device)
        parts = {
            "train_images": self.train_images[keep],
            "train_labels": self.train_labels[keep],
        }
        if held is not None:
            kept = torch.as_tensor(held, device=self.device)
            parts["test_images"] = self.train_images[kept]
            parts["test_labels"] = self.train_labels[kept]
        return dataclasses.replace(self, **parts)


def load(name: str, *, device: str | torch.device = "auto", subset: int | None = None) -> ImageData:
    """Load a whole data set onto the device, as uint8.

    name: one of `DATASETS`. subset: number of training images to keep, class shares kept.
    Looks in `$JAHS_DATA`, the cache folder, the system's data folder, then downloads.
    Raises DataError, which names the file that is wrong or says how to get the set.
    """
    data = _load(one_of(name, DATASETS, "data set"), pick_device(device))
    return data if subset is None else data.subset(subset)


@functools.lru_cache(maxsize=3)
def _load(name: str, device: torch.device) -> ImageData:
    try:
        arrays = DATASETS[name]()
    except OSError as error:  # another user's file, say
        raise DataError(
            f"cannot read {error.filename or name} ({error.strerror or error}): make it readable, "
            "or name other folders in JAHS_DATA and JAHS_CACHE"
        ) from None
    check_shapes(name, arrays)
    digest = hashlib.sha256()
    for array in arrays[:4]:
        digest.update(np.ascontiguousarray(array).data)
    tensors = [torch.from_numpy(array).to(device) for array in arrays[:4]]
    mean, std = channel_statistics(tensors[0])
    classes, source = tuple(arrays.classes), arrays.source
    return ImageData(name, *tensors, classes, digest.hexdigest()[:16], source, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 images (n, c, h, w), float32 (c,).

    The deviation of a constant channel is given as 1.
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64, device="cpu")
    square = torch.zeros_like(total)
    for part in images.split(5000):  # integer sums are exact; pieces keep the memory small
        part = part.to(torch.int32)
        total += part.sum((0, 2, 3)).cpu()
        square += part.square().sum((0, 2, 3)).cpu()
    count = images.numel() // images.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1  # a channel that is constant in training must not blow up a test image
    return mean.float().to(images.device), std.float().to(images.device)


# --- augmentation, on the device, on whole batches ------------------------------------------------


def augment(images: Tensor, crop: int = 4, flip: bool = True, cutout: int = 0) -> Tensor:
    """Random shifts, flips and cutout, drawn per image on the images' device.

    images: uint8 or float (n, c, h, w). crop: largest shift in pixels (zeros move in). cutout:
    side of a square set to zero around a random pixel (DeVries and Taylor 2017).
    """
    whole(crop, "crop", 0)
    whole(cutout, "cutout", 0)
    n, _, height, width = images.shape
    device = images.device
    if crop:
        padded = F.pad(images, (crop, crop, crop, crop))
        shift = torch.randint(0, 2 * crop + 1, (2, n, 1), device=device)
        rows = shift[0] + torch.arange(height, device=device)
        columns = shift[1] + torch.arange(width, device=device)
        picked = torch.arange(n, device=device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]]
        images = moved.permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if cutout:
        rows = torch.arange(height, device=device) - torch.randint(height, (n, 1), device=device)
        columns = torch.arange(width, device=device) - torch.randint(width, (n, 1), device=device)
        low, high = -(cutout // 2), cutout - cutout // 2
        hidden_rows, hidden_columns = [(low <= d) & (d < high) for d in (rows, columns)]
        hidden = (hidden_rows[:, :, None] & hidden_columns[:, None, :])[:, None]
        images = images.masked_fill(hidden, 0)
    return images


def mixup(images: Tensor, labels: Tensor, alpha: float, classes: int) -> tuple[Tensor, Tensor]:
    """Convex mixtures of random pairs (Zhang et al. 2018), one coefficient per batch.

    images: float (n, c, h, w); labels: int64 (n,). Returns mixed images and soft labels
    (n, classes). alpha: parameter of the symmetric Beta distribution; 0 mixes nothing.
    """
    number(alpha, "mixup's alpha", 0)
    targets = F.one_hot(labels, whole(classes, "classes")).to(images.dtype)
    if alpha == 0:
        return images, targets
    concentration = torch.full((), float(alpha), device=images.device)
    share = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
    partner = torch.randperm(len(labels), device=images.device)
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
