"""Conversions stream: they hold one parameter, and headers where they can."""

import shutil

import pytest

from mole_jax import convert
from mole_jax.interop import from_hf, tensors
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint
from tests.interop import memory, random_run

# 344 MB, the largest stacked parameter 69 MB, the bound 604 MB. Measured:
# 465 to 480 MB, and 740 to 775 MB where all parameters were held.
SHAPE = memory.Shape(hidden=512, ffn=1408, layers=24, vocab=8192)
TINY = memory.Shape(hidden=64, ffn=96, layers=2, vocab=128)


def test_conversions_hold_one_parameter_at_a_time(tmp_path):
  source, base, out = (str(tmp_path / n) for n in ("source", "base", "out"))
  size = memory.write_llava(tmp_path / "source", SHAPE, 100 * memory.MB)
  for command in (
    ["from-hf", "--src", source, "--out", base],
    ["to-hf", "--ckpt", base, "--out", out, "--format", "merged"],
  ):
    measured = memory.run(command, tmp_path)
    # Else the bound would not tell whether all were held.
    assert measured.imports + size > 0.9 * SHAPE.bound
    assert measured.peak <= SHAPE.bound, command[0]
  # Everything arrived, in one shard.
  written = tensors.Folder(tmp_path / "out")
  held = tensors.Folder(tmp_path / "source")
  assert len(written.infos) == len(held.infos) + 2  # The tower's unused norm.
  name = "language_model.model.layers.23.mlp.down_proj.weight"
  assert (written.read(name) == held.read(name)).all()


def test_a_look_at_a_base_reads_no_parameter(tmp_path, capsys):
  memory.write_llava(tmp_path / "source", TINY)
  base = tmp_path / "base"
  from_hf.convert(tmp_path / "source", base)
  shutil.rmtree(base / "params")
  look_at(base, tmp_path)
  assert "0.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["mole", "experts"])
def test_a_look_at_a_run_reads_no_parameter(format, tmp_path, monkeypatch):
  random_run.write(tmp_path / "run", "mole3", use_visual_tokens=False)

  def fail(*_):
    raise AssertionError("a parameter was read")

  monkeypatch.setattr(base_lib.BaseReader, "_restore", fail)
  monkeypatch.setattr(checkpoint.StepReader, "read", fail)
  look_at(tmp_path / "run", tmp_path, format)


def test_a_look_at_a_checkpoint_of_others_reads_no_tensor(
  tmp_path, monkeypatch
):
  memory.write_llava(tmp_path / "source", TINY)
  monkeypatch.delattr(tensors, "_read_blocks")
  assert convert.main(["inspect", str(tmp_path / "source")]) == 0


def look_at(ckpt, folder, format="merged"):
  assert convert.main(["inspect", str(ckpt)]) == 0
  arguments = ["to-hf", "--ckpt", str(ckpt), "--format", format, "--dry-run"]
  out = folder / "out"
  assert convert.main([*arguments, "--out", str(out)]) == 0
  assert not out.exists()
