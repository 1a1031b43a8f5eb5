"""Our mixture against one written in PyTorch from the paper's spec alone."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mole_jax.models import llava
from mole_jax.training import losses, state
from tests.interop import spec_mole
from tests.models import small

# A seed with which every expert serves and no choice is close.
SEED = 13
NUM_EXPERTS, NUM_LAYERS, RANK, ALPHA = 3, 3, 3, 5.0
# Odd widths, and query heads whose width is not the model's.
SHAPE = dict(
  vocab_size=37,
  hidden_size=15,
  intermediate_size=23,
  num_layers=NUM_LAYERS,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
)
CASES = {
  "top 1, none": dict(gate="none"),
  "top 1, prob": dict(gate="prob"),
  "top 1, straight through": dict(gate="straight_through"),
  "top 2, none": dict(gate="none", top_k=2),
  "top 2, prob": dict(gate="prob", top_k=2),
  "top 2, straight through": dict(gate="straight_through", top_k=2),
  "dense": dict(gate="prob", top_k=3),
  "shared router, none": dict(gate="none", router_scope="shared"),
  "shared router, prob": dict(gate="prob", router_scope="shared"),
}
# Each is traced and compiled in a second or two: not the full product.
PAIRS = [
  ("top 1, none", "loop"),
  ("top 1, none", "masked"),
  ("top 1, none", "gather"),
  ("top 1, prob", "masked"),
  ("top 1, straight through", "gather"),
  ("top 2, none", "gather"),
  ("top 2, prob", "loop"),
  ("top 2, straight through", "masked"),
  ("dense", "masked"),
  ("dense", "gather"),
  ("shared router, none", "masked"),
  ("shared router, prob", "loop"),
]
# Far above the paper's 1e-2, so that a wrong balance loss shows in the total.
WEIGHT = 0.5
WEIGHTS = {
  "language": (0.0, 0.0),
  "pooled": (WEIGHT, 0.0),
  "per_layer": (0.0, WEIGHT),
}
# In a layer whose router is its own, one expert serves no token.
IDLE_LAYER, IDLE_EXPERT = 1, 2
TRAINABLE = (r".*/lora_[ab]", r".*/router/.*")


class Batch(NamedTuple):
  """Rows of tokens; the mask is 1 at tokens, 0 at padding."""

  ids: np.ndarray
  mask: np.ndarray
  labels: np.ndarray


class Result(NamedTuple):
  """What is compared; losses and gradients by the names of WEIGHTS.

  hidden [N, D] and chosen [L, N, top_k] (in ascending order: a set) of tokens,
  padding left out; gradients by our path and layer, in our layout.
  """

  hidden: np.ndarray
  chosen: np.ndarray
  losses: dict[str, float]
  gradients: dict[str, dict[tuple[str, int | None], np.ndarray]]


def make_batch():
  """A full row, one padded on the right, one on the left."""
  rng = np.random.default_rng(0)
  # Padding holds random tokens too: what it holds must not matter.
  ids = rng.integers(4, 37, (3, 13)).astype(np.int32)
  mask = np.ones_like(ids)
  mask[1, 9:] = 0
  mask[2, :4] = 0
  is_target = rng.random(ids.shape) < 0.6
  # Prompts are not learned, above all not a row's first token.
  is_target[:2, :3] = False
  is_target[2, :6] = False
  labels = np.where(is_target & (mask > 0), ids, spec_mole.IGNORED)
  return Batch(ids, mask, labels.astype(np.int32))


@functools.cache
def make_ours(case):
  """Our configuration and its parameters by path, all random."""
  common = dict(rank=RANK, alpha=ALPHA, dropout=0.0)
  mole = dict(num_experts=NUM_EXPERTS, block_rows=4) | common | CASES[case]
  config = llava.make_config(
    small.VALUES
    | dict(decoder=SHAPE, lora=common, mole=mole, use_visual_tokens=False)
  )
  rng = np.random.default_rng(SEED)
  flat = {
    path: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32)
    for path, leaf in state.parameter_shapes(config).items()
    if path.startswith("decoder/")
  }
  for path, leaf in flat.items():
    if path.endswith("/scale"):
      leaf += 1.0
  # Enough to leave it idle; far more would take the probabilities of the other
  # two to a sum of one, and the balance loss's gradient at top 2 to rounding.
  if "decoder/layers/mlp/router/bias" in flat:
    flat["decoder/layers/mlp/router/bias"][IDLE_LAYER, IDLE_EXPERT] -= 5.0
  return config, flat


def our_name(name, router_scope):
  """The spec's name of a parameter -> our path, and the layer if any."""
  part, *rest = name.split(".")
  whole = {
    "embedding": "decoder/embed_tokens",
    "norm": "decoder/norm/scale",
    "head": "decoder/lm_head",
  }
  if part in whole:
    return whole[part], None
  layer, *rest = rest
  if part == "routers":
    leaf = {"weight": "kernel", "bias": "bias"}[rest[0]]
    if router_scope == "shared":
      return f"decoder/router/{leaf}", None
    return f"decoder/layers/mlp/router/{leaf}", int(layer)
  assert part == "blocks"
  norms = {
    "attention_norm": "input_layernorm/scale",
    "mlp_norm": "post_attention_layernorm/scale",
  }
  if rest[0] in norms:
    return f"decoder/layers/{norms[rest[0]]}", int(layer)
  module, linear, leaf = rest
  module = {"attention": "self_attn", "mlp": "mlp"}[module]
  leaf = "kernel" if leaf == "base" else leaf
  return f"decoder/layers/{module}/{linear}_proj/{leaf}", int(layer)


def in_our_layout(array, path):
  """PyTorch's [out, in] -> our [in, out], and back."""
  is_matrix = path.endswith(("kernel", "lora_a", "lora_b", "lm_head"))
  return array.swapaxes(-1, -2) if is_matrix else array


def make_spec(flat, **mole):
  """The spec's model with our parameters, and our name of each."""
  model = spec_mole.MoleDecoder(
    spec_mole.Spec(
      vocab=SHAPE["vocab_size"],
      width=SHAPE["hidden_size"],
      mlp_width=SHAPE["intermediate_size"],
      num_layers=NUM_LAYERS,
      num_heads=SHAPE["num_heads"],
      num_kv_heads=SHAPE["num_kv_heads"],
      head_dim=SHAPE["head_dim"],
      num_experts=NUM_EXPERTS,
      rank=RANK,
      alpha=ALPHA,
      **mole,
    )
  )
  names = {}
  for name, parameter in model.named_parameters():
    path, layer = our_name(name, model.spec.router_scope)
    leaf = np.asarray(flat[path])
    leaf = in_our_layout(leaf if layer is None else leaf[layer], path)
    assert leaf.shape == tuple(parameter.shape), name
    assert np.all(leaf != 0), name
    parameter.data = torch.from_numpy(leaf.copy())
    names[name] = path, layer
  return model, names


@functools.cache
def run_spec(case):
  torch.set_num_threads(1)
  mole = CASES[case]
  _, flat = make_ours(case)
  model, names = make_spec(flat, **mole)
  # Nothing of our decoder is left out, nor trained by one side only.
  assert {path for path, _ in names.values()} == set(flat)
  adapters = {
    names[name]: leaf
    for name, leaf in model.named_parameters()
    if leaf.requires_grad
  }
  trained, _ = state.split(flat, TRAINABLE)
  assert {path for path, _ in adapters} == set(trained)

  batch = make_batch()
  ids, labels = (torch.from_numpy(x).long() for x in (batch.ids, batch.labels))
  mask = torch.from_numpy(batch.mask).bool()
  output = model(ids, mask)
  check_routing(output, mask, mole)
  total, gradients = {}, {}
  for kind in WEIGHTS:
    weight, balance = (0.0, "pooled") if kind == "language" else (WEIGHT, kind)
    loss = spec_mole.total_loss(output, labels, mask, weight, balance)
    found = torch.autograd.grad(
      loss, list(adapters.values()), retain_graph=True
    )
    total[kind] = loss.item()
    gradients[kind] = {
      key: in_our_layout(gradient.numpy(), key[0])
      for key, gradient in zip(adapters, found, strict=True)
    }
  hidden = output.hidden.detach()[mask].numpy()
  chosen = np.sort(output.chosen[:, mask].numpy())
  return Result(hidden, chosen, total, gradients)


def check_routing(output, mask, mole):
  """The routing tests something, and rounding cannot turn it."""
  top_k = mole.get("top_k", 1)
  chosen, probs = output.chosen[:, mask], output.probs[:, mask].detach()
  for layer in range(NUM_LAYERS):
    used = set(chosen[layer].flatten().tolist())
    if top_k == NUM_EXPERTS or mole.get("router_scope") == "shared":
      assert len(used) > 1
    else:
      idle = {IDLE_EXPERT} if layer == IDLE_LAYER else set()
      assert used == set(range(NUM_EXPERTS)) - idle
  if top_k < NUM_EXPERTS:
    ordered = probs.log().sort(dim=-1, descending=True).values
    assert (ordered[..., top_k - 1] - ordered[..., top_k]).min() > 1e-3


def our_objective(model, batch, segments):
  """A function of trainable and frozen parameters and balance weights."""
  num_segments = int(segments.max())
  # A token's position is the number of those before it in its segment.
  is_same = segments[:, :, None] == segments[:, None, :]
  positions = jnp.asarray(np.tril(is_same).sum(-1) - 1)
  ids, labels = jnp.asarray(batch.ids), jnp.asarray(batch.labels)
  segments = jnp.asarray(segments)

  def objective(trainable, frozen, weights):
    params = {"params": state.unflatten({**frozen, **trainable})}
    output = model.apply(params, ids, None, positions, segments, num_segments)
    sums = losses.next_token_sums(
      output.hidden,
      labels,
      jnp.zeros_like(ids),
      lambda hidden: model.apply(params, hidden, method="unembed"),
      num_domains=1,
      chunk_tokens=5,
    )
    loss = sums.loss.sum() / sums.count.sum()
    for weight, kind in zip(weights, ("pooled", "per_layer"), strict=True):
      loss += weight * losses.balance_loss(
        output.routing, segments, num_segments, kind
      )
    return loss, (output.hidden, output.routing.chosen)

  step = jax.value_and_grad(objective, has_aux=True)
  return jax.jit(step)


def run_ours(case, dispatch, batch, segments):
  """Our result; `segments` number the samples of a row, 0 is padding."""
  config, flat = make_ours(case)
  mole = dataclasses.replace(config.mole, dispatch=dispatch)
  model = llava.Llava(dataclasses.replace(config, mole=mole))
  trainable, frozen = state.split(flat, TRAINABLE)
  step = our_objective(model, batch, segments)
  total, gradients = {}, {}
  for kind, weights in WEIGHTS.items():
    (loss, (hidden, chosen)), found = step(trainable, frozen, weights)
    total[kind] = float(loss)
    gradients[kind] = dict(by_layer(found))
  is_token = batch.mask.astype(bool)
  return Result(
    np.asarray(hidden)[is_token],
    np.sort(np.asarray(chosen)[:, is_token]),
    total,
    gradients,
  )


def by_layer(flat):
  for path, leaf in flat.items():
    leaf = np.asarray(leaf)
    if "/layers/" in path:
      for layer in range(NUM_LAYERS):
        yield (path, layer), leaf[layer]
    else:
      yield (path, None), leaf


class Pair(NamedTuple):
  ours: Result
  spec: Result
  mole: dict


@pytest.fixture(scope="module", params=PAIRS, ids=", ".join)
def pair(request):
  case, dispatch = request.param
  batch = make_batch()
  ours = run_ours(case, dispatch, batch, segments=batch.mask)
  return Pair(ours, run_spec(case), CASES[case])


def assert_close(ours, spec, rtol, what=None):
  """Relative to the largest entry; exactly zero where that is zero."""
  assert ours.shape == spec.shape, what
  error = np.abs(ours - spec).max()
  assert error <= rtol * np.abs(spec).max(), (what, error)


def assert_gradients_are_close(ours, spec):
  for kind in WEIGHTS:
    assert ours.gradients[kind].keys() == spec.gradients[kind].keys()
    for key, gradient in spec.gradients[kind].items():
      found = ours.gradients[kind][key]
      assert_close(found, gradient, 1e-4, (kind, key))


def test_hidden_states_and_routing_are_those_of_the_spec(pair):
  np.testing.assert_array_equal(pair.ours.chosen, pair.spec.chosen)
  assert_close(pair.ours.hidden, pair.spec.hidden, 1e-4)


def test_language_and_total_losses_are_those_of_the_spec(pair):
  assert pair.ours.losses == pytest.approx(pair.spec.losses, rel=1e-5)


def test_the_gradient_of_every_adapter_is_that_of_the_spec(pair):
  assert_gradients_are_close(pair.ours, pair.spec)


def test_an_expert_that_serves_no_token_has_no_gradient(pair):
  keys = [
    key
    for key in pair.spec.gradients["pooled"]
    if "/mlp/" in key[0] and "/lora_" in key[0]
  ]
  assert len(keys) == 6 * NUM_LAYERS
  num_idle = 0
  for key, expert in itertools.product(keys, range(NUM_EXPERTS)):
    is_idle = not np.any(pair.spec.chosen[key[1]] == expert)
    num_idle += is_idle
    for result in pair[:2]:
      gradient = result.gradients["pooled"][key][expert]
      # Of the last layer, tokens that predict nothing count for nothing.
      if is_idle or key[1] < NUM_LAYERS - 1:
        assert np.any(gradient != 0) != is_idle, (key, expert)
  top_k, scope = pair.mole.get("top_k"), pair.mole.get("router_scope")
  all_busy = top_k == NUM_EXPERTS or scope == "shared"
  assert num_idle == (0 if all_busy else 6)


def test_without_a_gate_only_the_balance_loss_teaches_the_router(pair):
  for kind, result in itertools.product(WEIGHTS, pair[:2]):
    routers = [k for k in result.gradients[kind] if "/router/" in k[0]]
    assert routers
    is_taught = kind != "language" or pair.mole["gate"] != "none"
    for key in routers:
      gradient = result.gradients[kind][key]
      assert bool(np.any(gradient != 0)) == is_taught, (kind, key)


def test_packed_samples_are_the_rows_of_the_spec():
  case = "top 2, prob"
  batch = make_batch()
  is_token = batch.mask.astype(bool)
  segments = np.broadcast_to(np.arange(1, 4, dtype=np.int32)[:, None], (3, 13))
  packed = Batch(*(values[is_token][None] for values in batch))
  ours = run_ours(case, "gather", packed, segments[is_token][None])
  spec = run_spec(case)
  np.testing.assert_array_equal(ours.chosen, spec.chosen)
  assert_close(ours.hidden, spec.hidden, 1e-4)
  assert ours.losses == pytest.approx(spec.losses, rel=1e-5)
  assert_gradients_are_close(ours, spec)
