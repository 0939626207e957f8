"""GPT-2 checkpoints of Hugging Face: the bare model, language model, sequence and token classification."""

from typing import Any

import jax.numpy as jnp

from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.layers import Dtype
from jaxdl.pretrained.decoder import (
    label_config,
    label_fields,
    named_head,
    our_real_outputs,
    special_tokens,
    text_inputs,
    their_real_outputs,
)
from jaxdl.pretrained.entries import Ignored, Line, Tied, dense, embedding, entry, expand, fused, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.vit import our_activation, rate, their_activation

_HEADS = {
    "GPT2Model": None,
    "GPT2LMHeadModel": "causal_lm",
    "GPT2ForSequenceClassification": "classify",
    "GPT2ForTokenClassification": "tag",
}


def _to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> GPT2:
    if problems := _problems(config):
        raise PretrainedError.listing("config.json of a gpt2 model", problems)
    width, head = config["n_embd"], _HEADS[config["architectures"][0]]
    block = gpt2_block(
        width=width,
        n_heads=config["n_head"],
        n_layers=config["n_layer"],
        hidden=config.get("n_inner") or 4 * width,
        activation=our_activation(config.get("activation_function", "gelu_new")),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
        dropout_rate=rate(config, "resid_pdrop", 0.1, dropout_rate),
        attention_dropout_rate=rate(config, "attn_pdrop", 0.1, attention_dropout_rate),
        init_std=config.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    own = {
        "n_layers": config["n_layer"],
        "vocab_size": config["vocab_size"],
        "n_positions": config.get("n_positions", 1024),
        "head": head,
        "padding_token": config.get("pad_token_id"),
        **label_fields(config, head, fields),
    }
    return GPT2(**{"block": block, **own, **fields})


def _problems(config: Config) -> list[str]:
    only = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}
    problems = [
        f"{name}={config[name]!r} is not supported, only {value}; use a model trained with that."
        for name, value in only.items()
        if config.get(name, value) not in (None, value)
    ]
    rates = {name: config.get(name, 0.1) for name in ("embd_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        problems.append(f"{rates} are one rate of dropout here; set both to the same in config.json.")
    return problems


def _to_config(model: GPT2) -> dict[str, Any]:
    block, scale = model.block, model.block.attention_scale
    config = {
        "model_type": "gpt2",
        "architectures": [next(name for name, head in _HEADS.items() if head == named_head(model))],
        "n_embd": block.width,
        "n_head": block.n_heads,
        "n_layer": model.n_layers,
        "n_inner": block.hidden,
        "n_positions": model.n_positions,
        "n_ctx": model.n_positions,
        "vocab_size": model.vocab_size,
        "activation_function": their_activation(block.activation),
        "layer_norm_epsilon": block.norm_epsilon,
        "scale_attn_weights": scale is None,
        "embd_pdrop": block.dropout_rate,
        "resid_pdrop": block.dropout_rate,
        "attn_pdrop": block.attention_dropout_rate,
        "initializer_range": block.init_std,
        "tie_word_embeddings": True,
        **special_tokens(model),
        **label_config(model),
    }
    check_kept(model, _to_model(config))
    return config


def _entries(model: GPT2) -> list[Line]:
    paths = [f"decoder/layer_{{i}}/attention/{name}" for name in ("query", "key", "value")]
    parts = {"attn.c_proj": "attention/output", "mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down"}
    layer = [
        *norm("transformer.h.{i}.ln_1", "decoder/layer_{i}/attention_norm"),
        fused("transformer.h.{i}.attn.c_attn.weight", [f"{path}/kernel" for path in paths], axis=1),
        fused("transformer.h.{i}.attn.c_attn.bias", [f"{path}/bias" for path in paths], axis=0),
        *norm("transformer.h.{i}.ln_2", "decoder/layer_{i}/mlp_norm"),
        *(entry(f"transformer.h.{{i}}.{a}.weight", f"decoder/layer_{{i}}/{b}/kernel") for a, b in parts.items()),
        *(entry(f"transformer.h.{{i}}.{a}.bias", f"decoder/layer_{{i}}/{b}/bias") for a, b in parts.items()),
    ]
    heads: dict[str | None, list[Any]] = {
        None: [],
        "causal_lm": [Tied("lm_head.weight", "transformer.wte.weight")],
        "classify": dense("score", "head", bias=False),
        "tag": dense("classifier", "head"),
    }
    return [
        *embedding("transformer.wte", "embed/token", n_rows=model.vocab_size),
        *embedding("transformer.wpe", "embed/position"),
        *expand(layer, i=range(model.n_layers)),
        *norm("transformer.ln_f", "decoder/final_norm"),
        *heads[named_head(model)],
        Ignored("*h.*.attn.bias"),
        Ignored("*h.*.attn.masked_bias"),
    ]


GPT2_FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures={name: head or "hidden" for name, head in _HEADS.items()},
    modules=(GPT2,),
    to_model=_to_model,
    to_config=_to_config,
    entries=_entries,
    inputs=text_inputs,
    names=Names(prefix="transformer."),
    bare="GPT2Model",
    our_outputs=our_real_outputs,
    their_outputs=their_real_outputs,
    zero_gradients=(".*/attention/key/bias",),
)
