"""Features of a frozen vision tower, made once and read in place of pixels."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from mole_jax.data import feature_writer, images
from mole_jax.data import features as data_features
from mole_jax.models import llava, vision
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.parallel import processes, sharding
from mole_jax.training import base as base_lib
from mole_jax.training import state, step

CHOICES = ("none", "cached")
_PREFIX = "vision/"
_IMAGES = 32  # At once, on each device of the batch axes.


def is_of_tower(name: str) -> bool:
  """Whether a parameter is the vision tower's."""
  return name.startswith(_PREFIX)


def are_used(setting: str, trainable: Iterable[str]) -> bool:
  """Whether a stage that trains these parameters reads features.

  Raises ValueError for a `setting` (config.data.features) not in `CHOICES`.
  """
  if setting not in CHOICES:
    raise ValueError(
      f"config.data.features={setting!r}; wanted one of {list(CHOICES)}."
    )
  return setting == "cached" and not any(map(is_of_tower, trainable))


def check_useful(
  config: Mapping[str, Any], trainable: Mapping[str, Iterable[str]]
) -> None:
  """Raises ValueError where features are asked for that no stage can read.

  `trainable` has names of parameters by stage.
  """
  setting = config["data"]["features"]
  if setting == "none" or any(
    are_used(setting, names) for names in trainable.values()
  ):
    return
  reasons = [why_pixels(config, *stage) for stage in trainable.items()]
  raise ValueError(
    f"config.data.features={setting!r}, but no stage freezes the vision tower: "
    + "; ".join(reasons)
    + ". Narrow the pattern, or use --config.data.features=none."
  )


def why_pixels(
  config: Mapping[str, Any], stage_name: str, trainable: Iterable[str]
) -> str:
  """Why a stage reads pixels, by the first pattern that trains the tower."""
  patterns = config["stages"][stage_name]["trainable"]
  names = list(filter(is_of_tower, trainable))
  pattern, name = next(
    (pattern, name)
    for pattern in patterns
    for name in names
    if re.fullmatch(pattern, name)
  )
  return (
    f"config.stages.{stage_name}.trainable pattern {pattern!r} trains {name!r}"
  )


class FrozenTower:
  """The tower of a stage that does not train it, and what it sees.

  Args:
    config: the resolved configuration.
    model_config: of the stage.
    parameters: the tower's, of the type in which it runs.
    mesh: of the run. Of several processes each uses its own devices alone.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    model_config: llava.LlavaConfig,
    parameters: state.Flat,
    mesh: jax.sharding.Mesh,
  ):
    if jax.process_count() > 1:
      parameters = {n: processes.on_host(p) for n, p in parameters.items()}
      sizes = {axis: 1 for axis in mesh_lib.AXES} | {"data": -1}
      mesh = mesh_lib.make_mesh(sizes, jax.local_devices())
    self._mesh = mesh
    shapes = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for name, leaf in parameters.items()
    }
    self._shardings = sharding.parameter_shardings(shapes, mesh)
    self._parameters = {
      name: jax.device_put(leaf, self._shardings[name])
      for name, leaf in parameters.items()
    }
    self._model_config = model_config
    data = config["data"]
    self._mean, self._std = data["image_mean"], data["image_std"]
    known = {
      "parameters": {
        name: base_lib.digest(leaf) for name, leaf in sorted(parameters.items())
      },
      "vision": dataclasses.asdict(model_config.vision),
      "image_mean": list(self._mean),
      "image_std": list(self._std),
    }
    text = json.dumps(known, sort_keys=True)
    self.description = data_features.Tower(
      identity=hashlib.sha256(text.encode()).hexdigest(),
      num_patches=model_config.vision.num_patches,
      width=model_config.vision.hidden_size,
      dtype=model_config.dtype,
      preparation=images.preparation_of(config),
    )

  def stores(
    self, sources: Iterable[Mapping[str, Any]], run: pathlib.Path
  ) -> list[data_features.Store]:
    """Where features of each line of a mixture are, or will be.

    Those of the data sets that ship with the package are kept in the run.
    """
    place = (run / "features").absolute()
    return [
      data_features.Store(
        source["name"], source["split"], self.description, place
      )
      for source in sources
    ]

  def make(
    self,
    stores: Sequence[data_features.Store],
    tell: Callable[[str], Any] = lambda sentence: None,
    report: feature_writer.Report = lambda name, done, total: None,
  ) -> None:
    """Makes what is not there; as `feature_writer.make`."""
    batch_size = _IMAGES * mesh_lib.num_row_shards(self._mesh)
    rows = sharding.batch_sharding(self._mesh)
    see = jax.jit(
      self._see, in_shardings=(self._shardings, rows), out_shardings=rows
    )
    feature_writer.make(
      stores,
      lambda pixels: see(self._parameters, pixels),
      batch_size,
      tell,
      report,
    )

  def _see(self, parameters: state.Flat, pixels: jax.Array) -> jax.Array:
    """uint8[B,Y,X,3] -> features [B,P,C]; what the step does with them."""
    dtype = self._model_config.dtype
    pixels = step.normalise(pixels[:, None], self._mean, self._std, dtype)
    tower = vision.VisionTower(self._model_config.vision)
    params = state.unflatten(parameters)["vision"]
    return tower.apply({"params": params}, pixels[:, 0]).astype(dtype)
