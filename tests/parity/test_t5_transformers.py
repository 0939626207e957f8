"""T5 1.0 and 1.1 against transformers: outputs, gradients, AdamW steps, decoding, folders that go in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.paths import flatten
from jaxdl.pretrained import PretrainedError, load, save
from jaxdl.pretrained.t5 import T5_FAMILY
from jaxdl.pretrained.verify import verify_parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 37, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3}
RELATIVE = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
VERSIONS = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
}
ARCHITECTURES = ["T5Model", "T5ForConditionalGeneration", "T5EncoderModel"]
CASES = [(version, architecture) for version in VERSIONS for architecture in ARCHITECTURES]


@pytest.fixture(autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64_norm(monkeypatch):
    """Their norm takes the variance in float32, which would hide differences below 1e-7."""
    norm = transformers.models.t5.modeling_t5.T5LayerNorm

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(norm, "forward", forward)


def write(folder, architecture, version="1.0", **changes):
    torch.manual_seed(0)
    config = transformers.T5Config(**{**SIZES, **RELATIVE, **VERSIONS[version], "decoder_start_token_id": 0, **changes})
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        if version == "1.1" and hasattr(model, "lm_head"):  # transformers ties it at first, and not when it loads two
            model.lm_head.weight = torch.nn.Parameter(torch.randn(37, 12))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.usefixtures("float64_norm")
@pytest.mark.parametrize(("version", "architecture"), CASES)
def test_outputs_gradients_and_steps_are_those_of_transformers(tmp_path, version, architecture):
    write(tmp_path, architecture, version)
    report = verify_parity(tmp_path, family=T5_FAMILY, tolerance=1e-9)
    assert report.is_equal, report


def test_without_a_change_to_their_norm(tmp_path):
    write(tmp_path, "T5ForConditionalGeneration", "1.1")
    report = verify_parity(tmp_path, family=T5_FAMILY, tolerance=1e-4)
    assert report.is_equal, report


@pytest.mark.usefixtures("float64_norm")
@pytest.mark.parametrize("changes", [{"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-3}, {"d_kv": 4}])
def test_settings_of_a_config(tmp_path, changes):
    write(tmp_path, "T5ForConditionalGeneration", **changes)
    report = verify_parity(tmp_path, family=T5_FAMILY, tolerance=1e-9)
    assert report.is_equal, report


@pytest.mark.usefixtures("float64_norm")
def test_scanned_layers_load_the_same_file(tmp_path):
    write(tmp_path, "T5ForConditionalGeneration")
    report = verify_parity(tmp_path, family=T5_FAMILY, tolerance=1e-9, layout="scanned")
    assert report.is_equal, report


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_decoding_with_a_cache_gives_the_tokens_of_generate(tmp_path, version):
    theirs = write(tmp_path, "T5ForConditionalGeneration", version)
    ours = load(tmp_path, family=T5_FAMILY)
    tokens = np.random.default_rng(1).integers(2, 37, (3, 9))
    mask = np.ones((3, 9), np.int32)
    mask[1, 5:] = 0
    own = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
    expected = theirs.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **own).numpy()
    assert len(np.unique(expected[:, 1:])) > 2

    @jax.jit
    def advance(params, tokens, mask, last, cache):
        given = {"mask": mask, "inputs": last, "cache": cache}
        logits, cache = ours.model.apply({"params": params}, tokens, **given)
        return jnp.argmax(logits[:, -1].at[:, 1].set(-jnp.inf), axis=-1)[:, None], cache  # no end before the minimum

    cache = ours.model.init_cache(3, 8, n_memory=9)
    last, found = np.zeros((3, 1), np.int32), []
    for step in range(8):
        source = (tokens, mask) if step == 0 else (None, None)
        last, cache = advance(ours.params, *source, last, cache)
        found.append(last)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected[:, 1:])


@pytest.mark.parametrize(("version", "architecture"), CASES)
def test_in_and_out_again_byte_for_byte(tmp_path, version, architecture):
    theirs = write(tmp_path / "theirs", architecture, version)
    first = load(tmp_path / "theirs", family=T5_FAMILY)
    assert not first.ledger.fresh
    assert not first.ledger.dropped
    save(tmp_path / "ours", first.model, first.params, family=T5_FAMILY)
    second = load(tmp_path / "ours", family=T5_FAMILY)
    assert second.model == first.model
    ours, again = flatten(first.params), flatten(second.params)
    assert all(np.array_equal(ours[path], again[path]) for path in ours)
    save(tmp_path / "again", second.model, second.params, family=T5_FAMILY)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert back.config.scale_decoder_outputs is (version == "1.0")
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids} | ({} if architecture == "T5EncoderModel" else {"decoder_input_ids": ids[:, :3]})
    with torch.no_grad():
        np.testing.assert_array_equal(back.eval()(**inputs)[0], theirs(**inputs)[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_encoder_of_a_whole_model(tmp_path, version):
    theirs = write(tmp_path, "T5ForConditionalGeneration", version)
    ours = load(tmp_path, family=T5_FAMILY, architecture="T5EncoderModel")
    assert any(name.startswith("decoder.") for name in ours.ledger.ignored)
    tokens = np.array([[5, 6, 7]])
    expected = theirs.encoder(torch.tensor(tokens)).last_hidden_state.detach()
    np.testing.assert_allclose(ours.model.apply({"params": ours.params}, tokens), expected, atol=1e-5)


def test_a_config_of_before_transformers_5_says_both_by_one_field(tmp_path):
    write(tmp_path, "T5ForConditionalGeneration", "1.1")
    config = json.loads((tmp_path / "config.json").read_text())
    new = T5_FAMILY.to_model(config)
    del config["scale_decoder_outputs"]
    config["tie_word_embeddings"] = False
    assert T5_FAMILY.to_model(config) == new
    assert (new.is_tied, new.is_output_scaled) == (False, False)


def test_an_unknown_gate_is_refused():
    with pytest.raises(PretrainedError, match="feed_forward_proj='doubly-gelu'"):
        T5_FAMILY.to_model({**SIZES, "architectures": ["T5Model"], "feed_forward_proj": "doubly-gelu"})


def test_a_model_without_a_form_in_transformers_is_not_saved():
    model = T5_FAMILY.to_model({**SIZES, "architectures": ["T5Model"]})
    assert T5_FAMILY.to_model(T5_FAMILY.to_config(model)) == model
    with pytest.raises(PretrainedError, match=r"block\.hidden_dropout_rate=0\.3"):
        T5_FAMILY.to_config(dataclasses.replace(model, block=model.block.replace(hidden_dropout_rate=0.3)))
    with pytest.raises(PretrainedError, match="is_tied=True would be loaded as False"):
        T5_FAMILY.to_config(dataclasses.replace(model, is_output_scaled=False))
