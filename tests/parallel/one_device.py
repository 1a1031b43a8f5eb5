"""What a mesh computes, beside what one device does."""

import jax
import numpy as np

from mole_jax.parallel import activations, sharding
from mole_jax.training import state


def make_rows(random):
  """Ids, positions and segments of eight padded rows, some of two segments."""
  ids = random.integers(4, 40, (8, 16)).astype(np.int32)
  positions = np.arange(16, dtype=np.int32)[None].repeat(8, 0)
  segments = np.where(positions < 13, 1, 0).astype(np.int32)
  segments[::2, 9:13] = 2
  return ids, positions, segments


def gradient_program(loss, mesh, config, params, batch):
  """The jitted value and gradient of a loss on a mesh, and its arguments.

  `loss` takes flat parameters and the batch, and returns more than its value.
  """
  flat = state.flatten(params)
  shapes = state.parameter_shapes(config)
  places = sharding.parameter_shardings(shapes, mesh)
  rows = sharding.batch_sharding(mesh)
  function = jax.jit(
    activations.on_mesh(jax.value_and_grad(loss, has_aux=True), mesh),
    in_shardings=(places, rows),
  )
  return function, (jax.device_put(flat, places), jax.device_put(batch, rows))


def assert_same_gradients(grads, expected):
  """Errors are those of sums in another order, of all together and of each.

  Measured up to 2.5e-7 of the whole gradient and 6e-7 of a single one; with
  full experts the whole is the same with SSE4.2, AVX and AVX2, and compiled as
  users do. A gradient that is zero on paper (of a bias of k_proj) has no digits
  of its own.
  """
  norm = lambda flat: np.sqrt(sum((x**2).sum() for x in flat.values()))
  errors = {name: grad - expected[name] for name, grad in grads.items()}
  total = norm(expected)
  assert norm(errors) < 1e-6 * total
  for name, error in errors.items():
    own = np.linalg.norm(expected[name])
    assert np.linalg.norm(error) < 2e-6 * own + 1e-8 * total, name
