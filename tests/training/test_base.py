"""Writing a base once, reading it back, refusing what was changed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mole_jax.training import base as base_lib
from mole_jax.training import files, tiles

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


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of 16 numbers, two in a part."""
  monkeypatch.setattr(tiles, "TILE_BYTES", 64)
  monkeypatch.setattr(base_lib, "PART_BYTES", 128)


def make_large():
  rng = np.random.default_rng(0)
  return {
    "before": np.array(3.5, np.float32),
    "stacked": rng.random((3, 5, 8), np.float32),
    "transposed": rng.random((8, 12), np.float32).T,
    "wide": rng.random((3, 50), np.float32).astype(ml_dtypes.bfloat16),
    "after": jnp.arange(20.0),
  }


@pytest.mark.usefixtures("small_tiles")
def test_a_parameter_that_is_larger_than_a_tile_is_read_in_pieces(
  tmp_path, monkeypatch
):
  large = make_large()
  whole = base_lib.write_base(tmp_path / "one", large)
  reader = base_lib.BaseReader(tmp_path / "one")
  entry = reader.parameters["stacked"]
  assert entry["tile"] == [1, 3, 4]
  assert len(entry["tiles"]) == sum(entry["counts"]) == 3 * 2 * 2
  assert "tiles" not in reader.parameters["before"]
  read = base_lib.read_base(tmp_path / "one", shapes_of(large), whole.sha256)
  for name, array in large.items():
    assert read[name].dtype == reader.read(name).dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)
    np.testing.assert_array_equal(reader.read(name), array)
  rows = reader.read_rows("stacked", 1, 3)
  np.testing.assert_array_equal(rows, large["stacked"][1:3])
  # The hash is that of the content, however it is put into parts.
  monkeypatch.setattr(base_lib, "PART_BYTES", 10**6)
  assert base_lib.write_base(tmp_path / "two", large).sha256 == whole.sha256


@pytest.mark.usefixtures("small_tiles")
def test_a_tile_in_the_place_of_another_is_found(tmp_path):
  large = make_large()
  base_lib.write_base(tmp_path, large)
  entry = base_lib.BaseReader(tmp_path).parameters["stacked"]
  changed = large["stacked"].copy()
  changed[2, :3, :4] = large["stacked"][2, :3, 4:]
  says = (tmp_path / base_lib.BASE_FILE).read_text()
  base_lib.write_base(tmp_path, large | {"stacked": changed})
  (tmp_path / base_lib.BASE_FILE).write_text(says)
  reader = base_lib.BaseReader(tmp_path)
  np.testing.assert_array_equal(
    reader.read_rows("stacked", 0, 2), large["stacked"][:2]
  )
  for read in (
    lambda: reader.read("stacked"),
    lambda: reader.read_rows("stacked", 2, 3),
    lambda: base_lib.read_base(tmp_path, shapes_of(large), ""),
  ):
    with pytest.raises(ValueError, match="damaged: stacked does not have"):
      read()
  # Nor does it help to change its hash.
  one, other = entry["tiles"][8:10]
  assert says.count(one) == 1
  (tmp_path / base_lib.BASE_FILE).write_text(says.replace(one, other))
  with pytest.raises(ValueError, match="its hashes do not add up"):
    base_lib.BaseReader(tmp_path)


@pytest.mark.usefixtures("small_tiles")
def test_a_part_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  # One tile a part: of several, Orbax gives up at the first and closes the
  # event loop before the others have failed, which then say so to any test.
  monkeypatch.setattr(base_lib, "PART_BYTES", 64)
  base_lib.write_base(tmp_path, make_large())
  (tmp_path / "params" / "001" / "manifest.ocdbt").write_bytes(b"")
  reader = base_lib.BaseReader(tmp_path)
  assert reader.read("before") == 3.5
  with pytest.raises(ValueError, match="damaged: .*/params/001 cannot be read"):
    reader.read("stacked")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (("x", "y"),), ()])
def test_each_device_gets_its_piece(tmp_path, spec):
  rng = np.random.default_rng(0)
  base = {
    "square": rng.random((16, 24), np.float32),
    "small": rng.random((8, 2), np.float32),
  }
  base_lib.write_base(tmp_path, base)
  mesh = jax.make_mesh((2, 4), ("x", "y"))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  read = base_lib.BaseReader(tmp_path).read_onto(dict.fromkeys(base, place))
  for name, array in base.items():
    assert read[name].sharding == place
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("axis", [0, 1])
def test_what_no_device_holds_is_not_read(tmp_path, monkeypatch, axis):
  """A process with the first half of the devices, by rows or by columns."""
  array = np.random.default_rng(0).random((16, 24), np.float32)
  base_lib.write_base(tmp_path, {"square": array})
  rows, columns = array.shape
  half = (slice(rows // (2 - axis)), slice(columns // (1 + axis)))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  monkeypatch.setattr(
    type(place), "addressable_devices_indices_map", lambda *_: {0: half}
  )
  monkeypatch.setattr(
    tiles.LocalShards,
    "on_devices",
    lambda self: jnp.asarray(*self._shards.values()),
  )
  restored = []
  restore = base_lib.BaseReader._restore

  def spy(self, number, wanted):
    restored.extend(wanted)
    return restore(self, number, wanted)

  monkeypatch.setattr(base_lib.BaseReader, "_restore", spy)
  read = base_lib.BaseReader(tmp_path).read_onto({"square": place})
  np.testing.assert_array_equal(read["square"], array[half])
  sizes = [np.prod(tiles.sides(tile.bounds)) for tile in restored]
  assert sum(sizes) == array.size // 2


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


def test_a_base_cut_into_rows_is_read(tmp_path):
  """An earlier version's; its rows have no hashes of their own."""
  array = np.random.default_rng(0).random((3, 5, 4), np.float32)
  matrix = array.reshape(15, 4)
  with ocp.StandardCheckpointer() as checkpointer:
    for part, rows in enumerate((matrix[:8], matrix[8:])):
      path = tmp_path / "params" / f"{part:03d}"
      checkpointer.save(path, {"layers.kernel": rows})
  entry = {
    "shape": [3, 5, 4],
    "dtype": "float32",
    "sha256": base_lib.digest(array),
    "part": 0,
    "rows": [8, 7],
  }
  values = {"sha256": base_lib._digest_of_all({"layers/kernel": entry})}
  values["parameters"] = {"layers/kernel": entry}
  files.write_json(tmp_path / base_lib.BASE_FILE, values)
  reader = base_lib.BaseReader(tmp_path)
  np.testing.assert_array_equal(
    reader.read_rows("layers/kernel", 1, 2), array[1:2]
  )
  wanted = shapes_of({"layers/kernel": array})
  read = base_lib.read_base(tmp_path, wanted, values["sha256"])
  np.testing.assert_array_equal(read["layers/kernel"], array)
  (tmp_path / "params" / "001").rename(tmp_path / "params" / "002")
  with pytest.raises(ValueError, match="params/001 cannot be read"):
    reader.read("layers/kernel")


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
