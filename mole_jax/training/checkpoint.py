"""What a run keeps on disk: checkpoints of its stages, and the base, once.

    RUN/config.json
    RUN/base/params/, RUN/base/base.json           the base and its hash
    RUN/<stage>/checkpoints/<step>/                trainable, opt_state, meta

A checkpoint never holds the frozen base: its `meta` names the base by path
and hash, and the hash is verified before use; so are a step's own files.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mole_jax.training import base as base_lib
from mole_jax.training import (
  checksums,
  files,
  quantised,
  rundir,
  state,
  upcycle,
)


class ReadModel(NamedTuple):
  """A stage's model as read from disk; `params` flat, by path."""

  config: dict[str, Any]
  stage: str
  step: int
  params: state.Flat


class StageCheckpoints:
  """The checkpoints of one stage; use as a context manager.

  Saving is asynchronous; leaving the context waits for the last one and
  raises if it failed. Unfinished ones of an earlier run are removed.
  """

  def __init__(self, directory: pathlib.Path, max_checkpoints: int):
    self._folder = (directory / "checkpoints").absolute()
    # Called when all processes have written a step, before it is committed.
    seal = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_checkpoints,
        cleanup_tmp_directories=True,
        async_options=seal,
      ),
    )
    self._saving: int | None = None

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
    self._manager.wait_until_finished()
    self._saving = step
    self._manager.save(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardSave(state.unflatten(train_state.trainable)),
        opt_state=ocp.args.StandardSave(train_state.opt_state),
        meta=ocp.args.JsonSave(dict(meta)),
      ),
    )

  def _seal(self) -> None:
    """Lists the files of the step that is being saved."""
    names = re.compile(rf"{self._saving}(\.orbax-checkpoint-tmp.*)?")
    (folder,) = filter(
      lambda entry: names.fullmatch(entry.name), self._folder.iterdir()
    )
    checksums.write(folder)

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


def _read_meta(step: pathlib.Path) -> dict[str, Any]:
  """What a step says of itself; the run that writes it may be in progress."""
  handler = ocp.JsonCheckpointHandler(
    multiprocessing_options=base_lib.only_this()
  )
  return handler.restore(step.absolute() / "meta")


class StepReader:
  """The trained parameters of a step, read one at a time.

  `shapes` are those wanted; raises ValueError that lists all parameters which
  the step holds otherwise, from headers alone.
  """

  def __init__(
    self, step: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]
  ):
    self.shapes = dict(shapes)
    self._folder = step.absolute() / "trainable"
    self._handler = ocp.PyTreeCheckpointHandler(
      multiprocessing_options=base_lib.only_this()
    )
    tree = self._handler.metadata(self._folder).tree
    stored = {name: leaf.shape for name, leaf in state.flatten(tree).items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in shapes.items()}
    problems = [
      f"{name} is {stored.get(name)}, wanted {wanted.get(name)}"
      for name in sorted(stored | wanted)
      if stored.get(name) != wanted.get(name)
    ]
    if problems:
      raise ValueError(
        f"the checkpoint {step} does not fit the config of its run:\n  "
        + "\n  ".join(problems)
      )

  def read(self, name: str) -> np.ndarray:
    """One parameter, in memory of the host."""
    leaf = self.shapes[name]
    tree = state.unflatten({name: np.empty(leaf.shape, leaf.dtype)})
    args = ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True,
    )
    return state.flatten(self._handler.restore(self._folder, args=args))[name]


class TrainedModel(NamedTuple):
  """Where a stage's trained parameters and the frozen ones are."""

  config: dict[str, Any]
  stage: str
  step: int
  trainable: StepReader
  frozen: tuple[str, ...]
  base: base_lib.BaseReader | None


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


def set_damaged_aside(run: pathlib.Path, stage: str) -> list[str]:
  """Moves the newest steps of a stage away until one is as it was written.

  Returns a line for each that was moved. A stage goes on from the step that
  then is the newest.
  """
  lines = []
  for step in reversed(list_steps(run, stage)):
    folder = run / stage / "checkpoints" / str(step)
    damage = checksums.find_damage(folder)
    if damage is None:
      break
    aside = checksums.set_aside(folder)
    lines.append(
      f"step {step} of stage {stage} is damaged: {damage} It is now {aside}."
    )
  if lines:
    steps = list_steps(run, stage)
    going_on = f"goes on from step {steps[-1]}" if steps else "starts anew"
    lines.append(f"stage {stage} {going_on}")
  return lines


def _resolve(path: pathlib.Path) -> tuple[pathlib.Path, dict, str, int]:
  """The run, its config, the stage and the step that a path means."""
  if not path.exists():
    raise ValueError(f"{path} does not exist; name a run directory.")
  run, parts = _find_run(path.absolute())
  config = files.read_json(run / "config.json")
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
  rundir.check_age(run, config)
  return run, config, stage, int(parts[2]) if len(parts) > 2 else steps[-1]


def read_trained(path: str | os.PathLike) -> TrainedModel:
  """Finds what a stage trained, and the base that holds the rest.

  `path` as for `read_model`, whose errors it raises.
  """
  run, config, stage, step = _resolve(pathlib.Path(path))
  shapes = state.parameter_shapes(state.model_config(config, stage))
  patterns = config["stages"][stage]["trainable"]
  trainable, frozen = state.split(shapes, patterns)
  folder = run / stage / "checkpoints" / str(step)
  damage = checksums.find_damage(folder, ("trainable", "meta"))
  if damage is not None:
    others = [other for other in list_steps(run, stage) if other != step]
    way_out = f"name another step, of {others}" if others else "train it again"
    raise ValueError(
      f"step {step} of {run / stage} is damaged: {damage} Either {way_out}, or "
      "run its training command, which goes on from a step that is whole."
    )
  meta = _read_meta(folder)
  reader = StepReader(folder, trainable)
  base = None
  if frozen:
    directory = run / meta["base"]["path"]
    base = base_lib.BaseReader(directory, meta["base"]["sha256"])
  return TrainedModel(config, stage, step, reader, tuple(frozen), base)


def read_model(path: str | os.PathLike) -> ReadModel:
  """Reads the model of a run, a stage or a step of it, or a converted base.

  Without a step: the newest of the last stage that has one. Raises ValueError
  where there is nothing to read, or the base has changed since.
  """
  if (pathlib.Path(path) / base_lib.BASE_FILE).exists():
    reader = base_lib.BaseReader(pathlib.Path(path))
    if "config" in reader.about:
      return _read_converted(reader)
  trained = read_trained(path)
  reader = trained.trainable
  params = {name: jax.device_put(reader.read(name)) for name in reader.shapes}
  if trained.base is not None:
    params |= _read_frozen(trained)
  return ReadModel(trained.config, trained.stage, trained.step, params)


def _read_frozen(trained: TrainedModel) -> state.Flat:
  """What a stage did not train, from its base."""
  config, base = trained.config, trained.base
  model_config = state.model_config(config, trained.stage)
  kernels = quantised.kernels(config, trained.stage)
  if upcycle.is_needed(model_config, base):
    shapes = state.parameter_shapes(model_config)
    frozen = {name: shapes[name] for name in trained.frozen}
    return upcycle.read(base, model_config, frozen)
  shapes = base_lib.base_shapes(config, model_config.moe.is_on)
  flat = base_lib.read_base(
    base.directory,
    shapes,
    base.about["sha256"],
    optional=trained.trainable.shapes,
    make=quantised.maker(kernels),
  )
  scales = map(quantised.scale_of, kernels)
  return {name: flat[name] for name in (*trained.frozen, *scales)}


def _read_converted(reader: base_lib.BaseReader) -> ReadModel:
  """A base that describes itself; its tokenizer stands beside it."""
  config = reader.about["config"]
  tokenizer = reader.directory / config["data"]["tokenizer"]
  data = config["data"] | {"tokenizer": str(tokenizer)}
  config = config | {"data": data}
  shapes = state.parameter_shapes(state.model_config(config, "base"))
  flat = base_lib.read_base(reader.directory, shapes, "")
  return ReadModel(config, "base", 0, flat)
