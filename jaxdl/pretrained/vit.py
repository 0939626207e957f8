"""ViT checkpoints of Hugging Face: `ViTModel`, `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdl.models.block import Block
from jaxdl.models.layers import Dtype
from jaxdl.models.vit import ViT, vit_block
from jaxdl.pretrained.bert_config import label_names
from jaxdl.pretrained.entries import Entry, Line, dense, entry, expand, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.transforms import patches, reshape

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""Hugging Face's names of activations, and ours."""


def our_activation(name: str) -> str:
    """Our name of a Hugging Face activation.

    Raises:
      PretrainedError: there is none.

    Example:
      >>> our_activation("gelu_new")
      'gelu_tanh'
    """
    if name not in ACTIVATIONS:
        raise PretrainedError(f"config.json: activation {name!r} is unknown; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Hugging Face's name of an activation of ours.

    Raises:
      PretrainedError: there is none.

    Example:
      >>> their_activation("gelu_tanh")
      'gelu_new'
    """
    theirs = [their for their, our in ACTIVATIONS.items() if our == name]
    if not theirs:
        known = ", ".join(sorted(set(ACTIVATIONS.values())))
        raise PretrainedError(f"activation={name!r} has no name in transformers; known: {known}.")
    return theirs[0]


def side(config: Config, name: str) -> int:
    """A size in pixels of a config, which may be one number or two equal ones.

    Raises:
      PretrainedError: two that differ.

    Example:
      >>> side({"patch_size": [16, 16]}, "patch_size")
      16
    """
    value = config[name]
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) > 1:
        raise PretrainedError(f"config.json: {name}={value} is no square; only squares can be loaded.")
    return int(sides.pop())


def _to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> ViT:
    width, is_classifier = config["hidden_size"], config["architectures"] == ["ViTForImageClassification"]
    odd = {"pooler_output_size": width, "pooler_act": "tanh"}
    for name in (name for name, only in odd.items() if config.get(name, only) not in (None, only)):
        raise PretrainedError(f"config.json: {name}={config[name]!r} is not supported, only {odd[name]!r}.")
    block = vit_block(
        width,
        config["num_attention_heads"],
        config["intermediate_size"],
        activation=our_activation(config.get("hidden_act", "gelu")),
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        query_bias=config.get("qkv_bias", True),
        dropout_rate=rate(config, "hidden_dropout_prob", 0.0, dropout_rate),
        attention_dropout_rate=rate(config, "attention_probs_dropout_prob", 0.0, attention_dropout_rate),
        init_std=config.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    own = {
        "n_layers": config["num_hidden_layers"],
        "image_size": side(config, "image_size"),
        "patch_size": side(config, "patch_size"),
        "n_channels": config.get("num_channels", 3),
        "head": "classify" if is_classifier else None,
        "has_pooler": not is_classifier,
    }
    if is_classifier:
        labels = label_names(config)
        n_outputs = fields.get("n_outputs", len(labels))
        own |= {"n_outputs": n_outputs, "labels": labels if n_outputs == len(labels) else ()}
    return ViT(**{"block": block, **own, **fields})


def rate(config: Config, name: str, default: float, override: float | None) -> float:
    """A rate of dropout: the override, else the config's, else the default."""
    return float(config.get(name, default)) if override is None else override


def _to_config(model: ViT) -> dict[str, Any]:
    block, labels = model.block, model.labels or tuple(f"LABEL_{i}" for i in range(model.n_outputs or 0))
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if model.head else "ViTModel"],
        **vision_config(model),
        "layer_norm_eps": block.norm_epsilon,
        "qkv_bias": block.query_bias,
        "hidden_dropout_prob": block.dropout_rate,
        "attention_probs_dropout_prob": block.attention_dropout_rate,
        "initializer_range": block.init_std,
    }
    if model.head:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    check_kept(model, _to_model(config, labels=model.labels))
    return config


def vision_config(model: ViT) -> dict[str, Any]:
    """The fields that the configs of ViT and of CLIP's image tower share."""
    return {
        **block_config(model.block),
        "num_hidden_layers": model.n_layers,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.n_channels,
    }


def block_config(block: Block) -> dict[str, Any]:
    """The fields of a config that a block gives."""
    return {
        "hidden_size": block.width,
        "num_attention_heads": block.n_heads,
        "intermediate_size": block.hidden,
        "hidden_act": their_activation(block.activation),
    }


def _entries(model: ViT) -> list[Line]:
    size, n = model.patch_size, (model.image_size // model.patch_size) ** 2 + 1
    bias = model.block.query_bias
    layer = [
        *norm("vit.encoder.layer.{i}.layernorm_before", "encoder/layer_{i}/attention_norm"),
        *_attention(bias),
        *norm("vit.encoder.layer.{i}.layernorm_after", "encoder/layer_{i}/mlp_norm"),
        *dense("vit.encoder.layer.{i}.intermediate.dense", "encoder/layer_{i}/mlp/up"),
        *dense("vit.encoder.layer.{i}.output.dense", "encoder/layer_{i}/mlp/down"),
    ]
    return [
        entry("vit.embeddings.cls_token", "embed/class_token", reshape(1, 1, -1)),
        entry("vit.embeddings.position_embeddings", "embed/position/embedding", reshape(1, n, model.block.width)),
        entry("vit.embeddings.patch_embeddings.projection.weight", "embed/patch/kernel", patches(size, size)),
        entry("vit.embeddings.patch_embeddings.projection.bias", "embed/patch/bias"),
        *expand(layer, i=range(model.n_layers)),
        *norm("vit.layernorm", "encoder/final_norm"),
        *([] if model.head else dense("vit.pooler.dense", "pooler", optional=True)),
        *(dense("classifier", "head") if model.head else []),
    ]


def _attention(bias: bool) -> list[Entry]:
    theirs = "vit.encoder.layer.{i}.attention"
    parts = {name: f"encoder/layer_{{i}}/attention/{name}" for name in ("query", "key", "value")}
    qkv = [line for name, path in parts.items() for line in dense(f"{theirs}.attention.{name}", path, bias=bias)]
    return [*qkv, *dense(f"{theirs}.output.dense", "encoder/layer_{i}/attention/output")]


def _inputs(rng: np.random.Generator, model: ViT) -> tuple[dict[str, Any], dict[str, Any]]:
    image = rng.normal(size=(3, model.image_size, model.image_size, model.n_channels)).astype(np.float32)
    return {"image": image}, {"pixel_values": image.transpose(0, 3, 1, 2)}


def _their_outputs(out: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    if "pooler_output" in out:
        return {"hidden": out["last_hidden_state"], "pooled": out["pooler_output"]}
    return {"logits": out["logits"]}


_NEW_NAMES = (  # of transformers 5 in memory; it still writes the old ones
    ("layers.", "encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)

VIT = Family(
    name="vit",
    model_types=("vit",),
    architectures={"ViTModel": "hidden", "ViTForImageClassification": "classify"},
    modules=(ViT,),
    to_model=_to_model,
    to_config=_to_config,
    entries=_entries,
    inputs=_inputs,
    names=Names(prefix="vit.", renames=_NEW_NAMES, memory=_NEW_NAMES),
    bare="ViTModel",
    their_outputs=_their_outputs,
    zero_gradients=(r".*/attention/key/bias",),
)
