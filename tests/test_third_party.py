"""A network that jaxdl knows nothing about, trained from a script of ten lines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdl import LossOut, create_state, losses, make_train_step


def test_an_lstm_that_flax_ships_learns_through_make_train_step():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 12, 2)).astype(np.float32)
    batch = {"x": x, "y": (x[..., 0].sum(1) > 0).astype(np.int32)}
    # the ten lines
    model, tx = nn.RNN(nn.LSTMCell(16)), optax.adam(0.02)
    head = nn.Dense(2)

    def loss_fn(params, extra, batch, rng):
        h = model.apply({"params": params["rnn"]}, batch["x"])[:, -1]
        return LossOut(*losses.cross_entropy(head.apply({"params": params["head"]}, h), batch["y"]))

    params = {
        "rnn": model.init(jax.random.key(0), x)["params"],
        "head": head.init(jax.random.key(1), jnp.ones((1, 16)))["params"],
    }
    state = create_state(params, {}, tx, rng=jax.random.key(2))
    step = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
    values = []
    for _ in range(80):
        state, metrics = step(state, batch)
        values.append(metrics["loss"].finish())
    assert values[-1] < 0.2 < 0.6 < values[0]
