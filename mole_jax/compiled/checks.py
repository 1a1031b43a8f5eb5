"""What a compiled step must not do, each found in the program itself."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from mole_jax.compiled import collectives, hlo, work
from mole_jax.parallel import sharding

# Smaller ones than this share of the largest weight of a layer do no harm.
SMALL = 1 / 16


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something wrong: which requirement, and the instruction that breaks it."""

  rule: str
  message: str


@dataclasses.dataclass(frozen=True)
class Expected:
  """What the model is made of, on one device.

  trainable, frozen: shapes by path, whole.  mesh: sizes of its axes.
  layers: of the decoder.  experts: 0 for no mixture.  tokens: positions on a
  device.  widths: hidden and intermediate size, whole and as `tensor` cuts
  them.
  """

  trainable: Mapping[str, jax.ShapeDtypeStruct]
  frozen: Mapping[str, jax.ShapeDtypeStruct]
  mesh: Mapping[str, int]
  layers: int
  experts: int
  tokens: int
  widths: tuple[int, ...]


def one_layer(path: str, shape: Sequence[int]) -> tuple[int, ...]:
  """A parameter's shape without the leading axis of stacked layers."""
  return tuple(shape[1:]) if "/layers/" in path else tuple(shape)


def check(
  program: hlo.Program,
  found: Sequence[collectives.Collective],
  expected: Expected,
) -> list[Finding]:
  """All that is wrong with a program; empty if nothing is."""
  return [
    *misplaced(found, expected),
    *frozen_gradients(program, expected),
    *expert_buffers(program, expected),
  ]


def misplaced(
  found: Sequence[collectives.Collective], expected: Expected
) -> list[Finding]:
  """Large collectives, along axes that shard parameters, of anything else.

  There the weights of one layer are gathered, and what has the size of a
  trainable parameter, its gradient, is added up. A weight in an all-reduce is
  a gather at twice the traffic (XLA:TPU, where an axis does not lie well on
  the torus) or a gradient that nobody wants; an activation means that rows
  were not kept apart.
  """
  layers = {
    tuple(sorted(one_layer(path, leaf.shape)))
    for path, leaf in {**expected.trainable, **expected.frozen}.items()
  }
  weights = {math.prod(shape) for shape in layers}
  gradients = _gradient_sizes(expected.trainable, expected.mesh)
  findings = []
  for one in found:
    if not {"fsdp", "expert"} & set(one.axes) or "tensor" in one.axes:
      continue
    for array in one.arrays:
      if array.size < SMALL * max(weights):
        continue
      if one.kind == "all-gather":
        if not any(weight % array.size == 0 for weight in weights):
          dims = [size for size in array.dims if size > 1]
          is_stack = tuple(sorted(dims[1:])) in layers
          what = "several layers at once" if is_stack else "activation?"
          findings.append(_finding(one, array, what))
      elif (
        one.kind in ("all-reduce", "reduce-scatter")
        and not {array.size, array.size * one.ways} & gradients
      ):
        what = "weight" if array.size in weights else "activation?"
        findings.append(_finding(one, array, what))
  return findings


def _gradient_sizes(
  shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mapping[str, int]
) -> set[int]:
  """Of single layers and of their stack, whole or cut along any of their axes.

  What is added up along one mesh axis may be cut along another already.
  """
  sizes = set()
  for path, leaf in shapes.items():
    ways = {1}
    for names in sharding.partition_spec(path):
      for name in (names,) if isinstance(names, str) else names or ():
        ways |= {n * mesh[name] for n in ways}
    for shape in (leaf.shape, one_layer(path, leaf.shape)):
      sizes |= {math.prod(shape) // n for n in ways}
  return sizes


def frozen_gradients(program: hlo.Program, expected: Expected) -> list[Finding]:
  """Products that sum over all tokens of a device to a frozen weight's shape.

  Not decided where a row has as many tokens as a layer is wide: then the
  gradient of an activation looks the same.
  """
  if expected.tokens in expected.widths:
    return []
  shapes = {
    tuple(sorted(one_layer(path, leaf.shape))): path
    for path, leaf in expected.frozen.items()
    if path.endswith("/kernel")
  }
  trained = {
    tuple(sorted(one_layer(path, leaf.shape)))
    for path, leaf in expected.trainable.items()
  }
  found = []
  for line, summed in work.products(program):
    dims = tuple(sorted(size for size in line.arrays[0].dims if size > 1))
    if summed == expected.tokens and dims in shapes and dims not in trained:
      found.append(
        Finding(
          "gradient of a frozen weight",
          f"{shapes[dims]}: {line.op_name} {program.source(line)}".rstrip(),
        )
      )
  return found


def _finding(
  one: collectives.Collective, array: hlo.Array, what: str
) -> Finding:
  trips = " x ".join(map(str, one.loops))
  where = f"in a loop of {trips}" if trips else "outside of loops"
  dims = ",".join(map(str, array.dims))
  return Finding(
    f"{one.kind} of {what}",
    f"{array.dtype}[{dims}] along {', '.join(one.axes)} {where}: "
    f"{one.op_name[-100:]} {one.source}".rstrip(),
  )


def _has_run(before: Sequence[int], after: Sequence[int], width: int) -> bool:
  """Whether neighbours in one of two lists of axes make up a width."""
  return any(
    math.prod(dims[i:j]) == width
    for dims in (before, after)
    for i in range(len(dims))
    for j in range(i + 1, len(dims) + 1)
  )


def expert_buffers(program: hlo.Program, expected: Expected) -> list[Finding]:
  """Arrays of experts x tokens x width: what routing is there to avoid.

  One axis is the experts', one or more that follow each other are the width's,
  the others are tokens. With as many layers as experts a first axis of that
  size is taken for layers, whose inputs the backward pass keeps.
  """
  if expected.experts < 2:
    return []
  start = 1 if expected.layers == expected.experts else 0
  size = expected.experts * expected.tokens
  sizes = {size * width for width in expected.widths}
  found = {}
  for _, line, _ in hlo.walk(program):
    for array in line.arrays:
      if array.size not in sizes:  # Nearly all; the rest is slow.
        continue
      if any(
        count == expected.experts
        and _has_run(array.dims[:i], array.dims[i + 1 :], array.size // size)
        for i, count in enumerate(array.dims)
        if i >= start
      ):
        found.setdefault(array.dims, (array, line))
  return [
    Finding(
      "experts x tokens x width",
      f"{array.dtype}{list(array.dims)}: {line.op_name} {program.source(line)}",
    )
    for array, line in found.values()
  ]
