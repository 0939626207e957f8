"""Folders of pretrained weights that are damaged: each gets one clear error, from the command too, and no traceback."""

import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from jaxdl.pretrained import PretrainedError, load
from jaxdl.pretrained.tensors import FILE, INDEX, read_folder, write_folder
from tests.faults.evidence import ROOT
from tests.toy_family import TOY, Toy, tensors_of, to_config


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_config(Toy())))
    write_folder(tmp_path, tensors_of())
    return tmp_path


@pytest.fixture
def shards(folder):
    (folder / FILE).unlink()
    write_folder(folder, tensors_of(), max_shard_bytes=300)
    return folder


def refused(folder):
    with pytest.raises(PretrainedError) as error:
        load(folder, family=TOY)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value)


def with_header(folder, change):
    """Writes the file again with another header over the same data."""
    data = (folder / FILE).read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -400])
def test_a_truncated_file(folder, keep):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:keep])
    text = refused(folder)
    assert f"{folder / FILE} is damaged" in text
    assert text.endswith("fetch it again.")


def test_bytes_behind_the_end(folder):
    with (folder / FILE).open("ab") as file:
        file.write(b"more")
    assert "its header speaks of" in refused(folder)


def test_every_flipped_byte_of_the_header_is_refused_or_harmless(folder):
    """1 of 8 bits at each of 60 places of length and header: an error of ours, or a name that does not fit."""
    data = bytearray((folder / FILE).read_bytes())
    n = int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for place in [*range(8), *rng.integers(8, 8 + n, 60)]:
        flipped = data.copy()
        flipped[place] ^= 1 << int(rng.integers(0, 7))
        (folder / FILE).write_bytes(flipped)
        try:
            tensors = read_folder(folder)
        except PretrainedError:
            continue
        assert {x.shape for x in tensors.values()} == {x.shape for x in tensors_of().values()}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda header: b"{not json", "its header is no JSON"),
        (lambda header: b"[1, 2]", "its header is no JSON object"),
        (lambda header: b"\xff\xfe", "its header is no JSON"),
        (lambda header: b"[" * 100_000, "is damaged"),
        (lambda header: header["toy.cls"].pop("shape"), "'shape'"),
        (lambda header: header.update({"toy.cls": 3}), "its header is broken"),
        (lambda header: header["toy.cls"].update(dtype="F4"), "toy.cls has the dtype 'F4'; known are F64"),
        (lambda header: header["toy.cls"].update(shape=[1, -1, 4]), "toy.cls has the shape [1, -1, 4]"),
        (lambda header: header["toy.cls"].update(shape=[1, 1, 5]), "toy.cls takes bytes"),
        (lambda header: header["toy.cls"].update(data_offsets=[0, 16]), "but should take"),
        (lambda header: header["toy.cls"].update(data_offsets=[0]), "is damaged"),
        (lambda header: header["toy.cls"].update(data_offsets=["a", "b"]), "is damaged"),
    ],
)
def test_a_broken_header(folder, change, part):
    with_header(folder, change)
    text = refused(folder)
    assert part in text
    assert str(folder / FILE) in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "epoch=3.ckpt"])
def test_a_pickle_is_refused_with_the_remedy_and_never_opened(folder, name):
    (folder / FILE).unlink()

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle ran')",))

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    text = refused(folder)
    assert f"holds its weights as a pickle only ({name})" in text
    assert "save_pretrained(NEW, safe_serialization=True)" in text


def test_no_weights_or_weights_of_another_name(folder):
    (folder / FILE).rename(folder / "adapter.safetensors")
    assert f"has no {FILE} and no {INDEX}; it has adapter.safetensors, so rename" in refused(folder)
    (folder / "adapter.safetensors").unlink()
    assert refused(folder).endswith(f"has no {FILE} and no {INDEX}.")


def test_shards_that_are_missing_short_or_at_odds_with_the_index(shards):
    index = json.loads((shards / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) >= 4
    (shards / files[0]).unlink()
    data = (shards / files[1]).read_bytes()
    (shards / files[1]).write_bytes(data[:-3])
    moved = next(name for name, file in index["weight_map"].items() if file == files[2])
    index["weight_map"][moved] = files[3]
    index["weight_map"]["toy.ghost"] = files[3]
    (shards / INDEX).write_text(json.dumps(index))
    text = refused(shards)
    for part in [
        f"{files[0]} is missing: ",
        f"{shards / files[1]} is damaged",
        f"{moved} is in {files[2]}, but the index says {files[3]}",
        f"{moved} is in the index under {files[3]}, but not in that file",
        f"toy.ghost is in the index under {files[3]}, but not in that file",
    ]:
        assert part in text, part


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"])
def test_a_broken_index(shards, text):
    (shards / INDEX).write_text(text)
    assert "is no index of tensors" in refused(shards)


def test_an_index_does_not_lead_out_of_the_folder(shards):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["toy.cls"] = "../secret.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    assert "'../secret.safetensors', which is no plain file name" in refused(shards)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (None, "config.json cannot be read: No such file or directory"),
        ("", "config.json is no JSON"),
        ("[1]", "config.json is no JSON object"),
        ('{"architectures": ["ToyForClassification"]}', "config.json of a toy model lacks 'vocab_size'"),
        ('{"architectures": []}', "config.json names 0 architectures; say which by head="),
        ('{"architectures": ["A", "B"]}', "config.json names 2 architectures"),
        ('{"architectures": ["ToyForClasification"]}', "nearest: ToyForClassification"),
    ],
)
def test_a_broken_config(folder, config, part):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert part in refused(folder)


def test_sources_that_are_no_folder(folder, tmp_path):
    assert "is a file; give the folder" in refused(folder / FILE)
    assert "does not exist; give a folder" in refused(tmp_path / "nowhere")


def test_the_command_ends_in_2_with_one_message(folder):
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    config = {**to_config(Toy()), "model_type": "no-such-type"}
    (folder / "config.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "jaxdl", "verify-parity", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
