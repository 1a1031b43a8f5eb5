"""Shards in and out; everything that is wrong with a file is said."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mole_jax.interop import tensors


def write(folder, **arrays):
  safetensors_numpy.save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("max_bytes", [1, 60, 10**6])
def test_shards_read_back_bit_for_bit_whatever_their_layout(
  max_bytes, tmp_path
):
  rng = np.random.default_rng(0)
  arrays = {
    "transposed": rng.normal(size=(3, 5)).astype(np.float32).T,
    "strided": rng.normal(size=(8, 4)).astype(np.float32)[::2],
    "bfloat16": rng.normal(size=7).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.float32),
  }
  with tensors.ShardWriter(tmp_path, max_bytes) as writer:
    for name, array in arrays.items():
      writer.add(name, array)
  folder = tensors.Folder(tmp_path)
  assert set(folder.infos) == set(arrays)
  for name, array in arrays.items():
    read = folder.read(name)
    assert read.dtype == array.dtype == folder.infos[name].dtype
    np.testing.assert_array_equal(read, array)
  names = sorted(p.name for p in tmp_path.iterdir())
  if max_bytes == 10**6:
    assert names == ["model.safetensors"]
  else:
    assert tensors.INDEX_FILE in names and "model-00001-of-" in names[0]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "no whole safetensors file"),
    (b"\x80\x02}q\x00.", "PyTorch pickle"),
    (b"PK\x03\x04" + bytes(30), "PyTorch pickle"),
    (struct.pack("<Q", 2**40) + b"{}", "header too large"),
    (struct.pack("<Q", 9) + b'{"a": 1}}', "no whole safetensors file"),
    (
      struct.pack("<Q", 61)
      + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000000]}}'
      + bytes(4),
      "no whole safetensors file",
    ),
  ],
)
def test_a_file_that_is_no_safetensors_is_named(content, message, tmp_path):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(tensors.CheckpointError, match=message) as error:
    tensors.Folder(tmp_path)
  assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_header_may_be_as_long_as_a_pickle_s_first_byte(tmp_path):
  for count in range(1, 200):
    write(tmp_path, **{"a" * count: np.zeros(1)})
    length = (tmp_path / "model.safetensors").read_bytes()[0]
    tensors.Folder(tmp_path)
    if length == 0x80:
      return
  raise AssertionError("no header was 128 bytes long")


def test_a_truncated_file_is_found_before_any_tensor_is_read(tmp_path):
  write(tmp_path, a=np.zeros(100, np.float32))
  path = tmp_path / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(tensors.CheckpointError, match="not fully covered"):
    tensors.Folder(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(value, tmp_path):
  for dtype in (np.float32, ml_dtypes.bfloat16):
    write(tmp_path, good=np.ones(3), bad=np.array([1, value], dtype))
    folder = tensors.Folder(tmp_path)
    folder.read("good")
    with pytest.raises(tensors.CheckpointError, match="'bad' holds 1 values"):
      folder.read("bad")


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({"weight_map": {"a": "b.safetensors"}}, "shards that are not there: b"),
    ({"weight_map": {"a": "../b.safetensors"}}, "outside its folder"),
    ({"weight_map": {"z": "model.safetensors"}}, "no shard holds: z"),
    ({}, "is no index of shards"),
    ("{", "is no index of shards"),
  ],
)
def test_a_broken_index_says_what_is_wrong(index, message, tmp_path):
  write(tmp_path, a=np.zeros(3))
  text = index if isinstance(index, str) else json.dumps(index)
  (tmp_path / tensors.INDEX_FILE).write_text(text)
  with pytest.raises(tensors.CheckpointError, match=message):
    tensors.Folder(tmp_path)


def test_a_folder_without_weights_lists_what_it_holds(tmp_path):
  (tmp_path / "pytorch_model.bin").touch()
  with pytest.raises(tensors.CheckpointError, match=r"pytorch_model\.bin"):
    tensors.Folder(tmp_path)
  with pytest.raises(tensors.CheckpointError, match="is not a folder"):
    tensors.Folder(tmp_path / "none")


def test_a_directory_appears_only_when_all_went_well(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(RuntimeError), tensors.new_directory(out) as partial:
    (partial / "half").touch()
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []
  with tensors.new_directory(out) as partial:
    (partial / "whole").touch()
  assert [p.name for p in out.iterdir()] == ["whole"]
  with (
    pytest.raises(tensors.CheckpointError, match="choose another --out"),
    tensors.new_directory(out),
  ):
    pass
