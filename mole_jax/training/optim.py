"""AdamW with warm-up, cosine decay, clipping and learning rates by group."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

# Norms, biases and learned vectors; in scanned layers they have two axes.
VECTOR = re.compile(
  r"(/(scale|bias)|lm_head_bias|visual_(start|end)|class_embedding)$"
)


def make_schedule(
  lr: float, warmup_ratio: float, num_steps: int
) -> optax.Schedule:
  """Linear warm-up over `warmup_ratio` of the steps, then cosine to 0."""
  if not 0 <= warmup_ratio < 1:
    raise ValueError(
      f"optim.warmup_ratio={warmup_ratio} must lie in [0, 1): a share of the "
      "steps."
    )
  warmup_steps = max(1, round(warmup_ratio * num_steps))
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=lr,
    warmup_steps=warmup_steps,
    decay_steps=max(num_steps, warmup_steps + 1),
  )


def learning_rate_factors(
  names: Sequence[str], factors: Mapping[str, float]
) -> dict[str, float]:
  """Each parameter's factor: that of the longest path prefix given, else 1.

  Raises ValueError for a prefix that no trainable parameter has.
  """
  for prefix in factors:
    if not any(name.startswith(prefix) for name in names):
      raise ValueError(
        f"optim.lr_factors[{prefix!r}] is a prefix of no trainable parameter; "
        f"names look like {names[0]!r}."
      )
  result = {}
  for name in names:
    known = [prefix for prefix in factors if name.startswith(prefix)]
    result[name] = factors[max(known, key=len)] if known else 1.0
  return result


def scale_by_factors(factors: Mapping[str, float]) -> Any:
  """Multiplies each parameter's update by its factor."""
  return optax.stateless(
    lambda updates, _: {
      name: update * factors[name] for name, update in updates.items()
    }
  )


def make_optimizer(
  optim: Mapping[str, Any], names: Sequence[str], num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer for trainable parameters `names`, and its schedule.

  Weight decay (Loshchilov & Hutter 2019) spares vectors: norms and biases.
  """
  schedule = make_schedule(optim["lr"], optim["warmup_ratio"], num_steps)
  factors = learning_rate_factors(names, optim["lr_factors"])

  def decayed(params):
    return {name: not VECTOR.search(name) for name in params}

  return (
    optax.chain(
      optax.clip_by_global_norm(optim["clip_norm"]),
      optax.scale_by_adam(optim["b1"], optim["b2"], optim["eps"]),
      optax.add_decayed_weights(optim["weight_decay"], decayed),
      scale_by_factors(factors),
      optax.scale_by_learning_rate(schedule),
    ),
    schedule,
  )
