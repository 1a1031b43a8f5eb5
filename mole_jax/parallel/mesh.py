"""The device mesh: its axes and their order. A laptop is the mesh of one."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh with the axes AXES over `devices` (default: all there are).

  One size may be -1: it takes the devices that the others leave. Raises
  ValueError where the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if set(sizes) != set(AXES):
    raise ValueError(f"config.mesh has {sorted(sizes)}; wanted {AXES}.")
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise ValueError(
      f"config.mesh={dict(sizes)}: sizes are positive, and at most one is -1."
    )
  known = int(np.prod([size for size in shape if size != -1]))
  if -1 in shape and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if -1 in shape or int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"config.mesh={dict(sizes)} does not fill {len(devices)} device(s); the "
      "product of its sizes must equal that number (-1 takes what is left)."
    )
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError where rows cannot be dealt evenly to the devices."""
  ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
  if batch_size % ways:
    lower = batch_size // ways * ways
    nearest = [size for size in (lower, lower + ways) if size]
    raise ValueError(
      f"batch_size={batch_size} must be divisible by the {ways} devices on "
      f"mesh axes {BATCH_AXES}; use {' or '.join(map(str, nearest))}."
    )
