"""Arrays cut into tiles, so that a part of one is stored and read alone."""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

# Small enough that a mesh of many hosts cuts between tiles, not through them;
# 14,000 of them make a model of 7B parameters.
TILE_BYTES = 2**20

# First and one past the last entry, of each axis: what a tile or a shard holds.
Bounds = tuple[tuple[int, int], ...]


def tile_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Sides of a tile of at most TILE_BYTES, by halving the array's.

  Layers come apart first, since they are read one by one; then the longer side
  of a matrix, since some parameters are sharded by rows and some by columns.
  """
  tile = list(shape)
  while math.prod(tile) * itemsize > TILE_BYTES:
    stacked = (axis for axis in range(len(tile) - 2) if tile[axis] > 1)
    last_two = range(max(0, len(tile) - 2), len(tile))
    axis = next(stacked, max(last_two, key=tile.__getitem__))
    tile[axis] = -(-tile[axis] // 2)
  return tuple(tile)


def grid(shape: Sequence[int], tile: Sequence[int]) -> Iterator[Bounds]:
  """The tiles of an array in C order; those at its ends may be smaller."""
  axes = [
    [(at, min(at + step, size)) for at in range(0, size, step)]
    for size, step in zip(shape, tile, strict=True)
  ]
  return itertools.product(*axes)


def whole(shape: Sequence[int]) -> Bounds:
  """All of an array."""
  return tuple((0, size) for size in shape)


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
  """An index of whole slices, as a sharding gives it, in numbers."""
  return tuple(
    each.indices(size)[:2] for each, size in zip(index, shape, strict=True)
  )


def sides(bounds: Bounds) -> tuple[int, ...]:
  """The shape of what lies within."""
  return tuple(stop - start for start, stop in bounds)


def overlap(one: Bounds, other: Bounds) -> Bounds | None:
  """What lies in both, None if nothing does."""
  both = tuple(
    (max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)
  )
  return both if all(start < stop for start, stop in both) else None


def cut(array: np.ndarray, held: Bounds, wanted: Bounds) -> np.ndarray:
  """A view of `wanted` in an array that holds `held` of a larger one."""
  slices = [
    slice(start - first, stop - first)
    for (start, stop), (first, _) in zip(wanted, held, strict=True)
  ]
  return array[(..., *slices)]  # An array even where there is no axis.


class LocalShards:
  """What the devices of this process hold of an array, while it is read."""

  def __init__(
    self,
    shape: Sequence[int],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
  ):
    self._shape, self._dtype = tuple(shape), dtype
    self._sharding = sharding
    indices = sharding.addressable_devices_indices_map(self._shape).values()
    # Of copies on several devices one is enough in memory of the host.
    self._shards: dict[Bounds, np.ndarray | None] = dict.fromkeys(
      bounds_of(index, self._shape) for index in indices
    )

  def want(self, held: Bounds) -> bool:
    """Whether some of it is on these devices."""
    return any(overlap(held, bounds) is not None for bounds in self._shards)

  def fill(self, held: Bounds, piece: np.ndarray) -> None:
    """Takes what is wanted of a piece that holds `held`."""
    for bounds, shard in self._shards.items():
      both = overlap(held, bounds)
      if both is None:
        continue
      if shard is None:
        shard = np.empty(sides(bounds), self._dtype)
        self._shards[bounds] = shard
      cut(shard, bounds, both)[...] = cut(piece, held, both)

  def on_devices(self) -> jax.Array:
    """The array, once all that is wanted was filled in."""
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: self._shards[bounds_of(index, self._shape)],
    )
