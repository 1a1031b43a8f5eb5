"""A step's rows to a batch: samples encoded, images decoded, all put in place.

Works in whatever thread or process is asked, with the same result.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from mole_jax.data import conversation, features, images, schedule
from mole_jax.data.mixture import Dataset

CACHE_BYTES = 256 * 2**20  # Samples ready for a batch, kept by each process.
# A batch of short rows is cut to a multiple of this share of the longest.
NUM_LENGTHS = 8

Batch = dict[str, np.ndarray]


class Ready(NamedTuple):
  """A sample as it goes into a batch; without pictures if it failed.

  These are pixels uint8[M,H,W,3], or features[M,P,D] of a frozen tower.
  `num_slots` images stand in its ids; they take their places in the row.
  """

  input_ids: Int32[np.ndarray, " T"]
  labels: Int32[np.ndarray, " T"]
  pictures: np.ndarray | None
  num_slots: int

  @property
  def nbytes(self) -> int:
    pictures = 0 if self.pictures is None else self.pictures.nbytes
    return self.input_ids.nbytes + self.labels.nbytes + pictures


@dataclasses.dataclass
class Assembler:
  """step -> this host's batch; pickled into each worker."""

  datasets: Sequence[Dataset]
  plan: schedule.Schedule
  _: dataclasses.KW_ONLY
  batch_size: int
  num_rows: int
  process_index: int
  max_length: int
  max_images: int
  max_segments: int
  is_cut: bool
  preparation: images.Preparation
  pad_id: int
  stores: Sequence[features.Store] | None

  def __post_init__(self):
    self._cache = _Cache(CACHE_BYTES)

  def first_row(self, step: int) -> int:
    return step * self.batch_size + self.process_index * self.num_rows

  def row_length(self, rows: Sequence[Sequence[schedule.Entry]]) -> int:
    """Tokens of each row of a global batch."""
    if not self.is_cut:
      return self.max_length
    longest = _most([dataset.lengths for dataset in self.datasets], rows)
    unit = -(-self.max_length // NUM_LENGTHS)
    return min(self.max_length, -(-longest // unit) * unit)

  def row_images(self, rows: Sequence[Sequence[schedule.Entry]]) -> int:
    """Images of each row of a global batch: 1, 2, 4, ... up to the most."""
    if not self.is_cut:
      return self.max_images
    most = _most([dataset.image_counts for dataset in self.datasets], rows)
    return min(self.max_images, 1 << max(0, most - 1).bit_length())

  def __call__(self, step: int) -> Batch:
    step = int(step)
    b = self.num_rows
    # All hosts need the same shape, so all look at all rows.
    first = step * self.batch_size if self.is_cut else self.first_row(step)
    count = self.batch_size if self.is_cut else b
    rows = [self.plan.row(first + i) for i in range(count)]
    t, m = self.row_length(rows), self.row_images(rows)
    offset = self.first_row(step) - first
    key, shape, dtype = self._picture
    batch = {
      "input_ids": np.full((b, t), self.pad_id, np.int32),
      "labels": np.full((b, t), conversation.IGNORE_LABEL, np.int32),
      "positions": np.zeros((b, t), np.int32),
      "segment_ids": np.zeros((b, t), np.int32),
      key: np.zeros((b, m, *shape), dtype),
      "domains": np.full((b, self.max_segments), -1, np.int32),
      "failed": np.zeros((b, self.max_segments), bool),
    }
    for row, entries in enumerate(rows[offset : offset + b]):
      start = slot = 0
      for segment, entry in enumerate(entries):
        dataset = self.datasets[entry[0]]
        ids, labels, pictures, num_slots = self._ready(entry)
        span = slice(start, start + len(ids))
        batch["input_ids"][row, span] = ids
        batch["positions"][row, span] = np.arange(len(ids))
        batch["segment_ids"][row, span] = segment + 1
        batch["domains"][row, segment] = dataset.domains[entry[1]]
        if pictures is None:
          batch["failed"][row, segment] = True
        else:
          batch["labels"][row, span] = labels
          batch[key][row, slot : slot + len(pictures)] = pictures
        start += len(ids)
        slot += num_slots
    return batch

  def explain(self, entry: schedule.Entry) -> str:
    """What is wrong with a record that failed."""
    try:
      self._pixels(self.datasets[entry[0]].sample(entry[1]).images)
    except ValueError as error:
      return str(error)
    return "it could not be read then, but can be now"

  def _ready(self, entry: schedule.Entry) -> Ready:
    """A sample as it goes into a batch; a bad one is masked, not raised."""
    ready = self._cache.get(entry)
    if ready is not None:
      return ready
    dataset = self.datasets[entry[0]]
    try:
      sample = dataset.sample(entry[1])
    except ValueError:
      ids = np.full(dataset.lengths[entry[1]], self.pad_id, np.int32)
      return Ready(ids, ids, None, 0)
    count = len(sample.images)
    try:
      if self.stores is None:
        pictures = self._pixels(sample.images)
      else:
        store = self.stores[entry[0]]
        pictures = store.read(dataset.place(entry[1]), count)
    except ValueError:
      return Ready(sample.input_ids, sample.labels, None, count)
    ready = Ready(sample.input_ids, sample.labels, pictures, count)
    self._cache.put(entry, ready)
    return ready

  @property
  def _picture(self) -> tuple[str, tuple[int, ...], Any]:
    """What a batch calls its pictures, with the shape and type of one."""
    if self.stores is None:
      size = self.preparation.image_size
      return "images", (size, size, 3), np.uint8
    return "features", self.stores[0].shape, self.stores[0].dtype

  def _pixels(self, encoded: Sequence[bytes]) -> np.ndarray:
    """Decoded images; ValueError says what is wrong with one."""
    if not encoded:
      _, shape, dtype = self._picture
      return np.empty((0, *shape), dtype)
    return np.stack(
      [images.decode_image(data, self.preparation) for data in encoded]
    )


def _most(
  values: Sequence[Int32[np.ndarray, " _"]],
  rows: Sequence[Sequence[schedule.Entry]],
) -> int:
  """The largest sum over a row of what its records have."""
  return max(sum(int(values[d][record]) for d, record in row) for row in rows)


class _Cache:
  """Samples by record, the longest unused dropped first."""

  def __init__(self, max_bytes: int):
    self._max_bytes = max_bytes
    self._num_bytes = 0
    self._entries: collections.OrderedDict[schedule.Entry, Ready] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def __reduce__(self):
    return _Cache, (self._max_bytes,)  # A worker starts with its own.

  def get(self, key: schedule.Entry) -> Ready | None:
    with self._lock:
      if key in self._entries:
        self._entries.move_to_end(key)
      return self._entries.get(key)

  def put(self, key: schedule.Entry, value: Ready):
    with self._lock:
      if key in self._entries:  # Another thread was faster.
        return
      self._entries[key] = value
      self._num_bytes += value.nbytes
      while self._num_bytes > self._max_bytes:
        _, dropped = self._entries.popitem(last=False)
        self._num_bytes -= dropped.nbytes
