"""Which devices a collective joins, and along which axes of the mesh.

Device numbers here are those of the program: positions in the mesh, row-major.
"""

import math
import re
from collections.abc import Mapping

import numpy as np


def parse_groups(rest: str, num_devices: int) -> np.ndarray | None:
  """Groups [G, n] of a collective's attributes; None where it names none.

  Reads XLA's three ways of writing them: lists, iotas ("[4,16]<=[64]") and
  meshes ("mesh['a'=4,'b'=16] {'b'}"). Groups of unequal sizes are not used.
  """
  found = re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}",
    rest,
  )
  if found:
    return _mesh_groups(*found.groups())
  found = re.search(
    r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest
  )
  if found:
    return _iota(found[2]).reshape(_numbers(found[1])[0], -1)
  found = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
  if found:
    groups = [_numbers(g) for g in re.findall(r"\{([\d,]+)\}", found[1])]
    return np.array(groups) if groups else np.arange(num_devices)[None]
  found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
  if found:
    return np.array([_numbers(g) for g in re.findall(r"\{(.*?)\}", found[1])])
  return None


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _iota(text: str) -> np.ndarray:
  """ "[4,16]T(1,0)" -> 0 .. 63, laid out [4, 16] and transposed, flat."""
  shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(turned) if turned else None).reshape(-1)


def _mesh_groups(mesh: str, device_ids: str | None, joined: str) -> np.ndarray:
  """Groups along axes, or parts of axes ('a':(2)4), of a mesh of its own."""
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
  if device_ids and device_ids.startswith("["):
    order = _iota(device_ids)
  elif device_ids:
    order = np.array(_numbers(device_ids))
  else:
    order = np.arange(math.prod(sizes.values()))
  shape, moved = [], []
  parts = {
    name: (int(before or 1), int(size or 0))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", joined)
  }
  for name, size in sizes.items():
    if name not in parts:
      shape.append(size)
      continue
    before, part = parts[name]
    part = part or size
    moved.append(len(shape) + 1)
    shape += [before, part, size // before // part]
  ids = order.reshape(shape)
  width = math.prod(shape[axis] for axis in moved)
  last = range(ids.ndim - len(moved), ids.ndim)
  return np.moveaxis(ids, moved, last).reshape(-1, width)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes, in order, along which the members of a group differ."""
  places = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)
  differs = (places != places[:, :1]).any(axis=(0, 1))
  return tuple(name for name, does in zip(mesh, differs, strict=True) if does)
