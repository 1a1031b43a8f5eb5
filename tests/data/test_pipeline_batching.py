"""Both ways to fill batches, and records that cannot be read."""

import shutil

import numpy as np
import pytest

from mole_jax.data import measure, records
from mole_jax.data.encoding import Encoder
from mole_jax.data.mixture import Dataset
from mole_jax.data.templates import VICUNA
from mole_jax.data.tokenizer import Tokenizer
from tests.data import in_memory

NUM_STEPS = 48  # Windows are of 16 batches, one of them mixed.
BATCHINGS = ("packed", "modality")


def global_batches(datasets, **kwargs):
  loader = in_memory.loader_of(datasets, num_steps=NUM_STEPS, **kwargs)
  return [loader.batch(step) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_the_same_batches(
  make_datasets, batching, num_workers
):
  datasets = make_datasets(bad=[0, 4])
  here = in_memory.loader_of(datasets, batching=batching)
  there = in_memory.loader_of(
    datasets, batching=batching, num_workers=num_workers
  )
  in_memory.assert_same(list(there), list(here))
  assert there.accounting() == here.accounting()
  assert there.failures() == here.failures()


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_together_make_the_batches_of_one_modality(
  make_datasets, process_count
):
  datasets = make_datasets(bad=[0])
  expected = global_batches(datasets, batching="modality")
  parts = [
    global_batches(
      datasets,
      batching="modality",
      process_index=index,
      process_count=process_count,
    )
    for index in range(process_count)
  ]
  for whole, *pieces in zip(expected, *parts, strict=True):
    for key, value in whole.items():
      together = [piece[key] for piece in pieces]
      if key == "num_failed":
        assert sum(together) == value
      else:
        np.testing.assert_array_equal(np.concatenate(together), value)


def test_a_modality_batch_is_as_long_as_it_must_be(make_datasets):
  datasets = make_datasets()
  loader = in_memory.loader_of(datasets, batching="modality", num_steps=100)
  lengths = set()
  for step, batch in enumerate(loader):
    entries = [loader.plan.row(4 * step + row) for row in range(4)]
    assert [len(entry) for entry in entries] == [1] * 4
    wanted = [int(datasets[d].lengths[record]) for ((d, record),) in entries]
    used = (batch["segment_ids"] == 1).sum(axis=1)
    np.testing.assert_array_equal(used, wanted)
    assert set(np.unique(batch["segment_ids"])) <= {0, 1}
    width = batch["input_ids"].shape[1]
    # No step shorter would do.
    assert max(wanted) <= width < max(wanted) + in_memory.ROW_LENGTH // 8
    for key in ("labels", "positions", "segment_ids"):
      assert batch[key].shape == (4, width)
    lengths.add(width)
  assert 1 < len(lengths) <= 8
  assert max(lengths) <= in_memory.ROW_LENGTH


@pytest.mark.parametrize(("most", "slots"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_modality_batch_has_about_as_many_image_slots_as_it_must(
  make_datasets, most, slots
):
  datasets = make_datasets()
  loader = in_memory.loader_of(datasets, batching="modality", max_images=3)
  datasets[0].image_counts = np.full(40, most, np.int32)
  rows = [[(0, 1)], [(0, 2)]]
  assert loader._assembler.row_images(rows) == slots
  packed = in_memory.loader_of(datasets, max_images=3)
  assert packed._assembler.row_images(rows) == 3
  loader = in_memory.loader_of(make_datasets(), batching="modality")
  assert loader.batch(0)["images"].shape[1] == 1


def test_a_modality_batch_is_with_images_or_without(make_datasets):
  datasets = make_datasets()
  loader = in_memory.loader_of(datasets, batching="modality", num_steps=100)
  with_images = [
    (batch["input_ids"] == 3).any(axis=1).sum().item() for batch in loader
  ]
  assert {0, 4} <= set(with_images)
  mixed = [count for count in with_images if count not in (0, 4)]
  # Windows are of 16 batches at least.
  assert len(mixed) <= len(with_images) // 16 + 1


def test_a_record_that_cannot_be_read_becomes_a_placeholder(tmp_path):
  name, split = "embedded/general", "validation"
  folder = tmp_path / "general"
  shutil.copytree(records.find(name), folder)
  encoder = Encoder(
    Tokenizer(),
    "chat",
    num_image_tokens=4,
    max_length=96,
    max_images=2,
    system="",
    use_bos=True,
    template=VICUNA,
  )
  measured, _ = measure.measure(records.open_texts(name, split), encoder)

  def make_loader():
    rows = records.Records(folder, split)
    dataset = Dataset("copy", rows, encoder, measured, ("general",))
    return in_memory.loader_of([dataset], weights=[1], num_steps=60)

  sound = list(make_loader())
  (path,) = folder.glob(f"*{split}.array_record*")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)
  loader = make_loader()
  (dataset,) = loader.datasets
  rows = records.Records(folder, split)
  bad = [i for i in range(len(dataset)) if not is_readable(rows, dataset, i)]
  assert 0 < len(bad) < len(dataset) / 2
  num_failed = 0
  for step, (batch, before) in enumerate(zip(loader, sound, strict=True)):
    masked = np.zeros(batch["labels"].shape, bool)
    images = np.zeros(batch["images"].shape[:2], bool)
    for row in range(4):
      slot = 0
      for segment, (_, index) in enumerate(loader.plan.row(4 * step + row)):
        count = int(dataset.image_counts[index])
        if index in bad:
          masked[row] |= before["segment_ids"][row] == segment + 1
          images[row, slot : slot + count] = True
          num_failed += 1
        slot += count
    before["input_ids"][masked] = in_memory.PAD
    before["labels"][masked] = -100
    before["images"][images] = 0
    before["num_failed"] = batch["num_failed"]
    in_memory.assert_same([batch], [before])
  assert num_failed >= len(bad)
  (account,) = loader.accounting()
  assert account["failed"] == len(bad)
  skipped = sum(account["skipped"].values())
  assert account["read"] == account["used"] + skipped + account["failed"]
  for failure in loader.failures():
    assert "cannot be read" in failure.message
  assert [f.record for f in loader.failures()] == [
    dataset.place(index) for index in bad
  ]


def is_readable(rows, dataset, index):
  try:
    rows[dataset.place(index)]
  except ValueError:
    return False
  return True
