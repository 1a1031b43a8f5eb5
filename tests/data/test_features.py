"""Cached features: whose they are, that they last, what reads them."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from absl import flags

from mole_jax.data import feature_writer, features, images, records
from tests.data import in_memory

ROOT = pathlib.Path(__file__).parents[2]
NAME = "embedded/general"
TOWER = features.Tower("t", 4, 3, "float32", images.Preparation(8))
IMAGE_BYTES = 4 * 3 * 4
# Images that the fake tower is given at once.
BATCH = 5


def see(pixels):
  """A tower: mean colours of the quarters of an image; 1 for black."""
  patches = pixels.reshape(-1, 2, 4, 2, 4, 3).astype(np.float32)
  return 1 + patches.mean((2, 4)).reshape(-1, 4, 3)


def never(pixels):
  raise AssertionError("the tower was asked")


def make(stores, encode=see, tell=lambda text: None, report=lambda *_: None):
  feature_writer.make(stores, encode, BATCH, tell, report)


@pytest.fixture
def rows(encode_png, monkeypatch):
  """Records of no, one or two images of noise."""
  random = np.random.default_rng(0)
  made = in_memory.Rows(
    {
      "id": str(i),
      "images": [
        encode_png(random.integers(0, 256, (8, 8, 3))) for _ in range(i % 3)
      ],
      "domain": "general",
      "caption": "",
      "source": "",
      "turns": [],
    }
    for i in range(20)
  )
  in_memory.serve(monkeypatch, {NAME: made, "embedded/document": made})
  return made


@pytest.fixture
def store(rows, tmp_path):
  return features.Store(NAME, "train", TOWER, tmp_path)


def expected(rows, record, count):
  pixels = [
    images.decode_image(data, TOWER.preparation)
    for data in rows[record]["images"][:count]
  ]
  return see(np.array(pixels)) if pixels else np.empty((0, 4, 3), np.float32)


def break_image(rows, record, which):
  rows[record]["images"][which] = rows[record]["images"][which][:40]


@pytest.mark.parametrize("images_per_part", [1, 2, 7, 1000])
def test_features_are_those_of_the_images_of_each_record(
  rows, store, monkeypatch, images_per_part
):
  monkeypatch.setattr(
    feature_writer, "_PART_BYTES", images_per_part * IMAGE_BYTES
  )
  told, reported = [], []
  make([store], tell=told.append, report=lambda *x: reported.append(x))
  for record, row in enumerate(rows):
    for count in range(len(row["images"]) + 1):
      found = store.read(record, count)
      np.testing.assert_array_equal(found, expected(rows, record, count))
  np.testing.assert_array_equal(store.black(2), np.ones((2, 4, 3)))
  assert reported[0] == (NAME, 0, 19) and reported[-1] == (NAME, 19, 19)
  (sentence,) = told
  assert "19 images x 4 x 3 float32 = 960 bytes" in sentence  # And a black one.
  sizes = [np.load(p).nbytes for p in store.folder.glob("part-?????.npy")]
  assert sum(sizes) == 960
  assert len(sizes) == -(-20 // images_per_part)
  assert not list(store.folder.glob(".partial*"))


def test_records_with_a_broken_image_are_known(rows, store):
  break_image(rows, 5, 1)
  rows.unreadable = {7}
  make([store])
  np.testing.assert_array_equal(store.read(5, 1), expected(rows, 5, 1))
  assert store.read(5, 2) is None
  assert store.read(7, 1) is None
  np.testing.assert_array_equal(store.read(8, 2), expected(rows, 8, 2))


def test_a_record_that_is_not_that_of_its_text_is_bad(rows, store, monkeypatch):
  texts = in_memory.Texts(in_memory.Rows(rows))
  texts._rows[5] = rows[4]  # Of one image, where there are two.
  monkeypatch.setattr(records, "open_texts", lambda name, split: texts)
  make([store])
  assert store.read(5, 1) is None
  np.testing.assert_array_equal(store.read(8, 2), expected(rows, 8, 2))


def test_what_is_made_is_found_again(rows, store, tmp_path):
  make([store])
  other = features.Store(NAME, "train", TOWER, tmp_path)
  assert other.is_made
  make([other, other], encode=never)
  np.testing.assert_array_equal(other.read(5, 2), expected(rows, 5, 2))


def test_two_lines_of_one_data_set_share_its_features(store, tmp_path):
  calls = []
  other = features.Store(NAME, "train", TOWER, tmp_path)
  make([store, other], encode=lambda x: calls.append(1) or see(x))
  assert len(calls) == 20 // BATCH
  assert other.is_made


@pytest.mark.parametrize(
  "change",
  [
    {"identity": "another"},
    {"dtype": "bfloat16"},
    {"preparation": images.Preparation(8, resample="bilinear")},
    {"preparation": images.Preparation(8, background=(0, 0, 0))},
    {"preparation": images.Preparation(16)},
  ],
)
def test_another_tower_or_preparation_is_another_place(store, tmp_path, change):
  tower = features.Tower(**{**vars(TOWER), **change})
  other = features.Store(NAME, "train", tower, tmp_path)
  assert other.folder != store.folder
  again = features.Store(NAME, "train", TOWER, tmp_path)
  assert again.folder == store.folder


def test_other_data_are_another_place(rows, store, tmp_path):
  break_image(rows, 5, 1)
  changed = features.Store(NAME, "train", TOWER, tmp_path)
  split = features.Store(NAME, "test", TOWER, tmp_path)
  assert len({store.folder, changed.folder, split.folder}) == 3


def test_finished_parts_of_an_interrupted_process_are_kept(
  rows, store, monkeypatch
):
  monkeypatch.setattr(feature_writer, "_PART_BYTES", 8 * IMAGE_BYTES)
  seen = []

  def interrupted(pixels):
    if len(seen) == 3:
      raise KeyboardInterrupt
    seen.append(pixels)
    return see(pixels)

  with pytest.raises(KeyboardInterrupt):
    make([store], encode=interrupted)
  assert not store.is_made
  assert len(list(store.folder.glob("part-?????.npy"))) == 1
  seen.clear()
  told = []
  make([store], lambda x: seen.append(x) or see(x), told.append)
  # 8 and 4 images in batches of 5; the first 8 were there.
  assert len(seen) == 3
  assert f"960 bytes, {12 * IMAGE_BYTES} of them are to be made" in told[0]
  for record in range(20):
    found = store.read(record, record % 3)
    np.testing.assert_array_equal(found, expected(rows, record, record % 3))


# Arguments: where to. Kills itself in the third batch, in the second part.
PROGRAM = """
import os, pathlib, signal, sys
import numpy as np
from mole_jax.data import feature_writer, features, images
from tests.data.test_features import (
  EMBEDDED, IMAGE_BYTES, IMAGES_PER_PART, TOWER, see)
feature_writer._PART_BYTES = IMAGES_PER_PART * IMAGE_BYTES
store = features.Store(*EMBEDDED, TOWER, pathlib.Path(sys.argv[1]))
calls = []
def encode(pixels):
  calls.append(pixels)
  if len(calls) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  return see(pixels)
feature_writer.make([store], encode, 32, print, lambda *_: None)
"""
EMBEDDED = ("embedded/biomedical", "validation")
IMAGES_PER_PART = 40


def test_only_the_part_that_a_killed_process_was_at_is_done_again(
  tmp_path, monkeypatch
):
  place = [tmp_path / "killed", tmp_path / "whole"]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, place[0]],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    check=False,
  )
  assert done.returncode == -9, done.stderr
  stores = [features.Store(*EMBEDDED, TOWER, each) for each in place]
  assert not stores[0].is_made
  assert list(stores[0].folder.glob(".partial-part-*"))
  monkeypatch.setattr(
    feature_writer, "_PART_BYTES", IMAGES_PER_PART * IMAGE_BYTES
  )
  num_batches = []
  for store in stores:
    seen = []
    make([store], encode=lambda x, seen=seen: seen.append(x) or see(x))
    num_batches.append(len(seen))
  # 94 images and the black one; the first 40 were there.
  assert num_batches == [55 // BATCH, 95 // BATCH]
  assert not list(stores[0].folder.glob(".partial-*"))
  for record in range(94):
    found = [store.read(record, 1) for store in stores]
    assert found[0].shape == (1, 4, 3)
    np.testing.assert_array_equal(*found)


def test_of_two_at_once_one_makes_and_the_other_waits(store, tmp_path):
  calls, is_begun = [], threading.Event()

  def slow(pixels):
    calls.append(1)
    is_begun.set()
    other.join(0.2)  # It must not be done before this one.
    assert other.is_alive()
    return see(pixels)

  same = features.Store(NAME, "train", TOWER, tmp_path)
  other = threading.Thread(
    target=lambda: (is_begun.wait(), make([same], encode=slow)), daemon=True
  )
  other.start()
  make([store], encode=slow)
  other.join()
  assert len(calls) == 20 // BATCH


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_disk_without_room_is_refused_before(store, monkeypatch, is_enough):
  free = 960 - (not is_enough)
  usage = shutil.disk_usage(store.folder.parent)._replace(free=free)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  if is_enough:
    make([store])
    return
  with pytest.raises(ValueError, match="960 bytes to write, but 959 are free"):
    make([store], encode=never)
  assert not list(store.folder.glob("*part-*"))


def test_room_is_counted_for_all_data_sets_of_a_disk(
  store, tmp_path, monkeypatch
):
  other = features.Store("embedded/document", "test", TOWER, tmp_path)
  usage = shutil.disk_usage(tmp_path)._replace(free=1919)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(ValueError, match="1,920 bytes to write.*features=none"):
    make([store, other], encode=never)


def test_a_disk_that_fills_up_is_named(store, monkeypatch):
  def full(descriptor):
    raise OSError(28, "No space left on device")

  store.folder.mkdir(parents=True)
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(ValueError, match=r"cannot be kept: .*No space left"):
    make([store])
  assert not list(store.folder.iterdir())


def test_damaged_features_are_named(store, tmp_path):
  make([store])
  (path,) = store.folder.glob("part-?????.npy")
  path.write_bytes(path.read_bytes()[:-1])
  again = features.Store(NAME, "train", TOWER, tmp_path)
  with pytest.raises(ValueError, match=f"{store.folder} is damaged"):
    make([again])


def test_bfloat16_is_kept_as_its_bits(rows, tmp_path):
  tower = features.Tower("t", 4, 3, "bfloat16", images.Preparation(8))
  store = features.Store(NAME, "train", tower, tmp_path)
  make([store], encode=lambda x: see(x).astype(ml_dtypes.bfloat16))
  found = store.read(5, 2)
  assert found.dtype == np.uint16
  np.testing.assert_array_equal(
    found.view(ml_dtypes.bfloat16),
    expected(rows, 5, 2).astype(ml_dtypes.bfloat16),
  )


def test_features_lie_beside_a_data_set_that_may_be_written_to(
  tmp_path, monkeypatch
):
  folder = tmp_path / "set"
  shutil.copytree(records.find(NAME), folder)
  of = lambda: features.Store(str(folder), "test", TOWER, tmp_path / "run")
  assert of().folder.parent == folder / "features"
  access = os.access

  def read_only(path, mode):  # Whoever runs this may be root.
    return pathlib.Path(path) != folder and access(path, mode)

  monkeypatch.setattr(os, "access", read_only)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  there = of().folder.parent
  assert there == tmp_path / "cache" / "mole_jax" / "features"
  monkeypatch.undo()
  embedded = features.Store(NAME, "test", TOWER, tmp_path / "run")
  assert embedded.folder.parent == tmp_path / "run"


@pytest.fixture
def with_features(make_datasets, monkeypatch, tmp_path):
  """A function: records that are bad -> data sets, and stores of them."""

  def make_both(bad=(), unreadable=()):
    datasets = make_datasets(bad)
    sets = {}
    for name, dataset in zip(
      (NAME, "embedded/document"), datasets, strict=True
    ):
      dataset._rows = sets[name] = in_memory.Rows(dataset._rows)
    sets[NAME].unreadable = set(unreadable)
    in_memory.serve(monkeypatch, sets)
    stores = [features.Store(n, "train", TOWER, tmp_path) for n in sets]
    make(stores)
    return datasets, stores

  return make_both


@pytest.mark.parametrize(
  ("batching", "num_workers"), [("packed", 0), ("packed", 2), ("modality", 0)]
)
def test_batches_are_the_same_but_for_what_pictures_are(
  with_features, batching, num_workers
):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  datasets, stores = with_features(bad=[0, 4], unreadable=[3, 12])
  load = lambda **kwargs: in_memory.loader_of(
    datasets, num_steps=20, batching=batching, **kwargs
  )
  pixels, cached = load(), load(stores=stores, num_workers=num_workers)
  for batch, other in zip(cached, pixels, strict=True):
    images = other.pop("images")
    seen = batch.pop("features")
    assert seen.dtype == np.float32 and type(seen) is np.ndarray
    slots = images.shape[:2]
    expected = see(images.reshape(-1, 8, 8, 3)).reshape(*slots, 4, 3)
    num_images = (batch["input_ids"] == 3).sum(1) // 4
    expected[np.arange(slots[1]) >= num_images[:, None]] = 0  # Left empty.
    np.testing.assert_array_equal(seen, expected)
    in_memory.assert_same([batch], [other])
  assert cached.accounting() == pixels.accounting()
  assert cached.accounting()[0]["failed"] > 2
  assert cached.failures() == pixels.failures()
  assert cached.padding == pixels.padding


def test_no_picture_is_decoded_again(with_features, monkeypatch):
  datasets, stores = with_features()
  monkeypatch.setattr("mole_jax.data.images.decode_image", None)
  list(in_memory.loader_of(datasets, stores=stores))


def test_an_opened_store_travels_without_its_features(store):
  make([store])
  assert store.read(5, 2) is not None
  there = pickle.loads(pickle.dumps(store))
  assert "_opened" not in vars(there)
  np.testing.assert_array_equal(there.read(5, 2), store.read(5, 2))


def test_a_missing_store_is_no_failed_record(with_features):
  datasets, stores = with_features()
  shutil.rmtree(stores[0].folder)
  stores = [pickle.loads(pickle.dumps(store)) for store in stores]
  loader = in_memory.loader_of(datasets, stores=stores)
  with pytest.raises(ValueError, match="is damaged"):
    loader.batch(0)
