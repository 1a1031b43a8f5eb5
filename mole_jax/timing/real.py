"""The same step fed by a config's own data, where they are there."""

import copy
from collections.abc import Mapping
from typing import Any

from mole_jax.timing import steps
from mole_jax.training import feed, loop, state


def time_steps(
  config: Mapping[str, Any],
  stage: loop.Stage,
  step: Any,
  weights: tuple[state.TrainState, state.Flat],
  num_steps: int,
) -> dict[str, Any]:
  """Times `num_steps` steps; {"not_there": reason} where data cannot be read.

  Batches hold pixels, also where config.data.features is "cached".
  """
  needed = steps.NUM_WARMUP + num_steps
  config = copy.deepcopy(dict(config))
  settings = config["stages"][stage.name]
  settings["num_steps"] = max(needed, settings["num_steps"])
  try:
    loader = feed.make_loader(
      config,
      stage.name,
      feed.read_tokenizer(config),
      stage.model_config.num_image_tokens,
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
    "padding_share": loader.padding.share,
    "num_workers": config["data"]["num_workers"],
  }
