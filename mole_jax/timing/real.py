"""A config's own data, where they are there: under the step, and alone."""

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mole_jax.data import pipeline
from mole_jax.models import llava
from mole_jax.timing import clock, steps, synthetic
from mole_jax.training import feed, state
from mole_jax.training import stage as stage_lib


def make_loader(
  config: Mapping[str, Any],
  stage_name: str,
  model: llava.LlavaConfig,
  num_steps: int,
) -> tuple[pipeline.Loader, float]:
  """The stage's batches for at least `num_steps`, and the seconds it took.

  They hold pixels, also where config.data.features is "cached". Raises OSError
  or ValueError where data or tokenizer are not there.
  """
  config = copy.deepcopy(dict(config))
  settings = config["stages"][stage_name]
  settings["num_steps"] = max(num_steps, settings["num_steps"])
  began = time.perf_counter()
  text = feed.read_tokenizer(config)
  loader = feed.make_loader(config, stage_name, text, model.num_image_tokens)
  return loader, time.perf_counter() - began


def time_steps(
  config: Mapping[str, Any],
  stage: stage_lib.Stage,
  step: Any,
  weights: tuple[state.TrainState, state.Flat],
  num_steps: int,
) -> dict[str, Any]:
  """Times `num_steps` steps; {"not_there": reason} where there are no data."""
  if config["data"]["batching"] != "packed":
    return {
      "not_there": f"config.data.batching={config['data']['batching']!r} has "
      "batches of several shapes; set it to 'packed' for this"
    }
  needed = steps.NUM_WARMUP + num_steps
  try:
    loader, seconds = make_loader(
      config, stage.name, stage.model_config, needed
    )
  except (OSError, ValueError) as error:
    return {"not_there": str(error)}
  batches = loader.iterate(0)
  try:
    run = steps.Run(stage, step, batches, weights)
    run.steps(steps.NUM_WARMUP)
    timing = steps.report(stage, run.steps(num_steps))
  finally:
    batches.close()
  return {
    **timing,
    "losses": run.losses,
    "loader_seconds": seconds,
    "padding_share": loader.padding.share,
    "num_workers": config["data"]["num_workers"],
  }


def time_batches(
  config: Mapping[str, Any],
  stage_name: str,
  model: llava.LlavaConfig,
  num_batches: int,
) -> dict[str, Any]:
  """Takes batches as fast as they come, with no step between them.

  Rates are over the whole time, from the call for the first batch on: batches
  are prepared ahead and come in bursts. Take many.
  """
  loader, loader_seconds = make_loader(config, stage_name, model, num_batches)
  batches = loader.iterate(0)
  counts: dict[str, list[int]] = {"rows": [], "samples": [], "tokens": []}
  seconds = []
  try:
    began = time.perf_counter()
    for _ in range(num_batches):
      batch = next(batches)
      now = time.perf_counter()
      seconds.append(now - began)
      began = now
      counts["rows"].append(len(batch["segment_ids"]))
      counts["samples"].append(synthetic.num_samples(batch))
      counts["tokens"].append(int((batch["segment_ids"] > 0).sum()))
  finally:
    batches.close()
  total = float(np.sum(seconds))
  return {
    "batches": num_batches,
    "num_workers": config["data"]["num_workers"],
    "loader_seconds": loader_seconds,
    "first_batch_seconds": seconds[0],
    "batch_seconds": clock.summary(seconds),
    **{
      f"{name}_per_second": float(np.sum(values)) / total
      for name, values in counts.items()
    },
    "padding_share": loader.padding.share,
  }
