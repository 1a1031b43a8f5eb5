"""Samples as they go into a batch: encoded, their pictures decoded."""

import collections
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from mole_jax.data import conversation, features, images, schedule
from mole_jax.data.mixture import Dataset

CACHE_BYTES = 256 * 2**20  # Samples kept by each process.


class Ready(NamedTuple):
  """A sample; of one that failed no token has a label.

  pictures: uint8[M,H,W,3], black if it failed; or what a tower makes of them,
    [M,P,D].
  """

  input_ids: Int32[np.ndarray, " T"]
  labels: Int32[np.ndarray, " T"]
  pictures: Shaped[np.ndarray, "M ..."]
  is_failed: bool = False

  @property
  def nbytes(self) -> int:
    return self.input_ids.nbytes + self.labels.nbytes + self.pictures.nbytes


class Samples:
  """Ready samples by data set and record; pickled into each worker.

  Args:
    datasets: of the mixture.
    preparation: size of the images and how they get it.
    pad_id: token id of padding.
    stores: of each data set, for features in place of pixels; all of one
      tower.
  """

  def __init__(
    self,
    datasets: Sequence[Dataset],
    preparation: images.Preparation,
    pad_id: int,
    stores: Sequence[features.Store] | None = None,
  ):
    self.datasets = datasets
    self.preparation = preparation
    self._pad_id = pad_id
    self._stores = stores
    self._cache = _Cache(CACHE_BYTES)

  @property
  def key(self) -> str:
    """What pictures are called in a batch."""
    return "images" if self._stores is None else "features"

  def empty(self, *axes: int) -> Shaped[np.ndarray, "*_"]:
    """Slots without a picture."""
    if self._stores is None:
      size = self.preparation.image_size
      return np.zeros((*axes, size, size, 3), np.uint8)
    tower = self._stores[0].tower
    return np.zeros((*axes, *tower.shape), tower.stored)

  def get(self, entry: schedule.Entry) -> Ready:
    """A sample; a bad one is masked, not raised."""
    ready = self._cache.get(entry)
    if ready is not None:
      return ready
    dataset = self.datasets[entry[0]]
    try:
      sample = dataset.sample(entry[1])
    except ValueError:
      # No position refers to a picture, so there must be none.
      ids = np.full(dataset.lengths[entry[1]], self._pad_id, np.int32)
      return Ready(ids, _without_labels(ids), self.empty(0), is_failed=True)
    pictures = self._pictures(entry, sample.images)
    if pictures is None:
      count = len(sample.images)
      blank = (
        self.empty(count)
        if self._stores is None
        else self._stores[entry[0]].black(count)
      )
      labels = _without_labels(sample.labels)
      return Ready(sample.input_ids, labels, blank, is_failed=True)
    ready = Ready(sample.input_ids, sample.labels, pictures)
    self._cache.put(entry, ready)
    return ready

  def explain(self, entry: schedule.Entry) -> str:
    """What is wrong with a record that failed."""
    try:
      self._decode(self.datasets[entry[0]].sample(entry[1]).images)
    except ValueError as error:
      return str(error)
    return "it could not be read then, but can be now"

  def _pictures(
    self, entry: schedule.Entry, encoded: Sequence[bytes]
  ) -> Shaped[np.ndarray, "M ..."] | None:
    """None if one is broken."""
    if self._stores is not None:
      place = self.datasets[entry[0]].place(entry[1])
      return self._stores[entry[0]].read(place, len(encoded))
    try:
      return self._decode(encoded)
    except ValueError:
      return None

  def _decode(self, encoded: Sequence[bytes]) -> Shaped[np.ndarray, "M H W 3"]:
    """ValueError says what is wrong with one."""
    decode = lambda data: images.decode_image(data, self.preparation)
    size = self.preparation.image_size
    none = np.empty((0, size, size, 3), np.uint8)
    return np.stack(list(map(decode, encoded))) if encoded else none


def _without_labels(ids: Int32[np.ndarray, " T"]) -> Int32[np.ndarray, " T"]:
  return np.full(ids.shape, conversation.IGNORE_LABEL, np.int32)


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
