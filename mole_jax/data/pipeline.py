"""Data sets to batches: plan the run, then batch = f(step).

Nothing here keeps a position: the batch of a step depends on the seed and the
step alone, whatever the number of hosts, workers and threads.
"""

import collections
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from mole_jax.data import features, images, ready, schedule, workers
from mole_jax.data.assembly import Assembler, Batch
from mole_jax.data.mixture import Dataset

BATCHINGS = ("packed", "modality")


class Failure(NamedTuple):
  """A record that was planned for, but cannot be read.

  `record` is its number in the split.
  """

  dataset: str
  record: int
  message: str


class Loader:
  """The batches of a run: iterate from any step, or ask for one by number.

  A batch holds NumPy arrays of fixed shape (B rows of this host, T tokens, M
  images, S segments): input_ids, labels, positions, segment_ids int32[B,T];
  images uint8[B,M,H,W,3] (or features[B,M,P,D] in their place); domains
  int32[B,S]; num_failed int32[], segments of this batch that could not be
  read. Those carry no label and black images.
  With `batching="modality"` T and M are as small as the batch allows, out of a
  few sizes.
  """

  num_steps: int
  plan: schedule.Schedule

  def __init__(
    self,
    datasets: Sequence[Dataset],
    plan: schedule.Schedule,
    assembler: Assembler,
    *,
    num_steps: int,
    num_workers: int,
    num_threads: int,
  ):
    self.plan = plan
    self.num_steps = num_steps
    self.datasets = tuple(datasets)
    self._assembler = assembler
    self._num_workers = num_workers
    self._num_threads = num_threads
    self._failed: dict[schedule.Entry, Failure] = {}

  @property
  def num_rows(self) -> int:
    """Rows of all hosts in all steps."""
    return self.num_steps * self._assembler.batch_size

  @functools.cached_property
  def padding(self) -> schedule.Padding:
    """How much of this run's rows is padding."""
    return schedule.measure_padding(
      self.plan,
      [dataset.lengths for dataset in self.datasets],
      self._assembler.row_length,
      self.num_rows,
      batch_size=self._assembler.batch_size,
    )

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
      workers.outlive_kills()
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

  def failed(self) -> np.ndarray:
    """int64 [n, 2]: data set and record of what failed in own batches."""
    return np.array(sorted(self._failed), np.int64).reshape(-1, 2)

  def accounting(
    self, failed: np.ndarray | None = None
  ) -> list[dict[str, object]]:
    """What became of the records of each data set so far.

    `failed` are those of all hosts, see `failed()`; by default of this one.
    """
    failed = self.failed() if failed is None else failed
    failed = collections.Counter(failed[:, 0].tolist())
    return [
      dataset.accounting(failed[index])
      for index, dataset in enumerate(self.datasets)
    ]

  def failures(self) -> list[Failure]:
    """The records of this host's batches that could not be read so far."""
    return [self._failed[entry] for entry in sorted(self._failed)]

  def check_failures(
    self, max_skipped: float | int, failed: np.ndarray
  ) -> None:
    """Raises mixture.TooManySkipped for a share of bad records above this.

    `failed` are those of all hosts, see `failed()`.
    """
    failed = collections.Counter(failed[:, 0].tolist())
    for index in failed:
      self.datasets[index].check_skipped(max_skipped, failed[index])

  def _counted(self, step: int, batch: Batch) -> Batch:
    """Moves the failures out of a batch and into the accounting.

    Here, not where records are read: that may be another process.
    """
    failed = batch.pop("failed")
    for row, segment in np.argwhere(failed):
      first = self._assembler.first_row(step)
      entry = self.plan.row(first + int(row))[segment]
      if entry not in self._failed:
        self._failed[entry] = Failure(
          self.datasets[entry[0]].name,
          self.datasets[entry[0]].place(entry[1]),
          self._assembler.samples.explain(entry),
        )
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
  batching: str = "packed",
  process_index: int = 0,
  process_count: int = 1,
  stores: Sequence[features.Store] | None = None,
  num_workers: int = 0,
  num_threads: int = 2,
) -> Loader:
  """Plans a run and makes its batches.

  Args:
    datasets: in the order of `weights`.
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
    batching: "packed" (as many samples a row as fit) or "modality" (one a
      row; batches with images or without, of about equal lengths).
    stores: of each data set, for features in place of pixels.
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
  if batching not in BATCHINGS:
    raise ValueError(f"batching={batching!r}; wanted one of {list(BATCHINGS)}.")
  lengths = [dataset.lengths for dataset in datasets]
  image_counts = [dataset.image_counts for dataset in datasets]
  limits = {"max_length": max_length, "max_images": max_images}
  plan: schedule.Schedule
  if batching == "packed":
    plan = schedule.Packed(
      lengths,
      image_counts,
      weights,
      seed=seed,
      max_segments=max_segments,
      **limits,
    )
  else:
    plan = schedule.Grouped(
      lengths, image_counts, weights, seed=seed, batch_size=batch_size, **limits
    )
  assembler = Assembler(
    ready.Samples(datasets, preparation, pad_id, stores),
    plan,
    batch_size=batch_size,
    num_rows=batch_size // process_count,
    process_index=process_index,
    max_segments=max_segments,
    is_cut=batching == "modality",
    pad_id=pad_id,
    **limits,
  )
  return Loader(
    datasets,
    plan,
    assembler,
    num_steps=num_steps,
    num_workers=num_workers,
    num_threads=num_threads,
  )


def _end_with(parent: int, worker_index: int, worker_count: int):
  """Lets a worker process end soon after its parent, however that ends."""
  del worker_index, worker_count

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # Nobody is left who could join this process.

  threading.Thread(target=watch, daemon=True).start()
