"""Folders in and out: models, heads, dtypes, layouts, ledgers, and names of the hub."""

import json
import socket
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdl.data.text import Tokenizer
from jaxdl.errors import JaxdlError
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.paths import flatten
from jaxdl.pretrained import FAMILIES, PretrainedError, folder, hub, load, save
from jaxdl.pretrained.tensors import read_folder, write_folder
from tests.toy_family import TOY, Toy, tensors_of, to_config

TOKENS = np.array([[1, 4, 0], [2, 2, 3]])


def write(path, tensors, **config):
    path.mkdir(exist_ok=True)
    head = "words" if "lm_head.bias" in tensors else "classes"
    (path / "config.json").write_text(json.dumps({**to_config(Toy(head=head)), **config}))
    write_folder(path, tensors)
    return path


@pytest.fixture
def classes(tmp_path):
    return write(tmp_path / "classes", tensors_of())


def refused(*args, **kwargs):
    with pytest.raises(PretrainedError) as error:
        load(*args, family=TOY, **kwargs)
    assert error.value.__cause__ is None
    return str(error.value)


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_load_gives_model_params_tokenizer_and_ledger(classes):
    model, params, tokenizer, ledger = load(classes, family=TOY)
    assert model == Toy()
    assert tokenizer is None
    assert str(ledger) == f"loaded 27/27 leaves (100.0 % of parameters) from {classes}"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert model.apply({"params": params}, TOKENS).shape == (2, 3)


@pytest.mark.parametrize("head", [None, "classes", "words"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100])
def test_saved_and_loaded_again_is_the_same_bytes(tmp_path, head, max_shard_bytes):
    model = Toy(head=head, n_layers=3)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    params["embed"]["embedding"] = params["embed"]["embedding"].at[5:].set(0)
    save(tmp_path / "a", model, params, family=TOY, max_shard_bytes=max_shard_bytes)
    again, loaded, _, _ = load(tmp_path / "a", family=TOY)
    assert again == model
    assert_same(loaded, params)
    save(tmp_path / "b", again, loaded, family=TOY, max_shard_bytes=max_shard_bytes)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert any("toy." in name for name in read_folder(tmp_path / "a")) == (head is not None)


def test_a_scanned_model_reads_and_writes_the_same_file(classes, tmp_path):
    model, params, _, _ = load(classes, family=TOY)
    scanned, stacked, _, ledger = load(classes, family=TOY, is_scanned=True)
    assert stacked["encoder"]["layers"]["key"]["kernel"].shape == (2, 4, 4)
    assert "encoder/layer_1/key/kernel" in ledger.loaded
    a, b = model.apply({"params": params}, TOKENS), scanned.apply({"params": stacked}, TOKENS)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    save(tmp_path / "out", scanned, stacked, family=TOY)
    out, before = read_folder(tmp_path / "out"), read_folder(classes)
    assert out.keys() == before.keys()
    assert all(out[name].tobytes() == before[name].tobytes() for name in out)


def test_dtypes(tmp_path):
    path = write(tmp_path / "half", tensors_of(dtype=ml_dtypes.bfloat16))
    kinds = [({}, "float32", "float32"), ({"dtype": None}, "bfloat16", "bfloat16")]
    kinds += [({"dtype": jnp.float16}, "float16", "float16")]
    kinds += [({"dtype": jnp.bfloat16, "param_dtype": jnp.float32}, "bfloat16", "float32")]
    for asked, dtype, param_dtype in kinds:
        model, params, _, _ = load(path, family=TOY, **asked)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {param_dtype}
        assert model.apply({"params": params}, TOKENS).dtype == dtype
    save(tmp_path / "out", model, params, family=TOY, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    out, before = read_folder(tmp_path / "out"), read_folder(path)
    assert all(out[name].tobytes() == before[name].tobytes() for name in before)


def test_a_new_head_is_initialised_from_the_seed(classes):
    rules = {"n_outputs": 7, "fresh": ["head/.*", "gates/.*"], "family": TOY}
    model, params, _, ledger = load(classes, **rules)
    assert model.n_outputs == 7
    assert ledger.fresh == ("gates/kernel", "head/bias", "head/kernel")
    initial = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    np.testing.assert_array_equal(params["head"]["kernel"], initial["head"]["kernel"])
    assert_same(load(classes, **rules).params, params)
    other = load(classes, **rules, seed=1).params
    assert not np.array_equal(other["head"]["kernel"], params["head"]["kernel"])
    np.testing.assert_array_equal(other["pooler"]["kernel"], params["pooler"]["kernel"])
    assert "takes (7, 7)" in refused(classes, n_outputs=7)


def test_another_head_by_its_short_or_its_long_name(classes):
    rules = {"fresh": ["word_bias"], "drop": ["classifier.*", "gate.*", "up.*"], "family": TOY}
    for name in ({"head": "words"}, {"architecture": "ToyForWords"}):
        model, _, _, ledger = load(classes, **name, **rules)
        assert model.head == "words"
        assert len(ledger.dropped) == 6
    text = refused(classes, head="wrods")
    assert "head='wrods' is unknown to toy; nearest: words" in text
    assert "ToyForWords (head='words')" in text
    assert "nearest: ToyForWords" in refused(classes, architecture="ToyForWord")
    assert "are both given" in refused(classes, head="words", architecture="ToyForWords")


def test_overrides_are_checked(classes):
    assert load(classes, family=TOY, dtype=jnp.bfloat16).model.dtype == jnp.bfloat16
    text = refused(classes, dropuot_rate=0.0, is_scaned=True)
    assert "dropuot_rate=0.0 is unknown" in text
    assert "is_scaned=True is unknown; nearest: is_scanned" in text


def test_rules_must_be_lists(classes):
    assert "fresh='head/.*' is no list" in refused(classes, fresh="head/.*")
    assert "drop=[1] is no list of regular expressions" in refused(classes, drop=[1])


def test_save_refuses_what_is_not_the_models_and_a_folder_in_use(classes, tmp_path):
    model, params, _, _ = load(classes, family=TOY)
    with pytest.raises(PretrainedError, match="is not empty"):
        save(classes, model, params, family=TOY)
    wrong = {**params, "lora": {"a": jnp.ones(2)}, "class_token": jnp.ones(9)}
    del wrong["pooler"]
    with pytest.raises(PretrainedError) as error:
        save(tmp_path / "new", model, wrong, family=TOY)
    for part in ["pooler/bias is missing", "lora/a (2,) is no leaf of the model", "class_token has shape (9,)"]:
        assert part in str(error.value)
    with pytest.raises(PretrainedError, match="Toy belongs to no family"):
        save(tmp_path / "new", model, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes"]


def test_a_save_that_fails_leaves_no_folder(classes, tmp_path, monkeypatch):
    model, params, _, _ = load(classes, family=TOY)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "new", model, params, family=TOY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes"]


def test_a_local_folder_opens_no_socket(classes, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(classes, family=TOY)


def test_a_hub_name_without_a_network_fails_within_seconds(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.perf_counter()
    text = refused("nobody/no-such-model")
    assert time.perf_counter() - start < 15
    assert "nobody/no-such-model is no folder here and cannot be had from the hub" in text
    assert "https://huggingface.co/nobody/no-such-model elsewhere, put them in a folder" in text


def test_a_hub_name_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'jaxdl[hub]'" in refused("nobody/no-such-model")


def test_a_hub_name_fetches_safe_files_only(monkeypatch, classes):
    library = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(library.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(library, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(classes))
    assert load("some/model", family=TOY).model == Toy()
    assert (asked["name"], asked["allow_patterns"]) == ("some/model", ["*.safetensors", "*.json", "*.txt"])
    assert not hub.is_hub_name("../model")


def test_a_network_of_no_family_is_refused_with_the_known_ones(tmp_path):
    folder = write(tmp_path / "out", tensors_of(), model_type="mamba")
    with pytest.raises(
        PretrainedError, match=r"model_type='mamba' is unknown; known are bert, .*for another, give family="
    ):
        load(folder)


def test_a_tokenizer_comes_along_and_must_fit_the_embedding(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.train(["one two three"], kind="byte_level", vocab_size=270)
    for name, size in (("fits", tokenizer.vocab_size), ("small", tokenizer.vocab_size - 1)):
        model = Bert(bert_block(8, 2, 12), n_layers=1, vocab_size=size, n_positions=8)
        params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
        save(tmp_path / name, model, params, tokenizer)
    assert load(tmp_path / "fits").model.has_pooler is False
    found = load(tmp_path / "fits").tokenizer
    assert (found.special, found.encode("two").tolist()) == (tokenizer.special, tokenizer.encode("two").tolist())
    with pytest.raises(
        JaxdlError, match=r"tokenizer has ids up to \d+ and the embedding \d+ rows; use the tokenizer that"
    ):
        load(tmp_path / "small")


def test_families_know_each_other_apart():
    model_types = [name for family in FAMILIES for name in family.model_types]
    assert len(model_types) == len(set(model_types))
    for family in FAMILIES:
        assert family.bare is None or family.bare in family.architectures, family.name
        assert len(set(family.architectures.values())) == len(family.architectures), family.name


def test_a_backbone_of_a_family_that_shares_its_class_has_no_prefix(tmp_path):
    block = llama_block(width=8, n_heads=2, hidden=12, has_query_key_norm=True, head_size=4)
    model = Llama(block, n_layers=1, vocab_size=128, head=None)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    save(tmp_path / "out", model, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"]
    assert "layers.0.self_attn.q_norm.weight" in read_folder(tmp_path / "out")
    assert_same(load(tmp_path / "out").params, params)
