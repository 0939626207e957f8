"""The chunked loss of a language model against the plain one, and what it saves."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import choices, losses
from jaxdl.models import MLP, ModelError
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.models.llama import Llama, llama_block
from jaxdl.optim import make_optimizer
from jaxdl.parallel import make_mesh
from jaxdl.state import create_state
from jaxdl.step import make_train_step

V, B, T = 37, 3, 10
MODELS = {
    "tied": GPT2(gpt2_block(width=16, n_heads=4, init_std=0.3), n_layers=1, vocab_size=V, n_positions=16),
    "untied": Llama(llama_block(width=16, n_heads=4, hidden=24, init_std=0.3), n_layers=1, vocab_size=V),
    "capped": Llama(
        llama_block(width=16, n_heads=4, hidden=24, init_std=0.3),
        n_layers=1,
        vocab_size=V,
        is_tied=True,
        logit_softcap=3.0,
    ),
}


def create(name):
    params, _ = init_model(MODELS[name], jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    return MODELS[name], params


def create_batch(**more):
    tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)
    weight = jax.random.uniform(jax.random.key(2), (B, T))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight, **more}


def plain_total(model, params, batch, **options):
    logits = model.apply({"params": params}, batch["tokens"])
    return losses.cross_entropy(logits, batch["targets"], batch["weight"], **options).total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("chunk_tokens", "options"),
    [(None, {}), (1, {}), (12, {}), (1000, {}), (9, {"label_smoothing": 0.1, "z_loss": 0.01})],
)
def test_chunks_change_neither_the_loss_nor_its_gradient(name, chunk_tokens, options):
    model, params = create(name)
    batch = create_batch()
    loss_fn = make_language_loss_fn(model, train=False, chunk_tokens=chunk_tokens, **options)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, {}, batch, None).total))(params)
    expected, wanted = jax.jit(jax.value_and_grad(lambda p: plain_total(model, p, batch, **options)))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * largest)
        assert jnp.abs(theirs).max() > 0


def test_sums_against_a_loop():
    model, params = create("untied")
    batch = create_batch(n_bytes=jnp.array([40, 50, 60]))
    batch["mask"] = jnp.ones((B, T), int).at[1, 6:].set(0)
    batch["weight"] = batch["weight"].at[2].set(0)
    logits = np.asarray(model.apply({"params": params}, batch["tokens"], mask=batch["mask"]), np.float64)
    nats = right = weight = 0.0
    for b in range(2):
        for t in range(T if b == 0 else 6):
            row, target, w = logits[b, t], int(batch["targets"][b, t]), float(batch["weight"][b, t])
            nats += w * (np.log(np.exp(row).sum()) - row[target])
            right += w * (row.argmax() == target)
            weight += w
    out = make_language_loss_fn(model, train=False, chunk_tokens=6, z_loss=0.5)(params, {}, batch, None)
    np.testing.assert_allclose(out.weight, weight, rtol=1e-5)
    np.testing.assert_allclose(out.sums["accuracy"].finish(), right / weight, rtol=1e-5)
    np.testing.assert_allclose(out.sums["perplexity"].finish(), math.exp(nats / weight), rtol=1e-4)
    np.testing.assert_allclose(out.sums["bits_per_byte"].finish(), nats / math.log(2) / 90, rtol=1e-5)
    assert float(out.total) > nats


def test_padding_of_packed_rows_weighs_nothing():
    model, params = create("tied")
    documents = jnp.ones((B, T), int).at[:, 5:].set(2).at[0, 8:].set(0)
    batch = {**create_batch(documents=documents), "weight": jnp.ones(B)}
    out = make_language_loss_fn(model, train=False)(params, {}, batch, None)
    assert float(out.weight) == B * T - 2


def temporary_bytes(model, params, batch, chunk_tokens):
    loss_fn = make_language_loss_fn(model, train=True, chunk_tokens=chunk_tokens)
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, jax.random.key(0)).total))
    return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes


def test_memory_falls_with_the_size_of_a_chunk():
    n, vocab_size = 512, 20_000
    block = gpt2_block(width=16, n_heads=2)
    model = GPT2(block, n_layers=1, vocab_size=vocab_size, n_positions=n)
    tokens = jnp.zeros((2, n), jnp.int32)
    params = jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))["params"]
    batch = {"tokens": tokens, "targets": tokens}
    logits = 2 * n * vocab_size * 4
    whole, quarter, small = (temporary_bytes(model, params, batch, 2 * n // part) for part in (1, 4, 32))
    assert whole > 2 * logits
    assert whole > 8 * small
    # beyond what does not depend on it, memory is a fixed number of times the logits of a chunk
    np.testing.assert_allclose(
        (whole - quarter) / (logits - logits / 4), (quarter - small) / (logits / 4 - logits / 32), rtol=0.1
    )


def trace_loss(block):
    """Traces the loss of four rows of 512 tokens over 100,000 words, so that the log says how many at a time."""
    model = GPT2(block, n_layers=1, vocab_size=100_000, n_positions=512)
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    loss_fn = make_language_loss_fn(model, train=False)
    jax.eval_shape(lambda p, t: loss_fn(p, {}, {"tokens": t, "targets": t}, None).total, params, tokens)


def test_the_size_decides_and_the_log_says_so(caplog):
    block = gpt2_block(width=8, n_heads=2)
    choices.tell.cache_clear()
    with caplog.at_level(logging.INFO, "jaxdl"):
        trace_loss(block)
    assert "logits at a time: 671 tokens (781 MiB in all, at most 256 at once)" in caplog.text
    with caplog.at_level(logging.INFO, "jaxdl"), jax.sharding.use_abstract_mesh(make_mesh(data=4).abstract_mesh):
        trace_loss(block)
    assert "logits at a time: the whole batch (781 MiB in all, at most 1024 at once)" in caplog.text


@pytest.mark.parametrize(
    ("platform", "dtype", "n_tokens"), [("gpu", "bfloat16", 1342), ("gpu", "float32", 671), ("cpu", "bfloat16", 671)]
)
def test_a_gpu_keeps_logits_as_they_were_computed(platform, dtype, n_tokens, caplog, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    choices.tell.cache_clear()
    with caplog.at_level(logging.INFO, "jaxdl"):
        trace_loss(gpt2_block(width=8, n_heads=2, attention="xla", dtype=dtype))
    assert f"logits at a time: {n_tokens} tokens" in caplog.text


def test_dropout_differs_by_key_and_training_learns():
    model = GPT2(gpt2_block(width=16, n_heads=2, dropout_rate=0.1), n_layers=1, vocab_size=V, n_positions=16)
    params, extra = init_model(model, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    batch = create_batch()
    loss_fn = make_language_loss_fn(model, train=True, chunk_tokens=7)
    one, other = (float(loss_fn(params, {}, batch, jax.random.key(seed)).total) for seed in (0, 1))
    assert one != other
    tx = make_optimizer(learning_rate=0.02)
    state = create_state(params, extra, tx, rng=jax.random.key(0))
    step, seen = jax.jit(make_train_step(loss_fn, tx)), []
    for _ in range(25):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"].finish()))
    assert seen[-1] < 0.5 * seen[0]


def test_what_is_wrong_with_a_batch_is_said_at_once():
    model, params = create("tied")
    loss_fn = make_language_loss_fn(model, train=False)
    bad = {"tokens": jnp.ones((2, 3), int), "targets": jnp.ones((2, 4)), "token_types": jnp.ones((2, 3), int)}
    with pytest.raises(ModelError) as error:
        loss_fn(params, {}, bad, None)
    assert all(word in str(error.value) for word in ("3 problem", "GPT2 does not take", "float32", "all must be one"))
    with pytest.raises(ModelError, match="has no 'targets'"):
        loss_fn(params, {}, {"tokens": bad["tokens"]}, None)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="MLP has no method 'hidden'"):
        make_language_loss_fn(MLP(widths=(2,), n_outputs=2), train=False)
    with pytest.raises(ModelError, match="chunk_tokens=-1"):
        make_language_loss_fn(MODELS["tied"], train=False, chunk_tokens=-1)
