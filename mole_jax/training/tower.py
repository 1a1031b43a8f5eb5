"""A frozen tower, run once over all pictures of a mixture."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mole_jax.data import features, images
from mole_jax.models import vision
from mole_jax.training import base as base_lib
from mole_jax.training import state, step

MODES = ("none", "cached")
_BATCH_SIZE = 32  # Images; more make the tower no faster.
_PREFIX = "vision/"


def is_cached(config: Mapping[str, Any], trainable: Mapping[str, Any]) -> bool:
  """Whether a stage reads features instead of pixels.

  It does where config.data.features asks for it and the tower is frozen.
  Raises ValueError for another value of that setting.
  """
  mode = config["data"]["features"]
  if mode not in MODES:
    raise ValueError(
      f"config.data.features={mode!r}; wanted one of {list(MODES)}."
    )
  return mode == "cached" and not any(n.startswith(_PREFIX) for n in trainable)


def open_stores(
  config: Mapping[str, Any],
  stage_name: str,
  base: Mapping[str, jax.Array],
  report: Callable[[str, int, int], object],
) -> list[features.Store]:
  """The features of each line of a stage's mixture, made where none stand.

  Args:
    config: the run's.
    stage_name: whose mixture.
    base: parameters by path, the tower's among them.
    report: called with the name of a data set, how many of its records are
      done, and of how many.

  Raises:
    ValueError: where there is no room for them.
  """
  model = state.model_config(config, stage_name)
  tower = vision.VisionTower(model.vision, model.remat)
  params = {k: v for k, v in base.items() if k.startswith(_PREFIX)}
  mean, std = config["data"]["image_mean"], config["data"]["image_std"]

  @jax.jit
  def run(params, pixels):
    pixels = step.normalise(pixels[None], mean, std, model.dtype)[0]
    variables = {"params": state.unflatten(params)["vision"]}
    return tower.apply(variables, pixels)

  def encode(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(run(params, pixels))

  size = model.vision.image_size
  found = jax.eval_shape(
    run, params, jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
  )
  preparation = images.preparation_of(config)
  known = [
    {name: base_lib.digest(params[name]) for name in sorted(params)},
    repr(model.vision),
    repr(preparation),
    [list(mean), list(std), model.dtype],
  ]
  key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
  return [
    features.find_or_make(
      line["name"],
      line["split"],
      key,
      found.shape[1:],
      found.dtype.name,
      preparation,
      encode,
      batch_size=_BATCH_SIZE,
      report=lambda done, total, line=line: report(line["name"], done, total),
    )
    for line in config["stages"][stage_name]["mixture"].values()
  ]
