"""Names of machines that are not there."""

import jax
import pytest

from mole_jax.compiled import topologies
from mole_jax.parallel import accelerators
from mole_jax.parallel import mesh as mesh_lib


def test_an_unknown_topology_lists_the_known_ones():
  with pytest.raises(ValueError, match="v5p:4x4x4") as error:
    topologies.find("v9:4x4")
  for name in ("v5e:16x16", "v6e:4x4", "h200:8", "cpu:N"):
    assert name in str(error.value)


@pytest.mark.parametrize(
  ("name", "count", "sizes"),
  [
    ("v5p:4x4x4", 64, (4, 16)),
    ("v5p-128", 64, (4, 16)),  # gcloud counts cores.
    ("v5e:4x4", 16, (1, 16)),
    ("h200:8", 8, (1, 8)),
    ("cpu:64", 64, (1, 64)),
    ("v4:2x2x1", 4, (1, 4)),  # Two cores of a chip are one device,
    ("tpu7x:2x2x1", 8, (1, 8)),  # and are two.
  ],
)
def test_a_topology_has_devices_and_a_mesh(name, count, sizes):
  target = topologies.find(name)
  assert target.num_devices == count
  found = target.sizes()
  assert (found["data"], found["fsdp"]) == sizes


def test_libtpu_lists_what_the_default_meshes_need():
  pytest.importorskip("libtpu", reason="needs the extra tpu")
  for row in accelerators.ACCELERATORS:
    if row.chip.platform == "tpu":
      target = topologies.find(row.name)
      found = topologies.devices(target)
      assert len(found) == target.num_devices, row.name
      mesh = mesh_lib.make_mesh(target.sizes(), found)
      assert dict(mesh.shape) == target.sizes()


def test_fake_devices_are_found():
  first = jax.devices()[:4]  # JAX starts with what the tests ask for.
  assert topologies.devices(topologies.find("cpu:4")) == first


def test_more_fake_devices_than_jax_started_with_is_an_error():
  assert len(jax.devices()) == 8
  with pytest.raises(ValueError, match="started with 8 device"):
    topologies.devices(topologies.find("cpu:16"))


@pytest.mark.parametrize(
  ("name", "extra"), [("v5p:4x4x4", "tpu"), ("h200:1", "cuda12")]
)
def test_a_missing_compiler_says_how_to_install_it(name, extra, monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ValueError, match=rf"pip install -e '\.\[{extra}\]'"):
    topologies.devices(topologies.find(name))


def test_a_card_that_xla_is_not_told_of_is_refused():
  with pytest.raises(ValueError, match="h100, h200"):
    topologies.find("a100:8")
