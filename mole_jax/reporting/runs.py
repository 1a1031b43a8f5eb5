"""Reads what a run wrote: logs of its stages, evaluation, routing, samples.

Nothing here knows a model: a run directory is JSON and PNG files.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's log; `rows` are the lines of its metrics.jsonl."""

  name: str
  rows: tuple[dict[str, Any], ...]

  @property
  def steps(self) -> np.ndarray:
    """int[rows]: the step of each row, counted from the stage's start."""
    return np.array([row["step"] for row in self.rows], int)

  def series(self, key: str, part: str | None = None) -> np.ndarray:
    """float[rows, ...] of one metric; NaN where a row has none.

    `part` picks an entry of a metric that is a dict (a domain, say).
    """
    values = [row.get(key) for row in self.rows]
    if part is not None:
      values = [value.get(part) if value else None for value in values]
    shape = next((np.shape(v) for v in values if v is not None), ())
    empty = np.full(shape, np.nan)
    # Through float: a null inside a list becomes NaN as well.
    return np.array(
      [empty if v is None else np.array(v, float) for v in values], float
    )

  def has(self, key: str) -> bool:
    return any(row.get(key) is not None for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory, read.

  `label` tells runs apart that are reported together; `missing` has one
  sentence for each part that is not there yet. Parts that are missing are
  None (evaluation, routing) or empty (stages, predictions, samples).
  """

  directory: pathlib.Path
  name: str
  label: str
  seed: int
  config: dict[str, Any]
  info: dict[str, Any]
  stages: tuple[Stage, ...]
  evaluation: dict[str, Any] | None
  predictions: tuple[dict[str, Any], ...]
  routing: dict[str, Any] | None
  samples: tuple[dict[str, Any], ...]
  missing: tuple[str, ...]

  @property
  def domains(self) -> tuple[str, ...]:
    """Domains in the order of the evaluation, then of the logs."""
    names: dict[str, None] = {}
    if self.evaluation:
      names |= dict.fromkeys(self.evaluation["domains"])
    for stage in self.stages:
      for row in stage.rows:
        names |= dict.fromkeys(row.get("domain_loss") or ())
    return tuple(names)

  @property
  def num_experts(self) -> int | None:
    """Experts as the evaluation counted them; None before it ran."""
    source = self.routing or self.evaluation
    return source["num_experts"] if source else None

  def layer_numbers(self, count: int) -> tuple[int, ...]:
    """Numbers in the decoder of the layers of a list with `count` of them.

    As the evaluation has them; 0, 1, ... before it, and in files that do not
    name them, where every layer routed.
    """
    layers = (self.routing or {}).get("layers") or ()
    return tuple(layers) if len(layers) == count else tuple(range(count))

  def experts_of(self, count: int) -> tuple[int, ...] | None:
    """Experts of each of `count` layers; None before an evaluation says so."""
    experts = (self.routing or {}).get("experts") or ()
    return tuple(experts) if len(experts) == count else None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one name (seeds of one config); figures give them one colour."""

  name: str
  runs: tuple[Run, ...]

  @property
  def label(self) -> str:
    count = len(self.runs)
    return self.name if count == 1 else f"{self.name} ({count} runs)"


def read_runs(directories: Iterable[str | pathlib.Path]) -> tuple[Run, ...]:
  """Reads runs and labels them: by name, then seed, then directory.

  Raises ValueError as `read_run` does, and for a directory given twice.
  """
  runs = [read_run(directory) for directory in directories]
  places = [run.directory.resolve() for run in runs]
  for place, run in zip(places, runs, strict=True):
    if places.count(place) > 1:
      raise ValueError(f"run {run.directory} was given twice; name it once.")
  labels = [run.name for run in runs]
  for more in (
    lambda run: f", seed {run.seed}",
    lambda run: f" ({run.directory})",
  ):
    labels = [
      label + more(run) if labels.count(label) > 1 else label
      for label, run in zip(labels, runs, strict=True)
    ]
  return tuple(
    dataclasses.replace(run, label=label)
    for run, label in zip(runs, labels, strict=True)
  )


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
  """Puts runs of one name together, in the order in which names appear."""
  names = dict.fromkeys(run.name for run in runs)
  return tuple(
    Group(name, tuple(run for run in runs if run.name == name))
    for name in names
  )


def differing_settings(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
  """Settings that are not the same in all runs: key -> value of each run.

  Keys are dotted paths into config.json; a run without the key has None.
  """
  flat = [flatten(run.config) for run in runs]
  keys = dict.fromkeys(key for settings in flat for key in settings)
  rows = {key: tuple(settings.get(key) for settings in flat) for key in keys}
  return {
    key: values
    for key, values in rows.items()
    if any(value != values[0] for value in values)
  }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys; lists stay values."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def read_run(directory: str | pathlib.Path) -> Run:
  """Reads one run directory.

  Raises ValueError, with the file and the command that writes it, where the
  directory is no run, holds no log at all, or a file in it is malformed.
  """
  directory = pathlib.Path(directory)
  command = _command(directory)
  if not directory.is_dir():
    raise ValueError(f"run {directory} is no directory; {command} makes one.")
  info = _read_json(directory / "run.json", command, {"name", "stages"})
  config = _read_json(directory / "config.json", command, {"seed"})
  command = _command(directory, info["name"])

  missing, stages = [], []
  for name in info["stages"]:
    path = directory / name / "metrics.jsonl"
    rows = _read_lines(path, command, {"step"}) if path.is_file() else ()
    if rows:
      stages.append(Stage(name, rows))
    else:
      missing.append(
        f"The curves of stage {name!r}: {path} has no logged step yet; "
        f"{command} writes it."
      )
  if not stages:
    raise ValueError(
      f"{directory / info['stages'][0] / 'metrics.jsonl'} has no logged "
      f"step, nor has any other stage; {command} writes it."
      if info["stages"]
      else f"{directory / 'run.json'} names no stage; {command} writes it."
    )

  parts: dict[str, Any] = {}
  for file, keys, what in (
    ("metrics.json", {"domains"}, "The accuracy table"),
    ("routing.json", {"counts", "num_layers", "num_experts"}, "Expert maps"),
    ("samples.json", None, "The test samples"),
    ("predictions.jsonl", {"id", "question", "prediction"}, "Predictions"),
  ):
    path = directory / "evaluation" / file
    if not path.is_file():
      parts[file] = None
      missing.append(f"{what}: {path} is missing; {command} writes it.")
    elif file.endswith(".jsonl"):
      parts[file] = _read_lines(path, command, keys)
    else:
      parts[file] = _read_json(path, command, keys)
  samples = _check_samples(
    directory / "evaluation", parts["samples.json"] or [], command
  )
  return Run(
    directory=directory,
    name=info["name"],
    label=info["name"],
    seed=config["seed"],
    config=config,
    info=info,
    stages=tuple(stages),
    evaluation=parts["metrics.json"],
    predictions=tuple(parts["predictions.jsonl"] or ()),
    routing=parts["routing.json"],
    samples=samples,
    missing=tuple(missing),
  )


def _command(directory: pathlib.Path, name: str = "NAME") -> str:
  return (
    f"`python -m mole_jax.main --config=configs/{name}.py "
    f"--workdir={directory}`"
  )


def _read_json(
  path: pathlib.Path, command: str, keys: set[str] | None = None
) -> Any:
  """Reads a JSON file; with `keys`, an object that must have them."""
  if not path.is_file():
    raise ValueError(f"{path} is missing; {command} writes it.")
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is no JSON ({error}); {command} writes it anew."
    ) from error
  if keys is not None:
    _check_keys(value, keys, str(path), command)
  return value


def _read_lines(
  path: pathlib.Path, command: str, keys: set[str]
) -> tuple[dict[str, Any], ...]:
  rows = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      # A run that is killed, or still writes, may leave half a last line.
      if number == len(lines):
        break
      raise ValueError(
        f"{path} line {number} is no JSON ({error}); {command} writes it anew."
      ) from error
    _check_keys(row, keys, f"{path} line {number}", command)
    rows.append(row)
  return tuple(rows)


def _check_keys(value: Any, keys: set[str], where: str, command: str) -> None:
  absent = sorted(keys - set(value)) if isinstance(value, dict) else keys
  if absent or not isinstance(value, dict):
    raise ValueError(
      f"{where}: wanted an object with {', '.join(sorted(keys))}, but "
      f"{', '.join(absent)} is absent; {command} writes it anew."
    )


def _check_samples(
  directory: pathlib.Path, samples: list[dict[str, Any]], command: str
) -> tuple[dict[str, Any], ...]:
  keys = {"id", "domain", "question", "answer", "prediction", "is_correct"}
  keys |= {"image", "tokens"}
  for number, sample in enumerate(samples):
    where = f"{directory / 'samples.json'} entry {number}"
    _check_keys(sample, keys, where, command)
    image = sample["image"]
    if image is not None and not (directory / image).is_file():
      raise ValueError(f"{directory / image} is missing; {command} writes it.")
  return tuple(samples)
