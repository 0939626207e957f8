"""The map between tensors and leaves: each transform and its inverse, and everything that an import refuses."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdl.paths import flatten
from jaxdl.pretrained import PretrainedError, to_params, to_tensors
from jaxdl.pretrained.entries import Ignored, Tied, dense, entry, expand, fused, joined
from jaxdl.pretrained.transforms import conv, identity, pad_columns, pad_rows, patches, reshape, transpose
from tests.toy_family import TOY, Toy, entries, tensors_of


def like_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]


def bring_in(tensors, model=None, **rules):
    model = model or Toy()
    return to_params(entries(model), tensors, like_of(model), names=TOY.names, source="toy", **rules)


def refused(tensors, model=None, **rules):
    with pytest.raises(PretrainedError) as error:
        bring_in(tensors, model, **rules)
    assert error.value.__cause__ is None
    return str(error.value)


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    ("transform", "leaf_shape", "tensor_shape"),
    [
        (identity, (3, 2), (3, 2)),
        (transpose, (3, 2), (2, 3)),
        (conv, (5, 4, 3, 2), (2, 3, 5, 4)),
        (conv, (5, 3, 2), (2, 3, 5)),
        (reshape(1, 1, -1), (6,), (1, 1, 6)),
        (reshape(2, 3), (3, 2), (2, 3)),
        (patches(5, 4), (60, 2), (2, 3, 5, 4)),
        (pad_rows(3), (8, 2), (3, 2)),
        (pad_rows(3), (3, 2), (3, 2)),
        (pad_columns(3), (8,), (3,)),
        (pad_rows(3).then(transpose), (2, 8), (3, 2)),
        (transpose.then(pad_columns(3)), (2, 8), (3, 2)),
    ],
)
def test_every_transform_has_its_inverse_and_tells_the_tensors_shape(transform, leaf_shape, tensor_shape):
    tensor = np.arange(np.prod(tensor_shape), dtype=np.float32).reshape(tensor_shape) + 1
    leaf = transform.to_leaf(tensor, leaf_shape)
    assert leaf.shape == leaf_shape
    assert transform.tensor_shape(leaf_shape) == tensor_shape
    np.testing.assert_array_equal(transform.to_tensor(leaf), tensor)
    assert leaf.sum() == tensor.sum()  # padding is zero


def test_patches_mean_the_convolution_of_pytorch():
    """One value of the output, reckoned from the definition of a convolution in NCHW."""
    rng = np.random.default_rng(0)
    weight, image = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(3, 5, 4))
    kernel = patches(5, 4).to_leaf(weight, (60, 2))
    np.testing.assert_allclose(image.transpose(1, 2, 0).reshape(-1) @ kernel, (weight * image).sum((1, 2, 3)))


def test_leaves_hold_the_right_numbers():
    tensors = tensors_of()
    params, ledger = bring_in(tensors)
    layer = params["encoder"]["layer_1"]
    np.testing.assert_array_equal(layer["key"]["kernel"], tensors["toy.h.1.attn.weight"][:, 4:8])
    np.testing.assert_array_equal(layer["value"]["bias"], tensors["toy.h.1.attn.bias"][8:])
    np.testing.assert_array_equal(layer["output"]["kernel"], tensors["toy.h.1.proj.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"][:5], tensors["toy.words.weight"])
    assert not params["embed"]["embedding"][5:].any()
    np.testing.assert_array_equal(params["gates"]["kernel"][:, 3:], tensors["up.weight"].T)
    assert ledger.loaded["gates/kernel"] == "gate.weight + up.weight"
    assert str(ledger) == "loaded 27/27 leaves (100.0 % of parameters) from toy"


@pytest.mark.parametrize("head", [None, "classes", "words"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_export_import_is_the_same_bytes(head, dtype):
    model = Toy(head=head, param_dtype=dtype)
    tensors = tensors_of(head=head, dtype=dtype)
    params, _ = bring_in(tensors, model)
    out = to_tensors(entries(model), params, names=TOY.names)
    assert_same_bytes(out, tensors)
    again, _ = bring_in(out, model)
    assert_same_bytes(flatten(params), flatten(again))


def test_a_bare_backbone_is_written_without_the_prefix_and_read_with_or_without():
    model = Toy(head=None)
    tensors = tensors_of(head=None)
    params, _ = bring_in(tensors, model)
    bare = to_tensors(entries(model), params, names=TOY.names, bare=True)
    assert sorted(bare) == sorted(name.removeprefix("toy.") for name in tensors)
    assert_same_bytes(flatten(bring_in(bare, model)[0]), flatten(params))
    assert "one tensor under two names" in refused({**bare, "toy.cls": tensors["toy.cls"]}, model)


def test_older_names_are_understood():
    tensors = {
        name.replace("ln.weight", "ln.gamma").replace("ln.bias", "ln.beta"): x for name, x in tensors_of().items()
    }
    params, ledger = bring_in(tensors)
    assert ledger.loaded["encoder/layer_0/norm/scale"] == "toy.h.0.ln.gamma"
    assert_same_bytes(flatten(params), flatten(bring_in(tensors_of())[0]))


def test_a_model_may_lack_an_optional_leaf_and_the_ledger_says_what_was_left_out():
    tensors = {**tensors_of(head="words"), **{n: x for n, x in tensors_of().items() if "pooler" in n}}
    _, ledger = bring_in(tensors, Toy(head="words"))
    assert ledger.dropped == ("toy.pooler.dense.weight", "toy.pooler.dense.bias")
    assert "dropped 2: toy.pooler.dense.weight" in str(ledger)


def test_ties_may_be_absent_or_equal_or_the_only_name():
    model, tensors = Toy(head="words"), tensors_of(head="words")
    params, _ = bring_in(tensors, model)
    both = {**tensors, "lm_head.weight": tensors["toy.words.weight"].copy()}
    assert_same_bytes(flatten(bring_in(both, model)[0]), flatten(params))
    second = {name: x for name, x in both.items() if name != "toy.words.weight"}
    again, ledger = bring_in(second, model)
    assert_same_bytes(flatten(again), flatten(params))
    assert ledger.loaded["embed/embedding"] == "lm_head.weight"
    both["lm_head.weight"][0, 0] = np.nextafter(both["lm_head.weight"][0, 0], np.float32(9))
    text = refused(both, model)
    assert "lm_head.weight is tied to toy.words.weight in this model, but they differ" in text
    assert "tie_word_embeddings=false" in text


def test_a_written_tie_is_in_the_file_under_both_names():
    lines = [*dense("a", "a", bias=False), Tied("b.weight", "a.weight", is_written=True)]
    out = to_tensors(lines, {"a": {"kernel": np.ones((2, 3))}})
    assert sorted(out) == ["a.weight", "b.weight"]


def test_buffers_are_ignored_only_where_declared():
    tensors = tensors_of()
    _, ledger = bring_in({**tensors, "toy.h.0.position_ids": np.arange(4)})
    assert ledger.ignored == ("toy.h.0.position_ids",)
    text = refused({**tensors, "toy.h.0.rotary.inv_freq": np.ones(2, np.float32)})
    assert "toy.h.0.rotary.inv_freq float32[2] has no place in the model" in text


def test_every_damage_is_listed_in_one_message():
    tensors = tensors_of()
    del tensors["toy.h.1.proj.bias"]
    tensors["toy.h.1.proj.bais"] = np.ones(4, np.float32)
    tensors["toy.h.0.proj.weight"] = np.ones((4, 5), np.float32)
    tensors["toy.h.0.ln.weight"] = np.ones(4, np.int64)
    tensors["toy.h.1.ln.weight"] = np.ones(4, ml_dtypes.float8_e4m3fn)
    tensors["toy.words.weight"] = np.ones((6, 4), np.float32)
    text = refused(tensors)
    assert text.startswith("toy does not fill the model: 6 problem(s)")
    for part in [
        "toy.h.1.proj.bias is not in the file, and encoder/layer_1/output/bias needs it; nearest: toy.h.1.proj.bais",
        "toy.h.1.proj.bais float32[4] has no place in the model; nearest: toy.h.1.proj.bias",
        "toy.h.0.proj.weight has shape (4, 5) in the file, but encoder/layer_0/output/kernel float32[4, 4] takes",
        "toy.h.0.ln.weight is int64 in the file",
        "toy.h.1.ln.weight is float8_e4m3fn in the file",
        "toy.words.weight has shape (6, 4) in the file, but embed/embedding float32[8, 4] takes (5, 4)",
    ]:
        assert part in text, part


def test_a_long_list_is_cut():
    text = refused({name: x for name, x in tensors_of(n_layers=9).items() if ".8." not in name}, Toy(n_layers=20))
    assert "... and 62 more tensors missing." in text
    assert len(text.splitlines()) == 12


def test_a_leaf_without_a_line_and_a_line_without_a_leaf():
    like = {"a": {"kernel": np.zeros((2, 3), np.float32)}, "b": np.zeros(2, np.float32)}
    tensors = {"a.weight": np.ones((3, 2), np.float32), "a.bias": np.ones(3, np.float32)}
    with pytest.raises(PretrainedError) as error:
        to_params(dense("a", "a"), tensors, like)
    assert "b float32[2] has no tensor in this family's map" in str(error.value)
    assert "the map gives a.bias to a/bias, no leaf of the model" in str(error.value)
    with pytest.raises(PretrainedError, match="b float32"):
        to_tensors(dense("a", "a", bias=False), like)


def test_a_new_head_is_named_fresh_and_the_old_one_dropped():
    tensors = tensors_of()
    text = refused(tensors, Toy(n_outputs=7))
    assert "classifier.weight has shape (3, 3) in the file, but head/kernel float32[7, 7] takes (7, 7)" in text
    assert 'fresh=["head/kernel"]' in text
    params, ledger = bring_in(tensors, Toy(n_outputs=7), fresh=["head/.*", "gates/kernel"])
    assert isinstance(params["head"]["kernel"], jax.ShapeDtypeStruct)  # as `like` has it
    assert ledger.fresh == ("gates/kernel", "head/bias", "head/kernel")
    assert ledger.dropped == ("gate.weight", "up.weight", "classifier.weight", "classifier.bias")
    text = refused(tensors, Toy(head="words"), fresh=["word_bias"])
    assert "classifier.weight float32[3, 3] has no place" in text
    _, ledger = bring_in(tensors, Toy(head="words"), fresh=["word_bias"], drop=["classifier.*", "gate.*|up.*"])
    assert len(ledger.dropped) == 6


def test_fresh_and_drop_rules_that_win_nothing_are_errors():
    text = refused(tensors_of(), fresh=["haed/.*"], drop=["clasifier.*"])
    assert "fresh rule 'haed/.*' matches nothing; nearest paths: head/" in text
    assert "drop rule 'clasifier.*' matches nothing" in text
    text = refused(tensors_of(), drop=["classifier.bias"])
    assert "classifier.bias is not in the file (a drop rule took it), and head/bias needs it" in text


def test_part_of_a_fused_tensor_may_be_fresh():
    params, ledger = bring_in(tensors_of(), fresh=["encoder/layer_0/key/.*"])
    np.testing.assert_array_equal(
        params["encoder"]["layer_0"]["value"]["kernel"], tensors_of()["toy.h.0.attn.weight"][:, 8:]
    )
    assert ledger.fresh == ("encoder/layer_0/key/bias", "encoder/layer_0/key/kernel")
    assert ledger.dropped == ()


def test_leaves_get_the_dtype_of_the_model_and_own_their_memory():
    tensors = tensors_of(dtype=ml_dtypes.bfloat16)
    params, _ = bring_in(tensors, Toy(param_dtype=jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    tensors = tensors_of()
    params, _ = bring_in(tensors)
    assert not any(np.shares_memory(leaf, x) for leaf in jax.tree.leaves(params) for x in tensors.values())


def test_a_map_that_contradicts_itself_is_a_mistake_of_its_family():
    x = {"a": np.zeros(2, np.float32)}
    for lines in [
        [entry("a", "a"), entry("b", "a")],
        [entry("h.{i}.a", "a")],
        [entry("a", "a"), Tied("b", "c")],
        [joined(["a", "b"], "a", axis=0)._replace(paths=("a", "b"))],
    ]:
        with pytest.raises(ValueError, match="map: "):
            to_params(lines, x, x)
    with pytest.raises(ValueError, match="placeholders"):
        expand([entry("h.{i}.a", "a")], i=range(2))


def test_placeholders_in_every_combination_and_kind_of_line():
    lines = [
        fused("{s}.{i}.w", ["{s}/{i}/a", "{s}/{i}/b"], axis=0),
        Tied("{s}.{i}.t", "{s}.{i}.w"),
        Ignored("{s}.{i}.*"),
    ]
    filled = expand(lines, s=("x", "y"), i=range(2))
    assert [line[0] for line in filled[3:6]] == [("x.1.w",), "x.1.t", "x.1.*"]
    assert filled[-2] == Tied("y.1.t", "y.1.w")
    assert len(filled) == 12


def test_a_leaf_that_no_transform_can_fill_is_named():
    with pytest.raises(
        PretrainedError, match=r"a cannot become a float32\[2\] by transpose: transpose needs 2 dimensions"
    ):
        to_params([entry("a", "a", transpose)], {"a": np.ones(2)}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(PretrainedError, match="fewer than the 3 rows"):
        to_params([entry("a", "a", pad_rows(3))], {"a": np.ones(3)}, {"a": np.zeros(2, np.float32)})
