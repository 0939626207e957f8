"""The product of a linear layer: the same numbers in both forms, and one axis of rows where that is fast."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.product import product, table_product

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 1, 4, 3)], ids=str)
def test_values_and_derivatives_of_both_modes_are_those_of_matmul(shape):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(RNG.standard_normal(shape)), jnp.asarray(RNG.standard_normal((3, 5)))
        tangents = jax.tree.map(lambda part: jnp.asarray(RNG.standard_normal(part.shape)), (x, kernel))
        cotangent = jnp.asarray(RNG.standard_normal((*shape[:-1], 5)))
        for mode in (lambda f: jax.jvp(f, (x, kernel), tangents), lambda f: jax.vjp(f, x, kernel)[1](cotangent)):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), mode(product), mode(lambda a, b: a @ b)
            )


def test_the_gradient_of_a_kernel_is_a_sum_over_one_axis():
    """The reason for it: no product of the backward pass contracts batch and time as two axes."""
    x, layer = jnp.ones((2, 4, 3)), nn.Dense(5, dot_general=product)
    params = layer.init(jax.random.key(0), x)
    made = jax.make_jaxpr(jax.grad(lambda params: layer.apply(params, x).sum()))(params)
    contracted = [
        len(eqn.params["dimension_numbers"][0][0]) for eqn in made.eqns if eqn.primitive.name == "dot_general"
    ]
    assert contracted == [1] * len(contracted)
    assert len(contracted) == 2
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, nn.Dense(5).init(jax.random.key(0), x)))


@pytest.mark.parametrize("most_turned", [0, 1 << 16])
def test_the_gradient_of_a_kernel_with_few_outputs_is_a_called_product_of_rows(most_turned, monkeypatch):
    monkeypatch.setattr("jaxdl.models.product.MOST_TURNED", most_turned)

    def loss(x, kernel):
        return (product(x, kernel) ** 3).sum()

    def plain(x, kernel):
        return ((x @ kernel) ** 3).sum()

    with jax.enable_x64(True):
        x, kernel = jnp.asarray(RNG.standard_normal((4, 6, 16))), jnp.asarray(RNG.standard_normal((16, 3)))
        for derivative in (jax.grad, jax.hessian, lambda f, at: jax.vmap(jax.grad(f, at), (0, None))):
            np.testing.assert_allclose(derivative(loss, 1)(x, kernel), derivative(plain, 1)(x, kernel), rtol=1e-10)
    text = jax.jit(jax.grad(loss, 1)).lower(jnp.ones((4, 6, 16)), jnp.ones((16, 3))).compile().as_text()
    assert re.search(r" call\(.*inlineable", text)
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert sorted(products) == ["24,3", "3,16"]  # of the form 16,3 it takes another, slow product
    if most_turned:
        assert re.findall(r"= \S+ dot\(.*?lhs_contracting_dims=\{(\d)\}", text) == ["1", "1"]


def test_a_table_turned_round_is_a_product_of_merged_rows():
    x, table = RNG.standard_normal((4, 6, 16)), RNG.standard_normal((5, 16))
    ct = RNG.standard_normal((4, 6, 5))
    with jax.enable_x64(True):
        logits, pull = jax.vjp(table_product, jnp.asarray(x), jnp.asarray(table))
        np.testing.assert_allclose(logits, x @ table.T, rtol=1e-12)
        for mine, theirs in zip(pull(jnp.asarray(ct)), (ct @ table, np.einsum("btf,btd->fd", ct, x)), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10)
    text = jax.jit(table_product).lower(jnp.asarray(x), jnp.asarray(table)).as_text()
    assert "tensor<24x16xf32>, tensor<5x16xf32>" in text


def test_other_products_are_those_of_lax():
    a, b = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 4, 5))
    numbers = (((2,), (1,)), ((0,), (0,)))
    np.testing.assert_allclose(product(jnp.asarray(a), jnp.asarray(b), numbers), a @ b, rtol=1e-5)
    wide = product(
        jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 1), jnp.bfloat16), preferred_element_type=jnp.float32
    )
    assert (wide.dtype, wide.shape) == (jnp.float32, (2, 3, 1))
