"""Large arrays, a few rows at a time: no copy of them is ever whole."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK_BYTES = 16 * 2**20


def row_blocks(
  shape: Sequence[int], itemsize: int, max_bytes: int = BLOCK_BYTES
) -> Iterator[slice]:
  """Slices of the first axis of at most `max_bytes`, or of a single row."""
  row_bytes = itemsize * math.prod(shape[1:])
  step = max(1, max_bytes // max(1, row_bytes))
  for start in range(0, shape[0], step):
    yield slice(start, min(start + step, shape[0]))


def as_bytes(
  array: np.ndarray, dtype: np.dtype | None = None
) -> Iterator[memoryview]:
  """The bytes of an array in C order, whatever its layout in memory.

  `dtype` converts them on the way.
  """
  if array.flags.c_contiguous:
    array = array.reshape(-1)
  for rows in row_blocks(array.shape, array.dtype.itemsize):
    block = np.ascontiguousarray(array[rows], dtype)
    yield block.reshape(-1).view(np.uint8).data
