"""A checkpoint of ours, opened to be exported: little of it in memory."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from mole_jax.interop import hf
from mole_jax.interop.tensors import CheckpointError
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, state


class Parameters:
  """Parameters by path, those of a base read part by part when asked for."""

  def __init__(
    self, trainable: state.Flat, base: base_lib.BaseReader | None
  ) -> None:
    self._trainable = trainable
    self._base = base
    self._part: tuple[int, state.Flat] = (-1, {})

  def __contains__(self, path: str) -> bool:
    return path in self._trainable or (
      self._base is not None and path in self._base.parameters
    )

  def shape(self, path: str) -> tuple[int, ...]:
    """Without reading the parameter."""
    if path in self._trainable:
      return tuple(self._trainable[path].shape)
    if path not in self:
      raise CheckpointError(f"the checkpoint holds no parameter {path!r}.")
    return tuple(self._base.parameters[path]["shape"])

  def __getitem__(self, path: str) -> np.ndarray:
    if path in self._trainable:
      return np.asarray(self._trainable[path])
    if self._base is None or path not in self._base.parameters:
      raise CheckpointError(f"the checkpoint holds no parameter {path!r}.")
    number = self._base.parameters[path]["part"]
    if self._part[0] != number:
      self._part = (-1, {})  # Let go before the next one is read.
      self._part = (number, self._base.read_part(number))
    return np.asarray(self._part[1][path])


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint of ours.

  what: in words.  model: its `config.model`.  config: that of its run, None
  for a converted base.  folder: of its base, None where it has none; about:
  what that says of itself.  figures: accuracy in per cent by domain.
  """

  what: str
  model: dict[str, Any]
  params: Parameters
  config: dict[str, Any] | None
  folder: pathlib.Path | None
  about: dict[str, Any]
  figures: dict[str, float]


def open_checkpoint(path: pathlib.Path) -> Opened:
  """Opens a base that `from_hf` wrote, or a run, a stage or a step of it.

  Raises ValueError where there is nothing to read.
  """
  if (path / base_lib.BASE_FILE).exists():
    base = base_lib.BaseReader(path)
    if "model" not in base.about:
      raise CheckpointError(
        f"{path} was trained here and does not describe itself; name its run "
        f"({path.parent}) or a stage of it."
      )
    model = hf.full_model_section(base.about["model"])
    what = base.about["source"]
    return Opened(what, model, Parameters({}, base), None, path, base.about, {})
  trained = checkpoint.read_trained(path)
  config = trained.config
  model = config["model"]
  if not config["stages"][trained.stage]["use_adapters"]:
    model = model | {
      "mole": model["mole"] | {"num_experts": 0},
      "lora": model["lora"] | {"rank": 0},
    }
  return Opened(
    f"{config['name']}, stage {trained.stage}, step {trained.step}",
    model,
    Parameters(trained.trainable, trained.base),
    config,
    None if trained.base is None else trained.base.directory,
    {} if trained.base is None else trained.base.about,
    _figures(path, trained),
  )


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
