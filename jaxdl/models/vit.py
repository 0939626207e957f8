"""Vision transformer (Dosovitskiy et al. 2021): patches of an image as tokens.

Dimensions: `B` batch, `H` height, `W` width, `C` channels, `N` tokens (patches, and perhaps a class token), `D` width,
`P` side of a patch. Images are NHWC.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxdl.models.attention import wants_even_length
from jaxdl.models.block import Block
from jaxdl.models.checks import check, count_problem, float_problem, name_problem
from jaxdl.models.patches import PatchEmbed
from jaxdl.models.text_encoder import Encoded
from jaxdl.models.transformer import LAYOUTS, REMATS, Stack

HEADS = ("classify", "pool", "project")
POOLINGS = ("class", "mean")


def vit_block(width: int, n_heads: int, hidden: int, **fields: Any) -> Block:
    """The block of ViT: norms before each branch (epsilon 1e-12) and exact GELU; `fields` change others.

    Example:
      >>> vit_block(8, 2, 16, dropout_rate=0.1).norm_position
      'pre'
    """
    return Block(width=width, n_heads=n_heads, hidden=hidden, **{"norm_epsilon": 1e-12, "activation": "gelu", **fields})


class ViT(nn.Module):
    """An encoder over patches, and a head.

    Heads, by what `model(image)` returns:
      None: hidden states after the last norm (B, N, D), the class token first; with `has_pooler` `Encoded`.
      "pool": (B, D), the class token's state, of which alone the last layer computes more than keys and values; or the
        mean over patches.
      "classify": (B, n_outputs), a linear layer on that, in float32.
      "project": (B, n_outputs), a linear layer without a bias on that.

    An image of another size than `image_size` is legal: the learned positions are interpolated
    (`patches.resize_positions`).

    Paths: `embed/patch/{kernel,bias}` (P * P * C, D), `embed/class_token` (D,), `embed/position/embedding` (N, D),
    `embed/norm/{scale,bias}`; `encoder/...` of `Stack`; `pooler/{kernel,bias}`; `head/{kernel,bias}`.

    Args:
      block: of every layer, see `vit_block`.
      n_layers: L.
      image_size: side in pixels of the images that the positions are for.
      patch_size: P; must divide the image's sides.
      n_channels: C.
      head: a name above, or None.
      n_outputs: of "classify" and "project".
      labels: names of the classes of "classify", or none.
      pooling: "class", of a class token; or "mean", of the patches, without a class token (Zhai et al. 2022).
      has_pooler: with `head=None`, `Encoded(hidden, pooled)` is returned: pooled is tanh of a dense layer.
      has_patch_bias: of the patch embedding.
      has_embed_norm: a norm before the first layer, as in CLIP.
      layout, remat: see `Stack`.

    Raises:
      ModelError: fields that make no network (at construction), or images that do not fit it.

    Example:
      >>> import jax
      >>> model = ViT(vit_block(8, 2, 16), n_layers=1, image_size=8, patch_size=4, head="classify", n_outputs=3)
      >>> image = jnp.ones((2, 8, 8, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), image)
      >>> model.apply(variables, image).shape, sorted(variables["params"]["embed"])
      ((2, 3), ['class_token', 'patch', 'position'])
    """

    block: Block
    n_layers: int
    image_size: int
    patch_size: int
    n_channels: int = 3
    head: str | None = None
    n_outputs: int | None = None
    labels: tuple[str, ...] = ()
    pooling: str = "class"
    has_pooler: bool = False
    has_patch_bias: bool = True
    has_embed_norm: bool = False
    layout: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        check(type(self).__name__, *self._problems())
        super().__post_init__()

    def _problems(self) -> list[str | None]:
        sizes = ("n_layers", "image_size", "patch_size", "n_channels")
        wrong = [count_problem(name, getattr(self, name)) for name in sizes]
        is_uneven = not any(wrong) and self.image_size % self.patch_size
        has_outputs = self.head in ("classify", "project")
        uneven = f"patch_size={self.patch_size} does not divide image_size={self.image_size}; use a divisor."
        odd = f"n_outputs={self.n_outputs} has no use for head={self.head!r}; drop it."
        return [
            *wrong,
            uneven if is_uneven else None,
            None if self.head is None else name_problem("head", self.head, HEADS),
            count_problem("n_outputs", self.n_outputs) if has_outputs else None if self.n_outputs is None else odd,
            None if len(self.labels) in (0, self.n_outputs or 0) else self._labels_problem(),
            name_problem("pooling", self.pooling, POOLINGS),
            f"has_pooler=True is for head=None, not {self.head!r}; drop it." if self.has_pooler and self.head else None,
            name_problem("layout", self.layout, LAYOUTS),
            name_problem("remat", self.remat, REMATS),
            "the block is causal, and patches see each other; use is_causal=False." if self.block.is_causal else None,
            "the block has cross-attention, and there is no memory; use has_cross=False."
            if self.block.has_cross
            else None,
        ]

    def _labels_problem(self) -> str:
        return f"{len(self.labels)} labels for n_outputs={self.n_outputs}; name all of them or none."

    def setup(self) -> None:
        block = self.block
        self.embed = PatchEmbed(
            block,
            n_patches=self.image_size // self.patch_size,
            patch_size=self.patch_size,
            has_class_token=self.pooling == "class",
            has_bias=self.has_patch_bias,
            has_norm=self.has_embed_norm,
            name="embed",
        )
        self.encoder = Stack((block,) * self.n_layers, layout=self.layout, remat=self.remat, name="encoder")
        init, param_dtype = nn.initializers.normal(block.init_std), block.param_dtype
        if self.has_pooler:
            own = {"dtype": block.dtype, "param_dtype": param_dtype}
            self.pooler = nn.Dense(block.width, kernel_init=init, **own, name="pooler")
        if self.head in ("classify", "project"):
            dtype, has_bias = jnp.promote_types(block.dtype, jnp.float32), self.head == "classify"
            own = {"use_bias": has_bias, "dtype": dtype, "param_dtype": param_dtype}
            self.output = nn.Dense(self.n_outputs or 0, kernel_init=init, **own, name="head")

    def __call__(self, image: Array, *, train: bool = False) -> Any:
        """Runs the model.

        Args:
          image: (B, H, W, C) float.
          train: dropout is on.

        Returns:
          What the head gives, see the class.
        """
        n_first = 1 if self.head is not None and self.pooling == "class" else None
        hidden_BND = self.hidden(image, n_first=n_first, train=train)
        if self.head is None:
            pooled_BD = jnp.tanh(self.pooler(self._pooled(hidden_BND))) if self.has_pooler else None
            return hidden_BND if pooled_BD is None else Encoded(hidden_BND, pooled_BD)
        pooled_BD = self._pooled(hidden_BND)
        return pooled_BD if self.head == "pool" else self.output(pooled_BD)

    def hidden(self, image: Array, *, n_first: int | None = None, train: bool = False) -> Array:
        """The states after the last norm, (B, N, D), of the same inputs as the call.

        Args:
          image: (B, H, W, C) float.
          n_first: tokens whose states are enough, see `Stack`; 1 for the class token.
          train: dropout is on.
        """
        check(type(self).__name__, *self._input_problems(image))
        x_BND = self.embed(image, train=train)
        (n_rows, n_tokens), block = x_BND.shape[:2], self.block
        if not wants_even_length(block.attention, x_BND.dtype, block.heads[2], n_tokens):
            return self.encoder(x_BND, n_first=n_first, train=train)[0]
        x_BND = jnp.pad(x_BND, ((0, 0), (0, 1), (0, 0)))  # once, and not in every layer
        lengths = jnp.full(n_rows, n_tokens)
        return self.encoder(x_BND, lengths=lengths, n_first=n_first, train=train)[0][:, :n_tokens]

    def _input_problems(self, image: Array) -> list[str | None]:
        if image.ndim != 4:
            return [f"images have shape {image.shape}; they must be (batch, height, width, channels)."]
        height, width, n_channels = image.shape[1:]
        side, expected = self.patch_size, self.n_channels
        wrong = f"images have {n_channels} channels, and n_channels={expected}; channels are the last axis."
        uneven = f"images of {height} x {width} are no whole number of {side} x {side} patches; crop or resize them."
        return [
            float_problem("pixels", image),
            wrong if n_channels != expected else None,
            uneven if height % side or width % side or not height or not width else None,
        ]

    def _pooled(self, hidden_BND: Array) -> Array:
        return hidden_BND[:, 0] if self.pooling == "class" else jnp.mean(hidden_BND, axis=1)


def vit_base(**fields: Any) -> ViT:
    """The published ViT-B/16 of 86 million parameters, for images of 224 pixels; `fields` change others.

    Example:
      >>> vit_base(head="classify", n_outputs=10).block.heads
      (12, 12, 64)
    """
    own = {"block": vit_block(768, 12, 3072), "n_layers": 12, "image_size": 224, "patch_size": 16}
    return ViT(**{**own, **fields})
