"""Generation with a key-value cache: prefill once, then a token at a time.

Everything has a static shape, so a few compiled programs serve any number of
prompts: rows of a batch are padded on the right to a bucket, and the i-th new
token of every row is written to cache slot T + i, whatever the row's length.

Axes: see models/lora.py; "M" are images per row, "Y" and "X" pixels, "I" new
tokens, "J" cache slots (T + I), "L" layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from mole_jax.models import decoder, llava, moe, pattern


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen; the default is greedy.

  temperature: 0 takes the likeliest token, more draws one.
  top_k: draws among the k likeliest only; 0 is off.
  top_p: draws among the fewest tokens whose probabilities reach p
    (Holtzman et al. 2020, equation 2); 1 is off.
  repetition_penalty: divides positive logits of tokens that the answer already
    holds, multiplies negative ones (Keskar et al. 2019, section 4.1); 1 is
    off. The prompt's tokens are not counted.
  """

  temperature: float | int = 0.0
  top_k: int = 0
  top_p: float | int = 1.0
  repetition_penalty: float | int = 1.0

  def __post_init__(self):
    for key, is_right, wanted in (
      ("temperature", self.temperature >= 0, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (off) or more"),
      ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
      ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
    ):
      if not is_right:
        raise ValueError(f"{key}={getattr(self, key)}; wanted {wanted}.")


GREEDY = Sampling()


class Generated(NamedTuple):
  """New tokens of each row, and the experts of its prompt and new tokens.

  `tokens` ends with the end-of-sequence id, then padding. A new token is
  routed when the next one is asked for: `token_experts` is -1 for those of
  which none was. Both are None without a mixture.
  """

  tokens: Int[Array, "B I"]
  prompt_experts: Int[Array, "L B T topk"] | None
  token_experts: Int[Array, "L B I topk"] | None


def generate(
  config: llava.LlavaConfig,
  params: Mapping[str, Any],
  input_ids: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  pixel_values: Float[Array, "B M Y X 3"] | None,
  is_banned: Bool[Array, " V"],
  key: PRNGKeyArray,
  streams: Int[Array, " B"],
  eos_id: Int[Array, ""],
  pad_id: Int[Array, ""],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  is_unrolled: bool = False,
) -> Generated:
  """Answers prompts; a pure function of arrays.

  Args:
    config: the model.
    params: its parameters, nested.
    input_ids: prompts, padded on the right.
    lengths: tokens of each prompt, at least 1.
    pixel_values: normalised images of each row, unused slots last.
    is_banned: tokens that are never generated.
    key: random key of the call.
    streams: each row draws from `fold_in(key, stream)`, so what it draws does
      not depend on its place in a batch.
    eos_id: ends a row; generation stops when all rows have ended.
    pad_id: stands behind the end.
    max_new_tokens: I.
    sampling: how tokens are chosen.
    is_unrolled: takes the decoder's weights apart by layer before the first
      new token, which costs a copy of them: a scan copies each layer's for
      every token.
  """
  model = llava.Llava(config)
  apply = lambda *args, method: model.apply(
    {"params": params}, *args, method=method
  )
  batch, num_prompt = input_ids.shape
  num_slots = num_prompt + max_new_tokens
  slots = jnp.arange(num_slots)[None, None]
  in_prompt = slots < lengths[:, None, None]
  keys = jax.vmap(lambda stream: jax.random.fold_in(key, stream))(streams)

  def choose(hidden, seen, number):
    logits = apply(hidden, method="unembed")
    return choose_tokens(logits, seen, is_banned, keys, number, sampling)

  token_index = jnp.arange(num_prompt)[None]
  positions = jnp.broadcast_to(token_index, input_ids.shape)
  output = apply(
    apply(input_ids, pixel_values, method="embed"),
    positions,
    in_prompt & (slots <= token_index[..., None]),
    token_index < lengths[:, None],
    decoder.empty_cache(config.decoder, batch, num_slots, config.dtype),
    jnp.int32(0),
    method="extend",
  )
  layers, cache = None, output.cache
  if is_unrolled:
    kinds = moe.experts_by_layer(config.moe, config.decoder.num_layers)
    layers = pattern.by_layer(params["decoder"]["layers"], kinds)
    cache = tuple(
      jax.tree.map(lambda a, i=i: a[i], cache) for i in range(len(layers))
    )
  last = (lengths - 1)[:, None, None]
  hidden = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
  seen = jnp.zeros((batch, is_banned.shape[0]), bool)
  token = choose(hidden, seen, 0)
  tokens = jnp.full((batch, max_new_tokens), pad_id, token.dtype)
  tokens = tokens.at[:, 0].set(token)

  def should_continue(carry):
    number, _, is_done, *_ = carry
    return (number < max_new_tokens) & ~jnp.all(is_done)

  def add_token(carry):
    number, tokens, is_done, seen, cache, experts = carry
    token = jax.lax.dynamic_index_in_dim(
      tokens, number - 1, axis=1, keepdims=False
    )
    seen = seen.at[jnp.arange(batch), token].set(True)
    slot = num_prompt + number - 1
    is_new = (slots >= num_prompt) & (slots <= slot)
    output = apply(
      apply(token[:, None], None, method="embed"),
      (lengths + number - 1)[:, None],
      in_prompt | is_new,
      ~is_done[:, None],
      cache,
      slot,
      layers,
      method="extend",
    )
    token = choose(output.hidden[:, 0], seen, number)
    token = jnp.where(is_done, pad_id, token)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, number, axis=1)
    is_done = is_done | (token == eos_id)
    if experts is not None:
      experts = jax.lax.dynamic_update_slice_in_dim(
        experts, output.routing.chosen, number - 1, axis=2
      )
    return number + 1, tokens, is_done, seen, output.cache, experts

  prompt_experts = token_experts = None
  if output.routing is not None:
    prompt_experts = output.routing.chosen
    num_routed, _, _, top_k = prompt_experts.shape
    shape = (num_routed, batch, max_new_tokens, top_k)
    token_experts = jnp.full(shape, -1, prompt_experts.dtype)
  is_done = token == eos_id
  carry = (jnp.int32(1), tokens, is_done, seen, cache, token_experts)
  carry = jax.lax.while_loop(should_continue, add_token, carry)
  return Generated(carry[1], prompt_experts, carry[-1])


def choose_tokens(
  logits: Float[Array, "B V"],
  seen: Bool[Array, "B V"],
  is_banned: Bool[Array, " V"],
  keys: PRNGKeyArray | Array,
  number: Int[Array, ""] | int,
  sampling: Sampling,
) -> Int32[Array, " B"]:
  """The next token of each row: the likeliest, or one drawn.

  `seen` marks the tokens of the answer so far; `keys` holds a key a row, of
  which the `number`-th draw is made.
  """
  penalty = sampling.repetition_penalty
  if penalty != 1:
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
  logits = jnp.where(is_banned[None], -jnp.inf, logits)
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k:
    count = min(sampling.top_k, logits.shape[-1])
    least = jax.lax.top_k(logits, count)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it do not reach p: the first one always.
    stays = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  draw = lambda key, row: jax.random.categorical(
    jax.random.fold_in(key, number), row
  )
  return jax.vmap(draw)(keys, logits).astype(jnp.int32)
