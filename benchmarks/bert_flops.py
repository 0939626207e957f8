"""FLOPs of compiled fine-tuning steps: jaxdl's, and one written by hand that differentiates the last layer only.

Dimensions: `B` batch, `T` time, `D` width, `H` heads, `K` head size.
"""

from typing import Any

from benchmarks.training import make_adamw


class Counts:
    """Tells XLA's count for each kind of `benchmarks.bert`, and for the step written by hand, "oracle"."""

    def __init__(self, **sizes: Any) -> None:
        import jax

        from benchmarks.bert import KINDS, Jaxdl, trainable_rules
        from jaxdl import create_state, make_train_step

        self.facts = {}
        made = Jaxdl.__new__(Jaxdl)
        for kind in KINDS:
            parts, tx = made.make(kind=kind, **sizes), make_adamw()
            batch = {name: value[0] for name, value in parts.batches.items()}
            state = create_state(parts.params, {}, tx, rng=jax.random.key(0), trainable=parts.trainable)
            step = make_train_step(parts.loss_fn, tx, trainable=parts.trainable)
            self.facts[kind] = compiled_flops(step, state, batch)
            if kind == "last":
                moving, frozen = split(parts.params, trainable_rules(kind, sizes["n_layers"]))
                args = (moving, frozen, tx.init(moving), batch)
                self.facts["oracle"] = compiled_flops(make_step(sizes["n_layers"], sizes["n_heads"], tx), *args)


def compiled_flops(step: Any, *args: Any) -> float:
    """XLA's own count of a compiled function."""
    import jax

    costs: Any = jax.jit(step).lower(*args).compile().cost_analysis()
    return float(costs["flops"])


def split(params: Any, rules: Any) -> tuple[Any, Any]:
    """Two dicts of leaves by path: what moves, and what does not."""
    from jaxdl.paths import flatten, match

    flat, moves = flatten(params), flatten(match(rules, params))
    return {p: x for p, x in flat.items() if moves[p]}, {p: x for p, x in flat.items() if not moves[p]}


def make_step(n_layers: int, n_heads: int, tx: Any) -> Any:
    """The step that a careful user would write: forward through all, gradients of `moving` alone, AdamW on it."""
    import jax
    import optax

    def loss(moving: Any, frozen: Any, batch: Any) -> Any:
        logits = forward({**frozen, **moving}, batch["tokens"], batch["mask"], n_layers, n_heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def step(moving: Any, frozen: Any, opt_state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(moving, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, moving)
        return optax.apply_updates(moving, updates), opt_state, value

    return step


def forward(p: dict[str, Any], tokens: Any, mask: Any, n_layers: int, n_heads: int) -> Any:
    """BERT's logits (B, n) from leaves by path, in plain `jax.numpy`."""
    import jax
    import jax.numpy as jnp

    (B, T), hidden_mask = tokens.shape, jnp.where(mask[:, None, None] != 0, 0.0, -1e30)

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-12) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(x: Any, name: str) -> Any:
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    x_RD = p["embed/token/embedding"][tokens] + p["embed/position/embedding"][:T] + p["embed/token_type/embedding"][0]
    x_RD = norm(x_RD.reshape(B * T, -1), "embed/norm")
    for i in range(n_layers):
        at = f"encoder/layer_{i}"
        query, key, value = (
            dense(x_RD, f"{at}/attention/{name}").reshape(B, T, n_heads, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        scores_BHTT = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5 + hidden_mask
        mixed_RD = (jax.nn.softmax(scores_BHTT) @ value).swapaxes(1, 2).reshape(B * T, -1)
        x_RD = norm(x_RD + dense(mixed_RD, f"{at}/attention/output"), f"{at}/attention_norm")
        y_RD = dense(jax.nn.gelu(dense(x_RD, f"{at}/mlp/up"), approximate=False), f"{at}/mlp/down")
        x_RD = norm(x_RD + y_RD, f"{at}/mlp_norm")
    pooled_BD = jnp.tanh(dense(x_RD.reshape(B, T, -1)[:, 0], "pooler"))
    return dense(pooled_BD, "head")
