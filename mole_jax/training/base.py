"""The base: frozen parameters, written once, referred to by path and hash.

    DIR/params/000/, 001/ ...    Orbax checkpoints of some tiles each
    DIR/base.json                what is in which, hashes; written last

A parameter is cut into tiles (see `tiles`), each with a hash of its own, so
that a process of several reads and verifies no more than its devices hold.
Tiles are gathered into parts, which are small, since Orbax takes some three
times the memory of what it writes or reads: a base of any size is written
parameter by parameter, and read part by part.
"""

import collections
import contextlib
import ctypes
import hashlib
import pathlib
import shutil
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mole_jax.training import blocks, files, state, tiles

BASE_FILE = "base.json"
PART_BYTES = 32 * 2**20


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


def _digest_of_tiles(entry: Mapping[str, Any]) -> str:
  """The sha256 of a parameter of several tiles: of theirs, in order."""
  dtype, shape, tile = (entry[key] for key in ("dtype", "shape", "tile"))
  head = f"{dtype} {tuple(shape)} in tiles of {tuple(tile)}\n"
  lines = [f"{sha256}\n" for sha256 in entry["tiles"]]
  return hashlib.sha256("".join([head, *lines]).encode()).hexdigest()


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
  with _PartWriter(directory / "params") as writer:
    for name, leaf in pairs:
      entries[name] = _write_parameter(name, np.asarray(leaf), writer)
      del leaf
  sha256 = _digest_of_all(entries)
  values = {**(about or {}), "sha256": sha256, "parameters": entries}
  files.write_json(directory / BASE_FILE, values)
  return BaseReference(str(directory), sha256)


class _PartWriter:
  """Gathers tiles into parts and writes each that is full; a context."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._tiles: dict[str, np.ndarray] = {}
    self._num_parts = 0
    self._checkpointer = alone()

  def __enter__(self) -> "_PartWriter":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    with self._checkpointer:
      if kind is None:
        self._flush()

  def add(self, key: str, tile: np.ndarray) -> int:
    """The number of the part into which it goes."""
    held = sum(other.nbytes for other in self._tiles.values())
    if held + tile.nbytes > PART_BYTES:
      self._flush()
    self._tiles[key] = tile
    return self._num_parts

  def _flush(self) -> None:
    if not self._tiles:
      return
    path = self._folder / f"{self._num_parts:03d}"
    self._checkpointer.save(path, self._tiles)
    self._checkpointer.wait_until_finished()
    self._num_parts += 1
    self._tiles = {}
    _trim_memory()


def _write_parameter(
  name: str, array: np.ndarray, writer: _PartWriter
) -> dict[str, Any]:
  """Its entry in base.json, see `BaseReader.parameters`."""
  entry = {"shape": list(array.shape), "dtype": str(array.dtype)}
  tile = tiles.tile_shape(array.shape, array.itemsize)
  if tile == array.shape:
    part = writer.add(_key(name), np.asarray(array, order="C"))
    return entry | {"sha256": digest(array), "part": part}
  hashes: list[str] = []
  parts: list[int] = []
  whole = tiles.whole(array.shape)
  for number, bounds in enumerate(tiles.grid(array.shape, tile)):
    # A copy: the array can go before its last tiles are written.
    piece = tiles.cut(array, whole, bounds).copy()
    hashes.append(digest(piece))
    parts.append(writer.add(_key(name, number), piece))
  first, last = parts[0], parts[-1]
  entry |= {"tile": list(tile), "tiles": hashes, "part": first}
  entry["counts"] = [parts.count(part) for part in range(first, last + 1)]
  return entry | {"sha256": _digest_of_tiles(entry)}


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


def _trim_memory() -> None:
  """Gives freed memory back to the system.

  glibc keeps what Orbax's threads free, each a part's size in the end.
  """
  # Other systems have no such call, nor need it.
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)


def _key(name: str, number: int | None = None) -> str:
  """What a parameter, or a tile of it, is called in its part.

  Orbax makes folders of slashes.
  """
  key = name.replace("/", ".")
  return key if number is None else f"{key}.{number}"


class _Tile(NamedTuple):
  """Where a piece of a parameter is stored."""

  name: str
  key: str
  part: int
  bounds: tiles.Bounds
  dtype: np.dtype
  sha256: str


def read_reference(directory: pathlib.Path) -> BaseReference | None:
  """The base that stands in a directory, None if there is no complete one."""
  path = directory / BASE_FILE
  if not path.exists():
    return None
  return BaseReference(str(directory), files.read_json(path)["sha256"])


class BaseReader:
  """A base on disk: what it holds, and its parameters whole or in pieces.

  Raises ValueError where the base is absent or has another hash than
  `expected_sha256` ("": any); so does what reads from a damaged one.
  """

  about: dict[str, Any]
  # Path -> shape, dtype, sha256, part; of one in several tiles also "tile",
  # the sides of one, "tiles", the hashes of all, and "counts", how many are in
  # each part from that on. An earlier version cut into "rows" instead: so many
  # rows of all axes but the last in each part, without a hash of each.
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
    # From here on the hash of a tile is as good as that of the whole base.
    if _digest_of_all(self.parameters) != sha256 or any(
      _digest_of_tiles(entry) != entry["sha256"]
      for entry in self.parameters.values()
      if "tiles" in entry
    ):
      raise ValueError(
        f"{path} was changed or damaged: its hashes do not add up; restore it "
        "or train anew."
      )

  def read(self, name: str) -> np.ndarray:
    """One parameter, verified, in memory of the host; not to be changed.

    The part that was read last is kept: it holds what comes next.
    """
    return self._read_region(name, tiles.whole(self.parameters[name]["shape"]))

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of a parameter's first axis, as `read`.

    Of a stacked parameter these are layers, and no others are read.
    """
    _, *rest = tiles.whole(self.parameters[name]["shape"])
    return self._read_region(name, ((start, stop), *rest))

  def read_onto(
    self, shardings: Mapping[str, jax.sharding.Sharding | None]
  ) -> state.Flat:
    """Parameters on devices, verified; None: on the first device.

    Of each a process reads what its own devices hold, in whole tiles. Besides
    these shards it needs memory for a part, and once more for its shards of
    the parameter that it is at.
    """
    flat: state.Flat = {}
    shards: dict[str, tiles.LocalShards] = {}
    by_part: dict[int, list[_Tile]] = {}
    num_left = collections.Counter[str]()
    for name, sharding in shardings.items():
      entry, place = self.parameters[name], sharding or first_device()
      if "rows" in entry:
        array = self.read(name)
        flat[name] = jax.make_array_from_callback(
          array.shape, place, lambda index, array=array: array[index]
        )
        del array
        continue
      dtype = np.dtype(entry["dtype"])
      held = tiles.LocalShards(entry["shape"], dtype, place)
      shards[name] = held
      for tile in self._tiles(name):
        if held.want(tile.bounds):
          num_left[name] += 1
          by_part.setdefault(tile.part, []).append(tile)
    for number, wanted in sorted(by_part.items()):
      pieces = self._restore(number, wanted)
      for tile in wanted:
        piece = self._verified(tile, pieces[tile.key])
        shards[tile.name].fill(tile.bounds, piece)
        num_left[tile.name] -= 1
      # Devices may take memory of the host, too: the part goes first.
      del pieces, piece
      _trim_memory()
      for name in {tile.name for tile in wanted if not num_left[tile.name]}:
        flat[name] = shards.pop(name).on_devices()
    return {name: flat[name] for name in shardings}

  def _tiles(self, name: str) -> Iterator[_Tile]:
    entry = self.parameters[name]
    dtype, part = np.dtype(entry["dtype"]), entry["part"]
    if "tiles" not in entry:
      whole = tiles.whole(entry["shape"])
      yield _Tile(name, _key(name), part, whole, dtype, entry["sha256"])
      return
    parts = np.repeat(np.arange(len(entry["counts"])) + part, entry["counts"])
    grid = tiles.grid(entry["shape"], entry["tile"])
    for number, (part, bounds, sha256) in enumerate(
      zip(parts.tolist(), grid, entry["tiles"], strict=True)
    ):
      yield _Tile(name, _key(name, number), part, bounds, dtype, sha256)

  def _read_region(self, name: str, wanted: tiles.Bounds) -> np.ndarray:
    entry = self.parameters[name]
    if "rows" in entry:
      array = self._read_in_rows(name)
      return tiles.cut(array, tiles.whole(array.shape), wanted)
    region = np.empty(tiles.sides(wanted), entry["dtype"])
    for tile in self._tiles(name):
      both = tiles.overlap(tile.bounds, wanted)
      if both is None:
        continue
      if self._held[0] != tile.part:
        self._held = (-1, {})  # Let go before the next one is read.
        self._held = (tile.part, self._restore(tile.part, self._in(tile.part)))
      piece = self._verified(tile, self._held[1][tile.key])
      tiles.cut(region, wanted, both)[...] = tiles.cut(piece, tile.bounds, both)
    return region

  def _in(self, part: int) -> list[_Tile]:
    """Every tile of a part."""
    found = []
    for name, entry in self.parameters.items():
      num_parts = len(entry.get("counts", [1]))
      if "rows" not in entry and 0 <= part - entry["part"] < num_parts:
        found += [tile for tile in self._tiles(name) if tile.part == part]
    return found

  def _read_in_rows(self, name: str) -> np.ndarray:
    """Of an earlier version, with one hash of the whole parameter."""
    entry = self.parameters[name]
    self._held = (-1, {})
    array = np.empty(entry["shape"], entry["dtype"])
    matrix, start = array.reshape(-1, array.shape[-1]), 0
    for part, count in enumerate(entry["rows"], entry["part"]):
      bounds = ((start, start + count), (0, matrix.shape[1]))
      tile = _Tile(name, _key(name), part, bounds, array.dtype, "")
      matrix[start : start + count] = self._restore(part, [tile])[tile.key]
      start += count
    whole = _Tile(name, "", -1, (), array.dtype, entry["sha256"])
    return self._verified(whole, array)

  def _verified(self, tile: _Tile, piece: np.ndarray) -> np.ndarray:
    if digest(piece) != tile.sha256:
      raise ValueError(
        f"the base in {self.directory} was changed or damaged: {tile.name} "
        "does not have its sha256; restore it or train anew."
      )
    return piece

  def _restore(
    self, number: int, wanted: Sequence[_Tile]
  ) -> dict[str, np.ndarray]:
    """Some tiles of a part by key, and no bytes of others; not verified."""
    path = self.directory / "params" / f"{number:03d}"
    tree = {
      tile.key: np.empty(tiles.sides(tile.bounds), tile.dtype)
      for tile in wanted
    }
    args = ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True,
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=only_this())
    try:
      pieces = handler.restore(path, args=args)
    except (OSError, KeyError, ValueError) as error:
      raise ValueError(
        f"the base in {self.directory} was changed or damaged: {path} cannot "
        f"be read ({error}); restore it or train anew."
      ) from error
    finally:
      handler.close()
    _trim_memory()
    return pieces


def first_device() -> jax.sharding.Sharding:
  """Where parameters go that no mesh is told for."""
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def read_base(
  directory: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  expected_sha256: str,
  optional: Collection[str] = (),
  make: Callable[[str, jax.Array], state.Flat] | None = None,
) -> state.Flat:
  """Reads a base and verifies its hashes.

  Args:
    directory: where it is.
    shapes: what the model wants, with shardings, or none for the first
      device; types are those stored.
    expected_sha256: of the base; "" for any.
    optional: parameters that may be absent, since a stage trains them.
    make: what to hold of a parameter, by its path and value. With it they are
      read one after the other, so that no two are there whole.

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
  places = {name: leaf.sharding for name, leaf in shapes.items()}
  if make is None:
    return reader.read_onto(places)
  flat: state.Flat = {}
  for name, place in places.items():
    flat |= make(name, reader.read_onto({name: place})[name])
  return flat


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
