"""ViT: paths, patches, pooling, other image sizes, the same numbers by another road, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.checks import ModelError
from jaxdl.models.patches import PatchEmbed, resize_positions
from jaxdl.models.text_encoder import Encoded
from jaxdl.models.vit import ViT, vit_base, vit_block
from jaxdl.paths import flatten

BLOCK = vit_block(12, 3, 20)
IMAGE = np.random.default_rng(0).normal(size=(2, 12, 8, 3)).astype(np.float32)


def make(**fields):
    return ViT(**{"block": BLOCK, "n_layers": 2, "image_size": 12, "patch_size": 4, **fields})


def init(model, image=IMAGE):
    return jax.jit(model.init)(jax.random.key(0), image)


def test_paths_and_shapes():
    shapes = {path: leaf.shape for path, leaf in flatten(init(make(head="classify", n_outputs=5))["params"]).items()}
    own = {path: shape for path, shape in shapes.items() if not path.startswith("encoder/layer_")}
    assert own == {
        "embed/class_token": (12,),
        "embed/patch/bias": (12,),
        "embed/patch/kernel": (48, 12),
        "embed/position/embedding": (10, 12),
        "encoder/final_norm/bias": (12,),
        "encoder/final_norm/scale": (12,),
        "head/bias": (5,),
        "head/kernel": (12, 5),
    }
    assert shapes["encoder/layer_1/attention/query/kernel"] == (12, 12)


def test_heads_and_poolings():
    fields = {
        "hidden": {},
        "pool": {"head": "pool"},
        "mean": {"head": "pool", "pooling": "mean"},
        "project": {"head": "project", "n_outputs": 4},
    }
    key = jax.random.key(0)
    outputs = {name: jax.eval_shape(make(**own).init_with_output, key, IMAGE)[0].shape for name, own in fields.items()}
    assert outputs == {"hidden": (2, 7, 12), "pool": (2, 12), "mean": (2, 12), "project": (2, 4)}
    mean = make(pooling="mean")
    variables = init(mean)
    assert "class_token" not in variables["params"]["embed"]
    pooled = make(head="pool", pooling="mean").apply(variables, IMAGE)
    np.testing.assert_allclose(pooled, mean.apply(variables, IMAGE).mean(axis=1), rtol=1e-5, atol=1e-6)


def test_patches_are_a_convolution():
    model = make()
    params = init(model)["params"]["embed"]
    kernel = params["patch"]["kernel"].reshape(4, 4, 3, 12)
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(IMAGE, kernel, (4, 4), "VALID", dimension_numbers=dimensions)
    ours = model.apply({"params": {"embed": params}}, IMAGE, method=lambda m, x: m.embed(x))
    position = resize_positions(params["position"]["embedding"], (3, 3), (3, 2))
    patches = ours[:, 1:] - position[None, 1:] - params["patch"]["bias"].reshape(1, 1, -1)
    np.testing.assert_allclose(patches, expected.reshape(2, 6, 12), atol=1e-5)


def test_interpolation_keeps_constants_and_planes():
    """Keys' kernel is exact on linear functions inside, and on constants everywhere."""
    x, y = np.meshgrid(np.arange(6.0), np.arange(6.0))
    table = jnp.asarray(np.stack([np.ones(36), (2 * x + 3 * y).ravel()], axis=1), jnp.float32)
    new = np.asarray(resize_positions(table, (6, 6), (12, 12))).reshape(12, 12, 2)
    np.testing.assert_allclose(new[..., 0], 1.0, rtol=1e-5)
    place = (np.arange(12) + 0.5) / 2 - 0.5
    plane = 2 * place[None, :] + 3 * place[:, None]
    np.testing.assert_allclose(new[4:8, 4:8, 1], plane[4:8, 4:8], rtol=1e-2, atol=0.26)  # a = -0.75 is not quite linear
    same = resize_positions(table, (6, 6), (6, 6))
    np.testing.assert_allclose(same, table, atol=1e-5)


def test_the_class_token_sees_all_patches_and_position_matters():
    model = make(head="pool")
    variables = init(model)
    apply = jax.jit(model.apply)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(variables, x) ** 2)))(jnp.asarray(IMAGE))
    assert bool((jnp.abs(gradient).reshape(2, 3, 4, 2, 4, 3).sum((2, 4, 5)) > 0).all())
    moved = np.roll(IMAGE, 4, axis=1)
    assert not np.allclose(apply(variables, IMAGE), apply(variables, moved), atol=1e-4)
    variables["params"]["embed"]["position"]["embedding"] *= 0
    np.testing.assert_allclose(apply(variables, IMAGE), apply(variables, moved), atol=1e-5)


def test_has_pooler_returns_both():
    model = make(has_pooler=True)
    variables = init(model)
    out = model.apply(variables, IMAGE)
    assert isinstance(out, Encoded)
    dense = variables["params"]["pooler"]
    expected = np.tanh(out.hidden[:, 0] @ dense["kernel"] + dense["bias"].reshape(1, -1))
    np.testing.assert_allclose(out.pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_scanned_and_remat_layers_give_the_same_gradient(remat):
    from jaxdl.models.transformer import stack_layers

    plain = make(head="pool")
    params = init(plain)["params"]

    def gradient(model, params):
        return jax.grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGE) ** 2))(params)

    expected = stack_layers(gradient(plain, params))
    ours = gradient(make(head="pool", layout="scanned", remat=remat), stack_layers(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), ours, expected)


def test_dropout_is_on_in_training_only():
    model = make(block=BLOCK.replace(dropout_rate=0.5), head="pool")
    variables = init(model)
    first, second = (model.apply(variables, IMAGE, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(model.apply(variables, IMAGE), make(head="pool").apply(variables, IMAGE))


def test_bfloat16_keeps_float32_parameters_and_logits():
    model = make(block=BLOCK.replace(dtype=jnp.bfloat16), head="classify", n_outputs=5)
    variables = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert model.apply(variables, IMAGE).dtype == jnp.float32
    assert make(block=BLOCK.replace(dtype=jnp.bfloat16)).apply(variables, IMAGE).dtype == jnp.bfloat16


def test_all_problems_of_the_fields_at_once():
    bad = {"patch_size": 5, "head": "clasify", "pooling": "max", "layout": "scan", "n_outputs": 3}
    with pytest.raises(ModelError, match="5 problem") as error:
        make(**bad)
    assert "did you mean 'classify'" in str(error.value)
    with pytest.raises(ModelError, match="is_causal=False"):
        make(block=BLOCK.replace(is_causal=True))
    with pytest.raises(ModelError, match="2 labels for n_outputs=3"):
        make(head="classify", n_outputs=3, labels=("a", "b"))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((2, 12, 10, 3), np.float32), "no whole number of 4 x 4 patches"),
        (np.zeros((2, 12, 12, 3), np.uint8), "pixels are uint8"),
        (np.zeros((2, 3, 12, 12), np.float32), "n_channels=3; channels are the last axis"),
        (np.zeros((12, 12, 3), np.float32), "must be .batch, height, width, channels."),
    ],
)
def test_images_that_do_not_fit(image, said):
    with pytest.raises(ModelError, match=said):
        make().init(jax.random.key(0), image)


def test_the_published_size():
    model = vit_base(head="classify", n_outputs=1000)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_567_656


def test_the_order_in_memory_that_a_gpu_is_told_changes_no_number(monkeypatch):
    embed = PatchEmbed(vit_block(8, 2, 16), 2, 4, has_class_token=True, has_bias=True, has_norm=False)
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = embed.init(jax.random.key(1), image)

    def loss(variables):
        return jnp.sum(embed.apply(variables, image) ** 2)

    plain = jax.jit(jax.value_and_grad(loss))(variables)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()  # the platform is no part of a traced function's key
    assert "layout_constraint" in str(jax.make_jaxpr(loss)(variables))
    told = jax.jit(jax.value_and_grad(loss))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), told, plain)
