"""Writing a base once, reading it back, refusing what was changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.training import base as base_lib

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
