"""Encoded data sets to batches: plan the run, then batch = f(step).

Nothing here keeps a position: the batch of a step depends on the seed and the
step alone, whatever the number of hosts, workers and threads.
"""

import collections
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from jaxtyping import UInt8

from mole_jax.data import conversation, images, schedule
from mole_jax.data.mixture import Dataset

_CACHE_BYTES = 256 * 2**20  # Decoded images kept by each process.

Batch = dict[str, np.ndarray]


class Loader:
  """The batches of a run: iterate from any step, or ask for one by number.

  A batch holds NumPy arrays of fixed shape (B rows of this host, T tokens, M
  images, S segments): input_ids, labels, positions, segment_ids int32[B,T];
  images uint8[B,M,H,W,3]; domains int32[B,S]; num_failed int32[], segments
  of this batch whose image could not be read. Those carry no label and a
  black image.
  """

  plan: schedule.Plan
  num_steps: int
  padding_share: float  # Share of the whole plan's tokens, 0 to 1.

  def __init__(
    self,
    datasets: Sequence[Dataset],
    plan: schedule.Plan,
    assembler: "_Assembler",
    *,
    max_length: int,
    num_steps: int,
    num_workers: int,
    num_threads: int,
  ):
    self.plan = plan
    self.num_steps = num_steps
    self.padding_share = schedule.padding_share(
      plan, [dataset.lengths for dataset in datasets], max_length
    )
    self._datasets = datasets
    self._assembler = assembler
    self._num_workers = num_workers
    self._num_threads = num_threads
    self._failed: set[tuple[int, int]] = set()

  def batch(self, step: int) -> Batch:
    """The batch of one step, made here and now."""
    if not 0 <= step < self.num_steps:
      raise ValueError(f"step {step} of a plan of {self.num_steps} steps.")
    return self._counted(step, self._assembler(step))

  def iterate(self, start_step: int = 0) -> Iterator[Batch]:
    """Batches from `start_step` to the end, prepared ahead.

    Seeking costs nothing. Close the generator (or exhaust it) to stop its
    threads and workers.
    """
    import grain  # It imports jax, which the rest of data/ does without.

    if not 0 <= start_step <= self.num_steps:
      raise ValueError(
        f"start_step={start_step} of a plan of {self.num_steps} steps."
      )
    if start_step == self.num_steps:
      return
    ahead = 2 * max(1, self._num_threads)
    batches = (
      grain.MapDataset.range(start_step, self.num_steps)
      .map(self._assembler)
      .to_iter_dataset(grain.ReadOptions(self._num_threads, ahead))
    )
    if self._num_workers:
      # Batches come through a pipe. In shared memory, grain's default, they
      # would outlive a killed parent, and vanish under whoever took an array
      # without a copy.
      batches = grain.experimental.WithOptionsIterDataset(
        batches, grain.experimental.DatasetOptions(min_shm_size=2**62)
      ).mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._num_workers, per_worker_buffer_size=2
        ),
        worker_init_fn=functools.partial(_end_with, os.getpid()),
      )
    iterator = iter(batches)
    try:
      for step, batch in enumerate(iterator, start_step):
        yield self._counted(step, batch)
    finally:
      iterator.close()

  def __iter__(self) -> Iterator[Batch]:
    return self.iterate()

  def accounting(self) -> dict[str, dict[str, object]]:
    """What became of the records of each data set so far, by its name.

    `failed` counts distinct records of this host's batches.
    """
    result = {}
    for index, dataset in enumerate(self._datasets):
      failed = sum(1 for which, _ in self._failed if which == index)
      result[dataset.name] = dataset.accounting(failed)
    return result

  def _counted(self, step: int, batch: Batch) -> Batch:
    """Moves the failures out of a batch and into the accounting.

    Here, not where images are decoded: that may be another process.
    """
    failed = batch.pop("failed")
    for row, segment in np.argwhere(failed):
      entries = self.plan.row(self._assembler.first_row(step) + int(row))
      self._failed.add(entries[segment])
    return {**batch, "num_failed": np.array(failed.sum(), np.int32)}


def make_loader(
  datasets: Sequence[Dataset],
  weights: Sequence[float | int],
  *,
  seed: int,
  num_steps: int,
  batch_size: int,
  max_length: int,
  max_images: int,
  max_segments: int,
  preparation: images.Preparation,
  pad_id: int,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 2,
) -> Loader:
  """Plans a run and makes its batches.

  Args:
    datasets: encoded data sets, in the order of `weights`.
    weights: share of the drawn records of each.
    seed: of shuffling; with the step it determines a batch.
    num_steps: steps of the run; a longer run begins with the same batches.
    batch_size: rows of the global batch; each host makes its contiguous
      share of them.
    max_length: tokens a row holds.
    max_images: images a row holds.
    max_segments: samples a row holds.
    preparation: size of the images and how they get it.
    pad_id: token id of padding.
    process_index: this host.
    process_count: hosts.
    num_workers: processes that prepare batches; 0 uses threads only.
    num_threads: threads in each process.

  Raises:
    ValueError: if the batch cannot be split, or the plan is impossible.
  """
  if batch_size % process_count or not 0 <= process_index < process_count:
    raise ValueError(
      f"batch_size={batch_size} for process {process_index} of "
      f"{process_count}; wanted a multiple of the number of processes."
    )
  if num_workers and not flags.FLAGS.is_parsed():
    raise ValueError(
      f"num_workers={num_workers} needs parsed absl flags: start through "
      "absl.app.run, call flags.FLAGS.mark_as_parsed(), or use num_workers=0."
    )
  plan = schedule.plan_rows(
    [dataset.lengths for dataset in datasets],
    [dataset.image_counts for dataset in datasets],
    weights,
    seed=seed,
    num_rows=num_steps * batch_size,
    max_length=max_length,
    max_images=max_images,
    max_segments=max_segments,
  )
  assembler = _Assembler(
    datasets,
    plan,
    batch_size=batch_size,
    num_rows=batch_size // process_count,
    process_index=process_index,
    max_length=max_length,
    max_images=max_images,
    max_segments=max_segments,
    preparation=preparation,
    pad_id=pad_id,
  )
  return Loader(
    datasets,
    plan,
    assembler,
    max_length=max_length,
    num_steps=num_steps,
    num_workers=num_workers,
    num_threads=num_threads,
  )


@dataclasses.dataclass
class _Assembler:
  """step -> this host's batch; pickled into each worker."""

  datasets: Sequence[Dataset]
  plan: schedule.Plan
  _: dataclasses.KW_ONLY
  batch_size: int
  num_rows: int
  process_index: int
  max_length: int
  max_images: int
  max_segments: int
  preparation: images.Preparation
  pad_id: int

  def __post_init__(self):
    self._cache = _ImageCache(_CACHE_BYTES)

  def first_row(self, step: int) -> int:
    return step * self.batch_size + self.process_index * self.num_rows

  def __call__(self, step: int) -> Batch:
    b, t, m = self.num_rows, self.max_length, self.max_images
    size = self.preparation.image_size
    batch = {
      "input_ids": np.full((b, t), self.pad_id, np.int32),
      "labels": np.full((b, t), conversation.IGNORE_LABEL, np.int32),
      "positions": np.zeros((b, t), np.int32),
      "segment_ids": np.zeros((b, t), np.int32),
      "images": np.zeros((b, m, size, size, 3), np.uint8),
      "domains": np.full((b, self.max_segments), -1, np.int32),
      "failed": np.zeros((b, self.max_segments), bool),
    }
    first = self.first_row(int(step))
    for row in range(b):
      start = slot = 0
      for segment, entry in enumerate(self.plan.row(first + row)):
        dataset = self.datasets[entry[0]]
        ids, labels = dataset.tokens(entry[1])
        span = slice(start, start + len(ids))
        batch["input_ids"][row, span] = ids
        batch["positions"][row, span] = np.arange(len(ids))
        batch["segment_ids"][row, span] = segment + 1
        batch["domains"][row, segment] = dataset.domains[entry[1]]
        pixels = self._pixels(entry)
        if pixels is None:
          batch["failed"][row, segment] = True
        else:
          batch["labels"][row, span] = labels
          batch["images"][row, slot : slot + len(pixels)] = pixels
        start += len(ids)
        slot += int(dataset.image_counts[entry[1]])
    return batch

  def _pixels(
    self, entry: tuple[int, int]
  ) -> UInt8[np.ndarray, "M H W 3"] | None:
    """Decoded images of a sample, None if one of them cannot be read."""
    dataset = self.datasets[entry[0]]
    count = int(dataset.image_counts[entry[1]])
    if not count:
      size = self.preparation.image_size
      return np.empty((0, size, size, 3), np.uint8)
    pixels = self._cache.get(entry)
    if pixels is None:
      try:
        pixels = np.stack(
          [
            images.decode_image(data, self.preparation)
            for data in dataset.encoded_images(entry[1])
          ]
        )
      except ValueError:
        return None
      self._cache.put(entry, pixels)
    return pixels


def _end_with(parent: int, worker_index: int, worker_count: int):
  """Lets a worker process end soon after its parent, however that ends."""
  del worker_index, worker_count

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # Nobody is left who could join this process.

  threading.Thread(target=watch, daemon=True).start()


class _ImageCache:
  """Decoded images by record, the longest unused dropped first."""

  def __init__(self, max_bytes: int):
    self._max_bytes = max_bytes
    self._num_bytes = 0
    self._entries: collections.OrderedDict[tuple[int, int], np.ndarray] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def __reduce__(self):
    return _ImageCache, (self._max_bytes,)  # A worker starts with its own.

  def get(self, key: tuple[int, int]) -> np.ndarray | None:
    with self._lock:
      if key in self._entries:
        self._entries.move_to_end(key)
      return self._entries.get(key)

  def put(self, key: tuple[int, int], value: np.ndarray):
    with self._lock:
      if key in self._entries:  # Another thread was faster.
        return
      self._entries[key] = value
      self._num_bytes += value.nbytes
      while self._num_bytes > self._max_bytes:
        _, dropped = self._entries.popitem(last=False)
        self._num_bytes -= dropped.nbytes
