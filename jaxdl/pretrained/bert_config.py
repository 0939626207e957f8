"""What the configs of BERT, RoBERTa and DistilBERT share: heads, labels, refusals; and inputs to prove them by."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdl.models.bert import bert_block
from jaxdl.models.block import Block
from jaxdl.models.text_encoder import Encoded, TextEncoder
from jaxdl.pretrained.family import Config
from jaxdl.pretrained.ledger import PretrainedError, near

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names of activations in config.json, and ours."""


def head_of(config: Config) -> str | None:
    """The model's head by the class that config.json names.

    Example:
      >>> head_of({"architectures": ["BertForMaskedLM"]}), head_of({"architectures": ["BertModel"]})
      ('masked_lm', None)
    """
    name = config["architectures"][0]
    return next((head for suffix, head in _HEADS.items() if name.endswith(suffix)), None)


_HEADS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "span",
    "ForMaskedLM": "masked_lm",
}


def architectures(name: str) -> dict[str, str]:
    """The classes of one of the families, and the short names of their heads.

    Example:
      >>> architectures("Bert")["BertForQuestionAnswering"]
      'span'
    """
    return {f"{name}Model": "hidden", **{f"{name}{suffix}": head for suffix, head in _HEADS.items()}}


def check_config(config: Config, activation: str) -> None:
    """Refuses what would silently make another network.

    Args:
      config: config.json.
      activation: the key that names it.

    Raises:
      PretrainedError: all of it.
    """
    if problems := list(_problems(config, activation)):
        raise PretrainedError.listing("config.json", problems)


def _problems(config: Config, activation: str) -> Iterator[str]:
    name = config.get(activation, "gelu")
    if name not in ACTIVATIONS:
        yield f"{activation}={name!r} is unknown; nearest: {near(str(name), ACTIVATIONS)}."
    kind = config.get("position_embedding_type", "absolute")
    if kind not in (None, "absolute"):
        yield f"position_embedding_type={kind!r} is not supported, only 'absolute'; use a checkpoint with those."
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            yield f"{key}=true makes a decoder, and this family reads both ways; use an encoder's checkpoint."
    if head_of(config) == "masked_lm" and config.get("tie_word_embeddings") is False:
        yield "tie_word_embeddings=false is not supported: the head is tied to the embedding; tie it, or load no head."
    if head_of(config) == "span" and len(label_names(config)) != 2:
        yield f"{len(label_names(config))} labels for the start and the end of a span; it takes 2."


def label_names(config: Config) -> tuple[str, ...]:
    """The names of the outputs, in order; 2 where the config says nothing, as in transformers.

    Example:
      >>> label_names({"id2label": {"1": "good", "0": "bad"}}), label_names({"num_labels": 1})
      (('bad', 'good'), ('LABEL_0',))
    """
    names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    n = len(names) or int(config.get("num_labels") or 2)
    return tuple(names.get(i, f"LABEL_{i}") for i in range(n))


def head_fields(config: Config, fields: dict[str, Any]) -> dict[str, Any]:
    """`head`, `n_outputs` and `labels` of a config, where `fields` do not say otherwise."""
    head = head_of(config)
    if head not in ("classify", "tag"):
        return {"head": head}
    labels = label_names(config)
    n_outputs = fields.get("n_outputs", len(labels))
    return {"head": head, "n_outputs": n_outputs, "labels": labels if n_outputs == len(labels) else ()}


def class_name(model: TextEncoder) -> str:
    """The class of transformers that a model is: `head="embed"` is the bare one, whose output others pool.

    Example:
      >>> from jaxdl.models.bert import Bert
      >>> class_name(Bert(bert_block(8, 2, 16), n_layers=1, vocab_size=9, head="tag", n_outputs=3))
      'BertForTokenClassification'
    """
    suffix = next((suffix for suffix, head in _HEADS.items() if head == model.head), "Model")
    return f"{type(model).__name__}{suffix}"


def activation_name(block: Block) -> str:
    """The name of a block's activation in config.json.

    Raises:
      PretrainedError: transformers has no name for it.
    """
    theirs = [name for name, ours in ACTIVATIONS.items() if ours == block.activation]
    if not theirs:
        known = ", ".join(sorted(set(ACTIVATIONS.values())))
        raise PretrainedError(f"activation={block.activation!r} has no name in a BERT's config.json; known: {known}.")
    return theirs[0]


def check_block(block: Block, **fields: Any) -> None:
    """Refuses a block that is none of BERT's.

    Args:
      block: of the model.
      fields: what BERT leaves open besides sizes, activation, rates and dtypes.

    Raises:
      PretrainedError: every field that differs.
    """
    free = ("activation", "dropout_rate", "attention_dropout_rate", "attention", "init_std", "dtype", "param_dtype")
    own = bert_block(
        block.width, block.n_heads, block.hidden, **{name: getattr(block, name) for name in free}, **fields
    )
    names = [name for name in vars(block) if getattr(block, name) != getattr(own, name)]
    if names:
        found = [f"{name}={getattr(block, name)!r}; transformers has {getattr(own, name)!r}." for name in names]
        raise PretrainedError.listing("the block is none of BERT's", found)


def label_config(model: TextEncoder) -> dict[str, Any]:
    """`id2label` and `label2id` of a model with outputs."""
    labels = {str(i): name for i, name in enumerate(model.labels or [f"LABEL_{i}" for i in range(model.n_outputs)])}
    return {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if labels else {}


def text_inputs(rng: np.random.Generator, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows for `Family.inputs`: a full one, one padded at its end, and one with padding inside."""
    padding = 0 if model.padding_token is None else model.padding_token
    n = min(7, model.n_positions - 1 - padding)
    mask = np.ones((3, n), bool)
    mask[1, max(n - 3, 1) :] = mask[2, 1 : n // 2] = False
    tokens = rng.integers(padding + 1, model.vocab_size, mask.shape)
    ours = {"tokens": np.where(mask, tokens, padding).astype(np.int32), "mask": mask.astype(np.int32)}
    if model.n_token_types > 1:
        ours["token_types"] = (rng.integers(0, model.n_token_types, mask.shape) * mask).astype(np.int32)
    names = {"tokens": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
    return ours, {names[name]: value.astype(np.int64) for name, value in ours.items()}


def our_outputs(out: Any, inputs: Any) -> dict[str, Any]:
    """What is compared, 0 at padding: PyTorch stops the gradient of the padding token's embedding, jaxdl does not."""
    fields = out._asdict() if isinstance(out, Encoded) else {"logits": out}
    return {name: _at_real_tokens(value, inputs["mask"]) for name, value in fields.items()}


def their_outputs(out: Any, inputs: Any) -> dict[str, Any]:
    """The same of transformers; the two outputs of a span are one array here."""
    if "start_logits" in out:
        import torch

        fields = {"logits": torch.stack([out["start_logits"], out["end_logits"]], -1)}
    elif "pooler_output" in out:
        fields = {"hidden": out["last_hidden_state"], "pooled": out["pooler_output"]}
    else:
        fields = {"logits": out["logits" if "logits" in out else "last_hidden_state"]}
    mask = next(iter(fields.values())).new_tensor(np.asarray(inputs["attention_mask"]))
    return {name: _at_real_tokens(value, mask) for name, value in fields.items()}


def _at_real_tokens(x: Any, mask: Any) -> Any:
    return x * mask[..., None] if x.ndim == 3 else x
