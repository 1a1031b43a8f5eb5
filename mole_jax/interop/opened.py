"""A checkpoint of ours, opened to be exported: little of it in memory."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mole_jax.interop import sources
from mole_jax.interop.tensors import CheckpointError
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, state, upcycle


class Parameters:
  """Parameters by path, each read from disk when asked for.

  made: those that are layers of one of the base's, or copies of these.
  """

  def __init__(
    self,
    trainable: checkpoint.StepReader | None,
    base: base_lib.BaseReader | None,
    made: Mapping[str, upcycle.Source],
  ) -> None:
    self._trainable = trainable
    self._shapes = trainable.shapes if trainable is not None else {}
    self._base = base
    self._made = made

  def __contains__(self, path: str) -> bool:
    return path in self._shapes or (
      self._base is not None and self._stored(path) in self._base.parameters
    )

  def _stored(self, path: str) -> str:
    """What the base calls it, or what it is made of."""
    return self._made[path].name if path in self._made else path

  @property
  def trained(self) -> frozenset[str]:
    """Paths of those that are not the base's."""
    return frozenset(self._shapes)

  def shape(self, path: str) -> tuple[int, ...]:
    """Without reading the parameter."""
    if path in self._shapes:
      return tuple(self._shapes[path].shape)
    if path not in self:
      raise CheckpointError(f"the checkpoint holds no parameter {path!r}.")
    shape = tuple(self._base.parameters[self._stored(path)]["shape"])
    if path not in self._made:
      return shape
    source = self._made[path]
    copies = (source.copies,) if source.copies else ()
    return (len(source.layers), *copies, *shape[1:])

  def dtype(self, path: str) -> np.dtype:
    """Without reading the parameter."""
    if path in self._shapes:
      return np.dtype(self._shapes[path].dtype)
    self.shape(path)  # Says so if it is not there.
    entry = self._base.parameters[self._stored(path)]
    return sources.DTYPES[entry["dtype"]]

  def __getitem__(self, path: str) -> np.ndarray:
    if path in self._shapes:
      return self._trainable.read(path)
    if path not in self:
      raise CheckpointError(f"the checkpoint holds no parameter {path!r}.")
    array = self._base.read(self._stored(path))
    if path not in self._made:
      return array
    array = array[list(self._made[path].layers)]
    if self._made[path].copies:
      return np.broadcast_to(array[:, None], self.shape(path))
    return array


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint of ours.

  what: in words.  model: its `config.model`.  data, balance: those sections of
  its config.  config: of its run, None for a converted base.  folder: of its
  base, None where it has none; about: what that says of itself.  figures:
  accuracy in per cent by domain.
  """

  what: str
  model: dict[str, Any]
  data: dict[str, Any]
  balance: dict[str, Any]
  params: Parameters
  config: dict[str, Any] | None
  folder: pathlib.Path | None
  about: dict[str, Any]
  figures: dict[str, float]

  @property
  def has_adapters(self) -> bool:
    return bool(self.model["mole"]["num_experts"] or self.model["lora"]["rank"])


def open_checkpoint(path: pathlib.Path) -> Opened:
  """Opens a base that `from_hf` wrote, or a run, a stage or a step of it.

  Raises ValueError where there is nothing to read.
  """
  if (path / base_lib.BASE_FILE).exists():
    return _open_base(path)
  trained = checkpoint.read_trained(path)
  config = trained.config
  return Opened(
    what=f"{config['name']}, stage {trained.stage}, step {trained.step}",
    model=_of_stage(config["model"], config["stages"][trained.stage]),
    data=config["data"],
    balance=config["balance"],
    params=Parameters(trained.trainable, trained.base, _made(trained)),
    config=config,
    folder=None if trained.base is None else trained.base.directory,
    about={} if trained.base is None else trained.base.about,
    figures=_figures(path, trained),
  )


def _open_base(path: pathlib.Path) -> Opened:
  base = base_lib.BaseReader(path)
  about = base.about
  if "config" in about:
    config, what = about["config"], about["source"]
    model = config["model"]
    tokenizer = str(path / config["data"]["tokenizer"])
    data = config["data"] | {"tokenizer": tokenizer}
  elif (path.parent / "config.json").exists():  # RUN/<stage>, trained there.
    config = files.read_json(path.parent / "config.json")
    what, data = f"{path.name} of {config['name']}", config["data"]
    settings = config["stages"].get(path.name, {})
    # A stage that leaves a base has trained no adapters.
    model = _of_stage(config["model"], settings | {"use_adapters": False})
  else:
    raise CheckpointError(
      f"{path} was trained by a run and does not describe itself; leave it in "
      "its run directory, or name the run."
    )
  return Opened(
    what=what,
    model=model,
    data=data,
    balance=config["balance"],
    params=Parameters(None, base, {}),
    config=None,
    folder=path,
    about=about,
    figures={},
  )


def _of_stage(
  model: dict[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
  """`config.model` without what a stage does not have yet."""
  if not settings["use_adapters"]:
    model = model | {
      "mole": model["mole"] | {"num_experts": 0},
      "lora": model["lora"] | {"rank": 0},
    }
  if "moe" in model and not settings.get("use_experts", False):
    model = model | {"moe": model["moe"] | {"layers": "none"}}
  return model


def _made(trained: checkpoint.TrainedModel) -> dict[str, upcycle.Source]:
  """Frozen FFNs of a model with experts on a base without."""
  config = state.model_config(trained.config, trained.stage)
  base = trained.base
  if base is None or not upcycle.is_needed(config, base):
    return {}
  made = upcycle.sources(config, trained.frozen)
  return {path: source for path, source in made.items() if source is not None}


def _figures(
  path: pathlib.Path, trained: checkpoint.TrainedModel
) -> dict[str, float]:
  """Accuracy of a run's evaluation, where it is of this very step."""
  evaluation = path / "evaluation" / "metrics.json"
  if not evaluation.exists():
    return {}
  metrics = files.read_json(evaluation)
  if (metrics["stage"], metrics["step"]) != (trained.stage, trained.step):
    return {}
  return {
    domain: 100 * entry["accuracy"]
    for domain, entry in metrics["domains"].items()
  }
