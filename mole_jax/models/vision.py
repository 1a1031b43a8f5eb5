"""Vision towers: one pre-norm transformer over patches, three families.

CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), DINOv2 (Oquab et al.
2023); order of operations as in `CLIPVisionModel`, `SiglipVisionModel` and
`Dinov2Model` of Transformers, parameters in CLIP's words.

Einsum axes: see lora.py.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from mole_jax.models import attention, lora, norms, remat
from mole_jax.parallel import activations

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


class Family(NamedTuple):
  """In what the towers differ."""

  has_class_token: bool
  has_pre_norm: bool  # Before the first layer.
  has_patch_bias: bool
  has_layer_scale: bool  # A learned factor on each residual branch.


FAMILIES = {
  "clip": Family(True, True, False, False),
  "siglip": Family(False, False, True, False),
  "dinov2": Family(True, False, True, True),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A tower's shape, in Transformers' words; sizes in pixels.

  family: one of FAMILIES.
  position_grid: patches on a side for which positions were learned; they are
    interpolated where an image has another number. 0: as many as it has.
  feature_layer: which hidden state is the feature, counted as in Transformers:
    -1 is the output of the last layer, -2 of the one before it.
  """

  family: str = "clip"
  image_size: int = 336
  patch_size: int = 14
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_layers: int = 24
  num_heads: int = 16
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  position_grid: int = 0
  feature_layer: int = -1

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise ValueError(
        f"vision.family={self.family!r} must be one of {tuple(FAMILIES)}."
      )
    if self.position_grid < 0:
      raise ValueError(
        f"vision.position_grid={self.position_grid} must be at least 0."
      )
    if not 0 < self.patch_size <= self.image_size:
      raise ValueError(
        f"vision.patch_size={self.patch_size} must lie between 1 and "
        f"vision.image_size={self.image_size}."
      )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"vision.hidden_size={self.hidden_size} must be a multiple of "
        f"vision.num_heads={self.num_heads}."
      )
    if self.hidden_act not in ACTIVATIONS:
      raise ValueError(
        f"vision.hidden_act={self.hidden_act!r} must be one of {ACTIVATIONS}."
      )
    if not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
      raise ValueError(
        f"vision.feature_layer={self.feature_layer} must lie between "
        f"{-self.num_layers - 1} and {self.num_layers}; -1 is the last layer."
      )

  @property
  def patches_per_side(self) -> int:
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.patches_per_side**2

  @property
  def positions_per_side(self) -> int:
    return self.position_grid or self.patches_per_side

  @property
  def num_used_layers(self) -> int:
    """Layers that run; those behind the feature layer only keep weights."""
    layer = self.feature_layer
    return layer if layer >= 0 else self.num_layers + 1 + layer


def activate(x: Float[Array, "*N"], name: str) -> Float[Array, "*N"]:
  """`quick_gelu` is x sigmoid(1.702 x); `gelu` the exact (erf) one."""
  if name == "quick_gelu":
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=name == "gelu_pytorch_tanh")


def patchify(
  pixel_values: Float[Array, "B Y X 3"], patch_size: int
) -> Float[Array, "B P D"]:
  """Cuts images into rows of patches; D runs over y, x, channel.

  Pixels at the right and the bottom that fill no patch are left out, as by a
  convolution without padding: SigLIP's 384 are 27 patches of 14, and 6 more.
  """
  batch, height, width, channels = pixel_values.shape
  rows, columns = height // patch_size, width // patch_size
  x = pixel_values[:, : rows * patch_size, : columns * patch_size].reshape(
    batch, rows, patch_size, columns, patch_size, channels
  )
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def bicubic_weights(source: int, target: int) -> Float64[np.ndarray, "O I"]:
  """Row o: what each of `source` samples adds to sample o of `target`.

  Keys 1981 with a = -0.75, borders repeated, no antialiasing:
  `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, with
  which DINOv2 resizes its positions. (`jax.image.resize` has a = -0.5.)
  """
  a = -0.75
  weights = np.zeros((target, source))
  for row in range(target):
    place = (row + 0.5) * source / target - 0.5
    first = math.floor(place)
    for index in range(first - 1, first + 3):
      d = abs(place - index)
      if d <= 1:
        weight = ((a + 2) * d - (a + 3)) * d * d + 1
      else:
        weight = a * (((d - 5) * d + 8) * d - 4)
      weights[row, min(max(index, 0), source - 1)] += weight
  return weights


def resize_positions(
  positions: Float[Array, "I D"], source: int, target: int
) -> Float[Array, "O D"]:
  """Positions of a grid of source x source patches for target x target."""
  if source == target:
    return positions
  weights = jnp.asarray(bicubic_weights(source, target), jnp.float32)
  grid = positions.astype(jnp.float32).reshape(source, source, -1)
  grid = jnp.einsum("oy,pz,yzd->opd", weights, weights, grid)
  return grid.reshape(target * target, -1).astype(positions.dtype)


class LayerScale(nn.Module):
  """A learned factor for each channel (Touvron et al. 2021, equation 5)."""

  @nn.compact
  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
    ones = nn.initializers.ones_init()
    scale = self.param("scale", ones, (x.shape[-1],))
    return x * lora.along_last(scale, x)


class VisionLayer(nn.Module):
  """Pre-norm block: attention, then a two-layer MLP; a scan's body."""

  config: VisionConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B P D"], _: None
  ) -> tuple[Float[Array, "B P D"], None]:
    c = self.config
    batch, patches, width = x.shape
    heads = (batch, patches, c.num_heads, width // c.num_heads)

    def linear(features, name, init_scale=1.0):
      return lora.LoraLinear(
        features, use_bias=True, init_scale=init_scale, name=name
      )

    def scaled(branch, name):
      if not FAMILIES[c.family].has_layer_scale:
        return branch
      return LayerScale(name=name)(branch)

    # Residual branches start small: std / sqrt(2 L) as in GPT-2.
    init_scale = 0.5 / c.num_layers
    y = norms.LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
    query = linear(width, "q_proj")(y).reshape(heads)
    key = linear(width, "k_proj")(y).reshape(heads)
    value = linear(width, "v_proj")(y).reshape(heads)
    y = attention.attend(query, key, value, None).reshape(x.shape)
    y = linear(width, "out_proj", init_scale)(y)
    x = activations.rows(x + scaled(y, "layer_scale1"))
    y = norms.LayerNorm(c.layer_norm_eps, name="layer_norm2")(x)
    y = activate(linear(c.intermediate_size, "fc1")(y), c.hidden_act)
    y = linear(width, "fc2", init_scale)(y)
    return activations.rows(x + scaled(y, "layer_scale2")), None


class VisionTower(nn.Module):
  """Images to the features of their patches, a class token dropped."""

  config: VisionConfig
  remat: str = "none"

  @nn.compact
  def __call__(
    self, pixel_values: Float[Array, "B Y X 3"]
  ) -> Float[Array, "B P D"]:
    c = self.config
    family = FAMILIES[c.family]
    normal = nn.initializers.normal(0.02)
    patches = patchify(pixel_values, c.patch_size)
    x = lora.LoraLinear(
      c.hidden_size, use_bias=family.has_patch_bias, name="patch_embedding"
    )(patches)
    num_class = int(family.has_class_token)
    if num_class:
      token = self.param("class_embedding", normal, (c.hidden_size,))
      token = jnp.broadcast_to(
        token.astype(x.dtype), (x.shape[0], 1, c.hidden_size)
      )
      x = jnp.concatenate([token, x], axis=1)
    shape = (c.positions_per_side**2 + num_class, c.hidden_size)
    positions = self.param("position_embedding", normal, shape)
    grid = resize_positions(
      positions[num_class:], c.positions_per_side, c.patches_per_side
    )
    positions = jnp.concatenate([positions[:num_class], grid])
    x = x + positions.astype(x.dtype)[None]
    if family.has_pre_norm:
      x = norms.LayerNorm(c.layer_norm_eps, name="pre_layrnorm")(x)
    return self._run_layers(x)[:, num_class:]

  def _run_layers(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
    """Scans the layers up to the feature layer.

    `nn.scan` names and initialises all of them; they are applied as a plain
    function of the first rows of their stacked parameters, so that a feature
    layer of -2 does not pay for the last layer.
    """
    c = self.config
    layers = nn.scan(
      VisionLayer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.num_layers,
    )(c, name="layers")
    if self.is_initializing():
      return layers(x, None)[0]
    stacked = self.variables["params"]["layers"]
    used = jax.tree.map(lambda p: p[: c.num_used_layers], stacked)
    layer = VisionLayer(c, parent=None)
    apply = remat.rematerialise(
      lambda x, params: layer.apply({"params": params}, x, None), self.remat
    )
    return jax.lax.scan(apply, x, used)[0]
