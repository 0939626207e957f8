"""Meshes, where a batch lies, and rules for where a state lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdl.parallel import (
    REPLICATED,
    Fsdp,
    ShardingError,
    Split,
    batch_shardings,
    bytes_per_device,
    make_mesh,
    parse_mesh,
    put_batch,
    state_shardings,
    unused_axes,
)
from jaxdl.paths import RuleError, flatten

# ---- meshes and batches ----


def test_a_mesh_takes_what_is_left():
    assert dict(make_mesh().shape) == {"data": 8}
    assert dict(make_mesh(data=-1, model=2).shape) == {"data": 4, "model": 2}
    assert dict(make_mesh(data=2).shape) == {"data": 2}
    assert set(make_mesh(data=4, model=2).axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 16}, "data=16 needs 16 devices and there are 8"),
        ({"data": -1, "model": 16}, "8 devices do not divide by 16"),
        ({"data": -1, "model": 3}, "8 devices do not divide by 3"),
        ({"data": 0, "model": 2.5}, "2 problem"),
        ({"data": -1, "model": -1}, "only one axis can have what is left"),
    ],
)
def test_meshes_that_cannot_be(axes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(**axes)


@pytest.mark.parametrize("text", ["data", "data=x", "=4", "data=4,data=2", "data=4 model"])
def test_mesh_texts_that_are_none(text):
    with pytest.raises(ShardingError, match=r"data=4|twice"):
        parse_mesh(text)


def test_a_batch_lies_by_rows_and_positions():
    mesh = make_mesh(data=2, sequence=4)
    batch = {"tokens": np.zeros((4, 8), np.int32), "label": np.zeros(4, np.int32), "image": np.zeros((4, 8, 3))}
    specs = {name: sharding.spec for name, sharding in batch_shardings(batch, mesh).items()}
    assert specs == {"tokens": P("data", "sequence"), "label": P("data"), "image": P("data", "sequence")}
    placed = put_batch(batch, mesh)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 2)
    stacked = batch_shardings({"tokens": np.zeros((5, 4, 8))}, mesh, n_leading=1)
    assert stacked["tokens"].spec == P(None, "data", "sequence")


def test_all_that_does_not_divide_is_told_at_once():
    batch = {"tokens": np.zeros((3, 9)), "label": np.zeros(3)}
    with pytest.raises(ShardingError, match="3 problem") as told:
        batch_shardings(batch, make_mesh(data=2, sequence=4))
    assert "tokens has 9 positions in dimension 1" in str(told.value)
    assert "the nearest sizes that do: 8, 12" in str(told.value)


# ---- rules ----

TREE = {
    "params": {"kernel": jnp.zeros((64, 24)), "bias": jnp.zeros(24), "odd": jnp.zeros((7, 5))},
    "opt_state": {"mu": {"kernel": jnp.zeros((64, 24))}},
}
SMALL = functools.partial(Fsdp, floor_bytes=256)


def specs(rules, tree=None, **axes):
    found = state_shardings(rules, TREE if tree is None else tree, make_mesh(**(axes or {"data": 4, "model": 2})))
    return {path: sharding.spec for path, sharding in flatten(found).items()}


def test_one_rule_places_a_parameter_and_its_moment():
    found = specs([(".*kernel", SMALL(beside=Split("model"))), (".*", None)])
    assert found["params/kernel"] == found["opt_state/mu/kernel"] == P("data", "model")
    assert found["params/bias"] == found["params/odd"] == P()


def test_fsdp_cuts_the_largest_free_dimension_that_divides_and_spares_small_arrays():
    mesh = make_mesh(data=8)
    assert Fsdp(floor_bytes=0).spec((3, 16, 8), 4, mesh) == P(None, "data")
    assert Fsdp(floor_bytes=0).spec((3, 12, 8), 4, mesh) == P(None, None, "data")
    assert Fsdp(floor_bytes=1000).spec((8, 8), 4, mesh) == P()
    assert Fsdp(floor_bytes=0).spec((), 4, mesh) == P()


def test_a_split_counts_from_the_end_so_that_stacked_layers_share_its_rule():
    mesh = make_mesh(model=8)
    assert Split("model", -2).spec((16, 4), 4, mesh) == P("model")
    assert Split("model", -2).spec((3, 16, 4), 4, mesh) == P(None, "model")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(".*", Split("modle"))], r"names the axis 'modle'; the mesh has data, model"),
        ([(".*bias", Split("model")), (".*", Split("model", -2))], "odd: dimension 0 of \\(7, 5\\) is 7.*make it 8"),
        ([(".*/bias", Split("model", -2)), (".*", None)], "params/bias: shape \\(24,\\) has no dimension -2"),
        ([(".*odd", SMALL(floor_bytes=100)), (".*", None)], "odd: no free dimension of \\(7, 5\\) divides by the 4"),
        ([(".*bias", Fsdp()), (".*", None)], "'.\\*bias' cuts nothing: its largest array params/bias has 96 bytes"),
        ([(".*bias", P("data", "model")), (".*", None)], "has 2 entries and the shape \\(24,\\) has 1"),
        ([(".*bias", P(("data", "model"))), (".*odd", P("data")), (".*", None)], "odd: dimension 0.*make it 8"),
        ([(".*", "data")], "has the value 'data'; give None, a PartitionSpec, Split or Fsdp"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ShardingError, match=message):
        specs(rules)


def test_a_misspelt_pattern_names_the_nearest_path():
    with pytest.raises(RuleError, match="nearest paths: params/kernel"):
        specs([("params/kernle", None), (".*", None)])


def test_axes_that_nothing_lies_over_are_found():
    mesh = make_mesh(data=4, model=2)
    assert unused_axes(mesh, state_shardings(REPLICATED, TREE, mesh)) == ["model"]
    assert unused_axes(mesh, state_shardings([(".*bias", Split("model")), (".*", None)], TREE, mesh)) == []


def test_bytes_of_a_device():
    mesh = make_mesh(data=4, model=2)
    placed = state_shardings([(".*kernel", SMALL(beside=Split("model"))), (".*", None)], TREE, mesh)
    assert bytes_per_device(TREE, placed) == 2 * 64 * 24 * 4 // 8 + 24 * 4 + 35 * 4
