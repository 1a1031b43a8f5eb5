import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from mole_jax.data import records
from mole_jax.data.builders.prepared import info
from mole_jax.data.builders.prepared.build import build
from tests.data.builders.prepared_input import (
  encode,
  entry,
  sample_input,
  write,
)

COUNT, SHARDS = 23, 5


@pytest.fixture
def built(tmp_path):
  """Records of no, one and two images, with a shard that has no record."""
  image = encode(np.zeros((4, 4, 3)))
  names = [None, "x.png", ["x.png", "x.png"], "bad.png"]
  entries = [entry(i, names[i % 3]) for i in range(COUNT)]
  for each in entries[2::3]:
    each["conversations"][0]["value"] = "<image><image> čaj ☕\u2028?"
  entries[7] = {**entry(7, "bad.png"), "domain": "other"}
  entries[8]["system"] = "Be brief."
  file, pictures = write(tmp_path, entries, {"x.png": image, "bad.png": b""})
  options = {"name": "toy", "max_skipped": 0.1, "num_workers": 2}
  build(file, pictures, out=tmp_path / "few", num_shards=SHARDS, **options)
  build(file, pictures, out=tmp_path / "many", num_shards=COUNT, **options)
  return tmp_path


def folder_of(tmp_path, out="few"):
  return tmp_path / out / "toy" / "1.0.0"


def text_files(folder):
  return sorted(folder.glob("train-text-*-of-*.array_record"))


def expected(rows):
  """Records with a count in place of the images."""
  return [
    {
      **{key: value for key, value in row.items() if key != "images"},
      "num_images": len(row["images"]),
    }
    for row in rows
  ]


@pytest.mark.parametrize("out", ["few", "many"])
def test_texts_are_the_records_in_their_order_without_the_images(built, out):
  rows = expected(records.Records(folder_of(built, out), "train"))
  texts = records.open_texts(str(built / out / "toy"), "train")
  assert len(texts) == len(rows) == COUNT - 1
  assert texts.read(0, len(texts)) == rows
  assert {row["num_images"] for row in rows} == {0, 1, 2}
  for start in range(len(rows) + 1):
    for stop in range(start, len(rows) + 1):
      assert texts.read(start, stop) == rows[start:stop]


def test_texts_are_read_from_their_files_and_these_hold_no_image(built):
  folder = folder_of(built)
  assert len(text_files(folder)) == SHARDS
  for shard in folder.glob("toy-train*"):
    shard.unlink()
  assert len(records.Texts(folder, "train").read(0, 22)) == 22


@pytest.mark.parametrize("where", [(-1, 2), (3, 2), (0, COUNT)])
def test_what_is_not_there_is_an_index_error(built, where):
  with pytest.raises(IndexError, match="of 22"):
    records.Texts(folder_of(built), "train").read(*where)


def test_sets_without_text_files_give_the_same_from_their_records(built):
  folder = folder_of(built)
  before = records.Texts(folder, "train").read(3, 11)
  about = json.loads((folder / "prepared.json").read_text())
  del about["texts"]
  (folder / "prepared.json").write_text(json.dumps(about))
  for path in text_files(folder):
    path.unlink()
  assert records.Texts(folder, "train").read(3, 11) == before
  assert info.describe(folder, use_hashes=True).problems == []
  texts = records.open_texts("embedded/general", "validation")
  rows = records.open_records("embedded/general", "validation")
  assert texts.read(0, len(texts)) == expected(rows)


def test_another_split_is_named(built):
  for name in (str(folder_of(built)), "embedded/general"):
    for function in (records.open_texts, records.identity):
      with pytest.raises(ValueError, match=r"split='tset' is not in.*'train'"):
        function(name, "tset")


def test_a_missing_cut_or_damaged_text_file_is_named(built):
  folder = folder_of(built)
  _, second, third, fourth, last = text_files(folder)
  texts = records.Texts(folder, "train")
  data = bytearray(second.read_bytes())
  data[data.index(bytes(64)) // 2] ^= 1
  second.write_bytes(data)
  third.write_bytes(last.read_bytes())  # Of the same size.
  with pytest.raises(ValueError, match=f"{second} cannot be read.*copy the"):
    texts.read(0, 22)
  with pytest.raises(ValueError, match=f"{third} cannot .* records, wanted"):
    texts.read(10, 11)
  fourth.unlink()
  with pytest.raises(ValueError, match=f"{fourth} is missing; copy the set"):
    records.Texts(folder, "train")
  fourth.write_bytes(b"")
  with pytest.raises(ValueError, match=f"{fourth} is cut short; copy the set"):
    records.Texts(folder, "train")
  one, two = info.describe(folder).problems
  assert f"{third}: 5 records, wanted 4" in one
  assert f"{fourth}: 0 bytes, wanted" in two
  assert (
    f"{second}: sha256 is"
    in (info.describe(folder, use_hashes=True).problems[0])
  )


def test_texts_go_to_other_processes_and_serve_several_threads(built):
  texts = records.Texts(folder_of(built, "many"), "train")
  rows = texts.read(0, 22)
  assert pickle.loads(pickle.dumps(texts)).read(0, 22) == rows
  found = []

  def read():
    for _ in range(20):
      found.append(texts.read(0, 22) == rows)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [True] * 80


def test_reading_texts_imports_neither_tfds_nor_jax(built):
  program = f"""
import sys
from mole_jax.data import records
texts = records.open_texts({str(folder_of(built))!r}, "train")
assert texts.read(0, 22)
print([m for m in ("jax", "tensorflow", "tensorflow_datasets")
       if m in sys.modules])
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"


def test_the_identity_is_that_of_the_records(tmp_path):
  """Not of the folder's name or place, nor of how it was built."""

  def identity_of(out, change=lambda entries: None, **options):
    file, pictures, entries = sample_input(tmp_path / "in")
    change(entries)
    file, pictures = write(tmp_path / "in", entries)
    build(file, pictures, name="toy", out=tmp_path / out, **options)
    return records.identity(str(folder_of(tmp_path, out)), "train")

  def of_one_letter(entries):
    entries[5]["conversations"][1]["value"] = "b" * 6

  first = identity_of("a")
  assert identity_of("b", num_workers=2) == first
  os.rename(tmp_path / "a", tmp_path / "moved")
  assert records.identity(str(tmp_path / "moved/toy"), "train") == first
  others = [
    identity_of("c", of_one_letter),
    identity_of("d", seed=1),
    identity_of("e", num_shards=2),
    records.identity("embedded/general", "train"),
    records.identity("embedded/general", "test"),
    records.identity("embedded/document", "train"),
  ]
  assert len({first, *others}) == 7


def test_the_identity_of_a_foreign_set_is_told_by_its_files(built):
  folder = folder_of(built)
  (folder / "prepared.json").unlink()
  first = records.identity(str(folder), "train")
  assert records.identity(str(folder), "train") == first
  shard = min(folder.glob("toy-train*"))
  with shard.open("ab") as file:
    file.write(b"x")
  assert records.identity(str(folder), "train") != first


def test_a_damaged_prepared_json_is_named(built):
  folder = folder_of(built)
  (folder / "prepared.json").write_text("{")
  for function in (records.open_texts, records.identity):
    with pytest.raises(ValueError, match="prepared.json cannot be read"):
      function(str(folder), "train")


def test_a_text_file_cut_by_a_crash_of_the_machine_is_redone(tmp_path):
  file, pictures, _ = sample_input(tmp_path)
  options = {"name": "toy", "num_shards": 2}

  def interrupt(phase, done, total):
    if phase == "writing" and done >= total // 2:
      raise KeyboardInterrupt

  build(file, pictures, out=tmp_path / "few", **options)
  with pytest.raises(KeyboardInterrupt):
    build(file, pictures, out=tmp_path / "cut", report=interrupt, **options)
  (text,) = text_files(tmp_path / "cut" / "toy" / "1.0.0.partial" / "data")
  text.write_bytes(text.read_bytes()[:100])
  build(file, pictures, out=tmp_path / "cut", **options)
  for path in folder_of(tmp_path).iterdir():
    again = folder_of(tmp_path, "cut") / path.name
    assert again.read_bytes() == path.read_bytes()
