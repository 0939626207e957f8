"""CLIP (Radford et al. 2021): texts and images as vectors of one space.

Dimensions: `B` batch, `T` time, `D` width of a tower, `E` width of the shared space, `V` vocabulary.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdl.models.block import Block
from jaxdl.models.checks import check, count_problem, name_problem
from jaxdl.models.embedding import Embed
from jaxdl.models.transformer import LAYOUTS, REMATS, Stack
from jaxdl.models.vit import ViT

TEXT_HEADS = ("pool", "project")


def clip_block(width: int, n_heads: int, n_layers: int, **fields: Any) -> Block:
    """The block of both towers: norms before each branch, "quick" GELU, hidden layer 4 times the width.

    Args:
      width: D.
      n_heads: H.
      n_layers: L, by which the last kernel of each branch starts smaller.
      fields: further fields of `Block`.

    Example:
      >>> clip_block(8, 2, 3).hidden
      32
    """
    own: dict[str, Any] = {"hidden": 4 * width, "activation": "quick_gelu"}
    own |= {"init_std": width**-0.5, "residual_init_std": (2 * n_layers * width) ** -0.5}
    return Block(width=width, n_heads=n_heads, **{**own, **fields})


class CLIPText(nn.Module):
    """A causal encoder of texts, read at their end token.

    Heads, by what `model(tokens)` returns:
      None: hidden states (B, T, D).
      "pool": (B, D), the state of the first end token in each row.
      "project": (B, n_outputs), a linear layer without a bias on that.

    Paths: `embed/{token,position}/embedding`, `encoder/...` of `Stack`, `head/kernel`.

    Args:
      block: of every layer, see `clip_block`; the tower makes it causal.
      n_layers: L.
      vocab_size: V.
      n_positions: the longest text.
      end_token: the id that ends a text. None reads the highest id of each row, as the checkpoints of OpenAI do, whose
        end token is the last of the vocabulary.
      head: a name above, or None.
      n_outputs: of "project".
      layout, remat: see `Stack`.

    Raises:
      ModelError: fields that make no network, or a row without an end token (where ids are known: not inside `jit`).

    Example:
      >>> text = CLIPText(clip_block(8, 2, 1), n_layers=1, vocab_size=11, n_positions=4, end_token=10)
      >>> tokens = jnp.array([[3, 10, 0], [4, 5, 10]])
      >>> variables = text.init(jax.random.key(0), tokens)
      >>> text.apply(variables, tokens).shape
      (2, 8)
    """

    block: Block
    n_layers: int
    vocab_size: int
    n_positions: int = 77
    end_token: int | None = None
    head: str | None = "pool"
    n_outputs: int | None = None
    layout: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        is_token = self.end_token is None or 0 <= self.end_token < self.vocab_size
        odd = f"n_outputs={self.n_outputs} has no use for head={self.head!r}; drop it."
        check(
            "CLIPText",
            *(count_problem(name, getattr(self, name)) for name in ("n_layers", "vocab_size", "n_positions")),
            None if is_token else f"end_token={self.end_token} is no token; use 0 to {self.vocab_size - 1}, or None.",
            None if self.head is None else name_problem("head", self.head, TEXT_HEADS),
            count_problem("n_outputs", self.n_outputs) if self.head == "project" else odd if self.n_outputs else None,
            name_problem("layout", self.layout, LAYOUTS),
            name_problem("remat", self.remat, REMATS),
        )
        super().__post_init__()

    def setup(self) -> None:
        block = self.block.replace(is_causal=True)
        self.embed = Embed(block.replace(init_std=0.02), self.vocab_size, n_positions=self.n_positions, name="embed")
        self.encoder = Stack((block,) * self.n_layers, layout=self.layout, remat=self.remat, name="encoder")
        if self.head == "project":
            self.output = _projection(self.n_outputs or 0, block.dtype, block.param_dtype, "head")

    def __call__(self, tokens: Array, *, mask: Array | None = None, train: bool = False) -> Array:
        """Runs the tower.

        Args:
          tokens: (B, T) int, each row with an end token; what follows it is padding and changes nothing.
          mask: (B, T), 0 for padding; needed only for padding before the end token.
          train: dropout is on.

        Returns:
          What the head gives, see the class.
        """
        hidden_BTD = self.hidden(tokens, mask=mask, train=train)
        if self.head is None:
            return hidden_BTD
        check("CLIPText", self._end_problem(tokens))
        end_B = jnp.argmax(tokens if self.end_token is None else tokens == self.end_token, axis=1)
        pooled_BD = jnp.take_along_axis(hidden_BTD, end_B[:, None, None], axis=1)[:, 0]
        return pooled_BD if self.head == "pool" else self.output(pooled_BD)

    def hidden(self, tokens: Array, *, mask: Array | None = None, train: bool = False) -> Array:
        """The states after the last norm, (B, T, D), of the same inputs as the call."""
        x_BTD = self.embed(tokens, jnp.arange(tokens.shape[-1])[None], train=train)
        return self.encoder(x_BTD, mask=mask, train=train)[0]

    def _end_problem(self, tokens: Array) -> str | None:
        if self.end_token is None or isinstance(tokens, jax.core.Tracer):
            return None
        rows = np.flatnonzero(~np.any(np.asarray(tokens) == self.end_token, axis=1))[:5].tolist()
        return f"rows {rows} lack end_token={self.end_token}; cut texts before it, not after." if rows else None


class CLIPVision(ViT):
    """CLIP's image tower: a `ViT` with a norm before the first layer, and patches without a bias.

    Fields and paths: see `ViT`.

    Example:
      >>> vision = CLIPVision(clip_block(8, 2, 1), n_layers=1, image_size=8, patch_size=4)
      >>> vision.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))[0].shape
      (2, 8)
    """

    head: str | None = "pool"
    has_patch_bias: bool = False
    has_embed_norm: bool = True


class Contrast(NamedTuple):
    """What `CLIP` returns.

    Attributes:
      text_embeds: (B, E) of length 1.
      image_embeds: (B', E) of length 1.
      logits: (B', B), images by texts: the cosine times the learned scale, plus the learned bias if there is one.
    """

    text_embeds: Array
    image_embeds: Array
    logits: Array


class CLIP(nn.Module):
    """Two towers, a projection of each into the shared space, and a learned scale of their cosine.

    Paths: `text/...`, `vision/...`, `text_projection/kernel`, `vision_projection/kernel`, `logit_scale` (its
    exponential is the scale) and, if asked for, `logit_bias`.

    Args:
      text: called as `text(tokens, mask=..., train=...)`; gives (B, D). `CLIPText`, or any module that does so.
      vision: called as `vision(image, train=...)`; gives (B, D). `CLIPVision`, `CNN`, ...
      width: E.
      scale_init: the first scale: 1 / 0.07 in CLIP, 10 in SigLIP.
      bias_init: the first bias of the logits, which the sigmoid loss needs (-10 in SigLIP); None has no bias.
      dtype, param_dtype: of the projections and of their parameters.

    Raises:
      ModelError: fields that make no network.

    Example:
      >>> model = CLIP(
      ...   CLIPText(clip_block(8, 2, 1), n_layers=1, vocab_size=11, n_positions=4),
      ...   CLIPVision(clip_block(12, 2, 1), n_layers=1, image_size=8, patch_size=4),
      ...   width=6,
      ... )
      >>> tokens, image = jnp.array([[3, 10], [4, 10]]), jnp.ones((2, 8, 8, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens, image=image)
      >>> model.apply(variables, tokens, image=image).logits.shape, sorted(variables["params"])
      ((2, 2), ['logit_scale', 'text', 'text_projection', 'vision', 'vision_projection'])
    """

    text: nn.Module
    vision: nn.Module
    width: int
    scale_init: float = 1 / 0.07
    bias_init: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        wrong = f"scale_init={self.scale_init} must be positive."
        check("CLIP", count_problem("width", self.width), None if self.scale_init > 0 else wrong)
        super().__post_init__()

    def setup(self) -> None:
        self.text_projection = _projection(self.width, self.dtype, self.param_dtype, "text_projection")
        self.vision_projection = _projection(self.width, self.dtype, self.param_dtype, "vision_projection")
        scale = nn.initializers.constant(math.log(self.scale_init))
        self.logit_scale = self.param("logit_scale", scale, (), self.param_dtype)
        if self.bias_init is not None:
            bias = nn.initializers.constant(self.bias_init)
            self.logit_bias = self.param("logit_bias", bias, (), self.param_dtype)

    def __call__(self, tokens: Array, *, image: Array, mask: Array | None = None, train: bool = False) -> Contrast:
        """Compares every text with every image.

        Args:
          tokens: (B, T) int.
          image: (B', H, W, C) float.
          mask: (B, T), 0 for padding.
          train: dropout is on.
        """
        text_embeds = self.embed_text(tokens, mask=mask, train=train)
        image_embeds = self.embed_image(image, train=train)
        return Contrast(text_embeds, image_embeds, self.logits(text_embeds, image_embeds))

    def embed_text(self, tokens: Array, *, mask: Array | None = None, train: bool = False) -> Array:
        """Texts (B, T) -> (B, E) of length 1."""
        return _unit(self.text_projection(self.text(tokens, mask=mask, train=train)))

    def embed_image(self, image: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> (B, E) of length 1."""
        return _unit(self.vision_projection(self.vision(image, train=train)))

    def logits(self, text_embeds: Array, image_embeds: Array) -> Array:
        """(B, E) texts and (B', E) images -> (B', B), as in `Contrast`."""
        cosine = jnp.matmul(image_embeds, text_embeds.T, precision="highest")
        logits = cosine * jnp.exp(self.logit_scale).astype(cosine.dtype)
        return logits if self.bias_init is None else logits + self.logit_bias.astype(cosine.dtype)


def _projection(features: int, dtype: Any, param_dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.lecun_normal()
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=param_dtype, name=name)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
