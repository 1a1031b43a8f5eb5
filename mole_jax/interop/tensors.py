"""Tensors of a checkpoint on disk, one at a time; nothing is unpickled.

Reads `model.safetensors`, or shards with their index; writes shards and reads
each one back, since safetensors 0.8 stores arrays that are not contiguous in
memory wrongly and says nothing.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

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

  `infos` comes from headers alone. Raises CheckpointError where a file is
  missing, damaged, or no safetensors file at all.
  """

  infos: dict[str, TensorInfo]

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    files, index = _find_files(self.path)
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
    with safetensors.safe_open(self.path / info.file, "np") as file:
      array = file.get_tensor(name)
    if array.dtype.kind in "fV" and not np.isfinite(array).all():
      count = int(np.sum(~np.isfinite(array)))
      raise CheckpointError(
        f"{self.path / info.file}: tensor {name!r} holds {count} values that "
        "are NaN or infinite; the checkpoint is damaged or its training "
        "diverged."
      )
    return array


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


class ShardWriter:
  """Writes tensors into shards of at most `max_bytes`; a context manager.

  A tensor larger than that has a shard of its own. Leaving the context
  without an error names the shards and writes their index (none for a single
  shard).
  """

  def __init__(self, directory: pathlib.Path, max_bytes: int):
    self._directory = directory
    self._max_bytes = max_bytes
    self._shard: dict[str, np.ndarray] = {}
    self._shards: list[list[str]] = []
    self._total = 0

  def __enter__(self) -> "ShardWriter":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      self._flush()
      self._name_shards()

  def add(self, name: str, array: np.ndarray) -> None:
    """Adds one tensor; it is copied where it is not contiguous."""
    size = sum(held.nbytes for held in self._shard.values())
    if self._shard and size + array.nbytes > self._max_bytes:
      self._flush()
    is_whole = array.flags.c_contiguous
    self._shard[name] = array if is_whole else array.copy(order="C")
    self._total += array.nbytes

  def _flush(self) -> None:
    if not self._shard:
      return
    path = self._directory / f"shard-{len(self._shards)}.safetensors"
    safetensors_numpy.save_file(self._shard, path, metadata={"format": "pt"})
    _check_shard(path, self._shard)
    self._shards.append(list(self._shard))
    self._shard = {}

  def _name_shards(self) -> None:
    count = len(self._shards)
    weight_map = {}
    for number, names in enumerate(self._shards):
      file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
      file = file if count > 1 else SINGLE_FILE
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


def _check_shard(path: pathlib.Path, written: Mapping[str, np.ndarray]) -> None:
  """Reads a shard back; CheckpointError unless it is bit for bit the same."""
  with safetensors.safe_open(path, "np") as opened:
    for name, array in written.items():
      read = opened.get_tensor(name)
      same = read.dtype == array.dtype and read.shape == array.shape
      if not same or not np.array_equal(_bytes(read), _bytes(array)):
        raise CheckpointError(
          f"{path}: tensor {name!r} does not read back as it was written; the "
          "disk or the safetensors library is at fault."
        )


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)
