"""Reading back what was written, and refusing what was changed."""

import json

import jax
import numpy as np
import pytest

from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files
from tests.training import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run of both stages, with its final parameters."""
  run = tmp_path_factory.mktemp("run")
  text = small_run.make_tokenizer(run)
  config = small_run.make_config(num_steps=3)
  files.write_json(run / "config.json", config)
  base, _ = small_run.train(config, "base", run, text)
  written = base_lib.write_base(run / "base", base)
  reference = base_lib.BaseReference("base", written.sha256)
  final, _ = small_run.train(config, "mole", run, text, base, reference)
  return run, base, final


@pytest.mark.parametrize(
  ("path", "stage"),
  [
    ("", "mole"),
    ("mole", "mole"),
    ("mole/checkpoints/3", "mole"),
    ("base", "base"),
  ],
)
def test_a_run_explains_itself(run, path, stage):
  run, base, final = run
  model = checkpoint.read_model(run / path)
  assert (model.stage, model.step) == (stage, 3)
  expected = final if stage == "mole" else base
  assert model.params.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(model.params[name], leaf, err_msg=name)


def test_a_checkpoint_holds_no_frozen_parameter(run):
  run, _, _ = run
  names = {p.name for p in (run / "mole" / "checkpoints" / "3").iterdir()}
  assert {"trainable", "opt_state", "meta"} <= names
  text = (run / "mole/checkpoints/3/trainable/_METADATA").read_text()
  assert "lora_a" in text and "kernel" in text  # The projector's kernels.
  assert "embed_tokens" not in text


def test_paths_that_hold_nothing_say_what_there_is(run, tmp_path):
  run, _, _ = run
  for path, message in (
    (run / "mole" / "checkpoints" / "9", "does not exist"),
    (tmp_path, "is not in a run directory"),
  ):
    with pytest.raises(ValueError, match=message):
      checkpoint.read_model(path)
  (tmp_path / "config.json").write_text(json.dumps({"stage_names": ["base"]}))
  with pytest.raises(ValueError, match="holds no checkpoint yet"):
    checkpoint.read_model(tmp_path)


def test_a_step_that_does_not_fit_its_config_lists_every_difference(run):
  run, _, final = run
  reader = checkpoint.read_trained(run).trainable
  for name in reader.shapes:
    array = reader.read(name)
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, final[name], err_msg=name)
  shapes = dict(reader.shapes)
  kept, lost, *_ = shapes
  shapes["new"] = shapes.pop(lost)
  shapes[kept] = jax.ShapeDtypeStruct((7,), np.float32)
  with pytest.raises(ValueError, match="does not fit the config") as error:
    checkpoint.StepReader(run / "mole" / "checkpoints" / "3", shapes)
  assert str(error.value).count("\n") == 3
  assert f"{kept} is {final[kept].shape}, wanted (7,)" in str(error.value)
  assert "new is None, wanted" in str(error.value)
