"""What a run keeps on disk: checkpoints of its stages, and the base, once.

    RUN/config.json
    RUN/base/params/, RUN/base/base.json           the base and its hash
    RUN/<stage>/checkpoints/<step>/                trainable, opt_state, meta

A checkpoint never holds the frozen base: its `meta` names the base by path
and hash, and the hash is verified before use.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mole_jax.training import state

BASE_FILE = "base.json"


class BaseReference(NamedTuple):
  """A base by place and content. `path` may be relative to the run."""

  path: str
  sha256: str


class ReadModel(NamedTuple):
  """A stage's model as read from disk; `params` flat, by path."""

  config: dict[str, Any]
  stage: str
  step: int
  params: state.Flat


def digest(flat: Mapping[str, Any]) -> str:
  """SHA-256 over names, types, shapes and bytes, in order of names."""
  sha = hashlib.sha256()
  for name in sorted(flat):
    leaf = np.ascontiguousarray(jax.device_get(flat[name]))
    sha.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
    sha.update(leaf.view(np.uint8).data if leaf.size else b"")
  return sha.hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that the file is whole or absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
  os.replace(temporary, path)


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON; ValueError that names the file if it is broken."""
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not valid JSON: {error}.") from None


def write_base(directory: pathlib.Path, flat: state.Flat) -> BaseReference:
  """Writes a base once; the JSON file, written last, says it is complete."""
  directory = directory.absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "params", state.unflatten(flat), force=True)
  sha256 = digest(flat)
  sizes = {
    name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    for name, leaf in sorted(flat.items())
  }
  write_json(directory / BASE_FILE, {"sha256": sha256, "parameters": sizes})
  return BaseReference(str(directory), sha256)


def read_base_reference(directory: pathlib.Path) -> BaseReference | None:
  """The base that stands in a directory, None if there is no complete one."""
  path = directory / BASE_FILE
  if not path.exists():
    return None
  return BaseReference(str(directory), read_json(path)["sha256"])


def read_base(
  directory: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  expected_sha256: str,
) -> state.Flat:
  """Reads a base and verifies its hash.

  `shapes` names what the model wants (with shardings, or none for the first
  device); types are those stored. Raises ValueError where the base is absent,
  holds other parameters (all are listed) or has another hash.
  """
  directory = directory.absolute()
  reference = read_base_reference(directory)
  if reference is None:
    raise ValueError(
      f"{directory} holds no complete base ({BASE_FILE} is missing); name a "
      "finished RUN/base in config.base.path, or let the run train its own."
    )
  stored = read_json(directory / BASE_FILE)["parameters"]
  problems = [f"missing {name}" for name in shapes if name not in stored]
  problems += [f"unknown {name}" for name in stored if name not in shapes]
  problems += [
    f"{name} is {stored[name]['shape']}, wanted {list(leaf.shape)}"
    for name, leaf in shapes.items()
    if name in stored and stored[name]["shape"] != list(leaf.shape)
  ]
  if problems:
    raise ValueError(
      f"the base in {directory} does not fit config.model:\n  "
      + "\n  ".join(problems)
    )
  wanted = {
    name: jax.ShapeDtypeStruct(
      leaf.shape, stored[name]["dtype"], sharding=leaf.sharding
    )
    for name, leaf in shapes.items()
  }
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(
      directory / "params", state.unflatten(_placed(wanted))
    )
  flat = state.flatten(tree)
  found = digest(flat)
  for place, expected in (
    (BASE_FILE, reference.sha256),
    ("the run that refers to it", expected_sha256),
  ):
    if expected and found != expected:
      raise ValueError(
        f"the base in {directory} has sha256 {found}, but {place} says "
        f"{expected}: it was changed or damaged; restore it or train anew."
      )
  return flat


def _placed(
  shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Puts leaves without a sharding on the first device."""
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return {
    name: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding or first
    )
    for name, leaf in shapes.items()
  }


class StageCheckpoints:
  """The checkpoints of one stage; use as a context manager.

  Saving is asynchronous; leaving the context waits for the last one and
  raises if it failed. Without `max_checkpoints` it only reads, and leaves the
  unfinished ones of a run in progress alone.
  """

  def __init__(
    self, directory: pathlib.Path, max_checkpoints: int | None = None
  ):
    is_writer = max_checkpoints is not None
    self._manager = ocp.CheckpointManager(
      (directory / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_checkpoints,
        cleanup_tmp_directories=is_writer,
        read_only=not is_writer,
      ),
    )

  def __enter__(self) -> "StageCheckpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def latest_step(self) -> int | None:
    """The newest step on disk."""
    return self._manager.latest_step()

  def save(
    self, step: int, train_state: state.TrainState, meta: Mapping[str, Any]
  ) -> None:
    """Saves a step unless it stands already."""
    if step == self._manager.latest_step():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardSave(state.unflatten(train_state.trainable)),
        opt_state=ocp.args.StandardSave(train_state.opt_state),
        meta=ocp.args.JsonSave(dict(meta)),
      ),
    )

  def restore(
    self, step: int, shapes: state.TrainState
  ) -> tuple[state.TrainState, dict[str, Any]]:
    """Restores a step onto the shardings of `shapes`; returns it and meta."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardRestore(state.unflatten(shapes.trainable)),
        opt_state=ocp.args.StandardRestore(shapes.opt_state),
        meta=ocp.args.JsonRestore(),
      ),
    )
    trainable = state.flatten(restored["trainable"])
    return (
      state.TrainState(trainable, restored["opt_state"]),
      restored["meta"],
    )

  def restore_trainable(
    self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
  ) -> tuple[state.Flat, dict[str, Any]]:
    """Restores only the trained parameters of a step, and meta."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardRestore(state.unflatten(_placed(shapes))),
        meta=ocp.args.JsonRestore(),
      ),
    )
    return state.flatten(restored["trainable"]), restored["meta"]


def _find_run(path: pathlib.Path) -> tuple[pathlib.Path, tuple[str, ...]]:
  for parent in (path, *path.parents):
    if (parent / "config.json").exists():
      return parent, path.relative_to(parent).parts
  raise ValueError(
    f"{path} is not in a run directory: no config.json there or above it; "
    "name a directory that `python -m mole_jax.main --workdir=...` wrote."
  )


def list_steps(run: pathlib.Path, stage: str) -> list[int]:
  """Steps that stand in a stage's folder, in order."""
  folder = run / stage / "checkpoints"
  if not folder.is_dir():
    return []
  # An empty folder with a number for a name is no checkpoint.
  names = [
    entry.name
    for entry in folder.iterdir()
    if entry.name.isdigit() and entry.is_dir() and any(entry.iterdir())
  ]
  return sorted(map(int, names))


def _resolve(path: pathlib.Path) -> tuple[pathlib.Path, dict, str, int]:
  """The run, its config, the stage and the step that a path means."""
  if not path.exists():
    raise ValueError(f"{path} does not exist; name a run directory.")
  run, parts = _find_run(path.absolute())
  config = read_json(run / "config.json")
  stages = list(config["stage_names"])
  if parts and parts[0] not in stages:
    raise ValueError(f"{run} has the stages {stages}, not {parts[0]!r}.")
  with_steps = [stage for stage in stages if list_steps(run, stage)]
  if not with_steps:
    raise ValueError(
      f"{run} holds no checkpoint yet; run its training command first."
    )
  stage = parts[0] if parts else with_steps[-1]
  steps = list_steps(run, stage)
  if len(parts) > 2 and not (parts[2].isdigit() and int(parts[2]) in steps):
    raise ValueError(f"{run / stage} has the steps {steps}, not {parts[2]!r}.")
  if not steps:
    raise ValueError(
      f"{run / stage} holds no checkpoint yet; stages with one: {with_steps}."
    )
  return run, config, stage, int(parts[2]) if len(parts) > 2 else steps[-1]


def read_model(path: str | os.PathLike) -> ReadModel:
  """Reads the model that a run directory, a stage or a step of it holds.

  Without a step: the newest of the last stage that has one. Raises ValueError
  where there is nothing to read, or the base has changed since.
  """
  run, config, stage, step = _resolve(pathlib.Path(path))
  shapes = state.parameter_shapes(state.model_config(config, stage))
  patterns = config["stages"][stage]["trainable"]
  trainable, frozen = state.split(shapes, patterns)
  with StageCheckpoints(run / stage) as checkpoints:
    params, meta = checkpoints.restore_trainable(step, trainable)
  if frozen:
    base = meta["base"]
    flat = read_base(run / base["path"], base_shapes(config), base["sha256"])
    params |= {name: flat[name] for name in frozen}
  return ReadModel(config, stage, step, params)


def base_shapes(
  config: Mapping[str, Any],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes of the base: the model without any adapter."""
  values = {**config, "stages": {"base": {"use_adapters": False}}}
  return state.parameter_shapes(state.model_config(values, "base"))
