"""Norms, activations, dropout, drop path, convolution padding and the checks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models import ModelError, conv, drop_path, dropout, group_norm, head, make_activation, make_norm
from jaxdl.models.checks import check, check_images, count_problem, counts_problem, rate_problem
from jaxdl.models.layers import ACTIVATIONS

FLOAT = {"dtype": jnp.float32, "param_dtype": jnp.float32}


class Wrap(nn.Module):
    """Calls a function of `layers` where it may be called: inside a compact method."""

    call: object

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.call(x, train)


def norm_of(kind, x, *, train=False, zero_scale=False, **kwargs):
    norm = make_norm(kind, **kwargs)
    net = Wrap(lambda x, train: norm(x, train=train, name="norm", zero_scale=zero_scale, **FLOAT))
    variables = net.init(jax.random.key(0), x)
    return net.apply(variables, x, train=train, mutable=["batch_stats"])[0], variables


def standardized(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


X = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 5, 3, 8))


@pytest.mark.parametrize(
    ("kind", "train", "kwargs", "shape", "axes"),
    [
        ("layer", False, {}, X.shape, -1),
        ("batch", True, {}, X.shape, (0, 1, 2)),
        ("group", False, {}, (4, 15, 4, 2), (1, 3)),  # the default leaves a group 2 channels
        ("group", False, {"n_groups": 2}, (4, 15, 2, 4), (1, 3)),
        ("group", True, {"n_groups": 8}, (4, 15, 8, 1), (1, 3)),
    ],
)
def test_norms_are_their_formula(kind, train, kwargs, shape, axes):
    y, variables = norm_of(kind, jnp.asarray(X, jnp.float32), train=train, **kwargs)
    np.testing.assert_allclose(y, standardized(X.reshape(shape), axes).reshape(X.shape), atol=2e-5)
    assert ("batch_stats" in variables) == (kind == "batch")


@pytest.mark.parametrize("road", [group_norm._normalize, group_norm._normalize_plainly], ids=["written", "derived"])
@pytest.mark.parametrize("n_groups", [1, 2, 8])
def test_the_gradient_of_a_group_norm_is_that_of_its_formula(road, n_groups):
    rng = np.random.default_rng(3)
    x, weights = (jnp.asarray(rng.normal(1.0, 2.0, (3, 6, 8)), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(2))

    def formula(x, scale, bias):
        grouped = x.reshape(3, 6, n_groups, -1)
        around = grouped - grouped.mean((1, 3), keepdims=True)
        y = around / jnp.sqrt((around**2).mean((1, 3), keepdims=True) + 1e-5)
        return (weights * (y.reshape(x.shape) * scale[None, None] + bias[None, None])).sum()

    ours = jax.grad(lambda *a: (weights * road(*a, n_groups, 1e-5)).sum(), (0, 1, 2))(x, scale, bias)
    for mine, other in zip(ours, jax.grad(formula, (0, 1, 2))(x, scale, bias), strict=True):
        assert jnp.abs(other).max() > 0.1
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


def test_a_group_norm_of_bfloat16_sums_in_float32():
    x = jnp.full((1, 64, 64, 2), 100.0, jnp.bfloat16).at[0, 0].add(64.0)  # a bfloat16 sum would stop at 32768
    y = group_norm.GroupNorm(1, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y[0, 0, 0, 0], 63**0.5, rtol=1e-2)


def test_batch_norm_in_evaluation_uses_its_running_statistics():
    y, _ = norm_of("batch", jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_no_norm_is_the_identity_without_parameters():
    x = jnp.asarray(X)
    y, variables = norm_of("none", x)
    assert y is x or (y == x).all()
    assert not jax.tree.leaves(variables)


@pytest.mark.parametrize("kind", ["group", "batch", "layer"])
def test_zero_scale_starts_at_zero(kind):
    y, variables = norm_of(kind, jnp.asarray(X, jnp.float32), zero_scale=True)
    assert not y.any()
    assert not variables["params"]["norm"]["scale"].any()


@pytest.mark.parametrize(
    ("shape", "n_groups"),
    [
        ((2, 2, 64), 32),
        ((2, 2, 32), 16),
        ((2, 2, 48), 24),
        ((2, 2, 7), 1),
        ((2, 2, 1), 1),
        ((2, 2, 130), 26),
        ((64,), 8),
    ],
)
def test_the_default_groups_divide_the_channels(shape, n_groups):
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    y, _ = norm_of("group", jnp.asarray(x))
    grouped = x.reshape(3, -1, n_groups, shape[-1] // n_groups)
    np.testing.assert_allclose(y, standardized(grouped, (1, 3)).reshape(x.shape), atol=1e-4)


def test_impossible_groups_are_refused():
    with pytest.raises(ModelError, match=r"n_groups=3 does not divide 8 channels; use one of \[1, 2, 4, 8\]"):
        norm_of("group", jnp.asarray(X), n_groups=3)
    with pytest.raises(ModelError, match="holds a single value"):
        norm_of("group", jnp.ones((2, 1, 1, 8)), n_groups=8)
    with pytest.raises(ModelError, match="n_groups=4 is for 'group', not 'layer'"):
        make_norm("layer", n_groups=4)


def test_norms_are_equal_by_value_and_functions_pass_through():
    assert make_norm("group", n_groups=4) is make_norm("group", n_groups=4)
    mine = make_norm("layer")
    assert make_norm(mine) is mine
    with pytest.raises(ModelError, match="norm='gruop' is unknown; did you mean 'group'"):
        make_norm("gruop")


def test_every_activation_is_elementwise_and_has_a_finite_gradient():
    x = jnp.linspace(-3, 3, 7)
    for name in ACTIVATIONS:
        f = make_activation(name)
        assert f(x).shape == x.shape, name
        assert jnp.isfinite(jax.vmap(jax.grad(f))(x)).all(), name
    assert make_activation(jnp.sin) is jnp.sin


def test_gelu_is_the_exact_one():
    x = np.linspace(-3, 3, 13)
    erf = np.vectorize(math.erf)
    np.testing.assert_allclose(
        make_activation("gelu")(jnp.asarray(x, jnp.float32)), x * 0.5 * (1 + erf(x / 2**0.5)), atol=1e-6
    )
    assert jnp.abs(make_activation("gelu")(1.0) - make_activation("gelu_tanh")(1.0)) > 1e-5
    low = jnp.asarray(x, jnp.bfloat16)  # and keeps the tail in half precision
    np.testing.assert_array_equal(make_activation("gelu")(low), nn.gelu(low, approximate=False))


def random_of(f, rate, x, *, seed=0, train=True):
    net = Wrap(lambda x, train: f(x, rate, train=train, name="random"))
    return net.apply({}, x, train=train, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("f", [dropout, drop_path])
def test_rate_zero_and_evaluation_are_the_identity_without_a_key(f):
    x = jnp.asarray(X, jnp.float32)
    for rate, train in [(0.0, True), (0.9, False)]:
        net = Wrap(lambda x, train, rate=rate: f(x, rate, train=train, name="random"))
        np.testing.assert_array_equal(net.apply({}, x, train=train), x)


@pytest.mark.parametrize("f", [dropout, drop_path])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_random_zeros_keep_the_mean_and_differ_by_key(f, rate):
    x = jnp.ones((40_000, 1, 1, 1))
    y = random_of(f, rate, x)
    n_sigma = abs(float(y.mean()) - 1) / (rate / (1 - rate) / x.size) ** 0.5
    assert n_sigma < 4
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    np.testing.assert_array_equal(y, random_of(f, rate, x))
    assert (y != random_of(f, rate, x, seed=1)).any()


def test_drop_path_takes_whole_examples_and_dropout_does_not():
    x = jnp.ones((64, 3, 3, 2))
    for f, is_whole in [(drop_path, True), (dropout, False)]:
        kept = (random_of(f, 0.5, x) != 0).reshape(64, -1)
        assert bool((kept.all(1) | ~kept.any(1)).all()) == is_whole


def test_two_dropouts_in_one_network_draw_different_numbers():
    net = Wrap(lambda x, train: [dropout(x, 0.5, train=train, name=name) for name in ("a", "b")])
    a, b = net.apply({}, jnp.ones(100), train=True, rngs={"dropout": jax.random.key(0)})
    assert (a != b).any()


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 10)])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_strided_convolution_pads_as_pytorch_not_as_same(size, kernel_size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    net = Wrap(lambda x, train: conv(x, 4, kernel_size, strides=2, name="conv", **FLOAT))
    y, variables = net.init_with_output(jax.random.key(0), jnp.asarray(x))
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1))
    want = torch.nn.functional.conv2d(torch.tensor(x.transpose(0, 3, 1, 2)), weight, stride=2, padding=kernel_size // 2)
    np.testing.assert_allclose(y, want.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    same = nn.Conv(4, (kernel_size,) * 2, (2, 2), "SAME", use_bias=False).apply({"params": {"kernel": kernel}}, x)
    shifts = kernel_size > 1 and any(n % 2 == 0 for n in size)  # where the two conventions part
    assert (np.abs(same - y).max() > 1e-2) == shifts


def test_the_head_computes_in_float32():
    net = Wrap(lambda x, train: head(x, 3, param_dtype=jnp.float32))
    x = jax.random.normal(jax.random.key(1), (2, 5), jnp.bfloat16)
    y, variables = net.init_with_output(jax.random.key(0), x)
    assert y.dtype == variables["params"]["head"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ variables["params"]["head"]["kernel"], rtol=1e-6)


def test_check_lists_every_problem():
    problems = [rate_problem("rate", 1.0), None, counts_problem("widths", (3, 0)), count_problem("n", True)]
    with pytest.raises(ModelError) as caught:
        check("Net", *problems)
    for part in ("Net: 3 problem(s)", "rate=1.0 must be in [0, 1).", "widths=(3, 0)", "n=True must be a whole number"):
        assert part in str(caught.value)
    check("Net", rate_problem("rate", 0.0), counts_problem("widths", (1,)), count_problem("n", 0, least=0))


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 3, 4, 4, 1), (2, 3, 4, 1), (2, 4, 3, 1)])
def test_images_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ModelError):
        check_images("Net", jnp.zeros(shape), least=4)
    check_images("Net", jnp.zeros((0, 4, 4, 1)), least=4)
