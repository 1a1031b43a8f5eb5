"""Products of rows that lie in blocks of one expert each.

Einsum axes: see lora.py; "M" are block rows, "G" blocks, "C" rows per block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mole_jax.parallel.activations import varying_alike
from mole_jax.parallel.permutation import Plan, no_gradient


@jax.custom_vjp
def grouped_product(
  rows: Float[Array, "M D"], weights: Float[Array, "E D F"], plan: Plan
) -> Float[Array, "M F"]:
  """rows W_e with the expert of each block of rows; dtypes as `lora.matmul`."""
  return _forward(rows, weights, plan)[0]


def _blocks(rows: Array, plan: Plan) -> Array:
  return rows.reshape(plan.expert_of_block.shape[0], -1, rows.shape[-1])


def _forward(rows, weights, plan):
  x = _blocks(rows, plan)
  w = weights.astype(rows.dtype)[plan.expert_of_block]
  y = jnp.einsum("GCD,GDF->GCF", x, w)
  return y.reshape(rows.shape[0], -1), (rows, weights, plan)


def _backward(residuals, dy):
  rows, weights, plan = residuals
  experts = plan.expert_of_block
  dy = _blocks(dy, plan)
  w = weights.astype(rows.dtype)[experts]
  dx = jnp.einsum("GCF,GDF->GCD", dy, w)
  # Blocks are sorted by expert; an expert without a row owns only blocks of
  # zero rows, or none, so its gradient is exactly zero.
  dw = jax.ops.segment_sum(
    jnp.einsum(
      "GCD,GCF->GDF",
      _blocks(rows, plan),
      dy,
      preferred_element_type=weights.dtype,
    ),
    segment_ids=experts,
    num_segments=weights.shape[0],
    indices_are_sorted=True,
  )
  return dx.reshape(rows.shape), dw, no_gradient(plan)


grouped_product.defvjp(_forward, _backward)


@jax.custom_vjp
def block_product(
  blocks: Float[Array, "G C D"],
  weights: Float[Array, "E D F"],
  expert_of_block: Int[Array, " G"] | None,
) -> Float[Array, "G C F"]:
  """Each block times its expert's matrix; dtypes as `lora.matmul`.

  For whole FFNs, whose matrices are too large to be copied for each block:
  block after block reads its expert's where it lies, and adds to its gradient
  there. `expert_of_block` is None where block e is that of expert e (all
  experts have the same capacity): then it is one batched product.
  """
  return _block_forward(blocks, weights, expert_of_block)[0]


def _block_forward(blocks, weights, expert_of_block):
  w = weights.astype(blocks.dtype)
  if expert_of_block is None:
    y = jnp.einsum("ECD,EDF->ECF", blocks, w)
  else:
    one = lambda block: block[0] @ w[block[1]]
    y = jax.lax.map(one, (blocks, expert_of_block))
  return y, (blocks, weights, expert_of_block)


def _block_backward(residuals, dy):
  blocks, weights, expert_of_block = residuals
  w, dtype = weights.astype(blocks.dtype), weights.dtype
  if expert_of_block is None:
    dx = jnp.einsum("ECF,EDF->ECD", dy, w)
    dw = jnp.einsum("ECD,ECF->EDF", blocks, dy, preferred_element_type=dtype)
    return dx, dw, None

  def body(dw, block):
    x, dy, expert = block
    added = jnp.dot(x.T, dy, preferred_element_type=dtype)
    return dw.at[expert].add(added), dy @ w[expert].T

  zeros, blocks = varying_alike(jnp.zeros_like(weights), blocks)
  dw, dx = jax.lax.scan(body, zeros, (blocks, dy, expert_of_block))
  return dx, dw, no_gradient(expert_of_block)


block_product.defvjp(_block_forward, _block_backward)
