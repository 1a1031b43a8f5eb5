"""A run as training writes one, of random parameters."""

import jax
import numpy as np

from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, rundir, state, upcycle
from tests.models import small
from tests.training import small_run

VISUAL_TOKENS = "visual_(start|end)"


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
  flat = _draw(_adapted_shapes(config))
  base = {path: flat[path] for path in base_lib.base_shapes(config)}
  written = base_lib.write_base(folder / "base", base)
  _write(folder, config, flat, written._replace(path="base"))
  return config, flat


def write_on(base, folder, *, use_visual_tokens=False, trained=(), **mole):
  """The same on a converted base, which it refers to.

  Its projector differs, and what the patterns `trained` match.
  """
  folder.mkdir()
  config = rundir.plain(small_run.read_config("mole3", str(base)))
  model, stage = config["model"], config["stages"]["mole"]
  model["use_visual_tokens"] = use_visual_tokens
  model["lora"] = {"rank": 2, "alpha": 3.0, "dropout": 0.0}
  model["mole"] |= {"rank": 3, "alpha": 4.0, "dropout": 0.0, **mole}
  stage["trainable"] += trained
  if use_visual_tokens:
    stage["trainable"].append(VISUAL_TOKENS)
  reader = base_lib.BaseReader(base)
  flat = _draw(_adapted_shapes(config))
  trainable, _ = state.split(flat, stage["trainable"])
  flat |= {
    path: jax.numpy.asarray(reader.read(path))
    for path in reader.parameters
    if path not in trainable
  }
  _write(folder, config, flat, base_lib.read_reference(base))
  return config, flat


def write_moe(folder, *, trained=None, **model):
  """A run of configs/moe_llava.py, at its last stage, on a dense base.

  `model` changes sections of config.model, `trained` what the stage trains.
  Returns the config and the parameters, frozen ones as the base has them.
  """
  folder.mkdir()
  config = small_run.make_config("moe_llava")
  for section, values in model.items():
    config["model"][section] |= values
  has_lora = config["model"]["lora"]["rank"]
  stage = config["stages"]["experts"]
  stage["use_adapters"] = bool(
    has_lora or config["model"]["mole"]["num_experts"]
  )
  stage["trainable"] = trained or [*stage["trainable"], ".*/lora_[ab]"]
  if not trained and not stage["use_adapters"]:
    stage["trainable"].pop()
  small_run.make_tokenizer(folder)
  config["data"]["tokenizer"] = str(folder / "tokenizer.json")
  shapes = base_lib.base_shapes(config)
  base = _draw(shapes, seed=4)
  reference = base_lib.write_base(folder / "tuning", base)
  wanted = state.model_config(config, "experts")
  flat = _draw(state.parameter_shapes(wanted))
  trainable, frozen = state.split(flat, stage["trainable"])
  made = upcycle.read(
    base_lib.BaseReader(folder / "tuning"),
    wanted,
    {path: state.parameter_shapes(wanted)[path] for path in frozen},
  )
  reference = reference._replace(path="tuning")
  _write(folder, config, trainable, reference, "experts")
  return config, trainable | made


def _draw(shapes, seed=3):
  """Random parameters by path."""
  return small.draw(shapes, seed)


def _adapted_shapes(config):
  """Shapes of a config's model with adapters, by path."""
  return state.parameter_shapes(state.model_config(config, "mole"))


def _write(folder, config, flat, reference, stage="mole"):
  files.write_json(folder / "config.json", config)
  files.write_json(folder / "run.json", {})
  trainable, _ = state.split(flat, config["stages"][stage]["trainable"])
  with checkpoint.StageCheckpoints(folder / stage, 1) as checkpoints:
    meta = {"stage": stage, "base": reference._asdict(), "step": 6}
    train_state = state.TrainState(trainable, {"count": np.zeros(1)})
    checkpoints.save(6, train_state, meta)
