"""Prefill and decoding of a stage's model, on random weights and prompts."""

import time
from collections.abc import Callable, Sequence
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
  ValueError as `check` does.
  """
  check(stage.model_config.num_image_tokens, num_prompt, num_images, num_new)
  timed = answering(
    stage,
    batch_size=batch_size,
    num_prompt=num_prompt,
    num_images=num_images,
    is_unrolled=is_unrolled,
  )
  calls = [lambda: timed(1), lambda: timed(num_new)]
  compile_and_run = clock.interleave(calls, 1)
  prefill, whole = clock.interleave(calls, num_rounds)
  return {
    "batch_size": batch_size,
    "prompt_tokens": num_prompt,
    "images": num_images,
    "new_tokens": num_new,
    "first_call_seconds": [row[0] for row in compile_and_run],
    **rates(prefill, whole, batch_size, num_prompt, num_new),
    "memory": machine.peak_memory(jax.local_devices()),
  }


def check(
  num_image_tokens: int, num_prompt: int, num_images: int, num_new: int
) -> None:
  """Raises ValueError where a prompt does not hold its images.

  And where the new tokens are too few to tell from prefill.
  """
  if num_new < 2:
    raise ValueError(f"--new-tokens={num_new} must be 2 or more.")
  if num_images < 0:
    raise ValueError(f"--images={num_images} must be 0 or more.")
  taken = num_images * num_image_tokens
  if taken + 2 > num_prompt:
    raise ValueError(
      f"--prompt-tokens={num_prompt} does not hold {num_images} image(s) of "
      f"{num_image_tokens} tokens; use {taken + 2} or more."
    )


def token_seconds(
  prefill: Sequence[float], whole: Sequence[float], num_new: int
) -> list[float]:
  """Of a token after the first, by round."""
  return (np.subtract(whole, prefill) / (num_new - 1)).tolist()


def rates(
  prefill: Sequence[float],
  whole: Sequence[float],
  batch_size: int,
  num_prompt: int,
  num_new: int,
) -> dict[str, Any]:
  """What answers of one token and of `num_new` come to, seconds by round.

  `new_tokens_per_second` is None where other work on the machine hid what the
  tokens after the first cost.
  """
  step = token_seconds(prefill, whole, num_new)
  median = clock.summary(step)["median"]
  return {
    "prefill_seconds": clock.summary(prefill),
    "seconds": clock.summary(whole),
    "seconds_a_token": clock.summary(step),
    "new_tokens_per_second": batch_size / median if median > 0 else None,
    "prompt_tokens_per_second": batch_size
    * num_prompt
    / clock.summary(prefill)["median"],
  }


def answering(
  stage: stage_lib.Stage,
  *,
  batch_size: int,
  num_prompt: int,
  num_images: int,
  is_unrolled: bool | None = None,
) -> Callable[[int], float]:
  """A function from a number of new tokens to the seconds of an answer."""
  model = stage.model_config
  taken = num_images * model.num_image_tokens
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
    began = time.perf_counter()
    answers = answer(
      prompts,
      max_new_tokens=count,
      batch_size=batch_size,
      lengths=(num_prompt,),
      # An id that no model has: answers run to their full length.
      eos_id=-1,
    )
    seconds = time.perf_counter() - began
    got = {len(one.tokens) for one in answers}
    if got != {count}:
      raise RuntimeError(f"answers of {got} tokens; wanted {count} in each.")
    return seconds

  return timed
