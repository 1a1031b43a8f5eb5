"""Where activations lie, said inside a model that knows no mesh.

The mesh is that of the step that is being traced (`on_mesh`); without one,
or on one device, nothing is constrained.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mole_jax.parallel import mesh as mesh_lib

ROWS = mesh_lib.BATCH_AXES


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
  """`function`, traced with `mesh` in mind; give the result to `jax.jit`."""

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return wrapped


def current() -> jax.sharding.AbstractMesh | None:
  """The mesh of the step being traced; None on one device or without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def num_row_shards() -> int:
  """How many devices share the rows of a batch."""
  mesh = current()
  return 1 if mesh is None else mesh_lib.num_row_shards(mesh)


def platform() -> str:
  """ "cpu", "gpu" or "tpu": where the step being traced will run."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
  """Lays an array's axes along mesh axes; None, or no entry, keeps one whole.

  Without it the compiler is free to move activations instead of weights, and
  on several axes does.
  """
  if current() is None:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes))


def rows(x: Array) -> Array:
  """Rows dealt to the devices, all other axes whole."""
  return constrain(x, ROWS)


def per_row(function: Callable) -> Callable:
  """`function` of arrays of rows, run by each device on its own rows."""
  return per_device(function, P(ROWS), P(ROWS))


def per_device(
  function: Callable, in_specs: Any, out_specs: Any, is_checked: bool = True
) -> Callable:
  """`function` run by each device on what it holds by `in_specs`.

  `is_checked`: JAX follows along which axes a value varies; Pallas' kernels
  do not say.
  """
  if current() is None:
    return function
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=is_checked,
  )


def varying_alike(*arrays: Array) -> list[Array]:
  """Marks arrays as varying over the union of the mesh axes of each.

  A VJP of one's own must return cotangents that vary like its arguments;
  constant weights, say, vary over no axis.
  """
  axes = frozenset().union(
    *(jax.typeof(a).manual_axis_type.varying for a in arrays)
  )
  missing = [
    tuple(axes - jax.typeof(a).manual_axis_type.varying) for a in arrays
  ]
  return [
    jax.lax.pcast(a, names, to="varying") if names else a
    for a, names in zip(arrays, missing, strict=True)
  ]
