"""LoRA's own pieces: the product with its own VJP, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import lora


def test_matmul_has_the_gradients_of_a_product():
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, ((2, 5, 7), (7, 3), (2, 5, 3)), strict=True)
  )
  got = jax.vjp(lora.matmul, x, w)[1](dy)
  want = jax.vjp(lambda x, w: x @ w, x, w)[1](dy)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_fine_parameter_has_a_fine_gradient():
  """bfloat16 rounds the product, not the gradient of a float32 parameter."""
  x = jnp.full((1, 1000, 1), 1.0, jnp.bfloat16)
  w = jnp.ones((1, 1), jnp.float32)
  y, vjp = jax.vjp(lora.matmul, x, w)
  assert y.dtype == jnp.bfloat16
  dx, dw = vjp(jnp.ones_like(y).at[0, 0].set(1 + 2**-7))
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  assert dw[0, 0] == 1000 + 2**-7  # bfloat16 knows 1000 and 1004.


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 1 / 256])
@pytest.mark.parametrize("tokens", [64, 63, 1])
def test_dropout_drops_the_share_it_is_told(rate, tokens):
  shape = (8, tokens, 4096)
  dropped = ~np.asarray(lora.keep_mask(jax.random.key(1), rate, shape))
  deviation = (rate * (1 - rate) / dropped.size) ** 0.5
  # Thresholds of whole tokens: a little more variance than independent draws.
  fraction = 256 * rate % 1
  of_tokens = (fraction * (1 - fraction) / (8 * tokens)) ** 0.5 / 256
  assert abs(dropped.mean() - rate) < 4 * (deviation + of_tokens)


def test_elements_of_one_word_are_dropped_independently():
  dropped = ~np.asarray(lora.keep_mask(jax.random.key(2), 0.25, (4, 64, 4096)))
  words = dropped.reshape(4, 16, 4, 4096).transpose(2, 0, 1, 3).reshape(4, -1)
  correlation = np.corrcoef(words)
  off = correlation[~np.eye(4, dtype=bool)]
  assert np.abs(off).max() < 4 / words.shape[1] ** 0.5
