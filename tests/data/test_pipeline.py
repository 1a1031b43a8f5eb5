import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

from mole_jax.data.images import Preparation, decode_image
from tests.data import in_memory

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = {
  "input_ids": (4, in_memory.ROW_LENGTH),
  "labels": (4, in_memory.ROW_LENGTH),
  "positions": (4, in_memory.ROW_LENGTH),
  "segment_ids": (4, in_memory.ROW_LENGTH),
  "images": (4, 3, 8, 8, 3),
  "domains": (4, 4),
  "num_failed": (),
}


def test_batches_have_the_shapes_and_types_of_the_contract(make_datasets):
  for batch in in_memory.loader_of(make_datasets()):
    assert {key: value.shape for key, value in batch.items()} == SHAPES
    for key, value in batch.items():
      assert value.dtype == (np.uint8 if key == "images" else np.int32)
      assert type(value) is np.ndarray


def test_segments_are_whole_samples_in_the_order_of_the_plan(make_datasets):
  datasets = make_datasets()
  loader = in_memory.loader_of(datasets)
  for step, batch in enumerate(loader):
    for row in range(4):
      entries = loader.plan.row(4 * step + row)
      for segment, (which, index) in enumerate(entries):
        dataset = datasets[which]
        ids, labels, _ = dataset.sample(index)
        where = np.flatnonzero(batch["segment_ids"][row] == segment + 1)
        # Side by side, positions from 0: nothing of another sample between.
        np.testing.assert_array_equal(np.diff(where), 1)
        np.testing.assert_array_equal(batch["input_ids"][row, where], ids)
        np.testing.assert_array_equal(batch["labels"][row, where], labels)
        np.testing.assert_array_equal(
          batch["positions"][row, where], np.arange(len(ids))
        )
        assert batch["labels"][row, where[0]] == -100
        domain = "general" if which == 0 else "document"
        assert batch["domains"][row, segment] == (
          ("document", "general").index(domain)
        )
      assert batch["segment_ids"][row].max() == len(entries)
      assert (batch["domains"][row, len(entries) :] == -1).all()


def test_padding_is_empty(make_datasets):
  for batch in in_memory.loader_of(make_datasets()):
    empty = batch["segment_ids"] == 0
    assert empty.any()
    assert (batch["input_ids"][empty] == in_memory.PAD).all()
    assert (batch["labels"][empty] == -100).all()
    assert (batch["positions"][empty] == 0).all()


def test_images_stand_in_order_of_appearance(make_datasets):
  datasets = make_datasets()
  loader = in_memory.loader_of(datasets)
  num_images = 0
  for step, batch in enumerate(loader):
    for row in range(4):
      expected = [
        decode_image(data, Preparation(8))
        for which, index in loader.plan.row(4 * step + row)
        for data in datasets[which].sample(index).images
      ]
      images = batch["images"][row]
      for slot, pixels in enumerate(expected):
        np.testing.assert_array_equal(images[slot], pixels)
      assert (images[len(expected) :] == 0).all()
      assert (batch["input_ids"][row] == 3).sum() == 4 * len(expected)
      num_images += len(expected)
  assert num_images > 50


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("start_step", [0, 5, 11])
def test_batches_depend_on_the_step_alone(
  make_datasets, start_step, num_threads
):
  datasets = make_datasets(bad=[0, 4])
  expected = [in_memory.loader_of(datasets).batch(step) for step in range(12)]
  loader = in_memory.loader_of(datasets, num_threads=num_threads)
  in_memory.assert_same(list(loader.iterate(start_step)), expected[start_step:])


def test_worker_processes_make_the_same_batches(make_datasets):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  datasets = make_datasets(bad=[0, 4])
  here = in_memory.loader_of(datasets)
  there = in_memory.loader_of(datasets, num_workers=2)
  batches = list(there.iterate(3))
  in_memory.assert_same(batches, list(here.iterate(3)))
  # Plain arrays: shared memory may be unmapped under its reader.
  assert {type(value) for value in batches[0].values()} == {np.ndarray}
  # Failures seen by a worker reach the accounting of the parent.
  assert there.accounting() == here.accounting()
  assert there.accounting()[0]["failed"] == 2


PARENT = """
import multiprocessing, os, pickle, sys, time
from absl import flags
if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  # So that its semaphores are known from those of others.
  prefix = f"/killed-{os.getpid()}"
  multiprocessing.current_process()._config["semprefix"] = prefix
  with open(sys.argv[1], "rb") as file:
    batches = pickle.load(file).iterate()
  next(batches)
  print(*(p.pid for p in multiprocessing.active_children()), flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize("is_group", [True, False])
def test_nothing_is_left_of_a_killed_parent(make_datasets, tmp_path, is_group):
  (tmp_path / "parent.py").write_text(PARENT)
  (tmp_path / "loader.pickle").write_bytes(
    pickle.dumps(in_memory.loader_of(make_datasets(), num_workers=2))
  )
  parent = subprocess.Popen(
    [sys.executable, tmp_path / "parent.py", tmp_path / "loader.pickle"],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  shared = lambda: list(
    pathlib.Path("/dev/shm").glob(f"sem.killed-{parent.pid}-*")
  )
  try:
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert shared()
  finally:
    (os.killpg if is_group else os.kill)(parent.pid, signal.SIGKILL)
    parent.communicate()
  assert len(workers) == 2

  def is_alive(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    # A zombie has ended; whoever inherited it may not have noticed.
    return stat.exists() and stat.read_text().rsplit(")")[1].split()[0] != "Z"

  deadline = time.monotonic() + 5
  while any(map(is_alive, workers)) or shared():
    if time.monotonic() > deadline:
      break
    time.sleep(0.1)
  survivors = [pid for pid in workers if is_alive(pid)]
  for pid in survivors:
    os.kill(pid, signal.SIGKILL)
  assert not survivors
  assert not shared()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_make_the_global_batch(make_datasets, process_count):
  datasets = make_datasets(bad=[0])
  whole = in_memory.loader_of(datasets)
  parts = [
    in_memory.loader_of(datasets, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  for step in range(12):
    expected = whole.batch(step)
    batches = [part.batch(step) for part in parts]
    for key, value in expected.items():
      together = [batch[key] for batch in batches]
      if key == "num_failed":
        assert sum(together) == value
      else:
        np.testing.assert_array_equal(np.concatenate(together), value)


def test_a_longer_run_begins_with_the_same_batches(make_datasets):
  datasets = make_datasets()
  longer = in_memory.loader_of(datasets, num_steps=40)
  for step in range(12):
    in_memory.assert_same(
      [longer.batch(step)], [in_memory.loader_of(datasets).batch(step)]
    )


def test_bad_images_become_masked_counted_placeholders(make_datasets):
  broken, sound = make_datasets(bad=[0, 4]), make_datasets()
  loader = in_memory.loader_of(broken)
  num_failed = 0
  for step, batch in enumerate(loader):
    expected = in_memory.loader_of(sound).batch(step)
    failed = np.zeros((4, in_memory.ROW_LENGTH), bool)
    slots = np.zeros((4, 3), bool)
    for row in range(4):
      slot = 0
      for segment, (which, index) in enumerate(loader.plan.row(4 * step + row)):
        count = int(sound[which].image_counts[index])
        if (which, index) in [(0, 0), (0, 4)]:
          failed[row] |= batch["segment_ids"][row] == segment + 1
          slots[row, slot] = True
          num_failed += 1
        slot += count
    expected["labels"][failed] = -100
    expected["images"][slots] = 0
    expected["num_failed"] = np.array(num_failed, np.int32) - sum(
      in_memory.loader_of(broken).batch(s)["num_failed"] for s in range(step)
    )
    in_memory.assert_same([batch], [expected])
  assert num_failed >= 2
  assert loader.accounting() == [
    {"read": 40, "used": 38, "skipped": {}, "failed": 2},
    {"read": 30, "used": 20, "skipped": {"no_caption": 10}, "failed": 0},
  ]


def test_failures_of_a_resumed_run_are_those_of_its_steps(make_datasets):
  datasets = make_datasets(bad=[0, 4, 9, 10, 21])
  resumed = in_memory.loader_of(datasets)
  list(resumed.iterate(9))
  by_hand = in_memory.loader_of(datasets)
  for step in range(9, 12):
    by_hand.batch(step)
  assert resumed.accounting() == by_hand.accounting()
  assert 0 < resumed.accounting()[0]["failed"] < 5


def test_padding_share_is_that_of_the_batches(make_datasets):
  loader = in_memory.loader_of(make_datasets())
  empty = [np.mean(batch["segment_ids"] == 0) for batch in loader]
  assert loader.padding.share == pytest.approx(np.mean(empty))


def test_each_image_is_decoded_once(make_datasets, monkeypatch):
  decoded = []

  def counting(data, preparation):
    decoded.append(data)
    return decode_image(data, preparation)

  monkeypatch.setattr("mole_jax.data.images.decode_image", counting)
  list(in_memory.loader_of(make_datasets(), num_steps=40, num_threads=0))
  # Records 0 to 29 of both sets hold the same images, two in three.
  assert len(decoded) == 27 + 20


def test_the_cache_of_images_is_bounded(make_datasets, monkeypatch):
  image_bytes = 8 * 8 * 3
  monkeypatch.setattr("mole_jax.data.ready.CACHE_BYTES", 5 * image_bytes)
  loader = in_memory.loader_of(make_datasets())
  cache = loader._assembler.samples._cache
  for step in range(12):
    loader.batch(step)
    held = sum(value.nbytes for value in cache._entries.values())
    assert held == cache._num_bytes <= 5 * image_bytes


def test_the_last_step_may_be_reached_already(make_datasets):
  assert list(in_memory.loader_of(make_datasets()).iterate(12)) == []


def test_closing_early_stops_the_threads(make_datasets):
  batches = in_memory.loader_of(make_datasets()).iterate()
  next(batches)
  batches.close()
  assert next(batches, None) is None


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"process_count": 3}, "batch_size=4 for process 0 of 3"),
    ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
  ],
)
def test_a_batch_that_cannot_be_split_is_refused(
  make_datasets, kwargs, message
):
  with pytest.raises(ValueError, match=message):
    in_memory.loader_of(make_datasets(), **kwargs)


@pytest.mark.parametrize("step", [-1, 12, 13])
def test_steps_outside_the_plan_are_refused(make_datasets, step):
  loader = in_memory.loader_of(make_datasets())
  with pytest.raises(ValueError, match=f"step {step} of a plan of 12"):
    loader.batch(step)
  if step != 12:
    with pytest.raises(ValueError, match=f"start_step={step} of a plan"):
      next(loader.iterate(step))


def test_pictures_stand_behind_those_of_a_record_that_cannot_be_read(
  make_datasets,
):
  datasets = make_datasets()
  sound = make_datasets()
  bad = [(0, record) for record in (0, 3, 12, 21)]
  datasets[0]._rows = in_memory.Rows(
    datasets[0]._rows, [record for _, record in bad]
  )
  loader = in_memory.loader_of(datasets, num_steps=40)
  num_before = 0
  for step, batch in enumerate(loader):
    for row in range(4):
      entries = loader.plan.row(4 * step + row)
      expected = [
        decode_image(data, Preparation(8))
        for entry in entries
        if entry not in bad
        for data in sound[entry[0]].sample(entry[1]).images
      ]
      # As many as there are positions for, and in their order: the model
      # knows nothing else of where a picture belongs.
      assert (batch["input_ids"][row] == 3).sum() == 4 * len(expected)
      for slot, pixels in enumerate(expected):
        np.testing.assert_array_equal(batch["images"][row, slot], pixels)
      num_before += any(entry in bad for entry in entries[:-1])
  assert num_before > 3
