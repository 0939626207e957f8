"""Presets on the trees of every family: which leaves move, by names written out here, and rates in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, make_optimizer, paths
from jaxdl.finetune import presets
from jaxdl.finetune.presets import (
    bitfit,
    discriminative,
    freeze_embeddings,
    head_only,
    last_layers,
    layerwise_decay,
    norm_only,
    only,
)
from jaxdl.models import CNN, MLP, BasicBlock, ConvNeXt, ResNet
from jaxdl.models.bert import Bert, Roberta, bert_block
from jaxdl.models.clip import CLIP, CLIPText, CLIPVision, clip_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.t5 import T5, t5_block
from jaxdl.models.vit import ViT, vit_block
from jaxdl.paths import REST, RuleError, flatten

TOKENS = jnp.ones((1, 4), jnp.int32)
IMAGE, PICTURE = jnp.ones((1, 8, 8, 1)), jnp.ones((1, 8, 8, 3))
BERT, GPT, LLAMA = bert_block(8, 2, 16), gpt2_block(width=8, n_heads=2), llama_block(width=8, n_heads=2, hidden=16)
SIZES = {"vocab_size": 11, "n_layers": 3}
TEXT = CLIPText(clip_block(8, 2, 1), n_layers=2, vocab_size=11, n_positions=4)
VISION = CLIPVision(clip_block(8, 2, 1), n_layers=3, image_size=8, patch_size=4)
MODELS = {
    "bert": (Bert(BERT, n_positions=8, head="classify", n_outputs=2, **SIZES), TOKENS),
    "roberta": (Roberta(BERT, n_positions=8, head="classify", n_outputs=2, **SIZES), TOKENS),
    "masked": (Bert(BERT, n_positions=8, head="masked_lm", **SIZES), TOKENS),
    "gpt2": (GPT2(GPT, n_positions=4, **SIZES), TOKENS),
    "gpt2_scanned": (GPT2(GPT, n_positions=4, layout="scanned", **SIZES), TOKENS),
    "llama": (Llama(LLAMA, **SIZES), TOKENS),
    "t5": (T5(t5_block(8, 2, 16), n_decoder_layers=2, **SIZES), TOKENS),
    "vit": (ViT(vit_block(8, 2, 16), 3, image_size=8, patch_size=4, head="classify", n_outputs=2), PICTURE),
    "clip": (CLIP(TEXT, VISION, width=4), TOKENS),
    "resnet": (ResNet(n_outputs=2, stage_sizes=(1, 2), block=BasicBlock, width=4, norm="batch"), IMAGE),
    "convnext": (ConvNeXt(n_outputs=2, depths=(1, 2), widths=(4, 8)), IMAGE),
    "cnn": (CNN(n_outputs=2, features=(4, 4, 4), dense_width=4), IMAGE),
    "mlp": (MLP(widths=(4, 4, 4), n_outputs=2, norm="layer"), jnp.ones((1, 5))),
}


@functools.cache
def tree(name):
    model, inputs = MODELS[name]
    more = {"t5": {"inputs": TOKENS}, "clip": {"image": PICTURE}}.get(name, {})
    return jax.eval_shape(functools.partial(model.init, **more), jax.random.key(0), inputs)["params"]


def moving(rules, params):
    return [path for path, moves in flatten(paths.match(rules, params)).items() if moves]


def is_below(path, *modules):
    return any(path == module or path.startswith(module + "/") for module in modules)


LAST_TWO = {
    "bert": ["encoder/layer_1", "encoder/layer_2", "pooler", "head"],
    "roberta": ["encoder/layer_1", "encoder/layer_2", "head"],
    "masked": ["encoder/layer_1", "encoder/layer_2", "head"],
    "gpt2": ["decoder/layer_1", "decoder/layer_2", "decoder/final_norm"],
    "llama": ["decoder/layer_1", "decoder/layer_2", "decoder/final_norm", "head"],
    "t5": [
        *("encoder/layer_1", "encoder/layer_2", "encoder/final_norm"),
        *("decoder/layer_0", "decoder/layer_1", "decoder/final_norm"),
    ],
    "vit": ["encoder/layer_1", "encoder/layer_2", "encoder/final_norm", "head"],
    "clip": [
        *("text/encoder/layer_0", "text/encoder/layer_1", "text/encoder/final_norm", "text_projection"),
        *("vision/encoder/layer_1", "vision/encoder/layer_2", "vision/encoder/final_norm", "vision_projection"),
        "logit_scale",
    ],
    "resnet": ["stage_1", "head"],
    "convnext": ["stage_1", "final_norm", "head"],
    "cnn": ["stage_1", "stage_2", "dense", "head"],
    "mlp": ["dense_1", "norm_1", "dense_2", "norm_2", "head"],
}
HEADS = {"clip": ["text_projection", "vision_projection", "logit_scale"], "gpt2": [], "gpt2_scanned": [], "t5": []}
NO_BIASES, NO_EMBEDDINGS = ("llama", "t5"), ("resnet", "convnext", "cnn", "mlp")


@pytest.mark.parametrize("name", LAST_TWO)
def test_the_last_two_layers_and_what_follows_them(name):
    params = tree(name)
    want = [path for path in flatten(params) if is_below(path, *LAST_TWO[name])]
    assert moving(last_layers(params, 2), params) == want
    assert 0 < len(want) < len(flatten(params))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_alone(name):
    params, heads = tree(name), HEADS.get(name, ["head"])
    if not heads:
        with pytest.raises(JaxdlError, match=r"tied to embed/token/embedding.*head of its own"):
            head_only(params)
        return
    assert moving(head_only(params), params) == [path for path in flatten(params) if is_below(path, *heads)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_head", [True, False])
def test_biases(name, has_head):
    params, heads = tree(name), HEADS.get(name, ["head"])
    if name in NO_BIASES:
        with pytest.raises(JaxdlError, match=r"bitfit: .*no biases.*try norm_only"):
            bitfit(params, has_head=has_head)
        return
    of_head = [path for path in flatten(params) if is_below(path, *heads)]
    biases = [path for path in flatten(params) if path.endswith("/bias") and path not in of_head]
    got = moving(bitfit(params, has_head=has_head), params)
    assert sorted(got) == sorted(biases + (of_head if has_head else []))
    assert biases


@pytest.mark.parametrize("name", MODELS)
def test_norms(name):
    params, heads = tree(name), HEADS.get(name, ["head"])
    norms = [
        path
        for path in flatten(params)
        if "norm" in path.split("/")[-2:][0] and path.split("/")[-1] in ("scale", "bias") and not is_below(path, *heads)
    ]
    assert moving(norm_only(params, has_head=False), params) == norms
    of_head = [path for path in flatten(params) if is_below(path, *heads)]
    assert sorted(moving(norm_only(params), params)) == sorted(norms + of_head)


def test_norms_of_linen_by_their_default_names_and_no_others():
    params = {"BatchNorm_0": {"scale": 1}, "RMSNorm_1": {"scale": 1}, "normal": {"bias": 1}, "Dense_0": {"bias": 1}}
    assert moving(norm_only(params), params) == ["BatchNorm_0/scale", "RMSNorm_1/scale"]


@pytest.mark.parametrize("name", MODELS)
def test_everything_but_the_embeddings(name):
    params = tree(name)
    if name in NO_EMBEDDINGS:
        with pytest.raises(JaxdlError, match=r"no embed/\.\.\..*The tree has: .*head"):
            freeze_embeddings(params)
        return
    frozen = ["text/embed", "vision/embed"] if name == "clip" else ["embed"]
    assert moving(freeze_embeddings(params), params) == [p for p in flatten(params) if not is_below(p, *frozen)]


# (layers of the stack, the modules of layer l, what lies before the layers)
DEPTHS = {
    "bert": [(3, "encoder/layer_{}", ["embed"])],
    "gpt2": [(3, "decoder/layer_{}", ["embed"])],
    "vit": [(3, "encoder/layer_{}", ["embed"])],
    "llama": [(3, "decoder/layer_{}", ["embed"])],
    "clip": [(2, "text/encoder/layer_{}", ["text/embed"]), (3, "vision/encoder/layer_{}", ["vision/embed"])],
    "t5": [(3, "encoder/layer_{}", ["embed", "encoder/relative"]), (2, "decoder/layer_{}", ["decoder/relative"])],
    "cnn": [(3, "stage_{}", [])],
    "mlp": [(3, "dense_{}", []), (3, "norm_{}", [])],
}


@pytest.mark.parametrize("name", DEPTHS)
def test_layerwise_rates_in_closed_form(name):
    """As in BEiT and MAE: `decay ** (L + 1 - depth)`, depth 0 for embeddings, l + 1 for layer l, L + 1 for the rest."""
    params, decay = tree(name), 0.8
    got = flatten(paths.match(layerwise_decay(params, decay), params))
    for path, rate in got.items():
        want = 1.0
        for n, layer, inputs in DEPTHS[name]:
            depth = next((i + 1 for i in range(n) if is_below(path, layer.format(i))), None)
            depth = 0 if is_below(path, *inputs) else depth
            want = want if depth is None else decay ** (n + 1 - depth)
        assert rate == pytest.approx(want, rel=1e-12), path


def test_layerwise_rates_of_blocks_in_stages():
    params = tree("convnext")
    got = flatten(paths.match(layerwise_decay(params, 0.5), params))
    want = {"stem_conv": 4, "stem_norm": 4, "stage_0/block_0": 3, "stage_1/block_0": 2, "stage_1/downsample_conv": 2}
    want |= {"stage_1/downsample_norm": 2, "stage_1/block_1": 1, "final_norm": 0, "head": 0}
    for path, rate in got.items():
        assert rate == 0.5 ** next(depth for module, depth in want.items() if is_below(path, module)), path
    assert moving(last_layers(params, 1), params) == [
        path for path in flatten(params) if is_below(path, "stage_1/block_1", "final_norm", "head")
    ]


def test_layers_beyond_nine_are_ordered_by_number():
    params = {"encoder": {f"layer_{i}": {"kernel": 1} for i in range(12)}}
    rates = flatten(paths.match(layerwise_decay(params, 0.5), params))
    assert rates["encoder/layer_11/kernel"] == 0.5
    assert rates["encoder/layer_2/kernel"] == 0.5**10


def test_rates_leave_out_what_is_frozen_and_reach_adapters():
    """The optimizer sees the trainable half: a rule for a frozen layer would be an error there."""
    params = {
        "adapters": {"encoder": {"layer_2": {"a": jnp.ones(1)}}},
        "embed": {"embedding": jnp.ones(1)},
        "encoder": {f"layer_{i}": {"kernel": jnp.ones(1)} for i in range(3)},
        "head": {"kernel": jnp.ones(1)},
    }
    trainable = [("adapters/.*", True), ("head/.*", True), (".*", False)]
    rules = layerwise_decay(params, 0.5, trainable=trainable)
    assert rules == [("(adapters/)?encoder/layer_2/.*", 0.5), (".*", 1.0)]
    tx = make_optimizer("sgd", learning_rate=1.0, lr_scale_rules=rules)
    state = create_state(params, {}, tx, rng=jax.random.key(0), trainable=trainable)
    half, _ = paths.split(params, paths.match(trainable, params))
    updates, _ = tx.update(half, state.opt_state, half)
    assert {path: float(leaf[0]) for path, leaf in flatten(updates).items()} == {
        "adapters/encoder/layer_2/a": -0.5,
        "head/kernel": -1.0,
    }
    with pytest.raises(RuleError, match="matches nothing"):
        create_state(
            params,
            {},
            make_optimizer("sgd", learning_rate=1.0, lr_scale_rules=layerwise_decay(params, 0.5)),
            rng=jax.random.key(0),
            trainable=trainable,
        )


def test_discriminative_rates_are_those_of_the_paper():
    params = tree("gpt2")
    groups = ["embed/.*", "decoder/layer_0/.*", "decoder/layer_1/.*", ".*"]
    rates = flatten(paths.match(discriminative(params, groups), params))
    assert rates["decoder/final_norm/scale"] == 1.0
    assert rates["decoder/layer_0/mlp/up/kernel"] == pytest.approx(1 / 2.6**2)
    assert rates["embed/token/embedding"] == pytest.approx(1 / 2.6**3)
    frozen = discriminative(params, groups, trainable=[("decoder/layer_1/.*", True), (".*", False)])
    assert frozen == [("decoder/layer_1/.*", pytest.approx(1 / 2.6))]
    with pytest.raises(RuleError, match="no rule covers decoder/final_norm"):
        discriminative(params, groups[:-1])


def test_only_is_held_to_the_laws_but_may_cover_everything():
    params = tree("llama")
    chosen = only("head/.*", "decoder/layer_2/.*")
    assert chosen == [("head/.*", True), ("decoder/layer_2/.*", True), (REST, False)]
    assert moving(chosen, params) == [p for p in flatten(params) if is_below(p, "head", "decoder/layer_2")]
    assert moving(only("embed/.*", "decoder/.*", "head/.*"), params) == list(flatten(params))
    assert moving(only(".*"), params) == list(flatten(params))
    for regexes, message in {
        ("Head/.*",): "'Head/.*' matches nothing; nearest paths: head/kernel",
        ("head/.*", "head/kernel"): "'head/kernel' only matches leaves that earlier rules took",
        ("head/(",): "not a regular expression",
    }.items():
        with pytest.raises(RuleError, match=message.replace("(", r"\(").replace("*", r"\*")):
            paths.match(only(*regexes), params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: only(), r"only\(\) takes one str or more"),
        (lambda: only(("head/.*", "embed/.*")), "takes one str or more"),
        (lambda: last_layers(tree("gpt2_scanned"), 1), "decoder/layers holds all layers in one.*layout='unrolled'"),
        (lambda: layerwise_decay(tree("gpt2_scanned"), 0.9), "scanned layout"),
        (lambda: last_layers(tree("bert"), 0), r"n=0 must be at least 1.*encoder/ has 3 layers"),
        (lambda: last_layers(tree("t5"), 3), "n=3 .*decoder/ has 2 layers"),
        (lambda: last_layers(tree("mlp"), 3), "n=3 freezes nothing"),
        (lambda: last_layers({"word": {"kernel": 1}}, 1), "no numbered layers.*The tree has: word"),
        (lambda: last_layers({"dense_0": {"kernel": 1}, "layer_0": {"kernel": 1}}, 1), "order is not known"),
        (lambda: layerwise_decay(tree("bert"), 1.2), r"decay=1.2 must lie in \(0, 1\]"),
        (lambda: layerwise_decay(tree("bert"), 0.0), "decay=0.0"),
        (lambda: discriminative(tree("bert"), [".*"], factor=0.5), "factor=0.5"),
        (lambda: head_only({"classifier": {"kernel": 1}}), "no head/.*The tree has: classifier"),
        (lambda: norm_only({"head": {"norm": {"scale": 1}}}), "no norms"),
        (lambda: freeze_embeddings({"embed": {"word": {"embedding": 1}}}), "nothing would train"),
    ],
)
def test_trees_in_which_a_preset_makes_no_sense_are_refused(call, message):
    with pytest.raises(JaxdlError, match=message):
        call()


def test_layers_inside_a_head_belong_to_the_head():
    params = {"layer_0": {"kernel": 1}, "layer_1": {"kernel": 1}, "head": {"dense_0": {"kernel": 1}}}
    assert moving(last_layers(params, 1), params) == ["head/dense_0/kernel", "layer_1/kernel"]
    assert layerwise_decay(params, 0.5)[-1] == (".*", 1.0)


def test_the_presets_by_name_need_the_parameters_only():
    for preset in presets.PRESETS.values():
        assert moving(preset(tree("bert")), tree("bert"))


@pytest.fixture
def numbers():
    params = {"body": {"kernel": jnp.array([2.0]), "bias": jnp.array([3.0])}, "head": {"kernel": jnp.array([5.0])}}
    return params, jax.tree.map(jnp.ones_like, params)


def values(updates):
    return {path: round(float(leaf[0]), 5) for path, leaf in flatten(updates).items()}


def test_rules_are_masks_for_optax(numbers):
    """`add_decayed_weights(mask=)`, `masked` and `partition` take `paths.match` as it is, or as a function."""
    params, grads = numbers
    rules = head_only(params)
    as_function = functools.partial(paths.match, rules)
    for mask in (as_function(params), as_function):
        tx = optax.add_decayed_weights(0.1, mask=mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert values(updates) == {"body/bias": 1.0, "body/kernel": 1.0, "head/kernel": 1.5}
        tx = optax.masked(optax.scale(7.0), mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert values(updates) == {"body/bias": 1.0, "body/kernel": 1.0, "head/kernel": 7.0}
        tx = optax.partition({True: optax.sgd(0.5), False: optax.set_to_zero()}, mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert values(updates) == {"body/bias": 0.0, "body/kernel": 0.0, "head/kernel": -0.5}


def test_a_mask_as_a_function_fits_the_trainable_half(numbers):
    params, grads = numbers
    trainable = only(".*/kernel")
    tx = optax.chain(
        optax.add_decayed_weights(0.1, mask=functools.partial(paths.match, [("head/.*", True), (".*", False)])),
        optax.sgd(1.0),
    )
    state = create_state(params, {}, tx, rng=jax.random.key(0), trainable=trainable)
    half, _ = paths.split(params, paths.match(trainable, params))
    some, _ = paths.split(grads, paths.match(trainable, params))
    updates, _ = tx.update(some, state.opt_state, half)
    assert values(updates) == {"body/kernel": -1.0, "head/kernel": -1.5}
    np.testing.assert_array_equal(updates["head"]["kernel"], [-1.5])
