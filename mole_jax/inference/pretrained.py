"""A trained model for people and notebooks: `mole_jax.load(path)`."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from PIL import Image

from mole_jax.data import conversation, templates
from mole_jax.data import images as images_lib
from mole_jax.data import tokenizer as tokenizer_lib
from mole_jax.inference import generate as generate_lib
from mole_jax.inference import generator as generator_lib
from mole_jax.inference import inputs
from mole_jax.models import decoder, llava
from mole_jax.training import checkpoint, feed, state, step

Turns = Sequence[Mapping[str, str]]
Picture = Image.Image | str | os.PathLike | bytes | np.ndarray


def load(
  path: str | os.PathLike, *, is_unrolled: bool | None = None
) -> "Model":
  """Loads a trained model.

  Args:
    path: RUN (the newest step of its last stage), RUN/<stage>,
      RUN/<stage>/checkpoints/<step>, or a directory that
      `mole_jax.convert from-hf` wrote.
    is_unrolled: takes the layers apart for generation: faster by the token,
      slower to compile, a second copy of the layers' weights. None does so
      where that pays and fits: on a GPU, and on a CPU for batches of 8.

  Raises ValueError where there is no model, or its base has changed since.
  """
  read = checkpoint.read_model(path)
  text = feed.read_tokenizer(read.config)
  return Model(
    read.config,
    read.stage,
    read.step,
    read.params,
    text,
    is_unrolled=is_unrolled,
  )


@dataclasses.dataclass(frozen=True)
class TokenRouting:
  """Which experts served the tokens of one prompt.

  tokens: text of each token; `<image>` at each position of an image.
  is_image: bool[T], True at the positions of images, visual_start and
    visual_end included.
  chosen: int32[L, T, k], experts by layer and token, the likeliest first; of
    `layers` only. -1 where one layer chooses fewer experts than another, or
    padding none. Plain LoRA and a model without adapters have one way: zeros,
    k = 1, all layers.
  layers: the decoder's layers whose tokens choose, counted from 0.
  """

  tokens: tuple[str, ...]
  is_image: Bool[np.ndarray, " T"]
  chosen: Int[np.ndarray, "L T k"]
  layers: tuple[int, ...]


class Model:
  """A trained model with its tokenizer and configuration.

  config: the run's resolved configuration, nested dictionaries.
  stage, step: where in the run the parameters come from.
  params: parameters as nested dictionaries of arrays.
  tokenizer: text to ids and back.
  preparation: what the vision tower wants of pictures.
  """

  config: dict[str, Any]
  stage: str
  step: int
  params: dict[str, Any]
  tokenizer: tokenizer_lib.Tokenizer
  preparation: images_lib.Preparation

  def __init__(
    self,
    config: Mapping[str, Any],
    stage: str,
    step: int,
    params: Mapping[str, Any],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    is_unrolled: bool | None = None,
  ):
    """Takes a configuration, where it stands, flat parameters, tokenizer.

    `is_unrolled` as for `load`.
    """
    self.config = dict(config)
    self.stage = stage
    self.step = step
    self.params = state.unflatten(params)
    self.tokenizer = tokenizer
    self.model_config = state.model_config(config, stage)
    self.preparation = images_lib.preparation_of(config)
    data = config["data"]
    self._template = templates.read_template(data["template"], tokenizer)
    vocab_size = self.model_config.decoder.vocab_size
    self.generator = generator_lib.Generator(
      self.model_config,
      self.params,
      eos_id=templates.end_id(self._template, tokenizer),
      pad_id=tokenizer.pad_id,
      # Rows of the table that no token owns have no text.
      banned_ids=[
        self.image_token_id,
        tokenizer.pad_id,
        *tokenizer.unused_ids(vocab_size),
      ],
      image_mean=data["image_mean"],
      image_std=data["image_std"],
      is_unrolled=is_unrolled,
    )

  @property
  def image_token_id(self) -> int:
    """The id that stands at every position an image takes."""
    return self.model_config.image_token_id

  @property
  def num_image_tokens(self) -> int:
    """Positions one image takes, visual_start and visual_end included."""
    return self.model_config.num_image_tokens

  @property
  def experts_of_layers(self) -> dict[int, int]:
    """Layers whose tokens choose among experts -> how many."""
    c = self.model_config
    return decoder.experts_of_routed_layers(c.decoder, c.mole, c.moe)

  @property
  def num_experts(self) -> int:
    """Experts of the layer with most; 1 is plain LoRA, 0 no adapters."""
    routed = self.experts_of_layers.values()
    return max(routed, default=self.model_config.mole.num_experts)

  @property
  def routed_layers(self) -> tuple[int, ...]:
    """Layers of `TokenRouting.chosen`."""
    return tuple(self.experts_of_layers) or tuple(range(self.num_layers))

  @property
  def num_layers(self) -> int:
    """Decoder layers."""
    return self.model_config.decoder.num_layers

  def logits(
    self,
    input_ids: Any,
    pixel_values: Any | None = None,
    attention_mask: Any | None = None,
  ) -> Float32[np.ndarray, "B T V"]:
    """Logits at every position.

    Rows may be padded on the left, on the right or on both sides, which
    changes nothing at the other positions; what stands at padding itself has
    no meaning. A row may hold any number of images.

    Args:
      input_ids: int[B, T], `image_token_id` repeated `num_image_tokens` times
        for each image.
      pixel_values: float[N, H, W, 3], normalised as `pixel_values(images)`
        does, in order of appearance over the whole batch, row by row.
      attention_mask: bool or int[B, T], 0 on padding; None is no padding.

    Returns:
      float32[B, T, V].

    Raises:
      ValueError: if image tokens do not come in whole images, are not as many
        as `pixel_values`, or a shape, type or id is wrong.
    """
    arrays = inputs.check_inputs(
      self.model_config, input_ids, pixel_values, attention_mask
    )
    return np.asarray(_logits(self.model_config, self.params, *arrays))

  def pixel_values(
    self, pictures: Sequence[Picture]
  ) -> Float32[np.ndarray, "N H W 3"]:
    """Pictures padded to a square, resized and normalised, for `logits`."""
    pixels = inputs.stack(pictures, self.preparation)
    data = self.config["data"]
    mean = np.array(data["image_mean"], np.float32)
    std = np.array(data["image_std"], np.float32)
    return (pixels.astype(np.float32) / 255.0 - mean) / std

  def generate(
    self,
    prompts: str | Turns | Sequence[str | Turns],
    images: Picture | Sequence[Any] | None = None,
    max_new_tokens: int = 64,
    *,
    temperature: float | int = 0.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    repetition_penalty: float | int = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    batch_size: int = 32,
  ) -> list[str]:
    """Answers questions.

    Args:
      prompts: a question, or a list of them; in place of a question there may
        be the turns of a conversation, {"from": "human" or "gpt", "value":
        str}, that ends with one. The run's template is put around them.
        Images stand where a turn says `<image>`, else before the first turn.
      images: for one prompt its image, or a list of them. For several
        prompts a list with an entry each: an image, a list, or None. A single
        image serves all prompts. An image is a PIL image, a path, encoded
        bytes or uint8[H, W, 3].
      max_new_tokens: longest answer.
      temperature: 0 takes the likeliest token, more draws one.
      top_k: draws among the k likeliest tokens; 0 is off.
      top_p: draws among the fewest tokens that reach this probability.
      repetition_penalty: more than 1 avoids tokens the answer already holds.
      seed: of drawing.
      eos_id: the token that ends an answer; None is the template's.
      batch_size: prompts answered at a time.

    Returns:
      an answer for each prompt, in order, without surrounding white space.

    Raises:
      ValueError: if images and prompts disagree, or an option is impossible.
    """
    sampling = generate_lib.Sampling(
      temperature, top_k, top_p, repetition_penalty
    )
    answers = self.generator(
      self._prompts(prompts, images),
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      seed=seed,
      eos_id=eos_id,
      batch_size=batch_size,
    )
    return [self.tokenizer.decode(a.tokens).strip() for a in answers]

  def routing(
    self,
    prompts: str | Turns | Sequence[str | Turns],
    images: Picture | Sequence[Any] | None = None,
    answers: Sequence[str] | None = None,
  ) -> list[TokenRouting]:
    """Expert choice by layer and token, for each prompt.

    Args:
      prompts: as for `generate`.
      images: as for `generate`.
      answers: text that follows each prompt, routed with it.

    Returns:
      one `TokenRouting` a prompt: prompt tokens, then those of its answer.
    """
    rows = self._prompts(prompts, images)
    if answers is not None and len(answers) != len(rows):
      raise ValueError(f"{len(answers)} answers for {len(rows)} prompts.")
    return [
      self._routing(row, None if answers is None else answers[i])
      for i, row in enumerate(rows)
    ]

  def encode_prompt(
    self, turns: Turns, pixels: UInt8[np.ndarray, "M H W 3"]
  ) -> generator_lib.Prompt:
    """The row to answer; `turns` has a marker for each of its images."""
    data = self.config["data"]
    ids = conversation.encode_prompt(
      self.tokenizer,
      turns,
      num_image_tokens=self.num_image_tokens,
      system=data["system"],
      use_bos=data["use_bos"],
      template=self._template,
    )
    return generator_lib.Prompt(ids, pixels)

  def _routing(
    self, row: generator_lib.Prompt, answer: str | None = None
  ) -> TokenRouting:
    """Expert choice for an encoded prompt and the answer that follows it."""
    ids = row.input_ids
    if answer is not None:
      more = templates.answer_ids(self._template, self.tokenizer, answer)
      ids = np.concatenate([ids, np.array(more[:-1], np.int32)])
    is_image = ids == self.image_token_id
    if self.num_experts > 1:
      num_images = len(row.images)
      # Padded to the lengths of generation: one program for many lengths.
      width = generator_lib.bucket(len(ids))
      padded = np.full((1, width), self.tokenizer.pad_id, np.int32)
      padded[0, : len(ids)] = ids
      pixels = None
      if num_images:
        pixels = self._normalised(row.images[None])
      is_token = np.arange(width)[None] < len(ids)
      chosen = _experts(
        self.model_config, self.params, padded, pixels, is_token
      )
      chosen = np.asarray(chosen)[:, 0, : len(ids)]
    else:
      chosen = np.zeros((self.num_layers, len(ids), 1), np.int32)
    texts = inputs.token_texts(self.tokenizer, ids)
    return TokenRouting(texts, is_image, chosen, self.routed_layers)

  def _prompts(self, prompts, images) -> list[generator_lib.Prompt]:
    return [
      self.encode_prompt(turns, inputs.stack(pictures, self.preparation))
      for turns, pictures in inputs.pair(prompts, images)
    ]

  def _normalised(self, pixels: UInt8[np.ndarray, "B M H W 3"]) -> jax.Array:
    data = self.config["data"]
    return step.normalise(
      jnp.asarray(pixels),
      tuple(data["image_mean"]),
      tuple(data["image_std"]),
      self.model_config.dtype,
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  config: llava.LlavaConfig, params, input_ids, pixel_values, is_token
) -> jax.Array:
  """float32[B, T, V] of padded rows, images in slots."""
  model = llava.Llava(config)
  hidden = _run(model, params, input_ids, pixel_values, is_token).hidden
  return model.apply({"params": params}, hidden, method="unembed")


@functools.partial(jax.jit, static_argnums=0)
def _experts(
  config: llava.LlavaConfig, params, input_ids, pixel_values, is_token
) -> jax.Array:
  """int32[L, B, T, k] of padded rows, images in slots."""
  model = llava.Llava(config)
  output = _run(model, params, input_ids, pixel_values, is_token)
  return output.routing.chosen


def _run(model, params, input_ids, pixel_values, is_token) -> llava.Output:
  # Positions count tokens, so padding before a row moves nothing.
  positions = jnp.maximum(jnp.cumsum(is_token, axis=1) - 1, 0)
  return model.apply(
    {"params": params},
    input_ids,
    pixel_values,
    positions,
    is_token.astype(jnp.int32),
    1,
  )
