"""Mistakes in saying what trains, each refused before step 0: nothing compiles, and messages have the nearest path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, guard, make_optimizer, make_train_step
from jaxdl.checkpoint import restore_params
from jaxdl.data import ArraySource, Pipeline
from jaxdl.finetune.presets import bitfit, head_only, last_layers, layerwise_decay, only
from jaxdl.loop import fit
from jaxdl.models import CNN
from jaxdl.models.apply import make_loss_fn
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.objectives import classification
from jaxdl.pretrained import load, save

BERT = Bert(bert_block(8, 2, 16), n_layers=2, vocab_size=11, n_positions=8, head="classify", n_outputs=3)
GPT = GPT2(gpt2_block(width=8, n_heads=2), n_layers=2, vocab_size=11, n_positions=8)
LLAMA = Llama(llama_block(width=8, n_heads=2, hidden=16), n_layers=1, vocab_size=11)
VISION = CNN(n_outputs=3, features=(4,), convs_per_stage=1, norm="batch")
TOKENS = np.zeros((16, 4), np.int32)
IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)


@functools.cache
def variables(model):
    inputs = IMAGES if model is VISION else TOKENS
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs[:2])
    return jax.tree.map(lambda leaf: 0.1 * np.ones(leaf.shape, leaf.dtype), shapes)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The programs that `fit` compiled."""
    programs, compile = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args, **kw: programs.append(1) or compile(*args, **kw))
    return programs


def train(model, rules, *, step_rules=None, loss_rules=None, tx=None, steps=1):
    """What a user writes, with what may be forgotten; `rules` may be a preset."""
    extra = dict(variables(model))
    params = extra.pop("params")
    rules = rules(params) if callable(rules) else rules
    step_rules = rules if step_rules is None else step_rules
    key, inputs = ("image", IMAGES) if model is VISION else ("tokens", TOKENS)
    tx = tx or optax.adam(0.1)
    loss_fn = make_loss_fn(
        model, classification(), inputs=key, train=True, trainable=step_rules if loss_rules is None else loss_rules
    )
    data = Pipeline(ArraySource({key: inputs, "label": np.arange(16, dtype=np.int32) % 3}), batch_size=8, seed=0)
    state = create_state(params, extra, tx, rng=jax.random.key(0), trainable=rules)
    return fit(state, guard(make_train_step(loss_fn, tx, trainable=step_rules)), data, steps=steps)


def test_without_a_mistake_it_trains(compiled):
    """The other tests could not fail otherwise."""
    assert int(train(BERT, head_only).state.step) == 1
    assert int(train(VISION, head_only).state.step) == 1
    assert len(compiled) == 2


HEAD_LAST = [(".*", False), ("head/.*", True)]
MISTAKES = {
    "misspelt": (BERT, [("haed/.*", True), (".*", False)], "'haed/.*' matches nothing; nearest paths: head/bias"),
    "misspelt in the middle": (
        BERT,
        only("encoder/layer_1/atention/.*"),
        "'encoder/layer_1/atention/.*' matches nothing; nearest paths: encoder/layer_1/attention/",
    ),
    "wrong case": (BERT, only("Head/.*"), "'Head/.*' matches nothing; nearest paths: head/bias"),
    "a prefix for the whole": (BERT, only("head"), "'head' matches nothing; nearest paths: head/"),
    "a layer too many": (
        BERT,
        only("encoder/layer_2/.*"),
        "'encoder/layer_2/.*' matches nothing; nearest paths: encoder/layer_0/",
    ),
    "dots, as in PyTorch": (
        BERT,
        only(r"encoder\.layer\.1\..*"),
        "matches nothing; nearest paths: encoder/layer_",
    ),
    "dead among live ones": (
        BERT,
        [("head/.*", True), ("pooler/.*", True), ("poler/bias", False), ("head/bias", False), (".*", False)],
        "'poler/bias' matches nothing; nearest paths: pooler/bias",
        "'head/bias' only matches leaves that earlier rules took (head/bias); move it up",
    ),
    "the default first": (BERT, HEAD_LAST, "'head/.*' only matches leaves that earlier rules took (head/bias)"),
    "no default": (BERT, [("head/.*", True)], "no rule covers embed/norm/bias", "end the list with ('.*', default)"),
    "everything frozen": (BERT, [(".*", False)], "freeze every parameter", "embed/norm/bias"),
    "everything frozen, in parts": (BERT, [("head/.*", False), (".*", False)], "nothing would train"),
    "strings for truth values": (BERT, [("head/.*", "False"), (".*", False)], "['False']", "must be True or False"),
    "another library's head": (LLAMA, only("lm_head/.*"), "'lm_head/.*' matches nothing; nearest paths: head/kernel"),
    "a head that is tied": (
        GPT,
        only("lm_head/.*"),
        "'lm_head/.*' matches nothing",
        "no head of its own: its logits are tied to embed/token/embedding",
    ),
    "half of a tied weight": (
        GPT,
        [("embed/.*", False), ("head/.*", True), (".*", False)],
        "'head/.*' matches nothing",
        "its logits are tied to embed/token/embedding; that leaf is the head",
    ),
    "a preset for a head that is tied": (GPT, head_only, "head_only: ", "tied to embed/token/embedding"),
    "a preset for biases that are not there": (LLAMA, bitfit, "bitfit: ", "no biases", "norm_only"),
    "a preset for more layers than there are": (BERT, lambda params: last_layers(params, 3), "encoder/ has 2 layers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_rules(name, compiled):
    model, rules, *words = MISTAKES[name]
    with pytest.raises(JaxdlError) as caught:
        train(model, rules)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert caught.value.exit_code == 2
    assert compiled == []


def test_all_mistakes_of_a_list_at_once(compiled):
    with pytest.raises(JaxdlError) as caught:
        train(BERT, [("haed/.*", True), ("encoder/.*", False), ("encoder/layer_0/.*", True), ("(", True)])
    assert "trainable rules: 4 problem(s)" in str(caught.value)
    assert compiled == []


def test_a_frozen_backbone_whose_statistics_would_move(compiled):
    with pytest.raises(JaxdlError) as caught:
        train(VISION, head_only, loss_rules=[(".*", True)])
    text = str(caught.value)
    assert "batch_stats/stage_0/norm_0/mean belongs to stage_0/norm_0, whose parameters are frozen." in text
    assert "freeze_statistics(loss_fn, rules)" in text
    assert compiled == []


@pytest.mark.parametrize("tx", [optax.adam(0.1), make_optimizer("momentum", learning_rate=0.1, momentum=0.9)])
@pytest.mark.parametrize("is_forgotten", ["in the step", "in the state"])
def test_rules_that_were_given_only_once(tx, is_forgotten, compiled):
    rules = [head_only(variables(BERT)["params"]), [(".*", True)]]
    in_state, in_step = rules if is_forgotten == "in the step" else reversed(rules)
    with pytest.raises(JaxdlError) as caught:
        train(BERT, in_state, step_rules=in_step, tx=tx)
    text = str(caught.value)
    assert "the optimizer state was made for other trainable leaves" in text
    assert "embed/norm/bias " + ("trains and is not" if is_forgotten == "in the step" else "is in the state") in text
    assert "give create_state and make_train_step the same rules." in text
    assert compiled == []


def test_rates_for_layers_that_are_frozen(compiled):
    """The optimizer sees only what trains, so a rate for the rest is a rule without a leaf."""
    params = variables(BERT)["params"]
    rules = last_layers(params, 1)
    rates = layerwise_decay(params, 0.9)
    with pytest.raises(JaxdlError, match=r"'encoder/layer_0/\.\*' matches nothing; nearest paths: encoder/layer_1"):
        train(BERT, rules, tx=make_optimizer("adamw", learning_rate=0.1, lr_scale_rules=rates))
    assert compiled == []


def test_a_checkpoint_with_another_number_of_classes():
    saved = variables(BERT)["params"]
    like = {**saved, "head": {"kernel": np.ones((8, 7), np.float32), "bias": np.ones(7, np.float32)}}
    with pytest.raises(JaxdlError) as caught:
        restore_params(saved, like)
    text = str(caught.value)
    assert "head/bias is float32[3] in the checkpoint, float32[7] in the model" in text
    assert 'fresh=["head/kernel"]' in text
    with pytest.raises(JaxdlError, match=r"'haed/\.\*' matches nothing; nearest paths: head/bias"):
        restore_params(saved, like, fresh=["haed/.*"])
    params, ledger = restore_params(saved, like, fresh=["head/.*"])
    assert (params["head"]["bias"].shape, ledger.fresh) == ((7,), ("head/bias", "head/kernel"))


def test_a_pretrained_folder_with_another_number_of_classes(tmp_path):
    save(tmp_path / "bert", BERT, jax.tree.map(jnp.asarray, variables(BERT)["params"]))
    with pytest.raises(JaxdlError) as caught:
        load(tmp_path / "bert", n_outputs=7)
    text = str(caught.value)
    assert "head/bias" in text
    assert "classifier.bias" in text
    assert "fresh" in text
    with pytest.raises(JaxdlError, match=r"Head/\.\*.*matches nothing; nearest paths: head/"):
        load(tmp_path / "bert", n_outputs=7, fresh=["Head/.*"])
    assert load(tmp_path / "bert", n_outputs=7, fresh=["head/.*"]).params["head"]["bias"].shape == (7,)


def test_integers_that_would_train(compiled):
    params = {"body": {"kernel": {"codes": np.int8([1, 2])}}, "head": {"kernel": np.ones(2, np.float32)}}
    with pytest.raises(JaxdlError, match=r"not floating: \['body/kernel/codes'\]; freeze them"):
        create_state(params, {}, optax.sgd(0.1), rng=jax.random.key(0))
    create_state(params, {}, optax.sgd(0.1), rng=jax.random.key(0), trainable=head_only(params))
