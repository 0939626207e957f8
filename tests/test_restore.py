"""Partial restore: what every rule does, what is refused, and what the ledger says."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.checkpoint import CheckpointCorrupt, CheckpointError, CheckpointMismatch, Store, restore_params
from jaxdl.checkpoint import arrays as disk
from jaxdl.paths import flatten

PARAMS = {
    "encoder": {
        "layer_0": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.arange(4.0)},
        "layer_1": {"kernel": -jnp.arange(16.0).reshape(4, 4), "bias": jnp.ones(4)},
    },
    "head": {"kernel": jnp.ones((4, 10)), "bias": jnp.zeros(10)},
}


def fresh_like(n_classes=10, body="encoder"):
    """Another model: other values, perhaps another body name and number of classes."""
    layers = jax.tree.map(lambda x: x * 0 + 7, PARAMS["encoder"])
    return {body: layers, "head": {"kernel": jnp.full((4, n_classes), 5.0), "bias": jnp.full(n_classes, 6.0)}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Steps 1 and 2 of a train state with the parameters of step 2 doubled."""
    folder = tmp_path_factory.mktemp("runs")
    with Store(folder) as store:
        for step in (1, 2):
            params = jax.tree.map(lambda x, step=step: step * x, PARAMS)
            state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "rng": jax.random.key(step)}
            store.save(step, state)
    return folder


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def message(*args, **kwargs):
    with pytest.raises(CheckpointMismatch) as error:
        restore_params(*args, **kwargs)
    assert error.value.__cause__ is None
    return str(error.value)


def test_whole_params_of_the_newest_state(directory):
    params, ledger = restore_params(directory, jax.eval_shape(fresh_like))
    assert_same(params, jax.tree.map(lambda x: 2 * x, PARAMS))
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    assert all(not leaf.committed for leaf in jax.tree.leaves(params))
    assert str(ledger) == f"loaded 6/6 leaves (100.0 % of parameters) from {directory / '2'}"
    assert (ledger.fresh, ledger.left_over, ledger.renamed, ledger.skipped) == ((), (), {}, ())


def test_step_folder_flat_dict_tree_and_state_are_sources_too(directory):
    like = fresh_like()
    assert_same(restore_params(directory / "1", like)[0], PARAMS)
    assert_same(restore_params({path: np.asarray(x) for path, x in flatten(PARAMS).items()}, like)[0], PARAMS)
    assert_same(restore_params(PARAMS, like)[0], PARAMS)
    assert_same(restore_params({"params": PARAMS, "step": jnp.int32(0)}, like)[0], PARAMS)
    assert_same(restore_params({"params": PARAMS}, {"params": like})[0], {"params": PARAMS})


def test_only_the_needed_arrays_are_read(directory, monkeypatch):
    asked = []
    real = disk.read
    monkeypatch.setattr(disk, "read", lambda folder, records: asked.extend(records) or real(folder, records))
    restore_params(directory, fresh_like(), fresh=["head/.*"])
    assert sorted(asked) == sorted(f"params/{path}" for path in flatten(PARAMS) if path.startswith("encoder"))


def test_rename_fresh_and_drop_with_ledger(directory):
    like = fresh_like(n_classes=3, body="body")
    del like["body"]["layer_1"]
    params, ledger = restore_params(
        directory / "1",
        like,
        rename=[("encoder/(layer_0)/(.*)", r"body/\1/\2")],
        fresh=["head/.*"],
        drop=["encoder/layer_1/.*"],
    )
    assert_same(params["body"]["layer_0"], PARAMS["encoder"]["layer_0"])
    assert_same(params["head"], like["head"])
    assert ledger.renamed == ledger.loaded == {f"body/layer_0/{x}": f"encoder/layer_0/{x}" for x in ("bias", "kernel")}
    assert ledger.fresh == ("head/bias", "head/kernel")
    assert ledger.left_over == (
        "encoder/layer_1/bias",
        "encoder/layer_1/kernel",
        "head/bias",
        "head/kernel",
    )
    lines = str(ledger).splitlines()
    assert lines[0] == f"loaded 2/4 leaves ({100 * 16 / (16 + 15):.1f} % of parameters) from {directory / '1'}"
    assert lines[1].startswith("  renamed 2: encoder/layer_0/bias -> body/layer_0/bias")
    assert lines[2:] == [
        "  fresh 2: head/bias, head/kernel",
        "  left over 4: encoder/layer_1/bias, encoder/layer_1/kernel, head/bias, head/kernel",
    ]


def test_the_first_matching_rename_wins_and_matches_are_full():
    source = {"a/w": np.ones(1), "b/w": np.ones(2), "aa/w": np.ones(3)}
    like = {"first": np.zeros(1), "rest": {"b": np.zeros(2), "aa": np.zeros(3)}}
    params, _ = restore_params(source, like, rename=[("a/w", "first"), ("(.*)/w", r"rest/\1")])
    assert params["first"].sum() + params["rest"]["b"].sum() + params["rest"]["aa"].sum() == 6


def test_two_leaves_can_swap_names():
    source, like = {"a": np.float32([1]), "b": np.float32([2])}, {"a": np.zeros(1, "f4"), "b": np.zeros(1, "f4")}
    params, ledger = restore_params(source, like, rename=[("a", "b"), ("b", "a")])
    assert (params["a"][0], params["b"][0]) == (2, 1)
    assert ledger.renamed == {"a": "b", "b": "a"}


def test_a_missing_leaf_names_the_nearest_and_the_rule(directory):
    like = fresh_like()
    like["encoder"]["layer_0"]["scale"] = jnp.ones(4)
    text = message(directory, like)
    assert "1 problem(s)" in text
    assert "encoder/layer_0/scale float32[4] is not in the checkpoint; nearest: encoder/layer_0/bias" in text
    assert 'fresh=["encoder/layer_0/scale"]' in text
    params, _ = restore_params(directory, like, fresh=["encoder/layer_0/scale"])
    assert params["encoder"]["layer_0"]["scale"].sum() == 4


def test_wrong_shape_and_dtype_are_never_cast_or_padded(directory):
    like = fresh_like(n_classes=3)
    like["encoder"]["layer_0"]["bias"] = jnp.zeros(4, jnp.bfloat16)
    text = message(directory, like)
    assert "3 problem(s)" in text
    assert "head/kernel is float32[4,10] in the checkpoint, float32[4,3] in the model" in text
    assert 'fresh=["head/kernel"] keeps the model\'s values' in text
    assert "encoder/layer_0/bias is float32[4] in the checkpoint, bfloat16[4] in the model" in text


def test_left_over_leaves_must_be_dropped_by_name(directory):
    like = {"encoder": fresh_like()["encoder"]}
    text = message(directory, like)
    assert "2 problem(s)" in text
    assert "head/bias float32[10] has no place in the model" in text
    assert 'drop=["head/bias"]' in text
    _, ledger = restore_params(directory, like, drop=["head/.*"])
    assert ledger.left_over == ("head/bias", "head/kernel")


def test_everything_wrong_is_one_message(directory):
    like = fresh_like(n_classes=3, body="body")
    text = message(directory, like, rename=[("encodr/(.*)", r"body/\1"), ("(", "x")], fresh=["haed/.*"], drop=["hed/x"])
    assert "rename rule 'encodr/(.*)' matches nothing; nearest paths: encoder/layer_0" in text
    assert "rename rule '(' is not a regular expression" in text
    assert "fresh rule 'haed/.*' matches nothing; nearest paths: head/" in text
    assert "drop rule 'hed/x' matches nothing; nearest paths: head/" in text
    assert "body/layer_0/bias float32[4] is not in the checkpoint" in text
    assert "encoder/layer_0/bias float32[4] has no place in the model" in text
    assert f"{3 + 1 + 4 + 4 + 2} problem(s)" in text


def test_shadowed_rules_wrong_groups_and_collisions_are_refused():
    like = {"a": np.zeros(1)}
    source = {"a": np.zeros(1), "b": np.zeros(1)}
    assert "rule 'a' only matches leaves that earlier rules took" in message(source, like, drop=["[ab]", "a"])
    assert "has a wrong replacement: invalid group reference 1" in message(source, like, rename=[("b", r"\1")])
    assert "a and b both become a" in message(source, like, rename=[("b", "a")])
    assert "a rename" not in message(source, like)


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"fresh": "head/.*"}, "fresh='head/.*' is one str; give a list"),
        ({"drop": [3]}, "drop rule 3 is not a str"),
        ({"rename": ["a"]}, r"rename rule 'a' is not a pair \(regex, replacement\)"),
    ],
)
def test_rules_of_the_wrong_type_are_refused(rules, problem):
    with pytest.raises(CheckpointError, match=problem):
        restore_params(PARAMS, PARAMS, **rules)


def test_fresh_leaves_need_values(directory):
    text = message(directory, jax.eval_shape(fresh_like), fresh=["head/bias"])
    assert "head/bias is fresh, but `like` holds no values for it" in text


def test_damage_of_the_params_walks_back_and_is_in_the_ledger(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "2").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    notes = []
    params, ledger = restore_params(tmp_path, fresh_like(), on_note=notes.append)
    assert_same(params, PARAMS)
    assert [step for step, _ in ledger.skipped] == [2]
    assert len(notes) == 1
    assert "step 2" in notes[0]
    assert "damaged steps passed over 1: 2" in str(ledger)
    with pytest.raises(CheckpointCorrupt):
        restore_params(tmp_path / "2", fresh_like())


def test_values_are_verified_by_hash(directory, monkeypatch):
    real = disk.read
    monkeypatch.setattr(disk, "read", lambda folder, records: {p: x * 2 for p, x in real(folder, records).items()})
    with pytest.raises(CheckpointCorrupt, match="not the values that were saved: params/encoder/layer_0/bias, params"):
        restore_params(directory / "1", fresh_like())


def test_a_folder_without_checkpoints_is_said_plainly(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        restore_params(tmp_path / "none", fresh_like())


def test_long_ledgers_are_cut():
    source = {str(i): np.zeros(1) for i in range(9)}
    _, ledger = restore_params(source, {"0": np.zeros(1)}, drop=["[1-9]"])
    assert str(ledger).splitlines()[1] == "  left over 8: 1, 2, 3, 4, 5, 6 and 2 more"
