"""Dispatch strategies on one MLP, beside plain LoRA and the frozen base.

Forward and backward with respect to the input and what is trained, as inside
the model; the base's kernels get no gradient.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mole_jax.models import mole
from mole_jax.timing import clock, steps
from mole_jax.training import state

STRATEGIES = tuple(name for name in mole.DISPATCHES if name != "auto")


class Shape(NamedTuple):
  """Widths of the MLP, tokens through it, rank of its adapters."""

  hidden_size: int
  intermediate_size: int
  num_tokens: int
  rank: int
  dtype: str


class Timed(NamedTuple):
  """A compiled MLP with its arguments."""

  experts: int
  strategy: str
  program: jax.stages.Compiled
  arguments: tuple[Any, ...]

  def seconds(self) -> float:
    """One forward and backward pass."""
    began = time.perf_counter()
    jax.block_until_ready(self.program(*self.arguments))
    return time.perf_counter() - began


def measure(
  shape: Shape,
  experts: Sequence[int],
  strategies: Sequence[str],
  num_rounds: int,
  on_compiled: Callable[[int, str], None] = lambda experts, strategy: None,
) -> list[dict[str, Any]]:
  """Times every strategy for every number of experts, and both baselines.

  All of a round are timed one after the other; ratios are those of a round.
  `strategy` of a row is "base" (no adapter), "lora" (one expert) or one of
  STRATEGIES; `is_auto` marks what dispatch "auto" chooses.
  """
  wanted = [(0, "base"), (1, "lora")]
  wanted += [(count, name) for count in experts for name in strategies]
  timed = []
  for count, strategy in wanted:
    timed.append(_make(shape, count, strategy))
    timed[-1].seconds()
    on_compiled(count, strategy)
  calls = [entry.seconds for entry in timed]
  clock.interleave(calls, 1)  # Caches are warm after it.
  seconds = clock.interleave(calls, num_rounds)
  rows = []
  for entry, measured in zip(timed, seconds, strict=True):
    is_mixture = entry.experts > 1
    auto = mole.choose_dispatch(
      shape.num_tokens, entry.experts, 1, shape.rank, mole.MoleConfig.block_rows
    )
    rows.append(
      {
        **shape._asdict(),
        "num_experts": entry.experts,
        "strategy": entry.strategy,
        "is_auto": is_mixture and entry.strategy == auto,
        "seconds": clock.summary(measured),
        "over_base": clock.ratio(measured, seconds[0]),
        "over_lora": clock.ratio(measured, seconds[1]),
        "predicted_memory": steps.predicted_memory(entry.program),
      }
    )
  return rows


def _make(shape: Shape, num_experts: int, strategy: str) -> Timed:
  dispatch = strategy if num_experts > 1 else "auto"
  config = mole.MoleConfig(
    num_experts=num_experts, rank=shape.rank, dispatch=dispatch, dropout=0.0
  )
  module = mole.MoleMlp(shape.intermediate_size, config)
  key, x_key, dy_key, b_key = jax.random.split(jax.random.key(0), 4)
  size = (1, shape.num_tokens, shape.hidden_size)
  x = jax.random.normal(x_key, size, shape.dtype)
  dy = jax.random.normal(dy_key, size, shape.dtype)
  init = jax.jit(lambda key, x: module.init(key, x, None)["params"])
  flat = state.flatten(init(key, x))
  is_base = lambda name: name.endswith("_proj/kernel")
  frozen = {n: v.astype(shape.dtype) for n, v in flat.items() if is_base(n)}
  trained = {n: v for n, v in flat.items() if not is_base(n)}
  for name, value in trained.items():
    if name.endswith("lora_b"):  # Starts as zero, which is faster than real.
      trained[name] = 0.01 * jax.random.normal(b_key, value.shape, value.dtype)

  def loss(trained: state.Flat, x: Array, frozen: state.Flat, dy: Array):
    params = state.unflatten({**frozen, **trained})
    y, _ = module.apply({"params": params}, x, None)
    return jnp.sum((y * dy).astype(jnp.float32))

  arguments = (trained, x, frozen, dy)
  program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
  return Timed(num_experts, strategy, program, arguments)
