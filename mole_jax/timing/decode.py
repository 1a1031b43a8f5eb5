"""Prefill and decoding of a stage's model, on random weights and prompts."""

import time
from typing import Any

import jax
import numpy as np

from mole_jax.inference import generator
from mole_jax.timing import clock, machine, synthetic
from mole_jax.training import stage as stage_lib
from mole_jax.training import state


def measure(
  stage: stage_lib.Stage,
  *,
  batch_size: int,
  num_prompt: int,
  num_images: int,
  num_new: int,
  num_rounds: int,
  is_unrolled: bool | None = None,
) -> dict[str, Any]:
  """Times answers of one token (prefill) and of `num_new`, in turn.

  Nothing ends an answer early. `is_unrolled` as for a Generator. Raises
  ValueError where a prompt does not hold its images or the new tokens are too
  few to tell from prefill.
  """
  if num_new < 2:
    raise ValueError(f"--new-tokens={num_new} must be 2 or more.")
  model = stage.model_config
  taken = num_images * model.num_image_tokens
  if taken + 2 > num_prompt:
    raise ValueError(
      f"--prompt-tokens={num_prompt} does not hold {num_images} image(s) of "
      f"{model.num_image_tokens} tokens; use {taken + 2} or more."
    )
  start, frozen = synthetic.parameters(stage)
  params = state.unflatten({**frozen, **start.trainable})
  vocab_size = model.decoder.vocab_size
  ids = [model.image_token_id, 0]
  answer = generator.Generator(
    model,
    params,
    eos_id=0,
    pad_id=1,
    banned_ids=ids,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    is_unrolled=is_unrolled,
  )
  random = np.random.default_rng(0)
  side = model.vision.image_size
  prompts = []
  for _ in range(batch_size):
    row = random.integers(4, vocab_size, num_prompt, dtype=np.int32)
    row[row == model.image_token_id] = 4 if model.image_token_id != 4 else 5
    row[1 : 1 + taken] = model.image_token_id
    pixels = (num_images, side, side, 3)
    images = random.integers(0, 256, pixels, dtype=np.uint8)
    prompts.append(generator.Prompt(row, images))

  def timed(count):
    def call():
      began = time.perf_counter()
      answer(
        prompts,
        max_new_tokens=count,
        batch_size=batch_size,
        lengths=(num_prompt,),
        # An id that no model has: answers run to their full length.
        eos_id=-1,
      )
      return time.perf_counter() - began

    return call

  calls = [timed(1), timed(num_new)]
  compile_and_run = clock.interleave(calls, 1)
  prefill, whole = clock.interleave(calls, num_rounds)
  step = np.subtract(whole, prefill) / (num_new - 1)
  median = clock.summary(step.tolist())["median"]
  return {
    "batch_size": batch_size,
    "prompt_tokens": num_prompt,
    "images": num_images,
    "new_tokens": num_new,
    "first_call_seconds": [row[0] for row in compile_and_run],
    "prefill_seconds": clock.summary(prefill),
    "seconds": clock.summary(whole),
    "seconds_a_token": clock.summary(step.tolist()),
    "new_tokens_per_second": batch_size / median,
    "prompt_tokens_per_second": batch_size
    * num_prompt
    / clock.summary(prefill)["median"],
    "memory": machine.peak_memory(jax.local_devices()),
  }
