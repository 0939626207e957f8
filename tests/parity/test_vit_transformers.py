"""ViT against transformers: outputs, gradients, AdamW steps, other image sizes, and folders that go in and out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.patches import resize_positions
from jaxdl.paths import flatten
from jaxdl.pretrained import PretrainedError, load, save
from jaxdl.pretrained.verify import verify_parity
from jaxdl.pretrained.vit import VIT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20}
IMAGES = {"image_size": 12, "patch_size": 4, "num_channels": 2}
ARCHITECTURES = ["ViTModel", "ViTForImageClassification"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def write(folder, architecture="ViTForImageClassification", **changes):
    torch.manual_seed(0)
    labels = {} if "id2label" in changes else {"num_labels": 5}
    config = transformers.ViTConfig(**{**SIZES, **IMAGES, **labels, **changes})
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def verify(folder, architecture="ViTForImageClassification", **overrides):
    """Their "eager" attention takes the softmax in float32; SDPA stays in float64.

    The largest differences, some 1e-8, are those of the biases of keys, whose gradient is rounding only.
    """
    theirs = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="sdpa")
    return verify_parity(folder, family=VIT, tolerance=1e-6, theirs=theirs, **overrides)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_gradients_and_steps_are_those_of_transformers(tmp_path, architecture):
    write(tmp_path, architecture)
    report = verify(tmp_path, architecture)
    assert report.is_equal, report


@pytest.mark.parametrize("changes", [{"qkv_bias": False, "hidden_act": "relu"}, {"patch_size": 3, "num_channels": 1}])
def test_settings_of_a_config(tmp_path, changes):
    write(tmp_path, **changes)
    report = verify(tmp_path)
    assert report.is_equal, report


def test_scanned_layers_load_the_same_file(tmp_path):
    write(tmp_path)
    report = verify(tmp_path, layout="scanned")
    assert report.is_equal, report


@pytest.mark.parametrize(
    "size", [(12, 24), *(pytest.param(size, marks=pytest.mark.proof) for size in ((20, 20), (8, 8), (4, 16)))]
)
def test_another_image_size_interpolates_the_positions_as_transformers_does(tmp_path, size):
    write(tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa").double()
    image = np.random.default_rng(0).normal(size=(2, *size, 2))
    with jax.enable_x64(True):
        ours = load(tmp_path, family=VIT, dtype=jnp.float64)
        loss_fn = lambda params: jnp.sum(ours.model.apply({"params": params}, image) ** 2)  # noqa: E731
        loss, gradients = jax.value_and_grad(loss_fn)(ours.params)
    logits = theirs(torch.tensor(image.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True).logits
    (logits**2).sum().backward()
    np.testing.assert_allclose(loss, (logits**2).sum().item(), rtol=1e-12)
    expected = theirs.vit.embeddings.position_embeddings.grad[0].numpy()
    np.testing.assert_allclose(gradients["embed"]["position"]["embedding"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (7, 2)), ((14, 14), (24, 24)), ((4, 4), (4, 4)), ((1, 1), (3, 3))])
def test_resized_positions_are_pytorchs(old, new):
    table = np.random.default_rng(0).normal(size=(1 + old[0] * old[1], 6))
    grid = torch.tensor(table[1:]).reshape(1, *old, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    with jax.enable_x64(True):
        ours = np.asarray(resize_positions(jnp.asarray(table), old, new))
    np.testing.assert_allclose(ours[1:], expected.permute(0, 2, 3, 1).reshape(-1, 6), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(ours[0], table[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_and_out_again_byte_for_byte(tmp_path, architecture):
    theirs = write(tmp_path / "theirs", architecture, id2label={0: "cat", 1: "dog", 2: "cow"})
    first = load(tmp_path / "theirs", family=VIT)
    assert not first.ledger.fresh
    assert not first.ledger.dropped
    save(tmp_path / "ours", first.model, first.params, family=VIT)
    second = load(tmp_path / "ours", family=VIT)
    assert second.model == first.model
    assert second.model.labels == (("cat", "dog", "cow") if architecture != "ViTModel" else ())
    ours, again = flatten(first.params), flatten(second.params)
    assert all(np.array_equal(ours[path], again[path]) for path in ours)
    save(tmp_path / "again", second.model, second.params, family=VIT)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    image = torch.randn(2, 2, 12, 12)
    with torch.no_grad():
        np.testing.assert_array_equal(back.eval()(image)[0], theirs(image)[0])


def test_tensors_in_the_new_spelling_load_too(tmp_path):
    from safetensors.numpy import save_file

    theirs = write(tmp_path)
    old = load(tmp_path, family=VIT)
    spelt = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    assert "vit.layers.1.attention.q_proj.weight" in spelt
    save_file(spelt, tmp_path / "model.safetensors")
    new = load(tmp_path, family=VIT)
    assert all(map(np.array_equal, jax.tree.leaves(old.params), jax.tree.leaves(new.params)))


def test_a_new_head_for_another_number_of_classes(tmp_path):
    write(tmp_path)
    loaded = load(tmp_path, n_outputs=3, fresh=["head/.*"], drop=["classifier.*"], family=VIT)
    assert loaded.params["head"]["kernel"].shape == (12, 3)
    assert loaded.model.labels == ()
    with pytest.raises(PretrainedError, match=r"classifier\.weight"):
        load(tmp_path, n_outputs=3, family=VIT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": [12, 24]}, "no square"),
        ({"hidden_act": "mish"}, "'mish' is unknown"),
        ({"pooler_act": "relu"}, "pooler_act='relu' is not supported"),
    ],
)
def test_configs_that_mean_another_network_are_refused(changes, said):
    config = {**SIZES, **IMAGES, "architectures": ["ViTModel"], **changes}
    with pytest.raises(PretrainedError, match=said):
        VIT.to_model(config)


@pytest.mark.parametrize(
    ("field", "value"), [("head", "pool"), ("pooling", "mean"), ("has_embed_norm", True), ("has_patch_bias", False)]
)
def test_a_model_without_a_class_in_transformers_is_not_saved(field, value):
    model = VIT.to_model({**SIZES, **IMAGES, "architectures": ["ViTModel"]})
    with pytest.raises(PretrainedError, match=field):
        VIT.to_config(dataclasses.replace(model, has_pooler=False, **{field: value}))
    with pytest.raises(PretrainedError, match=r"block\.window"):
        VIT.to_config(dataclasses.replace(model, block=model.block.replace(window=2)))
