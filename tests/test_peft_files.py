"""PEFT's files without PEFT: names and rules of its config, fused modules, what is refused on the way out, the base.

The toy family has every kind of line that a map can have; `tests/parity/test_peft.py` compares with PEFT itself.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.finetune import lora
from jaxdl.finetune.lora import Lora
from jaxdl.finetune.quantize import quantize
from jaxdl.models.transformer import stack_layers
from jaxdl.paths import claim, flatten
from jaxdl.pretrained import PretrainedError
from jaxdl.pretrained.entries import Tied, dense, entry, fused
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.peft import load_peft, save_peft
from jaxdl.pretrained.peft.config import is_target, rank_and_alpha, task_of
from jaxdl.pretrained.peft.factors import Pair, expected_shapes, join_pairs, pair_tensors, split_pair, tensor_pair
from jaxdl.pretrained.peft.places import endings, find_places, in_memory
from jaxdl.pretrained.tensors import read_file
from jaxdl.pretrained.transforms import conv, transpose
from tests.toy_family import TOY, Toy

TENSORS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "jaxdl_base.json"
TOKENS = np.zeros((1, 2), np.int32)
QUERIES = [(".*query/kernel", 2), (".*", None)]
NO_GATES = [("gates/.*", None), (".*", 2)]


def adapted_params(model, settings, *, seed=0):
    """Random parameters and adapters, nothing zero, but beside the vocabulary."""
    rng = np.random.default_rng(seed)
    base = model.init(jax.random.key(0), TOKENS)["params"]
    like = jax.eval_shape(lambda: lora.add(jax.random.key(0), base, settings, model, TOKENS))
    flat = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(like).items()}
    if "adapters/embed/a" in flat:
        flat["adapters/embed/a"][model.vocab_size :] = 0
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(x) for x in flat.values()])


def base_of(params):
    return {name: tree for name, tree in params.items() if name != "adapters"}


def written(folder, model, params, settings, **keywords):
    save_peft(folder, model, params, settings, family=TOY, **keywords)
    return read_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


def refused(folder, model, params, settings, **keywords):
    with pytest.raises(PretrainedError) as error:
        save_peft(folder, model, params, settings, family=TOY, **keywords)
    assert not folder.exists()
    return str(error.value)


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("head", ["classes", "words", None])
@pytest.mark.parametrize("variant", [{}, {"is_rank_stabilized": True}, {"has_magnitude": True}])
def test_out_and_in_again(tmp_path, head, variant):
    model = Toy(head=head)
    first = [("gates/.*", None)] if head == "classes" else []
    settings = Lora(
        [*first, *([("embed/.*", None)] if "has_magnitude" in variant else []), (".*", 2)], alpha=3, **variant
    )
    params = adapted_params(model, settings)
    tensors, config = written(tmp_path / "a", model, params, settings, base="org/base")
    assert config["base_model_name_or_path"] == "org/base"
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert any(name.startswith("base_model.model.toy.") for name in tensors) is (head is not None)  # bare: no prefix
    again, found, ledger = load_peft(tmp_path / "a", model, base_of(params), family=TOY)
    assert_same(again, params)
    assert [found.scale(r) for r in (1, 2)] == [settings.scale(r) for r in (1, 2)]
    assert len(ledger.loaded) == len(flatten(params["adapters"]))
    assert "100.0 % of parameters" in str(ledger)
    second, _ = written(tmp_path / "b", model, again, found, base="org/base")
    assert tensors.keys() == second.keys()
    for name in (TENSORS, CONFIG, BASE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_tensors_are_the_leaves_transposed_and_padding_is_left_out(tmp_path):
    model, settings = Toy(), Lora(NO_GATES, alpha=3)
    params = adapted_params(model, settings)
    tensors, _ = written(tmp_path / "a", model, params, settings)
    linear, table = params["adapters"]["encoder"]["layer_1"]["output"], params["adapters"]["embed"]
    expected = {"h.1.proj.lora_A.weight": linear["a"].T, "h.1.proj.lora_B.weight": linear["b"].T}
    expected |= {"words.lora_embedding_A": table["a"][:5].T, "words.lora_embedding_B": table["b"].T}
    for name, x in expected.items():
        np.testing.assert_array_equal(tensors[f"base_model.model.toy.{name}"], x)


def test_a_fused_module_means_the_sum_of_its_parts(tmp_path):
    """`scale * B A` of the file, in float64, is the three products side by side."""
    model, settings = Toy(), Lora([(".*query/kernel", 1), (".*value/kernel", 3), (".*", None)], alpha=5)
    params = adapted_params(model, settings)
    tensors, config = written(tmp_path / "a", model, params, settings)
    at, layer = "base_model.model.toy.h.0.attn.", params["adapters"]["encoder"]["layer_0"]
    rank, alpha = rank_and_alpha(config, "toy.h.0.attn")
    a, b = (tensors[at + name].astype(np.float64) for name in ("lora_A.weight", "lora_B.weight"))
    assert (rank, a.shape, b.shape) == (4, (4, 4), (12, 4))
    parts = {name: np.float64(leaves["a"]) @ np.float64(leaves["b"]) for name, leaves in layer.items()}
    expected = [5 / 1 * parts["query"], np.zeros((4, 4)), 5 / 3 * parts["value"]]
    np.testing.assert_allclose(alpha / rank * (b @ a).T, np.concatenate(expected, 1), atol=1e-5)
    again, _, _ = load_peft(tmp_path / "a", model, base_of(params), family=TOY)
    assert sorted(again["adapters"]["encoder"]["layer_0"]) == ["query", "value"]


def test_parts_that_share_a_keep_their_rank(tmp_path):
    model, settings = Toy(), Lora([(".*(query|key|value)/kernel", 2), (".*", None)], alpha=5)
    params = adapted_params(model, settings)
    for layer in params["adapters"]["encoder"].values():
        for part in layer.values():
            part["a"] = layer["query"]["a"]
    tensors, config = written(tmp_path / "a", model, params, settings)
    assert tensors["base_model.model.toy.h.0.attn.lora_A.weight"].shape == (2, 4)
    assert (config["rank_pattern"], config["alpha_pattern"], config["target_modules"]) == ({}, {}, ["attn"])
    assert_same(load_peft(tmp_path / "a", model, base_of(params), family=TOY)[0], params)


def test_join_and_split_are_inverse():
    rng = np.random.default_rng(0)
    pairs = [Pair(rng.normal(size=(5, r)), rng.normal(size=(r, w))) for r, w in ((2, 3), (1, 2), (3, 4))]
    widths = [3, 2, 4]
    for given in (pairs, [None, *pairs[1:]], [pairs[0], None, None]):
        back = split_pair(join_pairs(given, widths, [1.0] * 3), widths)
        for before, after in zip(given, back, strict=True):
            assert (before is None) == (after is None)
            assert before is None or all(np.array_equal(x, y) for x, y in zip(before[:2], after[:2], strict=True))


def test_a_dense_or_an_empty_b_is_shared():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 2))
    for b in (rng.normal(size=(2, 6)), np.zeros((2, 6)), np.eye(2, 6)[::-1]):  # the last: blocks out of order
        parts = split_pair(Pair(a, b), [1, 1, 4])
        assert all(np.array_equal(part.a, a) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.b for part in parts], 1), b)


def test_a_convolution(tmp_path):
    [place] = find_places([entry("stem.weight", "stem/kernel", conv)], {"stem/kernel": (3, 2, 4, 6)})
    rng = np.random.default_rng(0)
    pair = Pair(rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(5, 6)), rng.normal(size=6))
    tensors = pair_tensors(place, pair)
    assert {name: x.shape for name, x in tensors.items()} == expected_shapes(place, (3, 2, 4, 6), 5, True)
    assert tensors["lora_magnitude_vector"].shape == (1, 6, 1, 1)
    product = np.einsum("orhw,rikl->oikl", tensors["lora_B.weight"], tensors["lora_A.weight"])
    np.testing.assert_allclose(conv.to_leaf(product, (3, 2, 4, 6)), pair.a @ pair.b)
    for x, y in zip(tensor_pair(place, tensors, (3, 2, 4)), pair, strict=True):
        np.testing.assert_array_equal(x, y)


def test_places_are_modules_with_a_matrix_of_their_own():
    lines = [
        *dense("fc", "fc"),
        entry("position", "position/embedding"),  # a parameter, not a module
        fused("rows.weight", ["x/kernel", "y/kernel"], transpose, axis=1),  # parts along the inputs
        *dense("gone", "gone", optional=True),
        Tied("twin.weight", "fc.weight"),
    ]
    shapes = {"fc/kernel": (2, 3), "position/embedding": (4, 2), "x/kernel": (2, 3), "y/kernel": (2, 3)}
    assert [(place.module, place.kind) for place in find_places(lines, shapes)] == [
        ("fc", "linear"),
        ("twin", "linear"),
    ]


def test_names_in_memory():
    names = Names("m.", memory=((".k.", ".old.key."), ("layers.", "encoder.layer.")))
    assert in_memory("m.encoder.layer.3.old.key", names, is_bare=False) == "m.layers.3.k"
    assert in_memory("m.encoder.layer.3.old.key.bias", names, is_bare=True) == "layers.3.k.bias"


def test_the_shortest_ends_of_names_are_exact():
    rng = np.random.default_rng(0)
    names = [f"m.{i}.{part}.{leaf}" for i in range(12) for part in ("a", "b") for leaf in ("q", "k")]
    for _ in range(20):
        chosen = {name for name in names if rng.random() < 0.5}
        found = endings(chosen, set(names) - chosen)
        assert {name for name in names if is_target({"target_modules": found}, name)} == chosen
    assert endings(names, []) == ["k", "q"]


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"target_modules": ["q", "h.0.k"]}, "m.h.0.q", True),
        ({"target_modules": ["q", "h.0.k"]}, "m.h.1.k", False),
        ({"target_modules": ["q"]}, "m.h.0.xq", False),
        ({"target_modules": r".*\.[qk]"}, "m.h.0.k", True),
        ({"target_modules": "q"}, "m.h.0.q", False),  # a str is a regex for the whole name
        ({"target_modules": "all-linear"}, "m.h.0.q", None),
        ({}, "m.h.0.q", None),
        ({"target_modules": ["q"], "exclude_modules": ["h.0.q"]}, "m.h.0.q", False),
        ({"target_modules": ["q"], "exclude_modules": r".*h\.0.*"}, "m.h.1.q", True),
        ({"target_modules": ["q"], "modules_to_save": ["h"]}, "m.h.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0, 1]}, "m.h.11.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"}, "m.h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["x", "h"]}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": []}, "m.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0]}, "m.q", False),
    ],
)
def test_target_modules_by_the_rules_of_peft(config, module, expected):
    assert is_target(config, module) is expected


def test_patterns_by_the_rules_of_peft():
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"h.0.q": 2, "q": 4}, "alpha_pattern": {r"m\.h\.\d\.q": 1}}
    assert rank_and_alpha(config, "m.h.0.q") == (2, 1)
    assert rank_and_alpha(config, "m.h.1.q") == (4, 1)
    assert rank_and_alpha(config, "m.h.1.xq") == (8, 16)


def test_tasks():
    assert task_of("GPT2LMHeadModel") == "CAUSAL_LM"
    assert task_of("T5ForConditionalGeneration") == "SEQ_2_SEQ_LM"
    assert task_of("BertModel") is None


@pytest.mark.parametrize("is_partial", [False, True])
def test_scanned_layers(tmp_path, is_partial):
    model, scanned = Toy(n_layers=11), Toy(n_layers=11, is_scanned=True)
    settings = Lora([(r"encoder/layer_[3-9]/query/kernel" if is_partial else ".*query/kernel", 2), (".*", None)])
    params = adapted_params(model, settings)
    written(tmp_path / "a", model, params, settings)
    stacked = base_of(stack_layers(base_of(params)))
    if is_partial:
        with pytest.raises(PretrainedError, match=r"stack of 11 layers.*7 of them .*layout='unrolled'"):
            load_peft(tmp_path / "a", scanned, stacked, family=TOY)
        return
    again, found, _ = load_peft(tmp_path / "a", scanned, stacked, family=TOY)
    assert_same(again["adapters"], stack_layers(params["adapters"]))
    assert found.rules == (("encoder/layers/query/kernel", 2), (".*", None))
    written(tmp_path / "b", scanned, again, found)
    for name in (TENSORS, BASE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rules_say_ranks_by_layer_only_where_they_differ(tmp_path):
    model = Toy()
    settings = Lora([(".*layer_0/query/kernel", 1), (".*(query|output)/kernel", 2), (".*", None)])
    params = adapted_params(model, settings)
    written(tmp_path / "a", model, params, settings)
    _, found, _ = load_peft(tmp_path / "a", model, base_of(params), family=TOY)
    assert dict(found.rules) == {
        "encoder/layer_0/query/kernel": 1,
        "encoder/layer_1/query/kernel": 2,
        r"encoder/layer_\d+/output/kernel": 2,
        ".*": None,
    }
    lora.add(jax.random.key(0), base_of(params), found, model, TOKENS)  # each rule hits


def test_whole_leaves_come_with_their_modules(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    saved = ["head/bias", "encoder/layer_1/norm/.*", "gates/.*", "encoder/layer_0/output/bias"]
    tensors, config = written(tmp_path / "a", model, params, settings, saved=saved)
    assert config["modules_to_save"] == ["classifier", "gate", "toy.h.0.proj", "toy.h.1.ln", "up"]
    whole = {name.removeprefix("base_model.model.") for name in tensors if ".lora_" not in name}
    modules = ("classifier", "toy.h.0.proj", "toy.h.1.ln")
    assert whole == {"gate.weight", "up.weight", *(f"{m}.{end}" for m in modules for end in ("weight", "bias"))}
    other = adapted_params(model, settings, seed=1)
    held = set(claim([*saved, "head/kernel", "encoder/layer_0/output/kernel"], flatten(params))[0])
    flat = {path: x if path in held else flatten(params)[path] for path, x in flatten(base_of(other)).items()}
    moved = jax.tree.unflatten(jax.tree.structure(base_of(params)), list(flat.values()))
    again, _, ledger = load_peft(tmp_path / "a", model, moved, family=TOY)
    assert_same(again, params)
    assert held <= ledger.loaded.keys()
    assert ledger.loaded["gates/kernel"] == "gate.weight + up.weight"


def test_a_whole_leaf_of_one_scanned_layer(tmp_path):
    model, scanned, settings = Toy(), Toy(is_scanned=True), Lora(QUERIES)
    params = adapted_params(model, settings)
    written(tmp_path / "a", model, params, settings, saved=["encoder/layer_1/norm/scale"])
    base = stack_layers(base_of(params))
    base["encoder"]["layers"]["norm"] = jax.tree.map(lambda x: x.at[1].set(0), base["encoder"]["layers"]["norm"])
    again, _, _ = load_peft(tmp_path / "a", scanned, base, family=TOY)
    assert_same(base_of(again), stack_layers(base_of(params)))


def test_the_base_is_recognised(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    written(tmp_path / "a", model, params, settings, saved=["head/.*"])
    other = base_of(params) | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    load_peft(tmp_path / "a", model, other, family=TOY)  # the head is the adapter's own
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base_of(params))
    load_peft(tmp_path / "a", Toy(param_dtype=jnp.bfloat16), other, family=TOY)  # cast: the file cannot tell
    other = base_of(params) | {"class_token": params["class_token"].at[0].add(1e-6)}
    with pytest.raises(PretrainedError) as error:
        load_peft(tmp_path / "a", model, other, family=TOY)
    assert "made for another base: 1 of 25 leaves differ; load that base, or delete jaxdl_base.json" in str(error.value)
    assert "class_token float32[4] holds other numbers" in str(error.value)
    (tmp_path / "a" / BASE).unlink()
    load_peft(tmp_path / "a", model, other, family=TOY)


def test_a_quantised_base(tmp_path):
    model, settings = Toy(width=64), Lora(QUERIES)
    params = adapted_params(model, settings)
    tensors, _ = written(tmp_path / "a", model, params, settings)
    small = quantize(base_of(params), [(".*(output|key)/kernel", "nf4"), (".*", None)])
    again, found, _ = load_peft(tmp_path / "a", model, small, family=TOY)
    assert_same(again["adapters"], params["adapters"])
    assert again["encoder"]["layer_0"]["key"]["kernel"].kind == "nf4"
    second, _ = written(tmp_path / "b", model, again, found)
    assert_same(second, tensors)
    assert "encoder/layer_0/key/kernel/codes" in json.loads((tmp_path / "b" / BASE).read_text())
    text = refused(tmp_path / "c", model, again, found, saved=["encoder/layer_1/output/bias"])
    assert "encoder/layer_1/output/kernel is to be written whole, but is quantised" in text
    written(tmp_path / "d", model, params, settings, saved=["encoder/layer_1/output/bias"])
    with pytest.raises(
        PretrainedError, match="encoder/layer_1/output/kernel is replaced by the file, but is quantised"
    ):
        load_peft(tmp_path / "d", model, small, family=TOY)


def test_what_has_no_form_in_peft_is_listed(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    layer = params["adapters"]["encoder"]["layer_0"]
    pair = layer["query"]
    layer["qerry"], layer["key"] = pair, {"a": pair["a"]}
    layer["value"] = {"a": jnp.ones((5, 2)), "b": pair["b"]}
    layer["output"] = {**pair, "magnitude": jnp.ones(4)}
    params["adapters"]["gates"] = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6))}
    text = refused(tmp_path / "a", model, params, settings)
    for part in [
        "this has no form in PEFT: 5 problem(s)",
        "layer_0/qerry is at no kernel or embedding of the model; nearest: encoder/layer_0/query/kernel",
        "adapters/encoder/layer_0/key has ['a'], but settings has_magnitude=False",
        "adapters/encoder/layer_0/output has ['a', 'b', 'magnitude'], but settings has_magnitude=False",
        "adapters/encoder/layer_0/value/a has shape (5, 2), but encoder/layer_0/value/kernel (4, 4) takes (4, 2)",
        "gates/kernel is no module of its own in transformers, so PEFT cannot adapt it",
    ]:
        assert part in text, part


def test_other_kinds_of_adapters_and_none_are_refused(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    text = refused(tmp_path / "a", model, {**params, "adapters": {"embed": {"prompt": jnp.ones((2, 4))}}}, settings)
    assert "adapters/embed/prompt is no leaf of LoRA (a, b, magnitude)" in text
    assert "params have no 'adapters'" in refused(tmp_path / "a", model, base_of(params), settings)
    params.pop("class_token")
    assert "the parameters lack class_token of the model" in refused(tmp_path / "a", model, params, settings)


def test_saved_rules_and_adapters_do_not_meet(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    text = refused(tmp_path / "a", model, params, settings, saved=["haed/.*", "encoder/layer_0/query/bias"])
    assert "saved rule 'haed/.*' matches nothing; nearest paths: head/bias" in text
    assert "saved='head/.*' is no list" in refused(tmp_path / "a", model, params, settings, saved="head/.*")
    assert (
        "encoder/layer_0/query/kernel, encoder/layer_0/key/kernel, encoder/layer_0/value/kernel: toy.h.0.attn has an"
        in text
    )


def test_dora_needs_all_of_a_fused_module_and_no_embedding(tmp_path):
    model, settings = Toy(), Lora(QUERIES, has_magnitude=True)
    params = adapted_params(model, settings)
    text = refused(tmp_path / "a", model, params, settings)
    assert "encoder/layer_1/key/kernel, encoder/layer_1/value/kernel lie in toy.h.1.attn beside adapted ones" in text
    params["adapters"] = {"embed": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 4)), "magnitude": jnp.ones(4)}}
    assert "embed/embedding is an embedding, and DoRA has none" in refused(tmp_path / "a", model, params, settings)


def test_an_existing_folder_is_left_alone(tmp_path):
    model, settings = Toy(), Lora(QUERIES)
    params = adapted_params(model, settings)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(PretrainedError, match="is not empty; give a new folder"):
        save_peft(tmp_path, model, params, settings, family=TOY)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
