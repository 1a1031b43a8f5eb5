"""Full-FFN experts against loops over tokens and layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import decoder, ffn, llava, moe, mole, pattern
from mole_jax.training import base as base_lib
from mole_jax.training import state, upcycle
from tests.models import small

BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS = 2, 9, 6, 5, 4


def make_mixture(seed=0, top_k=2):
  """Rows, routing, which are tokens, parameters of the experts."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
  x = normal(BATCH, TOKENS, WIDTH)
  probs = jax.nn.softmax(normal(BATCH, TOKENS, EXPERTS))
  routing = mole.Routing(probs, moe.choose(probs, top_k))
  is_token = jnp.asarray(rng.random((BATCH, TOKENS)) < 0.8)
  params = {
    name: {
      "kernel": normal(EXPERTS, fan_in, fan_out),
      "lora_a": normal(EXPERTS, fan_in, 2),
      "lora_b": normal(EXPERTS, 2, fan_out),
    }
    for name, (fan_in, fan_out, *_) in ffn.linear_shapes(
      "swiglu", WIDTH, HIDDEN
    ).items()
  }
  return x, routing, is_token, params


def loop_mixture(x, routing, is_token, params, capacity):
  """Token after token: first choices of all, then second ones."""
  rows = x.reshape(-1, WIDTH)
  chosen = np.asarray(routing.chosen).reshape(len(rows), -1)
  tokens = np.asarray(is_token).reshape(-1)
  probs = routing.probs.reshape(len(rows), -1)
  used = np.zeros(EXPERTS, int)
  kept = np.zeros(chosen.shape, bool)
  for k in range(chosen.shape[1]):
    for n in np.flatnonzero(tokens):
      kept[n, k] = used[chosen[n, k]] < capacity
      used[chosen[n, k]] += 1
  outputs = []
  for n, row in enumerate(rows):
    y, total = jnp.zeros(WIDTH), 0.0
    for k in np.flatnonzero(kept[n]):
      e = chosen[n, k]
      linear = lambda name, x, e=e: (
        x @ params[name]["kernel"][e]
        + 2.0 * x @ params[name]["lora_a"][e] @ params[name]["lora_b"][e]
      )
      y = y + probs[n, e] * ffn.ffn("swiglu", linear, row)
      total += probs[n, e]
    if chosen.shape[1] > 1:
      y = y / jnp.maximum(total, jnp.finfo(jnp.float32).eps)
    outputs.append(y)
  return jnp.stack(outputs).reshape(x.shape), kept.reshape(routing.chosen.shape)


# Capacity of 18 rows at factor f is ceil(f k 18 / 4); 0 is dropless.
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor, block_rows", [(0.0, 2), (0.5, 2), (4.0, 128)])
def test_a_mixture_is_that_of_a_loop_over_tokens(top_k, factor, block_rows):
  x, routing, is_token, params = make_mixture(top_k=top_k)
  rows = BATCH * TOKENS
  capacity = int(np.ceil(factor * top_k * rows / EXPERTS)) if factor else rows
  config = moe.MoeConfig(
    "sparse", EXPERTS, top_k, factor, block_rows=block_rows
  )
  dy = jax.random.normal(jax.random.key(1), x.shape)

  def ours(x, probs, params):
    y, kept = moe.mixture(
      x,
      routing._replace(probs=probs),
      is_token,
      params,
      "swiglu",
      config,
      factor,
      alpha=4.0,
    )
    return (y * dy).sum(), (y, kept)

  def loop(x, probs, params):
    y, kept = loop_mixture(
      x, routing._replace(probs=probs), is_token, params, capacity
    )
    return (y * dy).sum(), (y, kept)

  grad = functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
  grads, (y, kept) = jax.jit(grad(ours))(x, routing.probs, params)
  expected_grads, (expected_y, expected_kept) = grad(loop)(
    x, routing.probs, params
  )
  np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(kept, expected_kept)
  assert (factor == 0.5) == (not kept[is_token].all())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grads,
    expected_grads,
  )


def test_an_expert_without_a_token_gets_no_gradient():
  x, routing, is_token, params = make_mixture()
  chosen = jnp.zeros_like(routing.chosen).at[..., 1].set(3)
  for factor in (0.0, 1.5):

    def loss(params, factor=factor):
      y, _ = moe.mixture(
        x,
        routing._replace(chosen=chosen),
        is_token,
        params,
        "swiglu",
        moe.MoeConfig("dense", EXPERTS, block_rows=4),
        factor,
        alpha=4.0,
      )
      return y.sum()

    for leaf in jax.tree.leaves(jax.grad(loss)(params)):
      assert (np.asarray(leaf)[1:3] == 0).all()
      assert (np.asarray(leaf)[0] != 0).any()


def test_balance_loss_counts_first_choices_and_adds_up_layers():
  # Two layers of 2 and 4 experts; the first has two unused columns.
  first = np.zeros((2, 1, 1, 4))
  first[0, 0, 0, :2] = 6, 2
  first[1, 0, 0] = 2, 2, 2, 2
  probs = np.zeros((2, 1, 1, 4))
  probs[0, 0, 0, :2] = 5, 3
  probs[1, 0, 0] = 2, 2, 2, 2
  sums = mole.RoutingSums(
    jnp.asarray(probs),
    jnp.zeros((2, 1, 1, 4)),
    jnp.asarray(first),
    jnp.zeros((2, 1, 1)),
    jnp.zeros((2, 1, 1)),
  )
  expected = 2 * (6 / 8 * 5 / 8 + 2 / 8 * 3 / 8) + 1.0
  np.testing.assert_allclose(
    moe.balance_loss(sums, (2, 4)), expected, rtol=1e-6
  )


def test_gumbel_noise_keeps_the_first_and_draws_the_second_by_probability():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  logits = jnp.broadcast_to(logits, (20000, 4))
  noise = jax.random.gumbel(jax.random.key(0), logits.shape)
  chosen = np.asarray(moe.choose(logits, 2, noise))
  assert (chosen[:, 0] == 0).all()
  shares = np.bincount(chosen[:, 1], minlength=4) / len(chosen)
  # Standard deviation of a share of 0.6: 0.0035.
  np.testing.assert_allclose(shares, [0, 0.6, 0.3, 0.1], atol=0.015)


@pytest.mark.parametrize(
  "layers, expected",
  [
    ("none", [0, 0, 0, 0, 0]),
    ("sparse", [4, 0, 4, 0, 4]),
    ("dense", [4, 4, 4, 4, 4]),
    ("first_half", [4, 4, 0, 0, 0]),
    ("second_half", [0, 0, 4, 4, 4]),
    ("4, 1", [0, 4, 0, 0, 4]),
    ((0, 3), [4, 0, 0, 4, 0]),
  ],
)
def test_layers_with_experts(layers, expected):
  config = moe.MoeConfig(layers)
  assert list(moe.experts_by_layer(config, 5)) == expected


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(top_k=5), r"top_k=5 must lie between 1 and model.moe.num_experts=4"),
    (dict(top_k=0), "top_k=0"),
    (dict(num_experts=(4, 2), top_k=3), r"num_experts=\(4, 2\)"),
    (dict(num_experts=1, top_k=1), "at least 2"),
    (dict(capacity_factor=-1.0), "capacity_factor=-1.0"),
    (dict(move="bytes"), "move='bytes'"),
    (dict(block_rows=0), "block_rows=0"),
    (dict(layers="0,2"), "between 0 and 1"),
    (dict(layers="1,1"), "different layers"),
    (dict(layers="odd"), "'odd' must be one of"),
    (dict(layers="dense", num_experts=(4, 4, 4)), "3 numbers for 2 layers"),
  ],
)
def test_bad_settings_are_named(changes, match):
  with pytest.raises(ValueError, match=match):
    llava.make_config(small.changed(moe=changes))


@pytest.mark.parametrize(
  "kinds, expected",
  [
    ([4], [(0, (4,), 1)]),
    ([4, 0] * 12, [(0, (4, 0), 12)]),
    ([4] * 24, [(0, (4,), 24)]),
    ([4] * 12 + [0] * 12, [(0, (4,), 12), (12, (0,), 12)]),
    ([4, 0, 4], [(0, (4,), 1), (1, (0,), 1), (2, (4,), 1)]),
    ([4, 0, 4, 0, 4], [(0, (4, 0), 2), (4, (4,), 1)]),
    ([0, 4, 2, 0, 4, 2, 0], [(0, (0, 4, 2), 2), (6, (0,), 1)]),
  ],
)
def test_layers_are_cut_into_runs(kinds, expected):
  runs = pattern.runs(kinds)
  assert [tuple(run) for run in runs] == expected


MODELS = [
  dict(layers="sparse", num_experts=4),
  dict(layers="dense", num_experts=3, top_k=1),
  dict(layers="first_half", num_experts=4),
  dict(layers="0,1,4", num_experts=(2, 4, 2)),
]


def make_model(moe_values, num_layers=5, **changes):
  sizes = {"num_layers": num_layers}
  return small.make(decoder=sizes, moe=moe_values, **changes)


def make_batch():
  ids = np.random.default_rng(0).integers(4, 40, (2, 12)).astype(np.int32)
  positions = np.arange(12, dtype=np.int32)[None].repeat(2, 0)
  segments = (positions < 10).astype(np.int32)
  return jnp.asarray(ids), jnp.asarray(positions), jnp.asarray(segments)


def layer_by_layer(config, params, ids, positions, segments):
  """The decoder of kinds without `pattern` and `scan`."""
  model = llava.Llava(config)
  x = small.apply(model, params, ids, None, method="embed")
  c = config.decoder
  angles = decoder.attention.rotary_angles(positions, c.head_dim, c.rope_theta)
  mask = decoder.attention.causal_segment_mask(segments)
  members = llava.segment_members(segments, 1)
  shared = decoder._Shared(*angles, mask, segments, members, None, None)
  kinds = moe.experts_by_layer(config.moe, c.num_layers)
  stacks = params["decoder"]["layers"]
  families = {"mlp", *(pattern.family(kind) for kind in kinds)}
  chosen = []
  for i, kind in enumerate(kinds):
    place = kinds[:i].count(kind)
    take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    own = {k: take(v, i) for k, v in stacks.items() if k not in families}
    own["moe" if kind else "mlp"] = take(stacks[pattern.family(kind)], place)
    layer = decoder.DecoderLayer(
      c, config.lora, config.mole, False, False, config.moe, kind
    )
    x, (routing, _, _) = small.apply(layer, own, x, None, shared)
    if routing is not None:
      chosen.append(np.asarray(routing.chosen))
  return x, chosen


@pytest.mark.parametrize("values", MODELS, ids=lambda v: str(v["layers"]))
def test_scanned_kinds_are_layers_one_after_the_other(values):
  config, model, params = make_model(
    values, mole=dict(num_experts=0), lora=dict(rank=2, dropout=0.0)
  )
  ids, positions, segments = make_batch()
  output = small.apply(
    model, params, ids, None, positions, segments, 1, keep_inputs=True
  )
  x, chosen = layer_by_layer(config, params, ids, positions, segments)
  norm = config.decoder.make_norm("norm")
  x = norm.apply({"params": params["decoder"]["norm"]}, x)
  np.testing.assert_allclose(output.hidden, x, rtol=2e-5, atol=2e-5)
  assert len(output.layer_inputs) == config.decoder.num_layers
  top_k = config.moe.top_k
  np.testing.assert_array_equal(output.routing.chosen[..., :top_k], chosen)


def test_a_mixture_of_both_kinds_of_experts():
  """LoRA experts in plain layers, LoRA on every full expert."""
  config, model, params = make_model(dict(layers="sparse", num_experts=4))
  ids, positions, segments = make_batch()
  output = small.apply(model, params, ids, None, positions, segments, 1)
  routed = decoder.experts_of_routed_layers(
    config.decoder, config.mole, config.moe
  )
  assert routed == {0: 4, 1: 3, 2: 4, 3: 3, 4: 4}
  x, chosen = layer_by_layer(config, params, ids, positions, segments)
  for layer, (ours, alone) in enumerate(
    zip(output.routing.chosen, chosen, strict=True)
  ):
    np.testing.assert_array_equal(ours[..., : alone.shape[-1]], alone)
    assert (ours[..., alone.shape[-1] :] == -1).all(), layer
  assert (output.routing.sums.probs[1::2, ..., 3] == 0).all()
  shapes = state.parameter_shapes(config)
  name = "decoder/layers/moe_x4/experts/up_proj/lora_b"
  assert shapes[name].shape == (3, 4, 2, 24)


def test_a_cache_gives_what_the_whole_row_gives():
  config, model, params = make_model(
    dict(layers="0,1,4", num_experts=(2, 4, 2)), mole=dict(num_experts=0)
  )
  ids, positions, _ = make_batch()
  whole = small.apply(
    model, params, ids, None, positions, jnp.ones_like(ids), 1
  )
  cache = decoder.empty_cache(config.decoder, 2, 12)
  x = small.apply(model, params, ids, None, method="embed")
  hidden = []
  for start, stop in ((0, 7), (7, 8), (8, 12)):
    slots = jnp.arange(12)[None, None]
    mask = slots <= positions[:, start:stop, None]
    output = small.apply(
      model,
      params,
      x[:, start:stop],
      positions[:, start:stop],
      mask,
      jnp.ones((2, stop - start), bool),
      cache,
      jnp.asarray(start),
      method="extend",
    )
    cache = output.cache
    hidden.append(output.hidden)
  np.testing.assert_allclose(
    jnp.concatenate(hidden, 1), whole.hidden, rtol=2e-5, atol=2e-5
  )


@pytest.mark.parametrize("values", MODELS, ids=lambda v: str(v["layers"]))
@pytest.mark.parametrize("is_training", [False, True])
def test_padding_takes_no_place_and_is_not_counted(values, is_training):
  """Unless the option says so."""
  values = values | dict(capacity_factor=0.6, eval_capacity_factor=0.6)
  ids, positions, segments = make_batch()

  def run(ids, **changes):
    config, model, params = make_model(
      values | changes, mole=dict(num_experts=0), lora=dict(rank=0)
    )
    output = small.apply(
      model, params, ids, None, positions, segments, 1, is_training
    )
    return np.asarray(output.hidden[:, :10]), output.routing.sums

  other = ids.at[:, 10:].set(5)
  (hidden, sums), (hidden_other, sums_other) = run(ids), run(other)
  np.testing.assert_array_equal(hidden, hidden_other)
  jax.tree.map(np.testing.assert_array_equal, sums, sums_other)
  assert sums.first.shape[2] == 1
  np.testing.assert_array_equal(sums.first.sum((1, 2, 3)), 20)
  _, counted = run(ids, count_padding=True)
  assert counted.first.shape[2] == 2
  np.testing.assert_array_equal(counted.first.sum((1, 2, 3)), 24)


def dense_of(config, values, seed=3):
  """A model without experts, and what it becomes with them."""
  dense = dataclasses.replace(config, moe=moe.MoeConfig())
  _, model, params = make_model(dict(layers="none"), seed=seed, **values)
  assert model.config == dense
  return model, params


@pytest.mark.parametrize("values", MODELS, ids=lambda v: str(v["layers"]))
def test_upcycled_logits_are_those_of_the_dense_model(values, tmp_path):
  without = dict(mole=dict(num_experts=0), lora=dict(rank=0))
  config, model, random = make_model(
    # A single expert's output is scaled by its probability: at 1 by nothing.
    values | dict(top_k=2, capacity_factor=0.0),
    **without,
  )
  dense, params = dense_of(config, without)
  base_lib.write_base(tmp_path, state.flatten(params))
  reader = base_lib.BaseReader(tmp_path)
  assert upcycle.is_needed(config, reader)
  shapes = state.parameter_shapes(config)
  flat = upcycle.read(reader, config, shapes)
  upcycle.check_copies(flat)
  routers = {k: v for k, v in state.flatten(random).items() if "/router/" in k}
  assert set(flat) | set(routers) == set(shapes)
  ids, positions, segments = make_batch()
  args = ids, None, positions, segments, 1
  for is_training in (False, True):
    ours = small.apply(
      model, state.unflatten(flat | routers), *args, is_training
    )
    expected = small.apply(dense, params, *args, is_training)
    # Padding is not routed: its FFN adds nothing, and no token looks there.
    np.testing.assert_allclose(
      ours.hidden[:, :10], expected.hidden[:, :10], rtol=1e-5, atol=1e-5
    )
  name = next(n for n in flat if "/experts/" in n)
  broken = dict(flat, **{name: flat[name].at[0, 1, 0, 0].add(1e-6)})
  with pytest.raises(ValueError, match="upcycled experts"):
    upcycle.check_copies(broken)


def test_a_base_with_other_ffns_is_refused_before_any_weight_is_read(tmp_path):
  without = dict(mole=dict(num_experts=0), lora=dict(rank=0))
  config, _, _ = make_model(dict(layers="sparse"), **without)
  sizes = dict(num_layers=5, intermediate_size=20)
  _, _, params = small.make(decoder=sizes, **without)
  base_lib.write_base(tmp_path, state.flatten(params))
  reader = base_lib.BaseReader(tmp_path)
  reader.read = reader.read_onto = None  # Nothing may be read.
  with pytest.raises(ValueError) as caught:
    upcycle.read(reader, config, state.parameter_shapes(config))
  message = str(caught.value)
  for name in ("gate_proj", "up_proj", "down_proj"):
    assert f"decoder/layers/mlp/{name}/kernel is [5, " in message
  assert "wanted [5, 16, 24]" in message
