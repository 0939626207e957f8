"""config.json of Llama and its kin, read: Llama, Mistral, Qwen2, Qwen3, Gemma 1, 2 and 3 (text)."""

import math
from typing import Any

import jax.numpy as jnp

from jaxdl.models.block import Block
from jaxdl.models.layers import Dtype
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.positions import Rotary
from jaxdl.pretrained.decoder import label_fields
from jaxdl.pretrained.family import Config
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.vit import our_activation

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
