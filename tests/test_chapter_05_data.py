"""ImageNet32x32 and ModelNet10, which chapter 05 reads: small files of their formats."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, optimize

from jahs_utils import load, load_chapter
from jahs_utils.data import channel_statistics
from jahs_utils.data_files import DataError, data_roots

chapter = load_chapter("05_smash")
read_off, voxelize, CLASSES = chapter.read_off, chapter.voxelize, chapter.FURNITURE
TRAIN, VAL = "Imagenet32_train_npz", "Imagenet32_val_npz"


# --- ImageNet32x32 --------------------------------------------------------------------------------


def batch(first_label: int, n: int = 2) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(first_label).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": pixels, "labels": np.arange(first_label, first_label + n)}


def write_imagenet(root: Path) -> list[dict[str, np.ndarray]]:
    """Ten training batches of two images and a validation file of three, as they are unpacked."""
    batches = [batch(first) for first in (1, 999, *range(10, 18))] + [batch(500, 3)]
    (root / TRAIN).mkdir()
    (root / VAL).mkdir()
    for k, arrays in enumerate(batches[:10], 1):
        mean = np.full(3072, 120.0)
        np.savez(root / TRAIN / f"train_data_batch_{k}.npz", **arrays, mean=mean)
    np.savez(root / VAL / "val_data.npz", **batches[10])
    return batches


@pytest.fixture
def imagenet_folder(data_folder):
    write_imagenet(data_folder)
    return data_folder


def test_the_first_1024_values_are_red_and_run_along_rows(data_folder):
    batches = write_imagenet(data_folder)
    row = np.zeros(3072, np.uint8)
    row[[5, 1024 + 2 * 32 + 7, 2048 + 31 * 32 + 31]] = 10, 20, 30
    changed = batches[0] | {"data": np.stack([row, row])}
    np.savez(data_folder / TRAIN / "train_data_batch_1.npz", **changed)
    image = load("imagenet32", device="cpu").train_images[0]
    lit = {(*place, int(image[tuple(place)])) for place in image.nonzero().tolist()}
    assert lit == {(0, 0, 5, 10), (1, 2, 7, 20), (2, 31, 31, 30)}


def test_batches_follow_each_other_from_1_to_10_and_validation_is_the_test_part(data_folder):
    batches = write_imagenet(data_folder)
    data = load("imagenet32", device="cpu")
    pixels = np.concatenate([arrays["data"] for arrays in batches[:10]])
    assert np.array_equal(data.train_images.numpy().reshape(20, 3072), pixels)
    assert np.array_equal(data.test_images.numpy().reshape(3, 3072), batches[10]["data"])


def test_labels_from_1_become_labels_from_0(imagenet_folder):
    data = load("imagenet32", device="cpu")
    assert data.train_labels[:6].tolist() == [0, 1, 998, 999, 9, 10]
    assert data.test_labels.tolist() == [499, 500, 501]
    assert [data.classes[0], data.classes[999], len(data.classes)] == [
        "class 1",
        "class 1000",
        1000,
    ]


WRONG_BATCHES = {
    "pixels that are not bytes": ({"data": np.zeros((2, 3072), np.int64)}, "data is int64"),
    "pixels of another size": ({"data": np.zeros((2, 3 * 16 * 16), np.uint8)}, r"data is .*768"),
    "pixels as images": ({"data": np.zeros((2, 3, 32, 32), np.uint8)}, r"data is .*32, 32"),
    "a single number": ({"data": np.uint8(3)}, r"data is uint8 \(\)"),
    "no images": ({"data": np.zeros((0, 3072), np.uint8)}, r"data is uint8 \(0, 3072\)"),
    "a label too few": ({"labels": np.array([1])}, r"labels are int64 \(1,\)"),
    "labels that are not integers": ({"labels": np.ones(2)}, "labels are float64"),
    "a label below 1": ({"labels": np.array([0, 1])}, "label 0 is not from 1 to 1000"),
    "a label above 1000": ({"labels": np.array([1, 1001])}, "label 1001 is not from 1 to 1000"),
}


@pytest.mark.parametrize("wrong", WRONG_BATCHES)
@pytest.mark.parametrize("file", [f"{TRAIN}/train_data_batch_3.npz", f"{VAL}/val_data.npz"])
def test_a_wrong_batch_is_one_line_that_names_it(file, wrong, imagenet_folder):
    changes, message = WRONG_BATCHES[wrong]
    np.savez(imagenet_folder / file, **batch(1) | changes)
    with pytest.raises(DataError, match=rf"^{imagenet_folder / file}: {message}[^\n]*$"):
        load("imagenet32", device="cpu")


class WouldTouch:
    """Unpickling this creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def as_object_array(path: Path, bomb: WouldTouch) -> None:
    np.savez(path, **batch(1) | {"labels": np.array([bomb, bomb], dtype=object)})


def as_plain_pickle(path: Path, bomb: WouldTouch) -> None:
    path.write_bytes(pickle.dumps(bomb))


@pytest.mark.parametrize("write", [as_object_array, as_plain_pickle])
def test_a_pickle_is_refused_by_name_and_never_unpickled(write, imagenet_folder, tmp_path):
    path = imagenet_folder / VAL / "val_data.npz"
    write(path, WouldTouch(tmp_path / "unpickled"))
    with pytest.raises(DataError, match=rf"^{path} cannot be read \([^\n]*unpack {VAL}.zip again$"):
        load("imagenet32", device="cpu")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_batch_is_one_line_that_names_it(share, imagenet_folder):
    path = imagenet_folder / TRAIN / "train_data_batch_10.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"^{path} cannot be read [^\n]*$"):
        load("imagenet32", device="cpu")


def test_a_batch_without_labels_is_one_line_that_names_it(imagenet_folder):
    path = imagenet_folder / TRAIN / "train_data_batch_1.npz"
    np.savez(path, data=batch(1)["data"])
    with pytest.raises(DataError, match=rf"^{path} cannot be read [^\n]*labels[^\n]*$"):
        load("imagenet32", device="cpu")


@pytest.mark.parametrize("file", [f"{TRAIN}/train_data_batch_10.npz", f"{VAL}/val_data.npz"])
def test_a_missing_batch_is_named(file, imagenet_folder):
    (imagenet_folder / file).unlink()
    with pytest.raises(DataError, match=rf"^{imagenet_folder / file} is missing: [^\n]*$"):
        load("imagenet32", device="cpu")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("imagenet32", [f"{TRAIN}.zip", f"{VAL}.zip", "image-net.org"]),
        ("modelnet10", ["ModelNet10", "ModelNet10.zip", "modelnet.cs.princeton.edu"]),
    ],
)
def test_a_set_that_is_not_there_is_one_line_with_the_places_and_the_source(
    name, parts, data_folder
):
    with pytest.raises(DataError, match=rf"^cannot get '{name}'[^\n]*$") as caught:
        load(name, device="cpu")
    places = [str(root) for root in data_roots()]
    assert all(part in str(caught.value) for part in [*parts, *places, "JAHS_DATA"])


# --- OFF files ------------------------------------------------------------------------------------

CORNERS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))  # corner 4x + 2y + z
SQUARES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def off(vertices, faces, header="OFF\n{} {} 0") -> str:
    lines = [header.format(len(vertices), len(faces))]
    lines += [" ".join(f"{x:.6f}" for x in vertex) for vertex in vertices]
    lines += [" ".join(map(str, [len(face), *face])) for face in faces]
    return "\n".join(lines) + "\n"


def in_file(folder: Path, text: str) -> Path:
    path = folder / "mesh.off"
    path.write_text(text, encoding="utf-8")
    return path


CUBE = off(CORNERS, SQUARES)
SAME_CUBES = {
    "counts behind the header": off(CORNERS, SQUARES, "OFF{} {} 0"),
    "counts behind the header and a space": off(CORNERS, SQUARES, "OFF {} {} 0"),
    "comments and blank lines": "# a cube\n\n" + CUBE.replace("\n", " # here\n\n#\n"),
    "a byte that is not UTF-8 in a comment": CUBE.replace("OFF", "OFF # \udce9"),
    "Windows line ends": CUBE.replace("\n", "\r\n"),
    "colours behind the faces": CUBE.replace("4 0 1 3 2", "4 0 1 3 2 0.5 0.5 0.5"),
    "an edge and a point among the faces": off(CORNERS, [(0, 1), *SQUARES, (7,)]),
}


@pytest.mark.parametrize("variant", SAME_CUBES)
def test_a_variant_of_the_format_gives_the_same_triangles(variant, tmp_path):
    path = tmp_path / "mesh.off"
    path.write_bytes(SAME_CUBES[variant].encode("utf-8", "surrogateescape"))
    assert np.array_equal(read_off(path), read_off(in_file(tmp_path, CUBE)))


def test_a_face_becomes_a_fan_around_its_first_corner(tmp_path):
    pentagon = np.random.default_rng(0).normal(size=(5, 3)).round(3)
    fan = read_off(in_file(tmp_path, off(pentagon, [(3, 1, 4, 0, 2)])))
    assert np.array_equal(fan, pentagon[[(3, 1, 4), (3, 4, 0), (3, 0, 2)]])


WRONG_MESHES = {
    "an empty file": ("", "does not start with OFF"),
    "another header": (CUBE.replace("OFF", "COFF"), "does not start with OFF"),
    "a header alone": ("OFF\n", "does not start with OFF"),
    "negative counts": ("OFF\n-8 6 0\n", "does not start with OFF"),
    "no vertices": ("OFF\n0 0 0\n", "empty: 0 vertices, 0 faces"),
    "no faces": (off(CORNERS, []), "empty: 8 vertices, 0 faces"),
    "faces that are edges": (off(CORNERS, [(0, 1)]), "no face has three corners"),
    "a single point": (off(CORNERS * 0, SQUARES), "no extent"),
    "cut among the vertices": ("\n".join(CUBE.splitlines()[:6]), "truncated: 4 lines for 8 [+] 6"),
    "cut among the faces": ("\n".join(CUBE.splitlines()[:-1]), "truncated: 13 lines for 8 [+] 6"),
    "cut within a face": (CUBE[:-3], "face '4 1 5 7' does not have 4 corners"),
    "a vertex of two numbers": (off(CORNERS[:, :2], SQUARES), "column"),
    "a vertex that is no number": (CUBE.replace("1.000000", "one", 1), "one"),
    "a vertex at infinity": (CUBE.replace("1.000000", "inf", 1), "not finite"),
    "a face of a vertex too far": (
        off(CORNERS, [(0, 1, 8)]),
        "'3 0 1 8' is not of vertices 0 to 7",
    ),
    "a face of a negative vertex": (off(CORNERS, [(0, 1, -1)]), "is not of vertices 0 to 7"),
    "a face of a fraction": (CUBE.replace("4 0 1 3", "4 0 1.5 3"), "1.5"),
    "a negative number of corners": (CUBE.replace("4 0 1 3", "-2 0 1 3"), "not have -2 corners"),
}


@pytest.mark.parametrize("wrong", WRONG_MESHES)
def test_a_wrong_mesh_is_one_line_that_names_its_file(wrong, data_folder):
    text, message = WRONG_MESHES[wrong]
    path = write_modelnet(data_folder) / "bathtub" / "train" / "bathtub_0001.off"
    path.write_text(text, encoding="utf-8")
    expected = rf"^{path} cannot be read \([^\n]*{message}[^\n]*\): unpack ModelNet10.zip again$"
    with pytest.raises(DataError, match=expected):
        load("modelnet10", device="cpu")


# --- voxels ---------------------------------------------------------------------------------------


def triangulated(vertices: np.ndarray, squares=SQUARES) -> np.ndarray:
    return vertices[[half for a, b, c, d in squares for half in ((a, b, c), (a, c, d))]]


def sphere() -> np.ndarray:
    """A closed surface: the triangulated cube, cut finer and blown up."""
    triangles = triangulated(CORNERS - 0.5)
    for _ in range(3):
        a, b, c = triangles.transpose(1, 0, 2)
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        quarters = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
        triangles = np.concatenate([np.stack(part, axis=1) for part in quarters])
    return triangles / np.linalg.norm(triangles, axis=2, keepdims=True)


def turned(triangles: np.ndarray, seed: int) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return triangles @ rotation


def test_the_voxels_of_a_cube_are_its_six_faces():
    z, y, x = np.indices((32, 32, 32))
    inside = (np.minimum.reduce([x, y, z]) >= 1) & (np.maximum.reduce([x, y, z]) <= 30)
    shell = inside & ((np.isin(x, (1, 30))) | (np.isin(y, (1, 30))) | (np.isin(z, (1, 30))))
    assert np.array_equal(voxelize(triangulated(CORNERS)), 255 * shell.astype(np.uint8))


@settings(max_examples=20, deadline=None)
@given(
    shift=st.tuples(*[st.floats(-50, 50)] * 3),
    scale=st.floats(0.01, 100),
    extent=st.tuples(*[st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0])] * 2),
)
def test_voxels_do_not_change_when_the_mesh_is_moved_or_scaled(shift, scale, extent):
    """Also where faces lie on the border of two voxels, as those of a plate do."""
    box = triangulated(CORNERS * np.array([1.0, *extent]))
    assert np.array_equal(voxelize(box * scale + np.array(shift)), voxelize(box))


@pytest.mark.parametrize("shape", [sphere(), triangulated(CORNERS * [1, 0.7, 0.3])])
@pytest.mark.parametrize("seed", range(3))
def test_a_closed_surface_leaves_no_way_between_inside_and_outside(shape, seed):
    regions, count = ndimage.label(voxelize(turned(shape, seed)) == 0)
    middle = regions[16, 16, 16]
    assert count == 2
    assert middle not in (0, regions[0, 0, 0])


# The bounding box of these triangles is centred and 29 wide: in voxelize they stay where they are.
PLACED = np.array([[1, 5, 8], [30, 26, 12], [14, 9, 23]], dtype=float)
NEEDLE = np.array([[1, 15, 15], [30, 16, 16], [9, 15.2, 15.5]], dtype=float)


def test_channels_are_heights_rows_are_y_and_columns_are_x():
    voxels = voxelize(PLACED[None])
    assert all(voxels[z, y, x] == 255 for x, y, z in PLACED.astype(int))


@pytest.mark.parametrize("triangle", [PLACED, NEEDLE])
def test_no_voxel_is_missed_whose_middle_the_surface_passes(triangle):
    weights = np.random.default_rng(0).dirichlet([1, 1, 1], 20_000)
    points = weights @ triangle
    voxels = np.rint(points).astype(int)
    near = np.abs(points - voxels).max(1) < 0.2  # the distance to a sample is at most 0.29
    x, y, z = voxels[near].T
    assert near.sum() > 500
    assert voxelize(triangle[None])[z, y, x].all()


@pytest.mark.parametrize("triangle", [PLACED, NEEDLE])
def test_every_voxel_found_meets_the_triangle(triangle):
    """A linear program looks for a point of the triangle within half a voxel of the middle."""
    lit = np.argwhere(voxelize(triangle[None]))[:, ::-1]
    sides = np.concatenate([triangle.T, -triangle.T])
    for middle in lit:
        bounds = np.concatenate([middle + 0.5, 0.5 - middle]) + 1e-5
        found = optimize.linprog(np.zeros(3), sides, bounds, np.ones((1, 3)), [1])
        assert found.success, middle


# --- ModelNet10 -----------------------------------------------------------------------------------


def write_modelnet(root: Path) -> Path:
    """Two training meshes and a test mesh of each class: boxes as tall as the class's number."""
    for number, name in enumerate(CLASSES, 1):
        for part, numbers in (("train", (1, 2)), ("test", (3,))):
            folder = root / "ModelNet10" / name / part
            folder.mkdir(parents=True)
            for k in numbers:
                box = CORNERS * [10.0, float(k), float(number)]
                header = ("OFF\n{} {} 0", "OFF{} {} 0")[k % 2]
                (folder / f"{name}_{k:04}.off").write_text(off(box, SQUARES, header), "utf-8")
    (root / "ModelNet10" / "README.txt").touch()
    (folder / ".DS_Store").touch()
    return root / "ModelNet10"


def test_meshes_become_voxel_images_of_their_class_and_part(data_folder):
    write_modelnet(data_folder)
    data = load("modelnet10", device="cpu")
    expected = [
        (voxelize(triangulated(CORNERS * [10.0, k, number])), number - 1, k == 3)
        for number in range(1, 11)
        for k in (1, 2, 3)
    ]
    for test, images, labels in (
        (False, data.train_images, data.train_labels),
        (True, data.test_images, data.test_labels),
    ):
        wanted = [(image, label) for image, label, is_test in expected if is_test == test]
        assert np.array_equal(images, np.stack([image for image, _ in wanted]))
        assert labels.tolist() == [label for _, label in wanted]


def test_the_set_has_32_channels_and_the_ten_names(data_folder):
    write_modelnet(data_folder)
    data = load("modelnet10", device="cpu")
    assert data.image_shape == (32, 32, 32)
    assert data.classes == tuple(CLASSES)
    assert set(data.train_images.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_meshes_is_one_line_that_names_its_folder(part, data_folder):
    folder = write_modelnet(data_folder) / "sofa" / part
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"^{folder} has no sofa_\*.off: [^\n]*$"):
        load("modelnet10", device="cpu")


def test_slices_that_are_empty_in_training_do_not_blow_up_a_test_image(data_folder):
    """The boxes leave the lowest and the highest slices empty; a test image fills them."""
    write_modelnet(data_folder)
    data = load("modelnet10", device="cpu")
    assert data.train_images[:, 0].sum() == 0
    normalized = data.normalize(torch.full((1, 32, 32, 32), 255, dtype=torch.uint8))
    assert normalized[0, 0].max() == 255


def test_the_deviation_of_a_constant_channel_is_1():
    images = torch.randint(0, 256, (6000, 3, 2, 2), dtype=torch.uint8)
    images[:, 1] = 201
    mean, std = channel_statistics(images)
    assert (mean[1].item(), std[1].item()) == (201, 1)
    assert (std[[0, 2]] > 50).all()
