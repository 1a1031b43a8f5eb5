"""Rows into the slots of their experts and back, with `jax.lax`.

A permutation's default VJP is a scatter-add; here every direction is a gather,
since each map is told its inverse. Shapes are static.

Axes: "N" rows, "D" their width, "F" output width; "M" are slots, "G" blocks of
equally many slots, each of one expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
  """Where each row goes and where it comes back from.

  chosen: experts of each row, for its gate weights.
  choice_of_slot: choice (n * topk + k) that fills a slot, N topk where none.
  slot_of_choice: slot of a row's k-th choice, M where it has none.
  expert_of_block: expert that a block belongs to.
  """

  chosen: Int[Array, "N topk"]
  choice_of_slot: Int[Array, " M"]
  slot_of_choice: Int[Array, "N topk"]
  expert_of_block: Int[Array, " G"]

  @property
  def row_of_slot(self) -> Int[Array, " M"]:
    """Row that fills a slot, N where none does."""
    return self.choice_of_slot // self.chosen.shape[1]


class _Sorted(NamedTuple):
  """Choices sorted by a key: `order` of the choices, `place` of each within
  its key, and of each key its `first` in the order and its `count`."""

  order: Int[Array, " n"]
  place: Int[Array, " n"]
  first: Int[Array, " keys"]
  count: Int[Array, " keys"]


def _sort(keys: Int[Array, " n"], num_keys: int) -> _Sorted:
  """A stable sort; choices with the key num_keys come last, uncounted."""
  num_choices = keys.shape[0]
  count = jnp.sum(jax.nn.one_hot(keys, num_keys, dtype=jnp.int32), 0)
  first = jnp.cumsum(count) - count
  order = jnp.argsort(keys, stable=True).astype(jnp.int32)
  rank = jnp.zeros(num_choices, jnp.int32)
  rank = rank.at[order].set(
    jnp.arange(num_choices, dtype=jnp.int32), unique_indices=True
  )
  return _Sorted(order, rank - first[keys], first, count)


def make_plan(
  chosen: Int[Array, "N topk"], num_experts: int, block_rows: int
) -> Plan:
  """Sorts choices by expert and pads each expert to whole blocks.

  Drops nothing: N rows choosing k experts fill at most ceil(N k / block) + E
  blocks. A choice of num_experts is none and takes no slot.
  """
  num_rows, top_k = chosen.shape
  num_choices = num_rows * top_k
  num_blocks = -(-num_choices // block_rows) + num_experts
  num_slots = num_blocks * block_rows
  experts = chosen.reshape(-1)
  done = _sort(experts, num_experts)
  blocks = -(-done.count // block_rows)
  last_block = jnp.cumsum(blocks)
  first_slot = (last_block - blocks) * block_rows
  slot = first_slot[experts] + done.place
  slot = jnp.where(experts < num_experts, slot, num_slots)
  block = jnp.arange(num_blocks)
  expert_of_block = jnp.searchsorted(last_block, block, side="right")
  expert_of_block = jnp.minimum(expert_of_block, num_experts - 1)
  expert = jnp.repeat(expert_of_block, block_rows)
  place = jnp.arange(num_slots) - first_slot[expert]
  choice = done.order[jnp.minimum(done.first[expert] + place, num_choices - 1)]
  return Plan(
    chosen,
    jnp.where(place < done.count[expert], choice, num_choices),
    slot.reshape(num_rows, top_k).astype(jnp.int32),
    expert_of_block.astype(jnp.int32),
  )


def make_bounded_plan(
  chosen: Int[Array, "N topk"],
  num_experts: int,
  capacity: int,
  num_groups: int = 1,
) -> Plan:
  """Gives each expert `capacity` slots a group of rows; drops what exceeds it.

  First choices come before second ones, each in the order of the rows (GShard,
  Lepikhin et al. 2020, algorithm 1). Groups are runs of N / num_groups rows;
  a block is an expert's slots of a group, blocks are ordered by expert, then
  group. A choice of num_experts is none and takes no slot.
  """
  num_rows, top_k = chosen.shape
  num_choices = num_rows * top_k
  num_keys = num_experts * num_groups
  num_slots = num_keys * capacity
  group = jnp.arange(num_rows, dtype=jnp.int32) // (num_rows // num_groups)
  keys = jnp.where(
    chosen < num_experts, chosen * num_groups + group[:, None], num_keys
  )
  keys = keys.T.reshape(-1)  # First choices before second ones.
  done = _sort(keys, num_keys)
  is_kept = (keys < num_keys) & (done.place < capacity)
  slot = jnp.where(is_kept, keys * capacity + done.place, num_slots)
  key, place = jnp.divmod(jnp.arange(num_slots, dtype=jnp.int32), capacity)
  index = done.order[jnp.minimum(done.first[key] + place, num_choices - 1)]
  choice = index % num_rows * top_k + index // num_rows
  return Plan(
    chosen,
    jnp.where(place < done.count[key], choice, num_choices),
    slot.reshape(top_k, num_rows).T.astype(jnp.int32),
    jnp.arange(num_keys, dtype=jnp.int32) // num_groups,
  )


def take_rows(
  x: Float[Array, "N D"], index: Int[Array, " M"]
) -> Float[Array, "M D"]:
  """`x[index]` by `jax.lax.gather`; an index past the end gives zeros.

  Its own VJP is a scatter-add: for use inside of VJPs.
  """
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


def no_gradient(tree):
  """Cotangents of integer arguments."""
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


def _fill(x, plan):
  return take_rows(x, plan.row_of_slot)


def _add_up(rows, plan):
  choices = plan.slot_of_choice
  taken = take_rows(rows, choices.reshape(-1))
  return taken.reshape(*choices.shape, -1).sum(1)


@jax.custom_vjp
def dispatch(x: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
  """Rows in their slots, zeros in slots that no row fills."""
  return _fill(x, plan)


dispatch.defvjp(
  lambda x, plan: (_fill(x, plan), plan),
  lambda plan, d_rows: (_add_up(d_rows, plan), no_gradient(plan)),
)


@jax.custom_vjp
def collect(rows: Float[Array, "M F"], plan: Plan) -> Float[Array, "N F"]:
  """y_n = sum_k rows[slot of n's k-th choice]: the transpose of `dispatch`."""
  return _add_up(rows, plan)


collect.defvjp(
  lambda rows, plan: (_add_up(rows, plan), plan),
  lambda plan, dy: (_fill(dy, plan), no_gradient(plan)),
)


@jax.custom_vjp
def combine(
  outputs: Float[Array, "M F"], weights: Float[Array, "N topk"], plan: Plan
) -> Float[Array, "N F"]:
  """y_n = sum_k w_nk outputs[slot of n's k-th choice], in outputs' dtype."""
  return _combine_forward(outputs, weights, plan)[0]


def _combine_forward(outputs, weights, plan):
  num_rows, top_k = weights.shape
  taken = take_rows(outputs, plan.slot_of_choice.reshape(-1))
  taken = taken.reshape(num_rows, top_k, -1)
  y = jnp.sum(weights[..., None] * taken, axis=1).astype(outputs.dtype)
  return y, (taken, weights, plan)


def _combine_backward(residuals, dy):
  taken, weights, plan = residuals
  dtype = jnp.promote_types(dy.dtype, weights.dtype)  # Gates may be float32.
  d_weights = jnp.einsum("NF,NkF->Nk", dy, taken, preferred_element_type=dtype)
  weight_of_slot = take_rows(weights.reshape(-1, 1), plan.choice_of_slot)
  d_outputs = take_rows(dy, plan.row_of_slot) * weight_of_slot
  return (
    d_outputs.astype(dy.dtype),
    d_weights.astype(weights.dtype),
    no_gradient(plan),
  )


combine.defvjp(_combine_forward, _combine_backward)
