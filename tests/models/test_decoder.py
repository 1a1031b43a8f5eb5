"""The decoder against a NumPy Llama, packed against separate, cached or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import attention, decoder, mole
from tests.models import small

CONFIG = decoder.DecoderConfig(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  rope_theta=100.0,
)
PHI = dataclasses.replace(
  CONFIG, head_dim=10, **(small.PHI | {"rotary_fraction": 0.4})
)
LORA = decoder.LoraConfig(rank=2, alpha=4.0, dropout=0.0)
MOLE = mole.MoleConfig(num_experts=3, rank=2, alpha=4.0, dropout=0.0)
TOKENS = 11


def make(config=CONFIG, lora=LORA, experts=MOLE, remat="none"):
  """A decoder, random parameters (every one of them), random inputs."""
  module = decoder.Decoder(config, lora, experts, remat)
  x = jax.random.normal(jax.random.key(0), (2, TOKENS, config.hidden_size))
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(1), *inputs(x))["params"]
  )
  return module, small.draw(shapes, 2), x


def inputs(x, segment_ids=None, positions=None):
  batch, tokens = x.shape[:2]
  if segment_ids is None:
    segment_ids = jnp.ones((batch, tokens), jnp.int32)
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
  mask = attention.causal_segment_mask(segment_ids)
  return x, positions, mask, segment_ids[..., None] == jnp.ones((1, 1, 1), int)


def numpy_decoder(params, x, config):
  """Llama without adapters, one position after the other, in float64."""
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  x = np.asarray(x, np.float64)
  half = config.head_dim // 2

  def norm(x, scale):
    mean = np.mean(x**2, -1, keepdims=True)
    return x / np.sqrt(mean + config.norm_eps) * scale

  def rotate(vector, position):
    turned = np.empty_like(vector)
    for i in range(half):
      angle = position / config.rope_theta ** (2 * i / config.head_dim)
      a, b = vector[i], vector[i + half]
      turned[i] = a * np.cos(angle) - b * np.sin(angle)
      turned[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return turned

  for layer in range(config.num_layers):
    w = jax.tree.map(lambda v, layer=layer: v[layer], p["layers"])
    attn, mlp = w["self_attn"], w["mlp"]
    out = np.zeros_like(x)
    y = norm(x, w["input_layernorm"]["scale"])
    for b in range(x.shape[0]):
      for n in range(config.num_heads):
        kv = n // (config.num_heads // config.num_kv_heads)
        cut = lambda name, i, b=b, y=y, attn=attn: (
          y[b] @ attn[name]["kernel"]
        )[:, i * config.head_dim : (i + 1) * config.head_dim]
        q = np.stack([rotate(v, t) for t, v in enumerate(cut("q_proj", n))])
        k = np.stack([rotate(v, t) for t, v in enumerate(cut("k_proj", kv))])
        v = cut("v_proj", kv)
        heads = np.zeros((x.shape[1], config.num_heads, config.head_dim))
        for t in range(x.shape[1]):
          scores = k[: t + 1] @ q[t] / np.sqrt(config.head_dim)
          weights = np.exp(scores - scores.max())
          heads[t, n] = weights / weights.sum() @ v[: t + 1]
        out[b] += heads.reshape(x.shape[1], -1) @ attn["o_proj"]["kernel"]
    x = x + out
    y = norm(x, w["post_attention_layernorm"]["scale"])
    gate = y @ mlp["gate_proj"]["kernel"]
    up = y @ mlp["up_proj"]["kernel"]
    x = x + gate / (1 + np.exp(-gate)) * up @ mlp["down_proj"]["kernel"]
  return norm(x, p["norm"]["scale"])


def test_decoder_without_adapters_is_llama():
  module, params, x = make(
    lora=decoder.LoraConfig(rank=0), experts=mole.MoleConfig(num_experts=0)
  )
  hidden, routing, cache, _ = small.apply(module, params, *inputs(x))
  assert routing is None and cache is None
  expected = numpy_decoder(params, x, CONFIG)
  np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_packed_segments_do_not_see_each_other():
  module, params, x = make()
  segment_ids = jnp.asarray([[1] * 4 + [2] * 5 + [0] * 2, [1] * TOKENS])
  positions = jnp.asarray([[*range(4), *range(5), 0, 0], list(range(TOKENS))])
  packed = small.apply(module, params, *inputs(x, segment_ids, positions))[0]
  for start, end in ((0, 4), (4, 9)):
    alone = small.apply(module, params, *inputs(x[:1, start:end]))[0]
    np.testing.assert_allclose(
      packed[:1, start:end], alone, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("config", [CONFIG, PHI], ids=["Llama", "Phi"])
def test_cached_decoding_equals_the_whole_sequence(config):
  module, params, x = make(config)
  expected = small.apply(module, params, *inputs(x))[0]
  cache = decoder.empty_cache(config, 2, TOKENS)
  parts = []
  for start, end in ((0, 6), (6, 7), (7, 11)):
    slots = jnp.arange(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
    mask = slots[None, None] <= positions[:, :, None]
    hidden, _, cache, _ = small.apply(
      module,
      params,
      x[:, start:end],
      positions,
      mask,
      jnp.ones((2, end - start, 1), bool),
      cache=cache,
      slot=jnp.int32(start),
    )
    parts.append(hidden)
  found = jnp.concatenate(parts, axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "attention", "named"])
def test_rematerialisation_changes_memory_not_gradients(remat):
  def gradient_and_memory(name):
    module, params, x = make(remat=name)
    loss = lambda p: jnp.square(small.apply(module, p, *inputs(x))[0]).sum()
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled(params), memory

  expected, most = gradient_and_memory("none")
  found, memory = gradient_and_memory(remat)
  assert memory < most
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    scale = float(jnp.abs(other).max())
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale + 1e-12)


def test_shared_router_is_one_for_all_layers():
  shared = dataclasses.replace(MOLE, router_scope="shared")
  module, params, x = make(experts=shared)
  assert params["router"]["kernel"].shape == (24, 3)
  assert "router" not in params["layers"]["mlp"]
  # The same router given to every layer of the other form does the same.
  other = decoder.Decoder(CONFIG, LORA, MOLE)
  copy = jax.tree.map(lambda v: v, params)
  router = copy.pop("router")
  copy["layers"]["mlp"]["router"] = jax.tree.map(
    lambda v: jnp.stack([v, v]), router
  )
  found, routing, _, _ = small.apply(module, params, *inputs(x))
  expected, expected_routing, _, _ = small.apply(other, copy, *inputs(x))
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(routing.chosen, expected_routing.chosen)


def test_routing_is_stacked_over_layers_and_leaves_padding_out():
  module, params, x = make()
  segment_ids = jnp.asarray([[1] * 4 + [0] * 7, [1] * TOKENS])
  _, routing, *_ = small.apply(module, params, *inputs(x, segment_ids))
  assert routing.chosen.shape == (2, 2, TOKENS, 1)
  np.testing.assert_allclose(
    routing.sums.load.sum(-1)[..., 0], [[4, 11], [4, 11]]
  )


def test_tied_head_is_the_embedding():
  config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
  module, params, x = make(config)
  assert "lm_head" not in params
  logits = small.apply(module, params, x, method="unembed")
  expected = x @ params["embed_tokens"].T
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_phi_has_its_own_parameters_and_a_bias_on_its_logits():
  module, params, x = make(PHI)
  layers = params["layers"]
  assert set(layers) == {"input_layernorm", "self_attn", "mlp"}
  assert set(layers["mlp"]) == {"fc1", "fc2", "router"}
  assert set(params["norm"]) == {"scale", "bias"}
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    assert layers["self_attn"][name]["bias"].shape[0] == PHI.num_layers
  logits = small.apply(module, params, x, method="unembed")
  expected = x @ params["lm_head"] + params["lm_head_bias"][None, None]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_phi_2_has_as_many_parameters_as_its_file():
  config = decoder.DecoderConfig(
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    head_dim=80,
    norm="layer",
    rotary_fraction=0.4,
    attention_bias="all",
    mlp="gelu",
    is_parallel=True,
    head_bias=True,
    max_position_embeddings=2048,
  )
  assert config.rotary_dim == 32
  module = decoder.Decoder(
    config, decoder.LoraConfig(rank=0), mole.MoleConfig(num_experts=0)
  )
  x = jnp.zeros((1, 2, config.hidden_size))
  init = lambda: module.init(jax.random.key(0), *inputs(x))["params"]
  leaves = jax.tree.leaves(jax.eval_shape(init))
  # microsoft/phi-2 in safetensors, as its page counts them.
  assert sum(leaf.size for leaf in leaves) == 2_779_683_840


def test_qkv_bias_leaves_the_output_map_without():
  config = dataclasses.replace(CONFIG, attention_bias="qkv")
  _, params, _ = make(config)
  attn = params["layers"]["self_attn"]
  assert "bias" in attn["k_proj"] and "bias" not in attn["o_proj"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(norm="group"), r"decoder.norm='group' must be one of \('rms'"),
    (dict(attention_bias="o"), "decoder.attention_bias='o' must be one of"),
    (dict(mlp="relu"), "decoder.mlp='relu' must be one of"),
    (dict(rotary_fraction=0.0), r"rotary_fraction=0.0 must lie in \(0, 1\]"),
    (dict(rotary_fraction=0.5), "of decoder.head_dim=6 is 3 dimensions"),
    (dict(head_dim=5), "decoder.head_dim=5 must be even"),
    (dict(num_kv_heads=3), "decoder.num_heads=4 must be a multiple of"),
  ],
)
def test_a_wrong_setting_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_dropout_only_acts_in_training():
  lora = dataclasses.replace(LORA, dropout=0.5)
  module, params, x = make(lora=lora)
  once, *_ = small.apply(module, params, *inputs(x))
  plain, *_ = small.apply(make()[0], params, *inputs(x))
  np.testing.assert_array_equal(once, plain)
  train = lambda seed: small.apply(
    module,
    params,
    *inputs(x),
    is_training=True,
    rngs={"dropout": jax.random.key(seed)},
  )[0]
  assert jnp.any(train(0) != once)
  assert jnp.any(train(0) != train(1))
  np.testing.assert_array_equal(train(0), train(0))
