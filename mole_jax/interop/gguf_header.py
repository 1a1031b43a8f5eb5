"""The header of a GGUF file, checked against the file's size.

The layout is that of ggml's docs/gguf.md, versions 2 and 3. It is read here:
`gguf.GGUFReader` believes every count, and makes objects of each token (2.7 s
and 190 MB to open SmolLM2-135M). What the types of tensors are the package
`gguf` knows.
"""

import importlib.metadata
import pathlib
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mole_jax.interop.tensors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "llama"
# Types of values in the metadata.
SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
STRING, ARRAY = 8, 9
MAX_DIMS = 4  # GGML_MAX_DIMS.
# The least that an entry can take: an empty name and the numbers beside it.
MIN_VALUE_BYTES, MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# Types that keep their values and their precision; all others become float32.
UNQUANTISED = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Entry(NamedTuple):
  """A tensor as the header describes it; `start` counts from the file's."""

  name: str
  shape: tuple[int, ...]
  kind: int
  start: int
  num_bytes: int


def open_file(path: pathlib.Path) -> np.ndarray:
  """The file's bytes as a memory map."""
  if not path.is_file():
    raise CheckpointError(f"{path} is not a file; wanted one in GGUF.")
  with path.open("rb") as opened:
    found = opened.read(len(MAGIC))
  if found != MAGIC:
    raise CheckpointError(
      f"{path} begins with {found!r}; a GGUF file begins with {MAGIC!r}. "
      "Download it again, or name what it is."
    )
  return np.memmap(path, np.uint8, mode="r")


class _Reader:
  """Reads a header front to back, and never past the end of the file."""

  def __init__(self, path: pathlib.Path, data: np.ndarray):
    self.path = path
    self.at = len(MAGIC)
    self._data = memoryview(data)

  def take(self, size: int, what: str) -> memoryview:
    """The next bytes; CheckpointError where there are fewer."""
    if size > len(self._data) - self.at:
      raise CheckpointError(
        f"{self.path} ({len(self._data):,} bytes) ends within its header: "
        f"{what} at byte {self.at:,} takes {size:,} bytes. The file is cut off "
        "or damaged; download it again."
      )
    self.at += size
    return self._data[self.at - size : self.at]

  def number(self, code: str, what: str) -> Any:
    size = struct.calcsize("<" + code)
    (value,) = struct.unpack("<" + code, self.take(size, what))
    # The shortest decimal of a float32: 1e-05 and not 9.999999747378752e-06.
    return float(str(np.float32(value))) if code == "f" else value

  def count(self, min_bytes: int, what: str) -> int:
    """A number of things that take at least so many bytes each."""
    count = self.number("Q", f"the number of {what}")
    if count * min_bytes > len(self._data) - self.at:
      raise CheckpointError(
        f"{self.path}: says it holds {count:,} {what}; its "
        f"{len(self._data):,} bytes have no room for them. The file is cut "
        "off or damaged; download it again."
      )
    return count

  def text(self, what: str) -> str:
    size = self.number("Q", f"the length of {what}")
    try:
      return str(self.take(size, what), "utf-8")
    except UnicodeDecodeError as error:
      raise CheckpointError(
        f"{self.path}: {what} is no text ({error}); the file is damaged, "
        "download it again."
      ) from None

  def value(self, kind: int, what: str) -> Any:
    """A value of the metadata; of an array only its length, as a tuple."""
    if kind in SCALARS:
      return self.number(SCALARS[kind], what)
    if kind == STRING:
      return self.text(what)
    if kind == ARRAY:
      of = self.number("I", f"the type of {what}")
      if of in SCALARS:
        size = struct.calcsize("<" + SCALARS[of])
        count = self.count(size, f"values of {what}")
        self.take(count * size, what)
        return (count,)
      if of == STRING:
        count = self.count(8, f"strings of {what}")
        for _ in range(count):
          self.take(self.number("Q", what), what)
        return (count,)
      kind = of
    raise CheckpointError(
      f"{self.path}: {what} has type {kind}; wanted one of "
      f"{sorted([*SCALARS, STRING])} or an array of these. The file is "
      "damaged or newer than this reader."
    )


def read_header(
  path: pathlib.Path, data: np.ndarray, gguf: ModuleType
) -> tuple[dict[str, Any], list[Entry]]:
  """Metadata, and what tensors there are, checked against the file's size."""
  reader = _Reader(path, data)
  version = reader.number("I", "the version")
  if version not in VERSIONS:
    is_big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
    raise CheckpointError(
      f"{path}: GGUF version {version}"
      f"{' (it is big-endian)' if is_big else ''}; wanted one of {VERSIONS}, "
      "little-endian. Convert the model again with a llama.cpp of today."
    )
  num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")
  metadata: dict[str, Any] = {}
  for _ in range(reader.count(MIN_VALUE_BYTES, "values of metadata")):
    key = reader.text("a key of the metadata")
    if key in metadata:
      raise CheckpointError(
        f"{path}: {key!r} is twice in its metadata; the file is damaged."
      )
    metadata[key] = reader.value(reader.number("I", f"the type of {key}"), key)
  _check_kind(path, metadata)
  found = []
  for number in range(num_tensors):
    name = reader.text(f"the name of tensor {number}")
    num_dims = reader.number("I", f"the shape of {name}")
    if not 1 <= num_dims <= MAX_DIMS:
      raise CheckpointError(
        f"{path}: tensor {name!r} has {num_dims} dimensions; wanted 1 to "
        f"{MAX_DIMS}. The file is damaged."
      )
    # ggml counts dimensions from the innermost.
    dims = [reader.number("Q", f"the shape of {name}") for _ in range(num_dims)]
    kind = reader.number("I", f"the type of {name}")
    offset = reader.number("Q", f"the place of {name}")
    found.append((name, tuple(dims[::-1]), kind, offset))
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise CheckpointError(
      f"{path}: general.alignment is {alignment!r}; wanted a positive integer."
    )
  start = -(-reader.at // alignment) * alignment
  return metadata, _check_entries(path, found, start, len(data), gguf)


def _check_kind(path: pathlib.Path, metadata: dict[str, Any]) -> None:
  """Raises CheckpointError unless the file is a whole decoder of ours."""
  for key, wanted, default in (
    ("general.architecture", ARCHITECTURE, None),
    ("general.type", "model", "model"),
  ):
    found = metadata.get(key, default)
    if found != wanted:
      raise CheckpointError(
        f"{path}: {key} is {found!r}; wanted {wanted!r} (decoders of Llama, "
        "Mistral and SmolLM2). Choose another model, or its safetensors."
      )
  parts = metadata.get("split.count", 0)
  if parts not in (0, 1):
    raise CheckpointError(
      f"{path} is one of {parts} parts; wanted a whole file. Join them with "
      "llama.cpp's `llama-gguf-split --merge`."
    )


def _check_entries(
  path: pathlib.Path,
  found: list[tuple[str, tuple[int, ...], int, int]],
  start: int,
  file_bytes: int,
  gguf: ModuleType,
) -> list[Entry]:
  """Entries with places in the file; CheckpointError with all problems."""
  can_read = _readable(gguf)
  entries, problems, seen = [], [], set()
  for name, shape, kind, offset in found:
    if name in seen:
      problems.append(f"{name} is there twice")
    seen.add(name)
    if not can_read(kind):
      known = {int(k): k.name for k in gguf.GGMLQuantizationType}
      problems.append(f"{name} has the type {known.get(kind, kind)}")
      continue
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if 0 in shape or shape[-1] % block:
      problems.append(f"{name} is {list(shape)}, in blocks of {block}")
      continue
    num_elements = 1
    for size in shape:  # Python's integers: no product overflows.
      num_elements *= size
    entry = Entry(
      name, shape, kind, start + offset, num_elements // block * block_bytes
    )
    end = entry.start + entry.num_bytes
    if end > file_bytes:
      problems.append(f"{name} ends at byte {end:,}")
    entries.append(entry)
  if problems:
    rest = len(problems) - 20
    more = f"\n  and {rest} more" if rest > 0 else ""
    raise CheckpointError(
      f"{path} ({file_bytes:,} bytes) holds tensors that cannot be read. The "
      "file is cut off or damaged (download it again), or its types are newer "
      f"than gguf {importlib.metadata.version('gguf')} (update that, or take "
      "an F16 or Q8_0 file):\n  " + "\n  ".join(problems[:20]) + more
    )
  return entries


def _readable(gguf: ModuleType) -> Callable[[int], bool]:
  """Whether a type of tensor can be read, tried out on one block of zeros."""
  known: dict[int, bool] = {}

  def can_read(kind: int) -> bool:
    if kind not in known:
      try:
        named = gguf.GGMLQuantizationType(kind)
        if named.name not in UNQUANTISED:
          block = np.zeros((1, gguf.GGML_QUANT_SIZES[named][1]), np.uint8)
          with np.errstate(all="ignore"):
            gguf.quants.dequantize(block, named)
        known[kind] = True
      except (ValueError, NotImplementedError):
        known[kind] = False
    return known[kind]

  return can_read
