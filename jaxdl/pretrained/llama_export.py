"""config.json of Llama and its kin, written; `llama_config` reads it."""

from typing import Any

from jaxdl.models.block import Block
from jaxdl.models.llama import Llama
from jaxdl.models.positions import Rotary
from jaxdl.pretrained.decoder import label_config, named_head, special_tokens
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.llama_config import GLOBAL, LOCAL, architectures, to_model
from jaxdl.pretrained.vit import their_activation


def to_config(model: Llama) -> dict[str, Any]:
    """config.json of a module, in words that transformers 4 and 5 both read.

    Raises:
      PretrainedError: no model type says all that the module's fields say; the message names the fields.
    """
    kind = _model_type(model)
    classes = {head: name for name, head in architectures(kind).items()}
    if named_head(model) not in classes:
        raise PretrainedError(f"head={model.head!r} has no class for {kind} in transformers; known: {list(classes)}.")
    config = {
        "model_type": kind,
        "architectures": [classes[model.head]],
        **_block_config(model.block, kind),
        "num_hidden_layers": model.n_layers,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.is_tied,
        **({} if model.n_positions is None else {"max_position_embeddings": model.n_positions}),
        **_window_config(model, kind),
        **_rotary_config(model, kind),
        **({"final_logit_softcapping": model.logit_softcap} if kind in ("gemma2", "gemma3_text") else {}),
        **special_tokens(model),
        **label_config(model),
    }
    check_kept(_said(model), to_model(config))
    return config


def _model_type(model: Llama) -> str:
    block = model.block
    if block.norm == "rms_plus_one":
        return ("gemma3_text" if block.has_query_key_norm else "gemma2") if block.norm_position == "both" else "gemma"
    if block.has_query_key_norm:
        return "qwen3"
    if (block.query_bias and not block.output_bias) or model.local_layers:
        return "qwen2"
    return "mistral" if block.window else "llama"


def _block_config(block: Block, kind: str) -> dict[str, Any]:
    n_heads, n_groups, head_size = block.heads
    name = "hidden_act" if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma") else "hidden_activation"
    act = "gelu_pytorch_tanh" if block.activation == "gelu_tanh" else their_activation(block.activation)
    config = {
        "hidden_size": block.width,
        "intermediate_size": block.hidden,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_groups,
        "head_dim": head_size,
        "rms_norm_eps": block.norm_epsilon,
        name: act,
        "attention_dropout": block.attention_dropout_rate,
        "initializer_range": block.init_std,
    }
    if kind not in ("mistral", "qwen2"):
        config["attention_bias"] = block.query_bias
    if kind == "llama":
        config["mlp_bias"] = block.mlp_bias
    if kind in ("gemma2", "gemma3_text"):
        scale = head_size**-0.5 if block.attention_scale is None else block.attention_scale
        config |= {"query_pre_attn_scalar": round(scale**-2), "attn_logit_softcapping": block.attention_softcap}
    return config


def _window_config(model: Llama, kind: str) -> dict[str, Any]:
    if kind in ("llama", "gemma"):
        return {}
    window = model.block.window if model.local is None else model.local.window
    if kind == "mistral":
        return {"sliding_window": window}
    kinds = [LOCAL if block.window else GLOBAL for block in model.layer_blocks()]
    switch = {"use_sliding_window": window is not None} if kind in ("qwen2", "qwen3") else {}
    return {"sliding_window": window, "layer_types": kinds, **switch}


def _rotary_config(model: Llama, kind: str) -> dict[str, Any]:
    rotary = model.block.rotary or Rotary()
    if kind == "gemma3_text":
        local = model.local or model.block
        local_rotary = local.rotary if local.window else None
        theta = {"rope_local_base_freq": (local_rotary or Rotary()).theta}
    else:
        theta = {}
    scaling: dict[str, Any] | None = None
    if rotary.kind == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rotary.factor,
            "low_freq_factor": rotary.low_frequency,
            "high_freq_factor": rotary.high_frequency,
            "original_max_position_embeddings": rotary.original_length,
        }
    elif rotary.factor != 1.0:
        scaling = {"rope_type": "linear", "factor": rotary.factor}
    return {"rope_theta": rotary.theta, **theta, **({} if scaling is None else {"rope_scaling": scaling})}


def _said(model: Llama) -> Llama:
    """The model without what a config need not say: dropout for training, and the usual scale of the scores."""
    blocks = {name: block for name in ("block", "local") if (block := getattr(model, name)) is not None}
    said: dict[str, Any] = {name: _said_of(block) for name, block in blocks.items()}
    return model.clone(**said, parent=None)


def _said_of(block: Block) -> Block:
    scale = block.attention_scale
    if scale is None and block.norm_position == "both":
        scale = float(block.heads[2]) ** -0.5
    return block.replace(dropout_rate=0.0, hidden_dropout_rate=0.0, attention_scale=scale)
