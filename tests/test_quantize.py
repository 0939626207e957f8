"""Codes against NumPy, bounds of the error, bytes, and a model over codes against one over what they stand for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, make_train_step, paths
from jaxdl.checkpoint import Store
from jaxdl.finetune import quantize as q
from jaxdl.finetune.adapters import adapted, with_adapters
from jaxdl.finetune.lora import Lora, add, merge
from jaxdl.losses import LossOut, with_compute_dtype
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.transformer import stack_layers

# bitsandbytes/csrc/kernels.cu, dDequantizeNF4: the published values by their four bits.
PUBLISHED = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
TABLE = np.array([float(x) for x in PUBLISHED.split()])
MATRIX = np.random.default_rng(0).normal(size=(6, 192)).astype(np.float32)
ALL = [(".*/(kernel|embedding)", "nf4"), (".*", None)]


def encoded(matrix, kind):
    return q.quantize({"kernel": jnp.asarray(matrix)}, [("kernel", kind)])["kernel"]


def numpy_codes(matrix, kind, block):
    """Number by number, by the definition: the nearest of all steps."""
    steps = TABLE if kind == "nf4" else np.arange(-127, 128) / 127
    blocks = matrix.astype(np.float64).reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    codes = [[np.argmin(np.abs(steps - x / m)) for x in row] for row, m in zip(blocks, absmax, strict=True)]
    return np.array(codes).reshape(matrix.shape), absmax.reshape(*matrix.shape[:-1], -1), steps


def unpacked(codes):
    return np.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize(("shape", "block"), [((6, 192), 64), ((5, 96), 32), ((2, 3, 4, 8), 8), ((7, 2, 64), 64)])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_are_those_of_numpy(kind, shape, block):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    leaf = encoded(matrix, kind)
    codes, absmax, steps = numpy_codes(matrix, kind, block)
    ours = np.asarray(leaf.codes)
    np.testing.assert_array_equal(unpacked(ours) if kind == "nf4" else ours.astype(int) + 127, codes)
    np.testing.assert_array_equal(np.asarray(leaf.absmax).view(np.float32), absmax)
    assert (leaf.kind, leaf.shape) == (kind, shape)
    meant = steps[codes] * np.repeat(absmax, block, axis=-1)
    np.testing.assert_allclose(q.dequantize(leaf), meant, rtol=3e-7)


def test_the_values_are_the_published_ones():
    np.testing.assert_array_equal(q.NF4, TABLE)
    # and those are quantiles of a normal distribution, 8 below zero and 9 above (Dettmers et al. 2023, eq. 4)
    offset, normal = 0.9677083, torch_normal()
    above, below = normal(np.linspace(offset, 0.5, 9)[:-1]), -normal(np.linspace(offset, 0.5, 8)[:-1])
    derived = np.sort([*above, 0.0, *below]) / above.max()
    np.testing.assert_allclose(derived, TABLE, atol=2e-6)


def torch_normal():
    torch = pytest.importorskip("torch")
    return lambda p: torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(p)).numpy()


def test_int8_is_wrong_by_half_a_step_at_most():
    wrong = np.abs(np.asarray(q.dequantize(encoded(MATRIX, "int8"))) - MATRIX).reshape(-1, 64)
    half_a_step = np.abs(MATRIX.reshape(-1, 64)).max(1, keepdims=True) / 254
    assert (wrong <= half_a_step * 1.001).all()
    assert wrong.max() > 0.9 * half_a_step.min()  # and not better, as a copy would be


def test_nf4_is_wrong_by_half_a_gap_at_most_and_less_on_average():
    wrong = np.abs(np.asarray(q.dequantize(encoded(MATRIX, "nf4"))) - MATRIX).reshape(-1, 64)
    absmax = np.abs(MATRIX.reshape(-1, 64)).max(1, keepdims=True)
    assert (wrong <= absmax * np.diff(TABLE).max() / 2 * 1.001).all()
    relative = np.sqrt(np.mean(wrong**2)) / MATRIX.std()
    assert 0.05 < relative < 0.12


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_twice_is_once_and_extremes_are_exact(kind):
    leaf = encoded(MATRIX, kind)
    again = encoded(q.dequantize(leaf), kind)
    np.testing.assert_array_equal(leaf.codes, again.codes)
    largest = np.abs(MATRIX.reshape(-1, 64)).argmax(1)
    rows = np.arange(len(largest))
    plain = np.asarray(q.dequantize(leaf)).reshape(-1, 64)
    np.testing.assert_allclose(plain[rows, largest], MATRIX.reshape(-1, 64)[rows, largest], rtol=2e-7)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zeros(kind):
    assert not np.asarray(q.dequantize(encoded(np.zeros((2, 64), np.float32), kind))).any()


@pytest.mark.parametrize(("kind", "a_number"), [("nf4", 0.5 + 4 / 64), ("int8", 1 + 4 / 64), ("bfloat16", 2.0)])
def test_bytes_are_those_of_arithmetic(kind, a_number):
    _, params, _ = tiny(width=64, hidden=192)
    small = q.quantize(params, [(".*/(kernel|embedding)", kind), (".*", None)])
    flat = paths.flatten(params)
    matrices = sum(leaf.size for path, leaf in flat.items() if path.endswith(("/kernel", "/embedding")))
    rest = sum(leaf.size for leaf in flat.values()) - matrices
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(small))
    assert held == q.bytes_held(small) == matrices * a_number + rest * 4
    abstract = jax.eval_shape(lambda tree: q.quantize(tree, [(".*/(kernel|embedding)", kind), (".*", None)]), params)
    assert q.bytes_held(abstract) == held


def tiny(n_layers=2, width=32, hidden=64, **fields):
    block = llama_block(width=width, n_heads=2, hidden=hidden)
    model = Llama(block, n_layers=n_layers, vocab_size=19, **{"layout": "unrolled", **fields})
    tokens = np.random.default_rng(2).integers(0, 19, (3, 8))
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(np.roll(tokens, -1, 1))}
    params, _ = init_model(model, jax.random.key(0), batch["tokens"])
    return model, params, batch


def tied(n_layers=1, **fields):
    model = GPT2(gpt2_block(width=32, n_heads=2), n_layers=n_layers, vocab_size=19, n_positions=8, **fields)
    _, _, batch = tiny()
    params, _ = init_model(model, jax.random.key(0), batch["tokens"])
    return model, params, batch


@pytest.mark.parametrize(("make", "kind"), [(tiny, "int8"), (tied, "nf4")])
def test_a_model_over_codes_is_the_one_over_what_they_stand_for(make, kind):
    model, params, batch = make()
    small = q.quantize(params, [(".*/(kernel|embedding)", kind), (".*", None)])
    logits = jax.jit(q.with_quantized(model.apply))({"params": small}, batch["tokens"])
    meant = jax.jit(model.apply)({"params": q.dequantize(small)}, batch["tokens"])
    np.testing.assert_allclose(logits, meant, atol=2e-6)
    plain = jax.jit(model.apply)({"params": params}, batch["tokens"])
    assert float(jnp.abs(logits - plain).max()) > 1e-4


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="conv")(x)
        x = nn.ConvTranspose(8, (2, 2), name="up")(x)
        return nn.DenseGeneral((2, 8), axis=(1, 2, 3), name="general")(x)


def test_every_kind_of_module_with_a_kernel():
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    params = Convolved().init(jax.random.key(0), x)["params"]
    small = q.quantize(params, ALL)
    assert sum(path.endswith("codes") for path in paths.flatten(small)) == 3
    meant = Convolved().apply({"params": q.dequantize(small)}, x)
    np.testing.assert_allclose(q.with_quantized(Convolved().apply)({"params": small}, x), meant, atol=1e-6)


def test_attend_of_an_embedding():
    model = nn.Embed(16, 32)
    params = model.init(jax.random.key(0), jnp.array([1]))["params"]
    small = q.quantize(params, [("embedding", "nf4")])
    query = jax.random.normal(jax.random.key(1), (3, 32))
    meant = model.apply({"params": q.dequantize(small)}, query, method="attend")
    attend = q.with_quantized(lambda *a: model.apply(*a, method="attend"))
    np.testing.assert_allclose(attend({"params": small}, query), meant, rtol=1e-6)
    beyond = q.with_quantized(model.apply)({"params": small}, jnp.array([15, 16]))
    assert np.isfinite(beyond[0]).all()
    assert np.isnan(beyond[1]).all()  # as nn.Embed does


def test_a_scanned_stack_is_sliced():
    model, params, batch = tiny(n_layers=3)
    scanned = model.clone(layout="scanned")
    small = q.quantize(stack_layers(params), ALL)
    assert small["decoder"]["layers"]["mlp"]["down"]["kernel"].codes.shape == (3, 64, 16)
    one_by_one = q.quantize(params, ALL)
    for path, leaf in paths.flatten(stack_layers(one_by_one)).items():
        np.testing.assert_array_equal(leaf, paths.flatten(small)[path])
    logits = jax.jit(q.with_quantized(scanned.apply))({"params": small}, batch["tokens"])
    unrolled = jax.jit(q.with_quantized(model.apply))({"params": one_by_one}, batch["tokens"])
    np.testing.assert_allclose(logits, unrolled, atol=2e-6)


def test_gradients_through_codes_are_those_through_what_they_stand_for():
    """Everything that is no matrix trains: norms at the bottom need the gradient of every kernel above."""
    model, params, batch = tiny(n_layers=1, remat="full")
    small = q.quantize(params, ALL)
    trainable = [(".*/(codes|absmax|kernel|embedding)", False), (".*", True)]
    loss_fn = make_language_loss_fn(model, train=True, chunk_tokens=6)
    states = []
    for loss, tree in ((q.with_quantized(loss_fn), small), (loss_fn, q.dequantize(small))):
        state = create_state(tree, {}, optax.sgd(1.0), rng=jax.random.key(0), trainable=trainable)
        state, metrics = jax.jit(make_train_step(loss, optax.sgd(1.0), trainable=trainable))(state, batch)
        states.append((paths.flatten(state.params), metrics["grad_norm"]))
    (ours, norm), (meant, other) = states
    np.testing.assert_allclose(norm, other, rtol=1e-5)
    moved = [path for path, leaf in ours.items() if path in meant and not path.endswith(("kernel", "embedding"))]
    assert len(moved) >= 3
    for path in moved:
        np.testing.assert_allclose(ours[path], meant[path], atol=1e-5, err_msg=path)
        assert float(jnp.abs(ours[path] - paths.flatten(params)[path]).max()) > 1e-4, path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_is_the_modules_or_else_the_inputs(dtype):
    params = q.quantize({"kernel": jnp.ones((8, 64))}, [("kernel", "nf4")])
    x = jnp.ones((2, 8), dtype)
    run = q.with_quantized(lambda module: module.apply({"params": params}, x).dtype)
    assert run(nn.Dense(64, use_bias=False)) == dtype
    assert run(nn.Dense(64, use_bias=False, dtype=jnp.bfloat16)) == jnp.bfloat16


def test_a_cast_of_the_parameters_leaves_the_codes_exact():
    seen = {}

    def loss_fn(params, extra, batch, rng):
        seen.update(paths.flatten(params))
        return LossOut(jnp.sum(q.dequantize(params)["kernel"]), jnp.float32(1))

    params = q.quantize({"kernel": jnp.asarray(MATRIX)}, [("kernel", "int8")])
    with_compute_dtype(loss_fn, jnp.bfloat16)(params, {}, {}, None)
    for path, leaf in paths.flatten(params).items():
        np.testing.assert_array_equal(seen[path], leaf)


def test_codes_cannot_train():
    params = q.quantize({"kernel": jnp.asarray(MATRIX), "bias": jnp.zeros(3)}, [("kernel", "nf4"), ("bias", None)])
    with pytest.raises(JaxdlError, match=r"not floating: \['kernel/codes', 'kernel/absmax'\]; freeze them"):
        create_state(params, {}, optax.sgd(0.1), rng=jax.random.key(0))
    create_state(params, {}, optax.sgd(0.1), rng=jax.random.key(0), trainable=[("kernel/.*", False), (".*", True)])


def test_a_checkpoint_keeps_the_codes(tmp_path):
    params = {"dense": q.quantize({"kernel": jnp.asarray(MATRIX)}, [("kernel", "nf4")])}
    with Store(tmp_path) as store:
        store.save(1, params)
        back = store.restore(jax.eval_shape(lambda: params)).state
    assert isinstance(back["dense"]["kernel"], q.Quantized)
    assert sorted(paths.flatten(back)) == ["dense/kernel/absmax", "dense/kernel/codes"]
    for path, leaf in paths.flatten(back).items():
        np.testing.assert_array_equal(leaf, paths.flatten(params)[path])


def test_all_problems_are_told_at_once():
    matrix = jnp.ones((8, 64))
    params = {
        "adapters": {"down": {"kernel": matrix}},
        "bias": jnp.ones(64),
        "count": jnp.ones((8, 64), jnp.int32),
        "head": {"kernel": jnp.ones((8, 10))},
        "scale": matrix,
        "typo": {"kernel": matrix},
    }
    with pytest.raises(JaxdlError) as told:
        q.quantize(params, [("typo/.*", "nf5"), (".*", "int8")])
    head, *problems = str(told.value).splitlines()
    assert head == "quantize: 6 problem(s)"
    for problem, (path, reason, remedy) in zip(
        problems,
        [
            ("adapters/down/kernel", "belongs to an adapter, which trains", "Put ('adapters/.*', None) first."),
            ("bias [64]", "is no matrix named kernel or embedding.", "Give it None or 'bfloat16'."),
            ("count", "is int32; only floating leaves can be quantised.", "Give it None."),
            ("head/kernel", "has a last axis of 10, in blocks of 2; it must be a multiple of 8.", "Give it None"),
            ("scale [8, 64]", "is no matrix named kernel or embedding.", "Give it None or 'bfloat16'."),
            (
                "typo/kernel",
                "has the kind 'nf5', which is unknown; did you mean 'nf4' or 'int8'?",
                "None leaves a leaf",
            ),
        ],
        strict=True,
    ):
        assert problem.startswith(f"  - {path} {reason}")
        assert remedy in problem


def test_dead_and_missing_rules_are_errors():
    params = {"dense": {"kernel": jnp.ones((8, 64)), "bias": jnp.ones(64)}}
    with pytest.raises(paths.RuleError, match=r"(?s)'dens/kernel' matches nothing.*no rule covers dense/bias"):
        q.quantize(params, [("dens/kernel", "nf4"), (".*/kernel", "nf4")])


def test_codes_are_not_quantised_again():
    params = q.quantize({"kernel": jnp.asarray(MATRIX)}, [("kernel", "int8")])
    with pytest.raises(JaxdlError, match="kernel/codes is int8; only floating leaves"):
        q.quantize(params, [(".*", "nf4")])


def test_one_layer_at_a_time_is_whole():
    """12 layers, everything compiled in one program: neither direction may hold all matrices."""
    model, _, _ = tiny(n_layers=1)
    block = llama_block(width=128, n_heads=2, hidden=256)
    model = model.clone(block=block, n_layers=12, layout="unrolled")
    batch = {name: jnp.zeros((1, 4), jnp.int32) for name in ("tokens", "targets")}
    base = jax.eval_shape(lambda: model.init(jax.random.key(0), batch["tokens"])["params"])
    trainable = [(".*/(codes|absmax)", False), (".*", True)]
    tx = optax.sgd(1.0)

    def start(params):
        return create_state(q.quantize(params, ALL), {}, tx, rng=jax.random.key(0), trainable=trainable)

    loss_fn = q.with_quantized(make_language_loss_fn(model, train=True))
    step = jax.jit(make_train_step(loss_fn, tx, trainable=trainable), donate_argnums=0)
    memory = step.lower(jax.eval_shape(start, base), batch).compile().memory_analysis()
    assert q.bytes_held(base) > 7.5e6
    assert memory.argument_size_in_bytes < q.bytes_held(base) * 0.16
    assert memory.temp_size_in_bytes < q.bytes_held(base) * 0.16


def scanned(n_layers):
    return tiny(n_layers=n_layers + 1, layout="scanned")


RANKS = [(".*/(query|down)/kernel", 2), (".*", None)]
ADAPTERS_TRAIN = [("adapters/.*", True), (".*", False)]


@pytest.mark.parametrize(
    ("make", "settings"), [(scanned, Lora(RANKS)), (tied, Lora([("embed/token/embedding", 2), *RANKS]))]
)
def test_adapters_over_codes_move_as_over_what_they_stand_for(make, settings):
    model, params, batch = make(n_layers=1)
    small = q.quantize(params, ALL)
    loss_fn = with_adapters(make_language_loss_fn(model, train=True), settings)
    tx, states = optax.adam(1e-3), []
    for base in (small, q.dequantize(small)):
        state = create_state(
            add(jax.random.key(1), base, settings, model, batch["tokens"]),
            {},
            tx,
            rng=jax.random.key(0),
            trainable=ADAPTERS_TRAIN,
        )
        step = jax.jit(make_train_step(loss_fn, tx, trainable=ADAPTERS_TRAIN))
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"].finish())
        states.append((state.params, losses))
    (ours, losses), (meant, other) = states
    np.testing.assert_allclose(losses, other, rtol=1e-5)
    assert losses[2] < losses[0]
    for path, leaf in paths.flatten(ours["adapters"]).items():
        np.testing.assert_allclose(leaf, paths.flatten(meant["adapters"])[path], atol=2e-5, err_msg=path)
    for path, leaf in paths.flatten(small).items():
        np.testing.assert_array_equal(paths.flatten(ours)[path], leaf)
    merged = merge(q.dequantize(ours), settings)
    beside = jax.jit(adapted(model.apply, settings))({"params": ours}, batch["tokens"])
    np.testing.assert_allclose(jax.jit(model.apply)({"params": merged}, batch["tokens"]), beside, atol=2e-5)


def test_dora_reads_the_kernel_that_the_codes_stand_for():
    model, settings = nn.Dense(64), Lora([("kernel", 2)], has_magnitude=True)
    x = jax.random.normal(jax.random.key(0), (4, 16))
    small = q.quantize(model.init(jax.random.key(1), x)["params"], [("kernel", "nf4"), ("bias", None)])
    outputs, gradients = [], []
    for base in (small, q.dequantize(small)):
        params = add(jax.random.key(2), base, settings, model, x)
        params["adapters"]["b"] = params["adapters"]["b"] + 0.1

        def loss(adapters, params=params):
            y = adapted(model.apply, settings)({"params": {**params, "adapters": adapters}}, x)
            return jnp.sum(y**2), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(params["adapters"])
        outputs.append(y)
        gradients.append(gradient)
    np.testing.assert_allclose(*outputs, atol=1e-5)
    for name, leaf in gradients[0].items():
        np.testing.assert_allclose(leaf, gradients[1][name], rtol=1e-4, atol=1e-4)
