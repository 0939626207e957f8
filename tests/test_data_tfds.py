"""TFDS without TensorFlow and without a network: mocked stock sets, a real prepared set, and what is refused."""

import socket
import sys
import time

import numpy as np
import pytest

from jaxdl.data import ArraySource, Pipeline, TfdsSource, load_tfds
from jaxdl.data.text import read_tfds
from jaxdl.data.tfds import _within
from jaxdl.errors import JaxdlError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]
)
def test_stock_sets(name, shape):
    with tfds.testing.mock_data(num_examples=7):
        source = load_tfds(name, "train")
        assert len(source) == 7
        batch = Pipeline(source, 5)[0]
    assert batch["image"].shape == (5, *shape)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    assert 0 <= batch["label"].min() <= batch["label"].max() < 10


class JaxdlSquares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Not registered, so that it is found by its files alone, as on a user's machine."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
            "weight": tfds.features.Scalar(np.float64),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"image": np.full((2, 2, 1), i, np.uint8), "label": i % 3, "weight": i / 2, "name": f"no {i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = JaxdlSquares(data_dir=folder, file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return folder


def test_texts_and_labels_of_a_set_are_documents(prepared):
    documents = read_tfds("jaxdl_squares", "test", text="name", data_dir=prepared)
    assert sorted(zip(documents.columns["text"], documents.columns["label"], strict=True)) == [
        (f"no {i}", i % 3) for i in range(4)
    ]
    with pytest.raises(JaxdlError, match="no key 'nam'; nearest: name"):
        read_tfds("jaxdl_squares", "test", text="nam", data_dir=prepared)


def test_a_set_prepared_on_disk_is_read(prepared):
    source = load_tfds("jaxdl_squares", "train", data_dir=prepared)
    by_value = {int(example["image"][0, 0, 0]): example for example in (source[row] for row in range(len(source)))}
    assert sorted(by_value) == list(range(10))
    for i, example in by_value.items():
        assert (int(example["label"]), float(example["weight"]), example["name"]) == (i % 3, i / 2, f"no {i}".encode())
    assert source[0]["label"].dtype == np.int32
    assert source[0]["weight"].dtype == np.float32


def test_slices_and_memory(prepared):
    source = load_tfds("jaxdl_squares:1.0.0", "train[2:5]", data_dir=prepared)
    arrays = source.in_memory()
    assert isinstance(arrays, ArraySource)
    assert {key: value.shape for key, value in arrays.arrays.items()} == {
        "image": (3, 2, 2, 1),
        "label": (3,),
        "weight": (3,),
        "name": (3,),
    }
    for row in range(3):
        np.testing.assert_array_equal(arrays.arrays["image"][row], source[row]["image"])
    for step in range(3):
        one, other = Pipeline(source, 2)[step], Pipeline(arrays, 2)[step]
        assert one["name"].tolist() == other["name"].tolist()
        np.testing.assert_array_equal(one["image"], other["image"])


def test_an_unknown_split_lists_the_real_ones(prepared):
    with pytest.raises(JaxdlError, match=r"split 'valid' of 'jaxdl_squares' cannot be read .*splits are train, test"):
        load_tfds("jaxdl_squares", "valid", data_dir=prepared)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "imdb_reviews"])
def test_a_set_that_is_not_prepared_is_one_quick_error(name, tmp_path):
    start = time.monotonic()
    with pytest.raises(JaxdlError) as caught:
        load_tfds(name, "train", data_dir=tmp_path)
    assert time.monotonic() - start < 5
    for words in (f"{name!r} is not prepared", str(tmp_path), f"tfds build {name}", "--file_format=array_record"):
        assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_asked_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(JaxdlError, match="'kmnist' is not prepared"):
        load_tfds("kmnist", "train")


def test_an_unknown_name_brings_the_nearest(tmp_path):
    with pytest.raises(JaxdlError, match=r"knows no data set 'fashion_mnits'; nearest names: fashion_mnist"):
        load_tfds("fashion_mnits", "train", data_dir=tmp_path)


def test_a_set_prepared_as_tfrecord_is_refused_with_the_remedy(prepared, tmp_path):
    info = next(prepared.rglob("dataset_info.json"))
    folder = tmp_path / "jaxdl_squares" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text((info.parent / "features.json").read_text())
    (folder / "dataset_info.json").write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(JaxdlError, match=r"not prepared in a random-access format under .*--file_format=array_record"):
        load_tfds("jaxdl_squares", "train", data_dir=tmp_path)


def test_a_folder_that_does_not_answer_is_given_up():
    start = time.monotonic()
    with pytest.raises(JaxdlError, match=r"the set did not answer within timeout_s=0\.1"):
        _within(0.1, lambda: time.sleep(1.5), "the set")
    assert time.monotonic() - start < 1


def test_an_error_inside_keeps_its_type():
    with pytest.raises(ZeroDivisionError):
        _within(5, lambda: 1 / 0, "the set")
    assert _within(5, lambda: None, "nothing") is None


def test_types_are_narrowed_where_nothing_is_lost():
    row = {"a": 2**40, "b": -5, "c": True, "d": 0.5, "e": "text", "f": [1, 2], "g": np.arange(3), "h": np.uint8(7)}
    narrowed = TfdsSource([row])[0]
    dtypes = {key: np.asarray(value).dtype for key, value in narrowed.items() if key not in "ef"}
    assert dtypes == {"a": np.int64, "b": np.int32, "c": bool, "d": np.float32, "g": np.int32, "h": np.uint8}
    assert (narrowed["e"], narrowed["f"]) == ("text", [1, 2])
