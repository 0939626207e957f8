"""Training steps written by hand, with nothing of jaxdl in them: plain `jax.numpy`, `optax.adamw`, `jit` and donation.

They are what a careful user writes for one network, without metrics, guard or rules. Weights, by jaxdl's paths, and
batches are those of the workload's `Jaxdl`.

Dimensions: `B` batch, `T` time, `D` width, `F` width of a state, `G` gates x `F`, `H` heads, `K` head size,
`R` = `B` x `T`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.training import LEARNING_RATE, WEIGHT_DECAY, JaxdlParts, load_like
from benchmarks.training import Jaxdl as JaxdlTraining

Params = Mapping[str, Any]


class Bare(JaxdlTraining):
    """The step written by hand, in the loop that `Jaxdl` is timed in.

    Args:
      like: `"module:Jaxdl"` of the workload.
      network: one of NETWORKS.
      sizes: of the workload.
    """

    def __init__(self, like: str, network: str, sizes: Mapping[str, Any]) -> None:
        self.logits = partial(NETWORKS[network], sizes)
        super().__init__(like=like, sizes=sizes)

    def make(self, like: str, sizes: Mapping[str, Any]) -> JaxdlParts:
        """What the workload's `Jaxdl` has, its loss left unused."""
        return load_like(like, sizes)

    def make_step(self) -> tuple[Callable[..., Any], Any]:
        """The state is the weights that move and AdamW's; the others are an argument that is not donated."""
        import jax
        import optax

        moving, frozen = split(self.parts.params, self.parts.trainable)
        tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        step = jax.jit(make_step(self.logits, tx), donate_argnums=(0, 1))

        def call(state: Any, batch: Any) -> tuple[Any, Any]:
            moving, opt_state, loss = step(*state, frozen, batch)
            return (moving, opt_state), loss

        return call, (moving, tx.init(moving))

    def losses(self, metrics: Any) -> list[float]:
        """The step gives its loss."""
        return [float(metrics)]


def split(params: Any, rules: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two dicts of leaves by path: what moves, and what does not."""
    from jaxdl.paths import flatten, match

    flat, moves = flatten(params), flatten(match(rules, params))
    return {p: x for p, x in flat.items() if moves[p]}, {p: x for p, x in flat.items() if not moves[p]}


def make_step(logits_fn: Callable[[Params, Any], Any], tx: Any) -> Callable[..., Any]:
    """`(moving, opt_state, frozen, batch) -> (moving, opt_state, loss)`: gradients of `moving` alone, and AdamW."""
    import jax
    import optax

    def loss_fn(moving: Params, frozen: Params, batch: Any) -> Any:
        labels = batch["targets"] if "targets" in batch else batch["label"]
        logits = logits_fn({**frozen, **moving}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(moving: Params, opt_state: Any, frozen: Params, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(moving, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, moving)
        return optax.apply_updates(moving, updates), opt_state, loss

    return step


def dense(p: Params, name: str, x: Any) -> Any:
    """A linear layer."""
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: Params, name: str, x: Any, epsilon: float) -> Any:
    """Over the last axis."""
    import jax

    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * p[f"{name}/scale"] + p[f"{name}/bias"]


def mlp(sizes: Mapping[str, Any], p: Params, batch: Any) -> Any:
    """Dense layers with ReLU between them."""
    import jax

    x = batch["features"]
    for i in range(len(sizes["sizes"]) - 2):
        x = jax.nn.relu(dense(p, f"dense_{i}", x))
    return dense(p, "head", x)


def cnn(sizes: Mapping[str, Any], p: Params, batch: Any) -> Any:
    """Stages of convolution, max-pooling, group norm, convolution, group norm; the mean over pixels; dense layers."""
    import jax
    import jax.numpy as jnp

    def conv(name: str, x: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=numbers)

    def norm(name: str, x: Any) -> Any:
        *BHW, C = x.shape
        groups = x.reshape(BHW[0], -1, n_groups(C), C // n_groups(C))
        mean = groups.mean((1, 3), keepdims=True)
        variance = ((groups - mean) ** 2).mean((1, 3), keepdims=True)
        normed = ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return normed * p[f"{name}/scale"] + p[f"{name}/bias"]

    x = batch["image"]
    for i in range(len(sizes["features"])):
        x = conv(f"stage_{i}/conv_0", x)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(norm(f"stage_{i}/norm_0", x))
        x = jax.nn.relu(norm(f"stage_{i}/norm_1", conv(f"stage_{i}/conv_1", x)))
    return dense(p, "head", jax.nn.relu(dense(p, "dense", x.mean((1, 2)))))


def n_groups(n_channels: int) -> int:
    """Groups of a norm, as jaxdl takes them: at most 32, of two channels at least.

    Example:
      >>> n_groups(64), n_groups(8)
      (32, 4)
    """
    return max(n for n in range(1, 33) if n_channels % n == 0 and n_channels // n >= 2)


def lstm(sizes: Mapping[str, Any], p: Params, batch: Any) -> Any:
    """A scan over time for each layer, the products with the inputs outside of it; the mean over time, and a head."""
    import jax
    import jax.numpy as jnp

    x_TBD = batch["x"].swapaxes(0, 1)
    for i in range(sizes["n_layers"]):
        at = f"recurrent/layer_{i}/forward"
        x_TBG = dense(p, f"{at}/input", x_TBD) + p[f"{at}/recurrent/bias"]
        kernel_FG = p[f"{at}/recurrent/kernel"]

        def cell(state: Any, x_BG: Any, kernel_FG: Any = kernel_FG) -> Any:
            h_BF, c_BF = state
            i, f, g, o = jnp.split(x_BG + h_BF @ kernel_FG, 4, -1)
            c_BF = jax.nn.sigmoid(f) * c_BF + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_BF = jax.nn.sigmoid(o) * jnp.tanh(c_BF)
            return (h_BF, c_BF), h_BF

        zeros_BF = jnp.zeros((x_TBD.shape[1], kernel_FG.shape[0]))
        _, x_TBD = jax.lax.scan(cell, (zeros_BF, zeros_BF), x_TBG)
    return dense(p, "head", x_TBD.mean(0))


def attention(p: Params, at: str, y_RD: Any, mask: Any, n_heads: int) -> Any:
    """Softmax attention of rows `R` that are `mask`'s batch and time; `mask` is added to the scores."""
    import jax

    B, T = len(y_RD) // mask.shape[-1], mask.shape[-1]
    query, key, value = (
        dense(p, f"{at}/attention/{name}", y_RD).reshape(B, T, n_heads, -1).swapaxes(1, 2)
        for name in ("query", "key", "value")
    )
    scores_BHTT = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5 + mask
    mixed_BHTK = jax.nn.softmax(scores_BHTT) @ value
    return dense(p, f"{at}/attention/output", mixed_BHTK.swapaxes(1, 2).reshape(B * T, -1))


def gpt(sizes: Mapping[str, Any], p: Params, batch: Any) -> Any:
    """GPT-2's layers with tied logits (B, T, V)."""
    import jax
    import jax.numpy as jnp

    B, T = batch["tokens"].shape
    mask = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), 0.0, -1e30)
    table = p["embed/token/embedding"]
    x_RD = (table[batch["tokens"]] + p["embed/position/embedding"][None, :T]).reshape(B * T, -1)
    for i in range(sizes["n_layers"]):
        at = f"decoder/layer_{i}"
        x_RD += attention(p, at, layer_norm(p, f"{at}/attention_norm", x_RD, 1e-5), mask, sizes["n_heads"])
        y_RD = dense(p, f"{at}/mlp/up", layer_norm(p, f"{at}/mlp_norm", x_RD, 1e-5))
        x_RD += dense(p, f"{at}/mlp/down", jax.nn.gelu(y_RD, approximate=True))
    x_RD = layer_norm(p, "decoder/final_norm", x_RD, 1e-5)
    return (x_RD @ table[: sizes["vocab_size"]].T).reshape(B, T, -1)


def bert(sizes: Mapping[str, Any], p: Params, batch: Any) -> Any:
    """BERT's layers and the logits of its pooled first token."""
    import jax
    import jax.numpy as jnp

    B, T = batch["tokens"].shape
    mask = jnp.where(batch["mask"][:, None, None] != 0, 0.0, -1e30)
    places_TD = p["embed/position/embedding"][:T] + p["embed/token_type/embedding"][:1]
    x_RD = (p["embed/token/embedding"][batch["tokens"]] + places_TD[None]).reshape(B * T, -1)
    x_RD = layer_norm(p, "embed/norm", x_RD, 1e-12)
    for i in range(sizes["n_layers"]):
        at = f"encoder/layer_{i}"
        mixed_RD = attention(p, at, x_RD, mask, sizes["n_heads"])
        x_RD = layer_norm(p, f"{at}/attention_norm", x_RD + mixed_RD, 1e-12)
        y_RD = dense(p, f"{at}/mlp/down", jax.nn.gelu(dense(p, f"{at}/mlp/up", x_RD), approximate=False))
        x_RD = layer_norm(p, f"{at}/mlp_norm", x_RD + y_RD, 1e-12)
    return dense(p, "head", jnp.tanh(dense(p, "pooler", x_RD.reshape(B, T, -1)[:, 0])))


# name -> (sizes, weights by path, batch) -> logits
NETWORKS: dict[str, Callable[[Mapping[str, Any], Params, Any], Any]] = {
    "mlp": mlp,
    "cnn": cnn,
    "lstm": lstm,
    "gpt": gpt,
    "bert": bert,
}
