"""Sparse upcycling: experts that start as copies of a layer's FFN.

Komatsuzaki et al. 2022; Lin et al. 2024, stage III: every expert of a layer is
an exact copy of that layer's FFN, so the model computes what it computed
before, whatever its routers say (their weights add up to 1).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mole_jax.models import llava, moe, pattern
from mole_jax.training import base as base_lib
from mole_jax.training import state

LAYERS = "decoder/layers"


class Source(NamedTuple):
  """What a parameter is made of: some layers of one of the dense model's, each
  `copies` times along a new axis (0: as it is)."""

  name: str
  layers: tuple[int, ...]
  copies: int


def is_needed(config: llava.LlavaConfig, reader: base_lib.BaseReader) -> bool:
  """Whether a model has experts and a base has none."""
  has_experts = any(
    name.startswith(f"{LAYERS}/moe_x") for name in reader.parameters
  )
  return config.moe.is_on and not has_experts


def sources(
  config: llava.LlavaConfig, names: Collection[str]
) -> dict[str, Source | None]:
  """What FFNs and experts are made of; None for routers, which are new.

  Parameters that are as in the dense model are left out.
  """
  kinds = moe.experts_by_layer(config.moe, config.decoder.num_layers)
  found: dict[str, Source | None] = {}
  for name in names:
    match = re.fullmatch(rf"{LAYERS}/(mlp|moe_x(\d+))/(.*)", name)
    if not match:
      continue
    kind = int(match[2] or 0)
    layers = tuple(i for i, k in enumerate(kinds) if k == kind)
    path = match[3].removeprefix("experts/")
    if path.startswith("router/"):
      found[name] = None
    else:
      source = f"{LAYERS}/{pattern.family(0)}/{path}"
      found[name] = Source(source, layers, kind)
  return found


def read(
  reader: base_lib.BaseReader,
  config: llava.LlavaConfig,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  optional: Collection[str] = (),
) -> state.Flat:
  """Parameters of a model with experts from a base without, verified.

  FFNs are held whole on each host, one map of all layers at a time.

  Args:
    reader: the base.
    config: the model with experts.
    shapes: what is wanted, with shardings, or none for the first device.
    optional: parameters that the base need not have, since a stage trains them.

  Raises ValueError where the base is not of this model without experts (all
  differences are listed), before any weight is read.
  """
  made = sources(config, shapes)
  as_it_is: dict[str, jax.sharding.Sharding | None] = {}
  made_of: dict[str, list[str]] = {}
  problems = []
  for name, leaf in shapes.items():
    if name not in made:
      wanted, stored = leaf.shape, name
    elif made[name] is None:
      continue
    else:
      wanted, stored = (
        _dense_shape(config, leaf.shape, made[name]),
        made[name].name,
      )
    entry = reader.parameters.get(stored)
    if entry is None:
      if name not in optional:
        problems.append(f"missing {stored}")
    elif tuple(entry["shape"]) != wanted:
      problems.append(f"{stored} is {entry['shape']}, wanted {list(wanted)}")
    elif name in made:
      made_of.setdefault(stored, []).append(name)
    else:
      as_it_is[name] = leaf.sharding
  if problems:
    raise ValueError(
      f"the base in {reader.directory} is not config.model without its "
      "experts:\n  " + "\n  ".join(dict.fromkeys(problems))
    )
  flat = reader.read_onto(as_it_is)
  for stored, names in made_of.items():
    array = reader.read(stored)
    for name in names:
      flat[name] = jax.make_array_from_callback(
        shapes[name].shape,
        shapes[name].sharding or base_lib.first_device(),
        lambda index, a=array, s=made[name]: _region(a, s, index),
      )
  return {name: flat[name] for name in shapes if name in flat}


def _dense_shape(
  config: llava.LlavaConfig, shape: tuple[int, ...], source: Source
) -> tuple[int, ...]:
  """Shape of what a parameter is made of."""
  rest = shape[2:] if source.copies else shape[1:]
  return (config.decoder.num_layers, *rest)


def _region(
  array: np.ndarray, source: Source, index: tuple[slice, ...]
) -> np.ndarray:
  """The part of a parameter that a device holds."""
  layers = list(source.layers[index[0]])
  if not source.copies:
    return array[layers][(slice(None), *index[1:])]
  part = array[layers][(slice(None), *index[2:])]
  copies = len(range(source.copies)[index[1]])
  shape = (len(layers), copies, *part.shape[1:])
  return np.broadcast_to(part[:, None], shape)


def check_copies(params: Mapping[str, Any]) -> None:
  """Raises ValueError where a layer's experts are not alike, bit for bit."""
  # One program, which keeps no array of what is compared.
  are_alike = jax.jit(lambda leaf: (leaf == leaf[:, :1]).all())
  for name, leaf in params.items():
    is_expert = re.fullmatch(
      rf"{LAYERS}/moe_x\d+/experts/.*/(kernel|bias)", name
    )
    if is_expert and not bool(are_alike(leaf)):
      raise ValueError(f"upcycled experts of {name!r} differ.")
