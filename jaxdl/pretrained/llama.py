"""Checkpoints of Hugging Face of Llama, Mistral, Qwen2, Qwen3, Gemma 1, 2 and 3 (text): one map for all."""

from jaxdl.models.llama import Llama
from jaxdl.pretrained.decoder import named_head, our_real_outputs, text_inputs, their_real_outputs
from jaxdl.pretrained.entries import Entry, Ignored, Line, Tied, dense, embedding, entry, expand, norm
from jaxdl.pretrained.family import Family
from jaxdl.pretrained.llama_config import CLASSES, architectures, to_model
from jaxdl.pretrained.llama_export import to_config
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.transforms import pad_columns, transpose


def _entries(model: Llama) -> list[Line]:
    heads: dict[str | None, list[Line]] = {
        None: [Ignored("lm_head.weight")],
        "causal_lm": [entry("lm_head.weight", "head/kernel", transpose.then(pad_columns(model.vocab_size)))],
        "classify": [*dense("score", "head", bias=False)],
        "tag": [*dense("score", "head")],
    }
    if model.is_tied:
        heads["causal_lm"] = [Tied("lm_head.weight", "model.embed_tokens.weight")]
    return [
        *embedding("model.embed_tokens", "embed/token", n_rows=model.vocab_size),
        *expand(_layer(model), i=range(model.n_layers)),
        *norm("model.norm", "decoder/final_norm", bias=False),
        *heads[named_head(model)],
        Ignored("*.rotary_emb.inv_freq"),
    ]


def _layer(model: Llama) -> list[Entry]:
    block, theirs, ours = model.block, "model.layers.{i}", "decoder/layer_{i}"
    parts = {f"self_attn.{a}_proj": (f"attention/{b}", block.query_bias) for a, b in zip("qkv", _QKV, strict=True)}
    parts |= {"self_attn.o_proj": ("attention/output", block.output_bias)}
    parts |= {f"mlp.{name}_proj": (f"mlp/{name}", block.mlp_bias) for name in ("gate", "up", "down")}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if block.norm_position == "both":
        norms["post_attention_layernorm"] = "attention_post_norm"
        norms |= {"pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm"}
    if block.has_query_key_norm:
        norms |= {f"self_attn.{a}_norm": f"attention/{b}_norm" for a, b in {"q": "query", "k": "key"}.items()}
    lines = [dense(f"{theirs}.{a}", f"{ours}/{b}", bias=bias) for a, (b, bias) in parts.items()]
    lines += [norm(f"{theirs}.{a}", f"{ours}/{b}", bias=False) for a, b in norms.items()]
    return [line for part in lines for line in part]


_QKV = ("query", "key", "value")


def _family(model_type: str) -> Family:
    classes = architectures(model_type)
    return Family(
        name=model_type,
        model_types=(model_type,),
        architectures={name: head or "hidden" for name, head in classes.items()},
        modules=(Llama,),
        to_model=to_model,
        to_config=to_config,
        entries=_entries,
        inputs=text_inputs,
        names=Names(prefix="model."),
        bare=next(name for name, head in classes.items() if head is None),
        our_outputs=our_real_outputs,
        their_outputs=their_real_outputs,
    )


LLAMA_FAMILIES: tuple[Family, ...] = tuple(_family(model_type) for model_type in CLASSES)
"""One a model type; all share the map and the reading and writing of config.json."""
