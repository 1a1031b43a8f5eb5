import pathlib
import pickle
import subprocess
import sys

import pytest

from mole_jax.data import records

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory, make_records):
  """Six records in the layout of the embedded set, one split."""
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  turn = {"from": text, "value": text, "kind": text}
  features = tfds.features.FeaturesDict(
    {
      "id": text,
      "domain": text,
      "caption": text,
      "source": text,
      "images": tfds.features.Sequence(text),
      "turns": tfds.features.Sequence(turn),
    }
  )
  directory = tmp_path_factory.mktemp("toy") / "1.0.0"
  directory.mkdir()
  info = tfds.core.DatasetIdentity(
    name="toy",
    version=tfds.core.Version("1.0.0"),
    data_dir=str(directory),
    module_name="toy",
  )
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(builder=info, features=features),
    max_examples_per_shard=4,  # Two shards.
    file_format="array_record",
  )
  writer.initialize_splits(["train"])
  writer.add_examples({"train": make_records(6)})
  writer.close_all()
  return directory


def test_records_come_back_as_plain_python(toy_directory, make_records):
  rows = records.Records(toy_directory, "train")
  assert len(rows) == 6
  assert list(rows) == make_records(6)


def test_access_is_random_and_from_either_end(toy_directory, make_records):
  rows = records.Records(toy_directory, "train")
  assert rows[4] == make_records(6)[4]
  assert rows[-1] == make_records(6)[-1]
  assert rows[1:3] == make_records(6)[1:3]
  with pytest.raises(IndexError, match="record 6 of 6"):
    rows[6]


def test_a_copy_in_another_process_reads_the_same(toy_directory):
  rows = records.Records(toy_directory, "train")
  assert pickle.loads(pickle.dumps(rows))[3] == rows[3]


def test_an_unknown_split_names_the_right_ones(toy_directory):
  with pytest.raises(ValueError, match=r"split='tset'.*one of \['train'\]"):
    records.Records(toy_directory, "tset")


@pytest.mark.parametrize(
  ("name", "suggestion"),
  [("embedded/documents", "embedded/document"), ("general", None)],
)
def test_an_unknown_name_suggests_the_nearest(name, suggestion):
  with pytest.raises(ValueError, match="embedded/biomedical") as caught:
    records.open_records(name, "train")
  hint = f"Did you mean {suggestion!r}?"
  assert (hint in str(caught.value)) == (suggestion is not None)


def test_reading_imports_neither_jax_nor_tensorflow(toy_directory):
  """jax would touch the accelerator from a data worker."""
  program = f"""
import sys
from mole_jax.data import conversation, images, mixture, pipeline
from mole_jax.data import records, schedule, tokenizer
rows = records.Records({str(toy_directory)!r}, "train")
assert rows[0]["turns"], rows[0]
print([m for m in ("jax", "tensorflow", "torch") if m in sys.modules])
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == "[]\n", done.stderr
