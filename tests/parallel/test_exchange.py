"""Tokens that travel to their experts against a NumPy loop over tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mole_jax.parallel import exchange, mesh

EXPERTS, ROWS, WIDTH, HIDDEN = 8, 48, 6, 5  # ROWS over all devices.
BLOCK = 4
TOKENS = P(("data", "expert"))
# Devices on the axes data and expert.
MESHES = [(1, 1), (1, 2), (4, 2), (2, 4), (1, 8)]
CASES = list(itertools.product(MESHES, [1, 2], [None, 2]))
SCENARIOS = ("random", "one_expert", "empty_expert", "padding")


def make_mesh(data, expert):
  sizes = dict(data=data, fsdp=1, expert=expert, tensor=1)
  return mesh.make_mesh(sizes, jax.devices()[: data * expert])


def make_inputs(top_k, scenario, num_experts=EXPERTS, num_rows=ROWS):
  """Rows, chosen, gate weights, is_token, expert parameters, d loss / d y."""
  rng = np.random.default_rng(SCENARIOS.index(scenario))
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  logits = rng.normal(size=(num_rows, num_experts))
  if scenario == "one_expert":
    logits[:, 5] = 10.0
  if scenario == "empty_expert":
    logits[:, 5] = -10.0
  chosen = np.argsort(-logits, axis=1)[:, :top_k].astype(np.int32)
  is_token = np.ones(num_rows, bool)
  if scenario == "padding":
    is_token = rng.random(num_rows) < 0.6
  experts = dict(
    w1=normal(num_experts, WIDTH, HIDDEN),
    b1=normal(num_experts, HIDDEN),
    w2=normal(num_experts, HIDDEN, WIDTH),
    b2=normal(num_experts, WIDTH),
  )
  weights = rng.random((num_rows, top_k)).astype(np.float32)
  rows, dy = normal(num_rows, WIDTH), normal(num_rows, WIDTH)
  return rows, chosen, weights, is_token, experts, dy


def numpy_kept(chosen, is_token, capacity, num_groups):
  """First choices before second ones, in token order, group by group."""
  kept = np.zeros(chosen.shape, bool)
  for group in np.split(np.arange(len(chosen)), num_groups):
    used = {}
    for k in range(chosen.shape[1]):
      for n in group:
        if is_token[n]:
          place = used.get(chosen[n, k], 0)
          used[chosen[n, k]] = place + 1
          kept[n, k] = capacity is None or place < capacity
  return kept


def numpy_layer(rows, chosen, weights, kept, experts, dy):
  """Values and gradients, one choice at a time, in float64."""
  x, weights, dy = (np.asarray(v, np.float64) for v in (rows, weights, dy))
  p = {name: np.asarray(v, np.float64) for name, v in experts.items()}
  y, dx, dw = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
  d = {name: np.zeros_like(v) for name, v in p.items()}
  for n, k in np.argwhere(kept):
    e = chosen[n, k]
    h = np.tanh(x[n] @ p["w1"][e] + p["b1"][e])
    out = h @ p["w2"][e] + p["b2"][e]
    y[n] += weights[n, k] * out
    dw[n, k] = dy[n] @ out
    d_out = weights[n, k] * dy[n]
    d_hidden = (p["w2"][e] @ d_out) * (1 - h**2)
    d["b2"][e] += d_out
    d["w2"][e] += np.outer(h, d_out)
    d["b1"][e] += d_hidden
    d["w1"][e] += np.outer(x[n], d_hidden)
    dx[n] += p["w1"][e] @ d_hidden
  return y, (dx, dw, d)


def apply_experts(experts, blocks, expert_of_block):
  p = {name: v[expert_of_block] for name, v in experts.items()}
  h = jnp.einsum("GCD,GDH->GCH", blocks, p["w1"]) + p["b1"][:, None]
  return jnp.einsum("GCH,GHF->GCF", jnp.tanh(h), p["w2"]) + p["b2"][:, None]


def make_layer(shape, capacity, num_groups=1, num_experts=EXPERTS):
  """rows, weights, experts, chosen, is_token -> y, (kept, load, dropped)."""

  def layer(rows, weights, experts, chosen, is_token):
    blocks, trip = exchange.dispatch(
      rows,
      chosen,
      num_experts,
      capacity,
      is_token=is_token,
      num_groups=num_groups,
      block_rows=BLOCK,
    )
    outputs = apply_experts(experts, blocks, trip.expert_of_block)
    y = exchange.combine(outputs, weights, trip)
    return y, (trip.kept, trip.load[None], trip.dropped[None])

  return jax.shard_map(
    layer,
    mesh=make_mesh(*shape),
    in_specs=(TOKENS, TOKENS, P("expert"), TOKENS, TOKENS),
    out_specs=(TOKENS, (TOKENS,) * 3),
  )


def make_step(*args, **kwargs):
  """dy and the layer's arguments -> gradients, y and statistics."""
  layer = make_layer(*args, **kwargs)

  def loss(rows, weights, experts, chosen, is_token, dy):
    y, statistics = layer(rows, weights, experts, chosen, is_token)
    return jnp.sum(y * dy), (y, statistics)

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


make_step_once = functools.lru_cache(make_step)


def assert_close(found, expected):
  """Equal to 1e-6 of the largest entry."""
  scale = max(np.max(np.abs(expected)), 1.0)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("shape", "top_k", "capacity"), CASES)
def test_values_and_gradients_equal_a_loop_over_tokens(
  shape, top_k, capacity, scenario
):
  inputs = make_inputs(top_k, scenario)
  rows, chosen, weights, is_token, experts, dy = inputs
  step = make_step_once(shape, capacity)
  found, (y, (kept, load, dropped)) = step(
    rows, weights, experts, chosen, is_token, dy
  )
  groups = shape[0] * shape[1]
  expected_kept = numpy_kept(chosen, is_token, capacity, groups)
  np.testing.assert_array_equal(kept, expected_kept)
  expected_y, expected = numpy_layer(
    rows, chosen, weights, expected_kept, experts, dy
  )
  assert_close(y, expected_y)
  jax.tree.map(assert_close, found, expected)
  count = lambda choices: np.bincount(choices, minlength=EXPERTS)
  wanted = chosen[is_token]
  np.testing.assert_array_equal(load.sum(0), count(wanted.ravel()))
  lost = wanted[~expected_kept[is_token]]
  np.testing.assert_array_equal(dropped.sum(0), count(lost))
  assert (lost.size > 0) == (capacity is not None)
  if scenario == "empty_expert":
    assert all(np.all(d[5] == 0) for d in found[2].values())
  if scenario == "padding":
    assert not np.any(y[~is_token]) and not np.any(found[0][~is_token])


@pytest.mark.parametrize("capacity", [None, 6])
def test_several_groups_drop_the_same_on_every_mesh(capacity):
  rows, chosen, weights, is_token, experts, dy = make_inputs(2, "random")
  results = []
  for shape, num_groups in (((1, 1), 4), ((1, 2), 2), ((2, 2), 1)):
    step = make_step(shape, capacity and capacity // 2, num_groups)
    grads, (y, (kept, *_)) = step(rows, weights, experts, chosen, is_token, dy)
    results.append((grads, y, kept))
  expected = numpy_kept(chosen, is_token, capacity and capacity // 2, 4)
  assert np.all(expected) == (capacity is None)
  for grads, y, kept in results:
    np.testing.assert_array_equal(kept, expected)
    jax.tree.map(assert_close, (grads, y), results[0][:2])


def test_a_capacity_of_all_rows_drops_nothing():
  rows, chosen, weights, is_token, experts, dy = make_inputs(2, "one_expert")
  step = make_step((1, 2), ROWS // 2)
  found, (y, (kept, *_)) = step(rows, weights, experts, chosen, is_token, dy)
  assert np.all(kept)
  expected_y, expected = numpy_layer(rows, chosen, weights, kept, experts, dy)
  assert_close(y, expected_y)
  jax.tree.map(assert_close, found, expected)


def equations(jaxpr):
  """Every equation of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def trace(shape, top_k, capacity):
  rows, chosen, weights, is_token, experts, dy = make_inputs(top_k, "random")
  step = make_step_once(shape, capacity)
  return step.trace(rows, weights, experts, chosen, is_token, dy)


@pytest.mark.parametrize(("shape", "top_k", "capacity"), CASES)
def test_no_buffer_is_larger_than_the_slots(shape, top_k, capacity):
  num_rows, size = ROWS // (shape[0] * shape[1]), shape[1]
  slots = exchange.num_slots(num_rows, EXPERTS, top_k, size, capacity)
  if capacity is None:
    assert slots == num_rows * min(size * top_k, EXPERTS)
    slots = -(-slots // BLOCK) * BLOCK + EXPERTS // size * BLOCK
  found = set()
  for outer in equations(trace(shape, top_k, capacity).jaxpr.jaxpr):
    if outer.primitive.name == "shard_map":
      for equation in equations(outer.params["jaxpr"]):
        found |= {tuple(out.aval.shape) for out in equation.outvars}
  # Anything as wide as rows but the experts' parameters.
  rows = [s for s in found if s[-1:] == (WIDTH,) and s[-2:-1] != (HIDDEN,)]
  largest = max(np.prod(shape[:-1]) for shape in rows)
  assert largest == max(slots, num_rows * top_k)


@pytest.mark.parametrize(("shape", "top_k", "capacity"), CASES)
def test_stated_bytes_are_those_of_the_collectives(shape, top_k, capacity):
  num_rows, size = ROWS // (shape[0] * shape[1]), shape[1]
  moved = [
    equation.outvars[0].aval.size * 4 * (size - 1) // size
    for equation in equations(trace(shape, top_k, capacity).jaxpr.jaxpr)
    if equation.primitive.name == "all_to_all"
    and equation.outvars[0].aval.dtype == jnp.float32
  ]
  stated = exchange.bytes_moved_tokens(
    num_rows, EXPERTS, top_k, WIDTH, size, capacity, item_bytes=4
  )
  assert sum(moved) == stated
  assert len(moved) == (4 if size > 1 else 0)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_compiled_rows_travel_by_all_to_all_alone(shape, capacity):
  text = trace(shape, 2, capacity).lower().compile().as_text()
  assert ("all-to-all" in text) == (shape[1] > 1)
  for other in ("all-gather", "collective-permute", "reduce-scatter"):
    assert other not in text


@pytest.mark.parametrize("capacity", [None, 2])
def test_no_gradient_is_a_scatter_add(capacity):
  def layer(rows, weights, chosen):
    blocks, trip = exchange.dispatch(rows, chosen, EXPERTS, capacity)
    return exchange.combine(blocks**2, weights, trip)

  layer = jax.shard_map(
    layer, mesh=make_mesh(1, 2), in_specs=TOKENS, out_specs=TOKENS
  )
  rows, chosen, weights, *_ = make_inputs(2, "random")
  grad = jax.grad(lambda r, w: layer(r, w, chosen).sum(), argnums=(0, 1))
  names = {
    equation.primitive.name
    for equation in equations(jax.make_jaxpr(grad)(rows, weights).jaxpr)
  }
  assert "gather" in names and "all_to_all" in names
  assert "scatter-add" not in names


@pytest.mark.parametrize("capacity", [None, 2])
def test_constant_weights_and_narrow_rows(capacity):
  """Weights that vary over no axis and are wider than the rows."""

  def layer(rows, chosen):
    blocks, trip = exchange.dispatch(rows, chosen, EXPERTS, capacity)
    weights = jnp.full(chosen.shape, 0.5, jnp.float32)
    return exchange.combine(2 * blocks, weights, trip), trip.kept

  layer = jax.shard_map(
    layer, mesh=make_mesh(2, 4), in_specs=TOKENS, out_specs=TOKENS
  )
  rows, chosen, *_ = make_inputs(2, "random")
  rows = jnp.asarray(rows, jnp.bfloat16)

  def loss(rows):
    y, kept = layer(rows, chosen)
    return y.sum(), (y, kept)

  grad, (y, kept) = jax.jit(jax.grad(loss, has_aux=True))(rows)
  assert y.dtype == grad.dtype == jnp.bfloat16
  factor = np.sum(kept, axis=1, keepdims=True)
  np.testing.assert_array_equal(y, np.asarray(rows, np.float32) * factor)
  np.testing.assert_array_equal(grad, np.broadcast_to(factor, grad.shape))


@pytest.mark.parametrize(
  ("num_experts", "axis_size", "nearest"),
  [(4, 3, "2 or 4"), (6, 4, "3 or 6"), (4, 8, "2 or 4"), (1, 2, "1")],
)
def test_an_axis_that_does_not_divide_the_experts_is_refused(
  num_experts, axis_size, nearest
):
  message = (
    f"num_experts={num_experts} must be divisible by the {axis_size} devices "
    f"on mesh axis 'expert'; use {nearest} devices"
  )
  with pytest.raises(ValueError, match=message):
    exchange.local_experts(num_experts, axis_size)
  with pytest.raises(ValueError, match="must be divisible"):
    exchange.choose(64, num_experts, 1, WIDTH, 10, axis_size, move="weights")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_experts=3), "num_experts=3 .* use 1 or 3 devices"),
    (dict(num_groups=5), "num_groups=5 must divide the 24 rows"),
    (dict(capacity=0), "capacity=0 must be at least 1"),
  ],
)
def test_a_wrong_argument_of_dispatch_is_named(changes, message):
  args = dict(shape=(1, 2), capacity=2) | changes
  rows, chosen, weights, is_token, experts, dy = make_inputs(2, "random")
  with pytest.raises(ValueError, match=message):
    make_step(**args)(rows, weights, experts, chosen, is_token, dy)


def test_capacity_is_deepspeeds():
  capacity = exchange.expert_capacity
  assert capacity(2048, 4, 2, 1.5) == 1536
  assert capacity(10, 4, 2, 1.5) == 8  # ceil(7.5)
  assert capacity(10, 1, 1, 1.1) == 10  # No more than the rows.
  assert capacity(100, 10, 1, 1.1) == 11  # 11.000000000000002 in float64.
  assert capacity(4, 8, 1, 1.0) == 1
  assert capacity(40, 8, 1, 0.1, minimum=4) == 4


PHI2 = dict(
  num_experts=4, expert_params=2 * 2560 * 10240 + 10240 + 2560, axis_size=4
)


def test_figures_of_the_docstring():
  tokens = functools.partial(
    exchange.bytes_moved_tokens, 16384, 4, 2, 2560, axis_size=4
  )
  factor = lambda f: exchange.expert_capacity(16384, 4, 2, f)
  assert round(tokens(capacity=factor(1.5)) / 1e6) == 755
  assert round(tokens(capacity=factor(1.0)) / 1e6) == 503
  assert round(tokens(capacity=None) / 1e6) == 1007
  assert round(exchange.bytes_gathered_weights(**PHI2) / 1e6) == 944
  even = functools.partial(
    exchange.break_even_tokens, top_k=2, width=2560, **PHI2
  )
  assert even(capacity_factor=1.5) == 20485
  assert even(capacity_factor=1.0) == 30727
  assert even() == 15363
  for text in ("755", "503", "1007", "944", "20485", "30727", "15363"):
    assert text in exchange.__doc__


@pytest.mark.parametrize("factor", [None, 1.0, 1.5])
def test_the_choice_turns_at_the_break_even(factor):
  even = exchange.break_even_tokens(
    top_k=2, width=2560, capacity_factor=factor, **PHI2
  )

  def choose(num_rows, **changes):
    capacity = factor and exchange.expert_capacity(num_rows, 4, 2, factor)
    args = PHI2 | dict(top_k=2, width=2560, capacity=capacity) | changes
    return exchange.choose(num_rows, **args)

  assert choose(even - 4) == "tokens"
  assert choose(even + 4) == "weights"
  assert choose(even + 4, move="tokens") == "tokens"
  assert choose(even - 4, move="weights") == "weights"
  assert choose(even + 4, axis_size=1) == "tokens"  # Nothing travels.
  with pytest.raises(ValueError, match="move='both' must be one of"):
    choose(even, move="both")
