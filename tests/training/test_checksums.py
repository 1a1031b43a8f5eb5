"""A bit that flips on disk: noticed, named, set aside, trained again."""

import shutil

import numpy as np
import pytest

from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, checksums, files
from tests.training import small_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
  """A run of both stages with two steps of each, and its parameters."""
  run = tmp_path_factory.mktemp("run")
  config = small_run.make_config()
  files.write_json(run / "config.json", config)
  base, _ = small_run.train(config, "base", run, text)
  written = base_lib.write_base(run / "base", base)
  reference = base_lib.BaseReference("base", written.sha256)
  final, _ = small_run.train(config, "mole", run, text, base, reference)
  assert checkpoint.list_steps(run, "mole") == [3, 6]
  return run, config, base, reference, final


@pytest.fixture
def run(trained, tmp_path):
  """A copy to do damage to."""
  return shutil.copytree(trained[0], tmp_path / "run")


def step(run, number):
  return run / "mole" / "checkpoints" / str(number)


def data_file(run, number, item="trainable"):
  """The largest file of an item of a step."""
  found = [f for f in (step(run, number) / item).rglob("*") if f.is_file()]
  return max(found, key=lambda file: file.stat().st_size)


def flip(file, bit=None):
  data = bytearray(file.read_bytes())
  bit = 4 * len(data) if bit is None else bit
  data[bit // 8] ^= 1 << bit % 8
  file.write_bytes(data)


def test_a_step_that_is_whole_has_no_damage(run):
  assert (step(run, 3) / checksums.FILE).exists()
  assert checksums.find_damage(step(run, 6)) is None
  assert checkpoint.set_damaged_aside(run, "mole") == []


def test_a_bit_in_any_file_is_found_or_changes_nothing(run, trained):
  folder = step(run, 6)
  names = sorted(
    file.relative_to(folder) for file in folder.rglob("*") if file.is_file()
  )
  assert len(names) > 8
  unnoticed = []
  for name in names:
    pristine = (folder / name).read_bytes()
    if pristine:
      flip(folder / name)
      if checksums.find_damage(folder) is None:
        unnoticed.append(name.as_posix())
        read = checkpoint.read_model(run / "mole")
        for path, leaf in trained[-1].items():
          np.testing.assert_array_equal(read.params[path], leaf, err_msg=path)
      (folder / name).write_bytes(pristine)
  assert set(unnoticed) <= {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has changed"),
    (lambda file: file.unlink(), "is missing"),
    (lambda file: file.with_name("other").touch(), "was not there when"),
  ],
)
def test_what_is_wrong_is_named(run, damage, message):
  file = data_file(run, 6)
  damage(file)
  found = checksums.find_damage(step(run, 6))
  assert message in found and str(file.parent) in found


@pytest.mark.parametrize(
  ("content", "message"), [("{", "is not valid JSON"), ("[]", "no list of")]
)
def test_a_list_that_is_broken_is_damage(run, content, message):
  (step(run, 6) / checksums.FILE).write_text(content)
  assert message in checksums.find_damage(step(run, 6))


def test_a_step_of_an_earlier_version_has_no_list(run):
  (step(run, 6) / checksums.FILE).unlink()
  flip(data_file(run, 6))
  assert checksums.find_damage(step(run, 6)) is None


def test_a_damaged_step_is_not_read(run):
  flip(data_file(run, 6))
  with pytest.raises(ValueError, match="has changed since") as error:
    checkpoint.read_model(run)
  assert "step 6 of" in str(error.value)
  assert "name another step, of [3]" in str(error.value)
  assert checkpoint.read_model(run / "mole/checkpoints/3").step == 3


def test_reading_a_model_does_not_read_its_optimizer(run):
  flip(data_file(run, 6, "opt_state"))
  assert checkpoint.read_model(run).step == 6
  assert len(checkpoint.set_damaged_aside(run, "mole")) == 2


def test_a_stage_goes_on_from_the_newest_step_that_is_whole(run, trained, text):
  flip(data_file(run, 6, "opt_state"))
  lines = checkpoint.set_damaged_aside(run, "mole")
  assert lines[0].startswith("step 6 of stage mole is damaged: ")
  assert lines[1:] == ["stage mole goes on from step 3"]
  aside = run / "mole" / checksums.DAMAGED / "6"
  assert aside.is_dir() and str(aside) in lines[0]
  assert checkpoint.list_steps(run, "mole") == [3]
  _, config, base, reference, final = trained
  again, rows = small_run.train(config, "mole", run, text, base, reference)
  assert min(rows) == 4
  for name, leaf in final.items():
    np.testing.assert_array_equal(again[name], leaf, err_msg=name)
  assert checksums.find_damage(step(run, 6)) is None


def test_without_a_whole_step_a_stage_starts_anew_and_loses_nothing(run):
  for number in (3, 6):
    flip(data_file(run, number))
  lines = checkpoint.set_damaged_aside(run, "mole")
  assert [line.split(":")[0] for line in lines] == [
    "step 6 of stage mole is damaged",
    "step 3 of stage mole is damaged",
    "stage mole starts anew",
  ]
  aside = run / "mole" / checksums.DAMAGED
  shutil.copytree(aside / "6", step(run, 6))
  assert str(aside / "6-2") in checkpoint.set_damaged_aside(run, "mole")[0]
  assert sorted(entry.name for entry in aside.iterdir()) == ["3", "6", "6-2"]
