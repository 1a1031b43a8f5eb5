"""Decoder of the kinds of Llama, Qwen2, StableLM and Phi, MoLE in its MLPs.

Names follow `LlamaForCausalLM` of Transformers, fc1 and fc2 `PhiForCausalLM`.
Layers are scanned, so compile time does not grow with depth; parameters carry a
leading layer axis.

Einsum axes: see lora.py; "L" are layers, "J" key positions.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mole_jax.models import attention, ffn, lora, mole, norms, pattern, remat
from mole_jax.models import moe as moe_lib
from mole_jax.parallel import activations

ATTENTION_BIASES = ("none", "qkv", "all")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder's shape, in Transformers' words.

  norm: "rms", or "layer": with mean and bias.  norm_eps: its epsilon.
  rotary_fraction: of a head's dimensions, how many positions turn: its first.
  attention_bias: which of q, k, v, o have one: "none", "qkv" or "all".
  mlp: one of `ffn.FORMS`.
  is_parallel: attention and MLP both read one norm of the layer's input; else
    the MLP comes after attention, with a norm of its own.
  head_bias: whether the language-model head has one.
  sliding_window: tokens that attention reaches back, 0 for all. Longer rows
    are refused: up to this length a window changes nothing.
  max_position_embeddings: tokens that the decoder was trained for.
  """

  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_layers: int = 32
  num_heads: int = 32
  num_kv_heads: int = 32
  head_dim: int = 128
  norm: str = "rms"
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rotary_fraction: float = 1.0
  attention_bias: str = "none"
  mlp: str = "swiglu"
  is_parallel: bool = False
  head_bias: bool = False
  sliding_window: int = 0
  max_position_embeddings: int = 4096
  tie_word_embeddings: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"decoder.num_heads={self.num_heads} must be a multiple of "
        f"decoder.num_kv_heads={self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"decoder.head_dim={self.head_dim} must be even: rotary positions "
        "turn pairs of dimensions."
      )
    for key, value, known in (
      ("norm", self.norm, tuple(norms.KINDS)),
      ("attention_bias", self.attention_bias, ATTENTION_BIASES),
      ("mlp", self.mlp, ffn.FORMS),
    ):
      if value not in known:
        raise ValueError(f"decoder.{key}={value!r} must be one of {known}.")
    if not 0 < self.rotary_fraction <= 1:
      raise ValueError(
        f"decoder.rotary_fraction={self.rotary_fraction} must lie in (0, 1]: "
        "a share of decoder.head_dim."
      )
    if self.rotary_dim < 2 or self.rotary_dim % 2:
      raise ValueError(
        f"decoder.rotary_fraction={self.rotary_fraction} of "
        f"decoder.head_dim={self.head_dim} is {self.rotary_dim} dimensions; "
        "wanted an even number from 2 on: positions turn pairs of them."
      )

  @property
  def rotary_dim(self) -> int:
    """Dimensions of a head that positions turn."""
    return int(self.head_dim * self.rotary_fraction)

  def make_norm(self, name: str | None = None) -> nn.Module:
    """A norm of this decoder."""
    return norms.KINDS[self.norm](self.norm_eps, name=name)

  def check_length(self, num_tokens: int, what: str) -> None:
    """Raises ValueError where rows are longer than attention's window."""
    if self.sliding_window and num_tokens > self.sliding_window:
      raise ValueError(
        f"{what} is {num_tokens} tokens, but the decoder attends within "
        f"{self.sliding_window} (decoder.sliding_window), which is not "
        f"implemented: use {self.sliding_window} or fewer."
      )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Plain LoRA on q, k, v, o of the decoder; rank 0 is none."""

  rank: int = 0
  alpha: float = 64.0
  dropout: float = 0.05


class Cache(NamedTuple):
  """Keys and values of every layer; slots beyond those written are zero."""

  key: Float[Array, "L B J K H"]
  value: Float[Array, "L B J K H"]


class LayerRouting(NamedTuple):
  """What a mixture returns of its routing, stacked over layers with one.

  Where layers differ, experts that a layer has not get zeros in `sums`, and
  choices that it does not make are -1.
  """

  sums: mole.RoutingSums
  chosen: Int[Array, "B T topk"]


def experts_of_routed_layers(
  config: DecoderConfig,
  mole_config: mole.MoleConfig,
  moe_config: moe_lib.MoeConfig,
) -> dict[int, int]:
  """Layers whose tokens choose among experts -> how many; in order.

  Whole FFNs, or LoRA experts where `mole_config` has them.
  """
  experts = moe_lib.experts_by_layer(moe_config, config.num_layers)
  lora_experts = mole_config.num_experts if mole_config.has_router else 0
  found = {i: number or lora_experts for i, number in enumerate(experts)}
  return {i: number for i, number in found.items() if number}


class _Shared(NamedTuple):
  """What every layer receives alike."""

  cos: Float[Array, "B T 1 R2"]
  sin: Float[Array, "B T 1 R2"]
  mask: Bool[Array, "B T J"] | None
  segment_ids: Int[Array, "B T"] | None
  segments: Bool[Array, "B T S"]
  router: tuple[Float[Array, "D E"], Float[Array, " E"]] | None
  slot: Int[Array, ""] | None


def empty_cache(
  config: DecoderConfig, batch_size: int, num_slots: int, dtype=jnp.float32
) -> Cache:
  """A cache of zeros for `num_slots` positions."""
  shape = (
    config.num_layers,
    batch_size,
    num_slots,
    config.num_kv_heads,
    config.head_dim,
  )
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class SelfAttention(nn.Module):
  """Grouped-query attention with rotary positions and LoRA on q, k, v, o."""

  config: DecoderConfig
  lora: LoraConfig
  init_scale: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    shared: _Shared,
    cache: Cache | None,
    is_training: bool,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    c = self.config
    batch, tokens, width = x.shape
    adapter = {"rank": self.lora.rank, "alpha": self.lora.alpha}
    has_bias = c.attention_bias in ("qkv", "all")
    rate = self.lora.dropout if self.lora.rank else 0.0
    u = lora.dropout(self, x, rate, is_training)

    def linear(num_heads, name):
      module = lora.LoraLinear(
        num_heads * c.head_dim, has_bias, name=name, **adapter
      )
      y = module(x, u)
      y = y.reshape(batch, tokens, num_heads, c.head_dim)
      return activations.constrain(y, activations.ROWS, None, "tensor", None)

    query = linear(c.num_heads, "q_proj")
    key = linear(c.num_kv_heads, "k_proj")
    value = linear(c.num_kv_heads, "v_proj")
    query = attention.rotate(query, shared.cos, shared.sin)
    key = attention.rotate(key, shared.cos, shared.sin)
    if cache is not None:
      key, value = (
        jax.lax.dynamic_update_slice_in_dim(
          old, new.astype(old.dtype), shared.slot, axis=1
        )
        for old, new in ((cache.key, key), (cache.value, value))
      )
      cache = Cache(key, value)
    is_causal = shared.mask is None
    y = attention.attend(
      query, key, value, shared.mask, is_causal, shared.segment_ids
    )
    y = y.reshape(batch, tokens, -1)
    o_proj = lora.LoraLinear(
      width,
      c.attention_bias == "all",
      init_scale=self.init_scale,
      is_input_cut=True,
      name="o_proj",
      **adapter,
    )
    u = lora.dropout(self, y, rate, is_training)
    return activations.rows(o_proj(y, u)), cache


class DecoderLayer(nn.Module):
  """One block; the body of the scan over layers."""

  config: DecoderConfig
  lora: LoraConfig
  mole: mole.MoleConfig
  is_training: bool
  keep_inputs: bool = False
  moe: moe_lib.MoeConfig = moe_lib.MoeConfig()
  num_experts: int = 0  # Whole FFNs; 0 is one.

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], cache: Cache | None, shared: _Shared
  ) -> tuple[
    Float[Array, "B T D"],
    tuple[LayerRouting | None, Cache | None, Float[Array, "B T D"] | None],
  ]:
    c = self.config
    kept = x if self.keep_inputs else None
    # Residual branches start small: variance / (2 L), as in GPT-2.
    init_scale = 0.5 / c.num_layers
    y = c.make_norm("input_layernorm")(x)
    self_attn = SelfAttention(c, self.lora, init_scale, name="self_attn")
    attended, cache = self_attn(y, shared, cache, self.is_training)
    if not c.is_parallel:
      x = checkpoint_name(x + attended, "resid_mid")
      y = c.make_norm("post_attention_layernorm")(x)
    y, routing = self._mlp(y, shared, init_scale)
    y = activations.rows(y)
    if c.is_parallel:
      x = x + attended
    return x + y, (routing, cache, kept)

  @nn.nowrap  # A method of its own would be a place in every trace.
  def _mlp(
    self, x: Float[Array, "B T D"], shared: _Shared, init_scale: float
  ) -> tuple[Float[Array, "B T D"], LayerRouting | None]:
    c, segments = self.config, shared.segments
    if self.num_experts == 0:
      mlp = mole.MoleMlp(
        c.intermediate_size, self.mole, init_scale, c.mlp, name="mlp"
      )
      y, routing = mlp(x, shared.router, self.is_training)
      if routing is None:
        return y, None
      sums = mole.routing_sums(routing, segments)
      return y, LayerRouting(sums, routing.chosen)
    mlp = moe_lib.MoeMlp(
      c.mlp,
      c.intermediate_size,
      self.num_experts,
      self.moe,
      self.mole,
      init_scale,
      name="moe",
    )
    is_token = segments.any(-1)
    y, routing, kept = mlp(x, is_token, self.is_training)
    if self.moe.count_padding:  # As a segment of its own.
      segments = jnp.concatenate([segments, ~is_token[..., None]], axis=-1)
    sums = mole.routing_sums(routing, segments, kept)
    return y, LayerRouting(sums, routing.chosen)


class Decoder(nn.Module):
  """Token embedding, scanned layers, final norm and language-model head."""

  config: DecoderConfig
  lora: LoraConfig
  mole: mole.MoleConfig
  remat: str = "none"
  moe: moe_lib.MoeConfig = moe_lib.MoeConfig()

  def setup(self):
    c = self.config
    normal = nn.initializers.normal(0.02)
    shape = (c.vocab_size, c.hidden_size)
    self.embed_tokens = self.param("embed_tokens", normal, shape)
    if not c.tie_word_embeddings:
      self.lm_head = self.param("lm_head", normal, shape[::-1])
    if c.head_bias:
      zeros = nn.initializers.zeros_init()
      self.lm_head_bias = self.param("lm_head_bias", zeros, shape[:1])
    self.norm = c.make_norm()
    if self.mole.has_router and self.mole.router_scope == "shared":
      self.router = mole.Router(self.mole.num_experts)

  def embed(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding table."""
    return jnp.take(self.embed_tokens, input_ids, axis=0)

  def unembed(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
    """Final hidden states -> logits, float32."""
    tied = self.config.tie_word_embeddings
    head = self.embed_tokens.T if tied else self.lm_head
    logits = lora.matmul(x, head).astype(jnp.float32)
    if self.config.head_bias:
      logits = logits + lora.along_last(self.lm_head_bias, logits)
    if logits.ndim == 3:
      logits = activations.constrain(logits, activations.ROWS, None, "tensor")
    return logits

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T J"] | None,
    segments: Bool[Array, "B T S"],
    cache: Cache | tuple[Cache, ...] | None = None,
    slot: Int[Array, ""] | None = None,
    is_training: bool = False,
    keep_inputs: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
  ) -> tuple[
    Float[Array, "B T D"],
    LayerRouting | None,
    Cache | tuple[Cache, ...] | None,
    Float[Array, "L B T D"] | None,
  ]:
    """Runs the layers on embedded tokens.

    Args:
      x: embedded tokens, image features in their places.
      positions: rotary positions.
      mask: True where a token may look; None where a row is one segment, in
        which a token looks at all that are not later.
      segments: membership of tokens in segments; all False on padding.
      cache: with one, the new keys and values are written from `slot` on and
        attention runs over the whole cache.
      slot: first cache slot to write.
      is_training: turns LoRA dropout on (needs the "dropout" rng).
      keep_inputs: returns what enters each layer, to compare with others.
      segment_ids: where `mask` is causal within segments: of what.
      layers: parameters of each layer, `pattern.by_layer` of the stacked ones:
        run one after the other, unscanned, with a cache for each.

    Returns:
      final hidden states (normalised), routing stacked over layers (None
      without a mixture), the new cache (None without one), each layer's input
      (None unless kept).
    """
    c = self.config
    router = None
    if self.mole.has_router and self.mole.router_scope == "shared":
      router = self.router(c.hidden_size)
    angles = attention.rotary_angles(positions, c.rotary_dim, c.rope_theta)
    shared = _Shared(*angles, mask, segment_ids, segments, router, slot)
    if layers is not None:
      x, routing, cache = self._one_by_one(layers, x, cache, shared)
      return self.norm(x), routing, cache, None
    if self.moe.is_on:
      run = self._run_kinds(x, cache, shared, is_training, keep_inputs)
      x, (routing, cache, inputs) = run
      return self.norm(x), routing, cache, inputs
    body = DecoderLayer
    if self.remat != "none":
      body = nn.remat(body, policy=remat.policy(self.remat), prevent_cse=False)
    layers = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast),
      length=c.num_layers,
    )(c, self.lora, self.mole, is_training, keep_inputs, name="layers")
    x, (routing, cache, inputs) = layers(x, cache, shared)
    return self.norm(x), routing, cache, inputs

  @nn.nowrap
  def _layer(self, kind, is_training=False, keep_inputs=False) -> DecoderLayer:
    """A layer with `kind` experts, to be given its parameters."""
    return DecoderLayer(
      self.config,
      self.lora,
      self.mole,
      is_training,
      keep_inputs,
      self.moe,
      kind,
      parent=None,
    )

  @nn.nowrap
  def _one_by_one(self, layers, x, caches, shared):
    """Unscanned: no layer's weights or cache are cut from a stack."""
    kinds = moe_lib.experts_by_layer(self.moe, self.config.num_layers)
    routings, kept = [], []
    for kind, params, cache in zip(kinds, layers, caches, strict=True):
      with jax.named_scope("layers"):
        x, (routing, cache, _) = self._layer(kind).apply(
          {"params": params}, x, cache, shared
        )
      kept.append(cache)
      if routing is not None:
        routings.append(self._alike(routing))
    stack = lambda *leaves: jnp.stack(leaves)
    routing = jax.tree.map(stack, *routings) if routings else None
    return x, routing, tuple(kept)

  @nn.nowrap
  def _run_kinds(self, x, cache, shared, is_training, keep_inputs):
    """The layers where some have whole FFNs as experts, see `pattern`."""
    c = self.config
    kinds = moe_lib.experts_by_layer(self.moe, c.num_layers)
    layer = functools.partial(
      self._layer, is_training=is_training, keep_inputs=keep_inputs
    )

    def init(key):
      keys = jax.random.split(key, c.num_layers)
      first = None if cache is None else jax.tree.map(lambda a: a[0], cache)
      one = lambda key, kind: layer(kind).init(key, x, first, shared)["params"]
      by_kind = {}
      for kind in dict.fromkeys(kinds):
        of_kind = keys[jnp.array([i for i, k in enumerate(kinds) if k == kind])]
        # Not `vmap`, which cuDNN's attention does not take.
        by_kind[kind] = jax.lax.map(lambda key, k=kind: one(key, k), of_kind)
      return pattern.stack(by_kind, kinds)

    params = self.param("layers", init)
    keys = None
    if is_training and self.has_rng("dropout"):
      keys = jax.random.split(self.make_rng("dropout"), c.num_layers)

    def apply(kind, params, x, cache, key):
      rngs = None if key is None else {"dropout": key}
      return layer(kind).apply({"params": params}, x, cache, shared, rngs=rngs)

    results = []
    for run in pattern.runs(kinds):
      bodies = [
        remat.rematerialise(functools.partial(apply, kind), self.remat)
        for kind in run.pattern
      ]
      by_turn = lambda tree, run=run: jax.tree.map(
        lambda a: a[run.start : run.stop].reshape(
          run.repeats, len(run.pattern), *a.shape[1:]
        ),
        tree,
      )

      def turn(x, scanned, run=run, bodies=bodies):
        params, cache, keys = scanned
        outputs = []
        for slot, body in enumerate(bodies):
          own = pattern.of_layer(params, run, slot)
          own_cache, key = jax.tree.map(lambda a, i=slot: a[i], (cache, keys))
          x, output = body(own, x, own_cache, key)
          outputs.append(output)
        return x, outputs

      scanned = (
        pattern.of_run(params, kinds, run),
        by_turn(cache),
        by_turn(keys),
      )
      x, outputs = jax.lax.scan(turn, x, scanned)
      results.append(outputs)
    return x, self._in_order(results)

  @nn.nowrap
  def _alike(self, routing: LayerRouting) -> LayerRouting:
    """A layer's routing in the shape of the one with most experts."""
    if not self.moe.is_on:
      return routing
    routed = experts_of_routed_layers(self.config, self.mole, self.moe)
    width = max(routed.values())
    top_k = max(self.moe.top_k, self.mole.top_k if self.mole.has_router else 1)
    wide = lambda a: pattern.widen(a, -1, width, 0)
    sums = routing.sums
    sums = sums._replace(
      probs=wide(sums.probs), load=wide(sums.load), first=wide(sums.first)
    )
    return LayerRouting(sums, pattern.widen(routing.chosen, -1, top_k, -1))

  @nn.nowrap
  def _in_order(self, results):
    """Layers' results, stacked in the order of the layers."""
    routings, caches, inputs = [], [], []
    for outputs in results:
      found = [
        self._alike(routing) for routing, _, _ in outputs if routing is not None
      ]
      if found:
        routings.append(pattern.in_order(found))
      caches.append(pattern.in_order([cache for _, cache, _ in outputs]))
      inputs.append(pattern.in_order([kept for _, _, kept in outputs]))
    return tuple(map(pattern.joined, (routings, caches, inputs)))
