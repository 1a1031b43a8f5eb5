"""Low-rank products of rows that lie in blocks of one expert each.

Einsum axes: see lora.py; "M" are block rows, "G" blocks, "C" rows per block.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mole_jax.parallel.permutation import Plan, no_gradient


@jax.custom_vjp
def grouped_low_rank(
  rows: Float[Array, "M D"],
  lora_a: Float[Array, "E D R"],
  lora_b: Float[Array, "E R F"],
  plan: Plan,
) -> Float[Array, "M F"]:
  """(rows A_e) B_e with the expert of each block of rows."""
  return _grouped_forward(rows, lora_a, lora_b, plan)[0]


def _blocks(rows: Array, plan: Plan) -> Array:
  return rows.reshape(plan.expert_of_block.shape[0], -1, rows.shape[-1])


def _grouped_forward(rows, lora_a, lora_b, plan):
  x = _blocks(rows, plan)
  z = jnp.einsum("GCD,GDR->GCR", x, lora_a[plan.expert_of_block])
  y = jnp.einsum("GCR,GRF->GCF", z, lora_b[plan.expert_of_block])
  return y.reshape(rows.shape[0], -1), (rows, z, lora_a, lora_b, plan)


def _grouped_backward(residuals, dy):
  rows, z, lora_a, lora_b, plan = residuals
  experts = plan.expert_of_block
  dy = _blocks(dy, plan)
  dz = jnp.einsum("GCF,GRF->GCR", dy, lora_b[experts])
  dx = jnp.einsum("GCR,GDR->GCD", dz, lora_a[experts])
  # Blocks are sorted by expert; an expert without a row owns only blocks of
  # zero rows, or none, so its gradient is exactly zero.
  add = functools.partial(
    jax.ops.segment_sum,
    segment_ids=experts,
    num_segments=lora_a.shape[0],
    indices_are_sorted=True,
  )
  d_lora_a = add(jnp.einsum("GCD,GCR->GDR", _blocks(rows, plan), dz))
  d_lora_b = add(jnp.einsum("GCR,GCF->GRF", z, dy))
  return (
    dx.reshape(rows.shape),
    d_lora_a.astype(lora_a.dtype),
    d_lora_b.astype(lora_b.dtype),
    no_gradient(plan),
  )


grouped_low_rank.defvjp(_grouped_forward, _grouped_backward)
