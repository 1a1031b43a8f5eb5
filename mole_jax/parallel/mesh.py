"""The device mesh: its axes and their order. A laptop is the mesh of one.

    data      copies of the model, each with rows of its own
    fsdp      shards of every parameter, gathered where used; rows of its own
    expert    shards of the experts; rows of its own
    tensor    shards of heads and of MLP widths; the same rows

The last axis changes fastest from device to device, so `tensor`, which speaks
most, lies between neighbours; `data`, which speaks least, lies between slices.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh with the axes AXES over `devices` (default: all there are).

  One size may be -1: it takes the devices that the others leave. Devices are
  laid along the links of a TPU's torus; where they come in several slices,
  these are dealt to `data`. Raises ValueError where the sizes do not multiply
  to the number of devices, or `data` not to whole slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = _resolve(sizes, len(devices))
  num_slices = len({getattr(d, "slice_index", 0) for d in devices})
  if num_slices == 1:
    array = mesh_utils.create_device_mesh(shape, devices)
  elif shape[0] % num_slices:
    raise ValueError(
      f"config.mesh.data={shape[0]} must be a multiple of the {num_slices} "
      "slices that the devices come in: only data crosses from slice to slice."
    )
  else:
    array = mesh_utils.create_hybrid_device_mesh(
      [shape[0] // num_slices, *shape[1:]], [num_slices, 1, 1, 1], devices
    )
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(array, AXES, axis_types=types)


def _resolve(sizes: Mapping[str, int], num_devices: int) -> list[int]:
  """Sizes in the order of AXES, -1 filled in."""
  if set(sizes) != set(AXES):
    raise ValueError(f"config.mesh has {sorted(sizes)}; wanted {AXES}.")
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise ValueError(
      f"config.mesh={dict(sizes)}: sizes are positive, and at most one is -1."
    )
  known = math.prod(size for size in shape if size != -1)
  if -1 in shape and num_devices % known == 0:
    shape[shape.index(-1)] = num_devices // known
  if -1 in shape or math.prod(shape) != num_devices:
    raise ValueError(
      f"config.mesh={dict(sizes)} does not fill {num_devices} device(s); the "
      "product of its sizes must equal that number (-1 takes what is left)."
    )
  return shape


def num_row_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """Into how many parts the rows of a batch are dealt."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError where rows cannot be dealt evenly to the devices."""
  ways = num_row_shards(mesh)
  if batch_size % ways:
    lower = batch_size // ways * ways
    nearest = [size for size in (lower, lower + ways) if size]
    raise ValueError(
      f"batch_size={batch_size} must be divisible by the {ways} devices on "
      f"mesh axes {BATCH_AXES}; use {' or '.join(map(str, nearest))}."
    )


def divisors_around(count: int, size: int) -> tuple[list[int], list[int]]:
  """Divisors of `count` below `size` and above it, each in order."""
  fit = [n for n in range(1, count + 1) if count % n == 0]
  return [n for n in fit if n < size], [n for n in fit if n > size]


def check_divides(
  mesh: jax.sharding.Mesh, axis: str, counts: Mapping[str, int]
) -> None:
  """Raises ValueError where a mesh axis does not divide what it cuts.

  `counts` are numbers by the names that a message uses, such as
  "model.decoder.num_heads"; zero is left alone. The message names the two
  nearest sizes of the axis that divide them all.
  """
  size = mesh.shape[axis]
  counts = {name: count for name, count in counts.items() if count}
  if all(count % size == 0 for count in counts.values()):
    return
  below, above = divisors_around(math.gcd(*counts.values()), size)
  nearest = below[-1:] + above[:1]
  named = ", ".join(f"{name}={count}" for name, count in counts.items())
  raise ValueError(
    f"config.mesh.{axis}={size} must divide {named}; use "
    f"{' or '.join(map(str, nearest))}."
  )
