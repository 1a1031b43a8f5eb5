"""The text of a compiled program -> instructions, and how often each runs.

`cost_analysis()` counts a loop's body once, and says nothing about single
instructions; `Compiled.as_text()` has them all.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

ITEM_BITS = {
  "pred": 8,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "f16": 16,
  "bf16": 16,
  "s32": 32,
  "u32": 32,
  "f32": 32,
  "s64": 64,
  "u64": 64,
  "f64": 64,
  "c64": 64,
  "c128": 128,
  "f8e4m3": 8,
  "f8e4m3fn": 8,
  "f8e5m2": 8,
}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result. Memory space 0 is HBM; others are on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def num_bytes(self) -> int:
    return self.size * ITEM_BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program; `rest` is what follows the operands."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  operand_text: str
  rest: str
  is_root: bool

  @property
  def num_bytes(self) -> int:
    return sum(array.num_bytes for array in self.arrays)

  @property
  def target(self) -> str:
    """What a custom call calls; "" for anything else."""
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else ""

  @property
  def op_name(self) -> str:
    """Where in the model it comes from: JAX's scopes."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
    return found[1] if found else ""

  def called(self, attribute: str = r"calls|to_apply") -> list[str]:
    """Computations that an attribute names."""
    found = re.findall(
      rf"\b(?:{attribute})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest
    )
    names = ",".join(found).strip("{}").split(",") if found else []
    return [name.strip(" {}").lstrip("%") for name in names]


@dataclasses.dataclass(frozen=True)
class Program:
  """A module: computations by name, and which one is run."""

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str
  # Stack frame -> "file:line", of the innermost frame.
  frames: Mapping[int, str]

  def source(self, instruction: Instruction) -> str:
    """ "file.py:12", or "" where the compiler has lost it."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    if found:
      return self.frames.get(int(found[1]), "")
    found = re.search(
      r'source_file="([^"]*)" source_line=(\d+)', instruction.rest
    )
    return f"{found[1].rsplit('/', 1)[-1]}:{found[2]}" if found else ""


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")


def parse_arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a type, "(f32[2,3]{1,0}, s32[])", flattened."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    if dtype in ITEM_BITS:
      space = re.search(r"S\((\d+)\)", layout)
      sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
      found.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    if text[index] == "(":
      depth += 1
    elif text[index] == ")":
      depth -= 1
      if not depth:
        return index
  raise ValueError(f"unbalanced parentheses in HLO: {text[:200]!r}.")


_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def parse_instruction(line: str) -> Instruction | None:
  """An instruction; None for a line that is none."""
  head = _HEAD.match(line)
  if not head:
    return None
  rest = line[head.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opening = rest.find("(")
  if opening < 0:
    return None
  opcode = rest[:opening]
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  operands = ()
  if opcode not in ("constant", "parameter"):
    plain = re.sub(r"/\*.*?\*/", "", inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", plain)) or tuple(
      part.split()[-1] for part in plain.split(",") if part.strip()
    )
  return Instruction(
    name=head[2],
    arrays=parse_arrays(kind),
    opcode=opcode,
    operands=operands,
    operand_text=inside,
    rest=rest[closing + 1 :],
    is_root=bool(head[1]),
  )


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*|.* )\{$")


def parse(text: str) -> Program:
  """Parses `Compiled.as_text()`; ValueError where it has no entry."""
  computations: dict[str, list[str]] = {}
  tables: dict[str, list[str]] = {}
  entry, current, table = None, None, None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head and not line.startswith("HloModule"):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith("}") and line.strip() == "}":
      current = None
    elif current is not None and line.startswith("  "):
      current.append(line)
    elif current:
      current[-1] += line  # A kernel's metadata has lines of its own.
    elif line in ("FileNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, [])
    elif table is not None and re.match(r"\d+ ", line):
      table.append(line)
    else:
      table = None
  if entry is None:
    raise ValueError("this is no HLO text: it has no ENTRY computation.")
  return Program(
    {
      name: tuple(filter(None, map(parse_instruction, lines)))
      for name, lines in computations.items()
    },
    entry,
    _frames(tables),
  )


def _frames(tables: Mapping[str, list[str]]) -> dict[int, str]:
  """Joins the tables that `stack_frame_id` points into."""
  files, places, frames = {}, {}, {}
  for line in tables.get("FileNames", []):
    number, name = line.split(" ", 1)
    files[int(number)] = name.strip('"').rsplit("/", 1)[-1]
  for line in tables.get("FileLocations", []):
    found = re.match(r"(\d+) \{file_name_id=(\d+).*? line=(\d+)", line)
    if found:
      places[int(found[1])] = f"{files.get(int(found[2]), '?')}:{found[3]}"
  for line in tables.get("StackFrames", []):
    found = re.match(r"(\d+) \{file_location_id=(\d+)", line)
    if found:
      frames[int(found[1])] = places.get(int(found[2]), "")
  return frames


@dataclasses.dataclass(frozen=True)
class Context:
  """How a computation is run: how often a step, and in which loops."""

  runs: int
  loops: tuple[int, ...]  # Their trip counts, from the outside in.


def trip_count(program: Program, loop: Instruction) -> int | None:
  """Iterations of a `while`; None where they cannot be read.

  XLA:CPU and GPU annotate them. XLA:TPU does not: there a counter from zero is
  compared with a constant, and grows by one (scans) or, in the loops that it
  makes of a gather and a product (windowed einsum), by two.
  """
  found = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
  if found:
    return int(found[1])
  (name,) = loop.called("condition")
  condition = {line.name: line for line in program.computations.get(name, ())}
  for line in tuple(condition.values()):
    if line.opcode == "fusion":
      condition |= {inner.name: inner for inner in fused(program, line)}
  limits = [n for line in condition.values() if (n := _constant(line))]
  counters = [line for line in condition.values() if _counter(line) is not None]
  is_less = any("direction=LT" in line.rest for line in condition.values())
  if not is_less or len(limits) != 1 or len(counters) != 1:
    return None
  step = _step(program, loop, _counter(counters[0]))
  return -(-limits[0] // step)


def _constant(line: Instruction) -> int | None:
  is_number = line.opcode == "constant" and line.operand_text.isdigit()
  return int(line.operand_text) if is_number else None


def _counter(line: Instruction) -> int | None:
  """Which element of the loop's state an instruction reads."""
  found = re.search(r"index=(\d+)", line.rest)
  is_one = line.opcode == "get-tuple-element" and found
  return int(found[1]) if is_one else None


def _step(program: Program, loop: Instruction, index: int) -> int:
  """By how much an iteration adds to element `index` of the loop's state."""
  (name,) = loop.called("body")
  body = {line.name: line for line in program.computations[name]}
  (root,) = [line for line in body.values() if line.is_root]
  if root.opcode != "tuple":
    return 1
  grown = body.get(root.operands[index])
  while grown is not None and grown.opcode in ("copy", "bitcast"):
    grown = body.get(grown.operands[0])
  if grown is None or grown.opcode != "add":
    return 1
  added = [_constant(body[name]) for name in grown.operands if name in body]
  return next((number for number in added if number), 1)


def contexts(program: Program) -> dict[str, list[Context]]:
  """Computations that are run as sequences -> how.

  Loops of unknown length count once. Fused computations, reductions and the
  like are not in: `Instruction.called` finds them from their instruction.
  """
  found: dict[str, list[Context]] = {}

  def visit(name: str, context: Context) -> None:
    found.setdefault(name, []).append(context)
    for line in program.computations.get(name, ()):
      if line.opcode == "while":
        trips = trip_count(program, line) or 1
        (body,) = line.called("body")
        visit(body, Context(context.runs * trips, (*context.loops, trips)))
      elif line.opcode in ("call", "call-start", "async-start"):
        for inner in line.called():
          visit(inner, context)
      elif line.opcode == "conditional":
        names = line.called(
          "branch_computations|true_computation|false_computation"
        )
        for inner in names:
          visit(inner, context)

  visit(program.entry, Context(1, ()))
  return found


def walk(program: Program) -> Iterator[tuple[str, Instruction, Context]]:
  """(computation, instruction, context) of all that is run as a sequence."""
  for name, found in contexts(program).items():
    for context in found:
      for line in program.computations.get(name, ()):
        yield name, line, context


def fused(program: Program, instruction: Instruction) -> list[Instruction]:
  """What a fusion is made of, fusions inside it opened."""
  lines = []
  for name in instruction.called("calls"):
    for line in program.computations.get(name, ()):
      lines.append(line)
      if line.opcode == "fusion":
        lines += fused(program, line)
  return lines
