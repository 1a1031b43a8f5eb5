"""Layers of several kinds that are still scanned.

A decoder's layers have 0 experts (one plain FFN) or some number of them. Runs
of layers that repeat become one scan each, whose body is the shortest pattern:
24 layers with experts in every second one are 12 turns of a body of two, and
compile like two. Parameters are stacked over layers, whatever the pattern:

    self_attn/..., norms    all layers, in order (as in a decoder of one kind)
    mlp/...                 those with one FFN
    moe_x4/...              those with 4 experts

so weights that all layers have stand where they stand without experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Kinds = Sequence[int]  # Experts by layer.


class Run(NamedTuple):
  """Layers `start`, ... that are `pattern`, `repeats` times."""

  start: int
  pattern: tuple[int, ...]
  repeats: int

  @property
  def stop(self) -> int:
    return self.start + len(self.pattern) * self.repeats


def runs(kinds: Kinds) -> list[Run]:
  """Cuts layers into runs, each as long as it can be; shortest patterns."""
  kinds, found, start = tuple(kinds), [], 0
  while start < len(kinds):
    best = Run(start, kinds[start : start + 1], 1)
    for period in range(1, (len(kinds) - start) // 2 + 1):
      pattern = kinds[start : start + period]
      repeats = 1
      while kinds[start + repeats * period :][:period] == pattern:
        repeats += 1
      run = Run(start, pattern, repeats)
      # One turn of a long pattern is as many layers, and saves nothing.
      if (repeats > 1 or period == 1) and run.stop > best.stop:
        best = run
    found.append(best)
    start = best.stop
  return found


def family(kind: int) -> str:
  """The name under which FFNs of layers of a kind are stacked."""
  return f"moe_x{kind}" if kind else "mlp"


def inner_name(kind: int) -> str:
  """What a layer itself calls its FFN."""
  return "moe" if kind else "mlp"


def stack(by_kind: Mapping[int, Any], kinds: Kinds) -> dict[str, Any]:
  """Parameters of the layers of each kind, stacked -> the layout above."""
  common, stacks = {}, {}
  for kind, params in by_kind.items():
    params = dict(params)
    stacks[family(kind)] = params.pop(inner_name(kind))
    common[kind] = params
  order = list(common)
  offsets, total = {}, 0
  for kind in order:
    offsets[kind] = total
    total += kinds.count(kind)
  seen = dict.fromkeys(order, 0)
  index = []
  for kind in kinds:
    index.append(offsets[kind] + seen[kind])
    seen[kind] += 1
  index = jnp.array(index)
  merge = lambda *leaves: jnp.concatenate(leaves)[index]
  return jax.tree.map(merge, *(common[kind] for kind in order)) | stacks


def of_run(params: Mapping[str, Any], kinds: Kinds, run: Run) -> dict[str, Any]:
  """A run's part of the layout, [repeats, layers of one turn, ...].

  A run that has all layers of a stack takes it as it is; others copy theirs.
  """
  names = {family(kind) for kind in kinds}

  def part(name, leaf):
    before, inside = range(run.start), range(run.start, run.stop)
    if name in names:
      is_in = lambda i: family(kinds[i]) == name
      before, inside = (list(filter(is_in, r)) for r in (before, inside))
    first, count = len(before), len(inside)
    leaf = leaf[first : first + count]
    each = count // run.repeats
    return leaf.reshape(run.repeats, each, *leaf.shape[1:])

  present = {family(kind) for kind in run.pattern}
  return {
    name: jax.tree.map(lambda leaf, name=name: part(name, leaf), value)
    for name, value in params.items()
    if name not in names or name in present
  }


def of_layer(turn: Mapping[str, Any], run: Run, slot: int) -> dict[str, Any]:
  """Parameters of one layer of a turn, under the names that it knows."""
  kind = run.pattern[slot]
  place = run.pattern[:slot].count(kind)
  names = {family(other) for other in run.pattern}
  take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
  layer = {
    name: take(value, slot) for name, value in turn.items() if name not in names
  }
  layer[inner_name(kind)] = take(turn[family(kind)], place)
  return layer


def by_layer(params: Mapping[str, Any], kinds: Kinds) -> list[dict[str, Any]]:
  """Parameters of each layer, under the names that it knows."""
  layers = []
  for run in runs(kinds):
    part = of_run(params, kinds, run)
    for number in range(run.repeats):
      turn = jax.tree.map(lambda leaf, i=number: leaf[i], part)
      layers += [of_layer(turn, run, i) for i in range(len(run.pattern))]
  return layers


def in_order(turns: Sequence[Any]) -> Any:
  """Results of the layers of a turn, [repeats, ...] each -> [layers, ...]."""
  interleave = lambda *leaves: jnp.stack(leaves, 1).reshape(
    -1, *leaves[0].shape[1:]
  )
  return jax.tree.map(interleave, *turns)


def joined(runs: Sequence[Any]) -> Any:
  """Results of several runs, one after the other."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *runs)


def widen(x: Array, axis: int, size: int, fill: int) -> Array:
  """Fills an axis up to a size."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)
