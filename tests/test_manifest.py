"""Hashes, the self digest and the verification of files, without Orbax and without a device."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.checkpoint.leaves import describe, differences, place, to_host
from jaxdl.checkpoint.manifest import (
    CheckpointCorrupt,
    CheckpointError,
    FileRecord,
    LeafRecord,
    Manifest,
    check_leaves,
    hash_array,
    hash_file,
    hash_files,
    parse,
    read,
    render,
    to_json,
    verify,
    write,
)

KERNEL = LeafRecord((2, 3), "float32", "ab", None)
EXAMPLE = Manifest(
    7,
    {"params/kernel": KERNEL, "rng": LeafRecord((), "key<fry>", "cd", "threefry2x32")},
    {"d/0": FileRecord(3, "ef")},
    {"note": "é", "nested": {"10": 1, "2": [1.5, None]}},
    {"loss": 0.1},
)


def test_array_hash_is_sha256_of_header_and_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert hash_array(array) == hashlib.sha256(b"float32[2, 3]" + array.tobytes()).hexdigest()
    assert hash_array(np.asfortranarray(array)) == hash_array(array)
    assert hash_array(np.zeros((0, 3), np.int8)) == hashlib.sha256(b"int8[0, 3]").hexdigest()
    assert hash_array(np.bool_(True)[()].reshape(())) == hashlib.sha256(b"bool[]\x01").hexdigest()


def test_array_hash_tells_dtype_shape_sign_of_zero_and_nan_payload_apart():
    zeros = np.zeros(4, np.float32)
    nan = np.array([0x7FC00000], np.uint32)
    others = [zeros.view(np.int32), zeros.reshape(2, 2), -zeros, zeros.astype(jnp.bfloat16), zeros[:3]]
    others += [nan.view(np.float32), (nan + 1).view(np.float32)]
    assert len({hash_array(array) for array in [zeros, *others]}) == 8


def test_file_hashes(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"abc")
    (tmp_path / "empty").touch()
    (tmp_path / "manifest.json").write_text("not hashed")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the vector of FIPS 180-2
    assert hash_file(tmp_path / "d" / "x") == FileRecord(3, sha256)
    assert hash_files(tmp_path) == {"d/x": FileRecord(3, sha256), "empty": FileRecord(0, hashlib.sha256().hexdigest())}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_render_and_parse_are_inverse(metadata):
    manifest = EXAMPLE._replace(metadata=to_json("metadata", metadata))
    assert parse(render(manifest)) == manifest
    assert manifest.metadata == metadata


def test_the_text_is_plain_json_with_everything_in_it():
    body = json.loads(render(EXAMPLE))
    assert body["leaves"]["params/kernel"] == {"shape": [2, 3], "dtype": "float32", "sha256": "ab", "key_impl": None}
    assert (body["step"], body["format"], body["files"]["d/0"]["size"]) == (7, 1, 3)


def test_every_single_bit_flip_of_the_text_is_damage(tmp_path):
    write(tmp_path, EXAMPLE)
    original = (tmp_path / "manifest.json").read_bytes()
    for position in range(len(original)):
        content = bytearray(original)
        content[position] ^= 1 << (position % 8)
        (tmp_path / "manifest.json").write_bytes(bytes(content))
        with pytest.raises(CheckpointCorrupt):
            read(tmp_path)


@pytest.mark.parametrize("change", [str.strip, lambda s: s + "\n", lambda s: s.replace("\n", "\r\n"), str.upper])
def test_harmless_looking_edits_are_damage(change):
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json is damaged"):
        parse(change(render(EXAMPLE)))


def test_a_newer_format_is_not_called_damage():
    with pytest.raises(CheckpointError, match="has format 2, this jaxdl reads up to 1; update jaxdl") as error:
        parse(render(EXAMPLE._replace(format=2)))
    assert not isinstance(error.value, CheckpointCorrupt)


def test_verify_lists_every_bad_file(tmp_path):
    for name in ("same", "longer", "other", "gone", "folder"):
        (tmp_path / name).write_text("abc")
    manifest = EXAMPLE._replace(files=hash_files(tmp_path))
    write(tmp_path, manifest)
    assert verify(tmp_path) == manifest
    (tmp_path / "stray").touch()
    (tmp_path / "longer").write_text("abcd")
    (tmp_path / "other").write_text("abd")
    (tmp_path / "gone").unlink()
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointCorrupt) as error:
        verify(tmp_path)
    text = str(error.value)
    assert "longer has 4 bytes, 3 were written" in text
    assert "other is altered" in text
    assert "gone is missing" in text
    assert "folder cannot be read" in text
    assert "same" not in text
    assert "stray" not in text


def test_a_failed_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    write(tmp_path, EXAMPLE)
    monkeypatch.setattr("jaxdl.checkpoint.manifest.render", lambda manifest: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, EXAMPLE._replace(step=8))
    assert read(tmp_path) == EXAMPLE


def test_to_json_normalises_and_refuses():
    given = {"tuple": (1, 2), "np": np.float32(0.5), "array": np.eye(2, dtype=np.int32), "nan": np.nan, "in": [np.inf]}
    assert to_json("metrics", given) == {
        "tuple": [1, 2],
        "np": 0.5,
        "array": [[1, 0], [0, 1]],
        "nan": None,
        "in": [None],
    }
    assert to_json("metrics", None) == {}
    assert to_json("metrics", {"jax": jnp.float32(0.25)}) == {"jax": 0.25}
    loop: dict = {}
    loop["self"] = loop
    for wrong in ({1: 2}, {"a": {2: 3}}, {"a": {1}}, {"a": b"x"}, loop):
        with pytest.raises(CheckpointError, match="metadata must be JSON"):
            to_json("metadata", wrong)


def test_check_leaves_names_the_bad_ones():
    arrays = {"a": np.arange(3.0), "b": np.arange(3), "c": np.arange(3)}
    records = {path: LeafRecord((3,), "x", hash_array(array)) for path, array in arrays.items()}
    check_leaves(records, arrays)
    with pytest.raises(CheckpointCorrupt, match=r"not the values that were saved: a, c$"):
        check_leaves(records, arrays | {"a": np.nextafter(arrays["a"], 9), "c": arrays["c"].astype(np.int32)})


def test_differences_are_complete_and_name_the_nearest():
    saved = {"enc/kernel": KERNEL, "enc/bias": LeafRecord((3,), "float32"), "old": LeafRecord((), "int32")}
    wanted = {"enc/kernel": LeafRecord((2, 3), "bfloat16"), "enc/bais": LeafRecord((3,), "float32")}
    assert differences(saved, saved) == []
    problems = differences(saved, wanted)
    assert problems[0] == "enc/kernel is float32[2,3] in the checkpoint, bfloat16[2,3] in the model."
    assert problems[1].startswith("enc/bais float32[3] is not in the checkpoint; nearest there: enc/bias")
    assert problems[2].startswith("enc/bias float32[3] is only in the checkpoint; nearest in the model: enc/bais")
    assert problems[3].startswith("old int32[] is only in the checkpoint")
    assert len(problems) == 4


def test_host_copies_own_their_memory():
    tree = {"jax": jnp.arange(4.0), "numpy": np.arange(4.0)}
    arrays, _ = to_host(tree)
    tree["numpy"][:] = -1
    tree["jax"].delete()
    for array in arrays.values():
        assert array.flags.owndata
        np.testing.assert_array_equal(array, np.arange(4.0))


def test_place_keeps_the_kind_of_like():
    array, record = np.array(2.5, np.float32), describe({"x": jnp.float32(0)})["x"]
    assert type(place(array, record, 0.0)) is float
    assert type(place(array, record, np.float32(0))) is np.float32
    assert type(place(array, record, np.zeros((), np.float32))) is np.ndarray
    for like in (jnp.asarray(0.0), jnp.float32(0)):
        assert place(array, record, like).aval == like.aval
