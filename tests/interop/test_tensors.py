"""Shards in and out; everything that is wrong with a file is said."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors_numpy
from safetensors import torch as safetensors_torch

from mole_jax.interop import tensors
from mole_jax.training import blocks


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
    "swapped": rng.normal(size=(2, 3, 4)).astype(np.float32).swapaxes(0, 2),
    "none": np.zeros((0, 3), np.float32),
    'Gewicht.größer.\n"0"': np.arange(3),
    "odd": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "double": np.array([0.1]),
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
    assert all(name.startswith("model") for name in names)
  # PyTorch refuses tensors that are not aligned to their items.
  there = {}
  for file in tmp_path.glob("*.safetensors"):
    there |= safetensors_torch.load_file(file)
  assert there.keys() == arrays.keys()
  for name, array in arrays.items():
    if array.dtype == ml_dtypes.bfloat16:
      assert there[name].dtype == torch.bfloat16
      array = array.astype(np.float32)
    read = (
      there[name].float() if there[name].is_floating_point() else there[name]
    )
    wanted = torch.from_numpy(np.array(array))
    wanted = wanted.float() if wanted.is_floating_point() else wanted
    assert torch.equal(read, wanted), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_tensor_of_several_blocks_reads_back(dtype, tmp_path):
  rng = np.random.default_rng(0)
  array = rng.random((300, blocks.BLOCK_BYTES // 400), np.float32).astype(dtype)
  assert array.nbytes > blocks.BLOCK_BYTES
  with tensors.ShardWriter(tmp_path, 10**9) as writer:
    writer.add("plain", array)
    writer.add("transposed", array.T)
    array_before = array.copy()
    array[:] = 0  # What was added is on disk already.
  folder = tensors.Folder(tmp_path)
  for name, wanted in (("plain", array_before), ("transposed", array_before.T)):
    np.testing.assert_array_equal(folder.read(name), wanted)
  there = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(there["transposed"], array_before.T)


def test_the_data_of_a_file_is_aligned(tmp_path):
  for count in range(1, 10):
    folder = tmp_path / str(count)
    folder.mkdir()
    with tensors.ShardWriter(folder, 10**6) as writer:
      writer.add("a" * count, np.arange(3, dtype=np.uint8))
      writer.add("wide", np.arange(3.0))
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["wide"]["data_offsets"] == [0, 24]
    assert set(tensors.Folder(folder).infos) == {"wide", "a" * count}


@pytest.mark.parametrize("max_bytes", [1, 10**6])
def test_an_interrupted_write_leaves_nothing_that_looks_whole(
  max_bytes, tmp_path
):
  with (
    pytest.raises(KeyboardInterrupt),
    tensors.ShardWriter(tmp_path, max_bytes) as writer,
  ):
    writer.add("a", np.ones(8))
    writer.add("b", np.ones(8))
    raise KeyboardInterrupt
  # With shards of one tensor, the first was whole; it has no final name.
  left = ["shard-0.safetensors"] if max_bytes == 1 else []
  assert [p.name for p in tmp_path.iterdir()] == left
  with pytest.raises(tensors.CheckpointError, match="holds neither"):
    tensors.Folder(tmp_path)


def test_a_shard_that_the_disk_changed_is_found(tmp_path, monkeypatch):
  header = tensors._header
  for at, message in ((-1, "'a' does not read back"), (9, "no whole")):

    def damaged(shard, at=at):
      made = bytearray(header(shard))
      if at == 9:
        made[at] ^= 1
        return bytes(made)
      return bytes(made).replace(b"[2,3]", b"[3,2]")

    monkeypatch.setattr(tensors, "_header", damaged)
    with (
      pytest.raises(tensors.CheckpointError, match=message),
      tensors.ShardWriter(tmp_path, 10**6) as writer,
    ):
      writer.add("a", np.ones((2, 3)))
    assert not list(tmp_path.glob("*.safetensors"))


def test_bytes_that_changed_after_writing_are_found(tmp_path, monkeypatch):
  monkeypatch.setattr(
    tensors.shutil,
    "copyfileobj",
    lambda source, target, _: target.write(source.read().replace(b"?", b"@")),
  )
  with (
    pytest.raises(tensors.CheckpointError, match="'a' does not read back"),
    tensors.ShardWriter(tmp_path, 10**6) as writer,
  ):
    writer.add("a", np.ones(3))  # 1.0 ends in the byte 0x3f, a "?".


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    ("a", np.ones(2), "cannot be two tensors 'a'"),
    ("__metadata__", np.ones(2), "cannot be two tensors '__metadata__'"),
    ("b", np.ones(2, np.complex64), "'b' has the type complex64"),
    ("b", np.ones(2, ">f4"), "'b' has the type >f4"),
  ],
)
def test_what_has_no_place_in_a_file_is_refused(name, array, message, tmp_path):
  with (
    pytest.raises(tensors.CheckpointError, match=message),
    tensors.ShardWriter(tmp_path, 1) as writer,
  ):
    writer.add("a", np.ones(1))
    writer.add(name, array)


def header_of(entries):
  text = json.dumps(entries).encode()
  return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "no whole safetensors file"),
    (b"\x80\x02}q\x00.", "PyTorch pickle"),
    (b"PK\x03\x04" + bytes(30), "PyTorch pickle"),
    (struct.pack("<Q", 2**40) + b"{}", "header too large"),
    (
      header_of({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})
      + bytes(4),
      "no whole safetensors file",
    ),
    (
      header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}})
      + bytes(4),
      "no whole safetensors file",
    ),
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
