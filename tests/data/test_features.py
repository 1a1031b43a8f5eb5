import json
import pickle

import numpy as np
import pytest

from mole_jax.data import features, images, records
from mole_jax.data.builders.prepared.build import build
from mole_jax.data.images import Preparation, decode_image
from tests.data.builders import prepared_input

SIZE = Preparation(8)
SHAPE = (4, 3)


def encode(pixels):
  """Means of the four quarters, as a tower of four patches."""
  quarters = pixels.reshape(-1, 2, 4, 2, 4, 3).astype(np.float32)
  return quarters.mean((2, 4)).reshape(-1, *SHAPE)


@pytest.fixture
def built(tmp_path):
  file, pictures, _ = prepared_input.sample_input(tmp_path, count=25)
  build(file, pictures, name="mine", out=tmp_path)
  return str(tmp_path / "mine")


def make(name, key="key", encode=encode, dtype="float32"):
  return features.find_or_make(
    name, "train", key, SHAPE, dtype, SIZE, encode, batch_size=4,
    report=lambda done, total: None,
  )  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 1)])
def test_a_store_holds_the_features_of_each_image(built, dtype, error):
  store = make(built, dtype=dtype)
  for each in (store, pickle.loads(pickle.dumps(store))):
    for number, record in enumerate(records.open_records(built, "train")):
      found = each.read(number, len(record["images"]))
      assert found.shape == (len(record["images"]), *SHAPE)
      assert found.dtype == features._DTYPES[dtype]
      for image, value in zip(record["images"], found, strict=True):
        expected = encode(decode_image(image, SIZE)[None])[0]
        np.testing.assert_allclose(
          value.astype(np.float32), expected, atol=error
        )


def test_a_store_is_made_once_for_each_key(built):
  seen = []

  def counting(pixels):
    seen.append(len(pixels))
    return encode(pixels)

  first = make(built, encode=counting)
  assert first.folder.parent.parent.parent.name == "mine"
  calls = len(seen)
  assert make(built, encode=counting).folder == first.folder
  assert len(seen) == calls > 0
  assert make(built, key="other", encode=counting).folder != first.folder
  assert len(seen) == 2 * calls
  assert set(seen) == {4}  # One shape, so that a tower compiles once.


def test_one_that_was_not_finished_is_made_anew(built):
  def failing(pixels):
    failing.calls += 1
    if failing.calls == 3:
      raise KeyboardInterrupt
    return encode(pixels)

  failing.calls = 0
  with pytest.raises(KeyboardInterrupt):
    make(built, encode=failing)
  store = make(built)
  assert store.num_images == 17
  assert not list(store.folder.parent.glob("*.partial"))


def test_an_image_that_cannot_be_decoded_is_an_error_when_read(
  built, monkeypatch
):
  rows = records.open_records(built, "train")
  number = next(i for i, row in enumerate(rows) if row["images"])
  bad = rows[number]["images"][0]

  def decode(data, preparation):
    if data == bad:
      raise ValueError("broken")
    return decode_image(data, preparation)

  monkeypatch.setattr(images, "decode_image", decode)
  store = make(built)
  assert store.num_images == 17
  with pytest.raises(ValueError, match=f"record {number} could not be decoded"):
    store.read(number, 1)
  assert store.read(number, 0).shape == (0, *SHAPE)
  store.read(number + 1, len(rows[number + 1]["images"]))


def test_a_full_disk_is_refused_before_anything_is_made(built, monkeypatch):
  usage = lambda path: type("Usage", (), {"free": 17 * 48 - 1})
  monkeypatch.setattr(features.shutil, "disk_usage", usage)
  with pytest.raises(ValueError, match="take 816 bytes.* 815 free"):
    make(built)


def test_what_comes_with_the_package_is_kept_in_the_users_cache(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  name = "embedded/biomedical"
  store = features.find_or_make(
    name, "validation", "key", SHAPE, "float32", SIZE, encode, batch_size=32,
    report=lambda done, total: None,
  )  # fmt: skip
  assert tmp_path in store.folder.parents
  about = json.loads((store.folder / "about.json").read_text())
  rows = records.open_records(name, "validation")
  assert about["images"] == sum(len(row["images"]) for row in rows)
