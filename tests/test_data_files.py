"""Data sets in files: the embedded ones, IDX, CIFAR-10, image folders. Files are generated, broken, and read."""

import gzip
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdl.data import ImageFolder, load_cifar10, load_diabetes, load_digits, load_fashion_mnist, load_idx, read_idx
from jaxdl.data.digits import every_fifth
from jaxdl.errors import JaxdlError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_digits_equal_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load_digits()
    bunch = datasets.load_digits()
    is_test = every_fifth(bunch.target)
    for part, mask in ((train, ~is_test), (test, is_test)):
        np.testing.assert_array_equal(part.arrays["image"][..., 0] * 16, bunch.images[mask])
        np.testing.assert_array_equal(part.arrays["label"], bunch.target[mask])
        assert part.arrays["image"].dtype == np.float32
        assert part.arrays["label"].dtype == np.int32
        assert part.arrays["image"].min() == 0
        assert part.arrays["image"].max() == 1
    assert (len(train), len(test)) == (1442, 355)


def test_the_digits_split_is_stratified():
    train, test = (np.bincount(part.arrays["label"]) for part in load_digits())
    np.testing.assert_array_equal(test, (train + test) // 5)


def test_every_fifth_of_each_group_against_a_loop():
    groups = np.random.default_rng(0).integers(0, 3, 100)
    seen = [0, 0, 0]
    for group, marked in zip(groups, every_fifth(groups), strict=True):
        seen[group] += 1
        assert marked == (seen[group] % 5 == 0)


def test_diabetes_equals_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load_diabetes()
    bunch = datasets.load_diabetes(scaled=False)
    is_test = np.arange(442) % 5 == 4
    for part, mask in ((train, ~is_test), (test, is_test)):
        np.testing.assert_array_equal(part.arrays["features"], bunch.data[mask].astype(np.float32))
        np.testing.assert_array_equal(part.arrays["target"], bunch.target[mask].astype(np.float32))


def test_the_library_does_not_import_what_it_does_not_need():
    code = (
        "import sys, jaxdl.data; jaxdl.data.load_digits();"
        "heavy = ('sklearn', 'tensorflow', 'tensorflow_datasets', 'grain', 'PIL', 'pyarrow', 'orbax');"
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def idx(array, *, magic=None):
    header = magic or bytes([0, 0, 8, array.ndim])
    return header + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("t10k", 5)):
        images, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_fashion_mnist_is_read_as_it_was_written(fashion):
    rng = np.random.default_rng(0)
    for part, n in zip(load_fashion_mnist(fashion), (12, 5), strict=True):
        np.testing.assert_array_equal(part.arrays["image"][..., 0], rng.integers(0, 256, (n, 28, 28)))
        np.testing.assert_array_equal(part.arrays["label"], rng.integers(0, 10, n))
        assert part.arrays["image"].dtype == np.uint8
        assert part.arrays["label"].dtype == np.int32


def test_the_folder_may_come_from_the_environment_and_files_may_be_unpacked(fashion, monkeypatch):
    packed = fashion / "train-images-idx3-ubyte.gz"
    (fashion / "train-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    monkeypatch.setenv("JAXDL_FASHION_MNIST_DIR", str(fashion))
    assert len(load_fashion_mnist()[0]) == 12


def test_missing_files_are_listed_with_what_to_install(fashion):
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(JaxdlError) as caught:
        load_fashion_mnist(fashion)
    for words in (
        "t10k-labels-idx1-ubyte.gz not found",
        str(fashion),
        "dataset-fashion-mnist",
        "JAXDL_FASHION_MNIST_DIR",
    ):
        assert words in str(caught.value)
    assert "train-images" not in str(caught.value)
    with pytest.raises(JaxdlError, match=r"train-images-idx3-ubyte.gz, train-labels.* not found in .*nowhere"):
        load_idx(fashion / "nowhere")


def test_a_truncated_gzip_names_the_file(fashion):
    path = fashion / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for n_bytes in (0, 5, 200, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(JaxdlError, match=r"train-images-idx3-ubyte.gz .*[Gg]et it again"):
            load_fashion_mnist(fashion)


def test_a_file_that_is_not_gzipped_names_the_file(fashion):
    path = fashion / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(JaxdlError, match=r"t10k-labels-idx1-ubyte.gz is truncated or not gzipped"):
        load_fashion_mnist(fashion)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((2, 3)), magic=b"\0\0\x0d\x02"), "begins with 00 00 0d 02, which is no IDX file"),
        (idx(np.zeros(3)), r"no IDX file of bytes of 2 axes \(00 00 08 02\)"),
        (b"", "begins with nothing"),
        (idx(np.zeros((2, 3)))[:-1], "holds 17 bytes where its header says 18"),
        (idx(np.zeros((2, 3))) + b"x", "holds 19 bytes where its header says 18"),
        (idx(np.zeros((2, 3)))[:7], "holds 7 bytes where its header says"),
    ],
)
def test_a_wrong_idx_file_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "x-idx2-ubyte"
    path.write_bytes(content)
    with pytest.raises(JaxdlError, match=message) as caught:
        read_idx(path, n_axes=2)
    assert str(path) in str(caught.value)


def test_read_idx_refuses_a_missing_file(tmp_path):
    with pytest.raises(JaxdlError, match="cannot be read"):
        read_idx(tmp_path / "none.gz")


def test_counts_and_labels_are_checked(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(11))))
    with pytest.raises(JaxdlError, match=r"holds 12 images and train-labels-idx1-ubyte.gz 11 labels"):
        load_fashion_mnist(fashion)
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(12, 10))))
    with pytest.raises(JaxdlError, match=r"label 10 at row 0.* not in 0\.\.9"):
        load_fashion_mnist(fashion)


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(1)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


def test_cifar10_pixels_stand_where_the_format_puts_them(cifar):
    train, test = load_cifar10(cifar)
    assert (len(train), len(test)) == (15, 3)
    content = (cifar / "data_batch_2.bin").read_bytes()
    for row, channel, y, x in ((0, 0, 0, 0), (1, 2, 31, 30), (2, 1, 7, 19)):
        record = content[3073 * row : 3073 * (row + 1)]
        assert train.arrays["image"][3 + row, y, x, channel] == record[1 + 1024 * channel + 32 * y + x]
        assert train.arrays["label"][3 + row] == record[0]


def test_cifar10_errors(cifar):
    path = cifar / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JaxdlError, match=r"test_batch.bin holds 9218 bytes, not a multiple of 3073"):
        load_cifar10(cifar)
    path.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(JaxdlError, match="label 10 at row 0"):
        load_cifar10(cifar)
    path.unlink()
    with pytest.raises(JaxdlError, match=r"^test_batch.bin not found.*cifar-10-binary.tar.gz"):
        load_cifar10(cifar)


@pytest.fixture
def flowers(tmp_path):
    for name, n in (("rose", 2), ("daisy", 3)):
        (tmp_path / name).mkdir()
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (6, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{n - i}.png")
    (tmp_path / "rose" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not a class")
    return tmp_path


def test_image_folder_sorts_classes_and_files(flowers):
    source = ImageFolder(flowers)
    assert source.class_names == ("daisy", "rose")
    assert [path.name for path in source.paths] == ["1.png", "2.png", "3.png", "1.png", "2.png"]
    assert [int(source[row]["label"]) for row in range(len(source))] == [0, 0, 0, 1, 1]
    pixels = np.random.default_rng(1).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(source[1]["image"], pixels)


def test_image_folder_resizes_and_turns_grey(flowers):
    assert ImageFolder(flowers, size=(8, 10))[0]["image"].shape == (8, 10, 3)
    grey = ImageFolder(flowers, mode="L")[0]["image"]
    colour = ImageFolder(flowers)[0]["image"].astype(np.float64)
    assert grey.shape == (6, 4, 1)
    np.testing.assert_allclose(grey[..., 0], colour @ [0.299, 0.587, 0.114], atol=1)


def test_a_broken_image_names_the_file(flowers):
    for content in (b"", b"\x89PNG\r\n\x1a\n", (flowers / "rose" / "1.png").read_bytes()[:60]):
        (flowers / "daisy" / "2.png").write_bytes(content)
        with pytest.raises(JaxdlError, match=r"daisy.2\.png is no readable image"):
            ImageFolder(flowers)[1]


def test_image_folder_errors(flowers, tmp_path):
    (flowers / "tulip").mkdir()
    with pytest.raises(JaxdlError, match="no images in tulip"):
        ImageFolder(flowers)
    with pytest.raises(JaxdlError, match="holds no sub-folders"):
        ImageFolder(flowers / "tulip")
    with pytest.raises(JaxdlError, match="is not a folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(JaxdlError, match="mode='CMYK'"):
        ImageFolder(flowers, mode="CMYK")
