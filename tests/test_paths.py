"""Rules over paths: full match, first match wins, every leaf covered, every rule hit."""

import flax.core
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl import TrainState, create_state, paths
from jaxdl.paths import RuleError

PARAMS = {
    "encoder": {"layer_0": {"kernel": 1.0, "bias": 2.0}, "layer_1": {"kernel": 3.0, "bias": 4.0}},
    "head": {"kernel": 5.0, "bias": 6.0},
}


def test_first_match_wins_and_the_whole_path_must_match():
    rules = [("head/kernel", "a"), ("head/.*", "b"), (".*bias", "c"), (".*", "d")]
    assert paths.flatten(paths.match(rules, PARAMS)) == {
        "encoder/layer_0/bias": "c",
        "encoder/layer_0/kernel": "d",
        "encoder/layer_1/bias": "c",
        "encoder/layer_1/kernel": "d",
        "head/bias": "b",
        "head/kernel": "a",
    }


def test_a_prefix_is_not_a_match():
    with pytest.raises(RuleError, match="'head' matches nothing; nearest paths: head/"):
        paths.match([("head", True), (".*", False)], PARAMS)


def test_all_problems_come_in_one_error():
    rules = [("haed/.*", 1), ("head/.*", 2), ("head/kernel", 3), ("(", 4), ("encoder/layer_0/.*", 5), "not a rule"]
    with pytest.raises(RuleError) as caught:
        paths.match(rules, PARAMS, what="trainable")
    text = str(caught.value)
    assert "trainable rules: 5 problem(s)" in text
    assert "no rule covers encoder/layer_1/bias, encoder/layer_1/kernel" in text
    assert "rule 'haed/.*' matches nothing; nearest paths: head/bias, head/kernel" in text
    assert "rule 'head/kernel' only matches leaves that earlier rules took (head/kernel); move it up." in text
    assert "rule '(' is not a regular expression" in text
    assert "rule 5 is 'not a rule'" in text


def test_case_matters():
    with pytest.raises(RuleError, match="'Head/kernel' matches nothing; nearest paths: head/kernel"):
        paths.match([("Head/kernel", True), (".*", False)], PARAMS)


def test_one_rule_reaches_a_parameter_and_its_moments():
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    state = create_state(params, {}, optax.adam(0.1), rng=jax.random.key(0))
    marks = paths.flatten(paths.match([(".*dense/kernel", "K"), (".*dense/bias", "B"), (".*", "-")], state))
    assert [path for path, mark in marks.items() if mark == "K"] == [
        "params/dense/kernel",
        "opt_state/0/mu/dense/kernel",
        "opt_state/0/nu/dense/kernel",
    ]
    assert marks["step"] == marks["rng"] == marks["opt_state/0/count"] == "-"
    assert isinstance(paths.match([(".*", 0)], state), TrainState)


def test_a_rule_value_may_be_a_tree_of_its_own():
    spec = jax.P("data", None)
    assert paths.match([(".*", spec)], {"a": 1.0})["a"] is spec


def test_mappings_of_any_kind_share_masks():
    frozen_dict = flax.core.freeze(PARAMS)
    mask = paths.match([("head/.*", True), (".*", False)], PARAMS)
    chosen, rest = paths.split(frozen_dict, mask)
    assert isinstance(chosen, flax.core.FrozenDict)
    assert paths.flatten(chosen) == {"head/bias": 6.0, "head/kernel": 5.0}
    assert paths.flatten(paths.merge(chosen, rest)) == paths.flatten(PARAMS)


def test_split_refuses_a_mask_of_another_tree():
    with pytest.raises(ValueError, match=r"only in the tree \['b'\], only in the mask \['c'\]"):
        paths.split({"a": 1, "b": 2}, {"a": True, "c": False})


def test_split_refuses_a_mask_that_is_not_bool():
    with pytest.raises(ValueError, match=r"must be bool; these are not: \['a'\]"):
        paths.split({"a": 1}, {"a": 0.5})


def test_merge_refuses_a_leaf_that_is_in_both():
    with pytest.raises(ValueError, match=r"both trees have a leaf at \['a'\]"):
        paths.merge({"a": 1, "b": None}, {"a": 2, "b": 3})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"Two leaves share one path: \['a/b'\]"):
        paths.flatten({"a": {"b": 1}, "a/b": 2})


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.dictionaries(st.sampled_from("xyz"), st.integers(), min_size=1), min_size=1
    ),
    st.randoms(),
)
def test_merge_undoes_split(tree, random):
    mask = jax.tree.map(lambda _: random.random() < 0.5, tree)
    chosen, rest = paths.split(tree, mask)
    assert paths.merge(chosen, rest) == paths.merge(rest, chosen) == tree
    assert len(jax.tree.leaves(chosen)) == sum(jax.tree.leaves(mask))
