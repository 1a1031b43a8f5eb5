"""Times a stage's real train step: compilation, memory, steps, waiting."""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mole_jax.compiled import memory
from mole_jax.models import llava, moe
from mole_jax.timing import clock, machine, synthetic
from mole_jax.training import host_memory, loop, metrics, state
from mole_jax.training import stage as stage_lib

# Seconds from one finished step to the next are those of a running pipeline
# only after the first ones.
NUM_WARMUP = 3
NUM_SYNTHETIC_BATCHES = 4
COMPILATIONS = ("cold", "warm")


class Compiled(NamedTuple):
  """A compiled step and what its compilation took and says."""

  step: jax.stages.Compiled
  seconds: dict[str, float]
  memory: dict[str, float] | None


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
  """A persistent compilation cache that is empty, for as long as this lasts."""
  with (
    tempfile.TemporaryDirectory(prefix="mole_jax-bench-") as folder,
    cache_in(folder),
  ):
    yield


@contextlib.contextmanager
def cache_in(folder: str | os.PathLike[str]) -> Iterator[None]:
  """A persistent compilation cache in `folder` that takes every program."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
  )
  before = {name: getattr(jax.config, name) for name in names}
  values = (os.fspath(folder), 0.0, -1)
  for name, value in zip(names, values, strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_step(
  stage: stage_lib.Stage, kinds: Sequence[str] = COMPILATIONS
) -> Compiled:
  """Compiles with nothing cached, then as a second start of the same would.

  Seconds are those of tracing, lowering and compiling together, by `kinds`.
  """
  seconds = {}
  with empty_cache():
    for kind in kinds:
      jax.clear_caches()
      began = time.perf_counter()
      compiled = stage.lower().compile()
      seconds[kind] = time.perf_counter() - began
  host_memory.give_back()  # As the loop does.
  return Compiled(compiled, seconds, predicted_memory(compiled))


def predicted_memory(compiled: Any) -> dict[str, float] | None:
  """What the compiler says that a step needs on each device, in GiB."""
  if compiled.memory_analysis() is None:
    return None
  found = memory.measure(compiled)
  sizes = {
    "arguments": found.arguments,
    "outputs": found.outputs,
    "donated": found.aliased,
    "temporaries": found.temporaries,
    "code": found.code,
    "total": found.peak,
  }
  return {f"{name}_gib": machine.gib(size) for name, size in sizes.items()}


class Run:
  """A stage at work: call `steps`, again and again."""

  def __init__(
    self,
    stage: stage_lib.Stage,
    step: Any,
    batches: Iterator[Mapping[str, np.ndarray]],
    weights: tuple[state.TrainState, state.Flat],
  ):
    self._stage = stage
    self._step = step
    self._batches = batches
    (self._trainable, self._opt_state), self._frozen = weights
    self._number = 0
    self.losses: list[float] = []

  def steps(self, count: int) -> dict[str, list[float]]:
    """Runs `count` steps as the loop does: a step's metrics are read when the
    next one is on its way.

    Returns, by step, the seconds from the end of the step before it, the
    seconds of waiting for its batch (while the step before was at work, as in
    the loop, so not all of them are lost), and the samples and tokens (padding
    apart) in it. Raises NonFiniteLossError.
    """
    rows: dict[str, list[float]] = {
      key: [] for key in ("seconds", "waited", "samples", "tokens")
    }
    pending = None
    ended = time.perf_counter()

    def finish(values):
      nonlocal ended
      values = jax.device_get(values)
      if not values["is_finite"]:
        raise metrics.NonFiniteLossError(self._stage.name, self._number)
      self.losses.append(float(values["loss"]))
      now = time.perf_counter()
      rows["seconds"].append(now - ended)
      ended = now

    for _ in range(count):
      asked = time.perf_counter()
      host = next(self._batches)
      rows["waited"].append(time.perf_counter() - asked)
      rows["samples"].append(synthetic.num_samples(host))
      rows["tokens"].append(int((host["segment_ids"] > 0).sum()))
      sent = loop.to_devices(host, self._stage.shardings["batch"])
      self._trainable, self._opt_state, values = self._step(
        self._trainable,
        self._frozen,
        self._opt_state,
        sent,
        np.int32(self._number),
      )
      self._number += 1
      if pending is not None:
        finish(pending)
      pending = values
    if pending is not None:
      finish(pending)
    return rows

  def weights(self) -> tuple[state.TrainState, state.Flat]:
    """Where training stands, for another run to go on with."""
    return state.TrainState(self._trainable, self._opt_state), self._frozen


def synthetic_batches(
  stage: stage_lib.Stage,
) -> Iterator[dict[str, np.ndarray]]:
  """A few random batches, over and over."""
  return itertools.cycle(
    [synthetic.batch(stage, seed) for seed in range(NUM_SYNTHETIC_BATCHES)]
  )


def report(
  stage: stage_lib.Stage, rows: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
  """What timed steps come to.

  tokens_per_second counts every position, as the FLOPs do;
  text_tokens_per_second leaves out padding.
  """
  seconds = clock.summary(rows["seconds"])
  settings, model = stage.settings, stage.model_config
  positions = settings["batch_size"] * settings["max_length"]
  median = seconds["median"]
  step_flops = sum(stage.flops_by_part().values())
  devices = list(stage.mesh.devices.flat)
  peak = machine.peak_flops(devices[0].device_kind, model.dtype)
  achieved = step_flops / median / len(devices)
  return {
    "step_seconds": seconds,
    "tokens_per_second": positions / median,
    "text_tokens_per_second": float(np.mean(rows["tokens"])) / median,
    "samples_per_second": float(np.mean(rows["samples"])) / median,
    "tflops_per_second_per_device": achieved / 1e12,
    "mfu": None if peak is None else achieved / peak,
    "stall_share": float(np.sum(rows["waited"]) / np.sum(rows["seconds"])),
  }


def _full_experts(model: llava.LlavaConfig) -> dict[str, Any] | None:
  """Whole FFNs as experts by layer, and how tokens meet them."""
  if not model.moe.is_on:
    return None
  by_layer = moe.experts_by_layer(model.moe, model.decoder.num_layers)
  return dataclasses.asdict(model.moe) | {"by_layer": by_layer}


def describe(stage: stage_lib.Stage) -> dict[str, Any]:
  """What a stage is, as far as its speed goes."""
  settings, model = stage.settings, stage.model_config
  keys = ("batch_size", "max_length", "max_images", "max_segments")
  totals = np.sum(list(stage.counts.values()), axis=0)
  by_part = stage.flops_by_part()
  return {
    "stage": stage.name,
    **{key: settings[key] for key in keys},
    "remat": model.remat,
    "dtype": model.dtype,
    "num_experts": model.mole.num_experts,
    "top_k": model.mole.top_k,
    "rank": model.mole.rank,
    "dispatch": model.mole.dispatch,
    "full_experts": _full_experts(model),
    "mesh": dict(stage.mesh.shape),
    "trainable_parameters": int(totals[0]),
    "frozen_parameters": int(totals[1]),
    "flops": {"total": sum(by_part.values()), **by_part},
    "flops_formula": "mole_jax/training/flops.py: 2 forward, +2 where a "
    "gradient passes, +2 where weights are trained, per multiply-add; no "
    "rematerialisation",
  }
