"""Full-FFN experts on any mesh: values, choices and gradients of one device."""

import jax
import numpy as np
import pytest

from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import losses, state
from tests.models import small
from tests.parallel import one_device

MESHES = {
  "data 2, fsdp 4": (2, 4, 1, 1),
  "expert 2": (1, 1, 2, 1),
  "expert 4": (1, 1, 4, 1),
  "fsdp 2, expert 4": (1, 2, 4, 1),
  "data 2, expert 2, tensor 2": (2, 1, 2, 2),
  "fsdp 2, expert 2, tensor 2": (1, 2, 2, 2),
}


def compute(mesh, values):
  """Loss, choices, dropped share and gradients of a random model."""
  config, model, params = small.make(
    decoder={"num_kv_heads": 2},
    mole=dict(num_experts=4),
    moe=dict(layers="sparse", num_experts=4, top_k=2, block_rows=8) | values,
  )
  random = np.random.default_rng(0)
  ids, positions, segments = one_device.make_rows(random)
  batch = (ids, None, positions, segments)
  target = random.normal(size=(8, 16, 16)).astype(np.float32)
  sizes = dict(zip(mesh_lib.AXES, mesh, strict=True))
  devices = jax.devices()[: int(np.prod(mesh))]
  mesh = mesh_lib.make_mesh(sizes, devices)

  def loss(flat, batch):
    params = {"params": state.unflatten(flat)}
    output = model.apply(params, *batch, 2, is_training=True)
    balance = losses.balance_loss(output.routing, batch[-1], 2, "moe_llava")
    dropped = output.routing.sums.dropped.sum((1, 2))
    # Not its square, which normalisation makes nearly constant: gradients
    # would be what is left of sums that cancel.
    value = (output.hidden * target).mean() + balance
    return value, (output.routing.chosen, dropped)

  function, args = one_device.gradient_program(
    loss, mesh, config, params, batch
  )
  (value, (chosen, dropped)), grads = function(*args)
  text = function.lower(*args).compile().as_text()
  return *jax.device_get((value, chosen, dropped, grads)), text


# Capacity is counted in eight groups of rows, whatever the mesh.
@pytest.fixture(
  scope="module",
  params=[dict(capacity_factor=0.0), dict(capacity_factor=0.75)],
  ids=["dropless", "capacity"],
)
def one(request):
  values = request.param | dict(capacity_groups=8)
  return values, compute((1, 1, 1, 1), values)


@pytest.mark.parametrize("move", ["tokens", "weights"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_all_is_as_on_one_device(one, mesh, move):
  values, (value, chosen, dropped, grads, _) = one
  ours = compute(mesh, values | dict(move=move))
  np.testing.assert_allclose(ours[0], value, rtol=1e-6)
  np.testing.assert_array_equal(ours[1], chosen)
  np.testing.assert_allclose(ours[2], dropped, rtol=1e-6)
  assert bool(dropped[0]) == (values["capacity_factor"] > 0)
  one_device.assert_same_gradients(ours[3], grads)


def test_tokens_or_weights_travel_as_told():
  """An embedding table may travel by all-to-all, too, but outside of layers."""

  def count(move):
    *_, text = compute((1, 1, 4, 1), dict(capacity_factor=1.0, move=move))
    lines = [line for line in text.splitlines() if " all-to-all(" in line]
    return sum("/layers/" in line or "/moe/" in line for line in lines)

  assert count("weights") == 0
  assert count("tokens") >= 4


def test_groups_that_devices_cannot_share_are_refused():
  with pytest.raises(ValueError, match="capacity_groups=3 must be a multiple"):
    compute((2, 1, 1, 1), dict(capacity_groups=3))
