"""Meshes that fit and those that do not."""

import jax
import pytest

from mole_jax.parallel import mesh

ONES = dict(data=1, fsdp=1, expert=1, tensor=1)


def test_minus_one_takes_what_is_left():
  made = mesh.make_mesh(ONES | dict(data=-1, tensor=2))
  assert dict(made.shape) == ONES | dict(data=4, tensor=2)
  assert made.axis_names == mesh.AXES


def test_a_laptop_is_the_mesh_of_one():
  made = mesh.make_mesh(ONES | dict(data=-1), jax.devices()[:1])
  assert made.size == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(data=3), r"does not fill 8 device\(s\)"),
    (dict(data=-1, fsdp=3), r"does not fill 8 device\(s\)"),
    (dict(data=-1, fsdp=-1), "at most one is -1"),
    (dict(data=0), "sizes are positive"),
    (dict(model=8), r"config.mesh has .*'model'"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    mesh.make_mesh(ONES | changes)


def test_a_batch_that_cannot_be_dealt_names_the_nearest():
  made = mesh.make_mesh(ONES | dict(data=2, fsdp=2, tensor=2))
  mesh.check_batch_size(128, made)
  with pytest.raises(ValueError, match=r"batch_size=130 .* use 128 or 132"):
    mesh.check_batch_size(130, made)
  with pytest.raises(ValueError, match=r"batch_size=3 .* use 4"):
    mesh.check_batch_size(3, made)
