"""FLOPs and memory traffic of a compiled program, counted from its text.

XLA's own `cost_analysis()` counts a loop's body once, has no figures without
a GPU at hand, and its seconds turn negative where a kernel is of another
compiler's making (Mosaic, cuDNN). Here loops count as often as they run;
kernels without a figure are named, not guessed.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from mole_jax.compiled import hlo

# No work and no traffic of their own.
FREE = frozenset(
  (
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("tuple", "get-tuple-element", "bitcast", "domain"),
    *("while", "call", "conditional", "call-start", "call-done"),
    *("async-start", "async-update", "async-done", "copy-done"),
    *("send", "send-done", "recv", "recv-done"),
    *("after-all", "add-dependency", "opt-barrier"),
  )
)
# Custom calls that are no kernels: they reserve, mark or look up.
_IDLE = (
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollective",
  "ConcatBitcast",
  "GatherScatterIndicesBitpacked",
  "Pin",
  "PrepareAsyncCall",
  "Sharding",
  "TopK",
  "X64",
  "__gpu$TopK",
)
_PREFETCH = ("copy-start", "slice-start", "dynamic-slice-start")
UNKNOWN_CYCLES = 2**62  # XLA:TPU prints 2**63 - 1 where it has no estimate.
_COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|ragged-all-)")


@dataclasses.dataclass(frozen=True)
class Operation:
  """One instruction's work in a step, all its runs together.

  flops: of matrix products and convolutions alone, two for a multiply-add.
  hbm_bytes: read and written. Results in on-chip memory are not in.
  is_async: goes on beside what follows, as copies to on-chip memory do.
  cycles: the compiler's own estimate, where it prints one (XLA:TPU); else 0.
  """

  name: str
  op_name: str
  runs: int
  flops: float
  hbm_bytes: float
  cycles: int
  is_async: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a program on one device.

  unknown: kernels without a figure, by target, with how often each runs.
  """

  operations: tuple[Operation, ...]
  unknown: Mapping[str, int]

  @property
  def flops(self) -> float:
    return sum(one.flops for one in self.operations)

  @property
  def hbm_bytes(self) -> float:
    return sum(one.hbm_bytes for one in self.operations)

  @property
  def cycles(self) -> int:
    return sum(one.cycles for one in self.operations)


def count(program: hlo.Program) -> Work:
  """Counts the work of all that a program runs."""
  operations, unknown = [], {}
  by_name = {
    name: {line.name: line for line in lines}
    for name, lines in program.computations.items()
  }
  for name, line, context in hlo.walk(program):
    if line.opcode in FREE or _COLLECTIVE.match(line.opcode):
      continue
    if line.opcode.endswith("-done"):
      continue
    flops, target = _flops(line, by_name[name], by_name)
    if target:
      unknown[target] = unknown.get(target, 0) + context.runs
    traffic = _traffic(program, line, by_name[name])
    operations.append(
      Operation(
        line.name,
        line.op_name,
        context.runs,
        flops * context.runs,
        traffic * context.runs,
        _cycles(line) * context.runs,
        line.opcode in _PREFETCH,
      )
    )
  return Work(tuple(operations), unknown)


def products(program: hlo.Program) -> Iterator[tuple[hlo.Instruction, int]]:
  """(product, how many terms each of its results sums), in fusions too."""
  for lines in program.computations.values():
    scope = {line.name: line for line in lines}
    for line in lines:
      if line.opcode in ("dot", "convolution"):
        flops, _ = _flops(line, scope, {})
        yield line, round(flops / 2 / max(line.arrays[0].size, 1))


def _cycles(line: hlo.Instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
  cycles = int(found[1]) if found else 0
  return cycles if cycles < UNKNOWN_CYCLES else 0


def _flops(line, scope, by_name) -> tuple[float, str]:
  """FLOPs of one run, and the kernel that they are unknown of, or ""."""
  if line.opcode == "dot":
    return _dot(line, scope), ""
  if line.opcode == "convolution":
    return _convolution(line, scope), ""
  if line.opcode == "custom-call":
    return _custom_call(line, scope)
  total, unknown = 0.0, ""
  if line.opcode == "fusion":
    for name in line.called("calls"):
      for inner in by_name[name].values():
        flops, target = _flops(inner, by_name[name], by_name)
        total, unknown = total + flops, unknown or target
  return total, unknown


def _dims(name: str, scope: Mapping[str, hlo.Instruction]) -> tuple[int, ...]:
  return scope[name].arrays[0].dims


def _numbers(pattern: str, text: str) -> list[int]:
  found = re.search(pattern, text)
  return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _dot(line, scope) -> float:
  left = _dims(line.operands[0], scope)
  summed = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
  return 2.0 * line.arrays[0].size * math.prod(left[d] for d in summed)


def _convolution(line, scope) -> float:
  """XLA:TPU writes matrix products as convolutions.

  A window that is padded or dilated (how XLA slides over a batch dimension)
  meets zeros, which cost nothing: pairs of output and input are counted.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
  left = dict(zip(labels[1], _dims(line.operands[0], scope), strict=True))
  right = dict(zip(labels[2], _dims(line.operands[1], scope), strict=True))
  out = dict(zip(labels[3], line.arrays[0].dims, strict=True))
  window = re.search(r"window=\{([^}]*)\}", line.rest)
  options = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
  pairs = 1
  spatial = sorted(label for label in out if label.isdigit())
  for index, label in enumerate(spatial):
    get = lambda key, default, i=index: int(
      options[key].split("x")[i] if key in options else default
    )
    low = 0
    if "pad" in options:
      low = int(options["pad"].split("x")[index].rsplit("_", 1)[0])
    pairs *= _valid_pairs(
      out[label],
      right[label],
      left[label],
      get("stride", 1),
      low,
      get("lhs_dilate", 1),
      get("rhs_dilate", 1),
    )
  return 2.0 * out["b"] * out["f"] * right["i"] * pairs


def _valid_pairs(out, kernel, size, stride, low, base_step, step) -> int:
  """Pairs of an output and a tap of the kernel that meet an input."""
  if out * kernel > 10**6:  # Nothing that a model here does.
    return out * kernel
  count, end = 0, (size - 1) * base_step
  for place in range(out):
    for tap in range(kernel):
      at = place * stride - low + tap * step
      count += 0 <= at <= end and at % base_step == 0
  return count


def _custom_call(line, scope) -> tuple[float, str]:
  target = line.target
  if "cublas" in target or "gemm" in target.lower():
    left = _dims(line.operands[0], scope)
    summed = _numbers(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line.rest)
    size = max(array.size for array in line.arrays)
    if "cublas" in target:  # A workspace follows the result.
      size = line.arrays[0].size
    return 2.0 * size * math.prod(left[d] for d in summed), ""
  if "fmha" in target:
    return _cudnn_attention(line, target), ""
  if line.name.startswith("splash_m"):
    return _splash_attention(line, scope), ""
  found = re.search(
    r'"?cost_estimate"?:\s*\{[^}]*?"flops":\s*"?(\d+)', line.rest
  )
  if found:
    return float(found[1]), ""
  return 0.0, "" if target.startswith(_IDLE) else target


def _cudnn_attention(line, target: str) -> float:
  """cuDNN's flash attention: 2 products forward, 5 backward; half if causal."""
  scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":', line.rest)
  sizes = _numbers(r"(\[[^\]]*\])", line.rest[scores.end() :]) if scores else []
  heads = line.arrays[0].dims
  width = min(heads) if not sizes else heads[-1]
  products = 5 if "Backward" in target else 2
  flops = 2.0 * products * math.prod(sizes) * width
  return flops / 2 if '"mask_type": "CAUSAL"' in line.rest else flops


def _splash_attention(line, scope) -> float:
  """JAX's Mosaic kernel, which says nothing of its mask: causal, hence half.

  Products: 2 forward, 5 backward, or 3 and 4 where that is two kernels.
  """
  floats = [
    scope[name].arrays[0].dims
    for name in line.operands
    if scope[name].arrays[0].dtype in ("bf16", "f32")
  ]
  query, key = [dims for dims in floats if len(dims) == 3][:2]
  products = 2
  if "_dq" in line.name:
    products = 3
  elif "_dkv" in line.name:
    is_whole = any(len(array.dims) == 4 for array in line.arrays)
    products = 5 if is_whole else 4
  return products * math.prod(query) * float(key[1])


def _traffic(program, line, scope) -> float:
  """Bytes of HBM that one run reads and writes."""
  if line.opcode == "fusion":
    return _fusion_traffic(program, line, scope)
  if line.target.startswith(_IDLE):
    return 0.0
  written = _hbm(line.arrays)
  if line.opcode in _PREFETCH:
    ends = line.arrays[:2]
    moved = min(array.num_bytes for array in ends)
    return float(moved * sum(array.space == 0 for array in ends))
  if line.opcode in ("dynamic-slice", "slice", "gather"):
    return 2.0 * _hbm(line.arrays[:1])
  if line.opcode == "dynamic-update-slice":
    return 2.0 * _hbm(scope[line.operands[1]].arrays)
  if line.opcode == "broadcast":
    return float(written)
  reads = [scope[name].arrays for name in set(line.operands) if name in scope]
  return float(written + sum(_hbm(arrays) for arrays in reads))


def _hbm(arrays: Sequence[hlo.Array]) -> int:
  return sum(array.num_bytes for array in arrays if array.space == 0)


_THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose")


def _fusion_traffic(program, line, scope) -> float:
  """Operands of which a fusion reads a slice, or writes one, count as that.

  A scan reads its layer's weights by a slice of the stack, and writes what
  it saves by an update of one.
  """
  (name,) = line.called("calls")
  inside = program.computations.get(name, ())
  by_name = {inner.name: inner for inner in inside}
  total = 0.0
  for number, operand in enumerate(line.operands):
    whole = _hbm(scope[operand].arrays) if operand in scope else 0
    total += _read(program, name, number, whole) if whole else 0
  for root in (inner for inner in inside if inner.is_root):
    parts = (
      [by_name[n] for n in root.operands] if root.opcode == "tuple" else []
    )
    for part, array in zip(parts or [root], line.arrays, strict=False):
      if array.space:
        continue
      while part.opcode in _THROUGH:
        part = by_name[part.operands[0]]
      if part.opcode == "dynamic-update-slice":
        total += _hbm(by_name[part.operands[1]].arrays)
      else:
        total += array.num_bytes
  return total


def _read(program, computation: str, number: int, whole: int) -> int:
  """Bytes that a fused computation reads of its operand `number`."""
  lines = program.computations.get(computation, ())
  pending = [
    line.name
    for line in lines
    if line.opcode == "parameter" and _number(line) == number
  ]
  total = 0
  while pending:
    name = pending.pop()
    for user in (line for line in lines if name in line.operands):
      if user.opcode in ("dynamic-slice", "slice", "gather"):
        total += user.num_bytes
      elif user.opcode == "dynamic-update-slice":
        if user.operands[0] != name:
          return whole
      elif user.opcode == "bitcast":
        pending.append(user.name)
      elif user.opcode == "fusion":
        (inner,) = user.called("calls")
        total += sum(
          _read(program, inner, place, whole)
          for place, operand in enumerate(user.operands)
          if operand == name
        )
      else:
        return whole
  return min(total, whole)


def _number(parameter: hlo.Instruction) -> int:
  return int(re.match(r"\d+", parameter.operand_text)[0])
