import collections
import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mole_jax.data import images as images_lib
from mole_jax.data import records
from mole_jax.data.builders.llava_json import samples
from mole_jax.data.builders.prepared import shards, spool, stored
from mole_jax.data.builders.prepared.build import TooManySkipped, build
from tests.data.builders.prepared_input import (
  contents,
  encode,
  entry,
  sample_input,
  write,
)


def folder_of(tmp_path, name="toy"):
  return tmp_path / "out" / name / "1.0.0"


def test_records_hold_what_the_file_says_with_the_bytes_of_its_images(tmp_path):
  file, pictures, entries = sample_input(tmp_path)
  build(file, pictures, name="toy", out=tmp_path / "out", num_shards=2)
  rows = {
    row["id"]: row for row in records.Records(folder_of(tmp_path), "train")
  }
  assert len(rows) == len(entries)
  for each in entries:
    row = rows[each["id"]]
    name = each.get("image")
    assert row["images"] == ([(pictures / name).read_bytes()] if name else [])
    assert [(t["from"], t["value"]) for t in row["turns"]] == [
      (t["from"], t["value"]) for t in each["conversations"]
    ]
    # Stage 1 learns the answer about a picture.
    answer = each["conversations"][1]["value"]
    assert row["caption"] == (answer if name else "")
    assert row["source"] == (name or each["id"])
    assert row["domain"] == "toy"


def test_only_one_question_about_a_picture_makes_a_caption(tmp_path):
  turns = entry(0, "a.png")["conversations"]
  entries = [
    {"id": "two", "image": "a.png", "conversations": turns + turns[:1]},
    {"id": "one", "image": "a.png", "conversations": turns},
  ]
  entries[0]["conversations"] = [
    *turns,
    {"from": "human", "value": "more?"},
    {"from": "gpt", "value": "no"},
  ]
  entries[1]["system"] = "Be brief."
  file, pictures = write(
    tmp_path, entries, {"a.png": encode(np.zeros((4, 4, 3)))}
  )
  build(file, pictures, name="toy", out=tmp_path / "out")
  rows = records.Records(folder_of(tmp_path), "train")
  assert {row["id"]: row["caption"] for row in rows} == {"two": "", "one": "a"}


def test_the_number_of_workers_changes_no_byte(tmp_path):
  file, pictures, entries = sample_input(tmp_path, 40)
  (pictures / "3.png").write_bytes(b"broken")  # The log is compared too.
  (pictures / "30.png").write_bytes(b"broken")
  built = []
  for workers in (1, 3):
    out = tmp_path / f"out{workers}"
    build(
      file, pictures, name="toy", out=out, num_workers=workers, num_shards=7,
      max_skipped=0.1,
    )  # fmt: skip
    built.append(contents(out))
  assert built[0] == built[1]
  assert len(built[0]) == 2 * 7 + 5
  assert built[0]["toy/1.0.0/skipped.jsonl"].count(b"\n") == 2


def test_the_order_is_shuffled_by_the_seed(tmp_path):
  file, _ = write(tmp_path, [entry(i) for i in range(30)])
  orders = []
  for seed in (0, 1):
    build(file, None, name=f"toy{seed}", out=tmp_path / "out", seed=seed)
    rows = records.Records(folder_of(tmp_path, f"toy{seed}"), "train")
    orders.append([row["id"] for row in rows])
  in_file = [f"id-{i}" for i in range(30)]
  assert sorted(orders[0]) == sorted(orders[1]) == sorted(in_file)
  assert in_file != orders[0] != orders[1] != in_file


def test_conversations_that_share_an_id_are_all_kept_under_ids_of_their_own(
  tmp_path,
):
  entries = [{**entry(i), "id": "same"} for i in range(3)]
  file, _ = write(tmp_path, entries)
  about = build(file, None, name="toy", out=tmp_path / "out")
  rows = records.Records(folder_of(tmp_path), "train")
  assert len({row["id"] for row in rows}) == 3
  assert about["renamed_ids"] == 2


def test_the_domain_is_the_record_s_or_the_option_s(tmp_path):
  entries = [entry(0), {**entry(1), "domain": "medical"}]
  file, _ = write(tmp_path, entries)
  about = build(file, None, name="toy", out=tmp_path / "out", domain="general")
  rows = records.Records(folder_of(tmp_path), "train")
  domains = {row["id"]: row["domain"] for row in rows}
  assert domains == {"id-0": "general", "id-1": "medical"}
  assert about["records_by_domain"] == {"general": 1, "medical": 1}


def test_tfds_reads_the_set_as_it_reads_the_embedded_one(tmp_path):
  file, pictures, _ = sample_input(tmp_path)
  build(file, pictures, name="toy", out=tmp_path / "out", num_shards=3)
  embedded = records.EMBEDDED["embedded/general"]
  assert json.loads((folder_of(tmp_path) / "features.json").read_text()) == (
    json.loads((embedded / "features.json").read_text())
  )
  builder = tfds.builder_from_directory(folder_of(tmp_path))
  assert builder.info.splits["train"].num_examples == 12
  assert len(builder.as_data_source("train[:50%]")) == 6


@pytest.mark.parametrize("num_turns", [0, 2])
def test_records_are_serialised_as_tfds_does(tmp_path, num_turns):
  file, _ = write(tmp_path, [entry(0)])
  build(file, None, name="toy", out=tmp_path / "out")
  features = tfds.builder_from_directory(folder_of(tmp_path)).info.features
  turn = {"from": "gpt", "value": "čaj ☕", "kind": "count"}
  record = {
    "id": "1", "domain": "", "caption": "ü", "source": "s",
    "images": [b"\xff\x00", b""][:num_turns], "turns": [turn] * num_turns,
  }  # fmt: skip
  theirs = features.serialize_example(features.encode_example(record))
  parse = stored.tf_example_pb2.Example.FromString
  assert parse(stored.serialize(record)) == parse(theirs)


def test_a_row_of_lengths_stands_for_each_record(tmp_path):
  entries = [{**entry(i), "domain": "ba"[i % 2]} for i in range(9)]
  entries[4]["system"] = "Be brief."
  image = encode(np.zeros((4, 4, 3)))
  entries[5] = {**entry(5, ["x.png", "x.png"]), "domain": "a"}
  entries[5]["conversations"][0]["value"] = "<image><image>"
  file, pictures = write(tmp_path, entries, {"x.png": image})
  about = build(file, pictures, name="toy", out=tmp_path / "out", num_shards=2)
  lengths = np.load(folder_of(tmp_path) / "train-lengths.npy")
  rows = records.Records(folder_of(tmp_path), "train")
  assert len(lengths) == len(rows) == 9
  for length, row in zip(lengths, rows, strict=True):
    texts = [turn["value"] for turn in row["turns"]]
    answers = [t["value"] for t in row["turns"] if t["from"] == "gpt"]
    assert length["images"] == len(row["images"])
    assert length["turns"] == len(texts)
    assert length["characters"] == len("".join(texts))
    assert length["answer_characters"] == len("".join(answers))
    assert about["domains"][length["domain"]] == row["domain"]
  assert lengths["images"].max() == 2
  assert lengths["turns"].max() == 3


def quarters(height, width):
  """A picture whose four quarters differ, so that turning it shows."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[: height // 2, :, 0] = 255
  pixels[:, : width // 2, 1] = 255
  return pixels


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_large_image_is_stored_upright_and_smaller_in_its_format(
  tmp_path, format
):
  exif = Image.Exif()
  exif[0x0112] = 6  # Turn it by 90 degrees to the right.
  large = encode(quarters(40, 64), format, exif=exif.tobytes())
  file, pictures = write(tmp_path, [entry(0, "large")], {"large": large})
  about = build(
    file, pictures, name="toy", out=tmp_path / "out", max_image_side=32
  )
  (row,) = records.Records(folder_of(tmp_path), "train")
  stored = Image.open(io.BytesIO(row["images"][0]))
  assert stored.format == format
  assert stored.size == (20, 32)
  assert stored.getexif().get(0x0112, 1) == 1
  # Corners as in the upright picture.
  upright = np.asarray(images_lib.open_image(large), int)
  small = np.asarray(stored.convert("RGB"), int)
  for corner in ((2, 2), (2, -3), (-3, 2), (-3, -3)):
    assert np.abs(small[corner] - upright[corner]).max() < 40
  assert about["resized_images"] == 1


def test_an_image_of_the_longest_side_is_kept_byte_for_byte(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(quarters(20, 32), "JPEG", exif=exif.tobytes())
  file, pictures = write(tmp_path, [entry(0, "a")], {"a": data})
  about = build(
    file, pictures, name="toy", out=tmp_path / "out", max_image_side=32
  )
  (row,) = records.Records(folder_of(tmp_path), "train")
  assert row["images"] == [data]
  assert about["resized_images"] == 0
  assert about["image_bytes"] == len(data)


def test_every_record_is_used_or_skipped_with_a_reason_and_its_line(tmp_path):
  good = encode(np.zeros((8, 8, 3)), "JPEG")
  entries = [entry(i, "good.jpg") for i in range(6)]
  entries[1]["image"] = "empty.jpg"
  entries[2]["image"] = "cut.jpg"
  entries[3]["image"] = "missing.jpg"
  entries[4]["conversations"] = []
  file, pictures = write(
    tmp_path,
    entries,
    {"good.jpg": good, "empty.jpg": b"", "cut.jpg": good[: len(good) // 2]},
  )
  about = build(
    file, pictures, name="toy", out=tmp_path / "out", max_skipped=1,
    num_shards=2,
  )  # fmt: skip
  assert about["read"] == 6
  assert about["used"] == 2
  assert about["failed"] == 0
  assert about["skipped"] == {
    "image_broken": 2,
    "image_missing": 1,
    "no_turns": 1,
  }
  lines = (folder_of(tmp_path) / "skipped.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  # Entry i stands on line i + 1.
  assert [(row["line"], row["id"]) for row in logged] == [
    (i + 1, f"id-{i}") for i in (1, 2, 3, 4)
  ]
  assert {row["file"] for row in logged} == {"train.json"}
  reasons = collections.Counter(row["reason"] for row in logged)
  assert reasons == about["skipped"]
  assert "empty.jpg" in logged[0]["message"]


def test_a_shard_without_a_usable_record_spoils_no_other(tmp_path):
  file, pictures, _ = sample_input(tmp_path, 4)
  (pictures / "1.png").write_bytes(b"")
  build(
    file, pictures, name="toy", out=tmp_path / "out", num_shards=4,
    max_skipped=0.5,
  )  # fmt: skip
  rows = records.Records(folder_of(tmp_path), "train")
  assert {row["id"] for row in rows} == {"id-0", "id-2", "id-3"}


def test_too_many_bad_records_stop_it_before_a_shard_is_written(tmp_path):
  entries = [entry(i) for i in range(10)]
  entries[3]["conversations"] = []
  entries[7]["conversations"][1]["value"] = ""
  file, _ = write(tmp_path, entries)
  with pytest.raises(TooManySkipped) as caught:
    build(file, None, name="toy", out=tmp_path / "out", max_skipped=0.1)
  message = str(caught.value)
  assert "2 of 10 records are bad (20.00%)" in message
  assert "allows: empty_answer 1, no_turns 1." in message
  assert "--max-skipped 0.22" in message
  log = tmp_path / "out" / "toy" / "1.0.0.partial" / "skipped.jsonl"
  assert str(log) in message
  assert len(log.read_text().splitlines()) == 2
  # Either way out works.
  about = build(file, None, name="toy", out=tmp_path / "out", max_skipped=0.22)
  assert about["used"] == 8
  file, _ = write(tmp_path, [entry(i) for i in range(10)])
  about = build(file, None, name="toy2", out=tmp_path / "out")
  assert about["used"] == 10


def test_a_mended_input_counts_as_long_as_no_shard_is_written(tmp_path):
  file, pictures, entries = sample_input(tmp_path, 6)
  (pictures / "3.png").unlink()
  options = {"name": "toy", "out": tmp_path / "out"}
  with pytest.raises(TooManySkipped, match="image_missing 1"):
    build(file, pictures, **options)
  file, pictures, _ = sample_input(tmp_path, 6)
  assert build(file, pictures, **options)["used"] == 6


def test_too_many_bad_images_stop_it_and_are_named(tmp_path):
  file, pictures, _ = sample_input(tmp_path, 12)
  for i in (0, 1, 3):
    (pictures / f"{i}.png").write_bytes(b"no image")
  with pytest.raises(TooManySkipped, match="image_broken ") as caught:
    build(
      file, pictures, name="toy", out=tmp_path / "out", num_shards=12,
      max_skipped=0.1,
    )  # fmt: skip
  log = tmp_path / "out" / "toy" / "1.0.0.partial" / "skipped.jsonl"
  assert str(log) in str(caught.value)
  logged = [json.loads(line)["id"] for line in log.read_text().splitlines()]
  assert len(logged) == 2
  assert set(logged) < {"id-0", "id-1", "id-3"}
  assert not folder_of(tmp_path).exists()


def test_a_file_that_cannot_be_read_on_ends_it_with_the_counts(tmp_path):
  file, _ = write(tmp_path, [entry(0), entry(1)])
  file.write_text(file.read_text().replace("]\n", ",]\n"))
  with pytest.raises(ValueError, match="comma.*2 records that can be used"):
    build(file, None, name="toy", out=tmp_path / "out")
  assert not folder_of(tmp_path).exists()


def test_an_error_that_nobody_foresaw_costs_one_record_which_failed(
  tmp_path, monkeypatch
):
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path in paths:
    path.write_bytes(encode(np.zeros((2, 2, 3))))
  turns = entry(0, "x")["conversations"]
  rows = [
    samples.Sample(
      path.stem,
      i,
      [{**turn, "kind": ""} for turn in turns],
      [samples.Image(path, None)],
      None,
      "unit",
    )
    for i, path in enumerate(paths)
  ]
  spool.write(rows, tmp_path, file="f.json", domain="d", seed=0, num_shards=1)
  load = samples.load_image

  def load_image(image):
    if image.path == paths[1]:
      raise RuntimeError("the disk made a noise")
    return load(image)

  monkeypatch.setattr(samples, "load_image", load_image)
  job = shards.Job(str(tmp_path), str(tmp_path), "f.json", "toy", 0, 1024)
  known = shards.write_shard(job)
  assert (known["records"], known["failed"], known["skipped"]) == (2, 1, {})
  (line,) = (tmp_path / "shard-00000.skipped.jsonl").read_text().splitlines()
  assert "RuntimeError: the disk made a noise" in line


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "LLaVA-665k"}, "e.g. 'llava_665k'"),
    ({"num_workers": 0}, "workers=0; wanted at least 1"),
    ({"num_shards": 0}, "shards=0; wanted at least 1"),
    ({"max_image_side": 0}, "max_image_side=0; wanted at least 1"),
    ({"max_skipped": 1.5}, "max_skipped=1.5; wanted a share"),
  ],
)
def test_a_wrong_option_is_named_with_what_was_wanted(
  tmp_path, options, message
):
  file, pictures, _ = sample_input(tmp_path, 1)
  with pytest.raises(ValueError, match=message):
    build(file, pictures, out=tmp_path / "out", **{"name": "toy", **options})


def test_a_wrong_path_is_named(tmp_path):
  file, pictures, _ = sample_input(tmp_path, 1)
  with pytest.raises(ValueError, match="not there"):
    build(tmp_path / "x.json", pictures, name="toy", out=tmp_path / "out")
  with pytest.raises(ValueError, match="is no folder"):
    build(file, tmp_path / "nowhere", name="toy", out=tmp_path / "out")
