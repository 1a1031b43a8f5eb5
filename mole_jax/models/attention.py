"""Attention and rotary positions as pure functions.

Einsum axes: see lora.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mole_jax.parallel import activations


def rotary_angles(
  positions: Int[Array, "B T"], head_dim: int, base: float
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
  """Cosines and sines of Su et al. 2021, equation 34, in float32."""
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = base**-exponents
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "B T 1 H2"],
  sin: Float[Array, "B T 1 H2"],
) -> Float[Array, "B T N H"]:
  """Rotates dimension pairs (i, i + H/2), as Llama in Transformers does."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def causal_segment_mask(
  segment_ids: Int[Array, "B T"],
) -> Bool[Array, "B T T"]:
  """True where a query may look: same segment, not later.

  Padding (segment 0) looks at padding, so no row of the softmax is empty.
  """
  tokens = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((tokens, tokens), bool))
  return (segment_ids[:, :, None] == segment_ids[:, None, :]) & causal[None]


def attend(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B J K H"],
  value: Float[Array, "B J K H"],
  mask: Bool[Array, "B T J"] | None,
  is_causal: bool = False,
) -> Float[Array, "B T N H"]:
  """Scaled dot-product attention, softmax in float32; N a multiple of K.

  `mask` is True where a query may look; None means everywhere, or with
  `is_causal` everywhere that is not later.
  """
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=None if mask is None else mask[:, None],
    is_causal=is_causal,
    implementation=choose_kernel(query, key, mask is not None),
  )


def choose_kernel(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B J K H"],
  has_mask: bool,
) -> str:
  """ "cudnn" (flash attention) on a GPU for what it takes, else "xla".

  cuDNN takes 16-bit types, heads of at most 128 in multiples of 8 and, with a
  mask, even lengths. Against a cache (J above T) queries are few.
  """
  tokens, head_dim = query.shape[1], query.shape[3]
  fits = (
    query.dtype in (jnp.bfloat16, jnp.float16)
    and head_dim <= 128
    and head_dim % 8 == 0
    and key.shape[1] == tokens
    and not (has_mask and tokens % 2)
  )
  return "cudnn" if fits and activations.platform() == "gpu" else "xla"
