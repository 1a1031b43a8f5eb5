"""Slots and the rows that fill them, against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_jax.parallel import permutation


def make_chosen(num_rows, num_experts, top_k, seed=0, masked=0.2):
  """Distinct experts of each row; of masked rows num_experts, which is none."""
  rng = np.random.default_rng(seed)
  order = np.argsort(rng.random((num_rows, num_experts)), axis=1)
  chosen = np.where(rng.random((num_rows, 1)) < masked, num_experts, order)
  return chosen[:, :top_k].astype(np.int32)


def check_inverse(plan):
  """Each map undoes the other; a slot holds one choice at most."""
  choice_of_slot = np.asarray(plan.choice_of_slot)
  slot_of_choice = np.asarray(plan.slot_of_choice).ravel()
  slots, choices = len(choice_of_slot), len(slot_of_choice)
  placed = np.flatnonzero(slot_of_choice < slots)
  np.testing.assert_array_equal(choice_of_slot[slot_of_choice[placed]], placed)
  assert np.sum(choice_of_slot < choices) == len(placed)
  top_k = plan.chosen.shape[1]
  np.testing.assert_array_equal(plan.row_of_slot, choice_of_slot // top_k)


# Rows, experts, choices a row, rows a block or capacity: each shape compiles.
shapes = st.sampled_from(
  [(9, 5, 2, 4), (7, 3, 1, 2), (1, 1, 1, 1), (6, 2, 2, 3)]
)
make_plan = jax.jit(permutation.make_plan, static_argnums=(1, 2))
make_bounded_plan = jax.jit(
  permutation.make_bounded_plan, static_argnums=(1, 2, 3)
)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_blocks_hold_every_choice_of_their_expert(shape, seed):
  num_rows, num_experts, top_k, block_rows = shape
  chosen = make_chosen(num_rows, num_experts, top_k, seed)
  plan = make_plan(chosen, num_experts, block_rows)
  check_inverse(plan)
  expert_of_slot = np.repeat(np.asarray(plan.expert_of_block), block_rows)
  assert np.all(np.diff(expert_of_slot) >= 0)
  slots = np.asarray(plan.slot_of_choice)
  is_placed = chosen < num_experts
  np.testing.assert_array_equal(slots < len(expert_of_slot), is_placed)
  expected = chosen[is_placed]
  np.testing.assert_array_equal(expert_of_slot[slots[is_placed]], expected)


@settings(max_examples=30, deadline=None)
@given(
  shape=shapes, num_groups=st.sampled_from([1, 3]), seed=st.integers(0, 99)
)
def test_bounded_slots_go_to_first_choices_in_the_order_of_rows(
  shape, num_groups, seed
):
  group_rows, num_experts, top_k, capacity = shape
  num_rows = group_rows * num_groups
  chosen = make_chosen(num_rows, num_experts, top_k, seed)
  expected = np.full(chosen.shape, num_experts * num_groups * capacity)
  used = np.zeros((num_experts, num_groups), int)
  for k in range(chosen.shape[1]):
    for n in range(num_rows):
      e, g = chosen[n, k], n // group_rows
      if e < num_experts and used[e, g] < capacity:
        expected[n, k] = (e * num_groups + g) * capacity + used[e, g]
        used[e, g] += 1
  plan = make_bounded_plan(chosen, num_experts, capacity, num_groups)
  np.testing.assert_array_equal(plan.slot_of_choice, expected)
  check_inverse(plan)
  owners = np.repeat(np.arange(num_experts), num_groups)
  np.testing.assert_array_equal(plan.expert_of_block, owners)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity", [None, 2])
def test_moves_are_the_products_with_a_matrix_of_zeros_and_ones(
  top_k, capacity
):
  """Values, and the VJP of each: the product with the transpose."""
  chosen = jnp.asarray(make_chosen(11, 3, top_k))
  if capacity is None:
    plan = make_plan(chosen, 3, 4)
  else:
    plan = make_bounded_plan(chosen, 3, capacity)
  num_slots, width = len(plan.choice_of_slot), 5
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, rows, weights = (
    normal(11, width),
    normal(num_slots, width),
    normal(*chosen.shape),
  )
  moves = np.zeros((11, top_k, num_slots), np.float32)
  for n, k in np.ndindex(*chosen.shape):
    if plan.slot_of_choice[n, k] < num_slots:
      moves[n, k, plan.slot_of_choice[n, k]] = 1
  moves = jnp.asarray(moves)
  plain = dict(
    dispatch=lambda x: jnp.einsum("nks,nd->sd", moves, x),
    collect=lambda rows: jnp.einsum("nks,sd->nd", moves, rows),
    combine=lambda rows, w: jnp.einsum("nks,sd,nk->nd", moves, rows, w),
  )
  for name, args in (
    ("dispatch", (x,)),
    ("collect", (rows,)),
    ("combine", (rows, weights)),
  ):
    move = lambda *args, name=name: getattr(permutation, name)(*args, plan)
    y, pull = jax.vjp(move, *args)
    expected_y, expected_pull = jax.vjp(plain[name], *args)
    np.testing.assert_allclose(y, expected_y, atol=1e-6)
    dy = normal(*y.shape)
    for one, other in zip(pull(dy), expected_pull(dy), strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5)
