"""Writing a base once, reading it back, refusing what was changed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mole_jax.training import base as base_lib
from mole_jax.training import files

BASE = {
  "decoder/norm/scale": jnp.arange(4.0),
  "decoder/lm_head": jnp.arange(24.0, dtype=jnp.bfloat16).reshape(4, 6),
  "projector/bias": jnp.zeros(2),
}


def shapes_of(flat):
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for name, leaf in flat.items()
  }


def test_what_was_written_is_read_back_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(base_lib, "PART_BYTES", 64)
  reference = base_lib.write_base(tmp_path, iter(BASE.items()), {"from": "x"})
  assert base_lib.read_reference(tmp_path) == reference
  parts = sorted(p.name for p in (tmp_path / "params").iterdir())
  assert parts == ["000", "001"]
  read = base_lib.read_base(tmp_path, shapes_of(BASE), reference.sha256)
  assert list(read) == list(BASE)
  for name, leaf in BASE.items():
    assert read[name].dtype == leaf.dtype
    np.testing.assert_array_equal(read[name], leaf)


def test_names_types_shapes_and_bytes_all_enter_the_hash(tmp_path):
  hashes = {
    base_lib.write_base(tmp_path, base).sha256
    for base in (
      BASE,
      BASE | {"decoder/norm/scale": jnp.arange(4.0) + 1e-7},
      BASE | {"decoder/norm/scale": jnp.arange(4)},
      BASE | {"decoder/norm/scale": jnp.arange(4.0).reshape(2, 2)},
      {name + "s": leaf for name, leaf in BASE.items()},
    )
  }
  assert len(hashes) == 5


def test_a_base_of_another_hash_is_refused(tmp_path):
  base_lib.write_base(tmp_path, BASE)
  with pytest.raises(ValueError, match="refers to it says 000"):
    base_lib.read_base(tmp_path, shapes_of(BASE), "0" * 64)


def test_changed_bytes_are_found_and_named(tmp_path):
  base_lib.write_base(tmp_path, BASE)
  says = (tmp_path / base_lib.BASE_FILE).read_text()
  changed = BASE | {"decoder/norm/scale": BASE["decoder/norm/scale"] + 1}
  base_lib.write_base(tmp_path, changed)
  (tmp_path / base_lib.BASE_FILE).write_text(says)
  with pytest.raises(ValueError, match="damaged: decoder/norm/scale does not"):
    base_lib.read_base(tmp_path, shapes_of(BASE), "")


def test_a_base_of_another_shape_lists_every_difference(tmp_path):
  base_lib.write_base(tmp_path, BASE)
  wanted = shapes_of(BASE)
  wanted["decoder/lm_head"] = jax.ShapeDtypeStruct((3, 4), jnp.float32)
  wanted["decoder/extra"] = wanted.pop("decoder/norm/scale")
  with pytest.raises(ValueError) as error:
    base_lib.read_base(tmp_path, wanted, "")
  for part in (
    "missing decoder/extra",
    "unknown decoder/norm/scale",
    "decoder/lm_head is [4, 6], wanted [3, 4]",
  ):
    assert part in str(error.value)


def test_a_base_without_its_last_file_is_no_base(tmp_path):
  base_lib.write_base(tmp_path, BASE)
  (tmp_path / base_lib.BASE_FILE).unlink()
  assert base_lib.read_reference(tmp_path) is None
  with pytest.raises(ValueError, match="holds no complete base"):
    base_lib.read_base(tmp_path, shapes_of(BASE), "")


def test_what_a_stage_trains_may_be_absent(tmp_path):
  base_lib.write_base(tmp_path, BASE)
  wanted = shapes_of(BASE | {"visual_start": jnp.zeros(4)})
  with pytest.raises(ValueError, match="missing visual_start"):
    base_lib.read_base(tmp_path, wanted, "")
  read = base_lib.read_base(tmp_path, wanted, "", optional=["visual_start"])
  assert read.keys() == BASE.keys()


def test_a_parameter_that_is_larger_than_a_part_spans_several(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(base_lib, "PART_BYTES", 64)
  rng = np.random.default_rng(0)
  large = {
    "before": np.array(3.5, np.float32),
    "stacked": rng.random((3, 5, 4), np.float32),  # 4 rows of 16 a part.
    "transposed": rng.random((4, 30), np.float32).T,
    "wide": rng.random((3, 50), np.float32).astype(ml_dtypes.bfloat16),
    "after": jnp.arange(20.0),
  }
  whole = base_lib.write_base(tmp_path / "one", large)
  reader = base_lib.BaseReader(tmp_path / "one")
  assert reader.parameters["stacked"]["rows"] == [4, 4, 4, 3]
  assert reader.parameters["transposed"]["rows"] == [4] * 7 + [2]
  assert reader.parameters["wide"]["rows"] == [1, 1, 1]
  read = base_lib.read_base(tmp_path / "one", shapes_of(large), whole.sha256)
  for name, array in large.items():
    assert read[name].dtype == reader.read(name).dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)
    np.testing.assert_array_equal(reader.read(name), array)
  names = [name for part in reader.parts() for name in part]
  assert names == list(large)
  # The hash is that of the content, however it is cut.
  monkeypatch.setattr(base_lib, "PART_BYTES", 10**6)
  assert base_lib.write_base(tmp_path / "two", large).sha256 == whole.sha256
  # Rows of another parameter of the same shape are found.
  params = tmp_path / "one" / "params"
  first = reader.parameters["stacked"]["part"]
  swapped = (f"{first:03d}", "swap"), (f"{first + 1:03d}", f"{first:03d}")
  for source, target in (*swapped, ("swap", f"{first + 1:03d}")):
    (params / source).rename(params / target)
  with pytest.raises(ValueError, match="damaged: stacked does not have"):
    base_lib.read_base(tmp_path / "one", shapes_of(large), "")


def test_a_base_of_an_earlier_version_is_read(tmp_path):
  """Parts held whole parameters of any size, saved as arrays of JAX."""
  entries = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for part, (name, leaf) in enumerate(BASE.items()):
      path = tmp_path / "params" / f"{part:03d}"
      checkpointer.save(path, {name.replace("/", "."): leaf})
      entries[name] = {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "sha256": base_lib.digest(leaf),
        "part": part,
      }
  sha256 = base_lib._digest_of_all(entries)
  values = {"sha256": sha256, "parameters": entries}
  files.write_json(tmp_path / base_lib.BASE_FILE, values)
  read = base_lib.read_base(tmp_path, shapes_of(BASE), sha256)
  for name, leaf in BASE.items():
    assert read[name].dtype == leaf.dtype
    np.testing.assert_array_equal(read[name], leaf)


def test_a_base_is_read_onto_a_sharding(tmp_path):
  reference = base_lib.write_base(tmp_path, BASE)
  mesh = jax.make_mesh((1,), ("x",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  wanted = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    for name, leaf in BASE.items()
  }
  read = base_lib.read_base(tmp_path, wanted, reference.sha256)
  for name, leaf in BASE.items():
    assert read[name].sharding == place
    np.testing.assert_array_equal(read[name], leaf)
