"""Image sets: where they come from, what is refused, how they are split and augmented."""

import contextlib
import functools
import gzip
import http.server
import importlib.util
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jahs_utils import data_files
from jahs_utils.data import ImageData, augment, channel_statistics, load, mixup
from jahs_utils.data_files import FASHION_FILES, DataError, import_cifar10_copy

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
with_debian_set = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits():
    return load("digits", device="cpu")


@pytest.fixture
def no_system_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(data_files, "SYSTEM_FOLDER", tmp_path / "none")


@pytest.fixture
def no_network(monkeypatch):
    """Proxies that refuse every connection: a port that was free a moment ago."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The four official files as torchvision's download leaves them, and torchvision's reading."""
    root = tmp_path_factory.mktemp("fashion")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FASHION_FILES:
        (raw / name).write_bytes(gzip.decompress((DEBIAN / f"{name}.gz").read_bytes()))
    return root


# --- Fashion-MNIST --------------------------------------------------------------------------------


def assert_is_torchvisions(data: ImageData, root: Path) -> None:
    for part, train in (("train", True), ("test", False)):
        expected = tv.FashionMNIST(root, train=train)
        assert torch.equal(getattr(data, f"{part}_images")[:, 0], expected.data)
        assert torch.equal(getattr(data, f"{part}_labels"), expected.targets)


@with_debian_set
def test_fashion_mnist_from_the_system_folder_is_what_torchvision_reads(data_folder, unpacked):
    assert_is_torchvisions(load("fashion_mnist", device="cpu"), unpacked)


@with_debian_set
def test_fashion_mnist_from_unpacked_files_is_what_torchvision_reads(
    data_folder, unpacked, no_system_folder, no_network
):
    shutil.copytree(unpacked, data_folder, dirs_exist_ok=True)
    assert_is_torchvisions(load("fashion_mnist", device="cpu"), unpacked)


@with_debian_set
def test_an_old_processed_folder_does_not_replace_the_verified_files(
    data_folder, unpacked, no_system_folder
):
    shutil.copytree(unpacked, data_folder, dirs_exist_ok=True)
    processed = data_folder / "FashionMNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5).long()), processed / name
        )
    assert len(load("fashion_mnist", device="cpu").train_labels) == 60000


def packed_copy(folder: Path) -> Path:
    for name in FASHION_FILES:
        (folder / f"{name}.gz").symlink_to(DEBIAN / f"{name}.gz")
    return folder


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


def pack_other(content: bytes) -> bytes:
    return gzip.compress(b"another file")


def empty(content: bytes) -> bytes:
    return b""


@with_debian_set
@pytest.mark.parametrize("damage", [truncate, flip_middle, pack_other, empty])
@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_gz_file_is_one_error_that_names_it(
    name, damage, data_folder, no_system_folder, no_network
):
    path = packed_copy(data_folder) / f"{name}.gz"
    path.unlink()
    path.write_bytes(damage((DEBIAN / f"{name}.gz").read_bytes()))
    with pytest.raises(DataError, match=rf"^{path} is damaged[^\n]*$"):
        load("fashion_mnist", device="cpu")


@with_debian_set
@pytest.mark.parametrize("damage", [truncate, flip_middle, empty])
def test_a_damaged_unpacked_file_is_one_error_that_names_it(
    damage, data_folder, unpacked, no_system_folder, no_network
):
    shutil.copytree(unpacked, data_folder, dirs_exist_ok=True)
    path = data_folder / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"^{path} is damaged[^\n]*$"):
        load("fashion_mnist", device="cpu")


@with_debian_set
def test_a_damaged_file_is_not_loaded_at_a_second_try(data_folder, no_system_folder, no_network):
    path = packed_copy(data_folder) / "t10k-labels-idx1-ubyte.gz"
    path.unlink()
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError):
            load("fashion_mnist", device="cpu")


@with_debian_set
@pytest.mark.parametrize("missing", sorted(FASHION_FILES))
def test_a_missing_gz_file_of_the_four_is_named(missing, data_folder, no_system_folder, no_network):
    path = packed_copy(data_folder) / f"{missing}.gz"
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path} is missing[^\n]*$"):
        load("fashion_mnist", device="cpu")


def test_a_missing_unpacked_file_of_the_four_is_named(data_folder, no_system_folder, no_network):
    raw = data_folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-labels-idx1-ubyte").touch()
    with pytest.raises(DataError, match=rf"^{raw}/train-images-idx3-ubyte is missing[^\n]*$"):
        load("fashion_mnist", device="cpu")


def test_the_shipped_part_is_balanced():
    data = load("fashion_mnist_mini", device="cpu")
    assert data.train_images.shape == (6000, 1, 28, 28)
    assert data.test_images.shape == (2000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [600] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10


@with_debian_set
def test_the_shipped_part_is_what_its_script_makes(data_folder, tmp_path):
    spec = importlib.util.spec_from_file_location("make", ROOT / "tools/make_fashion_mnist_mini.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path / "made.npz")
    shipped = np.load(ROOT / "jahs_utils" / "fashion_mnist_mini.npz", allow_pickle=False)
    made = np.load(tmp_path / "made.npz", allow_pickle=False)
    assert set(made) == set(shipped)
    assert all(np.array_equal(made[name], shipped[name]) for name in shipped)


# --- the other sets -------------------------------------------------------------------------------


def test_digits_are_scikit_learns_with_grey_levels_spread(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ours = {(image.tobytes(), int(label)) for image, label in both_parts(digits)}
    levels = (bunch.images * 15).astype(np.uint8)[:, None]
    assert ours == {(image.tobytes(), int(k)) for image, k in zip(levels, bunch.target)}


def both_parts(data):
    yield from zip(data.train_images.numpy(), data.train_labels.numpy())
    yield from zip(data.test_images.numpy(), data.test_labels.numpy())


def test_a_set_is_uint8_images_and_int64_labels(digits):
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.image_shape == (1, 8, 8)


def test_an_unknown_set_is_one_line_with_the_choices():
    with pytest.raises(ValueError, match=r"^unknown data set 'cifar'.*cifar10, cifar100[^\n]*$"):
        load("cifar")


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_without_a_network_one_line_says_what_was_tried_and_three_ways(
    name, data_folder, no_system_folder, no_network, capfd
):
    with pytest.raises(DataError, match=r"^[^\n]+$") as caught:
        load(name, device="cpu")
    message = str(caught.value)
    tried = [str(data_folder), str(data_files.data_roots()[-1]), str(data_files.SYSTEM_FOLDER)]
    assert all(place in message for place in [repr(name), *tried, "download failed"])
    ways = message.split("Ways to get it: ")[1].split("; or ")
    assert len(ways) == 3
    assert "JAHS_DATA" in ways[1]
    assert capfd.readouterr().out == ""


def test_a_cache_that_cannot_be_written_is_the_same_one_line(
    data_folder, no_system_folder, no_network, monkeypatch
):
    (data_folder / "file").touch()
    monkeypatch.setenv("JAHS_CACHE", str(data_folder / "file" / "cache"))
    with pytest.raises(DataError, match=r"^cannot get 'cifar10'[^\n]*in JAHS_CACHE[^\n]*$"):
        load("cifar10", device="cpu")


def test_a_copy_for_a_cache_that_cannot_be_written_is_one_line(data_folder, monkeypatch, tmp_path):
    (data_folder / "file").touch()
    monkeypatch.setenv("JAHS_CACHE", str(data_folder / "file" / "cache"))
    with pytest.raises(ValueError, match=r"^cannot write to [^\n]*in JAHS_CACHE$"):
        import_cifar10_copy(save_copy(tmp_path))


def test_a_file_that_may_not_be_read_is_one_line_that_names_it(data_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    raw = data_folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FASHION_FILES:
        (raw / name).touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    wanted = rf"^cannot read {raw}/train-images-idx3-ubyte \(Permission denied\): [^\n]*JAHS_CACHE$"
    with pytest.raises(DataError, match=wanted):
        load("fashion_mnist", device="cpu")


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves Debian's four files, slowly enough for downloads to overlap."""

    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(0.2)
        with contextlib.suppress(ConnectionError):  # torchvision hangs up after a first look
            super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror():
    """A server on loopback with Debian's files; `asked` lists what was asked for."""
    handler = functools.partial(Mirror, directory=str(DEBIAN))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


DOWNLOAD = """
import os, sys
from pathlib import Path
import torchvision.datasets as tv
from jahs_utils import data_files, load

tv.FashionMNIST.mirrors = [sys.argv[1]]
sums = dict(pair.split("=") for pair in sys.argv[2:])
tv.FashionMNIST.resources = [(name, sums[name]) for name, _ in tv.FashionMNIST.resources]
data_files.SYSTEM_FOLDER = Path("/none")
child = os.fork()  # torch is imported once
print(load("fashion_mnist", device="cpu").checksum, flush=True)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@with_debian_set
def test_two_processes_at_once_download_a_set_once(mirror, data_folder, tmp_path):
    cache = tmp_path / "cache" / "data"
    raw = cache / "fashion_mnist.part" / "FashionMNIST" / "raw"  # left by one that was killed
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"torn")
    address = f"http://127.0.0.1:{mirror.server_address[1]}/"
    sums = [f"{n}.gz={md5((DEBIAN / f'{n}.gz').read_bytes())}" for n in FASHION_FILES]
    command = [sys.executable, "-c", DOWNLOAD, address, *sums]
    environment = os.environ | {"no_proxy": "*", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first == second
    asked = Counter(mirror.asked)
    assert set(asked) == {f"/{name}.gz" for name in FASHION_FILES}
    assert max(asked.values()) <= 2  # a look at the address, then the download
    assert sorted(path.name for path in cache.iterdir()) == ["FashionMNIST", "fashion_mnist.lock"]


OFFICIAL = {
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
    "stl10": "stl10_binary/train_X.bin",
}


class WouldTouch:
    """Unpickling this creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_file_that_is_not_the_official_one_is_named_and_never_unpickled(
    name, data_folder, no_network, tmp_path
):
    path = data_folder / OFFICIAL[name]
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(WouldTouch(tmp_path / "unpickled")))
    with pytest.raises(DataError, match=rf"^{path} is damaged or not the official file[^\n]*$"):
        load(name, device="cpu")
    assert not (tmp_path / "unpickled").exists()


def test_the_pickle_of_the_test_above_does_create_its_file(tmp_path):
    pickle.loads(pickle.dumps(WouldTouch(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").exists()


def md5(content: bytes) -> str:
    import hashlib

    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_cifar10_batches_are_parsed_into_channels_rows_columns(data_folder, monkeypatch):
    """Small files in the official format, with their checksums in place of the official ones."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    labels = [[0, 1, 2, 3]] * 6
    folder = data_folder / "cifar-10-batches-py"
    folder.mkdir()
    listed = []
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name, part, targets in zip(names, pixels, labels):
        content = pickle.dumps({"data": part.reshape(4, -1), "labels": targets})
        (folder / name).write_bytes(content)
        listed.append([name, md5(content)])
    meta = pickle.dumps({"label_names": [str(k) for k in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(tv.CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(tv.CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(tv.CIFAR10, "meta", tv.CIFAR10.meta | {"md5": md5(meta)})
    data = load("cifar10", device="cpu")
    assert np.array_equal(data.train_images.numpy(), pixels[:5].reshape(20, 3, 32, 32))
    assert np.array_equal(data.test_images.numpy(), pixels[5])
    assert data.train_labels.tolist() == [0, 1, 2, 3] * 5


def test_stl10_needs_only_its_labelled_files(data_folder, monkeypatch):
    """Small files in the official format (columns first), with their own checksums."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 10, 3, 96, 96), dtype=np.uint8)
    labels = np.arange(1, 11, dtype=np.uint8)
    folder = data_folder / "stl10_binary"
    folder.mkdir()
    listed = {}
    for part, images in zip(("train", "test"), pixels):
        listed[part] = []
        for name, array in ((f"{part}_X.bin", images.swapaxes(2, 3)), (f"{part}_y.bin", labels)):
            (folder / name).write_bytes(array.tobytes())
            listed[part].append([name, md5(array.tobytes())])
    monkeypatch.setattr(data_files._LabelledSTL10, "train_list", listed["train"])
    monkeypatch.setattr(data_files._LabelledSTL10, "test_list", listed["test"])
    data = load("stl10", device="cpu")
    assert np.array_equal(data.train_images.numpy(), pixels[0])
    assert np.array_equal(data.test_images.numpy(), pixels[1])
    assert data.train_labels.tolist() == list(range(10))


# --- the JPEG copy of CIFAR-10 --------------------------------------------------------------------


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return file.getvalue()


def small_copy(count: int = 12) -> dict[str, np.ndarray]:
    """A JPEG copy with `count` images, two of them for the test part."""
    random = np.random.default_rng(0)
    files = [jpeg(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    ends = np.cumsum([0, *map(len, files)])
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": ends.astype(np.int64),
        "labels": np.arange(count, dtype=np.int64) % 10,
        "n_train": np.int64(count - 2),
    }


def save_copy(folder: Path, **changes) -> Path:
    path = folder / "copy.npz"
    np.savez(path, **(small_copy() | changes))
    return path


def test_an_imported_copy_is_what_pillow_decodes(data_folder, no_network):
    copy = small_copy()
    import_cifar10_copy(save_copy(data_folder))
    data = load("cifar10", device="cpu")
    start, end = copy["offsets"][11:13]
    picture = Image.open(io.BytesIO(copy["jpeg"][start:end].tobytes()))
    assert np.array_equal(data.test_images[1].permute(1, 2, 0).numpy(), np.asarray(picture))
    assert data.train_labels.tolist() == copy["labels"][:10].tolist()


def test_an_imported_copy_is_named_in_the_provenance(data_folder, no_network):
    import_cifar10_copy(save_copy(data_folder))
    assert load("cifar10", device="cpu").source == "JPEG copy, quality 75"


def other_picture(size, form="JPEG"):
    """A copy whose first file is a picture of another size or format."""
    copy = small_copy()
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, form)
    first = np.frombuffer(file.getvalue(), np.uint8)
    old = copy["offsets"][1]
    offsets = np.concatenate([[0], copy["offsets"][1:] - old + len(first)])
    return {"jpeg": np.concatenate([first, copy["jpeg"][old:]]), "offsets": offsets}


COPY = small_copy()
WRONG_COPIES = {
    "stream cut": {"jpeg": COPY["jpeg"][:-100]},
    "offsets past the end": {"offsets": COPY["offsets"] + 5},
    "no offsets": {"offsets": COPY["offsets"][:0]},
    "offsets that go back": {"offsets": COPY["offsets"][[0, 2, 1, *range(3, 13)]]},
    "unsigned offsets that go back": {
        "offsets": COPY["offsets"][[0, 2, 1, *range(3, 13)]].astype(np.uint64)
    },
    "offsets in two dimensions": {"offsets": COPY["offsets"][None]},
    "an offset too few": {"offsets": COPY["offsets"][[0, *range(2, 13)]]},
    "a shifted boundary": {"offsets": COPY["offsets"] + np.eye(13, dtype=np.int64)[4] * 40},
    "labels too few": {"labels": COPY["labels"][:-1]},
    "labels too large": {"labels": COPY["labels"] + 5},
    "labels in two dimensions": {"labels": COPY["labels"][:, None]},
    "all images for training": {"n_train": np.int64(12)},
    "no images for training": {"n_train": np.int64(0)},
    "objects": {"labels": np.array([WouldTouch(Path("/nowhere"))] * 12, dtype=object)},
    "a larger picture": other_picture((64, 64)),
    "a single pixel": other_picture((1, 1)),
    "a PNG": other_picture((32, 32), "PNG"),
}


@pytest.mark.parametrize("wrong", WRONG_COPIES)
def test_a_wrong_copy_is_refused_by_name_and_not_imported(wrong, data_folder, tmp_path):
    path = save_copy(tmp_path, **WRONG_COPIES[wrong])
    with pytest.raises(DataError, match=r"^[^\n]*$"):
        import_cifar10_copy(path)
    assert not any(root.exists() and [*root.iterdir()] for root in data_files.data_roots())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_copy_is_refused_by_name(share, data_folder, tmp_path):
    path = save_copy(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"^{path} is [^\n]*$"):
        import_cifar10_copy(path)


def test_a_copy_that_lacks_an_array_is_refused_by_name(data_folder, tmp_path):
    path = tmp_path / "copy.npz"
    np.savez(path, jpeg=COPY["jpeg"], offsets=COPY["offsets"])
    with pytest.raises(DataError, match=rf"^{path} is not a JPEG copy[^\n]*$"):
        import_cifar10_copy(path)


def test_a_copy_that_does_not_exist_is_named(data_folder, tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path}/nothing.npz is not"):
        import_cifar10_copy(tmp_path / "nothing.npz")


def test_an_object_array_is_refused_without_unpickling(data_folder, tmp_path):
    bomb = np.array([WouldTouch(tmp_path / "unpickled")], dtype=object)
    with pytest.raises(DataError):
        import_cifar10_copy(save_copy(tmp_path, labels=bomb))
    assert not (tmp_path / "unpickled").exists()


# --- parts of a set -------------------------------------------------------------------------------


def rows(images: torch.Tensor) -> list[bytes]:
    return [image.tobytes() for image in images.numpy()]


@pytest.mark.parametrize("k", [2, 5, 7])
def test_folds_cover_every_training_image_once_and_never_train_on_it(digits, k):
    left_out = []
    for fold in digits.folds(k):
        left_out += rows(fold.test_images)
        assert sorted(rows(fold.train_images) + rows(fold.test_images)) == sorted(
            rows(digits.train_images)
        )
    assert sorted(left_out) == sorted(rows(digits.train_images))


def test_folds_keep_the_class_shares(digits):
    counts = torch.stack([fold.test_labels.bincount(minlength=10) for fold in digits.folds(5)])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1


def test_folds_depend_on_the_seed_alone(digits):
    first, again, other = (digits.folds(3, seed=s)[0].test_images for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[:300], other[:300])


@pytest.mark.parametrize("k", [0, 1, 200, 1437, 1438])
def test_folds_that_cannot_be_are_one_line_with_the_bounds(digits, k):
    with pytest.raises(ValueError, match=r"^k, at most [^\n]* from 2 to 13\d, got[^\n]*$"):
        digits.folds(k)


def test_images_and_labels_stay_together_in_parts(digits):
    label_of = dict(zip(rows(digits.train_images), digits.train_labels.tolist()))
    part = digits.hold_out(300, seed=3)
    for images, labels in (
        (part.train_images, part.train_labels),
        (part.test_images, part.test_labels),
    ):
        assert [label_of[row] for row in rows(images)] == labels.tolist()


@settings(max_examples=15, deadline=None)
@given(n=st.integers(10, 1427), seed=st.integers(0, 2**32 - 1))
def test_a_subset_has_the_size_asked_and_the_class_shares(n, seed):
    digits = load("digits", device="cpu")
    subset = digits.subset(n, seed)
    share = digits.train_labels.bincount() / len(digits.train_labels)
    assert len(subset.train_labels) == n
    assert (subset.train_labels.bincount(minlength=10) - n * share).abs().max() <= 1


def test_a_subset_keeps_the_test_images_and_the_statistics(digits):
    subset = digits.subset(100)
    assert subset.test_images is digits.test_images
    assert torch.equal(subset.mean, digits.mean)


def test_the_subset_of_everything_is_the_set(digits):
    assert digits.subset(1437) is digits


@pytest.mark.parametrize("n", [-1, 0, 9, 1428, 1436, 1438])
def test_a_subset_out_of_bounds_is_one_line_with_the_bounds(digits, n):
    with pytest.raises(
        ValueError, match=rf"^subset[, ].* whole number from 10 to 14\d\d, got {n}$"
    ):
        digits.subset(n)


def test_load_takes_a_subset(digits):
    assert torch.equal(
        load("digits", device="cpu", subset=50).train_labels, digits.subset(50).train_labels
    )


def test_images_held_out_are_not_trained_on(digits):
    part = digits.hold_out(200)
    assert len(part.test_labels) == 200
    assert sorted(rows(part.train_images) + rows(part.test_images)) == sorted(
        rows(digits.train_images)
    )


@pytest.mark.parametrize("n", [0, 9, 1428, 1437])
def test_holding_out_too_few_or_too_many_is_one_line(digits, n):
    with pytest.raises(ValueError, match=rf"^[^\n]* hold out .*from 10 to 1427, got {n}$"):
        digits.hold_out(n)


# --- statistics and augmentation ------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 1000))
def test_channel_statistics_are_numpys(n, channels, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, channels, 5, 4), dtype=np.uint8)
    mean, std = channel_statistics(torch.from_numpy(images))
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 2, 3)), rtol=1e-5)


def test_channel_statistics_are_exact_over_more_than_one_piece():
    images = torch.cat([torch.full((5001, 1, 2, 2), 255), torch.zeros(1, 1, 2, 2)]).to(torch.uint8)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.numpy().mean(), rtol=1e-6)
    np.testing.assert_allclose(std, images.numpy().std(), rtol=1e-4)


def test_normalized_training_images_have_mean_0_and_deviation_1(digits):
    x = digits.normalize(digits.train_images)
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_a_constant_channel_does_not_normalize_to_nan():
    _, std = channel_statistics(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8))
    assert std.item() > 0


@settings(max_examples=15, deadline=None)
@given(
    crop=st.integers(1, 3),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([torch.uint8, torch.float32]),
)
def test_each_shifted_image_is_a_crop_of_the_padded_one(crop, seed, kind):
    torch.manual_seed(seed)
    images = torch.randint(1, 256, (6, 2, 5, 4), dtype=torch.uint8).to(kind)
    moved = augment(images, crop=crop, flip=False)
    assert moved.dtype == kind
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (crop, crop), (crop, crop)))
    for k, image in enumerate(moved.numpy()):
        crops = (
            padded[k, :, i : i + 5, j : j + 4]
            for i in range(2 * crop + 1)
            for j in range(2 * crop + 1)
        )
        assert any(np.array_equal(image, crop_) for crop_ in crops)


def test_every_shift_is_drawn_equally_often():
    torch.manual_seed(0)
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 1
    places = augment(images, crop=1, flip=False).sum(0)[0, 1:4, 1:4]
    assert places.sum() == 9000
    assert (places - 1000).abs().max() < 150  # five standard deviations


def test_each_image_is_flipped_or_not_about_half_of_the_time():
    torch.manual_seed(0)
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).repeat(1000, 1, 1, 1)
    flipped = (augment(images, crop=0) == images.flip(3)).all((1, 2, 3))
    same = (augment(images, crop=0) == images).all((1, 2, 3))
    assert 400 < flipped.sum() < 600
    assert 400 < same.sum() < 600


@settings(max_examples=15, deadline=None)
@given(side=st.integers(1, 7), seed=st.integers(0, 1000))
def test_cutout_hides_one_square_clipped_at_the_border(side, seed):
    torch.manual_seed(seed)
    images = torch.ones(20, 2, 9, 8, dtype=torch.uint8)
    hidden = augment(images, crop=0, flip=False, cutout=side).numpy() == 0
    for image in hidden:
        assert np.array_equal(image[0], image[1])
        tall, wide = image[0].any(1), image[0].any(0)
        assert np.array_equal(image[0], tall[:, None] & wide[None, :])
        for line in (tall, wide):
            (found,) = np.nonzero(line)
            assert np.array_equal(found, np.arange(found[0], found[-1] + 1))
            clipped = found[0] == 0 or found[-1] == len(line) - 1
            assert len(found) == side or (clipped and side // 2 <= len(found) < side)


def test_no_augmentation_leaves_the_images():
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(augment(images, crop=0, flip=False), images)


def test_augmentation_does_not_change_its_argument():
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    before = images.clone()
    augment(images, crop=2, cutout=3)
    assert torch.equal(images, before)


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"cutout": -1}])
def test_negative_augmentation_is_one_line(wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must be .* at least 0, got -1$"):
        augment(torch.zeros(1, 1, 4, 4), **wrong)


@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.05, 5), seed=st.integers(0, 1000))
def test_mixup_mixes_images_and_labels_with_the_same_pairs_and_shares(alpha, seed):
    torch.manual_seed(seed)
    labels = torch.arange(5)
    images = torch.eye(5).view(5, 1, 1, 5)  # an image that is its own label
    mixed, targets = mixup(images, labels, alpha, 5)
    torch.testing.assert_close(mixed.view(5, 5), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    torch.testing.assert_close(targets.sum(0), torch.ones(5))  # partners are a permutation


def test_mixup_with_alpha_0_mixes_nothing():
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 1])
    mixed, targets = mixup(images, labels, 0.0, 3)
    assert mixed is images
    assert torch.equal(targets.argmax(1), labels)


def test_a_negative_alpha_is_one_line():
    with pytest.raises(ValueError, match=r"mixup's alpha must be .* at least 0, got -1"):
        mixup(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), -1, 2)


def test_the_checksum_is_that_of_the_arrays(digits):
    import hashlib

    arrays = (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
    content = b"".join(array.numpy().tobytes() for array in arrays)
    assert digits.checksum == hashlib.sha256(content).hexdigest()[:16]
