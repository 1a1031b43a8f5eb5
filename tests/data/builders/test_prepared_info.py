import io
import json
import os
import re

import numpy as np
import pytest
import rich.console

from mole_jax import prepare
from mole_jax.data import encoding, mixture, records, templates
from mole_jax.data.builders.prepared import info
from mole_jax.data.builders.prepared.build import build
from tests.data.builders.prepared_input import (
  encode,
  entry,
  sample_input,
  write,
)


@pytest.fixture
def built(tmp_path):
  """Twelve records, one of them bad and one of them large, in two shards."""
  file, pictures, entries = sample_input(tmp_path)
  (pictures / "0.png").write_bytes(b"broken")
  (pictures / "1.png").write_bytes(encode(np.zeros((9, 9, 3))))
  build(
    file, pictures, name="toy", out=tmp_path / "out", num_shards=2,
    max_skipped=0.1, max_image_side=8, domain="general",
  )  # fmt: skip
  return tmp_path / "out" / "toy" / "1.0.0"


def printed(description):
  console = rich.console.Console(file=io.StringIO(), width=120)
  for table in info.tables(description):
    console.print(table)
  return console.file.getvalue()


def test_info_says_what_became_of_every_record(built):
  description = info.describe(built, use_hashes=True)
  assert description.problems == []
  text = printed(description)
  lines = [
    re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.split("\n")
  ]
  rows = {line[0]: line[1] for line in lines if len(line) == 2}
  assert rows["split"] == "train: 11 records"
  assert rows["read"] == "12"
  assert rows["skipped, image_broken"] == "1"
  assert rows["failed"] == "0"
  assert rows["domain general"] == "11 records"
  assert rows["images"].startswith("7 (")
  assert rows["images"].endswith("1 made smaller")
  assert description.about["wanted"]["file_sha256"] in text
  assert "read 12" not in text


def test_the_histograms_count_every_record_once(built):
  description = info.describe(built)
  _, characters, images = info.tables(description)
  for table in (characters, images):
    counts = [int(cell.replace(",", "")) for cell in table.columns[1].cells]
    assert sum(counts) == 11
  assert list(images.columns[0].cells) == ["0", "1"]
  assert list(images.columns[1].cells) == ["4", "7"]
  # Bounds hold what is counted between them.
  lengths = description.lengths["characters"]
  for label, count in zip(
    characters.columns[0].cells, characters.columns[1].cells, strict=True
  ):
    low, _, high = label.partition(" to ")
    inside = (lengths >= int(low)) & (lengths <= int(high or low))
    assert inside.sum() == int(count)


def test_a_missing_or_cut_shard_is_found_by_its_size(built):
  first, second = sorted(built.glob("*.array_record-*"))
  with first.open("r+b") as file:
    file.truncate(100)
  second.unlink()
  one, two = info.describe(built).problems
  assert f"{first}: 100 bytes, wanted" in one
  assert f"{second} is missing" in two
  assert "build it anew" in one and "build it anew" in two


def test_a_shard_of_another_set_is_found_by_its_records(built, tmp_path):
  file, pictures, _ = sample_input(tmp_path / "other", 3)
  build(file, pictures, name="other", out=tmp_path / "out")
  (wrong,) = (tmp_path / "out" / "other" / "1.0.0").glob("*.array_record-*")
  first = min(built.glob("*.array_record-*"))
  data = wrong.read_bytes()
  assert len(data) == first.stat().st_size  # Whole blocks: alike by size.
  first.write_bytes(data)
  (problem,) = info.describe(built).problems
  assert "3 records, wanted" in problem


def test_a_flipped_bit_is_found_by_its_hash(built):
  first = min(built.glob("*.array_record-*"))
  data = bytearray(first.read_bytes())
  place = data.index(bytes(64)) // 2  # Amid the records: zeros follow.
  data[place] ^= 1
  first.write_bytes(data)
  assert info.describe(built).problems == []
  (problem,) = info.describe(built, use_hashes=True).problems
  assert "sha256" in problem and str(first) in problem


@pytest.mark.parametrize("key", ["read", "used", "failed"])
def test_counts_that_do_not_add_up_are_found(built, key):
  about = json.loads((built / "prepared.json").read_text())
  about[key] += 1
  (built / "prepared.json").write_text(json.dumps(about))
  assert any("read = used +" in p for p in info.describe(built).problems)


def test_a_log_that_lacks_a_line_is_found(built):
  (built / "skipped.jsonl").write_text("")
  (problem,) = info.describe(built).problems
  assert "0 lines; wanted 1" in problem


def test_only_built_sets_are_described():
  folder = records.EMBEDDED["embedded/general"]
  with pytest.raises(ValueError, match="prepare build made"):
    info.describe(folder)


@pytest.mark.parametrize("which", ["folder", "around", "relative"])
def test_records_are_opened_by_the_path_of_their_set(built, monkeypatch, which):
  monkeypatch.chdir(built.parents[1])
  path = {
    "folder": str(built),
    "around": str(built.parent),
    "relative": "toy/1.0.0",
  }[which]
  rows = records.open_records(path, "train")
  assert list(rows) == list(records.Records(built, "train"))
  assert len(rows) == 11
  assert records.open_records("toy", "train")[0] == rows[0]


def test_a_mixture_takes_a_path_beside_an_embedded_name(built, toy_tokenizer):
  own, embedded = mixture.load_mixture(
    [
      mixture.Source(str(built.parent), "train", "chat", 1.0),
      mixture.Source("embedded/document", "test", "chat", 1.0),
    ],
    lambda format: encoding.Encoder(
      toy_tokenizer,
      format,
      num_image_tokens=3,
      max_length=64,
      max_images=1,
      system="",
      use_bos=True,
      template=templates.VICUNA,
    ),
    domains=("document", "general"),
    max_skipped=1.0,
  )
  assert len(own) == 11
  assert set(own.domains) == {1}
  assert own.accounting()["read"] == 11
  assert set(embedded.domains) == {0}


def test_a_path_without_a_data_set_says_what_was_wanted(tmp_path):
  with pytest.raises(ValueError, match="there is no folder.*OUT/NAME"):
    records.open_records(str(tmp_path / "nothing"), "train")
  with pytest.raises(ValueError, match="holds no data set"):
    records.open_records(str(tmp_path), "train")


def test_a_data_set_that_is_not_finished_says_how_to_go_on(tmp_path):
  file, pictures, _ = sample_input(tmp_path)
  (pictures / "0.png").unlink()
  with pytest.raises(ValueError, match="image_missing"):
    build(file, pictures, name="toy", out=tmp_path / "out")
  for path in ("out/toy", "out/toy/1.0.0.partial"):
    with pytest.raises(ValueError, match="not finished; run the command"):
      records.open_records(str(tmp_path / path), "train")


def test_one_of_several_versions_must_be_named(built):
  other = built.with_name("2.0.0")
  other.mkdir()
  (other / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match="2 data sets; name one of"):
    records.open_records(str(built.parent), "train")


def test_the_command_builds_and_describes(tmp_path, capsys):
  file, pictures, _ = sample_input(tmp_path)
  out = tmp_path / "out"
  command = ["build", "--json", str(file), "--images", str(pictures)]
  command += ["--name", "toy", "--out", str(out), "--workers", "2"]
  assert prepare.main(command) == 0
  text = capsys.readouterr().out
  assert "read 12 = used 12 + skipped 0" in text
  assert prepare.main(["info", str(out / "toy"), "--hashes"]) == 0
  assert "All files are whole" in capsys.readouterr().out
  next((out / "toy" / "1.0.0").glob("*.array_record*")).unlink()
  assert prepare.main(["info", str(out / "toy")]) == 1
  assert "is missing" in capsys.readouterr().err


def test_the_command_says_what_stopped_it(tmp_path, capsys):
  file, _ = write(tmp_path, [entry(0), {**entry(1), "conversations": []}])
  command = ["build", "--json", str(file), "--name", "toy"]
  command += ["--out", str(tmp_path / "out")]
  assert prepare.main(command) == 1
  assert "1 of 2 records are bad" in capsys.readouterr().err
  assert prepare.main([*command, "--max-skipped", "0.55"]) == 0
  text = capsys.readouterr().out
  assert "read 2 = used 1 + skipped 1 + failed 0" in text
  assert "skipped: no_turns 1; " in text
  assert prepare.main([*command, "--domain", "x"]) == 2
  assert "domain: 'toy' -> 'x'" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    prepare.main([*command, "--max-skipped", "5%"])
  assert "'5%': wanted a share from 0 to 1" in capsys.readouterr().err
  assert not os.listdir(tmp_path / "out" / "toy")[1:]
