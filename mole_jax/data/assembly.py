"""A step's rows to a batch: samples put in their places.

Works in whatever thread or process is asked, with the same result.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mole_jax.data import conversation, ready, schedule

# A batch of short rows is cut to a multiple of this share of the longest.
NUM_LENGTHS = 8

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class Assembler:
  """step -> this host's batch; pickled into each worker."""

  samples: ready.Samples
  plan: schedule.Schedule
  _: dataclasses.KW_ONLY
  batch_size: int
  num_rows: int
  process_index: int
  max_length: int
  max_images: int
  max_segments: int
  is_cut: bool
  pad_id: int

  def first_row(self, step: int) -> int:
    return step * self.batch_size + self.process_index * self.num_rows

  def row_length(self, rows: Sequence[Sequence[schedule.Entry]]) -> int:
    """Tokens of each row of a global batch."""
    if not self.is_cut:
      return self.max_length
    longest = _most([data.lengths for data in self.samples.datasets], rows)
    unit = -(-self.max_length // NUM_LENGTHS)
    return min(self.max_length, -(-longest // unit) * unit)

  def row_images(self, rows: Sequence[Sequence[schedule.Entry]]) -> int:
    """Images of each row of a global batch: 1, 2, 4, ... up to the most."""
    if not self.is_cut:
      return self.max_images
    most = _most([data.image_counts for data in self.samples.datasets], rows)
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
    pictures = self.samples.empty(b, m)
    batch = {
      "input_ids": np.full((b, t), self.pad_id, np.int32),
      "labels": np.full((b, t), conversation.IGNORE_LABEL, np.int32),
      "positions": np.zeros((b, t), np.int32),
      "segment_ids": np.zeros((b, t), np.int32),
      self.samples.key: pictures,
      "domains": np.full((b, self.max_segments), -1, np.int32),
      "failed": np.zeros((b, self.max_segments), bool),
    }
    for row, entries in enumerate(rows[offset : offset + b]):
      start = slot = 0
      for segment, entry in enumerate(entries):
        dataset = self.samples.datasets[entry[0]]
        sample = self.samples.get(entry)
        span = slice(start, start + len(sample.input_ids))
        slots = slice(slot, slot + len(sample.pictures))
        batch["input_ids"][row, span] = sample.input_ids
        batch["labels"][row, span] = sample.labels
        batch["positions"][row, span] = np.arange(len(sample.input_ids))
        batch["segment_ids"][row, span] = segment + 1
        batch["domains"][row, segment] = dataset.domains[entry[1]]
        batch["failed"][row, segment] = sample.is_failed
        pictures[row, slots] = sample.pictures
        start, slot = span.stop, slots.stop
    return batch


def _most(
  values: Sequence[Int32[np.ndarray, " _"]],
  rows: Sequence[Sequence[schedule.Entry]],
) -> int:
  """The largest sum over a row of what its records have."""
  return max(sum(int(values[d][record]) for d, record in row) for row in rows)
