"""Reading back what was written, and refusing what was changed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.training import checkpoint
from tests.training import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run of both stages, with its final parameters."""
  run = tmp_path_factory.mktemp("run")
  text = small_run.make_tokenizer(run)
  config = small_run.make_config(num_steps=3)
  checkpoint.write_json(run / "config.json", config)
  base, _ = small_run.train(config, "base", run, text)
  written = checkpoint.write_base(run / "base", base)
  reference = checkpoint.BaseReference("base", written.sha256)
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


def shapes_of(flat):
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for name, leaf in flat.items()
  }


def test_a_changed_base_is_refused(run, tmp_path):
  _, base, _ = run
  folder = tmp_path / "base"
  sha256 = checkpoint.write_base(folder, base).sha256
  read = checkpoint.read_base(folder, shapes_of(base), sha256)
  assert checkpoint.digest(read) == sha256
  with pytest.raises(ValueError, match="the run that refers to it"):
    checkpoint.read_base(folder, shapes_of(base), "0" * 64)
  says = (folder / checkpoint.BASE_FILE).read_text()
  norm = base["decoder/norm/scale"]
  checkpoint.write_base(folder, base | {"decoder/norm/scale": norm + 1})
  (folder / checkpoint.BASE_FILE).write_text(says)
  with pytest.raises(ValueError, match="was changed or damaged"):
    checkpoint.read_base(folder, shapes_of(base), "")


def test_a_base_of_another_shape_lists_every_difference(run, tmp_path):
  _, base, _ = run
  checkpoint.write_base(tmp_path / "base", base)
  wanted = shapes_of(base)
  wanted["decoder/lm_head"] = jax.ShapeDtypeStruct((3, 4), jnp.float32)
  wanted["decoder/extra"] = wanted.pop("decoder/norm/scale")
  with pytest.raises(ValueError) as error:
    checkpoint.read_base(tmp_path / "base", wanted, "")
  for part in (
    "missing decoder/extra",
    "unknown decoder/norm/scale",
    "decoder/lm_head is [16, 128], wanted [3, 4]",
  ):
    assert part in str(error.value)


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


def test_a_base_without_its_last_file_is_no_base(run, tmp_path):
  _, base, _ = run
  checkpoint.write_base(tmp_path / "base", base)
  (tmp_path / "base" / checkpoint.BASE_FILE).unlink()
  assert checkpoint.read_base_reference(tmp_path / "base") is None
  with pytest.raises(ValueError, match="holds no complete base"):
    checkpoint.read_base(tmp_path / "base", shapes_of(base), "")
