"""Llama, Mistral, Qwen and Gemma against transformers: outputs, gradients, AdamW steps, folders in and out.

Transformers computes norms, softmax and rotary angles in float32 whatever the model's dtype; here its `float32` is
float64, so that both sides are compared in float64 throughout.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxdl.models.positions import Rotary
from jaxdl.pretrained import PretrainedError, load, save
from jaxdl.pretrained.family import build_model
from jaxdl.pretrained.llama import LLAMA_FAMILIES
from jaxdl.pretrained.verify import verify_parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = {family.name: family for family in LLAMA_FAMILIES}
SIZES = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 19,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
GEMMA2 = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    },
}
CASES = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama bare": ("llama", "LlamaModel", {}),
    "llama classify": ("llama", "LlamaForSequenceClassification", {}),
    "llama tag": ("llama", "LlamaForTokenClassification", {}),
    "llama 3": ("llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama biases": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", "MistralForCausalLM", {"sliding_window": 4}),
    "mistral classify": ("mistral", "MistralForSequenceClassification", {"sliding_window": 4}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {}),
    "qwen2 window": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {}),
    "qwen3 bias": ("qwen3", "Qwen3ForSequenceClassification", {"attention_bias": True}),
    "gemma": ("gemma", "GemmaForCausalLM", {}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", GEMMA2),
    "gemma2 classify": ("gemma2", "Gemma2ForSequenceClassification", GEMMA2),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", GEMMA3),
    "gemma3 classify": ("gemma3_text", "Gemma3TextForSequenceClassification", GEMMA3),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def create(case, **changes):
    name, architecture, settings = CASES[case]
    torch.manual_seed(0)
    configs = {"gemma3_text": "Gemma3TextConfig", "gemma2": "Gemma2Config"}
    config_class = getattr(transformers, configs.get(name, f"{name.capitalize()}Config"))
    settings = {**SIZES, **settings, **changes}
    if name in ("qwen2",):
        settings["head_dim"] = 2
    model = getattr(transformers, architecture)(config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, FAMILIES[name]


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_steps_are_those_of_transformers(tmp_path, case, in_float64):
    model, family = create(case)
    model.double().save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    report = verify_parity(tmp_path, family=family, tolerance=1e-6, theirs=theirs)
    assert report.is_equal, report


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again_byte_for_byte(tmp_path, case):
    theirs, _ = create(case)
    theirs.save_pretrained(tmp_path / "theirs")
    first = load(tmp_path / "theirs")
    save(tmp_path / "ours", first.model, first.params)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == CASES[case][0]
    second = load(tmp_path / "ours")
    assert second.model == first.model
    save(tmp_path / "again", second.model, second.params)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        out, expected = back(ids)[0], theirs(ids)[0]
    np.testing.assert_array_equal(out.numpy(), expected.numpy())


PLAIN = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


def build(model_type, **settings):
    family = FAMILIES[model_type]
    architecture = next(name for name, head in family.architectures.items() if head == "causal_lm")
    return build_model(family, {"model_type": model_type, **PLAIN, "vocab_size": 19, **settings}, architecture, {})


def test_older_files_say_the_same_in_other_words():
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    old = build("llama", rope_theta=100.0, rope_scaling={**scaling, "type": "llama3"})
    assert old == build("llama", rope_parameters=LLAMA3)
    assert old.block.rotary == Rotary(100.0, 4.0, "llama3", 1.0, 3.0, 16)
    new = {name: value for name, value in GEMMA3.items() if name != "layer_types"}
    old = {"rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    rest = {"sliding_window_pattern": 2, "sliding_window": 4, "query_pre_attn_scalar": 9}
    assert build("gemma3_text", **old, **rest) == build("gemma3_text", **{**new, **rest})
    assert build("gemma3_text", **old, **rest).local_layers == (0, 2)
    assert build("gemma2", sliding_window=4).local_layers == (0, 2)
    assert build("gemma", hidden_act="gelu").block.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type='yarn' is not supported"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["needs a factor"]),
        ("llama", {"partial_rotary_factor": 0.5, "quantization_config": {"bits": 4}}, ["partial_rotary", "quantiz"]),
        ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        (
            "qwen3",
            {"layer_types": ["full_attention", "mamba", "sliding_attention"]},
            ["['mamba']", "sliding_window=None"],
        ),
    ],
)
def test_what_is_not_supported_is_named(model_type, settings, words):
    with pytest.raises(PretrainedError) as error:
        build(model_type, **settings)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_model_that_no_config_can_describe_is_not_saved():
    model = build("llama")
    to_config = FAMILIES["llama"].to_config
    assert to_config(dataclasses.replace(model, block=model.block.replace(dropout_rate=0.1)))["model_type"] == "llama"
    with pytest.raises(PretrainedError, match="embed_scale"):
        to_config(dataclasses.replace(model, embed_scale=2.0))
    with pytest.raises(PretrainedError, match=r"attention_scale"):
        to_config(dataclasses.replace(model, block=model.block.replace(attention_scale=0.3)))
    with pytest.raises(PretrainedError, match="rotary"):
        to_config(dataclasses.replace(model, block=model.block.replace(rotary=None)))
