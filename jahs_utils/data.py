"""Image sets that live whole on the device: uint8 pixels, int64 labels, nothing read per batch."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from jahs_utils.checks import one_of
from jahs_utils.device import cache_folder, pick_device

SYSTEM_FOLDER = Path("/usr/share/datasets")
JPEG_COPY = "cifar10_jpeg_copy.npz"

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()  # noqa: SIM905
FASHION_CLASSES = (
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")  # noqa: SIM905
)
# SHA-256 of the four official idx files, unpacked.
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class DataError(ValueError):
    """A data set that cannot be had, or a file of one that is not what it should be."""


class Arrays(NamedTuple):
    """What a loader reads: uint8 images (n, channels, height, width), labels, names, origin."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    source: str


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
        if n == images:
            return self
        if not classes <= n <= images - classes:
            raise ValueError(
                f"subset must be from {classes} to {images - classes}, or all {images}, got {n}"
            )
        return self._restrict(self._stratified(n, seed)[0])

    def hold_out(self, n: int, seed: int = 0) -> ImageData:
        """Set `n` training images aside: they become the `test` part of the set returned."""
        if not len(self.classes) <= n <= len(self.train_labels) - len(self.classes):
            raise ValueError(f"cannot hold out {n} of {len(self.train_labels)} training images")
        return self._restrict(*self._stratified(len(self.train_labels) - n, seed))

    def folds(self, k: int = 5, seed: int = 0) -> list[ImageData]:
        """Stratified `k`-fold splits of the training images; `test` is the fold left out."""
        labels = self.train_labels.cpu().numpy()
        most = np.unique(labels, return_counts=True)[1].min()  # each fold has every class
        if not 2 <= k <= most:
            raise ValueError(f"k must be from 2 to {most} (images of the rarest class), got {k}")
        split = StratifiedKFold(k, shuffle=True, random_state=seed)
        return [self._restrict(train, held) for train, held in split.split(labels, labels)]

    def _stratified(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
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
    Looks in `$JAHS_DATA`, the cache folder, the system's data folder, then downloads (not
    imagenet32 and modelnet10: the error says where they are had).
    Raises DataError, which names the file that is wrong or says how to get the set.
    """
    data = _load(one_of(name, DATASETS, "data set"), pick_device(device))
    return data if subset is None else data.subset(subset)


@functools.lru_cache(maxsize=3)
def _load(name: str, device: torch.device) -> ImageData:
    arrays = DATASETS[name]()
    _check_shapes(name, arrays)
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


def _check_shapes(name: str, arrays: Arrays) -> None:
    for part in ("train", "test"):
        images, labels = getattr(arrays, f"{part}_images"), getattr(arrays, f"{part}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{name}: {part} images {images.dtype} {images.shape} and labels {labels.shape} "
                f"do not fit together (from {arrays.source})"
            )
        if labels.min() < 0 or labels.max() >= len(arrays.classes):
            raise DataError(f"{name}: {part} labels outside 0..{len(arrays.classes) - 1}")


# --- where the files are -------------------------------------------------------------------------


def data_roots() -> list[Path]:
    """Folders that are searched for data sets, in order: `$JAHS_DATA`, then the cache."""
    named = os.environ.get("JAHS_DATA")
    return ([Path(named)] if named else []) + [cache_folder() / "data"]


def _verify(path: Path, content: bytes, expected: str) -> None:
    algorithm = "md5" if len(expected) == 32 else "sha256"
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or not the official file ({len(content)} bytes, {algorithm} "
            f"{found[:12]}..., expected {expected[:12]}...): delete it and load the set again"
        )


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and load the set again") from None


def _no_data(name: str, error: Exception, files: str, extra: str) -> DataError:
    searched = ", ".join(str(root) for root in [*data_roots(), SYSTEM_FOLDER])
    reason = " ".join(str(error).split())[:160]
    return DataError(
        f"cannot get {name!r}: not in {searched}, and the download failed ({reason}). Ways to get "
        f"it: load it once with a network; or put {files} under a folder that JAHS_DATA names; "
        f"or {extra}"
    )


def _fashion_mnist() -> Arrays:
    for root in data_roots():
        raw = root / "FashionMNIST" / "raw"
        if any((raw / name).exists() for name in FASHION_FILES):
            return _read_fashion(root)
    places = [place for root in data_roots() for place in (root, root / "FashionMNIST" / "raw")]
    for folder in [*places, SYSTEM_FOLDER / "fashion-mnist"]:
        if any((folder / f"{name}.gz").exists() for name in FASHION_FILES):
            with _unpacked_fashion(folder) as root:
                return _read_fashion(root)
    root = data_roots()[-1]
    try:
        tv.FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        extra = "install Debian's package dataset-fashion-mnist (fashion_mnist_mini needs nothing)"
        raise _no_data("fashion_mnist", error, "its four official idx files", extra) from None
    return _read_fashion(root)


@contextmanager
def _unpacked_fashion(folder: Path) -> Iterator[Path]:
    """Unpack the four .gz files of `folder` to where torchvision's loader expects them."""
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, expected in FASHION_FILES.items():
            path = folder / f"{name}.gz"
            if not path.exists():
                raise DataError(f"{path} is missing: the set has four files, {folder} has fewer")
            content = _unpack(path)
            _verify(path, content, expected)
            (raw / name).write_bytes(content)
        yield Path(root)


def _read_fashion(root: Path) -> Arrays:
    for name, expected in FASHION_FILES.items():
        path = root / "FashionMNIST" / "raw" / name
        if not path.exists():
            raise DataError(f"{path} is missing: delete {path.parent} and load the set again")
        _verify(path, path.read_bytes(), expected)
    # Not through FashionMNIST(root): it prefers an old `processed` folder to these files.
    train_images, train_labels, test_images, test_labels = (
        read(str(root / "FashionMNIST" / "raw" / name)).numpy()
        for name, read in zip(FASHION_FILES, [read_image_file, read_label_file] * 2)
    )
    return Arrays(
        train_images[:, None],
        train_labels,
        test_images[:, None],
        test_labels,
        list(FASHION_CLASSES),
        "official idx files",
    )


def _fashion_mnist_mini() -> Arrays:
    packed = resources.files("jahs_utils").joinpath("fashion_mnist_mini.npz").read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        parts = [arrays[k] for k in ("train_images", "train_labels", "test_images", "test_labels")]
    return Arrays(*parts, list(FASHION_CLASSES), "shipped part of the official files")


def _cifar(name: str, loader: type[tv.CIFAR10]) -> Arrays:
    def files_under(root: Path) -> list[tuple[Path, str]]:
        folder = root / loader.base_folder
        listed = [
            *loader.train_list,
            *loader.test_list,
            [loader.meta["filename"], loader.meta["md5"]],
        ]
        return [(folder / file, md5) for file, md5 in listed]

    def read(root: Path) -> Arrays:
        train, test = loader(root, train=True), loader(root, train=False)
        images = [np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)]
        labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
        return Arrays(images[0], labels[0], images[1], labels[1], train.classes, "official files")

    if name == "cifar10":
        copies = [root / JPEG_COPY for root in data_roots() if (root / JPEG_COPY).exists()]
    else:
        copies = []
    official = [r for r in data_roots() if any(path.exists() for path, _ in files_under(r))]
    if not official and copies:
        return _read_jpeg_copy(copies[0])
    if not official:
        extra = (
            "run `jahs data import cifar10_jpeg.npz` where you have the JPEG copy"
            if name == "cifar10"
            else "use cifar10 or fashion_mnist instead"
        )
        _download(name, lambda root: loader(root, download=True), f"{loader.base_folder}/", extra)
        official = [data_roots()[-1]]
    _verify_all(files_under(official[0]))  # torchvision unpickles these files: only official ones
    return read(official[0])


class _LabelledSTL10(tv.STL10):
    """STL-10 without the check, 2.8 GB long, of its unlabelled images."""

    train_list = tv.STL10.train_list[:2]


def _stl10() -> Arrays:
    def files_under(root: Path) -> list[tuple[Path, str]]:
        listed = [*_LabelledSTL10.train_list, *_LabelledSTL10.test_list]
        return [(root / tv.STL10.base_folder / file, md5) for file, md5 in listed]

    found = [r for r in data_roots() if any(path.exists() for path, _ in files_under(r))]
    if not found:
        extra = "use cifar10 instead"
        _download("stl10", lambda root: _LabelledSTL10(root, download=True), "stl10_binary/", extra)
        found = [data_roots()[-1]]
    _verify_all(files_under(found[0]))
    parts = [_LabelledSTL10(found[0], split=split) for split in ("train", "test")]
    images = [np.ascontiguousarray(part.data) for part in parts]
    labels = [part.labels.astype(np.int64) for part in parts]
    return Arrays(images[0], labels[0], images[1], labels[1], list(STL10_CLASSES), "official files")


def _digits() -> Arrays:
    bunch = load_digits()
    images = (bunch.images * 15).astype(np.uint8)[:, None]  # 0..16 grey levels to 0..240
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    parts = (images[train], labels[train], images[test], labels[test])
    return Arrays(*parts, [str(k) for k in range(10)], "scikit-learn's load_digits")


def _imagenet32() -> Arrays:
    from jahs_utils.transfer_data import imagenet32  # here: that module imports this one

    return imagenet32()


def _modelnet10() -> Arrays:
    from jahs_utils.transfer_data import modelnet10  # here: that module imports this one

    return modelnet10()


def _verify_all(files: list[tuple[Path, str]]) -> None:
    for path, expected in files:
        if not path.exists():
            raise DataError(f"{path} is missing: delete {path.parent} and load the set again")
        _verify(path, path.read_bytes(), expected)


def _download(name: str, get: Callable[[Path], object], files: str, extra: str) -> None:
    root = data_roots()[-1]
    try:
        root.mkdir(parents=True, exist_ok=True)
        get(root)
    except (OSError, RuntimeError) as error:
        raise _no_data(name, error, files, extra) from None


DATASETS: dict[str, Callable[[], Arrays]] = {
    "fashion_mnist": _fashion_mnist,
    "fashion_mnist_mini": _fashion_mnist_mini,
    "cifar10": lambda: _cifar("cifar10", tv.CIFAR10),
    "cifar100": lambda: _cifar("cifar100", tv.CIFAR100),
    "stl10": _stl10,
    "digits": _digits,
    "imagenet32": _imagenet32,
    "modelnet10": _modelnet10,
}


# --- CIFAR-10 as a JPEG copy ---------------------------------------------------------------------


def import_cifar10_copy(path: str | Path) -> Path:
    """Copy a JPEG copy of CIFAR-10 into the cache, where `load("cifar10")` finds it.

    path: an .npz with `jpeg` (uint8, all files end to end), `offsets` (int64, images + 1),
    `labels` and `n_train`. Every image is decoded once as a check.
    Raises DataError when it is not such a file.
    """
    path = Path(path)
    _check_shapes("cifar10", _read_jpeg_copy(path))
    target = data_roots()[-1] / JPEG_COPY
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".part")
    shutil.copyfile(path, draft)
    os.replace(draft, target)
    return target


def _read_jpeg_copy(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            stream, offsets = file["jpeg"], file["offsets"].astype(np.int64)
            labels, n_train = file["labels"].astype(np.int64), int(file["n_train"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is not a JPEG copy of CIFAR-10 ({error})") from None
    except Exception as error:  # zipfile raises BadZipFile, which is none of the above
        raise DataError(f"{path} is damaged ({error})") from None
    ends_fit = offsets.ndim == 1 and [*offsets[:1], *offsets[-1:]] == [0, len(stream)]
    if not ends_fit or (np.diff(offsets) <= 0).any() or len(labels) != len(offsets) - 1:
        raise DataError(f"{path} is truncated or its offsets are wrong ({len(labels)} labels)")
    if not 0 < n_train < len(labels):
        raise DataError(f"{path}: n_train {n_train} does not fit {len(labels)} images")
    images = np.empty((len(labels), 3, 32, 32), np.uint8)
    for k in range(len(labels)):
        try:
            content = io.BytesIO(stream[offsets[k] : offsets[k + 1]].tobytes())
            picture = Image.open(content, formats=["JPEG"])
            if picture.size != (32, 32):
                raise ValueError(f"{picture.size} pixels")
            images[k] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: image {k} cannot be decoded ({error})") from None
    parts = (images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])
    return Arrays(*parts, list(CIFAR10_CLASSES), "JPEG copy, quality 75")


# --- augmentation, on the device, on whole batches ------------------------------------------------


def augment(images: Tensor, crop: int = 4, flip: bool = True, cutout: int = 0) -> Tensor:
    """Random shifts, flips and cutout, drawn per image on the images' device.

    images: uint8 or float (n, c, h, w). crop: largest shift in pixels (zeros move in). cutout:
    side of a square set to zero around a random pixel (DeVries and Taylor 2017).
    """
    if crop < 0 or cutout < 0:
        raise ValueError(f"crop and cutout must be at least 0, got {crop} and {cutout}")
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
    if alpha < 0:
        raise ValueError(f"mixup alpha must be at least 0, got {alpha}")
    targets = F.one_hot(labels, classes).to(images.dtype)
    if alpha == 0:
        return images, targets
    concentration = torch.full((), float(alpha), device=images.device)
    share = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
    partner = torch.randperm(len(labels), device=images.device)
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
