"""T5 checkpoints of Hugging Face, versions 1.0 and 1.1: `T5Model`, `T5ForConditionalGeneration`, `T5EncoderModel`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdl.models.layers import Dtype
from jaxdl.models.t5 import T5, t5_block
from jaxdl.pretrained.entries import Entry, Ignored, Line, Tied, dense, embedding, entry, expand, norm
from jaxdl.pretrained.family import Config, Family
from jaxdl.pretrained.kept import check_kept
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.transforms import pad_columns, transpose
from jaxdl.pretrained.vit import our_activation, rate, their_activation

_HEADS = {
    "T5Model": None,
    "T5ForConditionalGeneration": "sequence_to_sequence",
    "T5EncoderModel": "encode",
}


def _to_model(
    config: Config,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    dropout_rate: float | None = None,
    **fields: Any,
) -> T5:
    act, is_gated = _activation(config.get("feed_forward_proj", "relu"))
    is_tied, is_scaled = _output(config)
    dropout = rate(config, "dropout_rate", 0.1, dropout_rate)
    block = t5_block(
        config["d_model"],
        config["num_heads"],
        config["d_ff"],
        is_gated=is_gated,
        activation=act,
        head_size=config["d_kv"],
        norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        dropout_rate=dropout,
        attention_dropout_rate=dropout,
        hidden_dropout_rate=dropout,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    own = {
        "n_layers": config["num_layers"],
        "n_decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
        "vocab_size": config["vocab_size"],
        "head": _HEADS[config["architectures"][0]],
        "is_tied": is_tied,
        "is_output_scaled": is_scaled,
        "n_buckets": config.get("relative_attention_num_buckets", 32),
        "max_distance": config.get("relative_attention_max_distance", 128),
    }
    return T5(**{"block": block, **own, **fields})


def _activation(name: str) -> tuple[str, bool]:
    """`relu`, `gated-gelu`, ...; the gated GELU of version 1.1 is the approximate one, whatever it says."""
    *gate, act = name.split("-")
    if gate not in ([], ["gated"]):
        raise PretrainedError(f"config.json: feed_forward_proj={name!r} is unknown; use such as 'relu', 'gated-gelu'.")
    return "gelu_tanh" if name == "gated-gelu" else our_activation(act), bool(gate)


def _output(config: Config) -> tuple[bool, bool]:
    """Whether the head is tied, and whether its input is scaled.

    Files of before transformers 5 say both by `tie_word_embeddings`. Later ones always say that it is tied, and keep
    the second in `scale_decoder_outputs`; version 1.1, whose input is not scaled, has a head of its own.
    """
    is_tied = config.get("tie_word_embeddings", True) is not False
    is_scaled = bool(config.get("scale_decoder_outputs", is_tied))
    return is_tied and is_scaled, is_scaled


def _to_config(model: T5) -> dict[str, Any]:
    block = model.block
    act = their_activation(block.activation)
    gated = "gated-gelu" if block.activation == "gelu_tanh" else f"gated-{act}"
    config = {
        "model_type": "t5",
        "architectures": [next(name for name, head in _HEADS.items() if head == model.head)],
        "is_encoder_decoder": model.head != "encode",
        "d_model": block.width,
        "num_heads": block.n_heads,
        "d_kv": block.heads[2],
        "d_ff": block.hidden,
        "num_layers": model.n_layers,
        "num_decoder_layers": model.n_decoder_layers or model.n_layers,
        "vocab_size": model.vocab_size,
        "feed_forward_proj": gated if block.is_gated else act,
        "layer_norm_epsilon": block.norm_epsilon,
        "dropout_rate": block.dropout_rate,
        "relative_attention_num_buckets": model.n_buckets,
        "relative_attention_max_distance": model.max_distance,
        "tie_word_embeddings": model.is_tied,
        "scale_decoder_outputs": model.is_output_scaled,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    check_kept(model.clone(n_decoder_layers=model.n_decoder_layers or model.n_layers), _to_model(config))
    return config


def _entries(model: T5) -> list[Line]:
    has_decoder, has_head = model.head != "encode", model.head == "sequence_to_sequence"
    own_head = entry("lm_head.weight", "head/kernel", transpose.then(pad_columns(model.vocab_size)))
    tied_head = Tied("lm_head.weight", "shared.weight")
    decoder = _stack("decoder", model.n_decoder_layers or model.n_layers, model.block.is_gated)
    return [
        *embedding("shared", "embed/token", n_rows=model.vocab_size),
        Tied("encoder.embed_tokens.weight", "shared.weight"),
        *_stack("encoder", model.n_layers, model.block.is_gated),
        *([Tied("decoder.embed_tokens.weight", "shared.weight"), *decoder] if has_decoder else [Ignored("decoder.*")]),
        Ignored("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),  # of old files, never read
        *([own_head if not model.is_tied else tied_head] if has_head else [Ignored("lm_head.weight")]),
    ]


def _stack(name: str, n_layers: int, is_gated: bool) -> list[Line]:
    feed_forward = 2 if name == "decoder" else 1
    bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layer = [
        *_attention(name, 0, "SelfAttention", "attention"),
        *(_attention(name, 1, "EncDecAttention", "cross") if name == "decoder" else []),
        *_feed_forward(name, feed_forward, is_gated),
    ]
    return [
        entry(bias, f"{name}/relative/embedding"),
        *expand(layer, i=range(n_layers)),
        *norm(f"{name}.final_layer_norm", f"{name}/final_norm", bias=False),
    ]


def _attention(stack: str, place: int, theirs: str, ours: str) -> list[Entry]:
    tensor, path = f"{stack}.block.{{i}}.layer.{place}", f"{stack}/layer_{{i}}/{ours}"
    parts = {"q": "query", "k": "key", "v": "value", "o": "output"}
    lines = [line for a, b in parts.items() for line in dense(f"{tensor}.{theirs}.{a}", f"{path}/{b}", bias=False)]
    return [*norm(f"{tensor}.layer_norm", f"{path}_norm", bias=False), *lines]


def _feed_forward(stack: str, place: int, is_gated: bool) -> list[Entry]:
    tensor, path = f"{stack}.block.{{i}}.layer.{place}", f"{stack}/layer_{{i}}/mlp"
    parts = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if is_gated else {"wi": "up", "wo": "down"}
    lines = [
        line for a, b in parts.items() for line in dense(f"{tensor}.DenseReluDense.{a}", f"{path}/{b}", bias=False)
    ]
    return [*norm(f"{tensor}.layer_norm", f"{path}_norm", bias=False), *lines]


def _inputs(rng: np.random.Generator, model: T5) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens, mask = rng.integers(0, model.vocab_size, (3, 9)), np.ones((3, 9), np.int32)
    mask[1, 6:], mask[2, :2] = 0, 0
    ours, theirs = {"tokens": tokens, "mask": mask}, {"input_ids": tokens, "attention_mask": mask}
    if model.head == "encode":
        return ours, theirs
    inputs, inputs_mask = rng.integers(0, model.vocab_size, (3, 7)), np.ones((3, 7), np.int32)
    inputs_mask[0, 5:] = 0
    ours |= {"inputs": inputs, "inputs_mask": inputs_mask}
    return ours, {**theirs, "decoder_input_ids": inputs, "decoder_attention_mask": inputs_mask}


T5_FAMILY = Family(
    name="t5",
    model_types=("t5",),
    architectures={
        "T5Model": "hidden",
        "T5ForConditionalGeneration": "sequence_to_sequence",
        "T5EncoderModel": "encode",
    },
    modules=(T5,),
    to_model=_to_model,
    to_config=_to_config,
    entries=_entries,
    inputs=_inputs,
)
