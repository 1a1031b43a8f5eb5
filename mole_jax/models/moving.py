"""Sorting rows by expert, into padded blocks, and back, with `jax.lax`.

A permutation's default VJP is a scatter-add; here every direction is a gather,
since each map is told its inverse. Nothing is dropped and shapes are static:
N rows choosing k of E experts fill at most ceil(N k / block) + E blocks.

Einsum axes: see lora.py; "M" are block rows, "G" blocks, "C" rows per block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
  """Where each row goes and where it comes back from.

  chosen: experts of each row, for its gate weights.
  row_of_slot: row that fills a slot of the blocks, N where none does.
  slot_of_choice: slot of a row's k-th choice.
  expert_of_block: expert that a block belongs to.
  """

  chosen: Int[Array, "N topk"]
  row_of_slot: Int[Array, " M"]
  slot_of_choice: Int[Array, "N topk"]
  expert_of_block: Int[Array, " G"]


def make_plan(
  chosen: Int[Array, "N topk"], num_experts: int, block_rows: int
) -> Plan:
  """Sorts choices by expert and pads each expert to whole blocks."""
  num_rows, top_k = chosen.shape
  num_choices = num_rows * top_k
  num_blocks = -(-num_choices // block_rows) + num_experts
  experts = chosen.reshape(-1)
  counts = jnp.sum(jax.nn.one_hot(experts, num_experts, dtype=jnp.int32), 0)
  blocks = -(-counts // block_rows)
  last_block = jnp.cumsum(blocks)
  first_slot = (last_block - blocks) * block_rows
  first_choice = jnp.cumsum(counts) - counts
  order = jnp.argsort(experts, stable=True).astype(jnp.int32)
  rank = jnp.zeros(num_choices, jnp.int32)
  rank = rank.at[order].set(jnp.arange(num_choices, dtype=jnp.int32))
  slot = first_slot[experts] + rank - first_choice[experts]
  row_of_slot = jnp.full(num_blocks * block_rows, num_rows, jnp.int32)
  row_of_slot = row_of_slot.at[slot].set(
    jnp.arange(num_choices, dtype=jnp.int32) // top_k, unique_indices=True
  )
  block = jnp.arange(num_blocks)
  expert_of_block = jnp.searchsorted(last_block, block, side="right")
  return Plan(
    chosen,
    row_of_slot,
    slot.reshape(num_rows, top_k),
    jnp.minimum(expert_of_block, num_experts - 1).astype(jnp.int32),
  )


def _take_rows(x: Float[Array, "N D"], index: Int[Array, " M"]) -> Array:
  """`x[index]` by `jax.lax.gather`; an index past the end gives zeros."""
  dimensions = jax.lax.GatherDimensionNumbers(
    offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
  )
  return jax.lax.gather(
    x,
    index[:, None],
    dimensions,
    slice_sizes=(1, x.shape[1]),
    mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    fill_value=0,
  )


def _no_gradient(tree):
  """Cotangents of integer arguments."""
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def dispatch(x: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
  """Rows in block order, zeros in slots that no row fills."""
  return _take_rows(x, plan.row_of_slot)


def _dispatch_forward(x, plan):
  return dispatch(x, plan), plan


def _dispatch_backward(plan, d_rows):
  choices = plan.slot_of_choice
  dx = _take_rows(d_rows, choices.reshape(-1))
  return dx.reshape(*choices.shape, -1).sum(1), _no_gradient(plan)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
  outputs: Float[Array, "M F"], weights: Float[Array, "N topk"], plan: Plan
) -> Float[Array, "N F"]:
  """y_n = sum_k w_nk outputs[slot of n's k-th choice]."""
  return _combine_forward(outputs, weights, plan)[0]


def _combine_forward(outputs, weights, plan):
  num_rows, top_k = weights.shape
  taken = _take_rows(outputs, plan.slot_of_choice.reshape(-1))
  taken = taken.reshape(num_rows, top_k, -1)
  return jnp.sum(weights[..., None] * taken, axis=1), (taken, weights, plan)


def _combine_backward(residuals, dy):
  taken, weights, plan = residuals
  d_weights = jnp.einsum("NF,NkF->Nk", dy, taken)
  slots = plan.row_of_slot.shape[0]
  weight_of_slot = jnp.zeros(slots, weights.dtype)
  weight_of_slot = weight_of_slot.at[plan.slot_of_choice.reshape(-1)].set(
    weights.reshape(-1), unique_indices=True
  )
  d_outputs = _take_rows(dy, plan.row_of_slot) * weight_of_slot[:, None]
  return d_outputs, d_weights.astype(weights.dtype), _no_gradient(plan)


combine.defvjp(_combine_forward, _combine_backward)


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
    _no_gradient(plan),
  )


grouped_low_rank.defvjp(_grouped_forward, _grouped_backward)
