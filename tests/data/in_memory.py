"""Data sets of records that a test made up, and their batches."""

import json

import numpy as np

from mole_jax.data import measure, records
from mole_jax.data.images import Preparation
from mole_jax.data.mixture import Dataset
from mole_jax.data.pipeline import make_loader

PAD = 0
ROW_LENGTH = 96


class Texts(records.Texts):
  """Records without their images, as `records.Texts` reads them."""

  def __init__(self, rows):  # None of the files of its base.
    self._rows = rows

  def __len__(self):
    return len(self._rows)

  def read(self, start, stop):
    return [records.without_images(row) for row in self._rows[start:stop]]


def make_dataset(rows, encoder, *, name, domains):
  """A data set as `mixture.load_mixture` makes it of stored ones."""
  measured, _ = measure.measure(Texts(rows), encoder)
  return Dataset(name, rows, encoder, measured, domains)


class Rows(list):
  """Records of which some cannot be read."""

  def __init__(self, rows, unreadable=()):
    super().__init__(rows)
    self.unreadable = set(unreadable)

  def __getitem__(self, index):
    if not isinstance(index, slice) and index in self.unreadable:
      raise ValueError(f"record {index} cannot be read")
    return super().__getitem__(index)


def serve(monkeypatch, sets):
  """Lets names of embedded data sets stand for these rows, of any split."""
  hashed = lambda rows: json.dumps(rows, default=repr)
  monkeypatch.setattr(
    records, "identity", lambda name, split: f"{split} {hashed(sets[name])}"
  )
  monkeypatch.setattr(records, "open_texts", lambda name, _: Texts(sets[name]))
  monkeypatch.setattr(records, "open_records", lambda name, _: sets[name])


def loader_of(datasets, weights=(2.0, 1.0), **kwargs):
  """The batches of small sets; of two, the first drawn twice as often."""
  kwargs = {
    "seed": 0,
    "num_steps": 12,
    "batch_size": 4,
    "max_length": ROW_LENGTH,
    "max_images": 3,
    "max_segments": 4,
    "preparation": Preparation(8),
    "pad_id": PAD,
    **kwargs,
  }
  return make_loader(datasets, weights, **kwargs)


def assert_same(batches, expected):
  """Compares batches bitwise."""
  assert len(batches) == len(expected) > 0
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)
