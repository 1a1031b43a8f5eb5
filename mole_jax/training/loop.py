"""The loop over a stage's steps, and what happens before and after it.

Of several processes each runs it, on rows of its own: all do the same steps,
and stop, save and fail at the same one. Only the first writes metrics.
"""

import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np

from mole_jax.data import pipeline
from mole_jax.parallel import processes
from mole_jax.training import base as base_lib
from mole_jax.training import (
  checkpoint,
  feed,
  host_memory,
  metrics,
  state,
  step,
)
from mole_jax.training import stage as stage_lib


class StoppedError(RuntimeError):
  """The user asked to stop; `saved_step` is what stands on disk."""

  def __init__(self, stage: str, saved_step: int, signal_number: int):
    super().__init__(f"stopped in stage {stage!r}, saved step {saved_step}.")
    self.stage = stage
    self.saved_step = saved_step
    self.signal_number = signal_number


class StopRequest:
  """Turns SIGINT and SIGTERM into a request that the loop reads.

  A second SIGINT raises KeyboardInterrupt, for someone in a hurry.
  """

  def __init__(self) -> None:
    self.signal_number: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _) -> None:
    if self.signal_number is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal_number = number


def run_stage(
  config: Mapping[str, Any],
  stage: stage_lib.Stage,
  loader: pipeline.Loader,
  run: pathlib.Path,
  base: state.Flat | None,
  base_reference: base_lib.BaseReference | None,
  on_log: Callable[[int, dict[str, Any]], None],
  on_step: Callable[[int], None],
  last_step: int | None = None,
) -> state.Flat:
  """Trains a stage from its newest checkpoint to its end.

  Args:
    config: the resolved configuration.
    stage: what `config` makes of the stage.
    loader: its batches.
    run: the run directory.
    base: parameters to start from, flat; None to start from nothing.
    base_reference: where they came from, for the checkpoints.
    on_log: called with a step and its row of metrics.
    on_step: called with the number of steps done.
    last_step: stop (and save) before the stage's end, as if interrupted.

  Returns:
    every parameter at the end, flat.

  Raises:
    NonFiniteLossError: with the step; parameters before it are not saved
      over the last checkpoint.
    StoppedError: after SIGINT or SIGTERM, when the state is saved.
    mixture.TooManySkipped: above config.data.max_skipped, when it is saved.
  """
  settings, directory = stage.settings, run / stage.name
  num_steps = settings["num_steps"]
  end = num_steps if last_step is None else min(last_step, num_steps)
  train_state, frozen = stage.start(config["seed"], base)
  reference = None if base_reference is None else base_reference._asdict()
  meta = {"stage": stage.name, "base": reference}
  checkpoints = checkpoint.StageCheckpoints(
    directory, settings["max_checkpoints"]
  )
  watchdog = processes.Watchdog()
  with watchdog, checkpoints, StopRequest() as stop:
    start = checkpoints.latest_step() or 0
    if start:
      train_state, _ = checkpoints.restore(start, stage.state_shapes())
    trainable, opt_state = train_state
    batches = loader.iterate(start)
    failures = feed.FailureLog(directory)
    window = metrics.Window(config["data"]["domains"])
    pending = None
    began = time.perf_counter()
    is_told = False  # By a step's metrics, that some process was asked to stop.

    def finish(pending) -> None:
      """Reads a step's metrics; by now the next step is on its way."""
      nonlocal is_told
      number, values = pending
      values = jax.device_get(values)
      if not values["is_finite"]:
        raise metrics.NonFiniteLossError(stage.name, number)
      window.add(values)
      is_told |= bool(values["num_stopping"])

    open_writer = metrics.Writer if processes.is_first() else metrics.NoWriter
    with open_writer(directory, start) as writer:
      for number in range(start + 1, end + 1):
        watchdog.still_alive(is_first=number == start + 1)
        # The step before this one is still at work: what it takes to get a
        # batch and to send it costs time only where it takes longer.
        asked = time.perf_counter()
        host_batch = next(batches)
        window.add_wait(time.perf_counter() - asked)
        is_asked = stop.signal_number is not None  # It may come any time.
        batch = to_devices(host_batch, stage.shardings["batch"], is_asked)
        args = trainable, frozen, opt_state, batch, np.int32(number - 1)
        if number == start + 1:
          # Ahead of the call, which takes what is compiled: before the step's
          # own memory is asked for, that of its compilation can go.
          stage.train_step.lower(*args).compile()
          host_memory.give_back()
        trainable, opt_state, values = stage.train_step(*args)
        # Several processes stop at a step that all of them know of; one alone
        # need not wait for the step that tells it.
        if pending is not None:
          finish(pending)
        is_stopping = is_told or (is_asked and jax.process_count() == 1)
        pending = (number, values)
        on_step(number)
        is_last = number == end or is_stopping
        is_saved = is_last or number % settings["checkpoint_every"] == 0
        is_logged = is_last or number % settings["log_every"] == 0
        if is_saved or is_logged:
          # Nothing is saved that has not been found finite.
          finish(pending)
          pending = None
        if is_logged:
          now = time.perf_counter()
          row = window.summary(now - began)
          row["records"] = feed.accounting(loader, settings["mixture"])
          failures.write(loader)
          writer.write(number, row)
          on_log(number, row)
          window = metrics.Window(config["data"]["domains"])
          began = now
        if is_saved:
          saved = state.TrainState(trainable, opt_state)
          checkpoints.save(number, saved, {**meta, "step": number})
        if is_stopping and number < num_steps:
          batches.close()
          signal_number = stop.signal_number or signal.SIGTERM
          raise StoppedError(stage.name, number, signal_number)
        if is_saved:
          feed.check_failures(loader, config["data"]["max_skipped"])
      batches.close()
  tower = {name: base[name] for name in stage.tower_shapes} if base else {}
  return {**tower, **frozen, **trainable}


def to_devices(
  batch: pipeline.Batch,
  rows: jax.sharding.NamedSharding,
  is_stopping: bool = False,
) -> dict[str, jax.Array]:
  """This process's rows as part of the global batch.

  What it has to say besides, for the step to add up, goes into its first row.
  """
  signals = np.zeros((len(batch["input_ids"]), len(step.SIGNALS)), np.int32)
  signals[0] = batch.get("num_failed", 0), is_stopping
  arrays = {key: value for key, value in batch.items() if key != "num_failed"}
  return {
    key: jax.make_array_from_process_local_data(rows, value)
    for key, value in (arrays | {"signals": signals}).items()
  }
