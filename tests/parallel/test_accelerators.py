"""The table of accelerators agrees with itself and with what is published."""

import itertools
import math

import pytest

from mole_jax.parallel import accelerators

ROWS = pytest.mark.parametrize(
  "row", accelerators.ACCELERATORS, ids=lambda row: row.name
)


@ROWS
def test_chips_hosts_and_meshes_multiply_up(row):
  assert row.chips == math.prod(int(side) for side in row.topology.split("x"))
  assert row.hosts * row.chips_per_host == row.chips
  for slices in (1, 3):
    sizes = row.mesh(slices)
    assert list(sizes) == ["data", "fsdp", "expert", "tensor"]
    assert math.prod(sizes.values()) == row.devices * slices


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_mesh_axes_are_whole_dimensions_of_the_torus(name):
  """JAX makes no mesh of others: 16 of 8x8x8 is none, 64 is."""
  for row in accelerators.ACCELERATORS:
    if row.chip.name == name:
      sides = [int(side) for side in row.topology.split("x")]
      products = {
        math.prod(some)
        for n in range(len(sides) + 1)
        for some in itertools.combinations(sides, n)
      }
      assert {row.data, row.fsdp} <= products, row.name


@ROWS
def test_every_name_of_a_row_finds_it(row):
  for name in (row.name, row.cores_name, row.name.upper()):
    if name:
      assert accelerators.find(name) is row


# Copied from the published tables by hand: gcloud's name, topology, chips, VMs.
PUBLISHED = [
  ("v4-8", "v4:2x2x1", 4, 1),
  ("v4-128", "v4:4x4x4", 64, 16),
  ("v5litepod-1", "v5e:1x1", 1, 1),
  ("v5litepod-8", "v5e:2x4", 8, 1),
  ("v5litepod-16", "v5e:4x4", 16, 4),
  ("v5litepod-256", "v5e:16x16", 256, 64),
  ("v5p-8", "v5p:2x2x1", 4, 1),
  ("v5p-64", "v5p:2x4x4", 32, 8),
  ("v5p-128", "v5p:4x4x4", 64, 16),
  ("v5p-1024", "v5p:8x8x8", 512, 128),
  ("v6e-8", "v6e:2x4", 8, 1),
  ("v6e-16", "v6e:4x4", 16, 4),
]


@pytest.mark.parametrize("gcloud, topology, chips, hosts", PUBLISHED)
def test_published_sizes(gcloud, topology, chips, hosts):
  row = accelerators.find(gcloud)
  assert row is accelerators.find(topology)
  assert (row.gcloud_name, row.chips, row.hosts) == (gcloud, chips, hosts)


def test_a_name_that_counts_cores_says_so():
  text = accelerators.find("v5p-64").describe()
  assert text.startswith("v5p:2x4x4 (v5p-64 counts TensorCores): 32 chips")
  text = accelerators.find("v5litepod-64").describe()
  assert text.startswith("v5e:8x8 (v5litepod-64 counts chips): 64 chips")


def test_jax_sees_two_devices_on_a_chip_of_tpu7x_and_one_elsewhere():
  for row in accelerators.ACCELERATORS:
    per_chip = 2 if row.chip.name == "tpu7x" else 1
    assert row.devices == per_chip * row.chips


def test_the_meshes_that_were_measured():
  assert accelerators.find("v5p:4x4x4").mesh() == dict(
    data=4, fsdp=16, expert=1, tensor=1
  )
  for name in ("v5e:8x8", "v6e:8x8"):
    assert accelerators.find(name).mesh()["fsdp"] == 64


def test_tpu7x_is_on_gke_only():
  row = accelerators.find("tpu7x:4x4x4")
  assert not row.gcloud_name
  assert row.gke_machine == "tpu7x-standard-4t"


def test_an_unknown_name_brings_what_is_near():
  with pytest.raises(ValueError, match=r"'v5p-100' is not .*v5p-1\d+ counts"):
    accelerators.find("v5p-100")
