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
) -> TokenSums:
  """Cross-entropy and hits of predicting token t + 1 from token t.

  Logits exist for `chunk_tokens` positions of each row at a time and are
  recomputed in the backward pass: at 7B, a row of 2,048 would need 0.26 GB of
  them. A row's last position predicts nothing.

  Args:
    hidden: final hidden states.
    labels: the tokens themselves where there is a loss, else IGNORED.
    domains: domain index of each token, -1 for none.
    unembed: hidden states -> float32 logits.
    num_domains: number of domains.
    chunk_tokens: positions per chunk.
  """
  batch, tokens, width = hidden.shape
  ignored = jnp.full((batch, 1), IGNORED, labels.dtype)
  targets = jnp.concatenate([labels[:, 1:], ignored], axis=1)
  num_chunks = -(-tokens // chunk_tokens)
  padding = num_chunks * chunk_tokens - tokens

  def chunks(x, fill):
    pad = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(batch, num_chunks, chunk_tokens, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  def body(sums, chunk):
    hidden, targets, domains = chunk
    logits = unembed(hidden)
    is_target = targets != IGNORED
    target = jnp.maximum(targets, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    correct = jnp.argmax(logits, axis=-1) == target
    member = jax.nn.one_hot(domains, num_domains) * is_target[..., None]
    new = TokenSums(
      jnp.einsum("BTG,BT->G", member, jnp.where(is_target, loss, 0.0)),
      jnp.einsum("BTG,BT->G", member, correct.astype(jnp.float32)),
      member.sum((0, 1)),
    )
    return jax.tree.map(jnp.add, sums, new), None

  zeros = jnp.zeros(num_domains)
  scanned = (
    chunks(hidden, 0),
    chunks(targets, IGNORED),
    chunks(domains, -1),
  )
  body = jax.checkpoint(body, prevent_cse=False)
  return jax.lax.scan(body, TokenSums(zeros, zeros, zeros), scanned)[0]


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
