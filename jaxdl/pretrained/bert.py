"""BERT checkpoints of Hugging Face: the bare model and its four heads; MiniLM is a BERT here too."""

from typing import Any

import jax.numpy as jnp

from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.layers import Dtype
from jaxdl.models.text_encoder import TextEncoder
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

OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> Bert:
    """A `Bert` of BERT's config.json.

    Args:
      config: with `architectures` of one name.
      dtype, param_dtype: of the computation and of the parameters.
      dropout_rate: of embeddings, branches and head, instead of the config's.
      attention_dropout_rate: of the attention probabilities, instead of the config's.
      fields: of the module, instead of the config's.
    """
    return Bert(**encoder_fields(config, dtype, param_dtype, dropout_rate, attention_dropout_rate, fields))


def encoder_fields(
    config: Config,
    dtype: Dtype,
    param_dtype: Dtype,
    dropout_rate: float | None,
    attention_dropout_rate: float | None,
    fields: dict[str, Any],
) -> dict[str, Any]:
    """The fields of a `Bert` or `Roberta`; see `to_model`.

    Raises:
      PretrainedError: a config that this family cannot build.
    """
    check_config(config, "hidden_act")
    dropout = config.get("hidden_dropout_prob", 0.1) if dropout_rate is None else dropout_rate
    attention_dropout = config.get("attention_probs_dropout_prob", 0.1)
    block = bert_block(
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "gelu")],
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        dropout_rate=dropout,
        attention_dropout_rate=attention_dropout if attention_dropout_rate is None else attention_dropout_rate,
        init_std=config.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    own = {"block": block, "n_layers": config["num_hidden_layers"], "vocab_size": config["vocab_size"]}
    own |= {
        "n_positions": config.get("max_position_embeddings", 512),
        "n_token_types": config.get("type_vocab_size", 2),
    }
    own |= head_fields(config, fields)
    rate = config.get("classifier_dropout") if dropout_rate is None else None
    own |= {"head_dropout_rate": dropout if rate is None else rate} if own["head"] in ("classify", "tag") else {}
    return {**own, "has_pooler": own["head"] is None and config.get("has_pooler", True), **fields}


def to_config(model: TextEncoder) -> dict[str, Any]:
    """config.json of a `Bert`, or but for what differs of a `Roberta`.

    Raises:
      PretrainedError: a block that transformers does not have.
    """
    block = model.block
    check_block(block, norm_epsilon=block.norm_epsilon)
    is_own_rate = model.head in ("classify", "tag") and model.head_dropout_rate != block.dropout_rate
    # No field of transformers, which passes it over and starts a pooler anew; here the folder loads as it was saved.
    no_pooler = {"has_pooler": False} if model.head in (None, "embed") and not model.has_pooler else {}
    return {
        "model_type": "bert",
        "architectures": [class_name(model)],
        "vocab_size": model.vocab_size,
        "hidden_size": block.width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": block.n_heads,
        "intermediate_size": block.hidden,
        "hidden_act": activation_name(block),
        "hidden_dropout_prob": block.dropout_rate,
        "attention_probs_dropout_prob": block.attention_dropout_rate,
        "classifier_dropout": model.head_dropout_rate if is_own_rate else None,
        "max_position_embeddings": model.n_positions,
        "type_vocab_size": model.n_token_types,
        "layer_norm_eps": block.norm_epsilon,
        "initializer_range": block.init_std,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        **label_config(model),
        **no_pooler,
    }


def encoder_lines(model: TextEncoder, backbone: str) -> list[Line]:
    """The lines of everything but the head; `backbone` is "bert" or "roberta"."""
    here, layer = f"{backbone}.embeddings", f"{backbone}.encoder.layer.{{i}}"
    attention = [
        line
        for name in ("query", "key", "value")
        for line in dense(f"{layer}.attention.self.{name}", f"encoder/layer_{{i}}/attention/{name}")
    ]
    lines = [
        *attention,
        *dense(f"{layer}.attention.output.dense", "encoder/layer_{i}/attention/output"),
        *norm(f"{layer}.attention.output.LayerNorm", "encoder/layer_{i}/attention_norm"),
        *dense(f"{layer}.intermediate.dense", "encoder/layer_{i}/mlp/up"),
        *dense(f"{layer}.output.dense", "encoder/layer_{i}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", "encoder/layer_{i}/mlp_norm"),
    ]
    return [
        *embedding(f"{here}.word_embeddings", "embed/token", n_rows=model.vocab_size),
        *embedding(f"{here}.position_embeddings", "embed/position"),
        *embedding(f"{here}.token_type_embeddings", "embed/token_type"),
        *norm(f"{here}.LayerNorm", "embed/norm"),
        Ignored("*embeddings.position_ids"),
        *expand(lines, i=range(model.n_layers)),
        *dense(f"{backbone}.pooler.dense", "pooler", optional=True),
    ]


def _entries(model: Bert) -> list[Line]:
    lines = encoder_lines(model, "bert")
    if model.head != "masked_lm":
        return lines + output_lines(model)
    return [
        *lines,
        *dense("cls.predictions.transform.dense", "head/dense"),
        *norm("cls.predictions.transform.LayerNorm", "head/norm"),
        *masked_lm_lines("cls.predictions", "bert", model.vocab_size),
        *dense("cls.seq_relationship", "head/next_sentence", optional=True),  # of pre-training; no model here has it
    ]


def output_lines(model: TextEncoder) -> list[Line]:
    """The single linear layer of "classify" (on a pooler), "tag" and "span"."""
    names = {"classify": "classifier", "tag": "classifier", "span": "qa_outputs"}
    return [*dense(names[model.head], "head")] if model.head in names else []


def masked_lm_lines(head: str, backbone: str, vocab_size: int) -> list[Line]:
    """The bias over the vocabulary, and the second names of it and of the tied embedding."""
    return [
        entry(f"{head}.bias", "head/bias", pad_rows(vocab_size)),
        Tied(f"{head}.decoder.weight", f"{backbone}.embeddings.word_embeddings.weight"),
        Tied(f"{head}.decoder.bias", f"{head}.bias"),
    ]


BERT = Family(
    name="bert",
    model_types=("bert",),
    architectures=architectures("Bert"),
    modules=(Bert,),
    to_model=to_model,
    to_config=to_config,
    entries=_entries,
    inputs=text_inputs,
    names=Names("bert.", OLD_NAMES),
    bare="BertModel",
    our_outputs=our_outputs,
    their_outputs=their_outputs,
    zero_gradients=(r".*/attention/key/bias",),
)
