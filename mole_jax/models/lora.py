"""LoRA on one linear map: the only place where alpha / rank stands.

Einsum axes, here and in every model file:
  B batch, T tokens, D input width, F output width, N heads, K key-value heads,
  H head width, E experts, R LoRA rank, S segments, P patches, V vocabulary.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int8, PRNGKeyArray

from mole_jax.parallel import activations


@jax.custom_vjp
def matmul(
  x: Float[Array, "... D"], w: Float[Array, "D F"]
) -> Float[Array, "... F"]:
  """`x @ w`, with a backward pass that XLA need not transpose for.

  Contracting two leading axes, as autodiff of a batched product does, makes
  XLA:CPU copy both operands; on flattened rows the weight gradient is one
  `x^T dy`. `w` is cast to the dtype of x and may be finer: then its gradient
  is, too. Each result is rounded to its dtype once, within the product.
  """
  return _matmul_forward(x, w)[0]


def _rows(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


def _matmul_forward(x, w):
  y = _product(_rows(x), w.astype(x.dtype), x.dtype)
  return y.reshape(*x.shape[:-1], w.shape[-1]), (x, w)


def _product(a: Array, b: Array, dtype: jnp.dtype) -> Array:
  """Rows times matrix. A wider type asked for is written out as such by XLA."""
  return jnp.dot(a, b, preferred_element_type=dtype)


def _matmul_backward(residuals, dy):
  x, w = residuals
  dx = _product(_rows(dy), w.astype(x.dtype).T, x.dtype)
  dw = _product(_rows(x).T, _rows(dy), w.dtype)
  return dx.reshape(x.shape), dw


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantised_matmul(
  x: Float[Array, "... D"],
  w: Int8[Array, "D F"],
  scale: Float32[Array, " F"],
  is_input_cut: bool = False,
) -> Float[Array, "... F"]:
  """`matmul` by a frozen `w * scale`, which only exists within the product.

  Forward and backward make it anew, in the dtype of x: what is kept between
  them, and gathered over the mesh, is 8 bits. `is_input_cut`: the mesh axis
  `tensor` cuts D, not F. `w` and `scale` have no gradient.
  """
  y = _product(_rows(x), dequantised(w, scale, x.dtype, is_input_cut), x.dtype)
  return y.reshape(*x.shape[:-1], w.shape[-1])


def dequantised(
  w: Int8[Array, "D F"],
  scale: Float32[Array, " F"],
  dtype: jnp.dtype,
  is_input_cut: bool = False,
) -> Float[Array, "D F"]:
  """`w * scale`, gathered before it is made: as 8 bits."""
  axes = ("tensor", None) if is_input_cut else (None, "tensor")
  w = activations.constrain(w, *axes)
  return (w.astype(jnp.float32) * scale[None]).astype(dtype)


def _quantised_forward(x, w, scale, is_input_cut):
  return quantised_matmul(x, w, scale, is_input_cut), (w, scale)


def _quantised_backward(is_input_cut, residuals, dy):
  w = dequantised(*residuals, dy.dtype, is_input_cut)
  dx = _product(_rows(dy), w.T, dy.dtype)
  return dx.reshape(*dy.shape[:-1], w.shape[0]), None, None


quantised_matmul.defvjp(_quantised_forward, _quantised_backward)


def base_product(
  module: nn.Module,
  x: Float[Array, "... D"],
  features: int,
  init_scale: float,
  is_input_cut: bool = False,
) -> Float[Array, "... F"]:
  """x times a module's "kernel", which may be held in 8 bits.

  It is where "kernel_scale" stands beside it, see `training.quantised`; a
  module never makes one.
  """
  shape = (x.shape[-1], features)
  kernel = module.param("kernel", base_init(init_scale), shape)
  if not module.has_variable("params", "kernel_scale"):
    return matmul(x, kernel)
  scale = module.get_variable("params", "kernel_scale")
  return quantised_matmul(x, kernel, scale, is_input_cut)


@jax.custom_vjp
def written_out(x: Array) -> Array:
  """`x`, made once on a TPU; each consumer reads it.

  XLA:TPU makes an elementwise operand of a product anew for every block of
  the result: at 7B, SwiGLU within `down_proj` took three quarters more cycles
  than the product.
  """
  return _barrier(x)


def _barrier(x: Array) -> Array:
  """Nothing elsewhere: there it would only part what is fused."""
  is_tpu = activations.platform() == "tpu"
  return jax.lax.optimization_barrier(x) if is_tpu else x


written_out.defvjp(lambda x: (written_out(x), None), lambda _, dy: (dy,))


@jax.custom_vjp
def gradient_written_out(x: Array) -> Array:
  """`x`, whose gradient is made once; see `written_out`."""
  return x


gradient_written_out.defvjp(lambda x: (x, None), lambda _, dy: (_barrier(dy),))


def along_last(
  vector: Float[Array, " D"], like: Float[Array, "*N D"]
) -> Float[Array, "*N D"]:
  """Repeats a vector over all axes of `like` but the last, in its type."""
  vector = vector.astype(like.dtype)
  return jax.lax.broadcast_in_dim(vector, like.shape, (like.ndim - 1,))


def scaling(alpha: float, rank: int) -> float:
  """The factor on a low-rank product: alpha / rank (Hu et al. 2021, 4.1)."""
  return alpha / rank


def low_rank(
  x: Float[Array, "... D"],
  lora_a: Float[Array, "D R"],
  lora_b: Float[Array, "R F"],
  alpha: float,
) -> Float[Array, "... F"]:
  """(alpha / r) B A x (Hu et al. 2021, equation 3).

  The factor is applied in rank space, where it costs R products, not F; and
  where D is cut over devices, what they add up is R wide, not F.
  """
  z = checkpoint_name(activations.rows(matmul(x, lora_a)), "lora_z")
  z = z * jnp.asarray(scaling(alpha, lora_a.shape[-1]), x.dtype)
  return matmul(z, lora_b)


def dropout(
  module: nn.Module, x: Float[Array, "B T D"], rate: float, is_training: bool
) -> Float[Array, "B T D"]:
  """Inverted dropout with the next "dropout" key of a module.

  The identity at a rate of 0 and outside of training. One mask serves all
  adapters of an input, where PEFT draws one for each.
  """
  if rate == 0.0 or not is_training:
    return x
  keep = keep_mask(module.make_rng("dropout"), rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def keep_mask(
  key: PRNGKeyArray, rate: float, shape: tuple[int, int, int]
) -> Bool[Array, "B T D"]:
  """False with probability `rate`, independently.

  Four elements share a random word, a byte each, since words are what costs:
  with one for each, masks took an eighth of a 7B step on an H200. A byte knows
  256 thresholds: each token takes the one below or above 256 rate, by chance,
  so that the rate is exact. The words are made once, not in every consumer.
  Bytes of a word go to tokens a quarter of the row apart: side by side they
  would be half a tile of eight rows to a TPU, and to lay them out anew was two
  fifths of a 7B step, by XLA:TPU's cycles.
  """
  batch, tokens, width = shape
  quarter = -(-tokens // 4)
  words_key, tokens_key = jax.random.split(key)
  words = jax.random.bits(words_key, (batch, quarter, width))
  words = jax.lax.optimization_barrier(words)
  below = math.floor(256 * rate)
  is_above = jax.random.bernoulli(
    tokens_key, 256 * rate - below, (batch, 4 * quarter, 1)
  )
  thresholds = (below + is_above).astype(words.dtype)
  kept = [
    (words >> (8 * n)) & 255 >= thresholds[:, n * quarter : (n + 1) * quarter]
    for n in range(4)
  ]
  return jnp.concatenate(kept, axis=1)[:, :tokens]


def kaiming_uniform(key, shape, dtype=jnp.float32) -> Array:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in the second-last axis.

  What `torch.nn.Linear` and LoRA's A start from: kaiming_uniform(a=sqrt(5)).
  """
  bound = 1.0 / math.sqrt(shape[-2])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def base_init(scale: float) -> nn.initializers.Initializer:
  """How a base kernel starts: variance `scale` / fan_in, truncated normal."""
  return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


class LoraLinear(nn.Module):
  """y = x W + b + (alpha / r) (u A) B; `rank=0` is the plain map.

  u is `adapter_input`, by default x: x after dropout, say, which maps of the
  same input share. `is_input_cut`: the mesh axis `tensor` cuts x, not y.
  """

  features: int
  use_bias: bool = False
  rank: int = 0
  alpha: float = 1.0
  init_scale: float = 1.0
  is_input_cut: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "... D"],
    adapter_input: Float[Array, "... D"] | None = None,
  ) -> Float[Array, "... F"]:
    width = x.shape[-1]
    y = base_product(self, x, self.features, self.init_scale, self.is_input_cut)
    if self.use_bias:
      zeros = nn.initializers.zeros_init()
      y = y + along_last(self.param("bias", zeros, (self.features,)), y)
    if self.rank == 0:
      return y
    lora_a = self.param("lora_a", kaiming_uniform, (width, self.rank))
    zeros = nn.initializers.zeros_init()
    lora_b = self.param("lora_b", zeros, (self.rank, self.features))
    u = x if adapter_input is None else adapter_input
    return y + low_rank(u, lora_a, lora_b, self.alpha)
