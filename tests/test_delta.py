"""Deltas: what moved and nothing else, on its own base and no other."""

import json
from contextlib import closing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import LossOut, create_state, guard, make_optimizer, make_train_step
from jaxdl.checkpoint import CheckpointError, CheckpointMismatch, Store
from jaxdl.checkpoint.manifest import read as read_manifest
from jaxdl.data import ArraySource, Pipeline
from jaxdl.finetune.contract import ContractError, Frozen
from jaxdl.finetune.delta import DeltaStore, load_delta, read_delta, save_delta
from jaxdl.finetune.presets import bitfit
from jaxdl.finetune.unfreeze import fit_stages, staged
from jaxdl.loop import fit
from jaxdl.models.bert import Bert, bert_block
from jaxdl.paths import flatten
from jaxdl.report import JsonlWriter

RULES = [("head/.*", True), (".*", False)]


def model(seed=0):
    """A base of 4 KiB, a head of 0.5 KiB, statistics of a frozen module and of one that trains."""
    rng = np.random.default_rng(seed)
    params = {
        "body": {"kernel": rng.normal(size=(32, 32)).astype(np.float32), "scale": jnp.bfloat16(1.5)},
        "head": {"kernel": rng.normal(size=(32, 4)).astype(np.float32)},
    }
    extra = {"batch_stats": {"body": {"mean": np.ones(32, np.float32)}, "head": {"mean": np.zeros(4, np.float32)}}}
    return jax.tree.map(jnp.asarray, (params, extra))


PARAMS, EXTRA = model()
TX = make_optimizer("adamw", learning_rate=0.01)
FROZEN = Frozen(PARAMS, EXTRA, RULES)


def loss_fn(params, extra, batch, rng):
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"]) * params["body"]["scale"].astype(jnp.float32)
    noise = 0.1 * jax.random.normal(rng, hidden.shape)
    out = (hidden + noise) @ params["head"]["kernel"]
    statistics = {**extra["batch_stats"], "head": {"mean": jnp.mean(out, 0)}}
    return LossOut(jnp.sum((out - batch["y"]) ** 2), jnp.float32(len(out)), {}, {"batch_stats": statistics})


def pieces(rules=RULES, tx=TX):
    state = create_state(PARAMS, EXTRA, tx, rng=jax.random.key(1), trainable=rules)
    return state, guard(make_train_step(loss_fn, tx, trainable=rules)), DATA


RNG = np.random.default_rng(7)
X = RNG.normal(size=(40, 32)).astype(np.float32)
DATA = Pipeline(ArraySource({"x": X, "y": X[:, :4]}), batch_size=8, seed=0)


def run(folder, steps, store):
    with closing(JsonlWriter(folder / "metrics.jsonl")) as writer, store:
        return fit(*pieces(), steps=steps, store=store, writers=[writer], log_every=4, checkpoint_every=4)


def same(a, b):
    chex.assert_trees_all_equal(a.replace(rng=jax.random.key_data(a.rng)), b.replace(rng=jax.random.key_data(b.rng)))


def test_a_run_with_deltas_is_the_run_with_whole_checkpoints(tmp_path):
    """Stopped and resumed at 6 of 12 steps, on both roads."""
    whole = run(tmp_path / "whole", 12, Store(tmp_path / "whole" / "checkpoints"))
    for steps in (6, 12):
        small = run(tmp_path, steps, DeltaStore(Store(tmp_path / "checkpoints"), FROZEN))
    same(small.state, whole.state)
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path, tmp_path / "whole")]
    assert rows[0][-2:] == rows[1][-2:]
    assert FROZEN.check(small.state.params, small.state.extra).startswith("3 leaves")


def test_a_checkpoint_is_the_trainable_bytes_the_optimizers_and_a_constant(tmp_path):
    """Counted twice: the leaves of the manifest, exactly; and the files on disk, which hold random numbers."""
    state, _, _ = pieces()
    sizes = {}
    for name, store in (("whole", Store(tmp_path / "whole")), ("delta", DeltaStore(Store(tmp_path / "delta"), FROZEN))):
        with store:
            store.save(3, state.replace(step=jnp.int32(3)))
        folder = tmp_path / name / "3"
        leaves = read_manifest(folder).leaves
        n_bytes = sum(int(np.prod(leaf.shape)) * (8 if "key" in leaf.dtype else 4) for leaf in leaves.values())
        sizes[name] = (leaves, n_bytes, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    leaves, n_bytes, on_disk = sizes["delta"]
    head, statistics = 32 * 4 * 4, 4 * 4
    optimizer = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert optimizer == 2 * head + 3 * 4  # two moments, two counts and the rate
    assert n_bytes == head + statistics + optimizer + 4 + 8  # the step, the key
    assert not [path for path in leaves if "body" in path]
    base = sum(leaf.nbytes for leaf in jax.tree.leaves((PARAMS["body"], EXTRA["batch_stats"]["body"])))
    assert sizes["whole"][2] - on_disk > 0.8 * base
    assert on_disk < n_bytes + 14_000  # Orbax's own files and the manifest


def test_a_wrong_base_is_refused_with_the_leaves_that_differ(tmp_path):
    state, _, _ = pieces()
    with DeltaStore(Store(tmp_path), FROZEN) as store:
        store.save(1, state)
    params, extra = model()
    params["body"]["kernel"] = params["body"]["kernel"].at[3, 4].add(1e-6)
    other = DeltaStore(Store(tmp_path), Frozen(params, extra, RULES))
    with pytest.raises(CheckpointMismatch) as error:
        other.restore(create_state(params, extra, TX, rng=jax.random.key(1), trainable=RULES))
    text = str(error.value)
    assert f"step 1 in {tmp_path} was made on another base: 1 problem(s)" in text
    assert "params/body/kernel has sha256" in text
    assert "scale" not in text
    assert "Remedy: give the very parameters" in text
    with pytest.raises(ContractError, match="params/body/kernel"):  # the right contract, the wrong state
        store.restore(create_state(params, extra, TX, rng=jax.random.key(1), trainable=RULES))


def test_other_rules_a_whole_checkpoint_and_a_plain_store_are_refused(tmp_path):
    state, _, _ = pieces()
    with DeltaStore(Store(tmp_path / "delta"), FROZEN) as store, Store(tmp_path / "whole") as whole:
        store.save(1, state)
        whole.save(1, state)
        store.wait()
        whole.wait()
        with pytest.raises(CheckpointMismatch, match=r"params/body/kernel float32\[32,32\] is not in the checkpoint"):
            Store(tmp_path / "delta").restore(state)
        with pytest.raises(CheckpointMismatch, match=r"params/body/kernel float32\[32,32\] is only in the checkpoint"):
            DeltaStore(whole, FROZEN).restore(state)
        everything = Frozen(PARAMS, EXTRA, [(".*", True)])
        with pytest.raises(CheckpointMismatch, match="is no delta: it holds no hash of a base"):
            DeltaStore(whole, everything).restore(state)
        rules = [(".*/kernel", True), (".*", False)]
        with pytest.raises(CheckpointMismatch, match="params/body/kernel"):
            DeltaStore(Store(tmp_path / "delta"), Frozen(PARAMS, EXTRA, rules)).restore(pieces(rules)[0])
        with pytest.raises(CheckpointError, match="metadata has the key 'delta'"):
            store.save(2, state, metadata={"delta": 1})


def test_a_step_that_moves_frozen_leaves_is_found_at_the_first_save(tmp_path):
    state, _, _ = pieces()
    moved = jax.tree.map(lambda leaf: leaf + 1, state.params)
    with DeltaStore(Store(tmp_path), FROZEN) as store:
        with pytest.raises(ContractError, match="params/body/kernel"):
            store.save(1, state.replace(params=moved))
        assert store.steps() == []


def test_the_interface_is_that_of_the_store(tmp_path):
    state, _, _ = pieces()
    with DeltaStore(Store(tmp_path, keep_last=2, best_metric="acc"), FROZEN) as store:
        for step, accuracy in ((1, 0.9), (2, 0.5), (3, 0.7), (4, 0.6)):
            store.save(step, state.replace(step=jnp.int32(step)), metadata={"n": step}, metrics={"acc": accuracy})
        store.wait()
        store.check()
        assert (store.steps(), store.best_step(), store.damaged()) == ([1, 3, 4], 1, {})
        assert store.directory == tmp_path
        restored = store.restore(state, step=3)
        assert (restored.step, restored.metadata, int(restored.state.step)) == (3, {"n": 3}, 3)
        assert restored.state.params["body"]["kernel"] is state.params["body"]["kernel"]
    with pytest.raises(CheckpointError, match="is closed"):
        store.save(5, state)


def test_gradual_unfreezing_with_the_contract_of_its_last_stage(tmp_path):
    """Every stage's checkpoint holds what ever trains; the structure is chosen by the step on the way back too."""
    last = [("(head/.*|body/scale)", True), (".*", False)]
    stages = [(0, RULES), (4, last)]
    txs = staged(optax.adam(0.01), stages, PARAMS)
    state = create_state(PARAMS, EXTRA, txs[0], rng=jax.random.key(1), trainable=RULES)

    def make(tx, rules):
        return guard(make_train_step(loss_fn, tx, trainable=rules))

    def go_on(folder):
        with DeltaStore(Store(folder), Frozen(PARAMS, EXTRA, last)) as store:
            start = jax.tree.map(jnp.copy, state)
            return fit_stages(start, make, txs, DATA, stages=stages, steps=8, store=store, checkpoint_every=3)

    want = go_on(tmp_path)
    assert Store(tmp_path).steps() == [4, 6, 8]
    for step in (6, 8):
        (tmp_path / str(step) / "manifest.json").write_text("{}")
    same(go_on(tmp_path).state, want.state)
    assert "params/body/scale" in read_manifest(tmp_path / "4").leaves
    assert "params/body/kernel" not in read_manifest(tmp_path / "8").leaves


def test_a_delta_folder_takes_heads_adapters_and_statistics_to_the_base(tmp_path):
    """The base lacks the adapters, and its head has another shape; frozen leaves are handed on as the same objects."""
    tuned = {**PARAMS, "head": {"kernel": jnp.full((32, 7), 2.0)}, "adapters": {"body": {"a": jnp.ones((32, 2))}}}
    rules = [("(head|adapters)/.*", True), (".*", False)]
    frozen = Frozen(tuned, EXTRA, rules)
    trained = {**tuned, "adapters": jax.tree.map(lambda x: 3 * x, tuned["adapters"])}
    statistics = {"batch_stats": {**EXTRA["batch_stats"], "head": {"mean": jnp.full(4, 0.5)}}}
    save_delta(tmp_path / "delta", trained, statistics, frozen, metadata={"task": "toy"})
    manifest, arrays = read_delta(tmp_path / "delta")
    assert sorted(arrays) == ["extra/batch_stats/head/mean", "params/adapters/body/a", "params/head/kernel"]
    assert manifest.metadata["task"] == "toy"
    params, extra = load_delta(tmp_path / "delta", PARAMS, EXTRA)
    chex.assert_trees_all_equal((params, extra), (trained, statistics))
    assert params["body"]["kernel"] is PARAMS["body"]["kernel"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]
    headless, _ = load_delta(tmp_path / "delta", {"body": PARAMS["body"]}, EXTRA)
    chex.assert_trees_all_equal(headless, trained)


def test_bitfit_of_a_model_of_minilms_shape_is_below_one_percent(tmp_path):
    """Random numbers in the shape of all-MiniLM-L6-v2: 22.7 million parameters, 90.9 MB."""
    model = Bert(bert_block(384, 12, 1536), n_layers=6, vocab_size=30522, head="classify", n_outputs=20)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert n_bytes == pytest.approx(90.9e6, rel=0.01)
    frozen = Frozen(params, {}, bitfit(params))
    moved = {path: leaf if f"params/{path}" in frozen.hashes else leaf + 1 for path, leaf in flatten(params).items()}
    tuned = jax.tree.unflatten(jax.tree.structure(params), list(moved.values()))
    save_delta(tmp_path / "delta", tuned, {}, frozen)
    size = sum(file.stat().st_size for file in (tmp_path / "delta").iterdir())
    assert 100 * size / n_bytes < 1
    back, _ = load_delta(tmp_path / "delta", params)
    chex.assert_trees_all_equal(back, tuned)


def test_what_save_delta_refuses(tmp_path):
    moved = {**PARAMS, "body": jax.tree.map(lambda leaf: leaf + 1, PARAMS["body"])}
    with pytest.raises(ContractError, match="params/body/kernel"):
        save_delta(tmp_path / "delta", moved, EXTRA, FROZEN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_delta(tmp_path / "full", PARAMS, EXTRA, FROZEN)
    nan = {**PARAMS, "head": {"kernel": jnp.full((32, 4), jnp.nan)}}
    with pytest.raises(CheckpointError, match="params/head/kernel: 128 of 128 values"):
        save_delta(tmp_path / "delta", nan, EXTRA, FROZEN)
    with pytest.raises(CheckpointError, match="metadata must be JSON"):
        save_delta(tmp_path / "delta", PARAMS, EXTRA, FROZEN, metadata={"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_load_delta_refuses(tmp_path):
    save_delta(tmp_path / "delta", PARAMS, EXTRA, FROZEN)
    params, extra = model()
    params["body"]["kernel"] *= 2
    with pytest.raises(CheckpointMismatch, match=r"another base: 1 problem[\s\S]*params/body/kernel has sha256"):
        load_delta(tmp_path / "delta", params, extra)
    with pytest.raises(CheckpointMismatch, match="extra/batch_stats/body/mean is not in this base"):
        load_delta(tmp_path / "delta", PARAMS)
    with pytest.raises(CheckpointMismatch, match="params/old/kernel is only in the base"):
        load_delta(tmp_path / "delta", {**PARAMS, "old": {"kernel": jnp.ones(1)}}, EXTRA)
    with pytest.raises(CheckpointMismatch, match="params/head/kernel has no place in a base with a list there"):
        load_delta(tmp_path / "delta", {"body": PARAMS["body"], "head": []}, EXTRA)
    with Store(tmp_path / "store") as store:
        store.save(1, {"params": PARAMS})
    with pytest.raises(CheckpointMismatch, match="is no delta"):
        load_delta(tmp_path / "store" / "1", PARAMS, EXTRA)


def test_dtypes_keys_and_scalars_survive(tmp_path):
    """bfloat16 is what half of all adapters are kept in."""
    params = {
        "base": jnp.ones(1),
        "new": {"half": jnp.bfloat16(0.1), "n": jnp.int8([1, -2]), "empty": jnp.zeros((0, 2))},
    }
    extra = {"key": jax.random.key(3)}
    save_delta(tmp_path / "delta", params, extra, Frozen(params, extra, [("new/.*", True), ("base", False)]))
    got, found = load_delta(tmp_path / "delta", {"base": params["base"]})
    chex.assert_trees_all_equal(got, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, params)
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(extra["key"]))


def test_other_programs_read_the_folder(tmp_path):
    from safetensors.numpy import load_file

    save_delta(tmp_path / "delta", PARAMS, EXTRA, FROZEN)
    tensors = load_file(tmp_path / "delta" / "model.safetensors")
    np.testing.assert_array_equal(tensors["params/head/kernel"], PARAMS["head"]["kernel"])
    base = json.loads((tmp_path / "delta" / "manifest.json").read_text())["metadata"]["delta"]["base"]
    assert base == FROZEN.digest
