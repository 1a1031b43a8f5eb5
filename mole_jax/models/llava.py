"""LLaVA: vision tower -> projector -> decoder (Liu et al. 2023, 2024).

Einsum axes: see lora.py; "M" are images per row, "Y" and "X" pixels, "C" is
the width of the tower.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mole_jax.models import attention, decoder, lora, mole, remat, vision
from mole_jax.models import moe as moe_lib
from mole_jax.parallel import activations


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
  """A whole model.

  image_token_id: the id that stands at every position an image takes.
  use_visual_tokens: learned visual_start and visual_end vectors around an
    image's patches (LLaVA-MoLE); off for plain LLaVA-1.5.
  remat: one of `remat.POLICIES`.  dtype: what activations are computed in.
  moe: experts that are whole FFNs (MoE-LLaVA); by default there are none.
  """

  vision: vision.VisionConfig
  decoder: decoder.DecoderConfig
  lora: decoder.LoraConfig
  mole: mole.MoleConfig
  image_token_id: int
  use_visual_tokens: bool = True
  remat: str = "none"
  dtype: str = "float32"
  moe: moe_lib.MoeConfig = moe_lib.MoeConfig()

  def __post_init__(self):
    # Raises for layers that there are not.
    moe_lib.experts_by_layer(self.moe, self.decoder.num_layers)
    if self.remat not in remat.POLICIES:
      raise ValueError(
        f"model.remat={self.remat!r} must be one of {remat.POLICIES}."
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"model.dtype={self.dtype!r} must be 'float32' or 'bfloat16'."
      )

  @property
  def num_image_tokens(self) -> int:
    """Positions one image takes, visual_start and visual_end included."""
    return self.vision.num_patches + 2 * self.use_visual_tokens


def make_config(values: Mapping[str, Any]) -> LlavaConfig:
  """Builds the typed configuration from plain nested dictionaries.

  The section "moe" may be missing. Raises ValueError that names an unknown or
  missing key.
  """
  parts = {
    "vision": vision.VisionConfig,
    "decoder": decoder.DecoderConfig,
    "lora": decoder.LoraConfig,
    "mole": mole.MoleConfig,
    "moe": moe_lib.MoeConfig,
  }
  arguments = {"moe": {}} | dict(values)
  for key, part in parts.items():
    if key not in arguments:
      raise ValueError(f"config.model lacks the section {key!r}.")
    arguments[key] = _fill(part, arguments[key], f"config.model.{key}")
  return _fill(LlavaConfig, arguments, "config.model")


def _fill(cls, values, where):
  known = [field.name for field in dataclasses.fields(cls)]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise ValueError(f"{where} has no {unknown}; its keys are {known}.")
  return cls(**values)


class Output(NamedTuple):
  """Final hidden states, routing stacked over layers, cache, layers' inputs."""

  hidden: Float[Array, "B T D"]
  routing: decoder.LayerRouting | None
  cache: decoder.Cache | tuple[decoder.Cache, ...] | None
  layer_inputs: Float[Array, "L B T D"] | None


def place_image_features(
  x: Float[Array, "B T D"],
  features: Float[Array, "B F D"],
  is_image: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
  """Scatters a row's image features into its image positions, in order.

  Features of unused image slots have no position left and are dropped. Image
  positions must come in whole images (the data pipeline sees to that).
  """
  tokens, size = x.shape[1], features.shape[1]
  # Position of the i-th image token of each row. Where there is none: out of
  # bounds, hence dropped, and no two alike, since that is what is promised.
  find = lambda row: jnp.nonzero(row, size=size, fill_value=tokens)[0]
  position = jax.vmap(find)(is_image)
  slots = jnp.arange(size, dtype=position.dtype)
  position = jnp.where(position < tokens, position, tokens + slots[None])
  # Rows are a batching dimension: the compiler sees that none crosses devices.
  dimensions = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2,),
    inserted_window_dims=(1,),
    scatter_dims_to_operand_dims=(1,),
    operand_batching_dims=(0,),
    scatter_indices_batching_dims=(0,),
  )
  return jax.lax.scatter(
    x,
    position[..., None],
    features.astype(x.dtype),
    dimensions,
    indices_are_sorted=True,
    unique_indices=True,
    mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
  )


class Projector(nn.Module):
  """Linear, exact GELU, Linear: tower features -> decoder width."""

  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P F"]:
    x = lora.LoraLinear(self.features, use_bias=True, name="linear_1")(x)
    x = jax.nn.gelu(x, approximate=False)
    return lora.LoraLinear(self.features, use_bias=True, name="linear_2")(x)


class Llava(nn.Module):
  """The whole model; every parameter lives in `params`."""

  config: LlavaConfig

  def setup(self):
    c = self.config
    width = c.decoder.hidden_size
    self.vision = vision.VisionTower(c.vision, c.remat)
    self.projector = Projector(width)
    self.decoder = decoder.Decoder(c.decoder, c.lora, c.mole, c.remat, c.moe)
    if c.use_visual_tokens:
      normal = nn.initializers.normal(0.02)
      self.visual_start = self.param("visual_start", normal, (width,))
      self.visual_end = self.param("visual_end", normal, (width,))

  def encode_images(
    self, pixel_values: Float[Array, "B M Y X 3"]
  ) -> Float[Array, "B F D"]:
    """Embeddings for every position that the images of a row take."""
    batch, images = pixel_values.shape[:2]
    flat = pixel_values.reshape(-1, *pixel_values.shape[2:])
    x = self.vision(flat.astype(self.config.dtype))
    return self.project(x.reshape(batch, images, *x.shape[1:]))

  def project(self, features: Float[Array, "B M P C"]) -> Float[Array, "B F D"]:
    """As `encode_images`, of what the tower has made of the images."""
    batch, images = features.shape[:2]
    flat = features.reshape(-1, *features.shape[2:])
    x = self.projector(flat.astype(self.config.dtype))
    if self.config.use_visual_tokens:
      shape = (x.shape[0], 1, x.shape[2])
      start, end = (
        jnp.broadcast_to(token.astype(x.dtype), shape)
        for token in (self.visual_start, self.visual_end)
      )
      x = jnp.concatenate([start, x, end], axis=1)
    x = x.reshape(batch, images * x.shape[1], x.shape[2])
    return activations.rows(x)

  def embed(
    self,
    input_ids: Int[Array, "B T"],
    pixel_values: Float[Array, "B M Y X 3"] | None,
    features: Float[Array, "B M P C"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Embeds tokens, images in the places of image tokens."""
    x = self.decoder.embed(input_ids).astype(self.config.dtype)
    x = activations.rows(x)
    if features is not None:
      images = self.project(features)
    elif pixel_values is not None:
      images = self.encode_images(pixel_values)
    else:
      return x
    is_image = input_ids == self.config.image_token_id
    return activations.rows(place_image_features(x, images, is_image))

  def __call__(
    self,
    input_ids: Int[Array, "B T"],
    pixel_values: Float[Array, "B M Y X 3"] | None,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    num_segments: int,
    is_training: bool = False,
    keep_inputs: bool = False,
    features: Float[Array, "B M P C"] | None = None,
  ) -> Output:
    """Runs packed rows; segment 0 is padding, which is never counted.

    Images are normalised floats, in order of appearance in their row; with
    `features`, what the tower made of them, its parameters are not needed.
    `keep_inputs` is for comparisons: see `Decoder`.
    """
    # Rows of one segment that the data pipeline made have their padding behind
    # it, where no token looks; others may have it in front.
    is_plain = is_training and num_segments == 1
    mask = None if is_plain else attention.causal_segment_mask(segment_ids)
    segments = segment_members(segment_ids, num_segments)
    x = self.embed(input_ids, pixel_values, features)
    output = self.decoder(
      x,
      positions,
      mask,
      segments,
      is_training=is_training,
      keep_inputs=keep_inputs,
      segment_ids=segment_ids,
    )
    return Output(*output)

  def extend(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T J"],
    is_token: Bool[Array, "B T"],
    cache: decoder.Cache | tuple[decoder.Cache, ...],
    slot: Int[Array, ""],
    layers: Sequence[Mapping[str, Any]] | None = None,
  ) -> Output:
    """Appends embedded tokens to a cache (prefill and decode).

    `layers`: see `Decoder`; then `cache` is one of each layer.
    """
    output = self.decoder(
      x,
      positions,
      mask,
      is_token[..., None],
      cache=cache,
      slot=slot,
      layers=layers,
    )
    return Output(*output)

  def unembed(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
    """Final hidden states -> logits, float32."""
    return self.decoder.unembed(hidden)


def segment_members(
  segment_ids: Int[Array, "B T"], num_segments: int
) -> Bool[Array, "B T S"]:
  """Membership of tokens in segments 1 .. num_segments."""
  segments = jnp.arange(1, num_segments + 1)
  return segment_ids[..., None] == segments[None, None]
