"""Parameters as flat dictionaries by path, trainable and frozen apart."""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mole_jax.models import llava

Flat = dict[str, Array]


class TrainState(NamedTuple):
  """What a checkpoint holds of a stage, besides its config."""

  trainable: Flat
  opt_state: Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries -> {"decoder/layers/mlp/router/kernel": leaf}."""
  flat = {}
  for key, value in tree.items():
    path = f"{prefix}/{key}" if prefix else key
    if isinstance(value, Mapping):
      flat |= flatten(value, path)
    else:
      flat[path] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[name] = value
  return tree


def model_config(config: Mapping[str, Any], stage: str) -> llava.LlavaConfig:
  """The model of a stage.

  Without `use_adapters` it has no LoRA, without `use_experts` (which recipes
  without a section `model.moe` leave out) no FFN has more than one expert.
  """
  values = {
    key: dict(value) if isinstance(value, Mapping) else value
    for key, value in config["model"].items()
  }
  settings = config["stages"][stage]
  if not settings["use_adapters"]:
    values["lora"]["rank"] = 0
    values["mole"]["num_experts"] = 0
  if "moe" in values and not settings.get("use_experts", False):
    values["moe"]["layers"] = "none"
  return llava.make_config(values)


def initialise(
  config: llava.LlavaConfig, key: Array, names: Sequence[str] | None = None
) -> Flat:
  """Initial parameters, flat; with `names`, only those.

  Under `jax.jit` what is not asked for is not computed; under
  `jax.eval_shape` nothing is.
  """
  size = config.vision.image_size
  ids = jnp.zeros((1, 8), jnp.int32)
  pixels = jnp.zeros((1, 1, size, size, 3), config.dtype)
  model = llava.Llava(config)
  variables = model.init(
    key, ids, pixels, ids, jnp.ones_like(ids), num_segments=1
  )
  # The head is a method of its own, so `init` has made it in `setup`.
  flat = flatten(variables["params"])
  return flat if names is None else {name: flat[name] for name in names}


def parameter_shapes(
  config: llava.LlavaConfig,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Names, shapes and types of every parameter; computes nothing."""
  return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=16)  # Tracing a model takes half a second.
def _parameter_shapes(
  config: llava.LlavaConfig,
) -> dict[str, jax.ShapeDtypeStruct]:
  return jax.eval_shape(lambda key: initialise(config, key), jax.random.key(0))


def decoder_size(config: llava.LlavaConfig) -> tuple[int, int]:
  """Parameters of the decoder: (those that a token uses, all).

  Of a layer's full experts a token uses top_k.
  """
  activated = total = 0
  for name, leaf in parameter_shapes(config).items():
    if name.startswith("decoder/"):
      total += leaf.size
      is_expert = "/experts/" in name
      share = config.moe.top_k / leaf.shape[1] if is_expert else 1
      activated += round(leaf.size * share)
  return activated, total


def is_trainable(
  names: Sequence[str], patterns: Sequence[str]
) -> dict[str, bool]:
  """Whether each parameter is trained: some pattern matches its whole path.

  Raises ValueError for a pattern that matches nothing, with the nearest name.
  """
  compiled = []
  for pattern in patterns:
    try:
      compiled.append(re.compile(pattern))
    except re.error as error:
      raise ValueError(
        f"config trainable pattern {pattern!r} is no regular expression: "
        f"{error}."
      ) from None
  for pattern in compiled:
    if not any(pattern.fullmatch(name) for name in names):
      plain = re.sub(r"[^\w/]", "", pattern.pattern)
      likeness = lambda name, plain=plain: difflib.SequenceMatcher(
        None, plain, name[-len(plain) :]
      ).ratio()
      raise ValueError(
        f"config trainable pattern {pattern.pattern!r} matches no parameter; "
        f"names look like {max(names, key=likeness)!r}."
      )
  return {
    name: any(pattern.fullmatch(name) for pattern in compiled) for name in names
  }


def split(
  flat: Mapping[str, Any], patterns: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into (trainable, frozen) by path patterns."""
  chosen = is_trainable(list(flat), patterns)
  trainable = {name: leaf for name, leaf in flat.items() if chosen[name]}
  frozen = {name: leaf for name, leaf in flat.items() if not chosen[name]}
  return trainable, frozen


def group(name: str) -> str:
  """The heading under which a parameter is counted."""
  if "/mlp/" in name and "/lora_" in name:
    return "experts"
  if "router/" in name:
    return "routers"
  if "/moe_x" in name:
    return "experts"
  if "/lora_" in name:
    return "attention LoRA"
  if name.startswith("visual_"):
    return "visual tokens"
  return name.split("/")[0]


def count_parameters(
  flat: Mapping[str, Any], patterns: Sequence[str]
) -> dict[str, tuple[int, int]]:
  """Group -> (trainable, frozen) numbers of parameters."""
  chosen = is_trainable(list(flat), patterns)
  counts: dict[str, tuple[int, int]] = {}
  for name, leaf in flat.items():
    trainable, frozen = counts.get(group(name), (0, 0))
    size = 1
    for axis in leaf.shape:
      size *= axis
    if chosen[name]:
      trainable += size
    else:
      frozen += size
    counts[group(name)] = (trainable, frozen)
  return counts
