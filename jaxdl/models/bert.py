"""BERT (Devlin et al. 2019) and its kin: RoBERTa, DistilBERT; MiniLM (Wang et al. 2020) is a small BERT."""

from typing import Any

from jaxdl.models.block import Block
from jaxdl.models.text_encoder import TextEncoder


class Bert(TextEncoder):
    """Positions from 0, two token types, and a classifier on the pooler. Paths, heads and fields: see `TextEncoder`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = Bert(bert_block(8, 2, 16), n_layers=2, vocab_size=30, n_positions=16, head="classify", n_outputs=3)
      >>> tokens = jnp.array([[2, 7, 3], [2, 3, 0]])
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens, mask=jnp.array([[1, 1, 1], [1, 1, 0]])).shape, sorted(variables["params"])
      ((2, 3), ['embed', 'encoder', 'head', 'pooler'])
    """

    n_token_types: int = 2


class Roberta(TextEncoder):
    """RoBERTa (Liu et al. 2019): positions count real tokens from 2, and the classifier has a tanh layer of its own.

    Paths, heads and fields: see `TextEncoder`. Of the 514 positions the first two are not read by real tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = Roberta(bert_block(8, 2, 16), n_layers=1, vocab_size=30, n_positions=18, head="tag", n_outputs=5)
      >>> tokens = jnp.array([[0, 7, 2, 1]])
      >>> model.init_with_output(jax.random.key(0), tokens, mask=tokens != 1)[0].shape
      (1, 4, 5)
    """

    n_positions: int = 514
    n_token_types: int = 1
    padding_token: int | None = 1

    classifier = "tanh"


class DistilBert(TextEncoder):
    """DistilBERT (Sanh et al. 2019): no token types, no pooler, and a classifier with a relu layer of its own.

    Paths, heads and fields: see `TextEncoder`. Dropout also falls on the output of attention, as in BERT; the published
    code leaves it out there.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = DistilBert(bert_block(8, 2, 16), n_layers=1, vocab_size=30, n_positions=16, head="span")
      >>> model.init_with_output(jax.random.key(0), jnp.array([[2, 7, 3]]))[0].shape
      (1, 3, 2)
    """

    classifier = "relu"


def bert_block(width: int, n_heads: int, hidden: int, **fields: Any) -> Block:
    """The block of BERT: a norm after each branch (epsilon 1e-12), exact GELU, dropout 0.1.

    Args:
      width: D.
      n_heads: H.
      hidden: F.
      fields: further fields of `Block`, or other values of these.

    Example:
      >>> bert_block(384, 12, 1536, dropout_rate=0.0).norm_position
      'post'
    """
    own = {"norm_position": "post", "norm_epsilon": 1e-12, "activation": "gelu"}
    rates = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}
    return Block(width=width, n_heads=n_heads, hidden=hidden, **{**own, **rates, **fields})


def bert_base(**fields: Any) -> Bert:
    """The published uncased model of 109 million parameters: 12 layers of width 768.

    Args:
      fields: of `Bert`, such as `head`.

    Example:
      >>> bert_base(head="span").block.width
      768
    """
    return Bert(**{"block": bert_block(768, 12, 3072), "n_layers": 12, "vocab_size": 30522, **fields})
