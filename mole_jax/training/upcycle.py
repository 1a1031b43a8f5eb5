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
  """Where a parameter comes from: some layers of one of the dense model's,
  each `copies` times along a new axis (0: as it is)."""

  name: str
  layers: tuple[int, ...]
  copies: int


def is_dense(names: Collection[str]) -> bool:
  """Whether parameters are of a model without experts."""
  return not any(name.startswith(f"{LAYERS}/moe_x") for name in names)


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

  Args:
    reader: the base.
    config: the model with experts.
    shapes: what is wanted, with shardings, or none for the first device.
    optional: parameters that the base need not have, since a stage trains them.

  Raises ValueError where the base is not of this model without experts (all
  differences are listed), before any weight is read.
  """
  made = sources(config, shapes)
  places: dict[str, list[str]] = {}
  problems = []
  for name, leaf in shapes.items():
    source = made.get(name, Source(name, (), 0))
    if source is None:
      continue
    entry = reader.parameters.get(source.name)
    wanted = dense_shape(config, leaf.shape, source)
    if entry is None and name not in optional:
      problems.append(f"missing {source.name}")
    elif entry is not None and tuple(entry["shape"]) != wanted:
      problems.append(
        f"{source.name} is {entry['shape']}, wanted {list(wanted)}"
      )
    elif entry is not None:
      places.setdefault(source.name, []).append(name)
  if problems:
    raise ValueError(
      f"the base in {reader.directory} is not config.model without its "
      "experts:\n  " + "\n  ".join(dict.fromkeys(problems))
    )
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  flat = {}
  for source_name, names in places.items():
    array = reader.read(source_name)
    for name in names:
      source = made.get(name) or Source(name, (), 0)
      flat[name] = jax.make_array_from_callback(
        shapes[name].shape,
        shapes[name].sharding or first,
        lambda index, a=array, s=source: _region(a, s, index),
      )
  return {name: flat[name] for name in shapes if name in flat}


def dense_shape(
  config: llava.LlavaConfig, shape: tuple[int, ...], source: Source
) -> tuple[int, ...]:
  """Shape of what a parameter is made of."""
  if not source.layers:
    return shape
  rest = shape[2:] if source.copies else shape[1:]
  return (config.decoder.num_layers, *rest)


def _region(
  array: np.ndarray, source: Source, index: tuple[slice, ...]
) -> np.ndarray:
  """The part of a parameter that a device holds."""
  if not source.layers:
    return array[index]
  layers = list(source.layers[index[0]])
  if not source.copies:
    return array[layers][(slice(None), *index[1:])]
  part = array[layers][(slice(None), *index[2:])]
  copies = len(range(source.copies)[index[1]])
  shape = (len(layers), copies, *part.shape[1:])
  return np.broadcast_to(part[:, None], shape)


def check_copies(params: Mapping[str, Any]) -> None:
  """Raises ValueError where a layer's experts are not alike, bit for bit."""
  for name, leaf in params.items():
    is_expert = re.fullmatch(
      rf"{LAYERS}/moe_x\d+/experts/.*/(kernel|bias)", name
    )
    if is_expert and not bool((leaf == leaf[:, :1]).all()):
      raise ValueError(f"upcycled experts of {name!r} differ.")
