"""config.json of Llama and its kin, both ways: Llama, Mistral, Qwen2, Qwen3, Gemma 1, 2 and 3 (text)."""

import math
from typing import Any

import jax.numpy as jnp

from jaxdl.models.block import Block
from jaxdl.models.layers import Dtype
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.positions import Rotary
from jaxdl.pretrained.decoder import label_config, label_fields, named_head, special_tokens
from jaxdl.pretrained.family import Config
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.vit import our_activation, their_activation

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}
HEAD_SIZES = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}  # where a config names none
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def architectures(model_type: str) -> dict[str, str | None]:
    """`{transformers class: head}` of a model type.

    Example:
      >>> architectures("mistral")["MistralForCausalLM"]
      'causal_lm'
    """
    name = CLASSES[model_type]
    text = "Gemma3Text" if name == "Gemma3" else name
    heads = {f"{text}Model": None, f"{name}ForCausalLM": "causal_lm", f"{text}ForSequenceClassification": "classify"}
    return heads if name == "Gemma3" else {**heads, f"{name}ForTokenClassification": "tag"}


def to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> Llama:
    """The module of a config.

    Args:
      config: config.json, with one of its model type's architectures.
      dtype, param_dtype: of the computation and of the parameters.
      dropout_rate: of each branch's output, which no config says.
      attention_dropout_rate: instead of the config's.
      fields: of the module, instead of the config's.

    Raises:
      PretrainedError: settings that are not supported, all at once.
    """
    if problems := _problems(config):
        raise PretrainedError.listing(f"config.json of a {config['model_type']} model", problems)
    head = architectures(config["model_type"])[config["architectures"][0]]
    is_gemma = _is_gemma(config)
    rate = config.get("attention_dropout") or 0.0 if attention_dropout_rate is None else attention_dropout_rate
    rates = {"dropout_rate": dropout_rate, "attention_dropout_rate": rate}
    block = _block(config).replace(dtype=dtype, param_dtype=param_dtype, **rates)
    kinds = _layer_types(config)
    local = {i for i, kind in enumerate(kinds) if kind == LOCAL}
    window, rotary = config.get("sliding_window"), _rotary(config, LOCAL)
    own = {
        "block": block.replace(window=window, rotary=rotary) if len(local) == len(kinds) else block,
        "n_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "n_positions": config.get("max_position_embeddings"),
        "head": head,
        "padding_token": config.get("pad_token_id"),
        **label_fields(config, head, fields),
        "is_tied": bool(config.get("tie_word_embeddings", is_gemma)),
        "logit_softcap": config.get("final_logit_softcapping") if head == "causal_lm" else None,
        "embed_scale": math.sqrt(config["hidden_size"]) if is_gemma else 1.0,
    }
    if local and len(local) < len(kinds):
        own |= {"local": block.replace(window=window, rotary=rotary), "local_layers": tuple(sorted(local))}
    return Llama(**{**own, **fields})


def _is_gemma(config: Config) -> bool:
    return str(config["model_type"]).startswith("gemma")


def _problems(config: Config) -> list[str]:
    problems = []
    for name in ("use_bidirectional_attention", "quantization_config"):
        if config.get(name):
            problems.append(f"{name}={config[name]!r} is not supported; use a causal model in full precision.")
    kinds = set(_layer_types(config))
    if odd := sorted(kinds - {LOCAL, GLOBAL}):
        problems.append(f"layer_types has {odd}; only {LOCAL!r} and {GLOBAL!r} are supported.")
    if LOCAL in kinds and not config.get("sliding_window"):
        problems.append(f"layer_types has {LOCAL!r}, and sliding_window={config.get('sliding_window')}; give its size.")
    for kind in sorted(kinds & {LOCAL, GLOBAL}):
        problems += [problem for problem in _rotary_problems(_rotary_settings(config, kind)) if problem not in problems]
    return problems


def _block(config: Config) -> Block:
    """The block of the layers that see everything."""
    kind, width, n_heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    has_bias = bool(config.get("attention_bias", False))
    block = llama_block(
        width=width,
        n_heads=n_heads,
        hidden=config["intermediate_size"],
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_size=config.get("head_dim") or HEAD_SIZES.get(kind, width // n_heads),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config),
        query_bias=has_bias or kind == "qwen2",
        output_bias=has_bias and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        has_query_key_norm=kind in ("qwen3", "gemma3_text"),
        rotary=_rotary(config, GLOBAL),
        init_std=config.get("initializer_range", 0.02),
    )
    if _is_gemma(config):
        block = block.replace(norm="rms_plus_one")
    if kind in ("gemma2", "gemma3_text"):
        default = 50.0 if kind == "gemma2" else None
        block = block.replace(
            norm_position="both",
            attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            attention_softcap=config.get("attn_logit_softcapping", default),
        )
    return block


def _activation(config: Config) -> str:
    """Gemma's first files say `gelu` and mean its approximation; later ones say `hidden_activation`."""
    if not _is_gemma(config):
        return our_activation(config.get("hidden_act", "silu"))
    name = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    return "gelu_tanh" if name == "gelu" else our_activation(name)


def _layer_types(config: Config) -> list[str]:
    """What each layer sees, from `layer_types` or from what older files have instead."""
    kind, n = config["model_type"], config["num_hidden_layers"]
    if kind in ("llama", "gemma"):
        return [GLOBAL] * n
    if kind == "mistral":
        return [LOCAL if config.get("sliding_window") else GLOBAL] * n
    if config.get("layer_types"):
        return list(config["layer_types"])
    if kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else n
        return [LOCAL if i >= first and config.get("sliding_window") else GLOBAL for i in range(n)]
    every = 2 if kind == "gemma2" else config.get("sliding_window_pattern", 6)
    return [LOCAL if (i + 1) % every else GLOBAL for i in range(n)]


def _rotary_settings(config: Config, kind: str) -> dict[str, Any]:
    """The rotary settings of one kind of layer, in the words of transformers 5 (`rope_parameters`)."""
    is_gemma3 = config["model_type"] == "gemma3_text"
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind in given or (is_gemma3 and GLOBAL in given):
        given = given.get(kind) or {}
    elif is_gemma3 and kind == LOCAL:
        given = {}
    is_local = is_gemma3 and kind == LOCAL
    default = (
        config.get("rope_local_base_freq", 1e4) if is_local else config.get("rope_theta", 1e6 if is_gemma3 else 1e4)
    )
    length = config.get("max_position_embeddings")
    rest = {"original_max_position_embeddings": length, "rope_type": given.get("type", "default")}
    factor = {"partial_rotary_factor": config.get("partial_rotary_factor")}
    return {"rope_theta": default, **rest, **factor, **given}


def _rotary_problems(settings: dict[str, Any]) -> list[str]:
    problems = []
    if settings["rope_type"] not in ("default", "linear", "llama3"):
        problems.append(
            f"rope_type={settings['rope_type']!r} is not supported, only 'default', 'linear' and 'llama3'; use a model "
            "whose context was not stretched this way."
        )
    elif settings["rope_type"] != "default" and "factor" not in settings:
        problems.append(f"rope_type={settings['rope_type']!r} needs a factor; add it.")
    if settings["partial_rotary_factor"] not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor={settings['partial_rotary_factor']} is not supported, only 1.")
    return problems


def _rotary(config: Config, kind: str) -> Rotary:
    settings = _rotary_settings(config, kind)
    theta, rope_type = float(settings["rope_theta"]), settings["rope_type"]
    if rope_type == "default":
        return Rotary(theta)
    if rope_type == "linear":
        return Rotary(theta, float(settings["factor"]))
    return Rotary(
        theta,
        float(settings["factor"]),
        "llama3",
        settings["low_freq_factor"],
        settings["high_freq_factor"],
        settings["original_max_position_embeddings"],
    )


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
