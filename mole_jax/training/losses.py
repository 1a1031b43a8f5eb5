"""Next-token loss over the labels, in chunks, with sums by domain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mole_jax.models import decoder, llava, moe, mole

IGNORED = -100  # The label of a position without loss.


class TokenSums(NamedTuple):
  """Sums over supervised tokens; the last axis is the domain."""

  loss: Float[Array, " G"]
  correct: Float[Array, " G"]
  count: Float[Array, " G"]


def token_domains(
  segment_ids: Int[Array, "B T"], domains: Int[Array, "B S"]
) -> Int[Array, "B T"]:
  """Domain of each token; -1 on padding."""
  index = jnp.maximum(segment_ids - 1, 0)
  by_token = jnp.take_along_axis(domains, index, axis=1)
  return jnp.where(segment_ids > 0, by_token, -1)


def next_token_sums(
  hidden: Float[Array, "B T D"],
  labels: Int[Array, "B T"],
  domains: Int[Array, "B T"],
  unembed: Callable[[Array], Array],
  num_domains: int,
  chunk_tokens: int,
  *,
  is_head_frozen: bool = False,
) -> TokenSums:
  """Cross-entropy and hits of predicting token t + 1 from token t.

  Logits exist for at most `chunk_tokens` positions of each row at a time: at
  7B, a row of 2,048 would need 0.26 GB of them. A row's last position predicts
  nothing.

  Args:
    hidden: final hidden states.
    labels: the tokens themselves where there is a loss, else IGNORED.
    domains: domain index of each token, -1 for none.
    unembed: hidden states -> float32 logits.
    num_domains: number of domains.
    chunk_tokens: positions per chunk, at most.
    is_head_frozen: nothing but its argument has a gradient in `unembed`. Then
      that of hidden states is made beside the loss, of which it is a multiple;
      otherwise the backward pass computes logits again.
  """
  batch, tokens, _ = hidden.shape
  ignored = jnp.full((batch, 1), IGNORED, labels.dtype)
  targets = jnp.concatenate([labels[:, 1:], ignored], axis=1)
  num_chunks = -(-tokens // chunk_tokens)
  chunk_tokens = -(-tokens // num_chunks)  # As much padding as need be.
  padding = num_chunks * chunk_tokens - tokens

  def chunks(x, fill):
    pad = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(batch, num_chunks, chunk_tokens, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  def sums_of(hidden, targets, domains):
    return _chunk_sums(unembed(hidden), targets, domains, num_domains)

  scanned = chunks(hidden, 0), chunks(targets, IGNORED), chunks(domains, -1)
  if is_head_frozen:
    return _add_up_with_gradients(sums_of, num_domains)(*scanned)
  sums_of = jax.checkpoint(sums_of, prevent_cse=False)
  return _add_up(lambda *c: (sums_of(*c), None), num_domains, scanned)[0]


def _chunk_sums(
  logits: Float[Array, "B T V"],
  targets: Int[Array, "B T"],
  domains: Int[Array, "B T"],
  num_domains: int,
) -> TokenSums:
  """Of a target among the likeliest tokens it counts as predicted."""
  is_target = targets != IGNORED
  target = jnp.maximum(targets, 0)
  picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - picked
  correct = picked == logits.max(axis=-1)
  member = jax.nn.one_hot(domains, num_domains) * is_target[..., None]
  return TokenSums(
    jnp.einsum("BTG,BT->G", member, jnp.where(is_target, loss, 0.0)),
    jnp.einsum("BTG,BT->G", member, correct.astype(jnp.float32)),
    member.sum((0, 1)),
  )


def _add_up(
  sums_of: Callable[..., tuple[TokenSums, Array | None]],
  num_domains: int,
  chunks: tuple[Array, Array, Array],
) -> tuple[TokenSums, Array | None]:
  """Sums over chunks, one after the other, and what else each one gives."""

  def body(sums, chunk):
    new, kept = sums_of(*chunk)
    return jax.tree.map(jnp.add, sums, new), kept

  zeros = TokenSums(*[jnp.zeros(num_domains)] * 3)
  return jax.lax.scan(body, zeros, chunks)


def _add_up_with_gradients(
  sums_of: Callable[..., TokenSums], num_domains: int
) -> Callable[..., TokenSums]:
  """Sums over chunks; a forward pass keeps the gradient by hidden states.

  A token's loss reaches the sum of its domain alone: its gradient is that of
  its own loss times the gradient by that sum.
  """

  def with_gradient(hidden, targets, domains):
    def loss(hidden):
      sums = sums_of(hidden, targets, domains)
      return sums.loss.sum(), sums

    gradient, sums = jax.grad(loss, has_aux=True)(hidden)
    return sums, gradient

  def forward(hidden, targets, domains):
    chunks = hidden, targets, domains
    sums, gradients = _add_up(with_gradient, num_domains, chunks)
    return sums, (gradients, domains)

  def backward(kept, by_sums):
    gradients, domains = kept
    factors = jax.nn.one_hot(domains, num_domains) @ by_sums.loss
    return (gradients * factors[..., None]).astype(gradients.dtype), None, None

  add_up = jax.custom_vjp(lambda *chunks: forward(*chunks)[0])
  add_up.defvjp(forward, backward)
  return add_up


def balance_loss(
  routing: decoder.LayerRouting,
  segment_ids: Int[Array, "B T"],
  num_segments: int,
  kind: str,
  num_experts: Sequence[int] | None = None,
) -> Float[Array, ""]:
  """The balance loss named `kind`: one of `mole.BALANCES`.

  `num_experts` are those of each layer in `routing`, None where all are alike.
  Raises ValueError where a loss wants layers alike, and they are not.
  """
  if kind not in mole.BALANCES:
    raise ValueError(
      f"config.balance.loss={kind!r} must be one of {mole.BALANCES}."
    )
  if num_experts is None:
    num_layers, *_, experts = routing.sums.probs.shape
    num_experts = (experts,) * num_layers
  if kind == "moe_llava":
    return moe.balance_loss(routing.sums, tuple(num_experts))
  if len(set(num_experts)) > 1:
    raise ValueError(
      f"config.balance.loss={kind!r} needs as many experts in each layer, here "
      f"are {sorted(set(num_experts))}; use 'moe_llava'."
    )
  segments = llava.segment_members(segment_ids, num_segments)
  num_tokens = segments.sum(1).astype(jnp.float32)
  loss = {
    "pooled": mole.balance_loss_pooled,
    "per_layer": mole.balance_loss_per_layer,
  }[kind]
  return loss(routing.sums, num_tokens)
