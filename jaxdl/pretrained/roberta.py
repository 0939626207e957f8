"""RoBERTa checkpoints of Hugging Face: the bare model and its four heads."""

from typing import Any

import jax.numpy as jnp

from jaxdl.models.bert import Roberta
from jaxdl.models.layers import Dtype
from jaxdl.pretrained.bert import encoder_fields, encoder_lines, masked_lm_lines, output_lines
from jaxdl.pretrained.bert import to_config as bert_config
from jaxdl.pretrained.bert_config import architectures, our_outputs, text_inputs, their_outputs
from jaxdl.pretrained.entries import Line, dense, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.matching import Names


def to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> Roberta:
    """A `Roberta` of its config.json; the arguments are those of BERT's."""
    own = encoder_fields(config, dtype, param_dtype, dropout_rate, attention_dropout_rate, fields)
    return _checked(Roberta(**{"padding_token": config.get("pad_token_id", 1), **own}))


def _checked(model: Roberta) -> Roberta:
    activation = model.block.activation
    if model.head == "masked_lm" and activation != "gelu":
        raise PretrainedError(f"RoBERTa's masked_lm head has 'gelu' always, but the blocks {activation!r}; use 'gelu'.")
    return model


def _to_config(model: Roberta) -> dict[str, Any]:
    tokens = {"pad_token_id": model.padding_token, "bos_token_id": 0, "eos_token_id": 2}
    return {**bert_config(_checked(model)), "model_type": "roberta", **tokens}


def _entries(model: Roberta) -> list[Line]:
    lines = encoder_lines(model, "roberta")
    if model.head == "classify":
        return [*lines, *dense("classifier.dense", "head/dense"), *dense("classifier.out_proj", "head/output")]
    if model.head != "masked_lm":
        return lines + output_lines(model)
    lines += [*dense("lm_head.dense", "head/dense"), *norm("lm_head.layer_norm", "head/norm")]
    return lines + masked_lm_lines("lm_head", "roberta", model.vocab_size)


ROBERTA = Family(
    name="roberta",
    model_types=("roberta",),
    architectures=architectures("Roberta"),
    modules=(Roberta,),
    to_model=to_model,
    to_config=_to_config,
    entries=_entries,
    inputs=text_inputs,
    names=Names("roberta."),
    bare="RobertaModel",
    our_outputs=our_outputs,
    their_outputs=their_outputs,
    zero_gradients=(r".*/attention/key/bias",),
)
