"""Greedy text of our generator against that of Transformers."""

import numpy as np
import torch

from mole_jax.inference import generate, generator
from mole_jax.training import state
from tests.interop import torch_models

END = 0


def assert_same_text(model, config, flat, prompts, max_new_tokens):
  """Each answer, up to its end. Pixels are bytes 0 and 1, taken as such."""
  made = generator.Generator(
    config,
    state.unflatten(flat),
    eos_id=END,
    pad_id=0,
    banned_ids=[],
    image_mean=[0.0] * 3,
    image_std=[1.0 / 255] * 3,
  )
  answers = made(
    prompts, max_new_tokens=max_new_tokens, sampling=generate.GREEDY
  )
  for prompt, answer in zip(prompts, answers, strict=True):
    pixels = torch_models.to_torch(prompt.images.astype(np.float32))
    images = {"pixel_values": pixels} if len(pixels) else {}
    theirs = model.generate(
      input_ids=torch.from_numpy(prompt.input_ids)[None].long(),
      **images,
      max_new_tokens=max_new_tokens,
      do_sample=False,
      eos_token_id=END,
      pad_token_id=0,
    )[0, len(prompt.input_ids) :].tolist()
    theirs = theirs[: theirs.index(END)] if END in theirs else theirs
    assert answer.tokens.tolist() == theirs
