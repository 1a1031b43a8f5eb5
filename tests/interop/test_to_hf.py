"""Stock LLaVA out, and in again bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from mole_jax import convert
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, tensors, to_hf, write_hf
from mole_jax.training import base as base_lib
from tests.interop import folders, random_run


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def merge(ckpt, out):
  to_hf.convert(ckpt, out, format="merged", max_shard_bytes=10**9)


@pytest.mark.parametrize("max_shard", ["2GB", "3KB"])
def test_in_out_in_is_bitwise_and_transformers_loads_it(
  max_shard, model, hf_folder, tmp_path, capsys
):
  base, out, again = (str(tmp_path / name) for name in ("base", "out", "again"))
  assert convert.main(["from-hf", "--src", str(hf_folder), "--out", base]) == 0
  options = ["--ckpt", base, "--out", out, "--max-shard-size", max_shard]
  assert convert.main(["to-hf", "--format", "merged", *options]) == 0
  assert convert.main(["from-hf", "--src", out, "--out", again]) == 0
  assert_same(folders.canonical(tmp_path / "out"), folders.canonical(hf_folder))
  readers = [base_lib.BaseReader(tmp_path / n) for n in ("base", "again")]
  for key in ("model", "parameters", "sha256"):
    assert readers[0].about[key] == readers[1].about[key]
  data = [reader.about["config"]["data"] for reader in readers]
  assert data[0] == data[1]
  assert (tmp_path / "out" / "tokenizer.json").exists()
  loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, parameter in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], parameter), name
  assert "converted to a base" in capsys.readouterr().out


def test_bfloat16_rounds_once_and_is_kept(hf_folder, tmp_path):
  from_hf.convert(hf_folder, tmp_path / "base", dtype="bfloat16")
  merge(tmp_path / "base", tmp_path / "out")
  wanted = folders.canonical(hf_folder)
  for name, array in folders.canonical(tmp_path / "out").items():
    assert array.dtype == ml_dtypes.bfloat16
    rounded = wanted[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(array, rounded, err_msg=name)


def test_merged_lora_is_the_same_model_in_transformers(tmp_path):
  run = tmp_path / "run"
  config, _ = random_run.write(run, "lora", use_visual_tokens=False)
  out = str(tmp_path / "out")
  assert convert.main(["inspect", str(run)]) == 0
  dry = ["to-hf", "--ckpt", str(run), "--format", "merged", "--out", out]
  dry += ["--dry-run"]
  assert convert.main(dry) == 0
  assert not (tmp_path / "out").exists()
  assert convert.main(dry[:-1]) == 0
  theirs = transformers.LlavaForConditionalGeneration.from_pretrained(out)
  ours = pretrained.load(run)
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 98, (2, 12))
  ids[:, 2:6] = ours.image_token_id
  pixels = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
  with torch.no_grad():
    logits = theirs(
      input_ids=torch.from_numpy(ids),
      pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
    ).logits.numpy()
  difference = np.abs(np.asarray(ours.logits(ids, pixels)) - logits).max()
  assert difference <= 1e-4 * np.abs(logits).max()


def test_what_stock_llava_cannot_hold_is_refused(tmp_path, capsys):
  run = tmp_path / "run"
  config, _ = random_run.write(run, "lora", use_visual_tokens=False)
  for key, value, message in (
    ("use_visual_tokens", True, "no visual_start and visual_end"),
    ("mole", config["model"]["mole"] | {"num_experts": 3}, "cannot be merged"),
  ):
    changed = config | {"model": config["model"] | {key: value}}
    with pytest.raises(tensors.CheckpointError, match=message):
      write_hf.check_stock(changed["model"])
  random_run.write(tmp_path / "mixture", "mole3")
  arguments = ["to-hf", "--ckpt", str(tmp_path / "mixture"), "--out", "x"]
  for options in (["experts"], ["mole", "--without-base"]):
    assert convert.main([*arguments, "--format", *options]) == 2
    assert "no stock LLaVA is that base" in capsys.readouterr().err
  arguments = ["to-hf", "--ckpt", str(tmp_path / "no"), "--out", "x"]
  assert convert.main([*arguments, "--format", "mole"]) == 2
  assert "does not exist" in capsys.readouterr().err
