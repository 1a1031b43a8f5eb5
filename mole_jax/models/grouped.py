"""Products of rows that lie in blocks of one expert each.

Einsum axes: see lora.py; "M" are block rows, "G" blocks, "C" rows per block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
