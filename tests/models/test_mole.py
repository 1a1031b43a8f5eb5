"""The mixture of LoRA experts against NumPy loops over tokens."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import ffn, lora, mole
from mole_jax.parallel import permutation

ROWS, WIDTH, FEATURES, RANK = 37, 12, 10, 3
ALPHA = 6.0


def assert_close(found, expected):
  """Equal to 1e-5 of the largest entry: sums of float32 terms cancel."""
  scale = np.max(np.abs(expected))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def make_inputs(num_experts=4, top_k=1, empty_expert=None, seed=0):
  """Rows, factors, routing; `empty_expert` is chosen by no row."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  logits = rng.normal(size=(ROWS, num_experts))
  if empty_expert is not None:
    logits[:, empty_expert] = -30.0
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  chosen = np.argsort(-probs, axis=-1)[:, :top_k]
  routing = mole.Routing(
    jnp.asarray(probs, jnp.float32), jnp.asarray(chosen, jnp.int32)
  )
  return (
    normal(ROWS, WIDTH),
    normal(num_experts, WIDTH, RANK),
    normal(num_experts, RANK, FEATURES),
    routing,
  )


def run(dispatch, x, lora_a, lora_b, weights, routing, block_rows=4):
  if dispatch == "loop":
    return mole.loop_experts(x, lora_a, lora_b, weights)
  if dispatch == "masked":
    return mole.masked_experts(x, lora_a, lora_b, weights)
  plan = permutation.make_plan(routing.chosen, lora_a.shape[0], block_rows)
  return mole.gather_experts(x, lora_a, lora_b, weights, plan)


def numpy_experts(x, lora_a, lora_b, routing, gate):
  """One token, one chosen expert at a time, in float64."""
  x, a, b = (np.asarray(v, np.float64) for v in (x, lora_a, lora_b))
  y = np.zeros((x.shape[0], b.shape[-1]))
  for n in range(x.shape[0]):
    for e in np.asarray(routing.chosen)[n]:
      factor = float(routing.probs[n, e]) if gate == "prob" else 1.0
      y[n] += factor * (x[n] @ a[e] @ b[e])
  return y


CASES = list(
  itertools.product(
    ("loop", "masked", "gather"),
    [(4, 1, None), (4, 1, 2), (4, 2, 0), (3, 3, None), (1, 1, None)],
    ("none", "prob", "straight_through"),
  )
)


@pytest.mark.parametrize(("dispatch", "shape", "gate"), CASES)
def test_every_dispatch_equals_a_loop_over_tokens(dispatch, shape, gate):
  x, a, b, routing = make_inputs(*shape)
  weights = mole.gate_weights(routing, gate)
  y = run(dispatch, x, a, b, weights, routing)
  expected = numpy_experts(x, a, b, routing, gate)
  assert_close(y, expected)


@pytest.mark.parametrize("dispatch", ["masked", "gather"])
@pytest.mark.parametrize("shape", [(4, 1, None), (4, 1, 2), (4, 2, 0)])
def test_every_dispatch_has_the_gradients_of_the_loop(dispatch, shape):
  x, a, b, routing = make_inputs(*shape)
  target = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, FEATURES)))

  def loss(dispatch, x, a, b, probs):
    weights = mole.gate_weights(mole.Routing(probs, routing.chosen), "prob")
    y = run(dispatch, x, a, b, weights, routing)
    return jnp.sum(jnp.sin(y) * target)

  grad = jax.grad(loss, argnums=(1, 2, 3, 4))
  expected = grad("loop", x, a, b, routing.probs)
  found = grad(dispatch, x, a, b, routing.probs)
  for one, other in zip(found, expected, strict=True):
    assert_close(one, other)


@pytest.mark.parametrize("dispatch", ["loop", "masked", "gather"])
def test_an_expert_without_tokens_gets_exactly_zero_gradient(dispatch):
  x, a, b, routing = make_inputs(4, 1, empty_expert=2)
  weights = mole.gate_weights(routing, "none")
  loss = lambda a, b: jnp.square(run(dispatch, x, a, b, weights, routing)).sum()
  for gradient in jax.grad(loss, argnums=(0, 1))(a, b):
    assert jnp.all(gradient[2] == 0)
    assert jnp.all(jnp.any(gradient[jnp.array([0, 1, 3])] != 0, axis=(1, 2)))


@pytest.mark.parametrize("block_rows", [1, 3, 8, 64])
def test_gather_drops_no_row_whatever_the_block(block_rows):
  x, a, b, routing = make_inputs(4, 2)
  weights = mole.gate_weights(routing, "none")
  y = run("gather", x, a, b, weights, routing, block_rows)
  expected = run("loop", x, a, b, weights, routing)
  assert_close(y, expected)


def init_mlp(config, x, seed=2, form="swiglu"):
  """A MoleMlp with non-zero B and biases, so that all have a say."""
  mlp = mole.MoleMlp(24, config, form=form)
  params = mlp.init(jax.random.key(seed), x, None)["params"]
  keys = iter(jax.random.split(jax.random.key(seed + 1), 4))
  for name in ffn.linear_shapes(form, WIDTH, 24):
    for zeros in ("lora_b", "bias"):
      if zeros in params[name]:
        shape = params[name][zeros].shape
        params[name][zeros] = jax.random.normal(next(keys), shape)
  return mlp, params


def make_tokens(batch=2, tokens=9):
  return jax.random.normal(jax.random.key(0), (batch, tokens, WIDTH))


def make_config(**changes):
  values = dict(num_experts=3, rank=RANK, alpha=ALPHA, dropout=0.0)
  return mole.MoleConfig(**values | changes)


@pytest.mark.parametrize("dispatch", ["auto", "loop", "masked", "gather"])
def test_one_expert_is_plain_lora_bit_for_bit(dispatch):
  x = make_tokens()
  mlp, params = init_mlp(make_config(num_experts=1, dispatch=dispatch), x)
  assert "router" not in params

  def plain(name, features, x):
    p = {
      "kernel": params[name]["kernel"],
      "lora_a": params[name]["lora_a"][0],
      "lora_b": params[name]["lora_b"][0],
    }
    return lora.LoraLinear(features, rank=RANK, alpha=ALPHA).apply(
      {"params": p}, x
    )

  hidden = jax.nn.silu(plain("gate_proj", 24, x)) * plain("up_proj", 24, x)
  expected = plain("down_proj", WIDTH, hidden)
  y, routing = mlp.apply({"params": params}, x, None)
  assert routing is None
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dispatch", ["loop", "masked"])
def test_one_expert_through_the_dispatch_is_plain_lora_too(dispatch):
  x, a, b, routing = make_inputs(1, 1)
  weights = mole.gate_weights(routing, "none") * lora.scaling(ALPHA, RANK)
  y = run(dispatch, x, a, b, weights, routing)
  expected = lora.low_rank(x, a[0], b[0], ALPHA)
  if dispatch == "masked":
    np.testing.assert_array_equal(y, expected)
  else:
    assert_close(y, expected)


def numpy_mlp(params, x, config):
  """The layer of the paper, token by token, in float64."""
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  scale = config.alpha / config.rank
  out = []
  for token in x:
    logits = token @ p["router"]["kernel"] + p["router"]["bias"]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    experts = np.argsort(-probs)[: config.top_k]

    def linear(name, z, probs=probs, experts=experts):
      y = z @ p[name]["kernel"] + p[name].get("bias", 0.0)
      for e in experts:
        factor = probs[e] if config.gate == "prob" else 1.0
        delta = z @ p[name]["lora_a"][e] @ p[name]["lora_b"][e]
        y = y + factor * scale * delta
      return y

    if "fc1" in p:
      up = linear("fc1", token)
      inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
      out.append(linear("fc2", 0.5 * up * (1 + np.tanh(inner))))
      continue
    gate = linear("gate_proj", token)
    hidden = gate / (1 + np.exp(-gate)) * linear("up_proj", token)
    out.append(linear("down_proj", hidden))
  return np.array(out)


@pytest.mark.parametrize("dispatch", ["auto", "loop", "masked", "gather"])
@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(gate="prob"),
    dict(gate="straight_through"),
    dict(top_k=2, gate="prob"),
    dict(top_k=3, gate="prob"),  # The dense mixture.
  ],
  ids=str,
)
def test_layer_follows_the_paper(dispatch, changes):
  x = make_tokens()
  config = make_config(dispatch=dispatch, block_rows=4, **changes)
  mlp, params = init_mlp(config, x)
  y, routing = mlp.apply({"params": params}, x, None)
  expected = numpy_mlp(params, x, config)
  assert_close(y.reshape(-1, WIDTH), expected)
  assert routing.chosen.shape == (2, 9, config.top_k)


@pytest.mark.parametrize("dispatch", ["loop", "masked", "gather"])
def test_both_maps_of_a_gelu_mlp_are_served_by_one_routing(dispatch):
  x = make_tokens()
  make = lambda dispatch: init_mlp(
    make_config(dispatch=dispatch, block_rows=4, top_k=2, gate="prob"),
    x,
    form="gelu",
  )
  mlp, params = make(dispatch)
  assert set(params) == {"fc1", "fc2", "router"}
  y, _ = mlp.apply({"params": params}, x, None)
  assert_close(y.reshape(-1, WIDTH), numpy_mlp(params, x, mlp.config))
  if dispatch == "loop":
    return
  loss = lambda mlp: (
    lambda p: jnp.square(mlp.apply({"params": p}, x, None)[0]).sum()
  )
  found = jax.grad(loss(mlp))(params)
  expected = jax.grad(loss(make("loop")[0]))(params)
  jax.tree.map(assert_close, found, expected)


def router_gradient(gate):
  x = make_tokens()
  mlp, params = init_mlp(make_config(gate=gate), x)
  loss = lambda p: jnp.square(mlp.apply({"params": p}, x, None)[0]).sum()
  return jax.grad(loss)(params)["router"]["kernel"]


def test_ungated_router_gets_no_gradient_from_the_output():
  assert jnp.all(router_gradient("none") == 0)
  assert jnp.any(router_gradient("prob") != 0)
  assert jnp.any(router_gradient("straight_through") != 0)


def test_straight_through_is_none_forward_and_prob_backward():
  x, a, b, routing = make_inputs()
  target = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, FEATURES)))

  def value(probs, gate):
    weights = mole.gate_weights(mole.Routing(probs, routing.chosen), gate)
    # Linear in y, so that the backward pass does not see the forward one.
    return jnp.sum(target * run("masked", x, a, b, weights, routing))

  grad = jax.value_and_grad(value)
  forward, backward = grad(routing.probs, "straight_through")
  np.testing.assert_allclose(forward, value(routing.probs, "none"), rtol=1e-6)
  expected = grad(routing.probs, "prob")[1]
  np.testing.assert_allclose(backward, expected, rtol=1e-5)


def make_sums(seed=0, layers=3, num_experts=4):
  """Random routings of two rows with segments 1, 1, 2 and padding."""
  rng = np.random.default_rng(seed)
  segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
  probs = rng.dirichlet(np.ones(num_experts), (layers, 2, 6))
  chosen = probs.argmax(-1)[..., None]
  segments = jnp.asarray(segment_ids[..., None] == np.array([1, 2, 3]))
  routings = [
    mole.Routing(jnp.asarray(p, jnp.float32), jnp.asarray(c, jnp.int32))
    for p, c in zip(probs, chosen, strict=True)
  ]
  sums = [mole.routing_sums(routing, segments) for routing in routings]
  sums = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
  num_tokens = segments.sum(1).astype(jnp.float32)
  return sums, num_tokens, probs, chosen[..., 0], segment_ids


def test_pooled_balance_loss_pools_layers_and_tokens_of_each_sample():
  sums, num_tokens, probs, chosen, segment_ids = make_sums()
  samples = [(0, 1), (0, 2), (1, 1)]
  losses = []
  for row, segment in samples:
    tokens = segment_ids[row] == segment
    p = probs[:, row, tokens].reshape(-1, 4).mean(0)
    f = np.bincount(chosen[:, row, tokens].ravel(), minlength=4)
    losses.append(np.sum(p * f / f.sum()))
  found = mole.balance_loss_pooled(sums, num_tokens)
  np.testing.assert_allclose(found, np.mean(losses), rtol=1e-6)


def test_per_layer_balance_loss_follows_switch():
  sums, num_tokens, probs, chosen, segment_ids = make_sums()
  is_token = segment_ids > 0
  losses = []
  for p, c in zip(probs, chosen, strict=True):
    f = np.bincount(c[is_token], minlength=4) / is_token.sum()
    losses.append(4 * np.sum(f * p[is_token].mean(0)))
  found = mole.balance_loss_per_layer(sums, num_tokens)
  np.testing.assert_allclose(found, np.mean(losses), rtol=1e-6)


def test_balanced_routing_reaches_the_minimum_of_each_loss():
  chosen = jnp.arange(4)[None, :, None]
  routing = mole.Routing(jnp.full((1, 4, 4), 0.25), chosen)
  segments = jnp.ones((1, 4, 1), bool)
  sums = jax.tree.map(lambda v: v[None], mole.routing_sums(routing, segments))
  num_tokens = jnp.full((1, 1), 4.0)
  assert mole.balance_loss_pooled(sums, num_tokens) == pytest.approx(0.25)
  assert mole.balance_loss_per_layer(sums, num_tokens) == pytest.approx(1.0)


@pytest.mark.parametrize(
  "loss", [mole.balance_loss_pooled, mole.balance_loss_per_layer]
)
def test_padding_is_never_counted(loss):
  segments = jnp.asarray([[[True], [True], [False]]])
  num_tokens = segments.sum(1).astype(jnp.float32)

  def value(probs):
    chosen = jnp.argmax(probs, axis=-1)[..., None]
    sums = mole.routing_sums(mole.Routing(probs, chosen), segments)
    return loss(jax.tree.map(lambda v: v[None], sums), num_tokens)

  probs = jnp.asarray([[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]])
  other = probs.at[0, 2].set(jnp.array([0.01, 0.99]))
  assert value(probs) == value(other)
  gradient = jax.grad(value)(probs)
  assert jnp.all(gradient[0, 2] == 0)
  assert jnp.any(gradient[0, :2] != 0)


@pytest.mark.parametrize(
  ("platform", "masked_until"), [("cpu", 3), ("gpu", 8), ("tpu", 16)]
)
def test_auto_dispatch_moves_rows_only_for_many_wide_experts(
  platform, masked_until, monkeypatch
):
  monkeypatch.setattr(mole.activations, "platform", lambda: platform)
  choose = lambda e, r, k=1, rows=16384: mole.choose_dispatch(rows, e, k, r, 64)
  assert choose(masked_until, 32) == "masked"
  assert choose(masked_until + 1, 32) == "gather"
  assert choose(8, 128) == "gather"
  assert choose(8, 8, k=8) == "masked"
  # A step of decoding would pad its row to a block of each expert.
  assert choose(64, 1, rows=1) == "masked"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(gate="soft"), "mole.gate='soft' must be one of"),
    (dict(top_k=4), "mole.top_k=4 must lie between 1 and mole.num_experts=3"),
    (dict(dispatch="sort"), "mole.dispatch='sort'"),
    (dict(router_scope="model"), "mole.router_scope='model'"),
    (dict(rank=0), "mole.rank=0"),
  ],
)
def test_a_wrong_setting_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)
