"""Reading run directories: what is missing is named, what is odd tolerated."""

import json

import numpy as np
import pytest

from mole_jax.reporting import runs
from tests.reporting.run_directories import write_run


def test_nulls_in_a_log_become_nan_and_the_rest_stays(tmp_path):
  run = runs.read_run(write_run(tmp_path / "run"))
  base = run.stages[0]
  losses = base.series("domain_loss", "document")
  assert len(losses) == len(base.steps) == 60
  assert set(base.steps[np.isnan(losses)]) == set(range(70, 601, 70))
  assert not base.has("expert_load")
  assert run.stages[1].series("expert_load").shape == (30, 4, 3)


def test_null_inside_a_list_becomes_nan():
  rows = ({"step": 1, "x": [0.5, None]}, {"step": 2})
  values = runs.Stage("s", rows).series("x")
  np.testing.assert_array_equal(values, [[0.5, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize("file", ["run.json", "config.json"])
def test_missing_file_is_named_with_the_command_that_writes_it(tmp_path, file):
  directory = write_run(tmp_path / "run")
  (directory / file).unlink()
  with pytest.raises(ValueError) as error:
    runs.read_run(directory)
  assert str(directory / file) in str(error.value)
  assert "mole_jax.main --config=configs/" in str(error.value)
  assert f"--workdir={directory}" in str(error.value)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is no directory"):
    runs.read_run(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=r"run\.json is missing"):
    runs.read_run(tmp_path)


def test_a_run_without_any_log_is_refused(tmp_path):
  directory = write_run(tmp_path / "run")
  for stage in ("base", "mole"):
    (directory / stage / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match=r"base/metrics\.jsonl has no logged"):
    runs.read_run(directory)


@pytest.mark.parametrize(
  "file", ["metrics.json", "routing.json", "samples.json", "predictions.jsonl"]
)
def test_missing_part_of_an_evaluation_is_noted_not_refused(tmp_path, file):
  directory = write_run(tmp_path / "run")
  (directory / "evaluation" / file).unlink()
  run = runs.read_run(directory)
  (note,) = run.missing
  assert str(directory / "evaluation" / file) in note
  assert "mole_jax.main" in note


def test_half_a_last_line_is_dropped_and_a_broken_middle_refused(tmp_path):
  directory = write_run(tmp_path / "run")
  path = directory / "mole" / "metrics.jsonl"
  whole = path.read_text()
  path.write_text(whole + '{"step": 310, "lo')
  assert runs.read_run(directory).stages[1].steps[-1] == 300
  lines = whole.splitlines()
  path.write_text("\n".join([lines[0], "{", *lines[1:]]))
  with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is no JSON"):
    runs.read_run(directory)


def test_an_evaluation_without_its_keys_is_refused(tmp_path):
  directory = write_run(tmp_path / "run")
  path = directory / "evaluation" / "routing.json"
  path.write_text(json.dumps({"num_layers": 4, "num_experts": 3}))
  with pytest.raises(ValueError, match=r"routing\.json.*counts is absent"):
    runs.read_run(directory)
  path.write_text("[]")
  with pytest.raises(ValueError, match=r"routing\.json: wanted an object"):
    runs.read_run(directory)


def test_a_sample_image_that_is_gone_is_named(tmp_path):
  directory = write_run(tmp_path / "run")
  (directory / "evaluation" / "samples" / "4.png").unlink()
  with pytest.raises(ValueError, match=r"samples/4\.png is missing"):
    runs.read_run(directory)


def test_labels_tell_runs_apart_by_seed_then_directory(tmp_path):
  places = [
    write_run(tmp_path / "a"),
    write_run(tmp_path / "b", seed=1),
    write_run(tmp_path / "c", seed=1),
    write_run(tmp_path / "d", "lora"),
  ]
  labels = [run.label for run in runs.read_runs(places)]
  assert labels[0] == "mole3, seed 0"
  assert labels[1] == f"mole3, seed 1 ({places[1]})"
  assert labels[2] == f"mole3, seed 1 ({places[2]})"
  assert labels[3] == "lora"


def test_a_run_given_twice_is_refused(tmp_path):
  directory = write_run(tmp_path / "run")
  with pytest.raises(ValueError, match="given twice"):
    runs.read_runs([directory, tmp_path / "." / "run"])


def test_settings_that_differ_are_found_by_path(tmp_path):
  made = runs.read_runs(
    [
      write_run(tmp_path / "a"),
      write_run(tmp_path / "b", "lora", num_experts=1),
    ]
  )
  assert runs.differing_settings(made) == {
    "name": ("mole3", "lora"),
    "model.mole.num_experts": (3, 1),
  }
