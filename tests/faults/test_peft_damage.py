"""Adapters that are damaged, foreign or of settings that LoRA here does not have: one clear error each."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.finetune import lora
from jaxdl.finetune.lora import Lora
from jaxdl.paths import flatten
from jaxdl.pretrained import PretrainedError
from jaxdl.pretrained.peft import load_peft, save_peft
from jaxdl.pretrained.tensors import read_file, write_file
from tests.toy_family import TOY, Toy

TENSORS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "jaxdl_base.json"
TOKENS = np.zeros((1, 2), np.int32)
MODEL = Toy()
PREFIX = "base_model.model.toy."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with adapters of a fused module, a linear one and an embedding, and a head; and its base."""
    settings = Lora([(".*(query|key|value|output)/kernel", 2), ("embed/.*", 2), (".*", None)])
    base = MODEL.init(jax.random.key(0), TOKENS)["params"]
    params = lora.add(jax.random.key(1), base, settings, MODEL, TOKENS)
    params["adapters"] = jax.tree.map(lambda x: x + 0.5, params["adapters"])
    folder = tmp_path_factory.mktemp("made") / "adapter"
    save_peft(folder, MODEL, params, settings, saved=["head/.*"], family=TOY)
    return folder, base


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def base(made):
    return made[1]


def refused(folder, base, model=MODEL):
    before = {path: np.array(leaf) for path, leaf in flatten(base).items()}
    with pytest.raises(PretrainedError) as error:
        load_peft(folder, model, base, family=TOY)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert all(np.array_equal(before[path], leaf) for path, leaf in flatten(base).items())
    return str(error.value)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_tensors(folder, change):
    tensors = {name: np.array(x) for name, x in read_file(folder / TENSORS).items()}
    change(tensors)
    (folder / TENSORS).unlink()
    write_file(folder / TENSORS, tensors)


def test_the_undamaged_folder_loads(folder, base):
    params, settings, ledger = load_peft(folder, MODEL, base, family=TOY)
    assert len(ledger.loaded) == len(ledger.sizes) == 2 * 9 + 2
    assert (settings.alpha, params["adapters"]["embed"]["a"].shape) == (16.0, (8, 2))


def test_every_unsupported_setting_is_in_one_message(folder, base):
    wrong = {
        "peft_type": "IA3",
        "bias": "lora_only",
        "init_lora_weights": "pissa_niter_4",
        "layer_replication": [[0, 2]],
        "trainable_token_indices": [1],
        "target_parameters": ["x"],
        "lora_bias": True,
        "alora_invocation_tokens": [1, 2],
        "of_a_later_version": {"x": 1},
        "r": 0,
        "lora_alpha": "8",
        "rank_pattern": {"(": 2.5},
        "lora_dropout": 1.5,
    }
    change_config(folder, **wrong)
    text = refused(folder, base)
    assert text.startswith(f"{folder / CONFIG}: 14 problem(s)")  # the pattern has two: its rank, its regex
    for name, value in wrong.items():
        assert name in text or str(value) in text, name
    assert "only 'LORA'; merge it into its base with PEFT" in text
    assert "path_initial_model_for_weight_conversion" in text


def test_settings_of_a_wrong_kind(folder, base):
    wrong = {
        "rank_pattern": [1],
        "alpha_pattern": "a",
        "target_modules": [1],
        "exclude_modules": {"a": 1},
        "modules_to_save": "head",
        "layers_to_transform": ["1"],
        "layers_pattern": 3,
    }
    change_config(folder, **wrong)
    text = refused(folder, base)
    assert text.startswith(f"{folder / CONFIG}: 7 problem(s)")
    assert all(f"{name}={value!r} must be a" in text for name, value in wrong.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_replication": [], "trainable_token_indices": None, "lora_bias": False, "loftq_config": {}},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2", "revision": "main"},
        {"init_lora_weights": "gaussian", "inference_mode": False, "auto_mapping": {"base_model_class": "Toy"}},
    ],
)
def test_settings_without_effect_are_no_obstacle(folder, base, fields):
    change_config(folder, **fields)
    load_peft(folder, MODEL, base, family=TOY)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "adapter_config.json cannot be read: No such file or directory; an adapter needs it."),
        ("", "adapter_config.json is no JSON"),
        ("[1]", "adapter_config.json is no JSON object; fetch it again."),
        ("{}", "peft_type=None is not supported, only 'LORA'"),
    ],
)
def test_a_broken_config(folder, base, text, part):
    (folder / CONFIG).unlink()
    if text is not None:
        (folder / CONFIG).write_text(text)
    assert part in refused(folder, base)


def test_a_pickle_is_refused_with_the_remedy_and_never_opened(folder, base):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle ran')",))

    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    text = refused(folder, base)
    assert "holds its weights as a pickle only (adapter_model.bin)" in text
    assert "PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW, safe_serialization=True)" in text


def test_no_tensors_or_under_another_name(folder, base):
    (folder / TENSORS).rename(folder / "model.safetensors")
    assert f"has no {TENSORS}; it has model.safetensors, so rename the one you mean." in refused(folder, base)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(folder, base, keep):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:keep])
    assert f"{folder / TENSORS} is damaged" in refused(folder, base)


def test_every_tensor_is_used_once_or_named(folder, base):
    """Each tensor in turn is taken out, and then renamed: both are errors that say its name."""
    names = list(read_file(folder / TENSORS))
    assert len(names) == 2 * 5 + 2
    for name in names:
        change_tensors(folder, lambda tensors, name=name: tensors.update({f"{name}x": tensors.pop(name)}))
        text = refused(folder, base)
        assert f"{name}x" in text
        assert f"{name} is not in the file" in text
        change_tensors(folder, lambda tensors, name=name: tensors.update({name: tensors.pop(f"{name}x")}))
    load_peft(folder, MODEL, base, family=TOY)


def test_every_damage_is_listed_in_one_message(folder, base):
    def damage(tensors):
        tensors[f"{PREFIX}h.0.prjo.lora_A.weight"] = tensors.pop(f"{PREFIX}h.0.proj.lora_A.weight")
        tensors[f"{PREFIX}h.0.prjo.lora_B.weight"] = tensors.pop(f"{PREFIX}h.0.proj.lora_B.weight")
        tensors[f"{PREFIX}h.1.proj.lora_A.weight"] = np.ones((2, 5), np.float32)
        tensors[f"{PREFIX}h.1.proj.lora_B.weight"] = np.ones((4, 2), np.int64)
        tensors[f"{PREFIX}h.1.attn.lora_magnitude_vector"] = np.ones(12, np.float32)
        tensors[f"{PREFIX}h.1.attn.lora_B.bias"] = np.ones(12, np.float32)
        tensors[f"{PREFIX}words.lora_A.weight"] = np.ones((2, 4), np.float32)
        tensors["toy.h.0.attn.lora_A.weight"] = np.ones((2, 4), np.float32)
        tensors["base_model.model.classifier.weight"] = np.ones((3, 4), np.float32)
        tensors["base_model.model.score.weight"] = np.ones((3, 4), np.float32)

    change_tensors(folder, damage)
    text = refused(folder, base)
    for part in [
        "toy.h.0.attn.lora_A.weight does not begin with 'base_model.model.'",
        f"{PREFIX}h.1.attn.lora_B.bias is no part of LoRA that is known here",
        f"{PREFIX}h.0.prjo has an adapter, but the model has no such place for one; nearest: toy.h.0.proj",
        "base_model.model.score.weight has no place in the model; nearest: ",
        f"{PREFIX}h.1.proj.lora_A.weight has shape (2, 5), but r=2 and encoder/layer_1/output/kernel (4, 4) take (2, 4",
        f"{PREFIX}h.1.proj.lora_B.weight is int64; only floats",
        f"{PREFIX}h.1.attn.lora_magnitude_vector is in the file, but an adapter of this linear with use_dora=False has",
        f"{PREFIX}words.lora_A.weight is in the file, but an adapter of this embedding has lora_embedding_A",
        "toy.h.0.proj is named by target_modules of the config, but the file has no tensors of it",
        "base_model.model.classifier.weight is float32[3, 4] in the file, but head/kernel takes floats [3, 3].",
    ]:
        assert part in text, part


def test_a_config_at_odds_with_the_file(folder, base):
    change_config(folder, target_modules=["attn", "words", "dense"], r=4, rank_pattern={}, use_dora=True)
    text = refused(folder, base)
    assert "toy.h.0.proj has tensors in the file, but target_modules of the config does not name it" in text
    assert "toy.pooler.dense is named by target_modules of the config, but the file has no tensors of it" in text
    assert f"{PREFIX}h.0.attn.lora_magnitude_vector is not in the file" in text
    assert f"{PREFIX}h.0.attn.lora_A.weight has shape (6, 4), but r=4 and" in text


def test_an_adapter_for_another_model(folder, base):
    small = Toy(width=2, n_layers=1)
    text = refused(folder, small.init(jax.random.key(0), TOKENS)["params"], small)
    assert f"{PREFIX}h.1.attn has an adapter, but the model has no such place for one; nearest: " in text
    assert "has shape (6, 4), but r=6 and encoder/layer_0/query/kernel" in text


def test_parameters_of_another_model(folder, base):
    other = Toy(width=2).init(jax.random.key(0), TOKENS)["params"]
    text = refused(folder, {name: tree for name, tree in other.items() if name != "class_token"})
    assert "the parameters lack class_token of the model; nearest: " in text
    assert "embed/embedding has shape (8, 2) in the parameters, but the model says (8, 4)." in text


def test_another_base_of_the_same_shapes(folder, base):
    other = jax.tree.map(lambda x: x + 1, base)
    text = refused(folder, other)
    assert "it was made for another base: 25 of 25 leaves differ; load that base, or delete jaxdl_base.json." in text
    assert "... and 21 more leaves that differ." in text


@pytest.mark.parametrize("text", ["", "[]", "3", '{"class_token": 3}', "{"])
def test_a_damaged_record_of_the_base(folder, base, text):
    (folder / BASE).write_text(text)
    assert f"{folder / BASE} is damaged" in refused(folder, base)


def test_parameters_that_have_adapters_already(folder, base):
    text = refused(folder, {**base, "adapters": {"head": {"a": jnp.ones(2)}}})
    assert "params have 'adapters' already; merge them first (lora.merge), or take them out." in text


def test_a_file_without_an_adapter(folder, base):
    change_config(folder, target_modules="all-linear")
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".lora_" in name])
    assert "the file holds no adapter, only whole leaves" in refused(folder, base)


def test_a_tied_output_that_differs_from_its_embedding(tmp_path):
    model, settings = Toy(head="words"), Lora([("embed/.*", 2), (".*", None)])
    base = model.init(jax.random.key(0), TOKENS)["params"]
    params = lora.add(jax.random.key(1), base, settings, model, TOKENS)
    save_peft(tmp_path / "a", model, params, settings, family=TOY)
    ones = np.ones((2, 4), np.float32)
    change_tensors(tmp_path / "a", lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": ones}))
    text = refused(tmp_path / "a", base, model)
    assert "toy.words, lm_head: the weight embed/embedding has one adapter here wherever it is used" in text
    assert "but their adapters differ; merge it with PEFT" in text
    save_peft(tmp_path / "b", model, params, settings, family=TOY)
    change_config(tmp_path / "b", alpha_pattern={"lm_head": 3})
    assert "but their adapters differ; merge it with PEFT" in refused(tmp_path / "b", base, model)
