"""Causal attention in blocks of queries, for CPUs.

What autodiff makes of softmax attention computes all scores, half of which
causality throws away, and sums over keys in its backward pass what is a sum
over a head's dimensions (Dao 2023, FlashAttention-2, algorithm 2: D = rowsum(dO
o O)). On two cores this takes half as long as that.

Einsum axes: see lora.py; "G" are query heads that share a key head, "C" queries
of a block, "S" the keys up to its last.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BLOCK = 128
# Blocks are written out one after the other, so their number stays small.
MAX_BLOCKS = 8
_BATCH = ((0, 1), (0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  mask: Bool[Array, "B T T"] | None,
  scale: float,
) -> Float[Array, "B T N H"]:
  """Softmax attention to what is not later; softmax in float32.

  `mask` is True where a query may look, nowhere later than itself; None is
  everywhere that is not later.
  """
  return _forward(query, key, value, mask, scale)[0]


def _blocks(tokens: int) -> list[slice]:
  size = max(BLOCK, -(-tokens // MAX_BLOCKS))
  return [
    slice(start, min(start + size, tokens)) for start in range(0, tokens, size)
  ]


def _product(a, b, contract) -> Array:
  return jax.lax.dot_general(
    a, b, (contract, _BATCH), preferred_element_type=jnp.float32
  )


def _heads_first(x: Array, num_groups: int) -> Array:
  """[B T K*G H] -> [B K G T H]."""
  batch, tokens, heads, width = x.shape
  shape = (batch, tokens, heads // num_groups, num_groups, width)
  return x.reshape(shape).transpose(0, 2, 3, 1, 4)


def _tokens_first(x: Array, dtype: jnp.dtype) -> Array:
  """[B K G T H] -> [B T K*G H]."""
  batch, keys, groups, tokens, width = x.shape
  x = x.transpose(0, 3, 1, 2, 4).astype(dtype)
  return x.reshape(batch, tokens, keys * groups, width)


def _may_look(mask, block: slice) -> Bool[Array, "... C S"]:
  if mask is not None:
    return mask[:, None, None, block, : block.stop]
  count = block.stop - block.start
  return jnp.tril(jnp.ones((count, block.stop), bool), block.start)


def _forward(query, key, value, mask, scale):
  groups = query.shape[2] // key.shape[2]
  q = _heads_first(query * jnp.asarray(scale, query.dtype), groups)
  k, v = (x.swapaxes(1, 2) for x in (key, value))
  outputs, weights = [], []
  for block in _blocks(query.shape[1]):
    scores = _product(q[..., block, :], k[:, :, : block.stop], ((4,), (3,)))
    least = jnp.finfo(jnp.float32).min
    scores = jnp.where(_may_look(mask, block), scores, least)
    exps = jnp.exp(scores - scores.max(-1, keepdims=True))
    probs = (exps / exps.sum(-1, keepdims=True)).astype(v.dtype)
    outputs.append(_product(probs, v[:, :, : block.stop], ((4,), (2,))))
    weights.append(probs)
  output = jnp.concatenate(outputs, axis=3).astype(value.dtype)
  residuals = (q, k, v, weights, output)
  return _tokens_first(output, value.dtype), residuals


def _backward(scale, residuals, dy):
  q, k, v, weights, output = residuals
  dy = _heads_first(dy, q.shape[2])
  rows = (dy.astype(jnp.float32) * output).sum(-1, keepdims=True)
  dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  dq = []
  for block, probs in zip(_blocks(q.shape[3]), weights, strict=True):
    own, keys = dy[..., block, :], slice(0, block.stop)
    dv = dv.at[:, :, keys].add(_product(probs, own, ((2, 3), (2, 3))))
    dprobs = _product(own, v[:, :, keys], ((4,), (3,)))
    dscores = (probs * (dprobs - rows[..., block, :])).astype(q.dtype)
    dq.append(scale * _product(dscores, k[:, :, keys], ((4,), (2,))))
    found = _product(dscores, q[..., block, :], ((2, 3), (2, 3)))
    dk = dk.at[:, :, keys].add(found)
  dq = _tokens_first(jnp.concatenate(dq, axis=3), q.dtype)
  dk, dv = (x.swapaxes(1, 2).astype(k.dtype) for x in (dk, dv))
  return dq, dk, dv, None


attend.defvjp(_forward, _backward)
