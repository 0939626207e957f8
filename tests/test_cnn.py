"""The convolutional networks: CNN, ResNet and ConvNeXt; shapes, counts, options, refusals. Parity is in parity/."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from jax.sharding import PartitionSpec as P

from jaxdl.models import (
    CNN,
    BasicBlock,
    BottleneckBlock,
    ConvNeXt,
    ConvNeXtBlock,
    ModelError,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    depthwise_conv,
    make_norm,
    max_pool,
)
from jaxdl.models.convnext import _grouped

X = np.random.default_rng(0).normal(size=(4, 9, 8, 3)).astype(np.float32)
SMALL_RESNET = partial(ResNet, n_outputs=3, stage_sizes=(1, 1), width=4, stem="small")
BLOCKS = [BasicBlock, BottleneckBlock, PreActBasicBlock, PreActBottleneckBlock]


def init(model, x=X):
    return dict(jax.jit(model.init)(jax.random.key(0), x))


def random_variables(model):
    """Random values of the right shapes: quicker to have than to compile `init`, and no scale is one."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.4, leaf.shape).astype(leaf.dtype), dict(shapes))


def n_params(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "n_parameters", "n_statistics"),
    [(ResNet18, 11_689_512, 9_600), (ResNet34, 21_797_672, 17_024), (ResNet50, 25_557_032, 53_120)],
)
def test_resnets_have_the_published_parameter_count(model, n_parameters, n_statistics):
    net = model(n_outputs=1000, norm="batch")
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert n_params(variables) == n_parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == n_statistics


@pytest.mark.parametrize("convs", [1, 2])
def test_the_cnns_parameter_count_is_its_formula(convs):
    variables = jax.eval_shape(
        CNN(n_outputs=10, features=(32, 64), convs_per_stage=convs, dense_width=16).init,
        jax.random.key(0),
        jnp.zeros((1, 28, 28, 1)),
    )
    first = 9 * 1 * 32 + 9 * 32 * 64 + (convs - 1) * 9 * (32**2 + 64**2)
    assert n_params(variables) == first + convs * 2 * (32 + 64) + (64 * 16 + 16) + (16 * 10 + 10)


@pytest.mark.parametrize(("reduce", "n_inputs"), [("mean", 16), ("max", 16), ("flatten", 2 * 2 * 16)])
def test_reduce_decides_what_the_head_sees(reduce, n_inputs):
    net = CNN(n_outputs=3, features=(8, 16), reduce=reduce)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 9, 11, 1)))
    assert shapes["params"]["head"]["kernel"].shape == ((n_inputs, 3))


def test_mean_pooling_of_the_cnn_is_linear_and_max_pooling_is_not():
    def net(pool):
        return CNN(n_outputs=2, features=(4,), convs_per_stage=1, norm="none", activation="identity", pool=pool)

    for pool, is_linear in [("mean", True), ("max", False)]:
        variables = random_variables(net(pool))
        y, mirrored, zero = (jax.jit(net(pool).apply)(variables, x) for x in (X, -X, 0 * X))
        assert np.allclose(mirrored - zero, zero - y, atol=1e-5) == is_linear


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("strides", "n_channels"), [(1, 8), (1, 6), (2, 8)])
def test_residual_blocks_keep_or_change_the_shape(block, strides, n_channels):
    features = 8 // block.expansion
    x = jnp.zeros((2, 9, 6, n_channels))
    y, variables = jax.eval_shape(lambda: block(features, strides).init_with_output(jax.random.key(0), x))
    assert y.shape == (2, -(-9 // strides), -(-6 // strides), 8)
    assert ("shortcut_conv" in variables["params"]) == (strides != 1 or n_channels != 8)
    assert ("shortcut_norm" in variables["params"]) == ("shortcut_conv" in variables["params"] and block in BLOCKS[:2])


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock])
def test_zero_init_starts_a_block_as_its_shortcut_and_lets_it_learn(block, norm):
    x = jnp.abs(jnp.asarray(X[..., :2]))  # a positive input passes the last relu as it is
    for zero_init in (True, False):
        net = block(2, norm=norm, zero_init=zero_init)
        variables = init(net, x)
        y, gradients = jax.jit(jax.value_and_grad(lambda v, net=net: (net.apply(v, x) ** 3).sum()))(variables)
        assert bool(jnp.allclose(y, (x**3).sum(), rtol=1e-6)) == zero_init
        assert any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("small", 32), ("pooled", 16)])
def test_the_stem_decides_the_first_stages_size(stem, side):
    net = ResNet(n_outputs=2, stage_sizes=(1,), width=4, stem=stem)
    _, state = jax.eval_shape(
        lambda: net.init_with_output(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), capture_intermediates=True)
    )
    assert state["intermediates"]["stage_0"]["__call__"][0].shape == (1, side, side, 4)


MODELS = {
    "cnn": CNN(n_outputs=3, features=(8, 8), dense_width=8, dropout_rate=0.5),
    "resnet": SMALL_RESNET(dropout_rate=0.5),
    "preact": SMALL_RESNET(block=PreActBasicBlock, norm="layer", dropout_rate=0.5),
    "convnext": ConvNeXt(
        n_outputs=3, depths=(1, 1), widths=(8, 8), kernel_size=3, drop_path_rate=0.5, layer_scale_init=1.0
    ),
}


@functools.cache
def variables_of(name):
    return random_variables(MODELS[name])


@functools.cache
def evaluation_of(name):
    return jax.jit(MODELS[name].apply)


@pytest.mark.parametrize("name", MODELS)
def test_low_precision_keeps_parameters_logits_and_gradients_in_float32(name):
    model, variables = MODELS[name].clone(dtype=jnp.bfloat16), variables_of(name)

    def loss(v):
        logits = model.apply(v, X)
        return (logits**2).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    own = jax.eval_shape(model.init, jax.random.key(0), X)
    assert {leaf.dtype for leaf in jax.tree.leaves((own, logits, gradients))} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    exact = evaluation_of(name)(variables, X)
    assert 0 < jnp.abs(logits - exact).max() < 0.15 * jnp.abs(exact).max()


@pytest.mark.parametrize("name", MODELS)
def test_randomness_is_off_in_evaluation_and_a_function_of_the_key_in_training(name):
    model, variables = MODELS[name], variables_of(name)
    train = jax.jit(lambda seed: model.apply(variables, X, train=True, rngs={"dropout": jax.random.key(seed)}))
    calm = evaluation_of(name)(variables, X)
    noisy = [np.asarray(train(seed)) for seed in range(8)]
    np.testing.assert_array_equal(noisy[0], train(0))
    assert any((y != noisy[0]).any() for y in noisy)
    assert any(np.abs(y - calm).max() > 1e-3 for y in noisy)
    with pytest.raises(InvalidRngError):
        jax.eval_shape(lambda: model.apply(variables, X, train=True))
    jax.eval_shape(lambda: model.apply(variables, X, train=False))


@pytest.mark.parametrize("name", MODELS)
def test_examples_do_not_see_each_other_without_batch_norm(name):
    other = np.concatenate([X[:2], 3 - X[2:]])
    y, z = (np.asarray(evaluation_of(name)(variables_of(name), x)) for x in (X, other))
    np.testing.assert_allclose(y[:2], z[:2], atol=1e-5)
    assert np.abs(y[2:] - z[2:]).max() > 1e-3


def test_a_norm_of_ones_own_is_used():
    net = CNN(n_outputs=2, features=(8,), convs_per_stage=1, norm=make_norm("group", n_groups=1))
    default = net.clone(norm="group")
    variables = random_variables(net)
    y, z = (jax.jit(model.apply)(variables, X) for model in (net, default))
    assert jnp.abs(y - z).max() > 1e-3
    assert net == CNN(n_outputs=2, features=(8,), convs_per_stage=1, norm=make_norm("group", n_groups=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("size", "kernel_size"), [((5, 4), 3), ((3, 2), 7)])
def test_depthwise_convolution_is_the_grouped_one(dtype, size, kernel_size):
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (jax.random.normal(key, (2, *size, 3)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (kernel_size, kernel_size, 1, 3))
    want, pull_want = jax.vjp(_grouped, x, kernel)
    got, pull = jax.vjp(jax.jit(depthwise_conv), x.astype(dtype), kernel.astype(dtype))
    rtol = 1e-4 if dtype == jnp.float32 else 0.05
    for a, b in zip((got, *pull(grad.astype(dtype))), (want, *pull_want(grad)), strict=True):
        assert a.dtype == dtype
        assert jnp.abs(a - b).max() < rtol * jnp.abs(b).max()


@pytest.mark.parametrize("runner", ["jit", "shard_map"])
def test_own_gradients_are_the_same_with_a_sharded_batch(runner):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 3))

    def gradients(x, kernel, *, is_shard=False):
        def loss(x, kernel):
            return (max_pool(depthwise_conv(x, kernel), 3, 2, 1) ** 2).sum()

        x_grad, kernel_grad = jax.grad(loss, (0, 1))(
            x, jax.lax.pcast(kernel, "data", to="varying") if is_shard else kernel
        )
        return x_grad, jax.lax.psum(kernel_grad, "data") if is_shard else kernel_grad

    want = jax.jit(gradients)(X, kernel)
    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
    if runner == "jit":
        sharded = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
        got = jax.jit(gradients)(sharded, jax.device_put(kernel, jax.NamedSharding(mesh, P())))
    else:
        got = jax.jit(jax.shard_map(partial(gradients, is_shard=True), mesh=mesh, **specs))(X, kernel)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
        assert np.abs(b).max() > 1


def test_drop_path_grows_from_zero_at_the_first_block_to_the_rate_at_the_last():
    net = ConvNeXt(n_outputs=2, depths=(1, 2), widths=(8, 8), drop_path_rate=0.4)
    rates = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, ConvNeXtBlock):
            rates["/".join(context.module.path)] = context.module.drop_path_rate
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(net.init, jax.random.key(0), X)
    np.testing.assert_allclose([rates[path] for path in sorted(rates)], [0.0, 0.2, 0.4])


def test_layer_scale_zero_makes_a_block_the_identity():
    net = ConvNeXtBlock(3, layer_scale_init=0.0, drop_path_rate=0.5)
    variables = init(net)
    y = jax.jit(lambda v: net.apply(v, X, train=True, rngs={"dropout": jax.random.key(0)}))(variables)
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize(
    ("model", "fields", "parts"),
    [
        (CNN, {"features": (), "pool": "maks"}, ["CNN: 2", "features=()", "'max'"]),
        (CNN, {"convs_per_stage": 0, "reduce": "sum", "dense_width": -1}, ["CNN: 3", "convs_per_stage=0"]),
        (CNN, {"dropout_rate": 1.5, "norm": "gruop"}, ["CNN: 2", "dropout_rate=1.5", "did you mean 'group'"]),
        (ResNet, {"stage_sizes": 4, "width": 0}, ["ResNet: 2", "stage_sizes=4", "width=0"]),
        (ResNet, {"stem": "cifar", "block": "basic", "activation": "rleu"}, ["ResNet: 3", "stem='cifar'", "'relu'"]),
        (ConvNeXt, {"depths": (1, 2), "kernel_size": 4}, ["ConvNeXt: 2", "one length", "kernel_size=4 must be odd"]),
        (ConvNeXt, {"widths": (), "drop_path_rate": -1, "stem_size": 0}, ["ConvNeXt: 3", "widths=()"]),
    ],
)  # fmt: skip
def test_all_problems_are_listed_at_construction(model, fields, parts):
    with pytest.raises(ModelError) as caught:
        model(n_outputs=2, **fields)
    for part in parts:
        assert part in str(caught.value)


def test_images_that_do_not_fit_are_refused_before_compilation():
    cases = [
        (CNN(n_outputs=2), X[:, :7], "halves them to nothing below 8 x 8"),
        (ConvNeXt(n_outputs=2), X[:, :, :7], "below 8 x 8"),
        (SMALL_RESNET(), X.astype(np.uint8), "pixels are uint8"),
        (SMALL_RESNET(), X[0], r"must be \(batch, height, width, channels\)"),
    ]
    for model, x, pattern in cases:
        with pytest.raises(ModelError, match=pattern):
            jax.eval_shape(model.init, jax.random.key(0), x)
