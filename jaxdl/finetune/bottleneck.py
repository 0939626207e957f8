"""Bottleneck adapters (Houlsby et al. 2019): a small network after a module, beside a skip connection."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import paths
from jaxdl.finetune.adapters import AdapterError, Call
from jaxdl.finetune.sites import Site, Survey, join, key_of
from jaxdl.models.checks import count_problem, name_problem
from jaxdl.models.layers import ACTIVATIONS, make_activation
from jaxdl.paths import Rules, Tree


@dataclass(frozen=True)
class Bottleneck:
    """After which modules stands `y + up(activation(down(y)))`, and how narrow it is.

    Leaves at a module, D the last axis of its output: `down_kernel` (D, width), `down_bias` (width,), `up_kernel`
    (width, D), `up_bias` (D,). `up` begins at zero, so that the network begins as it was.

    Attributes:
      rules: `(regex, width or None)` over the paths of modules that give one array. Those of Houlsby et al. 2019
        (arXiv:1902.00751, figure 2) are `[(".*/(attention/output|mlp/down)", 64), (".*", None)]`.
      activation: a name of `make_activation`.

    Raises:
      AdapterError: a width that is no positive whole number, an unknown activation.

    Example:
      >>> import flax.linen as nn
      >>> from jaxdl.finetune.adapters import adapted, add
      >>> model, settings, x = nn.Dense(3), Bottleneck([("", 2)]), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> params = add(jax.random.key(1), params, settings, model, x)
      >>> jax.tree.map(jnp.shape, params["adapters"])
      {'down_bias': (2,), 'down_kernel': (3, 2), 'up_bias': (3,), 'up_kernel': (2, 3)}
      >>> adapted(model.apply, settings)({"params": params}, x).shape
      (4, 3)
    """

    rules: Rules
    _: KW_ONLY
    activation: str = "gelu"

    order: ClassVar[int] = 1
    names: ClassVar[tuple[str, ...]] = ("down_kernel", "down_bias", "up_kernel", "up_bias")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))
        problems = [
            name_problem("activation", self.activation, ACTIVATIONS),
            *(count_problem(f"the width of {rule[0]!r}", rule[1]) for rule in self.rules if rule[1:] != (None,)),
        ]
        if found := [problem for problem in problems if problem]:
            raise AdapterError.listing("Bottleneck", found)

    def init(self, key: Array, survey: Survey, params: Tree) -> dict[str, Array]:
        """`down_kernel` is normal of variance 1 / D; all others are zero."""
        widths = paths.match(self.rules, {path: path for path in survey.sites}, what="bottleneck")
        sites = [(survey.sites[path], width) for path, width in widths.items() if width is not None]
        if problems := [problem for site, _ in sites if (problem := _problem(site))]:
            raise AdapterError.listing("bottleneck", problems)
        return {path: leaf for site, width in sites for path, leaf in _fresh(key, site, width).items()}

    def run(self, call: Call, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output, and that of the small network on it."""
        y = inner(*args, **kwargs)
        leaves = call.read(self.names) if call.method == "__call__" else {}
        if not leaves:
            return y
        parts = (leaves[name].astype(y.dtype) for name in self.names)
        down_kernel, down_bias, up_kernel, up_bias = parts
        low = make_activation(self.activation)(y @ down_kernel + _row(down_bias, y))
        return y + (low @ up_kernel + _row(up_bias, y))


def _row(bias: Array, y: Array) -> Array:
    return bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _problem(site: Site) -> str | None:
    if site.output is None:
        return f"{site.path} ({site.kind.__name__}) gives several arrays; choose the module that makes one of them."
    if not site.output.shape or not jnp.issubdtype(site.output.dtype, jnp.floating):
        return f"{site.path} gives {site.output.dtype}{list(site.output.shape)}; only float vectors can be adapted."
    return (
        None if site.has_params else f"{site.path} ({site.kind.__name__}) has no parameters; choose the module before."
    )


def _fresh(key: Array, site: Site, width: int) -> dict[str, Array]:
    size = site.output.shape[-1] if site.output else 0
    shapes = {"down_bias": (width,), "up_kernel": (width, size), "up_bias": (size,)}
    zeros = {join(site.path, name): jnp.zeros((*site.stack, *shape)) for name, shape in shapes.items()}
    path = join(site.path, "down_kernel")
    return {path: jax.random.normal(key_of(key, path), (*site.stack, size, width)) * size**-0.5, **zeros}
