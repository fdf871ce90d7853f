"""Where image sets come from: their files are looked for, fetched once, verified and read."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from PIL import Image

from jahs_utils.checks import named_folder, writable_folder
from jahs_utils.device import cache_folder

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
FASHION_FOLDER = "FashionMNIST/raw"


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


def check_shapes(name: str, arrays: Arrays) -> None:
    for part in ("train", "test"):
        images, labels = getattr(arrays, f"{part}_images"), getattr(arrays, f"{part}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{name}: {part} images {images.dtype} {images.shape} and labels {labels.shape} "
                f"do not fit together (from {arrays.source})"
            )
        if labels.min() < 0 or labels.max() >= len(arrays.classes):
            raise DataError(f"{name}: {part} labels outside 0..{len(arrays.classes) - 1}")


# --- files, looked for and fetched ----------------------------------------------------------------


def data_roots() -> list[Path]:
    """Folders that are searched for data sets, in order: `$JAHS_DATA`, then the cache."""
    named = named_folder("JAHS_DATA")
    return ([named] if named else []) + [cache_folder() / "data"]


def _official_files(
    name: str, folder: str, files: dict[str, str], get: Callable[[Path], object], other_way: str
) -> Path:
    """The data root with the set's `files` (name -> checksum) in `folder`, all of them verified.

    Where no root has any of them, one process downloads them (`get` fills a root) while others
    wait for it; the folder appears when it is complete.
    """
    if (root := _root_with(folder, files)) is None:
        root = data_roots()[-1]
        try:
            with filelock.FileLock(writable_folder(root) / f"{name}.lock"):
                if _root_with(folder, files) is None:
                    _download(root, folder, root / f"{name}.part", get)
        except (OSError, RuntimeError, ValueError) as error:
            searched = ", ".join(str(place) for place in [*data_roots(), SYSTEM_FOLDER])
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"cannot get {name!r}: not in {searched}, and the download failed ({reason}). Ways "
                f"to get it: load it once with a network; or put {folder}/ with the official files "
                f"in a folder that JAHS_DATA names; or {other_way}"
            ) from None
    for file, expected in files.items():
        path = root / folder / file
        if not path.exists():
            raise DataError(f"{path} is missing: delete {path.parent} and load the set again")
        _verify(path, path.read_bytes(), expected)
    return root


def _download(root: Path, folder: str, draft: Path, get: Callable[[Path], object]) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # of a download that was killed
    try:
        draft.mkdir()
        get(draft)
        (root / folder).parent.mkdir(exist_ok=True)
        os.replace(draft / folder, root / folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _root_with(folder: str, files: Iterable[str]) -> Path | None:
    roots = data_roots()
    return next((r for r in roots if any((r / folder / file).exists() for file in files)), None)


def _verify(path: Path, content: bytes, expected: str) -> None:
    algorithm = "md5" if len(expected) == 32 else "sha256"
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or not the official file ({len(content)} bytes, {algorithm} "
            f"{found[:12]}..., expected {expected[:12]}...): delete it and load the set again"
        )


# --- Fashion-MNIST -------------------------------------------------------------------------------


# torchvision and scikit-learn are imported where they are used: each takes as long as torch, and
# worker processes and notebooks start often.


def fashion_mnist() -> Arrays:
    """The complete set: idx files as torchvision keeps them, or packed ones in a flat folder."""
    from torchvision.datasets import FashionMNIST

    places = [place for root in data_roots() for place in (root, root / FASHION_FOLDER)]
    if _root_with(FASHION_FOLDER, FASHION_FILES) is None:
        for folder in [*places, SYSTEM_FOLDER / "fashion-mnist"]:
            if any((folder / f"{name}.gz").exists() for name in FASHION_FILES):
                return _read_packed_fashion(folder)
    other_way = "install Debian's package dataset-fashion-mnist (fashion_mnist_mini needs nothing)"
    get = functools.partial(FashionMNIST, download=True)
    root = _official_files("fashion_mnist", FASHION_FOLDER, FASHION_FILES, get, other_way)
    return _read_fashion(root / FASHION_FOLDER)


def _read_packed_fashion(folder: Path) -> Arrays:
    with tempfile.TemporaryDirectory() as unpacked:
        for name, expected in FASHION_FILES.items():
            path = folder / f"{name}.gz"
            if not path.exists():
                raise DataError(f"{path} is missing: the set has four files, {folder} has fewer")
            try:
                content = gzip.decompress(path.read_bytes())
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(
                    f"{path} is damaged ({error}): delete it and load the set again"
                ) from None
            _verify(path, content, expected)
            (Path(unpacked) / name).write_bytes(content)
        return _read_fashion(Path(unpacked))


def _read_fashion(folder: Path) -> Arrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    # Not through FashionMNIST(root): it prefers an old `processed` folder to these files.
    train_images, train_labels, test_images, test_labels = (
        read(str(folder / name)).numpy()
        for name, read in zip(FASHION_FILES, [read_image_file, read_label_file] * 2)
    )
    parts = (train_images[:, None], train_labels, test_images[:, None], test_labels)
    return Arrays(*parts, list(FASHION_CLASSES), "official idx files")


def fashion_mnist_mini() -> Arrays:
    """600 training and 200 test images of each class, inside this package."""
    packed = resources.files("jahs_utils").joinpath("fashion_mnist_mini.npz").read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        parts = [arrays[k] for k in ("train_images", "train_labels", "test_images", "test_labels")]
    return Arrays(*parts, list(FASHION_CLASSES), "shipped part of the official files")


# --- CIFAR, STL-10, digits -----------------------------------------------------------------------


def cifar(name: str) -> Arrays:
    """CIFAR-10 or CIFAR-100, from the official files or a JPEG copy of CIFAR-10."""
    from torchvision.datasets import CIFAR10, CIFAR100

    loader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    meta = (loader.meta["filename"], loader.meta["md5"])
    files = dict([*loader.train_list, *loader.test_list, meta])
    other_way = "use cifar10 or fashion_mnist instead"
    if name == "cifar10":
        copies = [root / JPEG_COPY for root in data_roots() if (root / JPEG_COPY).exists()]
        if copies and _root_with(loader.base_folder, files) is None:
            return _read_jpeg_copy(copies[0])
        other_way = "run `jahs data import cifar10_jpeg.npz` where you have the JPEG copy"
    get = functools.partial(loader, download=True)
    root = _official_files(name, loader.base_folder, files, get, other_way)
    # torchvision unpickles these files: only official ones
    parts = [loader(root, train=train) for train in (True, False)]
    pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts]
    return _official_arrays(pairs, parts[0].classes)


def _official_arrays(pairs: list[tuple[np.ndarray, Any]], classes: list[str]) -> Arrays:
    """Images and labels of both parts, as they are kept."""
    kept = [(np.ascontiguousarray(x), np.asarray(y, dtype=np.int64)) for x, y in pairs]
    return Arrays(*kept[0], *kept[1], list(classes), "official files")


@functools.cache
def _labelled_stl10() -> Any:
    """torchvision's STL10 without the check, 2.8 GB long, of its unlabelled images."""
    from torchvision.datasets import STL10

    return type("LabelledSTL10", (STL10,), {"train_list": STL10.train_list[:2]})


def stl10() -> Arrays:
    """STL-10's labelled images."""
    loader = _labelled_stl10()
    files = dict([*loader.train_list, *loader.test_list])
    get = functools.partial(loader, download=True)
    root = _official_files("stl10", loader.base_folder, files, get, "use cifar10 instead")
    parts = [loader(root, split=split) for split in ("train", "test")]
    return _official_arrays([(part.data, part.labels) for part in parts], STL10_CLASSES)


def digits() -> Arrays:
    """scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images * 15).astype(np.uint8)[:, None]  # 0..16 grey levels to 0..240
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    parts = (images[train], labels[train], images[test], labels[test])
    return Arrays(*parts, [str(k) for k in range(10)], "scikit-learn's load_digits")


# --- CIFAR-10 as a JPEG copy ---------------------------------------------------------------------


def import_cifar10_copy(path: str | Path) -> Path:
    """Copy a JPEG copy of CIFAR-10 into the cache, where `load("cifar10")` finds it.

    path: an .npz with `jpeg` (uint8, all files end to end), `offsets` (int64, images + 1),
    `labels` and `n_train`. Every image is decoded once as a check.
    Raises DataError when it is not such a file.
    """
    path = Path(path).expanduser()
    check_shapes("cifar10", _read_jpeg_copy(path))
    target = writable_folder(data_roots()[-1]) / JPEG_COPY
    draft = target.with_suffix(f".{uuid.uuid4().hex}")
    shutil.copyfile(path, draft)
    os.replace(draft, target)
    return target


def _read_jpeg_copy(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            stream, offsets = file["jpeg"], file["offsets"].astype(np.int64)
            labels, n_train = file["labels"].astype(np.int64), int(file["n_train"])
    except Exception as error:  # zipfile and zlib raise errors of their own
        raise DataError(f"{path} is not a JPEG copy of CIFAR-10, or damaged ({error})") from None
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
