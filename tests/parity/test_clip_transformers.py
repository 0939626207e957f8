"""CLIP against transformers, both towers and each alone: outputs, gradients, AdamW steps, the loss, and folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.contrastive import info_nce, sigmoid_pairs
from jaxdl.models import CNN
from jaxdl.paths import flatten
from jaxdl.pretrained import PretrainedError, load, save
from jaxdl.pretrained.clip import CLIP_FAMILY, CLIP_TEXT, CLIP_VISION
from jaxdl.pretrained.verify import verify_parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20}
TEXT |= {"vocab_size": 37, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 30, "projection_dim": 5}
VISION = {"hidden_size": 15, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 18}
VISION |= {"image_size": 12, "patch_size": 4, "num_channels": 2, "projection_dim": 5}
FAMILIES = {
    "CLIPModel": CLIP_FAMILY,
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def write(folder, architecture="CLIPModel", **text_changes):
    torch.manual_seed(0)
    text = {**TEXT, **text_changes}
    if architecture == "CLIPModel":
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=7)
    elif "Text" in architecture:
        config = transformers.CLIPTextConfig(**text)
    else:
        config = transformers.CLIPVisionConfig(**VISION)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def verify(folder, architecture="CLIPModel", **overrides):
    """Their "eager" attention takes the softmax in float32; SDPA stays in float64.

    The largest differences, some 1e-8, are those of the biases of keys, whose gradient is rounding only.
    """
    theirs = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="sdpa")
    return verify_parity(folder, family=FAMILIES[architecture], tolerance=1e-6, theirs=theirs, **overrides)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_outputs_gradients_and_steps_are_those_of_transformers(tmp_path, architecture):
    write(tmp_path, architecture)
    report = verify(tmp_path, architecture)
    assert report.is_equal, report


def test_the_old_rule_reads_the_highest_id(tmp_path):
    write(tmp_path, "CLIPTextModel", eos_token_id=2, hidden_act="gelu")
    report = verify(tmp_path, "CLIPTextModel")
    assert report.is_equal, report
    assert load(tmp_path, family=CLIP_TEXT).model.end_token is None


def test_scanned_layers_load_the_same_file(tmp_path):
    write(tmp_path, "CLIPTextModel")
    report = verify(tmp_path, "CLIPTextModel", layout="scanned")
    assert report.is_equal, report


@pytest.mark.parametrize("architecture", FAMILIES)
def test_in_and_out_again_byte_for_byte(tmp_path, architecture):
    family = FAMILIES[architecture]
    theirs = write(tmp_path / "theirs", architecture)
    first = load(tmp_path / "theirs", family=family)
    assert not first.ledger.fresh
    assert not first.ledger.dropped
    save(tmp_path / "ours", first.model, first.params, family=family)
    second = load(tmp_path / "ours", family=family)
    assert second.model == first.model
    ours, again = flatten(first.params), flatten(second.params)
    assert all(np.array_equal(ours[path], again[path]) for path in ours)
    save(tmp_path / "again", second.model, second.params, family=family)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    inputs = family.inputs(np.random.default_rng(0), first.model)[1]
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        a, b = (family.their_outputs(side(**inputs), inputs) for side in (back.eval(), theirs))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_text_encoder_whose_names_have_the_prefix(tmp_path):
    """As transformers before 5 wrote it, for example in image generators."""
    from safetensors.numpy import load_file, save_file

    write(tmp_path, "CLIPTextModel")
    new = load(tmp_path, family=CLIP_TEXT)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {f"text_model.{name}": value for name, value in tensors.items()}
    old["text_model.embeddings.position_ids"] = np.arange(9)[None]
    save_file(old, tmp_path / "model.safetensors")
    loaded = load(tmp_path, family=CLIP_TEXT)
    assert loaded.ledger.ignored == ("text_model.embeddings.position_ids",)
    assert all(map(np.array_equal, jax.tree.leaves(new.params), jax.tree.leaves(loaded.params)))


def test_a_config_that_says_only_what_differs(tmp_path):
    config = {"architectures": ["CLIPModel"], "text_config": {"eos_token_id": 2}, "vision_config": {"patch_size": 16}}
    model, expected = CLIP_FAMILY.to_model(config), transformers.CLIPConfig()
    assert model.text.block.width == expected.text_config.hidden_size
    assert model.text.vocab_size == expected.text_config.vocab_size
    assert model.vision.block.heads == (expected.vision_config.num_attention_heads,) * 2 + (64,)
    assert (model.vision.n_layers, model.vision.image_size, model.vision.patch_size, model.width) == (12, 224, 16, 512)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_the_losses_and_their_gradients(loss):
    logits = np.random.default_rng(0).normal(size=(6, 6)) * 3
    theirs = torch.tensor(logits, requires_grad=True)
    if loss == "info_nce":
        expected = transformers.models.clip.modeling_clip.image_text_contrastive_loss(theirs.T)
    else:  # as SiglipModel computes it
        eye = torch.eye(6, dtype=torch.float64)
        expected = -torch.nn.functional.logsigmoid((2 * eye - 1) * theirs).sum(-1).mean()
    expected.backward()
    loss_fn = {"info_nce": info_nce, "sigmoid": sigmoid_pairs}[loss]

    def mean_loss(logits):
        total, weight = loss_fn(logits)
        return total / weight

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(mean_loss)(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-6, atol=1e-9)


def test_what_transformers_does_not_have_is_not_saved(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = CLIP_FAMILY.to_model(config)
    assert CLIP_FAMILY.to_model(CLIP_FAMILY.to_config(model)) == model
    cases = {
        "CNN has no form": dataclasses.replace(model, vision=CNN(n_outputs=5)),
        "bias_init=-10.0": dataclasses.replace(model, bias_init=-10.0),
        "end_token=2": dataclasses.replace(model, text=dataclasses.replace(model.text, end_token=2)),
        r"block\.dropout_rate=0\.3": dataclasses.replace(
            model, text=dataclasses.replace(model.text, block=model.text.block.replace(dropout_rate=0.3))
        ),
        "has_patch_bias=True": dataclasses.replace(
            model, vision=dataclasses.replace(model.vision, has_patch_bias=True)
        ),
    }
    for said, other in cases.items():
        with pytest.raises(PretrainedError, match=said):
            CLIP_FAMILY.to_config(other)
