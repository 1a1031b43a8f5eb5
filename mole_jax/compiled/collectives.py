"""Every collective of a compiled program: kind, bytes, loop and mesh axes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from mole_jax.compiled import groups, hlo

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_OPCODE = re.compile(rf"({'|'.join(KINDS)})(-start)?$")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  arrays: what each device has of its result (for a reduce-scatter its part).
  runs: how often a step.  loops: trip counts of those it is in, outer first.
  axes: mesh axes it runs along.  ways: devices in a group.
  is_async: other work can go on until its result is used.
  """

  kind: str
  arrays: tuple[hlo.Array, ...]
  runs: int
  loops: tuple[int, ...]
  axes: tuple[str, ...]
  ways: int
  is_async: bool
  op_name: str
  source: str

  @property
  def result_bytes(self) -> int:
    """Bytes of the result on one device, for one run."""
    return sum(array.num_bytes for array in self.arrays)

  @property
  def wire_bytes(self) -> float:
    """Bytes that one device sends in a step, by the ring algorithms.

    For a result of S bytes on n devices: all-gather and all-to-all
    S (n - 1) / n, reduce-scatter S (n - 1), all-reduce 2 S (n - 1) / n, and a
    permutation S.
    """
    size, ways = self.result_bytes * self.runs, max(self.ways, 1)
    share = (ways - 1) / ways
    if self.kind == "all-reduce":
      return 2 * size * share
    if self.kind == "reduce-scatter":
      return float(size * (ways - 1))
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(size)
    return size * share


def find(program: hlo.Program, mesh: Mapping[str, int]) -> list[Collective]:
  """The collectives of a program, the one that sends most first.

  Those inside fusions (XLA:TPU fuses a reduce-scatter from an all-reduce and
  a slice) are in.

  Args:
    program: a parsed program.
    mesh: sizes of the mesh axes by name, in the order of the mesh.
  """
  num_devices = math.prod(mesh.values())
  found = []
  for name, line, context in hlo.walk(program):
    for kind, inner, arrays, is_async in _collectives_in(program, line, name):
      joined = groups.parse_groups(inner.rest, num_devices)
      axes = () if joined is None else groups.axes_of(joined, mesh)
      ways = num_devices if joined is None else joined.shape[1]
      if kind == "collective-permute":
        ways = 2
      if ways == 1:
        continue
      found.append(
        Collective(
          kind,
          arrays,
          context.runs,
          context.loops,
          axes,
          ways,
          is_async,
          inner.op_name or line.op_name,
          program.source(inner) or program.source(line),
        )
      )
  return sorted(found, key=lambda c: -c.wire_bytes)


def _collectives_in(
  program: hlo.Program, line: hlo.Instruction, computation: str
) -> Iterator[tuple[str, hlo.Instruction, tuple[hlo.Array, ...], bool]]:
  """(kind, instruction, result, is asynchronous) of one instruction."""
  match = _OPCODE.fullmatch(line.opcode)
  if match:
    is_start = bool(match[2])
    is_async = is_start or "async" in computation
    yield match[1], line, _result(line, match[1], is_start), is_async
  elif line.opcode == "fusion":
    inside = hlo.fused(program, line)
    targets = {inner.target for inner in inside}
    is_start = "AsyncCollectiveStart" in targets
    # XLA:TPU repeats a collective in every fusion that goes on with it.
    names = line.called("calls")
    if not is_start and (
      "AsyncCollectiveDone" in targets
      or any(name.startswith("async_collective_fusion") for name in names)
    ):
      return
    for inner in inside:
      match = _OPCODE.fullmatch(inner.opcode)
      if not match:
        continue
      kind, arrays = match[1], _result(inner, match[1], bool(match[2]))
      sliced = [
        other
        for other in inside
        if other.opcode == "dynamic-slice" and inner.name in other.operands
      ]
      if kind == "all-reduce" and sliced:
        kind, arrays = "reduce-scatter", sliced[0].arrays
      yield kind, inner, arrays, is_start


def _result(
  line: hlo.Instruction, kind: str, is_start: bool
) -> tuple[hlo.Array, ...]:
  """A start returns operands, results and, of a permutation, contexts."""
  arrays = line.arrays
  if not is_start or kind == "all-reduce":
    return arrays
  if kind == "collective-permute":
    return arrays[1:2]
  half = len(line.operands)
  return arrays[half : 2 * half]


@dataclasses.dataclass(frozen=True)
class Group:
  """Collectives that are alike, added up; `count` is instructions."""

  kind: str
  axes: tuple[str, ...]
  loops: tuple[int, ...]
  count: int
  runs: int
  wire_bytes: float
  largest_bytes: int


def summarise(found: Sequence[Collective]) -> list[Group]:
  """By kind, mesh axes and loops; the most bytes first."""
  by_key: dict[tuple, list[Collective]] = {}
  for one in found:
    by_key.setdefault((one.kind, one.axes, one.loops), []).append(one)
  rows = [
    Group(
      kind,
      axes,
      loops,
      len(members),
      sum(m.runs for m in members),
      sum(m.wire_bytes for m in members),
      max(m.result_bytes for m in members),
    )
    for (kind, axes, loops), members in by_key.items()
  ]
  return sorted(rows, key=lambda row: -row.wire_bytes)
