"""Safetensors files against the safetensors library, in both directions; shards, dtypes, atomic writing."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from jaxdl.pretrained import PretrainedError
from jaxdl.pretrained import tensors as disk

safetensors = pytest.importorskip("safetensors.numpy")

RNG = np.random.default_rng(0)
TENSORS = {
    "float32": RNG.normal(size=(3, 5)).astype(np.float32),
    "float64": RNG.normal(size=(2, 1, 2)),
    "float16": RNG.normal(size=7).astype(np.float16),
    "bfloat16": RNG.normal(size=(3, 3)).astype(ml_dtypes.bfloat16),
    "int64": np.arange(3),
    "int8": np.int8([-1, 5]),
    "bool": np.array([True, False, True]),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": RNG.normal(size=(3, 5)).astype(np.float32).T,
    "unicode é/ü": np.zeros(1, np.float32),
}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (x.dtype, x.shape), name
        assert ours[name].tobytes() == x.tobytes(), name


def test_the_library_reads_what_we_write(tmp_path):
    disk.write_folder(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(safetensors.load_file(tmp_path / disk.FILE), TENSORS)
    with safetensors.safe_open(tmp_path / disk.FILE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.save_file({name: np.asarray(x, order="C") for name, x in TENSORS.items()}, tmp_path / disk.FILE)
    assert_same(disk.read_folder(tmp_path), TENSORS)


def test_arrays_are_views_of_the_file_and_read_only(tmp_path):
    disk.write_folder(tmp_path, {"a": np.arange(1000.0), "b": np.ones(3, np.float32)})
    tensors = disk.read_folder(tmp_path)
    assert not tensors["a"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


def test_shards(tmp_path):
    tensors = {f"w{i}": np.full(10, i, np.float32) for i in range(5)}  # 40 bytes each
    tensors["large"] = np.ones(100, np.float32)
    disk.write_folder(tmp_path, tensors, max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / disk.INDEX).read_text())
    assert index["metadata"]["total_size"] == 600
    assert index["weight_map"]["w2"] == "model-00002-of-00004.safetensors"
    assert_same(disk.read_folder(tmp_path), tensors)
    assert sorted(safetensors.load_file(tmp_path / names[0])) == ["w0", "w1"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    disk.write_folder(tmp_path, {"a": np.ones(2, np.float32)})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write_folder(tmp_path, {"a": np.zeros(9, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert disk.read_folder(tmp_path)["a"].tolist() == [1, 1]


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(PretrainedError, match="a is complex64; cast it to a float"):
        disk.write_folder(tmp_path, {"a": np.zeros(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []
