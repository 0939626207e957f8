"""One step over every layout of eight devices: the same numbers over twenty updates."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdl import make_train_step, repeat
from jaxdl.compilation import unkept
from jaxdl.data import ArraySource, Pipeline
from jaxdl.errors import JaxdlError
from jaxdl.loop import fit
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.parallel import (
    REPLICATED,
    ShardingError,
    Split,
    constrained,
    jit_step,
    make_mesh,
    pmap_step,
    put_batch,
    shard_map_step,
    state_shardings,
    tensor_parallel,
    with_fsdp,
    zero,
)
from jaxdl.paths import flatten
from tests import small_networks

pytestmark = pytest.mark.optimized

STEPS, FLOOR_BYTES = 20, 512
FSDP = functools.partial(with_fsdp, floor_bytes=FLOOR_BYTES)


@pytest.fixture(autouse=True)
def compiled_anew():
    """Read back from the compile cache, `lstm-tensor` waits for ever: see `jaxdl.compilation.Compiled`."""
    with unkept():
        yield


def place(rules, **axes):
    """jit_step over a mesh, with rules made for the state."""

    def make(step, state):
        mesh = make_mesh(**axes)
        return jit_step(step(), mesh, state_shardings(rules(state), state, mesh))

    return make


LAYOUTS = {
    "jit": place(lambda state: REPLICATED, data=8),
    "zero 1": place(lambda state: zero(1, floor_bytes=FLOOR_BYTES), data=8),
    "fsdp": place(lambda state: zero(3, floor_bytes=FLOOR_BYTES), data=8),
    "tensor": place(tensor_parallel, data=2, model=4),
    "fsdp x tensor": place(lambda state: FSDP(tensor_parallel(state)), data=4, model=2),
    "shard_map": lambda step, state: shard_map_step(step(axis_name="data"), make_mesh(data=8)),
    "pmap": lambda step, state: pmap_step(step(axis_name="data"), make_mesh(data=8)),
}
SEQUENCE = {"sequence": place(lambda state: FSDP(REPLICATED), data=2, sequence=4)}
CASES = [(name, layout) for name in small_networks.NETWORKS for layout in LAYOUTS]
CASES += [(name, "sequence") for name in ("gpt", "bert_lora", "lstm")]
QUICK = {
    "mlp": LAYOUTS,
    "gpt": {"jit", "fsdp x tensor", "shard_map", "sequence"},
    "cnn": {"fsdp"},
    "lstm": {"shard_map"},
    "bert_lora": {"fsdp x tensor"},
}
CASES = [pytest.param(*case, marks=[] if case[1] in QUICK[case[0]] else pytest.mark.proof) for case in CASES]


def train(task, make):
    step = functools.partial(make_train_step, task.loss_fn, task.optimizer(), trainable=task.trainable)
    state = task.state()
    run, losses = make(step, state), []
    for i in range(STEPS):
        rows = (np.arange(8) + 8 * i) % small_networks.N_ROWS
        state, metrics = run(state, {name: value[rows] for name, value in task.data.items()})
        losses.append(jax.device_get(metrics["loss"]).finish())
    return jax.device_get(state), losses


@functools.cache
def reference(name):
    task = small_networks.NETWORKS[name]()
    return task, *train(task, lambda step, state: jax.jit(step()))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_computes_the_same(name, layout):
    task, state, losses = reference(name)
    found, theirs = train(task, (LAYOUTS | SEQUENCE)[layout])
    np.testing.assert_allclose(theirs, losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    # Adam's division lets the noise of the smallest gradients grow: entries are compared with the largest of a leaf.
    for path, leaf in flatten(found.params).items():
        ours = flatten(state.params)[path]
        np.testing.assert_allclose(leaf, ours, rtol=0, atol=1e-5 * max(1.0, np.abs(ours).max()), err_msg=path)


@pytest.mark.parametrize("layout", ["tensor", "fsdp x tensor"])
def test_a_transformer_is_cut_where_megatron_cuts_it(layout):
    state = small_networks.gpt().state()
    mesh = make_mesh(data=2, model=4)
    rules = tensor_parallel(state)
    shardings = flatten(state_shardings(rules if layout == "tensor" else FSDP(rules), state, mesh).params)
    cut = {path: (*sharding.spec, None, None)[:2] for path, sharding in shardings.items()}
    other = "data" if layout == "fsdp x tensor" else None
    assert cut["decoder/layer_0/attention/query/kernel"] == (other, "model")
    assert cut["decoder/layer_0/attention/output/kernel"] == ("model", other)
    assert cut["decoder/layer_1/mlp/down/kernel"] == ("model", other)
    assert cut["embed/token/embedding"] == ("model", other)


# ---- fit ----


@functools.cache
def fitted(steps_per_call=1, mesh=None, rules=None, is_resident=False):
    task = small_networks.gpt(dropout_rate=0.1)
    data = Pipeline(ArraySource(task.data), batch_size=8, seed=3)
    step = make_train_step(task.loss_fn, task.optimizer(), microbatches=2)
    state, options = task.state(), {}
    if mesh is not None:
        options = {"mesh": make_mesh(**dict(mesh)), "sharding": rules(state)}
    done = fit(state, step, data, steps=6, steps_per_call=steps_per_call, is_resident=is_resident, **options)
    return jax.device_get(flatten(done.state.params))


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": (("data", 4), ("model", 2)), "rules": lambda state: FSDP(tensor_parallel(state))},
        {"mesh": (("data", 2), ("sequence", 4)), "rules": lambda state: FSDP(REPLICATED), "steps_per_call": 3},
        {"mesh": (("data", 8),), "rules": lambda state: FSDP(REPLICATED), "steps_per_call": 2, "is_resident": True},
    ],
)
def test_fit_computes_the_same_with_dropout_and_microbatches_on_any_mesh(options):
    for path, leaf in fitted(**options).items():
        np.testing.assert_allclose(leaf, fitted()[path], rtol=0, atol=2e-5, err_msg=path)


def test_fit_refuses_a_mesh_whose_devices_would_do_the_same_work_twice():
    task = small_networks.mlp()
    data = Pipeline(ArraySource(task.data), batch_size=8)
    step = make_train_step(task.loss_fn, task.optimizer())
    with pytest.raises(JaxdlError, match="nothing lies over 'model'"):
        fit(task.state(), step, data, steps=1, mesh=make_mesh(data=4, model=2))
    with pytest.raises(ShardingError, match="axis 'modle'"):
        fit(task.state(), step, data, steps=1, mesh=make_mesh(data=8), sharding=column("modle"))


def column(axis):
    return [("params/.*/kernel", Split(axis)), (".*", None)]


# ---- what the compiler makes of it ----


MESHES = {
    "jit": (lambda state: REPLICATED, {"data": 8}),
    "fsdp": (lambda state: zero(3, floor_bytes=FLOOR_BYTES), {"data": 8}),
    "tensor": (tensor_parallel, {"data": 2, "model": 4}),
    "fsdp x tensor": (lambda state: FSDP(tensor_parallel(state)), {"data": 4, "model": 2}),
    "sequence": (lambda state: FSDP(REPLICATED), {"data": 2, "sequence": 4}),
}


@functools.cache
def wide_gpt(microbatches):
    """Wide enough for its products to outweigh the rest: (step, state, batch, FLOPs on one device)."""
    block = gpt2_block(width=128, n_heads=8)
    model = GPT2(block, n_layers=2, vocab_size=512, n_positions=64)
    text = np.random.default_rng(0).integers(0, 512, (16, 65)).astype(np.int32)
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    params, _ = init_model(model, jax.random.key(0), batch["tokens"][:1])
    task = small_networks.Task(make_language_loss_fn(model, train=True), params, batch)
    step, state = make_train_step(task.loss_fn, task.optimizer(), microbatches=microbatches), task.state()
    return step, state, batch, flops_of(jax.jit(step).lower(state, batch).compile())


def flops_of(compiled):
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    [
        ("fsdp", 1),
        ("fsdp x tensor", 2),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in (("jit", 1), ("tensor", 1), ("fsdp x tensor", 1))),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in (("sequence", 1), ("jit", 2))),
    ],
)
def test_eight_devices_share_the_work_of_one(layout, microbatches):
    step, state, batch, alone = wide_gpt(microbatches)
    rules, axes = MESHES[layout]
    mesh = make_mesh(**axes)
    shardings = state_shardings(rules(state), state, mesh)
    spread = compile_step(step, jax.device_put(state, shardings), batch, mesh, shardings)
    assert 8 * flops_of(spread) / alone < 1.15
    if layout == "fsdp":  # one layer's arrays at a time
        largest = max(leaf.size for leaf in jax.tree.leaves(state.params))
        assert 0 < max(gathered(spread.as_text())) <= largest


def compile_step(step, state, batch, mesh, shardings=None):
    return jax.jit(constrained(step, mesh, shardings)).lower(state, put_batch(batch, mesh)).compile()


def gathered(text):
    """Elements of each result of an all-gather in a program."""
    found = re.findall(r"= (\(?[^=]*?\)?) all-gather(?:-start)?\(", text)
    shapes = [shape for result in found for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def test_runners_of_one_axis_refuse_others():
    step = make_train_step(small_networks.mlp().loss_fn, small_networks.mlp().optimizer(), axis_name="data")
    for runner in (shard_map_step, pmap_step):
        with pytest.raises(ShardingError, match=r"has the axes data, model; this runner takes one"):
            runner(step, make_mesh(data=4, model=2))


def test_repeat_composes_with_a_layout():
    task = small_networks.mlp()
    step, state = make_train_step(task.loss_fn, task.optimizer()), task.state()
    batches = {name: np.stack([value[:8], value[8:]]) for name, value in task.data.items()}
    once, _ = jax.jit(repeat(step, 2))(state, batches)
    mesh = make_mesh(data=8)
    shardings = state_shardings(zero(3, floor_bytes=FLOOR_BYTES), state, mesh)
    spread, _ = jax.jit(repeat(constrained(step, mesh, shardings), 2))(
        jax.device_put(state, shardings), put_batch(batches, mesh, n_leading=1)
    )
    for a, b in zip(jax.tree.leaves(once.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
