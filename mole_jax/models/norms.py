"""Normalisation over the width, statistics in float32.

Einsum axes: see lora.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mole_jax.models import lora


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang & Sennrich 2019, equation 4)."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    ones = nn.initializers.ones_init()
    scale = self.param("scale", ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return y.astype(x.dtype) * lora.along_last(scale, x)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias (Ba et al. 2016, equation 4)."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    width = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (width,))
    bias = self.param("bias", nn.initializers.zeros_init(), (width,))
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.square(y - mean).mean(-1, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
    y = y * lora.along_last(scale, y) + lora.along_last(bias, y)
    return y.astype(x.dtype)


# A norm by its name in `DecoderConfig.norm`.
KINDS = {"rms": RMSNorm, "layer": LayerNorm}
