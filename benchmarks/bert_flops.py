"""FLOPs of compiled fine-tuning steps: jaxdl's, and one written by hand that differentiates the last layer only."""

from functools import partial
from typing import Any

from benchmarks.training import make_adamw


class Counts:
    """Tells XLA's count for each kind of `benchmarks.bert`, and for the step written by hand, "oracle"."""

    def __init__(self, **sizes: Any) -> None:
        import jax

        from benchmarks import bare_jax
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
                moving, frozen = bare_jax.split(parts.params, trainable_rules(kind, sizes["n_layers"]))
                by_hand = bare_jax.make_step(partial(bare_jax.bert, sizes), tx)
                self.facts["oracle"] = compiled_flops(by_hand, moving, tx.init(moving), frozen, batch)


def compiled_flops(step: Any, *args: Any) -> float:
    """XLA's own count of a compiled function."""
    import jax

    costs: Any = jax.jit(step).lower(*args).compile().cost_analysis()
    return float(costs["flops"])
