"""A run as training writes one, of random parameters."""

import jax
import numpy as np

from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, state
from tests.training import small_run


def write(folder, name, *, use_visual_tokens=True, **mole):
  """Writes a run of configs/<name>.py whose adapters are not zero.

  `mole` changes config.model.mole. Returns the config and the parameters.
  """
  folder.mkdir()
  config = small_run.make_config(name)
  config["model"]["use_visual_tokens"] = use_visual_tokens
  config["model"]["mole"] |= mole
  stage = config["stages"]["mole"]
  if not use_visual_tokens:
    stage["trainable"] = [p for p in stage["trainable"] if "visual" not in p]
  small_run.make_tokenizer(folder)
  config["data"]["tokenizer"] = str(folder / "tokenizer.json")
  files.write_json(folder / "config.json", config)
  files.write_json(folder / "run.json", {})
  shapes = state.parameter_shapes(state.model_config(config, "mole"))
  keys = jax.random.split(jax.random.key(3), len(shapes))
  flat = {
    path: 0.3 * jax.random.normal(key, leaf.shape)
    for key, (path, leaf) in zip(keys, shapes.items(), strict=True)
  }
  base = {path: flat[path] for path in base_lib.base_shapes(config)}
  written = base_lib.write_base(folder / "base", base)
  reference = base_lib.BaseReference("base", written.sha256)
  trainable, _ = state.split(flat, stage["trainable"])
  with checkpoint.StageCheckpoints(folder / "mole", 1) as checkpoints:
    meta = {"stage": "mole", "base": reference._asdict(), "step": 6}
    train_state = state.TrainState(trainable, {"count": np.zeros(1)})
    checkpoints.save(6, train_state, meta)
  return config, flat
