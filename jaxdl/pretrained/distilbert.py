"""DistilBERT checkpoints of Hugging Face: the bare model and its four heads."""

from typing import Any

import jax.numpy as jnp

from jaxdl.models.bert import DistilBert, bert_block
from jaxdl.models.layers import Dtype
from jaxdl.pretrained.bert_config import (
    ACTIVATIONS,
    activation_name,
    architectures,
    check_block,
    check_config,
    class_name,
    head_fields,
    label_config,
    our_outputs,
    text_inputs,
    their_outputs,
)
from jaxdl.pretrained.entries import Ignored, Line, Tied, dense, embedding, entry, expand, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.transforms import pad_rows

_HEAD_DROPOUTS = {"classify": ("seq_classif_dropout", 0.2), "tag": ("dropout", 0.1), "span": ("qa_dropout", 0.1)}


def to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> DistilBert:
    """A `DistilBert` of its config.json.

    Args:
      config: with `architectures` of one name.
      dtype, param_dtype: of the computation and of the parameters.
      dropout_rate: of embeddings, branches and head, instead of the config's.
      attention_dropout_rate: of the attention probabilities, instead of the config's.
      fields: of the module, instead of the config's.

    Raises:
      PretrainedError: a config that this family cannot build.
    """
    check_config(config, "activation")
    rate = config.get("attention_dropout", 0.1) if attention_dropout_rate is None else attention_dropout_rate
    block = bert_block(
        config["dim"],
        config["n_heads"],
        config["hidden_dim"],
        activation=ACTIVATIONS[config.get("activation", "gelu")],
        dropout_rate=config.get("dropout", 0.1) if dropout_rate is None else dropout_rate,
        attention_dropout_rate=rate,
        init_std=config.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    own = {"n_layers": config["n_layers"], "vocab_size": config["vocab_size"], **head_fields(config, fields)}
    own["n_positions"] = config.get("max_position_embeddings", 512)
    if own["head"] in _HEAD_DROPOUTS:
        key, default = _HEAD_DROPOUTS[own["head"]]
        own["head_dropout_rate"] = config.get(key, default) if dropout_rate is None else dropout_rate
    return DistilBert(**{"block": block, **own, **fields})


def _to_config(model: DistilBert) -> dict[str, Any]:
    block = model.block
    check_block(block)
    key, _ = _HEAD_DROPOUTS.get(model.head or "", ("dropout", 0.0))
    own_rate = {} if key == "dropout" else {key: model.head_dropout_rate}
    return {
        "model_type": "distilbert",
        "architectures": [class_name(model)],
        "vocab_size": model.vocab_size,
        "dim": block.width,
        "n_layers": model.n_layers,
        "n_heads": block.n_heads,
        "hidden_dim": block.hidden,
        "activation": activation_name(block),
        "dropout": block.dropout_rate,
        "attention_dropout": block.attention_dropout_rate,
        **own_rate,
        "max_position_embeddings": model.n_positions,
        "sinusoidal_pos_embds": False,
        "initializer_range": block.init_std,
        "tie_weights_": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        **label_config(model),
    }


def _entries(model: DistilBert) -> list[Line]:
    here, layer = "distilbert.embeddings", "distilbert.transformer.layer.{i}"
    parts = {"q_lin": "query", "k_lin": "key", "v_lin": "value", "out_lin": "output"}
    lines: list[Line] = [
        *norm(f"{layer}.sa_layer_norm", "encoder/layer_{i}/attention_norm"),
        *dense(f"{layer}.ffn.lin1", "encoder/layer_{i}/mlp/up"),
        *dense(f"{layer}.ffn.lin2", "encoder/layer_{i}/mlp/down"),
        *norm(f"{layer}.output_layer_norm", "encoder/layer_{i}/mlp_norm"),
    ]
    for theirs, ours in parts.items():
        lines += dense(f"{layer}.attention.{theirs}", f"encoder/layer_{{i}}/attention/{ours}")
    return [
        *embedding(f"{here}.word_embeddings", "embed/token", n_rows=model.vocab_size),
        *embedding(f"{here}.position_embeddings", "embed/position"),
        *norm(f"{here}.LayerNorm", "embed/norm"),
        Ignored("*embeddings.position_ids"),
        *expand(lines, i=range(model.n_layers)),
        *_head(model),
    ]


def _head(model: DistilBert) -> list[Line]:
    if model.head == "classify":
        return [*dense("pre_classifier", "head/dense"), *dense("classifier", "head/output")]
    if model.head == "masked_lm":
        return [
            *dense("vocab_transform", "head/dense"),
            *norm("vocab_layer_norm", "head/norm"),
            entry("vocab_projector.bias", "head/bias", pad_rows(model.vocab_size)),
            Tied("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        ]
    names = {"tag": "classifier", "span": "qa_outputs"}
    return [*dense(names[model.head], "head")] if model.head in names else []


DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    architectures=architectures("DistilBert"),
    modules=(DistilBert,),
    to_model=to_model,
    to_config=_to_config,
    entries=_entries,
    inputs=text_inputs,
    names=Names("distilbert."),
    bare="DistilBertModel",
    our_outputs=our_outputs,
    their_outputs=their_outputs,
    zero_gradients=(r".*/attention/key/bias",),
)
