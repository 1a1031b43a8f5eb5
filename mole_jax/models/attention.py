"""Attention and rotary positions as pure functions.

Einsum axes: see lora.py.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mole_jax.models import block_attention, remat
from mole_jax.parallel import activations


def rotary_angles(
  positions: Int[Array, "B T"], rotary_dim: int, base: float
) -> tuple[Float[Array, "B T 1 R2"], Float[Array, "B T 1 R2"]]:
  """Cosines and sines of Su et al. 2021, equation 34, in float32.

  `rotary_dim` is how many dimensions of a head are turned.
  """
  exponents = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
  frequencies = base**-exponents
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "B T 1 R2"],
  sin: Float[Array, "B T 1 R2"],
) -> Float[Array, "B T N H"]:
  """Rotates dimension pairs (i, i + R/2), as Llama in Transformers does.

  R is the number of dimensions that the angles are for; those behind them, in
  StableLM and Phi, pass as they are.
  """
  width = 2 * cos.shape[-1]
  turned = _turn(x[..., :width], cos, sin)
  return jnp.concatenate([turned, x[..., width:]], axis=-1)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
  if activations.platform() != "tpu":
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
  # Halves of a head fill half of the 128 lanes; the matrix unit swaps them
  # exactly, and for nothing.
  swap = jnp.roll(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape[-1] // 2, axis=0)
  swapped = jnp.einsum(
    "BTNH,HI->BTNI",
    x,
    swap,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  cos = jnp.concatenate([cos, cos], axis=-1)
  sin = jnp.concatenate([-sin, sin], axis=-1)
  return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


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
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
  """Scaled dot-product attention, softmax in float32; N a multiple of K.

  `mask` is True where a query may look; None means everywhere, or with
  `is_causal` everywhere that is not later. With `segment_ids` the mask is
  `causal_segment_mask` of them, which some kernels rather have from them.
  """
  has_segments = segment_ids is not None
  kernel = choose_kernel(
    query, key, mask is not None, has_segments, is_causal or has_segments
  )
  if kernel == "splash":
    return splash(query, key, value, None if is_causal else segment_ids)
  if kernel == "blocks":
    named = _named(query, key, value)
    y = block_attention.attend(*named, mask, query.shape[-1] ** -0.5)
    return checkpoint_name(y, "attn_out")
  y = jax.nn.dot_product_attention(
    *_named(query, key, value),
    mask=None if mask is None else mask[:, None],
    is_causal=is_causal,
    implementation=kernel,
  )
  # Flash attention keeps its output with the sums of its softmax.
  return checkpoint_name(y, "attn_out") if kernel == "xla" else y


def _named(query: Array, key: Array, value: Array) -> tuple[Array, ...]:
  """For rematerialisation, in the shape that the kernel wants them in."""
  names = ("query", "key", "value")
  return tuple(map(checkpoint_name, (query, key, value), names))


def choose_kernel(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B J K H"],
  has_mask: bool,
  has_segments: bool,
  is_causal: bool = False,
) -> str:
  """A flash attention where there is one for what it is asked, else "xla".

  "cudnn" (GPU) takes 16-bit types, heads of at most 128 in multiples of 8 and,
  with a mask, even lengths. "splash" (TPU) takes segments, heads of 128 and
  lengths in multiples of 128. "blocks" (CPU) takes what is causal, be it within
  segments. Against a cache (J above T) queries are few.
  """
  tokens, head_dim = query.shape[1], query.shape[3]
  platform = activations.platform()
  if key.shape[1] != tokens:
    return "xla"
  if platform == "gpu":
    is_short = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = is_short and head_dim <= 128 and head_dim % 8 == 0
    return "cudnn" if fits and not (has_mask and tokens % 2) else "xla"
  if platform == "tpu" and has_segments:
    fits = tokens % 128 == 0 and head_dim % 128 == 0
    return "splash" if fits else "xla"
  return "blocks" if platform == "cpu" and is_causal else "xla"


def splash(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"] | None,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Causal attention by the TPU kernel of `jax.experimental.pallas`.

  Within segments, where there are any. Scores never leave the chip's fast
  memory: at 4,096 tokens XLA's attention writes 2 GiB of them for each row of
  32 heads, several times a layer.
  """
  heads = P(activations.ROWS, None, "tensor", None)

  def local(query, key, value, segment_ids):
    tokens, num_heads, head_dim = query.shape[1:]
    mask = splash_mask.CausalMask((tokens, tokens))
    block = next(n for n in (1024, 512, 256, 128) if tokens % n == 0)
    part = min(block, 512)
    kernel = splash_kernel.make_splash_mha(
      splash_mask.MultiHeadMask([mask] * num_heads),
      block_sizes=splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=part,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=part,
        use_fused_bwd_kernel=True,
      ),
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=remat.SPLASH,
      interpret=interpret,
    )

    def of_row(query, key, value, segments):
      ids = None
      if segments is not None:
        ids = splash_kernel.SegmentIds(segments, segments)
      return kernel(query, key, value, segment_ids=ids)

    query = query * jnp.asarray(head_dim**-0.5, query.dtype)
    query, key, value = _named(*(x.swapaxes(1, 2) for x in (query, key, value)))
    return jax.vmap(of_row)(query, key, value, segment_ids).swapaxes(1, 2)

  in_specs = (heads, heads, heads, P(activations.ROWS))
  apply = activations.per_device(local, in_specs, heads, is_checked=False)
  return apply(query, key, value, segment_ids)
