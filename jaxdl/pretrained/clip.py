"""CLIP checkpoints of Hugging Face: both towers (`CLIPModel`), or one of them, with or without its projection."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdl.models.block import Block
from jaxdl.models.clip import CLIP, CLIPText, CLIPVision, clip_block
from jaxdl.models.layers import Dtype
from jaxdl.pretrained.entries import Ignored, Line, dense, embedding, entry, expand, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.transforms import patches
from jaxdl.pretrained.vit import block_config, our_activation, rate, side, vision_config

LEGACY_END_TOKEN = 2  # in old configs, wrong there: these checkpoints read the highest id of a row
_SHARED = {"num_hidden_layers": 12}
_TEXT = {**_SHARED, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
_VISION = {**_SHARED, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32}


def _block(config: Config, dtype: Dtype, param_dtype: Dtype, attention_dropout_rate: float | None) -> Block:
    return clip_block(
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_hidden_layers"],
        hidden=config["intermediate_size"],
        activation=our_activation(config.get("hidden_act", "quick_gelu")),
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        attention_dropout_rate=rate(config, "attention_dropout", 0.0, attention_dropout_rate),
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _to_text(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> CLIPText:
    end_token = config.get("eos_token_id", 49407)
    is_projected = config.get("architectures") == ["CLIPTextModelWithProjection"]
    own = {
        "block": _block(config, dtype, param_dtype, attention_dropout_rate),
        "n_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "n_positions": config.get("max_position_embeddings", 77),
        "end_token": None if end_token == LEGACY_END_TOKEN else end_token,
        "head": "project" if is_projected else "pool",
        "n_outputs": config.get("projection_dim", 512) if is_projected else None,
    }
    return CLIPText(**{**own, **fields})


def _to_vision(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> CLIPVision:
    is_projected = config.get("architectures") == ["CLIPVisionModelWithProjection"]
    own = {
        "block": _block(config, dtype, param_dtype, attention_dropout_rate),
        "n_layers": config["num_hidden_layers"],
        "image_size": side(config, "image_size"),
        "patch_size": side(config, "patch_size"),
        "n_channels": config.get("num_channels", 3),
        "head": "project" if is_projected else "pool",
        "n_outputs": config.get("projection_dim", 512) if is_projected else None,
    }
    return CLIPVision(**{**own, **fields})


def _to_clip(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    attention_dropout_rate: float | None = None,
    **fields: Any,
) -> CLIP:
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    towers = {**dtypes, "attention_dropout_rate": attention_dropout_rate}
    own = {
        "text": _to_text({**_TEXT, **(config.get("text_config") or {}), "architectures": None}, **towers),
        "vision": _to_vision({**_VISION, **(config.get("vision_config") or {}), "architectures": None}, **towers),
        "width": config.get("projection_dim", 512),
        "scale_init": float(np.exp(config.get("logit_scale_init_value", 2.6592))),
    }
    return CLIP(**{**own, **dtypes, **fields})


def _tower_config(block: Block) -> dict[str, Any]:
    return {
        **block_config(block),
        "layer_norm_eps": block.norm_epsilon,
        "attention_dropout": block.attention_dropout_rate,
    }


def _from_text(model: CLIPText) -> dict[str, Any]:
    if model.end_token == LEGACY_END_TOKEN:
        raise PretrainedError("end_token=2 means the highest id of a row in transformers; use another end token.")
    is_projected = model.head == "project"
    config = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection" if is_projected else "CLIPTextModel"],
        **_tower_config(model.block),
        "num_hidden_layers": model.n_layers,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.n_positions,
        "eos_token_id": LEGACY_END_TOKEN if model.end_token is None else model.end_token,
        "bos_token_id": 0,
        "pad_token_id": 0,
        **({"projection_dim": model.n_outputs} if is_projected else {}),
    }
    check_kept(model, _to_text(config))
    return config


def _from_vision(model: CLIPVision) -> dict[str, Any]:
    is_projected = model.head == "project"
    config = {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection" if is_projected else "CLIPVisionModel"],
        **_tower_config(model.block),
        **vision_config(model),
        **({"projection_dim": model.n_outputs} if is_projected else {}),
    }
    check_kept(model, _to_vision(config))
    return config


def _from_clip(model: CLIP) -> dict[str, Any]:
    text: Any = model.text
    vision: Any = model.vision
    if not (isinstance(text, CLIPText) and isinstance(vision, CLIPVision)):
        towers = f"{type(text).__name__} and {type(vision).__name__}"
        raise PretrainedError(f"CLIP of {towers} has no form in transformers; use CLIPText and CLIPVision.")
    parts = {"text_config": _from_text(text), "vision_config": _from_vision(vision)}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        **{name: {k: v for k, v in part.items() if k != "architectures"} for name, part in parts.items()},
        "projection_dim": model.width,
        "logit_scale_init_value": float(np.log(model.scale_init)),
    }
    check_kept(model, _to_clip(config))
    return config


def _layers(tensor: str, path: str, n_layers: int) -> list[Line]:
    theirs, ours = f"{tensor}encoder.layers.{{i}}", f"{path}encoder/layer_{{i}}"
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    lines = [
        *norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm"),
        *(line for a, b in parts.items() for line in dense(f"{theirs}.self_attn.{a}", f"{ours}/attention/{b}")),
        *norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
    ]
    return expand(lines, i=range(n_layers))


def _text_entries(model: CLIPText, path: str = "") -> list[Line]:
    tensor = "text_model."
    return [
        *embedding(f"{tensor}embeddings.token_embedding", f"{path}embed/token", n_rows=model.vocab_size),
        *embedding(f"{tensor}embeddings.position_embedding", f"{path}embed/position"),
        *_layers(tensor, path, model.n_layers),
        *norm(f"{tensor}final_layer_norm", f"{path}encoder/final_norm"),
        *(dense("text_projection", "head", bias=False) if model.head == "project" else []),
        Ignored("*position_ids"),
    ]


def _vision_entries(model: CLIPVision, path: str = "") -> list[Line]:
    tensor, size = "vision_model.", model.patch_size
    return [
        entry(f"{tensor}embeddings.class_embedding", f"{path}embed/class_token"),
        entry(f"{tensor}embeddings.patch_embedding.weight", f"{path}embed/patch/kernel", patches(size, size)),
        *embedding(f"{tensor}embeddings.position_embedding", f"{path}embed/position"),
        *norm(f"{tensor}pre_layrnorm", f"{path}embed/norm"),
        *_layers(tensor, path, model.n_layers),
        *norm(f"{tensor}post_layernorm", f"{path}encoder/final_norm"),
        *(dense("visual_projection", "head", bias=False) if model.head == "project" else []),
        Ignored("*position_ids"),
    ]


def _clip_entries(model: Any) -> list[Line]:
    return [
        *_text_entries(model.text, "text/"),
        *_vision_entries(model.vision, "vision/"),
        *dense("text_projection", "text_projection", bias=False),
        *dense("visual_projection", "vision_projection", bias=False),
        entry("logit_scale", "logit_scale"),
    ]


def _text_inputs(rng: np.random.Generator, model: CLIPText) -> tuple[dict[str, Any], dict[str, Any]]:
    end = model.vocab_size - 1 if model.end_token is None else model.end_token
    n = min(model.n_positions, 7)
    tokens = rng.integers(0, model.vocab_size, (3, n))
    tokens[tokens == end] = 0
    mask = np.ones((3, n), np.int32)
    for row, length in enumerate((n, n - 2, n - 3)):
        tokens[row, length - 1], tokens[row, length:], mask[row, length:] = end, 0, 0
    return {"tokens": tokens, "mask": mask}, {"input_ids": tokens, "attention_mask": mask}


def _vision_inputs(rng: np.random.Generator, model: CLIPVision) -> tuple[dict[str, Any], dict[str, Any]]:
    image = rng.normal(size=(3, model.image_size, model.image_size, model.n_channels)).astype(np.float32)
    return {"image": image}, {"pixel_values": image.transpose(0, 3, 1, 2)}


def _clip_inputs(rng: np.random.Generator, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = _text_inputs(rng, model.text), _vision_inputs(rng, model.vision)
    return parts[0][0] | parts[1][0], parts[0][1] | parts[1][1]


def _their_contrast(out: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"text_embeds": out.text_embeds, "image_embeds": out.image_embeds, "logits": out.logits_per_image}


def _their_embeds(out: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    found = (getattr(out, name, None) for name in ("text_embeds", "image_embeds", "pooler_output"))
    return {"logits": next(x for x in found if x is not None)}


_ZERO = (r".*/attention/key/bias",)

CLIP_FAMILY = Family(
    name="clip",
    model_types=("clip",),
    architectures={"CLIPModel": "contrast"},
    modules=(CLIP,),
    to_model=_to_clip,
    to_config=_from_clip,
    entries=_clip_entries,
    inputs=_clip_inputs,
    their_outputs=_their_contrast,
    zero_gradients=_ZERO,
)
CLIP_TEXT = Family(
    name="clip text",
    model_types=("clip_text_model",),
    architectures={"CLIPTextModel": "pool", "CLIPTextModelWithProjection": "project"},
    modules=(CLIPText,),
    to_model=_to_text,
    to_config=_from_text,
    entries=_text_entries,
    inputs=_text_inputs,
    names=Names(prefix="text_model."),
    bare="CLIPTextModel",
    their_outputs=_their_embeds,
    zero_gradients=_ZERO,
)
CLIP_VISION = Family(
    name="clip vision",
    model_types=("clip_vision_model",),
    architectures={"CLIPVisionModel": "pool", "CLIPVisionModelWithProjection": "project"},
    modules=(CLIPVision,),
    to_model=_to_vision,
    to_config=_from_vision,
    entries=_vision_entries,
    inputs=_vision_inputs,
    names=Names(prefix="vision_model."),
    bare="CLIPVisionModel",
    their_outputs=_their_embeds,
    zero_gradients=_ZERO,
)
