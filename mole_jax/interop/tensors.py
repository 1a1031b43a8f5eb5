"""Tensors of a checkpoint on disk, one at a time; nothing is unpickled.

Reads `model.safetensors`, or shards with their index; writes shards and reads
each one back. Neither a file nor a copy of a large tensor is ever in memory.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from mole_jax.training import blocks

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
METADATA = "__metadata__"  # A header's own key; no tensor has this name.


class CheckpointError(ValueError):
  """A checkpoint that cannot be read or used; the message says which part."""


class TensorInfo(NamedTuple):
  """What a header says of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype
  file: str

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Folder:
  """The tensors of one checkpoint folder, by name, read when asked for.

  `infos` comes from headers alone; with `file`, of that file alone. Raises
  CheckpointError where a file is missing, damaged, or no safetensors file at
  all.
  """

  infos: dict[str, TensorInfo]

  def __init__(self, path: str | os.PathLike, file: str | None = None):
    self.path = pathlib.Path(path)
    files, index = ([file], {}) if file else _find_files(self.path)
    if file and not (self.path / file).is_file():
      raise CheckpointError(f"{self.path / file} is missing.")
    self.infos = {}
    for file in files:
      for name, info in _read_header(self.path, file).items():
        if name in self.infos:
          raise CheckpointError(
            f"{self.path}: tensor {name!r} is in both {self.infos[name].file} "
            f"and {file}; keep one."
          )
        self.infos[name] = info
    absent = sorted(set(index) - set(self.infos))
    if absent:
      raise CheckpointError(
        f"{self.path / INDEX_FILE} names tensors that no shard holds: "
        f"{', '.join(absent[:10])}; download the checkpoint again."
      )

  def read(self, name: str) -> np.ndarray:
    """One tensor in its stored type.

    Raises CheckpointError where it is absent or holds NaN or infinity.
    """
    if name not in self.infos:
      raise CheckpointError(f"{self.path} holds no tensor {name!r}.")
    info = self.infos[name]
    array = np.empty(info.shape, info.dtype)
    for rows, block in _read_blocks(self.path / info.file, name, info):
      array[rows] = block
    check_finite(self.path / info.file, name, array)
    return array


def check_finite(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  """Raises CheckpointError where a tensor of a file holds NaN or infinity."""
  if array.dtype.kind not in "fV":
    return
  flat = array.reshape(-1)
  count = sum(
    int(np.sum(~np.isfinite(flat[rows])))
    for rows in blocks.row_blocks(flat.shape, flat.itemsize)
  )
  if count:
    raise CheckpointError(
      f"{path}: tensor {name!r} holds {count} values that are NaN or infinite; "
      "the checkpoint is damaged or its training diverged."
    )


def _find_files(path: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """Files of tensors in a folder, and the index (empty without shards)."""
  if not path.is_dir():
    raise CheckpointError(
      f"{path} is not a folder; wanted one with {SINGLE_FILE} or {INDEX_FILE}."
    )
  if (path / INDEX_FILE).exists():
    try:
      index = json.loads((path / INDEX_FILE).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
      raise CheckpointError(
        f"{path / INDEX_FILE} is no index of shards: {type(e).__name__} {e}; "
        "wanted JSON with a weight_map."
      ) from None
    files = sorted(set(index.values()))
    outside = [file for file in files if pathlib.PurePath(file).name != file]
    if outside:
      raise CheckpointError(
        f"{path / INDEX_FILE} names files outside its folder: {outside[:3]}."
      )
    absent = [file for file in files if not (path / file).exists()]
    if absent:
      raise CheckpointError(
        f"{path / INDEX_FILE} names shards that are not there: "
        f"{', '.join(absent)}; download them."
      )
    return files, index
  if (path / SINGLE_FILE).exists():
    return [SINGLE_FILE], {}
  found = sorted(p.name for p in path.iterdir())[:8]
  raise CheckpointError(
    f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; it holds {found}."
  )


def _read_header(folder: pathlib.Path, file: str) -> dict[str, TensorInfo]:
  path = folder / file
  with path.open("rb") as opened:
    magic = opened.read(9)
  # A header's length may begin with these bytes too, but then "{" follows it.
  if magic[8:] != b"{" and magic.startswith((b"PK", b"\x80")):
    raise CheckpointError(
      f"{path} is a PyTorch pickle under the name of a safetensors file; it "
      "was not opened. Save it as safetensors."
    )
  try:
    with safetensors.safe_open(path, "np") as opened:
      infos = {}
      for name in opened.keys():  # noqa: SIM118 - it is no dictionary.
        view = opened.get_slice(name)
        dtype = view.get_dtype()
        if dtype not in DTYPES:
          raise CheckpointError(
            f"{path}: tensor {name!r} has the type {dtype}; wanted one of "
            f"{sorted(DTYPES)}."
          )
        infos[name] = TensorInfo(tuple(view.get_shape()), DTYPES[dtype], file)
      return infos
  except safetensors.SafetensorError as error:
    raise CheckpointError(
      f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: "
      f"{error}; download or copy it again."
    ) from None


@contextlib.contextmanager
def new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to write into that appears as `out` once all went well.

  Raises CheckpointError where `out` stands already.
  """
  if out.exists():
    raise CheckpointError(f"{out} exists; choose another --out or remove it.")
  partial = out.with_name(out.name + ".partial")
  if partial.exists():  # Of an earlier attempt that was killed.
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial)
    raise
  os.replace(partial, out)


class _Written(NamedTuple):
  """What must be read back of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype
  sha256: str

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
  """Writes tensors into shards of at most `max_bytes`; a context manager.

  A tensor larger than that has a shard of its own. Leaving the context
  without an error names the shards and writes their index (none for a single
  shard, which gets the name `single_file`); with one, the shard at work is
  removed.

  A tensor's bytes go to disk when it is added. A shard's header, which stands
  before them, is known last: they wait in a file for each size of item, and
  are put together widest first, so that every tensor is aligned.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    max_bytes: int,
    single_file: str = SINGLE_FILE,
  ):
    self._directory = directory
    self._max_bytes = max_bytes
    self._single_file = single_file
    self._shard: dict[str, _Written] = {}
    self._waiting: dict[int, BinaryIO] = {}  # By size of item.
    self._shards: list[list[str]] = []
    self._names: set[str] = set()
    self._total = 0

  def __enter__(self) -> "ShardWriter":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      if kind is None:
        self._flush()
        self._name_shards()
    finally:
      self._clear()

  def add(self, name: str, array: np.ndarray) -> None:
    """Adds one tensor, contiguous or not; the array may change afterwards.

    Raises CheckpointError where its name or type has no place in a file.
    """
    if name in self._names or name == METADATA:
      raise CheckpointError(f"there cannot be two tensors {name!r}.")
    if array.dtype not in CODES:
      raise CheckpointError(
        f"tensor {name!r} has the type {array.dtype}; wanted one of "
        f"{sorted(map(str, CODES))}."
      )
    size = sum(written.num_bytes for written in self._shard.values())
    if self._shard and size + array.nbytes > self._max_bytes:
      self._flush()
    sha = hashlib.sha256()
    file = self._waiting_file(array.dtype.itemsize)
    for data in blocks.as_bytes(array):
      file.write(data)
      sha.update(data)
    self._shard[name] = _Written(array.shape, array.dtype, sha.hexdigest())
    self._names.add(name)
    self._total += array.nbytes

  def _waiting_file(self, itemsize: int) -> BinaryIO:
    if itemsize not in self._waiting:
      path = self._directory / f"shard-{len(self._shards)}.{itemsize}.partial"
      self._waiting[itemsize] = path.open("wb+")
    return self._waiting[itemsize]

  def _flush(self) -> None:
    if not self._shard:
      return
    partial = self._directory / f"shard-{len(self._shards)}.partial"
    with partial.open("wb") as file:
      file.write(_header(self._shard))
      for itemsize in sorted(self._waiting, reverse=True):
        self._waiting[itemsize].seek(0)
        shutil.copyfileobj(self._waiting[itemsize], file, blocks.BLOCK_BYTES)
    self._clear()
    _check_shard(partial, self._shard)
    os.replace(partial, partial.with_suffix(".safetensors"))
    self._shards.append(list(self._shard))
    self._shard = {}

  def _clear(self) -> None:
    for file in self._waiting.values():
      file.close()
      os.unlink(file.name)
    self._waiting = {}

  def _name_shards(self) -> None:
    count = len(self._shards)
    weight_map = {}
    for number, names in enumerate(self._shards):
      file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
      file = file if count > 1 else self._single_file
      os.replace(
        self._directory / f"shard-{number}.safetensors", self._directory / file
      )
      weight_map |= dict.fromkeys(names, file)
    if count > 1:
      index = {
        "metadata": {"total_size": self._total},
        "weight_map": dict(sorted(weight_map.items())),
      }
      path = self._directory / INDEX_FILE
      path.write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: dict[str, _Written]) -> bytes:
  """A file's beginning; tensors stand widest first, else in their order."""
  values: dict[str, Any] = {METADATA: {"format": "pt"}}
  at = 0
  for name in sorted(shard, key=lambda name: -shard[name].dtype.itemsize):
    written = shard[name]
    end = at + written.num_bytes
    values[name] = {
      "dtype": CODES[written.dtype],
      "shape": written.shape,
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # The data is aligned, too.
  return len(text).to_bytes(8, "little") + text


def _read_blocks(
  path: pathlib.Path, name: str, like: TensorInfo | _Written
) -> Iterator[tuple[Any, np.ndarray]]:
  """A tensor of a file some rows at a time: which, and their values.

  The file is opened for each anew: what was read of a mapped file counts as
  memory until it is closed.
  """
  if like.num_bytes <= blocks.BLOCK_BYTES:
    with safetensors.safe_open(path, "np") as file:
      yield ..., file.get_tensor(name)
    return
  for rows in blocks.row_blocks(like.shape, like.dtype.itemsize):
    with safetensors.safe_open(path, "np") as file:
      yield rows, file.get_slice(name)[rows]


def _check_shard(path: pathlib.Path, shard: dict[str, _Written]) -> None:
  """Reads a shard back; CheckpointError unless it is bit for bit the same."""
  infos = _read_header(path.parent, path.name)
  for name, written in shard.items():
    same = name in infos and infos[name][:2] == written[:2]
    if same:
      sha = hashlib.sha256()
      for _, block in _read_blocks(path, name, written):
        for data in blocks.as_bytes(block):
          sha.update(data)
      same = sha.hexdigest() == written.sha256
    if not same or len(infos) != len(shard):
      raise CheckpointError(
        f"{path}: tensor {name!r} does not read back as it was written; the "
        "disk or the safetensors library is at fault."
      )
