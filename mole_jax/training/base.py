"""The base: frozen parameters, written once, referred to by path and hash.

    DIR/params/000/, 001/ ...    Orbax checkpoints of some parameters each
    DIR/base.json                what is in which, hashes; written last

Parts are small, since Orbax takes some three times the memory of what it
writes or reads, and a parameter that is larger than a part spans several: a
base of any size is written parameter by parameter, and read so.
"""

import contextlib
import ctypes
import hashlib
import pathlib
import shutil
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mole_jax.training import blocks, files, state

BASE_FILE = "base.json"
PART_BYTES = 64 * 2**20


class BaseReference(NamedTuple):
  """A base by place and content. `path` may be relative to the run."""

  path: str
  sha256: str


def digest(leaf: Any) -> str:
  """SHA-256 of one parameter's type, shape and bytes."""
  array = np.asarray(jax.device_get(leaf))
  sha = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
  for data in blocks.as_bytes(array):
    sha.update(data)
  return sha.hexdigest()


def _digest_of_all(entries: Mapping[str, Mapping[str, Any]]) -> str:
  lines = [f"{name} {entries[name]['sha256']}\n" for name in sorted(entries)]
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_base(
  directory: pathlib.Path,
  parameters: Mapping[str, Any] | Iterable[tuple[str, Any]],
  about: Mapping[str, Any] | None = None,
) -> BaseReference:
  """Writes a base; base.json, written last, says that it is complete.

  Args:
    directory: where to write; a base that stands there is replaced.
    parameters: arrays by path. Pairs are taken one at a time and let go once
      written, so that a generator may produce more than memory holds.
    about: what else base.json says, such as where the base came from.
  """
  directory = directory.absolute()
  (directory / BASE_FILE).unlink(missing_ok=True)
  if (directory / "params").exists():
    shutil.rmtree(directory / "params")
  pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
  entries: dict[str, dict[str, Any]] = {}
  part: dict[str, Any] = {}
  num_parts = 0
  with alone() as checkpointer:

    def flush() -> None:
      nonlocal num_parts
      if part:
        path = directory / "params" / f"{num_parts:03d}"
        checkpointer.save(
          path, {_key(name): leaf for name, leaf in part.items()}
        )
        checkpointer.wait_until_finished()
        num_parts += 1
        part.clear()
        _trim_memory()

    for name, leaf in pairs:
      if part and _num_bytes(part.values()) + leaf.nbytes > PART_BYTES:
        flush()
      entries[name] = {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "sha256": digest(leaf),
        "part": num_parts,
      }
      if leaf.nbytes <= PART_BYTES:
        part[name] = np.asarray(leaf, order="C")
      else:
        array = _as_matrix(np.asarray(leaf))
        entries[name]["rows"] = []
        for rows in blocks.row_blocks(array.shape, array.itemsize, PART_BYTES):
          part[name] = np.ascontiguousarray(array[rows])
          entries[name]["rows"].append(rows.stop - rows.start)
          flush()
        del array
      del leaf
    flush()
  sha256 = _digest_of_all(entries)
  values = {**(about or {}), "sha256": sha256, "parameters": entries}
  files.write_json(directory / BASE_FILE, values)
  return BaseReference(str(directory), sha256)


def alone() -> ocp.StandardCheckpointer:
  """Orbax for this process alone: of several, no other need take part."""
  return ocp.StandardCheckpointer(multiprocessing_options=only_this())


def only_this() -> ocp.options.MultiprocessingOptions:
  """What keeps Orbax in this process from waiting for others."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index,
    active_processes={index},
    barrier_sync_key_prefix=f"process{index}",
  )


def _num_bytes(leaves: Iterable[Any]) -> int:
  return sum(leaf.nbytes for leaf in leaves)


def _trim_memory() -> None:
  """Gives freed memory back to the system.

  glibc keeps what Orbax's threads free, each a part's size in the end.
  """
  # Other systems have no such call, nor need it.
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)


def _as_matrix(array: np.ndarray) -> np.ndarray:
  """What a parameter is cut from: all axes but the last are rows."""
  return array.reshape(-1, array.shape[-1])


def _key(name: str) -> str:
  """Orbax makes folders of slashes."""
  return name.replace("/", ".")


def read_reference(directory: pathlib.Path) -> BaseReference | None:
  """The base that stands in a directory, None if there is no complete one."""
  path = directory / BASE_FILE
  if not path.exists():
    return None
  return BaseReference(str(directory), files.read_json(path)["sha256"])


class BaseReader:
  """A base on disk: what it holds, and its parameters one or some at a time.

  Raises ValueError where the base is absent or has another hash than
  `expected_sha256` ("": any).
  """

  about: dict[str, Any]
  # Path -> shape, dtype, sha256, part; of one that spans several parts from
  # that on also "rows", how many each holds.
  parameters: dict[str, dict[str, Any]]

  def __init__(self, directory: pathlib.Path, expected_sha256: str = ""):
    self.directory = directory.absolute()
    self._held: tuple[int, dict[str, np.ndarray]] = (-1, {})
    path = self.directory / BASE_FILE
    if not path.exists():
      raise ValueError(
        f"{self.directory} holds no complete base ({BASE_FILE} is missing); "
        "name a finished RUN/base in config.base.path, or let the run train "
        "its own."
      )
    self.about = files.read_json(path)
    self.parameters = self.about["parameters"]
    sha256 = self.about["sha256"]
    if expected_sha256 and sha256 != expected_sha256:
      raise ValueError(
        f"the base in {self.directory} has sha256 {sha256}, but the run that "
        f"refers to it says {expected_sha256}: it was changed; restore it or "
        "train anew."
      )
    if _digest_of_all(self.parameters) != sha256:
      raise ValueError(
        f"{path} was changed or damaged: its hashes do not add up; restore it "
        "or train anew."
      )

  def parts(self) -> list[list[str]]:
    """Parameters by the part that they are, or begin, in."""
    count = 1 + max(entry["part"] for entry in self.parameters.values())
    parts: list[list[str]] = [[] for _ in range(count)]
    for name, entry in self.parameters.items():
      parts[entry["part"]].append(name)
    return parts

  def read(self, name: str) -> np.ndarray:
    """One parameter, verified, in memory of the host; not to be changed.

    Of a part with several parameters all are kept until another is read from.
    """
    entry = self.parameters[name]
    number, dtype = entry["part"], np.dtype(entry["dtype"])
    if "rows" in entry:
      self._held = (-1, {})
      array = np.empty(entry["shape"], dtype)
      matrix, start = _as_matrix(array), 0
      for i, count in enumerate(entry["rows"]):
        shapes = {name: ((count, matrix.shape[1]), dtype)}
        piece = self._restore(number + i, shapes)[name]
        matrix[start : start + count] = piece
        start += count
        del piece
    else:
      if self._held[0] != number:
        self._held = (-1, {})  # Let go before the next one is read.
        shapes = {
          other: (tuple(held["shape"]), np.dtype(held["dtype"]))
          for other, held in self.parameters.items()
          if held["part"] == number
        }
        self._held = (number, self._restore(number, shapes))
      array = self._held[1][name]
    if digest(array) != entry["sha256"]:
      raise ValueError(
        f"the base in {self.directory} was changed or damaged: {name} does "
        "not have its sha256; restore it or train anew."
      )
    return array

  def _restore(
    self, number: int, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]
  ) -> dict[str, np.ndarray]:
    wanted = {_key(name): np.empty(*shapes[name]) for name in shapes}
    with alone() as checkpointer:
      path = self.directory / "params" / f"{number:03d}"
      tree = checkpointer.restore(path, wanted)
    _trim_memory()
    return {name: tree[_key(name)] for name in shapes}

  def read_part(
    self, number: int, shardings: Mapping[str, Any] | None = None
  ) -> state.Flat:
    """The parameters of a part, verified; without shardings, on one device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {}
    for name in self.parts()[number]:
      array = self.read(name)
      flat[name] = jax.make_array_from_callback(
        array.shape,
        (shardings[name] if shardings else None) or first,
        lambda index, array=array: array[index],
      )
    return flat


def read_base(
  directory: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  expected_sha256: str,
  optional: Collection[str] = (),
) -> state.Flat:
  """Reads a base and verifies its hashes.

  Args:
    directory: where it is.
    shapes: what the model wants, with shardings, or none for the first
      device; types are those stored.
    expected_sha256: of the base; "" for any.
    optional: parameters that may be absent, since a stage trains them.

  Raises ValueError where the base is absent, holds other parameters (all are
  listed) or has another hash.
  """
  reader = BaseReader(directory, expected_sha256)
  shapes = {
    name: leaf
    for name, leaf in shapes.items()
    if name in reader.parameters or name not in optional
  }
  _check_fit(reader.directory, reader.parameters, shapes)
  shardings = {name: leaf.sharding for name, leaf in shapes.items()}
  flat: state.Flat = {}
  for number in range(len(reader.parts())):
    flat |= reader.read_part(number, shardings)
  return {name: flat[name] for name in shapes}


def _check_fit(
  directory: pathlib.Path,
  stored: Mapping[str, Mapping[str, Any]],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  problems = [f"missing {name}" for name in shapes if name not in stored]
  problems += [f"unknown {name}" for name in stored if name not in shapes]
  problems += [
    f"{name} is {stored[name]['shape']}, wanted {list(leaf.shape)}"
    for name, leaf in shapes.items()
    if name in stored and stored[name]["shape"] != list(leaf.shape)
  ]
  if problems:
    raise ValueError(
      f"the base in {directory} does not fit config.model:\n  "
      + "\n  ".join(problems)
    )


def base_shapes(
  config: Mapping[str, Any], has_experts: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes of the base: the model without any adapter."""
  stage = {"use_adapters": False, "use_experts": has_experts}
  values = {**config, "stages": {"base": stage}}
  return state.parameter_shapes(state.model_config(values, "base"))
