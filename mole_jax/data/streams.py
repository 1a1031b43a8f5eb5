"""What each window draws from each data set, and how epochs are shuffled."""

import collections
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

# Of the shortest quantiles of a window, this many may be missing: that is how
# far the draws of one data set differ between windows.
NUM_OPTIONAL = 5
_SHUFFLE_RECORDS = 0
_CACHED_EPOCHS = 2  # A window may end one epoch and begin the next.


class Shares:
  """How many draws each data set has had: exact at every point.

  The draws are split between two groups of data sets of about equal weight,
  rounded, and so on down to single ones. After any number of draws each data
  set has had its share, to a draw or so, and all together have had exactly
  that number; none is ever given back.
  """

  def __init__(self, shares: Sequence[float], draws_per_window: int):
    self.shares = tuple(shares)
    self.draws_per_window = draws_per_window

  def drawn(self, num_draws: int) -> list[int]:
    """Draws of each data set among the first `num_draws`."""
    counts = [0] * len(self.shares)
    by_share = sorted(
      range(len(counts)), key=lambda index: (-self.shares[index], index)
    )
    groups = [(by_share, num_draws)]
    while groups:
      group, count = groups.pop()
      if len(group) == 1:
        counts[group[0]] = count
        continue
      total = sum(self.shares[index] for index in group)
      part = self.shares[group[0]]
      cut = 1
      while (
        cut < len(group) - 1 and part + self.shares[group[cut]] <= total / 2
      ):
        part += self.shares[group[cut]]
        cut += 1
      first = math.floor(count * (part / total) + 0.5)
      groups += [(group[:cut], first), (group[cut:], count - first)]
    return counts

  def start(self, index: int, window: int) -> int:
    """Draws of a data set before a window."""
    return self.drawn(window * self.draws_per_window)[index]

  def mean(self, index: int) -> float:
    """Draws of a data set in a window, on average."""
    return self.shares[index] * self.draws_per_window


class Stream:
  """A data set's records without end: shuffled, then shuffled anew.

  Every epoch holds each record once. A window gets at most one record of each
  of `num_quantiles` quantiles of (images, length), so one window is much like
  another. Which record that is, is random.

  Args:
    lengths: tokens of each record.
    image_counts: images of each record.
    shares: what each window draws.
    index: of this data set in `shares`.
    seed: of the shuffles.
  """

  def __init__(
    self,
    lengths: Int[np.ndarray, " N"],
    image_counts: Int[np.ndarray, " N"],
    shares: Shares,
    index: int,
    seed: int,
  ):
    self._shares = shares
    self._index = index
    self._seed = seed
    self._sorted = np.lexsort((lengths, image_counts)).astype(np.int32)
    self._lengths = np.asarray(lengths)[self._sorted]
    self._image_counts = np.asarray(image_counts)[self._sorted]
    steps = np.diff(self._lengths) | np.diff(self._image_counts)
    self._classes = np.concatenate([[0], np.cumsum(steps != 0)])
    # A window draws its mean number, to two more or less.
    self.num_quantiles = math.ceil(shares.mean(index)) + 2
    self._epochs: collections.OrderedDict[int, np.ndarray] = (
      collections.OrderedDict()
    )

  def __getstate__(self) -> dict[str, object]:
    return {**self.__dict__, "_epochs": collections.OrderedDict()}

  def window(
    self, number: int
  ) -> tuple[Int64[np.ndarray, " W"], Int64[np.ndarray, " W"]]:
    """Records of a window and the quantile of each, 0 the shortest."""
    start, stop = self._span(number)
    size = len(self._sorted)
    parts = [np.empty(0, np.int64)]
    for epoch in range(start // size, -(-stop // size)):
      first = max(start, epoch * size) - epoch * size
      last = min(stop, (epoch + 1) * size) - epoch * size
      parts.append(self._epoch(epoch)[first:last])
    return np.concatenate(parts), self._quantiles(start, stop)

  def largest(self) -> tuple[Int64[np.ndarray, " Q"], Int64[np.ndarray, " Q"]]:
    """Most tokens and most images that each quantile can bring.

    Counted from the longest record, of which every window has one: quantile q
    holds a window's share of the epoch for each quantile above it.
    """
    size = len(self._sorted)
    windows_per_epoch = size / self._shares.mean(self._index)
    above = self.num_quantiles - np.arange(self.num_quantiles)
    # The bounds move from epoch to epoch, by less than one record upwards and
    # three downwards in 28,000 random mixtures; whoever packs checks it.
    low = np.floor(size - above * windows_per_epoch) - 3
    high = np.ceil(size - (above - 1) * windows_per_epoch)
    low, high = (np.clip(each, 0, size - 1).astype(int) for each in (low, high))
    images = self._image_counts[high]
    lengths = self._lengths[high].copy()
    # Sorted by images first: the longest may stand where their number changes.
    for last in np.flatnonzero(np.diff(self._image_counts)):
      within = (low <= last) & (last < high)
      lengths[within] = np.maximum(lengths[within], self._lengths[last])
    return lengths.astype(np.int64), images.astype(np.int64)

  def _span(self, window: int) -> tuple[int, int]:
    """Draws of this data set, counted through the run, that a window has."""
    return (
      self._shares.start(self._index, window),
      self._shares.start(self._index, window + 1),
    )

  def _quantiles(self, start: int, stop: int) -> Int64[np.ndarray, " W"]:
    """Quantiles of a window's draws: each of the upper ones once.

    Where an epoch ends within the window, both epochs get quantiles that are
    spread evenly.
    """
    draws, size = np.arange(start, stop), len(self._sorted)
    epochs = draws // size
    firsts = np.maximum(epochs * size, start)
    lasts = np.minimum((epochs + 1) * size, stop)
    place = (draws - firsts + 0.5) / (lasts - firsts)
    result = np.empty(len(draws), np.int64)
    result[np.argsort(place, kind="stable")] = np.arange(len(draws))
    return result + self.num_quantiles - len(draws)

  def _epoch(self, epoch: int) -> Int64[np.ndarray, " N"]:
    """The order of an epoch's records."""
    if epoch not in self._epochs:
      self._epochs[epoch] = self._shuffled(epoch)
      if len(self._epochs) > _CACHED_EPOCHS:
        self._epochs.popitem(last=False)
    return self._epochs[epoch]

  def _shuffled(self, epoch: int) -> Int64[np.ndarray, " N"]:
    """Deals the sorted records to the draws of an epoch, by quantile."""
    size = len(self._sorted)
    begin, end = epoch * size, (epoch + 1) * size
    window = self._window_of(begin)
    parts = []
    while True:
      start, stop = self._span(window)
      part = slice(max(begin - start, 0), min(end, stop) - start)
      parts.append(self._quantiles(start, stop)[part])
      if stop >= end:
        break
      window += 1
    quantiles = np.concatenate(parts)
    key = (self._seed, _SHUFFLE_RECORDS, self._index, epoch)
    bits = random_bits(2 * size, key)
    # Records that are alike go to any of the quantiles that such ones go to.
    ranked = self._sorted[_shuffle_within(self._classes, bits[:size])]
    order = np.empty(size, np.int64)
    order[_shuffle_within(quantiles, bits[size:])] = ranked
    return order

  def _window_of(self, draw: int) -> int:
    """The window that has a draw of this data set."""
    window = max(0, int(draw / self._shares.mean(self._index)) - 2)
    while self._span(window)[1] <= draw:
      window += 1
    return window


def _shuffle_within(
  groups: Int[np.ndarray, " N"], bits: np.ndarray
) -> Int64[np.ndarray, " N"]:
  """Indices that sort by group, at random within one."""
  # One key sorts faster than two.
  keys = (groups.astype(np.uint64) << np.uint64(40)) | (bits >> np.uint64(24))
  return np.argsort(keys, kind="stable")


def random_bits(size: int, key: tuple[int, ...]) -> np.ndarray:
  """uint64[size], the same in every version of NumPy."""
  return np.random.Philox(np.random.SeedSequence(key)).random_raw(size)


def permutation(size: int, key: tuple[int, ...]) -> Int64[np.ndarray, " _"]:
  """A random order of range(size) that belongs to a key."""
  return np.argsort(random_bits(size, key), kind="stable")
