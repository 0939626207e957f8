"""GPT-2 against transformers: outputs, gradients, three AdamW steps, and folders that go in and out unchanged."""

import dataclasses

import numpy as np
import pytest

from jaxdl.pretrained import PretrainedError, load, save
from jaxdl.pretrained.family import build_model
from jaxdl.pretrained.gpt2 import GPT2_FAMILY
from jaxdl.pretrained.verify import verify_parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 16, "vocab_size": 19, "num_labels": 4}
TOKENS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder, architecture="GPT2LMHeadModel", **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SIZES, **TOKENS, **changes})
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_gradients_and_steps_are_those_of_transformers(tmp_path, architecture):
    write(tmp_path, architecture)
    report = verify_parity(tmp_path, family=GPT2_FAMILY, tolerance=1e-8)
    assert report.is_equal, report


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 20, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False, "activation_function": "gelu"},
    ],
)
def test_settings_of_a_config(tmp_path, changes):
    write(tmp_path, **changes)
    report = verify_parity(tmp_path, family=GPT2_FAMILY, tolerance=1e-8)
    assert report.is_equal, report


def test_scanned_layers_load_the_same_file(tmp_path):
    write(tmp_path)
    report = verify_parity(tmp_path, family=GPT2_FAMILY, tolerance=1e-8, layout="scanned")
    assert report.is_equal, report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_and_out_again_byte_for_byte(tmp_path, architecture):
    theirs = write(tmp_path / "theirs", architecture)
    first = load(tmp_path / "theirs", family=GPT2_FAMILY)
    save(tmp_path / "ours", first.model, first.params, family=GPT2_FAMILY)
    second = load(tmp_path / "ours", family=GPT2_FAMILY)
    assert second.model == first.model
    save(tmp_path / "again", second.model, second.params, family=GPT2_FAMILY)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    back = getattr(transformers, architecture).from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        out, expected = back(ids)[0], theirs(ids)[0]
    np.testing.assert_array_equal(out.numpy(), expected.numpy())


def test_the_published_file_has_no_prefix_and_has_buffers(tmp_path):
    from safetensors.numpy import load_file, save_file

    write(tmp_path, "GPT2Model")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in tensors
    buffers = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)) for i in range(2)}
    save_file({**tensors, **buffers}, tmp_path / "model.safetensors")
    loaded = load(tmp_path, family=GPT2_FAMILY, head="causal_lm")
    assert sorted(loaded.ledger.ignored) == ["h.0.attn.bias", "h.1.attn.bias"]
    kernel = loaded.params["decoder"]["layer_1"]["attention"]["value"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["h.1.attn.c_attn.weight"][:, 24:])


def test_what_is_not_supported_is_named():
    config = {"model_type": "gpt2", **SIZES}
    bad = {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "embd_pdrop": 0.2}
    with pytest.raises(PretrainedError, match="3 problem") as error:
        build_model(GPT2_FAMILY, {**config, **bad}, "GPT2LMHeadModel", {})
    assert all(name in str(error.value) for name in bad)


def test_a_model_without_a_class_in_transformers_is_not_saved():
    model = build_model(GPT2_FAMILY, {"model_type": "gpt2", **SIZES}, "GPT2Model", {})
    with pytest.raises(PretrainedError, match="embed"):
        GPT2_FAMILY.to_config(dataclasses.replace(model, head="embed"))
    with pytest.raises(PretrainedError, match="attention_scale"):
        GPT2_FAMILY.to_config(dataclasses.replace(model, block=model.block.replace(attention_scale=0.3)))
