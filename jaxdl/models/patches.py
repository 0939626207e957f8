"""Images to tokens: patches, a class token, learned positions for any image size.

Dimensions: `B` batch, `H` height, `W` width, `C` channels, `N` tokens, `D` width, `P` side of a patch. Images are NHWC.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from jaxdl.choices import tell
from jaxdl.models.block import Block, Norm
from jaxdl.models.checks import check
from jaxdl.models.layers import dropout


class PatchEmbed(nn.Module):
    """Patches, each a linear function of its pixels; a class token before them; learned positions; dropout.

    Args:
      block: gives width, norm, dropout and dtypes.
      n_patches: on a side, of the image that the positions are for.
      patch_size: P.
      has_class_token, has_bias, has_norm: see `ViT`.
    """

    block: Block
    n_patches: int
    patch_size: int
    has_class_token: bool
    has_bias: bool
    has_norm: bool

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, N, D)."""
        block, P, side = self.block, self.patch_size, self.n_patches
        B, H, W, C = image_BHWC.shape
        init, own = nn.initializers.normal(block.init_std), {"dtype": block.dtype, "param_dtype": block.param_dtype}
        patches = image_BHWC.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, P * P * C)
        patch_init = nn.initializers.lecun_normal()
        x_BND = nn.Dense(block.width, use_bias=self.has_bias, kernel_init=patch_init, **own, name="patch")(patches)
        x_BND = _in_order(x_BND)
        if self.has_class_token:
            token_D = self.param("class_token", init, (block.width,), block.param_dtype).astype(x_BND.dtype)
            x_BND = jnp.concatenate([jnp.broadcast_to(token_D, (B, 1, block.width)), x_BND], axis=1)
        n_rows = side * side + self.has_class_token
        table = nn.Embed(n_rows, block.width, embedding_init=init, **own, name="position").embedding
        grid = (H // P, W // P)
        if grid != (side, side):
            tell("positions", "interpolated", f"{grid[0]} x {grid[1]} patches instead of {side} x {side}")
            table = resize_positions(table, (side, side), grid)
        x_BND = x_BND + table.astype(x_BND.dtype)[None]
        if self.has_norm:
            x_BND = Norm(block, name="norm")(x_BND)
        return dropout(x_BND, block.dropout_rate, train=train, name="dropout")


def _in_order(x_BND: Array) -> Array:
    """On a GPU, tokens of a row side by side: nothing here tells XLA so, and it would put rows side by side instead,
    and transpose in front of every attention.
    """
    if jax.default_backend() != "gpu":
        return x_BND
    return with_layout_constraint(x_BND, Layout(major_to_minor=(0, 1, 2)))


def resize_positions(table_ND: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Learned positions for another number of patches, by bicubic interpolation (Dosovitskiy et al. 2021, sec. 3.2).

    As PyTorch's `interpolate(mode="bicubic", align_corners=False)` does: Keys' kernel (1981) with a = -0.75, edges
    repeated, no smoothing before a reduction.

    Args:
      table_ND: (n, D), a row for each patch in reading order; rows before those, such as a class token's, stay.
      old: patches in height and width of the table, at most n together.
      new: patches wanted.

    Returns:
      (n - old + new patches, D), the table's dtype.

    Example:
      >>> resize_positions(jnp.ones((1 + 4, 3)), (2, 2), (3, 5)).shape
      (16, 3)
    """
    n_kept = table_ND.shape[0] - old[0] * old[1]
    check("resize_positions", None if n_kept >= 0 else f"{table_ND.shape[0]} rows hold no {old[0]} x {old[1]} patches.")
    grid = table_ND[n_kept:].reshape(*old, -1)
    rows, columns = (jnp.asarray(_bicubic(n, m), grid.dtype) for n, m in zip(old, new, strict=True))
    grid = jnp.einsum("yh,xw,hwd->yxd", rows, columns, grid, precision="highest")
    return jnp.concatenate([table_ND[:n_kept], grid.reshape(new[0] * new[1], -1)])


def _bicubic(n_old: int, n_new: int) -> np.ndarray:
    """The matrix (n_new, n_old) that interpolates along one axis."""
    place = (np.arange(n_new) + 0.5) * n_old / n_new - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((n_new, n_old))
    for offset in range(-1, 3):
        weight = _cubic(np.abs(place - first - offset))
        np.add.at(matrix, (np.arange(n_new), np.clip(first + offset, 0, n_old - 1)), weight)
    return matrix


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
