"""What the families of decoders share: heads, labels and special tokens of a config, and inputs to prove them by."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdl.models.decoder import Decoder
from jaxdl.pretrained.bert_config import label_names
from jaxdl.pretrained.family import Config
from jaxdl.pretrained.ledger import PretrainedError


def named_head(model: Decoder) -> str | None:
    """The head of a model that has a class in transformers.

    Raises:
      PretrainedError: it has none.
    """
    if model.head == "embed":
        raise PretrainedError("head='embed' has no class in transformers; save the model with head=None.")
    return model.head


def special_tokens(model: Decoder) -> dict[str, Any]:
    """The tokens of a config; a null keeps transformers from putting in its own."""
    return {"pad_token_id": model.padding_token, "bos_token_id": None, "eos_token_id": None}


def label_fields(config: Config, head: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`n_outputs` and `labels` of a config; an override of `n_outputs` drops labels that are not as many."""
    if head not in ("classify", "tag"):
        return {}
    labels = label_names(config)
    n_outputs = fields.get("n_outputs", len(labels))
    return {"n_outputs": n_outputs, "labels": labels if n_outputs == len(labels) else ()}


def label_config(model: Decoder) -> dict[str, Any]:
    """The labels of a model in a config; numbered where it has no names."""
    names = model.labels or tuple(f"LABEL_{i}" for i in range(model.n_outputs or 0))
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}


def text_inputs(rng: np.random.Generator, model: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of 11 tokens: one full, one padded on the right, one on the left, with positions that count real tokens."""
    tokens, mask = rng.integers(0, model.vocab_size, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, 7:], mask[2, :3] = 0, 0
    if model.padding_token is not None:
        tokens[tokens == model.padding_token] = (model.padding_token + 1) % model.vocab_size
        tokens[mask == 0] = model.padding_token
    elif model.head == "classify":  # without a padding token transformers takes a single row, to its end
        tokens, mask = tokens[2:], mask[2:]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ours = {"tokens": tokens, "mask": mask, "positions": positions}
    return ours, {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def our_real_outputs(out: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, with zeros at padding, where neither side says what comes out."""
    return {"logits": out * _spread(inputs["mask"], out)}


def their_real_outputs(out: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs, with zeros at padding."""
    logits = getattr(out, "logits", None)
    logits = out.last_hidden_state if logits is None else logits
    return {"logits": logits * logits.new_tensor(_spread(inputs["attention_mask"], logits))}


def _spread(mask: np.ndarray, out: Any) -> Any:
    return mask[:, :, None] if out.ndim == 3 else np.ones_like(mask[:, :1])
