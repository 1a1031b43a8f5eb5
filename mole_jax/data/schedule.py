"""Which records stand in which row: the plan of a whole run.

The plan is a pure function of lengths, counts, weights and a seed, so the
position in the data is the training step itself, for any number of hosts and
workers. Only raw Philox output and stable sorts are used, whose values NumPy
keeps from version to version.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32, Int64

WINDOW = 512  # Records drawn, then packed together.
_SHUFFLE_RECORDS, _SHUFFLE_ROWS = 0, 1  # Keys of the random streams.


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Ragged rows: row r holds entries offsets[r] to offsets[r + 1].

  Entry i is record `records[i]` of data set `datasets[i]`, in row order.
  """

  offsets: Int64[np.ndarray, " rows_plus_1"]
  datasets: Int32[np.ndarray, " N"]
  records: Int32[np.ndarray, " N"]

  @property
  def num_rows(self) -> int:
    return len(self.offsets) - 1

  def row(self, index: int) -> list[tuple[int, int]]:
    """(data set, record) of each segment of a row, in order."""
    if not 0 <= index < self.num_rows:
      raise IndexError(f"row {index} of a plan of {self.num_rows} rows")
    span = slice(self.offsets[index], self.offsets[index + 1])
    return list(
      zip(
        self.datasets[span].tolist(), self.records[span].tolist(), strict=True
      )
    )


def plan_rows(
  lengths: Sequence[Int[np.ndarray, " _"]],
  image_counts: Sequence[Int[np.ndarray, " _"]],
  weights: Sequence[float | int],
  *,
  seed: int,
  num_rows: int,
  max_length: int,
  max_images: int,
  max_segments: int,
  window: int = WINDOW,
) -> Plan:
  """Plans `num_rows` rows of packed records.

  Records are drawn so that the share of each data set keeps to its weight at
  every point (within one record, not by chance); each data set is shuffled
  anew each time it has been gone through. `window` drawn records at a time
  are packed by best-fit decreasing, and the rows of a window are shuffled. A
  longer plan begins with the shorter one.

  Args:
    lengths: for each data set, tokens of each record, images expanded.
    image_counts: for each data set, images of each record.
    weights: share of the drawn records (not tokens) of each data set; any
      positive scale.
    seed: of the shuffles.
    num_rows: rows to plan.
    max_length: tokens a row holds.
    max_images: images a row holds.
    max_segments: records a row holds.
    window: records drawn before they are packed; a larger window pads less.

  Raises:
    ValueError: for an empty data set, a bad weight or limit, or a record that
      fits in no row.
  """
  shares = _check(
    lengths, image_counts, weights, max_length, max_images, max_segments
  )
  if window < 1 or num_rows < 0:
    raise ValueError(
      f"window={window}, num_rows={num_rows}; wanted at least 1 and 0."
    )
  streams = [
    _Stream(len(length), (seed, _SHUFFLE_RECORDS, index))
    for index, length in enumerate(lengths)
  ]
  rows: list[list[tuple[int, int]]] = []
  drawn = 0
  while len(rows) < num_rows:
    number = drawn // window
    pool = []
    for index, share in enumerate(shares):
      # Rounding the running total, not the window's, keeps the share exact.
      start = math.floor(drawn * share + 0.5)
      stop = math.floor((drawn + window) * share + 0.5)
      picked = streams[index].take(start, stop)
      pool += zip(
        lengths[index][picked].tolist(),
        image_counts[index][picked].tolist(),
        [index] * len(picked),
        picked.tolist(),
        strict=True,
      )
    packed = _pack(pool, max_length, max_images, max_segments)
    order = _permutation(len(packed), (seed, _SHUFFLE_ROWS, number))
    rows += [packed[i] for i in order]
    drawn += window
  del rows[num_rows:]
  counts = np.array([len(row) for row in rows], np.int64)
  entries = [entry for row in rows for entry in row]
  flat = np.array(entries, np.int32).reshape(-1, 2)
  return Plan(
    offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    datasets=np.ascontiguousarray(flat[:, 0]),
    records=np.ascontiguousarray(flat[:, 1]),
  )


def padding_share(
  plan: Plan, lengths: Sequence[Int[np.ndarray, " _"]], max_length: int
) -> float:
  """Share of the plan's tokens that are padding, 0 to 1."""
  if plan.num_rows == 0:
    return 0.0
  used = sum(
    int(length[plan.records[plan.datasets == index]].sum())
    for index, length in enumerate(lengths)
  )
  return 1 - used / (plan.num_rows * max_length)


class _Stream:
  """A data set's records without end: shuffled, then shuffled anew."""

  def __init__(self, size: int, key: tuple[int, ...]):
    self._size = size
    self._key = key
    self._epoch = -1
    self._order = np.empty(0, np.int64)

  def take(self, start: int, stop: int) -> Int64[np.ndarray, " _"]:
    """Records of draws start to stop."""
    parts = [np.empty(0, np.int64)]
    while start < stop:
      epoch, first = divmod(start, self._size)
      if epoch != self._epoch:
        self._order = _permutation(self._size, (*self._key, epoch))
        self._epoch = epoch
      parts.append(self._order[first : first + stop - start])
      start += len(parts[-1])
    return np.concatenate(parts)


def _permutation(size: int, key: tuple[int, ...]) -> Int64[np.ndarray, " _"]:
  bits = np.random.Philox(np.random.SeedSequence(key))
  return np.argsort(bits.random_raw(size), kind="stable")


def _pack(
  pool: Sequence[tuple[int, int, int, int]],
  max_length: int,
  max_images: int,
  max_segments: int,
) -> list[list[tuple[int, int]]]:
  """Best-fit decreasing over (length, images, data set, record).

  Each record, longest first, goes to the fullest row that still takes it.
  """
  rows: list[list[tuple[int, int]]] = []
  images_left: list[int] = []
  free: list[tuple[int, int]] = []  # (tokens left, row), sorted; open rows.
  for length, images, dataset, record in sorted(
    pool, key=lambda entry: entry[0], reverse=True
  ):
    place = bisect.bisect_left(free, (length, -1))
    while place < len(free) and images_left[free[place][1]] < images:
      place += 1
    if place < len(free):
      left, row = free.pop(place)
    else:
      left, row = max_length, len(rows)
      rows.append([])
      images_left.append(max_images)
    rows[row].append((dataset, record))
    images_left[row] -= images
    if left > length and len(rows[row]) < max_segments:
      bisect.insort(free, (left - length, row))
  return rows


def _check(
  lengths: Sequence[Int[np.ndarray, " _"]],
  image_counts: Sequence[Int[np.ndarray, " _"]],
  weights: Sequence[float | int],
  max_length: int,
  max_images: int,
  max_segments: int,
) -> list[float]:
  """Weights as shares that add up to 1, once everything is in order."""
  if not len(lengths) == len(image_counts) == len(weights) > 0:
    raise ValueError(
      f"{len(lengths)} data sets, {len(image_counts)} image counts, "
      f"{len(weights)} weights; wanted one of each for every data set."
    )
  if max_segments < 1:
    raise ValueError(f"max_segments={max_segments}; wanted at least 1.")
  for index, (length, images) in enumerate(
    zip(lengths, image_counts, strict=True)
  ):
    if len(length) == 0 or len(length) != len(images):
      raise ValueError(
        f"data set {index} has {len(length)} lengths and {len(images)} image "
        "counts; wanted equally many and at least one record."
      )
    if not np.isfinite(weights[index]) or weights[index] <= 0:
      raise ValueError(
        f"weight {weights[index]} of data set {index}; wanted a positive "
        "number. Leave a data set out to give it none."
      )
    bad = np.flatnonzero(
      (length < 1) | (length > max_length) | (images > max_images)
    )
    if len(bad):
      raise ValueError(
        f"data set {index}, record {bad[0]}: {length[bad[0]]} tokens and "
        f"{images[bad[0]]} images fit in no row of max_length={max_length}, "
        f"max_images={max_images}."
      )
  total = float(sum(weights))
  return [float(weight) / total for weight in weights]
