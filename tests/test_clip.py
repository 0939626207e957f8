"""CLIP: paths, the end token, what padding may not change, both towers by value, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.contrastive import contrast
from jaxdl.models import CNN, make_activation
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.models.checks import ModelError
from jaxdl.models.clip import CLIP, CLIPText, CLIPVision, Contrast, clip_block
from jaxdl.paths import flatten

END = 20
TOKENS = np.array([[3, 4, 5, END, 0], [6, END, 0, 0, 0], [7, 8, 9, 10, END]])
IMAGE = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def make_text(**fields):
    own = {"n_layers": 2, "vocab_size": 23, "n_positions": 6, "end_token": END}
    return CLIPText(clip_block(12, 3, 2), **{**own, **fields})


def make_vision(**fields):
    return CLIPVision(clip_block(15, 3, 1), **{"n_layers": 1, "image_size": 8, "patch_size": 4, **fields})


@pytest.fixture(scope="module")
def clip():
    model = CLIP(make_text(), make_vision(), 7)
    return model, init_model(model, jax.random.key(0), TOKENS, image=IMAGE)[0]


def test_paths_and_shapes(clip):
    shapes = {path: leaf.shape for path, leaf in flatten(clip[1]).items()}
    own = {path: shape for path, shape in shapes.items() if "/layer_" not in path}
    assert own == {
        "logit_scale": (),
        "text/embed/position/embedding": (6, 12),
        "text/embed/token/embedding": (128, 12),
        "text/encoder/final_norm/bias": (12,),
        "text/encoder/final_norm/scale": (12,),
        "text_projection/kernel": (12, 7),
        "vision/embed/class_token": (15,),
        "vision/embed/norm/bias": (15,),
        "vision/embed/norm/scale": (15,),
        "vision/embed/patch/kernel": (48, 15),
        "vision/embed/position/embedding": (5, 15),
        "vision/encoder/final_norm/bias": (15,),
        "vision/encoder/final_norm/scale": (15,),
        "vision_projection/kernel": (15, 7),
    }
    assert shapes["text/encoder/layer_1/mlp/up/kernel"] == (12, 48)


def test_outputs(clip):
    model, params = clip
    out = model.apply({"params": params}, TOKENS, image=IMAGE)
    assert isinstance(out, Contrast)
    assert (out.text_embeds.shape, out.image_embeds.shape, out.logits.shape) == ((3, 7), (4, 7), (4, 3))
    for embeds in out[:2]:
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(out.logits, out.image_embeds @ out.text_embeds.T / 0.07, rtol=1e-4, atol=1e-5)
    text = model.apply({"params": params}, TOKENS, method="embed_text")
    np.testing.assert_allclose(text, out.text_embeds, rtol=1e-5)
    image = model.apply({"params": params}, IMAGE, method="embed_image")
    np.testing.assert_allclose(image, out.image_embeds, rtol=1e-5)


def test_what_follows_the_end_token_changes_nothing():
    model = make_text()
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    pooled = model.apply(variables, TOKENS)
    changed = np.array(TOKENS)
    changed[0, 4], changed[1, 2:] = 11, 12
    np.testing.assert_allclose(model.apply(variables, changed), pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.apply(variables, TOKENS, mask=TOKENS > 0), pooled, rtol=1e-5, atol=1e-6)
    changed[1, 0] = 13
    assert not np.allclose(model.apply(variables, changed)[1], pooled[1], atol=1e-4)


def test_the_end_is_the_first_end_token_or_the_highest_id():
    first, highest, hidden = make_text(), make_text(end_token=None), make_text(head=None)
    variables = jax.jit(first.init)(jax.random.key(0), TOKENS)
    states = hidden.apply(variables, TOKENS)
    expected = np.stack([states[0, 3], states[1, 1], states[2, 4]])
    for model in (first, highest):
        np.testing.assert_array_equal(model.apply(variables, TOKENS), expected)
    twice = np.array([[3, END, END, 22, 0]])
    np.testing.assert_allclose(first.apply(variables, twice)[0], hidden.apply(variables, twice)[0, 1], rtol=1e-6)
    np.testing.assert_allclose(highest.apply(variables, twice)[0], hidden.apply(variables, twice)[0, 3], rtol=1e-6)


def test_a_row_without_an_end_is_refused_outside_jit():
    model = make_text()
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    with pytest.raises(ModelError, match=r"rows \[1\] lack end_token=20"):
        model.apply(variables, np.array([[3, END], [3, 4]]))


def test_projection_of_a_tower_alone(clip):
    model, params = clip
    text = make_text(head="project", n_outputs=7)
    alone = {**params["text"], "head": params["text_projection"]}
    vectors = text.apply({"params": alone}, TOKENS)
    expected = model.apply({"params": params}, TOKENS, method="embed_text")
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), expected, rtol=1e-4, atol=1e-6)


def test_quick_gelu():
    x = jnp.linspace(-3, 3, 13)
    np.testing.assert_allclose(make_activation("quick_gelu")(x), np.asarray(x) / (1 + np.exp(-1.702 * x)), rtol=1e-5)


def test_the_sigmoid_loss_has_a_bias_to_learn():
    model = CLIP(make_text(), make_vision(), 7, scale_init=10.0, bias_init=-10.0)
    params, _ = init_model(model, jax.random.key(0), TOKENS, image=IMAGE)
    out = jax.jit(model.apply)({"params": params}, TOKENS, image=IMAGE)
    np.testing.assert_allclose(out.logits, 10 * out.image_embeds @ out.text_embeds.T - 10, rtol=1e-4, atol=1e-5)
    loss_fn = make_loss_fn(model, contrast(loss="sigmoid"), inputs=("tokens", "image"), train=True)
    batch = {"tokens": TOKENS, "image": IMAGE[:3]}
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, jax.random.key(1)).total))(params)
    assert abs(float(gradient["logit_bias"])) > 1


def test_towers_by_value_learn_pairs():
    """A CNN as image tower with running statistics; four pairs that differ are told apart."""
    model = CLIP(make_text(), CNN(features=(8,), n_outputs=12, norm="batch"), 8)
    batch = {"tokens": jnp.array([[3, END], [4, END], [5, END], [6, END]]), "image": jnp.asarray(IMAGE)}
    params, extra = init_model(model, jax.random.key(0), batch["tokens"], image=batch["image"])
    assert "batch_stats" in extra
    loss_fn = make_loss_fn(model, contrast(), inputs=("tokens", "image"), train=True)
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry

            def mean_loss(params):
                out = loss_fn(params, extra, batch, jax.random.key(0))
                return out.total / out.weight, out.sums["text_accuracy"]

            (loss, accuracy), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=60)[1]

    losses, accuracy = train(params)
    assert float(losses[-1]) < 0.1 < 1.0 < float(losses[0])
    assert float(accuracy.total[-1]) == 4.0


def test_all_problems_of_the_fields_at_once():
    with pytest.raises(ModelError, match="4 problem") as error:
        make_text(end_token=23, head="pol", layout="scan", n_layers=0)
    assert "did you mean 'pool'" in str(error.value)
    with pytest.raises(ModelError, match="2 problem"):
        CLIP(make_text(), make_vision(), 0, scale_init=0.0)
