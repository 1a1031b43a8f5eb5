"""A frozen decoder whose linear maps lie on the devices in 8 bits.

`stages.NAME.quantize="int8"`: each kernel of attention and MLP becomes int8
with a float32 scale for each layer and output, half a step of which is the most
that a weight moves. They are made while a base is read, one stacked parameter
at a time: what is on disk stays as it is.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from mole_jax.training import state

KINDS = ("none", "int8")
_KERNELS = re.compile(
  r"decoder/layers/(self_attn/[qkvo]_proj|mlp/(\w+_proj|fc[12]))/kernel"
)


def scale_of(kernel: str) -> str:
  """The path of a kernel's scales, which the model looks for beside it."""
  return f"{kernel}_scale"


def kernels(config: Mapping[str, Any], stage: str) -> tuple[str, ...]:
  """Paths of the kernels that a stage holds in 8 bits.

  From the config alone. Raises ValueError for a kind that is not known, and for
  a stage whose kernels cannot be held so.
  """
  settings = config["stages"][stage]
  key = f"config.stages.{stage}.quantize"
  kind = settings.get("quantize", "none")
  if kind not in KINDS:
    raise ValueError(f"{key}={kind!r} must be one of {KINDS}.")
  if kind == "none":
    return ()
  if not settings["use_adapters"]:
    raise ValueError(
      f"{key}={kind!r}, but a stage with use_adapters=False writes a whole "
      "base, which is to keep its precision; set it to 'none' here and to "
      f"{kind!r} in the stage that trains adapters."
    )
  model = state.model_config(config, stage)
  if model.moe.is_on:
    raise ValueError(
      f"{key}={kind!r} is not there for FFNs that are experts "
      "(config.model.moe); set it to 'none'."
    )
  trainable, frozen = state.split(
    state.parameter_shapes(model), settings["trainable"]
  )
  trained = [name for name in trainable if _KERNELS.fullmatch(name)]
  if trained:
    raise ValueError(
      f"{key}={kind!r}, but config.stages.{stage}.trainable has {trained[0]!r}"
      f" and {len(trained) - 1} more of the decoder's kernels, and 8 bits "
      "cannot be trained; take them out of it, or set 'none'."
    )
  return tuple(name for name in frozen if _KERNELS.fullmatch(name))


def shapes(kernel: str, shape: tuple[int, ...]) -> dict[str, Any]:
  """What stands for a kernel [L, D, F]: its path, and that of its scales."""
  layers, _, features = shape
  return {
    kernel: jax.ShapeDtypeStruct(shape, jnp.int8),
    scale_of(kernel): jax.ShapeDtypeStruct((layers, features), jnp.float32),
  }


def maker(
  kernels: tuple[str, ...],
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Callable[[str, Array], state.Flat] | None:
  """The function from a parameter's path and value to what is held of it.

  None where there are no kernels to change. `shardings` are those of the
  results, by path; without them they lie where the parameter lies. Raises
  ValueError where qwix is not installed.
  """
  if not kernels:
    return None
  try:
    import qwix  # noqa: PLC0415 - an extra, which most runs do without.
  except ImportError as error:
    raise ValueError(
      "quantize='int8' needs qwix, which is not installed: pip install -e "
      "'.[quantized]'."
    ) from error

  def layer(
    kernel: Float[Array, "D F"],
  ) -> tuple[Int8[Array, "D F"], Float32[Array, " F"]]:
    kernel = kernel.astype(jnp.float32)
    found = qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,))
    return found.qvalue, found.scale[0]

  # By layers: in float32 there is never more than one.
  by_layer = functools.partial(jax.lax.map, layer)

  def make(name: str, leaf: Array) -> state.Flat:
    if name not in kernels:
      return {name: leaf}
    paths = (name, scale_of(name))
    place = shardings and tuple(shardings[path] for path in paths)
    values = jax.jit(by_layer, out_shardings=place)(leaf)
    return dict(zip(paths, values, strict=True))

  return make
