"""An encoder and a decoder of recurrent layers with attention between them.

Dimensions: `B` batch, `S` source time, `T` target time, `D` width of a state, `E` width of the encoder's outputs,
`V` vocabulary, `L` layers.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.checks import check, count_problem, name_problem, rate_problem
from jaxdl.models.layers import Dtype
from jaxdl.models.recurrent import Recurrent
from jaxdl.models.recurrent_cells import CELLS, Cell, States
from jaxdl.models.seq2seq_attention import ATTENTIONS, Memory, attend


class Seq2Seq(nn.Module):
    """A bidirectional encoder and a decoder whose outputs attend to the encoder's.

    The decoder reads the tokens before each target, from states that a dense layer makes of the encoder's last ones;
    its output `h` and the context `c` that it attends to give `tanh(W [h; c])`, and the head reads that (Luong et al.
    2015, equations 5 to 7, without input feeding). No step of the recurrence waits for attention, so that training
    is one scan a layer and the attention one product over all steps.

    Paths: `embed/{source,target}/embedding`, `encoder/layer_<i>/{forward,backward}/{input,recurrent}/{kernel,bias}`,
    `bridge/{kernel,bias}`, `decoder/layer_<i>/forward/...`, `attention/{query,key,score}/...`,
    `combine/{kernel,bias}`, `head/{kernel,bias}`.

    Args:
      source_vocab_size: V of the source.
      target_vocab_size: V of the target.
      width: of the decoder's states; a direction of the encoder has as many.
      embed_width: of both embeddings.
      cell: as for `Recurrent`.
      n_encoder_layers: at least 1.
      n_decoder_layers: at least 1.
      attention: additive, multiplicative, or a module class with the fields and methods of `AdditiveAttention`.
      dropout_rate: of the embeddings, between layers, and before the head, in [0, 1).
      dtype: of the computation; the head computes in float32 at least.
      param_dtype: of the parameters.

    Raises:
      ModelError: fields that make no network (at construction), or inputs that do not fit.

    Example:
      >>> import jax
      >>> model = Seq2Seq(source_vocab_size=7, target_vocab_size=5, width=8, embed_width=4)
      >>> source, previous = jnp.array([[3, 4, 6, 0]]), jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), source, previous=previous, lengths=jnp.array([3]))
      >>> model.apply(variables, source, previous=previous, lengths=jnp.array([3])).shape, sorted(variables["params"])
      ((1, 3, 5), ['attention', 'bridge', 'combine', 'decoder', 'embed', 'encoder', 'head'])
    """

    source_vocab_size: int
    target_vocab_size: int
    width: int = 128
    embed_width: int = 64
    cell: str | Cell = "lstm"
    n_encoder_layers: int = 1
    n_decoder_layers: int = 1
    attention: str | Callable[..., Any] = "additive"
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        counts = ("source_vocab_size", "target_vocab_size", "width", "embed_width")
        check(
            "Seq2Seq",
            *(count_problem(name, getattr(self, name)) for name in (*counts, "n_encoder_layers", "n_decoder_layers")),
            None if isinstance(self.cell, Cell) else name_problem("cell", str(self.cell), CELLS),
            name_problem("attention", self.attention, ATTENTIONS),
            rate_problem("dropout_rate", self.dropout_rate),
        )
        super().__post_init__()

    def setup(self) -> None:
        kw: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        make_attention = ATTENTIONS[self.attention] if isinstance(self.attention, str) else self.attention
        n_states = self._cell.n_states * self.n_decoder_layers
        self.embed = _Embeddings(self.source_vocab_size, self.target_vocab_size, self.embed_width, **kw)
        self.encoder = self._recurrent(self.n_encoder_layers, bidirectional=True)
        self.bridge = nn.Dense(n_states * self.width, **kw)
        self.decoder = self._recurrent(self.n_decoder_layers, bidirectional=False)
        self.score = make_attention(self.width, name="attention", **kw)
        self.combine = nn.Dense(self.width, **kw)
        self.head = nn.Dense(
            self.target_vocab_size,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
            param_dtype=self.param_dtype,
        )
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        source_BS: Array,
        *,
        previous: Array,
        mask: Array | None = None,
        lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Logits of every next token of the target, given the tokens before it (teacher forcing).

        Args:
          source_BS: (B, S) int.
          previous: (B, T) int, the token before each target: the target moved right by one, with the token that
            begins a sequence in front. Padding at its end changes no logit before it.
          mask: (B, S), 1 where a source token is real.
          lengths: (B,) int, the number of real source tokens, if they come first; the faster way on a GPU.
          train: applies dropout.

        Returns:
          (B, T, target_vocab_size) float32.

        Raises:
          ModelError: arguments that do not fit.
        """
        memory, carry = self.encode(source_BS, mask=mask, lengths=lengths, train=train)
        return self.decode(previous, memory, carry, train=train)[0]

    def encode(
        self, source_BS: Array, *, mask: Array | None = None, lengths: Array | None = None, train: bool = False
    ) -> tuple[Memory, States]:
        """Reads the source, once: what the decoder attends to, and the states it starts from."""
        check("Seq2Seq", _tokens_problem("source", source_BS))
        x_BSD = self.dropout(self.embed.source(source_BS), deterministic=not train)
        values_BSE, finals = self.encoder(x_BSD, mask=mask, lengths=lengths, train=train)
        last = jnp.concatenate([side for state in finals for side in state[-2:]], -1)
        starts = jnp.tanh(self.bridge(last.astype(self.dtype)))
        starts = starts.reshape(-1, self._cell.n_states, self.n_decoder_layers, self.width)
        if lengths is not None:
            mask = jnp.arange(source_BS.shape[1])[None] < jnp.asarray(lengths)[:, None]
        mask = None if mask is None else jnp.asarray(mask, bool)
        carry = tuple(jnp.swapaxes(starts[:, k], 0, 1) for k in range(self._cell.n_states))
        return Memory(self.score.keys(values_BSE), values_BSE, mask), carry

    def decode(self, previous_BT: Array, memory: Memory, carry: States, *, train: bool = False) -> tuple[Array, States]:
        """Some steps of the target: (B, T) tokens and the states before -> (B, T, V) logits and the states after."""
        check("Seq2Seq", _tokens_problem("previous", previous_BT))
        x_BTD = self.dropout(self.embed.target(previous_BT), deterministic=not train)
        h_BTD, carry = self.decoder(x_BTD, carry=carry, train=train)
        context_BTE, _ = attend(self.score.scores(h_BTD, memory.keys), memory)
        out_BTD = jnp.tanh(self.combine(jnp.concatenate([h_BTD, context_BTE], -1)))
        return self.head(self.dropout(out_BTD, deterministic=not train)), carry

    @property
    def _cell(self) -> Cell:
        return self.cell if isinstance(self.cell, Cell) else CELLS[self.cell]

    def _recurrent(self, n_layers: int, *, bidirectional: bool) -> Recurrent:
        return Recurrent(
            width=self.width,
            cell=self.cell,
            n_layers=n_layers,
            bidirectional=bidirectional,
            dropout_rate=self.dropout_rate if n_layers > 1 else 0.0,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


class _Embeddings(nn.Module):
    source_vocab_size: int
    target_vocab_size: int
    width: int
    dtype: Dtype
    param_dtype: Dtype

    def setup(self) -> None:
        kw: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.source = nn.Embed(self.source_vocab_size, self.width, **kw)
        self.target = nn.Embed(self.target_vocab_size, self.width, **kw)


def _tokens_problem(name: str, tokens: Array) -> str | None:
    if tokens.ndim != 2:
        return f"{name} has shape {tokens.shape}; it must be (batch, time)."
    return None if jnp.issubdtype(tokens.dtype, jnp.integer) else f"{name} is {tokens.dtype}; give token numbers."
