"""Two sets that are fetched by hand and only read here: ImageNet32x32, and ModelNet10 as voxels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jahs_utils.data_files import Arrays, DataError, data_roots

IMAGENET32_FOLDERS = ["Imagenet32_train_npz", "Imagenet32_val_npz"]
MODELNET10_CLASSES = (
    "bathtub bed chair desk dresser monitor night_stand sofa table toilet".split()  # noqa: SIM905
)
GRID = 32  # voxels along a side
STEP = 0.5  # largest distance, in voxels, between the points that stand for a triangle
TIE = 1e-6  # a point this close to the border of two voxels is in the upper: rounding is not seen


def _find(name: str, folders: list[str], archives: str, site: str) -> Path:
    """The first data root that holds one of `folders`."""
    for root in data_roots():
        if any((root / folder).is_dir() for folder in folders):
            return root
    wanted, searched = " and ".join(folders), ", ".join(map(str, data_roots()))
    raise DataError(
        f"cannot get {name!r}: no {wanted} in {searched}, and this set is never downloaded. "
        f"Get {archives} from {site} and unpack to {wanted} in a folder that JAHS_DATA names"
    )


def _unreadable(path: Path, error: Exception, archive: str) -> DataError:
    reason = " ".join(str(error).split())[:160]
    return DataError(f"{path} cannot be read ({reason}): unpack {archive} again")


# --- ImageNet32x32 -------------------------------------------------------------------------------


def imagenet32() -> Arrays:
    """ImageNet's 1000 classes at 32x32 pixels (Chrabaszcz et al. 2017), from the npz variant.

    Images (n, 3, 32, 32); the official validation images are the test part. The files name no
    classes: label k is "class k+1" in the authors' order, which is not that of sorted WordNet ids.
    The set takes 4 GB, twice that while it is read. Raises DataError, which names the wrong file.
    """
    archives, site = "Imagenet32_{train,val}_npz.zip", "https://image-net.org/download-images.php"
    root = _find("imagenet32", IMAGENET32_FOLDERS, archives, site)
    train, val = (root / folder for folder in IMAGENET32_FOLDERS)
    batches = [_read_batch(train / f"train_data_batch_{k}.npz") for k in range(1, 11)]
    images, labels = (np.concatenate(part) for part in zip(*batches))
    classes = [f"class {k}" for k in range(1, 1001)]
    return Arrays(images, labels, *_read_batch(val / "val_data.npz"), classes, "npz files")


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,), from 0, of one npz file."""
    if not path.exists():
        raise DataError(f"{path} is missing: unpack {path.parent.name}.zip again")
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["data"], file["labels"]
    except Exception as error:  # zipfile and zlib raise errors of their own
        raise _unreadable(path, error, f"{path.parent.name}.zip") from None
    n = len(pixels) if pixels.ndim else 0
    if not n or pixels.dtype != np.uint8 or pixels.shape != (n, 3072):
        raise DataError(f"{path}: data is {pixels.dtype} {pixels.shape}, not uint8 (n, 3072)")
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, not integers ({n},)")
    for label in (labels.min(), labels.max()):
        if not 1 <= label <= 1000:
            raise DataError(f"{path}: label {label} is not from 1 to 1000")
    return pixels.reshape(n, 3, 32, 32), labels.astype(np.int64) - 1


# --- ModelNet10 ----------------------------------------------------------------------------------


def modelnet10() -> Arrays:
    """ModelNet10 (Wu et al. 2015): meshes of ten kinds of furniture, as occupancy of 32^3 voxels.

    Images (n, 32, 32, 32), 255 where a voxel meets the mesh's surface: channel k is the slice at
    height k of the upright object, rows are y, columns are x. Deviation from Brock et al. 2017:
    the book's networks convolve over rows and columns, so height becomes channels. A load
    voxelizes all 4899 meshes, for minutes. Raises DataError, which names the wrong file.
    """
    site = "https://modelnet.cs.princeton.edu"
    root = _find("modelnet10", ["ModelNet10"], "ModelNet10.zip", site)
    parts = []
    for part in ("train", "test"):
        grids, labels = [], []
        for label, name in enumerate(MODELNET10_CLASSES):
            folder = root / "ModelNet10" / name / part
            paths = sorted(folder.glob(f"{name}_*.off"))
            if not paths:
                raise DataError(f"{folder} has no {name}_*.off: unpack ModelNet10.zip again")
            grids += [_read_voxels(path) for path in paths]
            labels += [label] * len(paths)
        parts += [np.stack(grids), np.array(labels, dtype=np.int64)]
    return Arrays(*parts, list(MODELNET10_CLASSES), "OFF files, surface voxels")


def _read_voxels(path: Path) -> np.ndarray:
    try:
        return voxelize(read_off(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "ModelNet10.zip") from None


def read_off(path: Path) -> np.ndarray:
    """Triangles (n, 3, 3) of an OFF file, corner by (x, y, z); a face of more corners is a fan.

    Reads headers "OFF" with the counts on the next line, and with the counts right behind it
    ("OFF490 518 0", a defect of many of ModelNet's files). Raises ValueError for another text.
    """
    text = re.sub("#.*", "", path.read_text(encoding="utf-8", errors="replace"))
    header = re.match(r"\s*OFF\s*(\d+)\s+(\d+).*", text)
    if header is None:
        raise ValueError("it does not start with OFF and the counts of vertices and faces")
    n_vertices, n_faces = map(int, header.groups())
    lines = [line for line in text[header.end() :].splitlines() if line.strip()]
    if not n_vertices or not n_faces:
        raise ValueError(f"it is empty: {n_vertices} vertices, {n_faces} faces")
    if len(lines) < n_vertices + n_faces:
        raise ValueError(f"it is truncated: {len(lines)} lines for {n_vertices} + {n_faces}")
    vertices = np.loadtxt(lines[:n_vertices], usecols=(0, 1, 2), ndmin=2)
    if not np.isfinite(vertices).all():
        raise ValueError("a vertex is not finite")
    triangles = []
    for line in lines[n_vertices : n_vertices + n_faces]:
        count, *words = line.split()  # colours may follow the corners
        corners = [int(word) for word in words[: int(count)]]
        if len(corners) != int(count):
            raise ValueError(f"face {line.strip()!r} does not have {count} corners")
        if corners and not 0 <= min(corners) <= max(corners) < n_vertices:
            raise ValueError(f"face {line.strip()!r} is not of vertices 0 to {n_vertices - 1}")
        triangles += [(corners[0], a, b) for a, b in zip(corners[1:], corners[2:])]
    if not triangles:
        raise ValueError("no face has three corners or more")
    return vertices[triangles]


def voxelize(triangles: np.ndarray) -> np.ndarray:
    """Voxels that meet a surface: uint8 (GRID, GRID, GRID) by z, y, x, 255 there and 0 elsewhere.

    triangles: (n, 3, 3), corners by (x, y, z) in any unit. The bounding box is centred and scaled,
    all axes alike, until its longest side runs from the middle of voxel 1 to that of GRID - 2.
    The triangles are sampled at most STEP apart, so the shell is closed: of two neighbours whose
    middles lie on both sides of the surface, at least one is 255. Raises ValueError where all
    corners are one point.
    """
    low, high = triangles.min((0, 1)), triangles.max((0, 1))
    side = (high - low).max()
    if not side > 0:
        raise ValueError("its faces have no extent: all corners are one point")
    placed = (triangles - (low + high) / 2) * ((GRID - 3) / side) + (GRID - 1) / 2
    edges = np.linalg.norm(placed - np.roll(placed, 1, axis=1), axis=2).max(1)
    pieces = np.ceil(edges / STEP).clip(1).astype(int)
    voxels = np.zeros((GRID, GRID, GRID), np.uint8)
    for k in np.unique(pieces):  # triangles cut alike share their barycentric coordinates
        a, b = np.nonzero(np.tri(k + 1, dtype=bool)[::-1])
        weights = np.stack([a, b, k - a - b], axis=1) / k
        alike = placed[pieces == k]
        for some in np.array_split(alike, 1 + len(alike) * len(weights) // 1_000_000):
            points = (weights @ some).reshape(-1, 3)
            x, y, z = np.floor(points + (0.5 + TIE)).astype(int).T
            voxels[z, y, x] = 255
    return voxels
