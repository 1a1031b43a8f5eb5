"""Random weights and batches of a stage's shapes, for timings without data.

Weights are made on the devices, in the type and sharding in which they stay,
one layer of a stacked parameter at a time: a 7B base in bf16 needs no more
memory than itself. They are random, since zeros run faster than weights do.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mole_jax.training import losses, state
from mole_jax.training import stage as stage_lib

_LAYERS = ("decoder/layers/", "vision/layers/")
# What ends a residual branch starts small, as in the model.
_BRANCH_ENDS = ("o_proj", "down_proj", "out_proj", "fc2")
# Of whole numbers from -127 to 127, all as likely.
_INT8_STD = math.sqrt((255**2 - 1) / 12)


def parameters(
  stage: stage_lib.Stage, seed: int = 0
) -> tuple[state.TrainState, state.Flat]:
  """Trainable state and frozen parameters, as `Stage.start` returns them."""
  flat = maker(stage)(jax.random.key(seed))
  trainable = {name: flat[name] for name in stage.trainable_shapes}
  frozen = {name: flat[name] for name in stage.frozen_shapes}
  place = stage.shardings["opt_state"]
  opt_state = jax.jit(stage.optimizer.init, out_shardings=place)(trainable)
  return state.TrainState(trainable, opt_state), frozen


def maker(stage: stage_lib.Stage) -> Callable[[Array], state.Flat]:
  """The jitted function from a key to all parameters of a stage, flat."""
  shapes = {**stage.trainable_shapes, **stage.frozen_shapes}
  places = {**stage.shardings["trainable"], **stage.shardings["frozen"]}

  widths = {
    name: leaf.shape[-2]
    for name, leaf in shapes.items()
    if leaf.dtype == jnp.int8
  }

  def make(key):
    keys = jax.random.split(key, len(shapes))
    return {
      name: _draw(key, name, shapes[name], widths)
      for key, name in zip(keys, sorted(shapes), strict=True)
    }

  return jax.jit(make, out_shardings=places)


def _draw(
  key: Array,
  name: str,
  leaf: jax.ShapeDtypeStruct,
  widths: Mapping[str, int],
) -> Array:
  """`widths`: of the inputs of kernels, by path."""
  constant = _constant(name)
  if constant is not None:
    return jnp.full(leaf.shape, constant, leaf.dtype)
  if name.endswith("/kernel_scale"):
    kernel = name.removesuffix("_scale")
    std = scale(kernel, (leaf.shape[0], widths[kernel], leaf.shape[1]))
    return jnp.full(leaf.shape, std / _INT8_STD, leaf.dtype)
  std = scale(name, leaf.shape)

  def draw(key, shape):
    if leaf.dtype == jnp.int8:
      return jax.random.randint(key, shape, -127, 128, leaf.dtype)
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(leaf.dtype)

  if not name.startswith(_LAYERS):
    return draw(key, leaf.shape)
  keys = jax.random.split(key, leaf.shape[0])
  return jax.lax.map(lambda key: draw(key, leaf.shape[1:]), keys)


def _constant(name: str) -> float | None:
  """Value of a parameter that starts as a constant, None of another."""
  constants = {"scale": 1.0, "bias": 0.0, "lm_head_bias": 0.0}
  return constants.get(name.rsplit("/", 1)[-1])


def scale(name: str, shape: tuple[int, ...]) -> float:
  """Standard deviation that keeps activations of about size one.

  LoRA's B is small instead of zero, so that every product has work to do.
  """
  if len(shape) < 2 or name.endswith("embedding") or "embed_tokens" in name:
    return 0.02
  width = 1 / math.sqrt(shape[-2])
  if name.endswith("lora_b"):
    return 0.1 * width
  if any(f"/{end}/" in name for end in _BRANCH_ENDS):
    return width * math.sqrt(0.5 / shape[0])
  return width


def batch(stage: stage_lib.Stage, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of full rows: every image slot used, random tokens and pixels.

  Rows are cut into as many segments as images are dealt to, one at least.
  Raises ValueError where the images leave no room for text.
  """
  settings, model = stage.settings, stage.model_config
  rows, length = settings["batch_size"], settings["max_length"]
  images = settings["max_images"]
  segments = max(1, min(images, settings["max_segments"]))
  size, taken = length // segments, model.num_image_tokens
  needed = -(-images // segments) * taken + 2
  if needed > size and images * taken + 2 <= length:
    segments, size, needed = 1, length, images * taken + 2
  if needed > size:
    raise ValueError(
      f"config.stages.{stage.name}.max_length={length} holds no "
      f"{images} images of {taken} tokens and text beside them; set max_length "
      f"to {images * taken + 2} or more, or max_images to "
      f"{(length - 2) // taken}."
    )
  random = np.random.default_rng(seed)
  vocab_size = model.decoder.vocab_size
  ids = random.integers(4, vocab_size, (rows, length), dtype=np.int32)
  ids[ids == model.image_token_id] = 4 if model.image_token_id != 4 else 5
  segment_ids = np.minimum(np.arange(length) // size, segments - 1) + 1
  positions = np.arange(length) - (segment_ids - 1) * size
  is_image = np.zeros(length, bool)
  for image in range(images):
    start = (image % segments) * size + 1 + (image // segments) * taken
    is_image[start : start + taken] = True
  ids[:, is_image] = model.image_token_id
  side = model.vision.image_size
  pixels = (rows, images, side, side, 3)
  tile = lambda row: np.tile(row.astype(np.int32), (rows, 1))
  return {
    "input_ids": ids,
    "labels": np.where(is_image[None], losses.IGNORED, ids).astype(np.int32),
    "positions": tile(positions),
    "segment_ids": tile(segment_ids),
    "images": random.integers(0, 256, pixels, dtype=np.uint8),
    "domains": np.zeros((rows, settings["max_segments"]), np.int32),
  }


def num_samples(batch: Mapping[str, np.ndarray]) -> int:
  """Samples in a batch: the segments of its rows."""
  return int(batch["segment_ids"].max(1).sum())
