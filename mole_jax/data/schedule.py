"""Which records stand in which row, as a function of seed and row alone.

A run is cut into windows of equally many draws and equally many rows, so that
any row of any window is found without the ones before it. That takes three
ideas:

1. The draws of a window are shared out exactly (`Shares`).
2. Each data set is gone through in epochs, shuffled anew, but so that every
   window gets one record of each quantile of the lengths (`Stream`). Windows
   then differ little in what they hold, however it is shuffled.
3. Rows are packed once, for the longest record that a quantile can bring
   (`Packed`). What a window brings fits, by construction.

Only raw Philox output and stable sorts are used, whose values NumPy keeps from
version to version.
"""

import bisect
import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from mole_jax.data import streams
from mole_jax.data.streams import Shares, Stream

VERSION = 2  # Of what (seed, row) means; a run's data are tied to it.
WINDOW_ROWS = 256  # About as many rows are planned together.
_SHUFFLE_ROWS, _SHUFFLE_SLOTS, _SHUFFLE_TIES = 1, 2, 3
_CACHED_WINDOWS = 4

# (data set, record of it).
Entry = tuple[int, int]
Lengths = Sequence[Int[np.ndarray, " _"]]


class Schedule:
  """Rows without end, planned by window; the last few windows are kept."""

  rows_per_window: int
  draws_per_window: int

  def __init__(self, lengths: Lengths, image_counts: Lengths, seed: int):
    self._lengths, self._image_counts = lengths, image_counts
    self._seed = seed
    self._cache: collections.OrderedDict[int, list[list[Entry]]] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, object]:
    return {**self.__dict__, "_cache": collections.OrderedDict(), "_lock": None}

  def __setstate__(self, state: dict[str, object]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def row(self, index: int) -> list[Entry]:
    """The records of a row, in order."""
    if index < 0:
      raise IndexError(f"row {index}; rows are counted from 0")
    number, place = divmod(index, self.rows_per_window)
    with self._lock:
      if number not in self._cache:
        self._cache[number] = self._make(number)
        if len(self._cache) > _CACHED_WINDOWS:
          self._cache.popitem(last=False)
      return self._cache[number][place]

  def _open_streams(self, shares: Sequence[float]) -> list[Stream]:
    """What each data set brings, once `draws_per_window` is known."""
    split = Shares(shares, self.draws_per_window)
    return [
      Stream(length, images, split, index, self._seed)
      for index, (length, images) in enumerate(
        zip(self._lengths, self._image_counts, strict=True)
      )
    ]

  def _make(self, number: int) -> list[list[Entry]]:
    raise NotImplementedError


class Packed(Schedule):
  """Rows that hold as many records as fit.

  Args:
    lengths: for each data set, tokens of each record, images expanded.
    image_counts: for each data set, images of each record.
    weights: share of the drawn records (not tokens) of each data set; any
      positive scale.
    seed: of the shuffles.
    max_length: tokens a row holds.
    max_images: images a row holds.
    max_segments: records a row holds.
    window_rows: about how many rows make a window.

  Raises:
    ValueError: for an empty data set, a bad weight or limit, or a record that
      fits in no row.
  """

  def __init__(
    self,
    lengths: Lengths,
    image_counts: Lengths,
    weights: Sequence[float | int],
    *,
    seed: int,
    max_length: int,
    max_images: int,
    max_segments: int,
    window_rows: int = WINDOW_ROWS,
  ):
    super().__init__(lengths, image_counts, seed)
    shares = _check(
      lengths, image_counts, weights, max_length, max_images, max_segments
    )
    if window_rows < 1:
      raise ValueError(f"window_rows={window_rows}; wanted at least 1.")
    self._max_length, self._max_images = max_length, max_images
    mean = lambda values: sum(
      share * float(np.mean(each))
      for share, each in zip(shares, values, strict=True)
    )
    records_per_row = min(
      max_length / mean(lengths),
      max_images / mean(image_counts) if mean(image_counts) else math.inf,
      max_segments,
    )
    self.draws_per_window = max(1, int(window_rows * records_per_row))
    self._streams = self._open_streams(shares)
    self._pattern(max_segments)

  def _pattern(self, max_segments: int) -> None:
    """Packs what a window can bring at most; rows stay so for the run.

    Of the shortest quantiles of a data set not every window brings one, but
    every window brings equally many of these in all: they share slots.
    """
    slots: list[tuple[int, int, int]] = []  # (length, images, its number).
    self._first_slot: list[int] = []
    num_shared = self.draws_per_window
    shared = (1, 0)
    for stream in self._streams:
      lengths, images = stream.largest()
      fixed = slice(min(streams.NUM_OPTIONAL, stream.num_quantiles), None)
      self._first_slot.append(len(slots))
      slots += [
        (length, count, len(slots) + i)
        for i, (length, count) in enumerate(
          zip(lengths[fixed].tolist(), images[fixed].tolist(), strict=True)
        )
      ]
      num_shared -= len(lengths[fixed])
      low = slice(0, fixed.start)
      shared = (
        max(shared[0], int(lengths[low].max())),
        max(shared[1], int(images[low].max())),
      )
    self._first_shared = len(slots)
    slots += [(*shared, self._first_shared + i) for i in range(num_shared)]
    # Else records of one length would keep to those of their own data set.
    order = streams.permutation(len(slots), (self._seed, _SHUFFLE_SLOTS))
    rows = _pack(
      [slots[i] for i in order],
      self._max_length,
      self._max_images,
      max_segments,
    )
    self.rows_per_window = len(rows)
    self._row_of_slot = np.empty(len(slots), np.int64)
    for number, row in enumerate(rows):
      self._row_of_slot[row] = number

  def _make(self, number: int) -> list[list[Entry]]:
    order = streams.permutation(
      self.rows_per_window, (self._seed, _SHUFFLE_ROWS, number)
    )
    rows: list[list[Entry]] = [[] for _ in order]
    tokens, images = np.zeros((2, len(order)), np.int64)
    next_shared = self._first_shared
    for index, stream in enumerate(self._streams):
      records, quantiles = stream.window(number)
      slots = quantiles - streams.NUM_OPTIONAL + self._first_slot[index]
      optional = np.flatnonzero(quantiles < streams.NUM_OPTIONAL)
      slots[optional] = next_shared + np.arange(len(optional))
      next_shared += len(optional)
      places = order[self._row_of_slot[slots]]
      np.add.at(tokens, places, self._lengths[index][records])
      np.add.at(images, places, self._image_counts[index][records])
      for row, record in zip(places.tolist(), records.tolist(), strict=True):
        rows[row].append((index, record))
    if tokens.max() > self._max_length or images.max() > self._max_images:
      raise AssertionError(
        f"window {number} of seed {self._seed}: {tokens.max()} tokens or "
        f"{images.max()} images in a row; the bounds of quantiles are wrong."
      )
    return rows


class Grouped(Schedule):
  """Rows of one record; a batch has rows of about equal length.

  A batch is with images throughout or without, but for at most one in a
  window. haotian-liu/LLaVA's group_by_modality_length, as a function of the
  row. Arguments as for `Packed`; `batch_size` rows make a batch.
  """

  def __init__(
    self,
    lengths: Lengths,
    image_counts: Lengths,
    weights: Sequence[float | int],
    *,
    seed: int,
    batch_size: int,
    max_length: int,
    max_images: int,
    window_rows: int = WINDOW_ROWS,
  ):
    super().__init__(lengths, image_counts, seed)
    shares = _check(lengths, image_counts, weights, max_length, max_images, 1)
    if batch_size < 1 or window_rows < 1:
      raise ValueError(
        f"batch_size={batch_size}, window_rows={window_rows}; wanted at least "
        "1 of each."
      )
    self._batch_size = batch_size
    # The draws of a window fill batches, and enough of them to choose from.
    num_batches = max(16, -(-window_rows // batch_size))
    self.draws_per_window = self.rows_per_window = num_batches * batch_size
    self._streams = self._open_streams(shares)

  def _make(self, number: int) -> list[list[Entry]]:
    drawn: list[tuple[int, int, int]] = []  # (length, data set, record).
    with_images: list[bool] = []
    for index, stream in enumerate(self._streams):
      records, _ = stream.window(number)
      lengths = self._lengths[index][records].tolist()
      drawn += zip(
        lengths, [index] * len(records), records.tolist(), strict=True
      )
      with_images += (self._image_counts[index][records] > 0).tolist()
    order = streams.permutation(
      len(drawn), (self._seed, _SHUFFLE_TIES, number)
    ).tolist()
    size = self._batch_size
    batches, rest = [], []
    for wanted in (True, False):
      group = sorted(
        (drawn[i] for i in order if with_images[i] is wanted),
        key=lambda entry: entry[0],
        reverse=True,
      )
      whole = len(group) - len(group) % size
      # The shortest ones are left over, so a mixed batch is a short one.
      batches += [group[i : i + size] for i in range(0, whole, size)]
      rest += group[whole:]
    batches += [rest[i : i + size] for i in range(0, len(rest), size)]
    shuffled = streams.permutation(
      len(batches), (self._seed, _SHUFFLE_ROWS, number)
    )
    return [
      [(dataset, record)] for i in shuffled for _, dataset, record in batches[i]
    ]


@dataclasses.dataclass(frozen=True)
class Padding:
  """Share of tokens that are padding, 0 to 1, over the first `num_rows`."""

  share: float
  num_rows: int


def measure_padding(
  schedule: Schedule,
  lengths: Lengths,
  row_length: Callable[[Sequence[Sequence[Entry]]], int],
  num_rows: int,
  *,
  batch_size: int = 1,
  max_windows: int = 8,
) -> Padding:
  """Counts the padding of a run's rows, or of its first windows.

  One window is much like another. `row_length` tells how many tokens each row
  of a batch gets.
  """
  num_rows = min(num_rows, max_windows * schedule.rows_per_window)
  num_rows -= num_rows % batch_size
  used = total = 0
  for first in range(0, num_rows, batch_size):
    rows = [schedule.row(first + i) for i in range(batch_size)]
    total += batch_size * row_length(rows)
    used += sum(int(lengths[d][record]) for row in rows for d, record in row)
  return Padding(1 - used / total if total else 0.0, num_rows)


def _pack(
  slots: Sequence[tuple[int, int, int]],
  max_length: int,
  max_images: int,
  max_segments: int,
) -> list[list[int]]:
  """Best-fit decreasing over (length, images, number); numbers by row.

  Each slot, longest first, goes to the fullest row that still takes it.
  """
  rows: list[list[int]] = []
  images_left: list[int] = []
  free: list[tuple[int, int]] = []  # (tokens left, row), sorted; open rows.
  for length, images, number in sorted(
    slots, key=lambda slot: slot[0], reverse=True
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
    rows[row].append(number)
    images_left[row] -= images
    if left > length and len(rows[row]) < max_segments:
      bisect.insort(free, (left - length, row))
  return rows


def _check(
  lengths: Lengths,
  image_counts: Lengths,
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
