"""PyTorch's files become safetensors; whatever else they hold does not run."""

import contextlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from mole_jax.interop import pickles, tensors
from mole_jax.interop.with_torch import unpickle


class Attack:
  """Makes the file `path` where it is unpickled without protection."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch '{self.path}'",)


def draw(*shape, dtype=torch.float32):
  generator = torch.Generator().manual_seed(sum(shape))
  return torch.randn(shape, generator=generator).to(dtype)


def convert(folder, *paths):
  """What the program writes for some files, in this process."""
  out = folder / "out"
  out.mkdir()
  unpickle.unpickle(paths, out)
  return tensors.Folder(out)


def refusal(tmp_path, value, **kwargs):
  """The message for a file that torch.save wrote."""
  torch.save(value, tmp_path / "a.bin", **kwargs)
  with pytest.raises(tensors.CheckpointError) as error:
    convert(tmp_path, tmp_path / "a.bin")
  assert str(tmp_path / "a.bin") in str(error.value)
  return str(error.value)


def assert_holds(folder, wanted):
  """Names, types and every bit."""
  assert set(folder.infos) == set(wanted)
  for name, tensor in wanted.items():
    read = folder.read(name)
    assert read.shape == tuple(tensor.shape) == folder.infos[name].shape, name
    kind = str(tensor.dtype).removeprefix("torch.")
    assert read.dtype.name == kind, name
    if kind == "bfloat16":
      read, tensor = read.astype(np.float32), tensor.float()
    wanted = tensor.detach().resolve_neg().numpy()
    np.testing.assert_array_equal(read, wanted, err_msg=name)


def test_shards_come_out_of_the_process_whole_and_leave_nothing(tmp_path):
  base = draw(6, 8)
  first = {
    "whole": base,
    "tied": base,
    "transposed": base.T,
    "strided": base[::2, 1::3],
    "bfloat16": draw(5, 3, dtype=torch.bfloat16),
    "bfloat16_transposed": draw(5, 3, dtype=torch.bfloat16).T,
    "parameter": torch.nn.Parameter(draw(4)),
    "bfloat16_parameter": torch.nn.Parameter(draw(4, dtype=torch.bfloat16)),
    "negated_when_read": torch._neg_view(draw(3)),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
  }
  dtypes = ("float64", "float16", "int64", "int32", "uint8", "bool")
  second = {name: draw(4).abs().to(getattr(torch, name)) for name in dtypes}
  source, scratch = tmp_path / "in", tmp_path / "scratch"
  source.mkdir(), scratch.mkdir()
  files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
  torch.save(first, source / files[0])
  # The format before PyTorch 1.6, in which nothing can be mapped.
  torch.save(second, source / files[1], _use_new_zipfile_serialization=False)
  weight_map = dict.fromkeys(first, files[0]) | dict.fromkeys(second, files[1])
  index = source / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  paths = pickles.find_pickles(source)
  assert [path.name for path in paths] == files
  with pickles.unpickled(paths, True, scratch) as folder:
    assert folder.path.parent == scratch
    assert_holds(folder, first | second)
  assert list(scratch.iterdir()) == []


def test_an_attack_is_not_run_and_comes_back_as_one_message(tmp_path):
  made, source = tmp_path / "made", tmp_path / "a.bin"
  torch.save({"a": draw(3), "b": Attack(made)}, source)
  scratch = tmp_path / "scratch"
  scratch.mkdir()
  with (
    pytest.raises(tensors.CheckpointError) as error,
    pickles.unpickled([source], True, scratch),
  ):
    pass
  assert str(error.value).startswith(f"{source} is not only tensors: it asks")
  assert "posix.system" in str(error.value)
  assert "\n" not in str(error.value)
  assert "weights_only" not in str(error.value)  # PyTorch's unsafe advice.
  assert list(scratch.iterdir()) == []
  assert not made.exists()
  # The attack is a real one.
  torch.load(source, weights_only=False)
  assert made.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_format_runs_an_attack(form, tmp_path):
  made = tmp_path / "made"
  value = {"state_dict": {"a": draw(3)}, "b": Attack(made)}
  if form == "pickle":
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Attack(made), protocol=2))
    with pytest.raises(tensors.CheckpointError, match=r"posix\.system"):
      convert(tmp_path, tmp_path / "a.bin")
  else:
    is_zip = form == "zip"
    message = refusal(tmp_path, value, _use_new_zipfile_serialization=is_zip)
    assert "posix.system" in message
  assert not made.exists()


def test_nothing_starts_unless_it_is_allowed(tmp_path, monkeypatch):
  torch.save({"a": draw(3)}, tmp_path / "a.bin")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: 1 / 0)
  with (
    pytest.raises(tensors.CheckpointError, match="--allow-pickle only") as e,
    pickles.unpickled([tmp_path / "a.bin"], False, tmp_path),
  ):
    pass
  assert str(tmp_path / "a.bin") in str(e.value)
  with pytest.raises(ZeroDivisionError):  # Allowed, it does.
    pickles.unpickled([tmp_path / "a.bin"], True, tmp_path).__enter__()
  with (
    pytest.raises(tensors.CheckpointError, match=r"no such file: .*b\.bin"),
    pickles.unpickled([tmp_path / "b.bin"], True, tmp_path),
  ):
    pass


@pytest.mark.parametrize(
  ("program", "message"),
  [
    (
      "import sys; print(*range(9), sep='\\n', file=sys.stderr); sys.exit(1)",
      r"exit code 1 .*said:\n  4\n  5\n  6\n  7\n  8$",
    ),
    ("import os; os.kill(os.getpid(), 9)", r"exit code -9 .*said:\n  nothing"),
  ],
)
def test_a_process_that_dies_is_told_in_a_few_lines(
  program, message, tmp_path, monkeypatch
):
  run = subprocess.run
  monkeypatch.setattr(
    subprocess,
    "run",
    lambda _, **kw: run([sys.executable, "-c", program], **kw),
  )
  (tmp_path / "a.bin").touch()
  scratch = tmp_path / "scratch"
  scratch.mkdir()
  with (
    pytest.raises(tensors.CheckpointError, match=rf"(?s)a\.bin.*{message}"),
    pickles.unpickled([tmp_path / "a.bin"], True, scratch),
  ):
    pass
  assert list(scratch.iterdir()) == []


def test_the_folder_goes_when_its_user_fails(tmp_path, monkeypatch):
  def run(command, **_):
    out = command[command.index("--out") + 1]
    unpickle.unpickle([tmp_path / "a.bin"], pathlib.Path(out))
    return subprocess.CompletedProcess(command, 0)

  torch.save({"a": draw(3)}, tmp_path / "a.bin")
  monkeypatch.setattr(subprocess, "run", run)
  with (
    contextlib.suppress(KeyboardInterrupt),
    pickles.unpickled([tmp_path / "a.bin"], True, tmp_path) as folder,
  ):
    assert_holds(folder, {"a": draw(3)})
    raise KeyboardInterrupt
  assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_the_program_imports_neither_jax_nor_torch_before_it_is_needed():
  code = f"import sys, {pickles.PROGRAM}, mole_jax.interop.pickles; " + (
    "print({'jax', 'torch', 'flax'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "set()"
  assert pickles.REFUSED == unpickle.REFUSED


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_state_dict_may_stand_beside_other_values(key, tmp_path):
  state = {"a.weight": draw(3, 4), "a.bias": draw(3)}
  beside = {
    "epoch": 3,
    "loss": 0.5,
    "name": "x",
    "none": None,
    "list": [1, "y"],
    "optimizer": {"state": {0: draw(2)}},
  }
  torch.save(beside | {key: state}, tmp_path / "a.bin")
  assert_holds(convert(tmp_path, tmp_path / "a.bin"), state)


def test_a_shared_storage_is_written_under_every_name(tmp_path, monkeypatch):
  monkeypatch.setattr(unpickle, "MAX_SHARD_BYTES", 100)
  linear = torch.nn.Linear(6, 6)
  model = torch.nn.Sequential(linear, linear)
  state = model.state_dict() | {"slice": model.state_dict()["0.weight"][2:4]}
  torch.save(state, tmp_path / "a.bin")
  folder = convert(tmp_path, tmp_path / "a.bin")
  assert_holds(folder, state)
  assert len({info.file for info in folder.infos.values()}) > 2


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (
      {"a": torch.zeros(2), "b": 3, "c": [1]},
      r"'b' is of type int\n  'c' is of type list",
    ),
    ({"state_dict": {"a": torch.zeros(2), "b": 0.5}}, "'b' is of type float"),
    ({"a": torch.zeros(2), 3: torch.zeros(2)}, "3 is no name"),
    ({"a": torch.zeros(2, dtype=torch.complex64)}, "type torch.complex64"),
    ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo on cpu"),
    ({"a": torch.zeros(2, device="meta")}, "'a' is torch.strided on meta"),
    ({"a": torch.zeros(1).expand(10**9, 1000)}, "more than the file"),
    (
      {"model": {"a": torch.zeros(2)}, "module": {"a": torch.zeros(2)}},
      "more than one state dict: model, module",
    ),
    ({}, "there is none"),
    ({"epoch": 3}, "'epoch' is of type int"),
    ([torch.zeros(2)], "holds a list; wanted a state dict"),
    (torch.zeros(2), "holds a Tensor; wanted a state dict"),
  ],
)
def test_what_is_no_tensor_is_named(value, message, tmp_path):
  assert message.replace(r"\n", "\n") in refusal(tmp_path, value)


def test_a_name_in_two_files_is_an_error_that_names_both(tmp_path):
  paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
  for path in paths:
    torch.save({"x": draw(2)}, path)
  with pytest.raises(tensors.CheckpointError, match="'x' is in both") as error:
    convert(tmp_path, *paths)
  assert all(str(path) in str(error.value) for path in paths)


def test_no_more_is_written_than_the_disk_has_room_for(tmp_path, monkeypatch):
  usage = unpickle.shutil.disk_usage(tmp_path)._replace(free=11)
  monkeypatch.setattr(unpickle.shutil, "disk_usage", lambda _: usage)
  assert "12 bytes of tensors" in refusal(tmp_path, {"a": draw(3)})


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_off_anywhere_is_told(is_zip, tmp_path):
  path, out = tmp_path / "a.bin", tmp_path / "out"
  out.mkdir()
  torch.save(
    {"a": draw(30), "b": draw(20)}, path, _use_new_zipfile_serialization=is_zip
  )
  content = path.read_bytes()
  assert unpickle.load(torch, path).keys() == {"a", "b"}
  for size in [*range(0, len(content) - 1, 37), len(content) - 1]:
    path.write_bytes(content[:size])
    with pytest.raises(tensors.CheckpointError, match=r"a\.bin") as error:
      unpickle.unpickle([path], out)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path):
  path = tmp_path / "a.bin"
  torch.save({"a": torch.full((100,), 1.5)}, path)
  content = bytearray(path.read_bytes())
  content[content.index(np.full(100, 1.5, np.float32).tobytes()) + 7] ^= 1
  path.write_bytes(content)
  assert torch.load(path, mmap=True)["a"][1] != 1.5  # PyTorch sees nothing.
  with pytest.raises(tensors.CheckpointError, match="data/0 is not what was"):
    convert(tmp_path, path)


def test_files_of_other_kinds_are_named(tmp_path):
  path = tmp_path / "a.bin"

  def told():
    with pytest.raises(tensors.CheckpointError) as error:
      unpickle.load(torch, path)
    return str(error.value)

  path.write_bytes(b"version https://git-lfs")
  assert "begins with b'vers'" in told()
  path.write_bytes(pickle.dumps({"a": 1}))
  assert "is no whole state dict" in told()
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/b", "c")
  assert "is no whole state dict" in told()
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", "c" * 1000)
  assert "is a compressed archive" in told()
  # What torch.jit.save writes holds these two, and code.
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", "c")
    archive.writestr("a/constants.pkl", "c")
  assert "is a TorchScript archive" in told()


@pytest.mark.parametrize(
  ("version", "is_good"),
  [
    ("2.9.1", False),
    ("1.13.1+cu117", False),
    ("2.10.0", True),
    ("3.0a0", True),
  ],
)
def test_a_pytorch_with_a_known_hole_is_refused(version, is_good, monkeypatch):
  monkeypatch.setattr(torch, "__version__", version)
  if is_good:
    unpickle.import_torch()
    return
  with pytest.raises(tensors.CheckpointError) as error:
    unpickle.import_torch()
  assert f"{version} is installed" in str(error.value)
  assert "2.10 or newer" in str(error.value)


def test_without_pytorch_the_way_to_install_it_is_told(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(tensors.CheckpointError, match="pip install 'torch>=2.1"):
    convert(tmp_path, tmp_path / "a.bin")


def test_the_program_says_what_it_refuses_on_standard_output(tmp_path, capsys):
  (tmp_path / "-a.bin").touch()
  argv = ["--out", str(tmp_path), "--", str(tmp_path / "-a.bin")]
  assert unpickle.main(argv) == unpickle.REFUSED
  said = capsys.readouterr()
  assert "begins with b''" in said.out and said.err == ""


def test_pickles_are_found_in_order(tmp_path):
  assert pickles.find_pickles(tmp_path) == []
  for name, others in (
    ("adapter_model.bin", []),
    ("pytorch_model-1.bin", ["pytorch_model.bin.index.json"]),
    ("pytorch_model.bin", []),
  ):
    (tmp_path / name).touch()
    for other in others:
      index = {"weight_map": {"x": name, "y": name}}
      (tmp_path / other).write_text(json.dumps(index))
    assert pickles.find_pickles(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({"weight_map": {"a": "b.bin"}}, r"shards that are not there: b\.bin"),
    ({"weight_map": {}}, "shards that are not there: none"),
    ({"weight_map": {"a": "../b.bin"}}, "outside its folder"),
    ({"weight_map": {"a": 3}}, "is no index of shards"),
    ([], "is no index of shards"),
    ("{", "is no index of shards"),
  ],
)
def test_a_broken_index_says_what_is_wrong(index, message, tmp_path):
  text = index if isinstance(index, str) else json.dumps(index)
  (tmp_path / "pytorch_model.bin.index.json").write_text(text)
  with pytest.raises(tensors.CheckpointError, match=message):
    pickles.find_pickles(tmp_path)


def test_bfloat16_is_moved_bit_for_bit():
  bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
  array = unpickle.to_numpy(torch, bits.view(torch.bfloat16))
  assert array.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(array.view(np.int16), bits.numpy())
