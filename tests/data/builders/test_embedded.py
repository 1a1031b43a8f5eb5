"""What the built embedded set promises, read back from its files."""

import collections
import gzip
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mole_jax.data.builders.embedded import assemble, duplicates
from mole_jax.data.builders.embedded.sample import (
  IMAGE_SIZE,
  Question,
  Sample,
)
from mole_jax.data.conversation import VICUNA_SYSTEM
from mole_jax.data.records import SPLITS, Records, open_records
from mole_jax.data.tokenizer import Tokenizer

BUILT = pathlib.Path(assemble.__file__).parents[2] / "built"
MIN_IMAGES = {"general": 600, "document": 600, "biomedical": 500}
PERMISSIVE = {
  "Apache-2.0",
  "BSD-3-Clause",
  "CC0-1.0",
  "LicenseRef-Public-Domain",
  "MIT",
  "OFL-1.1",
  "Unicode-DFS-2016",
}
SIDE = "Which side is the marked object on?"
COUNT = "How many are there?"
SHOWN = "What is shown?"


@pytest.fixture(scope="module")
def manifest():
  text = gzip.decompress((BUILT / "manifest.jsonl.gz").read_bytes()).decode()
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def records():
  """(domain, split) -> records."""
  return {
    (domain, split): list(open_records(f"embedded/{domain}", split))
    for domain in MIN_IMAGES
    for split in SPLITS
  }


def every(records):
  return (row for rows in records.values() for row in rows)


def pairs(record):
  """(question, answer, kind) without the image marker."""
  turns = record["turns"]
  for human, gpt in zip(turns[::2], turns[1::2], strict=True):
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    assert human["kind"] == gpt["kind"] != ""
    yield human["value"].removeprefix("<image>\n"), gpt["value"], gpt["kind"]


def answers(records, domain, question):
  return {
    answer
    for split in SPLITS
    for record in records[domain, split]
    for asked, answer, _ in pairs(record)
    if asked == question
  }


def pixels(record):
  return np.asarray(Image.open(io.BytesIO(record["images"][0])).convert("RGB"))


@pytest.mark.parametrize("domain", MIN_IMAGES)
def test_each_domain_has_enough_images_in_every_split(records, domain):
  count = {
    split: sum(len(row["images"]) for row in records[domain, split])
    for split in SPLITS
  }
  total = sum(count.values())
  assert total >= MIN_IMAGES[domain]
  assert 0.10 <= count["test"] / total <= 0.25
  assert 0.05 <= count["validation"] / total <= 0.15


def test_the_set_has_at_least_6000_questions(records):
  assert sum(len(row["turns"]) // 2 for row in every(records)) >= 6000


def test_the_built_set_takes_at_most_12_megabytes():
  files = [path for path in BUILT.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= 12e6


def test_records_are_conversations_about_their_image(records):
  lengths = collections.Counter()
  for row in every(records):
    markers = [turn["value"].count("<image>") for turn in row["turns"]]
    assert sum(markers) == len(row["images"])
    assert not row["images"] or row["turns"][0]["value"].startswith("<image>\n")
    assert bool(row["caption"]) == bool(row["images"])
    assert row["id"].startswith(row["domain"])
    lengths[bool(row["images"]), len(list(pairs(row))) > 1] += 1
  assert lengths[True, True] > 1000  # Multi-turn.
  assert sum(lengths[False, multi] for multi in (False, True)) > 50


def test_ids_are_unique(records):
  ids = [row["id"] for row in every(records)]
  assert len(set(ids)) == len(ids)


def test_manifest_names_each_stored_image_by_its_hash(records, manifest):
  stored = {
    row["id"]: (row["domain"], split, row["source"], row["images"][0])
    for (_, split), rows in records.items()
    for row in rows
    if row["images"]
  }
  assert len(manifest) == len(stored)
  for line in manifest:
    domain, split, source, image = stored[line["id"]]
    assert line["sha256"] == hashlib.sha256(image).hexdigest()
    assert (line["domain"], line["split"]) == (domain, split)
    assert line["source"] == source


def test_every_origin_is_permissively_licensed_and_complete(manifest):
  packages = set()
  for line in manifest:
    assert line["origins"], line["id"]
    for origin in line["origins"]:
      assert origin["license"] in PERMISSIVE, origin
      assert origin["version"] and origin["path"]
      assert len(bytes.fromhex(origin["sha256"])) == 32
      assert "aal" not in pathlib.PurePath(origin["path"]).name
      packages.add(origin["package"])
  notices = (BUILT / "LICENSES.txt").read_text()
  assert all(f"\n{package} " in notices for package in packages)


@pytest.mark.parametrize("unit", ["source", "concepts"])
def test_no_source_and_no_concept_is_in_two_splits(manifest, unit):
  splits = collections.defaultdict(set)
  for line in manifest:
    names = [line["source"]] if unit == "source" else line["concepts"]
    assert names, line["id"]
    for name in names:
      splits[line["domain"], name].add(line["split"])
  assert len(splits) > 30
  assert {len(found) for found in splits.values()} == {1}


def test_brain_blocks_leave_five_unused_slices_between_splits(manifest):
  blocks = collections.defaultdict(set)
  for line in manifest:
    found = re.fullmatch(r"(\w+ \w+) (-?\d+)\.\.(-?\d+) mm", line["source"])
    if found:
      first, last = int(found[2]), int(found[3])
      blocks[found[1]].add((first, last, line["split"]))
      # The slice drawn lies in its block.
      (concept,) = line["concepts"]
      assert first <= int(concept.removeprefix(found[1]).split()[0]) <= last
  assert len(blocks) == 6  # Two brains in three planes.
  for name, rows in blocks.items():
    for first, last, split in rows:
      for other_first, other_last, other_split in rows:
        gap = max(first - other_last, other_first - last) - 1
        assert split == other_split or gap >= 5, name


def test_photographs_are_cut_into_disjoint_parts(manifest):
  parts = collections.defaultdict(set)
  for line in manifest:
    found = re.fullmatch(r"(\w+\.\w+) (\d+) (\d+) (\d+) (\d+)", line["source"])
    if found:
      box = tuple(int(number) for number in found.groups()[1:])
      parts[found[1]].add((*box, line["split"]))
  assert len(parts) == 4
  for rows in parts.values():
    for a in rows:
      for b in rows:
        is_apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert a[4] == b[4] or is_apart


def test_text_only_sources_stay_in_their_split_too(records):
  splits = collections.defaultdict(set)
  for (domain, split), rows in records.items():
    for row in rows:
      splits[domain, row["source"]].add(split)
  assert {len(found) for found in splits.values()} == {1}


def test_no_near_duplicate_is_in_two_splits(records):
  hashes, splits = [], []
  for (_, split), rows in records.items():
    for row in rows:
      if row["images"]:
        image = Image.open(io.BytesIO(row["images"][0])).convert("RGB")
        hashes.append(duplicates.perceptual_hash(image))
        splits.append(SPLITS.index(split))
  bits = np.array(hashes, np.uint64)
  # A matrix of bits times its like: independent of the builder's bitwise way.
  planes = (bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
  planes = planes.astype(np.float32)
  common = planes @ planes.T
  ones = planes.sum(1)
  distance = ones[:, None] + ones[None] - 2 * common
  splits = np.array(splits)
  across = splits[:, None] != splits[None]
  assert distance[across].min() > duplicates.THRESHOLD


def test_the_hash_bears_encoding_and_tells_pictures_apart(records):
  rows = [r for r in records["biomedical", "test"] if r["images"]][:40]
  images = [Image.fromarray(pixels(row)) for row in rows]
  hashes = np.array([duplicates.perceptual_hash(i) for i in images], np.uint64)
  again = []
  for image in images:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    again.append(duplicates.perceptual_hash(Image.open(buffer)))
  distance = duplicates.distances(hashes, np.array(again, np.uint64))
  assert distance.diagonal().max() <= duplicates.THRESHOLD
  assert np.median(distance) > 2 * duplicates.THRESHOLD


def test_near_duplicates_are_dropped_from_training_first():
  near, far = 0b111, (1 << 60) - 1
  hashes = [0, far, near, 0, far ^ near]
  splits = ["train", "train", "validation", "test", "validation"]
  assert duplicates.to_drop(hashes, splits) == [0, 1, 2]


def test_the_same_questions_ask_for_different_behaviour(records):
  for question in (SIDE, COUNT, SHOWN):
    assert answers(records, "general", question)
    assert answers(records, "biomedical", question)
  units = {"general": "", "document": "bars", "biomedical": "mark"}
  for domain, unit in units.items():
    for answer in answers(records, domain, COUNT):
      number, _, rest = answer.partition(" ")
      if unit:
        assert number.isdigit() and rest, answer
      else:
        assert answer.isalpha(), answer
  assert all("," in a for a in answers(records, "biomedical", SHOWN))
  assert all("," not in a for a in answers(records, "general", SHOWN))
  shown = [answers(records, domain, SHOWN) for domain in MIN_IMAGES]
  assert not shown[0] & shown[1] and not shown[1] & shown[2]


def mark_column(image):
  """Mean column of vivid pixels, in widths from the centre: -0.5 to 0.5."""
  spread = image.max(2).astype(int) - image.min(2)
  columns = np.nonzero(spread > 110)[1]
  assert columns.size >= 10
  return columns.mean() / (image.shape[1] - 1) - 0.5


def test_sides_are_the_patients_not_the_viewers(records):
  seen = collections.Counter()
  for split in SPLITS:
    for row in records["biomedical", split]:
      for question, answer, _ in pairs(row):
        if question == SIDE:
          viewer = "left" if mark_column(pixels(row)) < 0 else "right"
          assert answer != viewer, row["id"]
          assert f"at the image {viewer}" in row["caption"]
          seen[answer] += 1
  assert min(seen["left"], seen["right"]) > 0.4 * sum(seen.values()) > 50


def test_marks_counted_are_marks_seen(records):
  """Marks that do not touch: connected vivid regions, found by flooding."""
  wrong = total = 0
  for row in records["biomedical", "test"]:
    image = pixels(row)
    vivid = image.max(2).astype(int) - image.min(2) > 110
    for question, answer, _ in pairs(row):
      # Stains and fundus have vivid colours of their own.
      if question == COUNT and "of the brain" in row["caption"]:
        total += 1
        wrong += regions(vivid) != int(answer.split()[0])
  assert total > 20
  assert wrong <= 0.05 * total  # Lossy colours cut a ring in two now and then.


def regions(mask, smallest=12):
  left = {tuple(place) for place in np.argwhere(mask).tolist()}
  count = 0
  while left:
    edge, size = [left.pop()], 0
    while edge:
      row, column = edge.pop()
      size += 1
      for i in range(-2, 3):
        for j in range(-2, 3):
          if (row + i, column + j) in left:
            left.remove((row + i, column + j))
            edge.append((row + i, column + j))
    count += size >= smallest
  return count


@pytest.mark.parametrize("domain", MIN_IMAGES)
def test_yes_and_no_are_balanced(records, domain):
  for split in SPLITS:
    found = collections.Counter(
      answer
      for row in records[domain, split]
      for _, answer, kind in pairs(row)
      if kind == "yes_no"
    )
    if found:
      assert set(found) == {"yes", "no"}
      assert max(found.values()) <= 0.6 * sum(found.values())


def test_question_order_depends_on_the_id_alone():
  def sample(name, count):
    questions = tuple(Question("k", f"q{i}", f"a{i}") for i in range(count))
    return Sample(
      name, "general", "train", "s", ("c",), None, "", questions, ()
    )

  def order(name):
    row = assemble.to_record(assemble.Encoded(sample(name, 5), None, None))
    return [turn["value"] for turn in row["turns"][::2]]

  assert order("a") == order("a")
  assert len({tuple(order(name)) for name in "abcdefgh"}) > 4
  assert sorted(order("a")) == [f"q{i}" for i in range(5)]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"split": "test"}, "source: 's' of general is in train and in test"),
    ({"id": "a"}, "stands for two samples"),
    ({"split": "dev"}, "is in 'dev', want one of"),
    ({"questions": ()}, "has 0, want 1 to 5"),
  ],
)
def test_a_set_that_breaks_its_promise_is_not_written(change, message):
  good = {
    "domain": "general",
    "split": "train",
    "source": "s",
    "concepts": ("c",),
    "image": None,
    "caption": "",
    "questions": (Question("k", "q", "a"),),
    "provenance": (),
  }
  first = Sample(id="a", **good)
  second = Sample(**({"id": "b", **good} | change))
  items = [assemble.Encoded(s, None, None) for s in (first, second)]
  with pytest.raises(ValueError, match=message):
    assemble.check(items)


def test_few_colours_are_stored_without_loss_and_photographs_small():
  rng = np.random.default_rng(0)
  flat = rng.integers(0, 2, (IMAGE_SIZE, IMAGE_SIZE, 1), np.uint8) * 255
  flat = np.repeat(flat, 3, axis=2)
  data = assemble.encode_image(Image.fromarray(flat))
  assert np.array_equal(
    np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), flat
  )
  ramp = np.indices((IMAGE_SIZE, IMAGE_SIZE)).sum(0)[..., None] * [1, 0.9, 0.8]
  noisy = ramp + rng.normal(0, 4, (IMAGE_SIZE, IMAGE_SIZE, 3))
  photo = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
  assert len(assemble.encode_image(photo)) < 6000


def test_pictures_of_another_size_are_refused():
  with pytest.raises(ValueError, match="want 96 pixels square in RGB"):
    assemble.encode_image(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE - 1)))


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer()


def test_tokenizer_specials_stand_first_and_zero_pads(tokenizer):
  assert (tokenizer.pad_id, tokenizer.bos_id) == (0, 1)
  assert (tokenizer.eos_id, tokenizer.image_id) == (2, 3)
  assert 600 <= tokenizer.vocab_size <= 1200


@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_any_text_comes_back_from_its_ids(text):
  t = Tokenizer()
  assert t.decode(t.encode(text)) == text


@pytest.mark.parametrize(
  "word",
  [*VICUNA_SYSTEM.replace(".", "").replace(",", "").split()]
  + ["USER", "ASSISTANT", "left", "right"],
)
def test_frequent_words_are_one_token(tokenizer, word):
  word = word.removesuffix("'s")
  assert len(tokenizer.encode(word)) == 1


def test_digits_stand_alone(tokenizer):
  assert tokenizer.encode("47") == [
    *tokenizer.encode("4"),
    tokenizer.encode("7")[-1],
  ]


def test_texts_of_the_set_need_no_bytes(tokenizer, records):
  row = records["biomedical", "train"][0]
  ids = tokenizer.encode(row["caption"])
  assert min(ids) >= 260


@pytest.mark.rebuild
def test_the_packages_give_the_same_set(tmp_path, records):
  out = tmp_path / "built"
  command = [sys.executable, "-m", "mole_jax.data.builders.embedded"]
  subprocess.run([*command, "--out", str(out)], check=True)
  for name in ("manifest.jsonl.gz", "tokenizer.json", "LICENSES.txt"):
    assert (out / name).read_bytes() == (BUILT / name).read_bytes(), name
  for (domain, split), rows in records.items():
    again = Records(out / "embedded" / domain / "1.0.0", split)
    assert list(again) == rows, (domain, split)
