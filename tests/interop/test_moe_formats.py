"""Whole FFNs as experts: out as a LLaVA with Mixtral or as they are, and in."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mole_jax import convert
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, tensors, to_hf
from mole_jax.interop import verify as verify_lib
from mole_jax.models import llava
from mole_jax.training import base as base_lib
from mole_jax.training import files, losses, rundir, state
from tests.interop import folders, in_process, random_run, torch_models
from tests.models import small
from tests.training import small_run

LORA = dict(rank=2, alpha=3.0, dropout=0.0)
ADAPTERS = dict(rank=2, alpha=4.0, dropout=0.0)
# Changes to config.model of configs/moe_llava.py: what Mixtral can hold.
SPARSE = dict(decoder=dict(num_layers=3))
NATIVE = {
  "sparse, top 3, LoRA everywhere": dict(
    SPARSE, moe=dict(top_k=3), lora=LORA, mole=dict(ADAPTERS, num_experts=1)
  ),
  "dense, a window, LoRA on experts": dict(
    decoder=dict(sliding_window=64),
    moe=dict(layers="dense"),
    mole=dict(ADAPTERS, num_experts=2),
  ),
}
# What only our modeling file holds.
OTHERS = {
  "two and three, top 1": dict(
    moe=dict(
      layers="dense", num_experts=(2, 3), top_k=1, eval_capacity_factor=3.0
    )
  ),
  "Phi, LoRA mixtures beside": dict(
    decoder=small.PHI, lora=LORA, mole=dict(ADAPTERS, num_experts=3)
  ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
  torch.set_num_threads(1)


def export(ckpt, out, format, **options):
  to_hf.convert(ckpt, out, format=format, max_shard_bytes=10**5, **options)
  return out


def assert_verified(run, folder, monkeypatch):
  in_process.patch(monkeypatch)
  report = verify_lib.verify(run, folder)
  assert report.is_equal, report.checks
  assert any("router decisions" in check.what for check in report.checks)
  return report


def make_batch(model):
  """Two rows; the second has an image, whose positions are six."""
  count = model.num_image_tokens
  ids, pixels = torch_models.make_batch(0, count)
  side = model.model_config.vision.image_size
  ids = 4 + ids % 90
  ids[1, 2 : 2 + count] = model.image_token_id
  return ids, pixels[:, :side, :side]


@pytest.mark.parametrize("case", NATIVE)
def test_stock_transformers_computes_what_the_run_does(
  case, tmp_path, monkeypatch
):
  random_run.write_moe(tmp_path / "run", **NATIVE[case])
  hf = export(tmp_path / "run", tmp_path / "hf", "native-moe")
  values = json.loads((hf / "config.json").read_text())
  assert values["text_config"]["model_type"] == "mixtral"
  assert not list(hf.glob("*.py")) and "auto_map" not in values
  assert_verified(tmp_path / "run", hf, monkeypatch)


def test_mixtral_comes_in_bit_for_bit_from_either_writer(tmp_path):
  run = tmp_path / "run"
  random_run.write_moe(run, **SPARSE)
  hf = export(run, tmp_path / "hf", "native-moe")
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    hf, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  model.save_pretrained(tmp_path / "theirs")
  for name in ("hf", "theirs"):
    from_hf.convert(tmp_path / name, tmp_path / f"{name}-base")
  about, theirs = (
    base_lib.BaseReader(tmp_path / name).about
    for name in ("hf-base", "theirs-base")
  )
  assert about["sha256"] == theirs["sha256"]
  assert about["model"] == theirs["model"]
  assert about["model"]["moe"]["layers"] == "dense"
  export(tmp_path / "hf-base", tmp_path / "again", "native-moe")
  one, other = (folders.read_all(tmp_path / x) for x in ("hf", "again"))
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  loaded, trained = pretrained.load(tmp_path / "hf-base"), pretrained.load(run)
  batch = make_batch(trained)
  torch_models.assert_close(loaded.logits(*batch), trained.logits(*batch))
  assert len(loaded.generate("What?", max_new_tokens=3)) == 1
  config = small_run.read_config("mole3", str(tmp_path / "hf-base"))
  model = state.model_config(rundir.plain(config), "mole")
  assert model.moe.layers == "dense" and model.mole.num_experts == 3


@pytest.mark.parametrize("case", OTHERS)
def test_our_modeling_file_holds_what_mixtral_cannot(
  case, tmp_path, monkeypatch
):
  run = tmp_path / "run"
  _, flat = random_run.write_moe(run, **OTHERS[case])
  hf = export(run, tmp_path / "hf", "mole")
  assert_verified(run, hf, monkeypatch)
  from_hf.convert(hf, tmp_path / "base")
  reader = base_lib.BaseReader(tmp_path / "base")
  assert reader.parameters.keys() == flat.keys()
  for path, leaf in flat.items():
    np.testing.assert_array_equal(reader.read(path), leaf, err_msg=path)


def test_its_loss_is_ours(tmp_path):
  run = tmp_path / "run"
  config, flat = random_run.write_moe(
    run, **SPARSE, mole=dict(ADAPTERS, num_experts=3)
  )
  hf = export(run, tmp_path / "hf", "mole")
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    hf, trust_remote_code=True
  )
  ids = np.random.default_rng(0).integers(4, 98, (2, 11))
  mask = np.ones_like(ids)
  mask[1, 8:] = 0
  labels = np.where(mask, ids, -100)
  output = model(
    **{
      key: torch.from_numpy(array)
      for key, array in (
        ("input_ids", ids),
        ("attention_mask", mask),
        ("labels", labels),
      )
    }
  )
  ours = pretrained.load(run)
  routing = (
    llava.Llava(ours.model_config)
    .apply(
      {"params": ours.params},
      jnp.asarray(ids),
      None,
      jnp.arange(11)[None].repeat(2, 0),
      jnp.asarray(mask),
      1,
    )
    .routing
  )
  numbers = tuple(ours.experts_of_layers.values())
  assert numbers == (4, 3, 4)
  wanted = losses.balance_loss(
    routing, jnp.asarray(mask), 1, "moe_llava", numbers
  )
  found = model.balance_loss(torch.from_numpy(mask)).item()
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  language = torch.nn.functional.cross_entropy(
    output.logits[:, :-1].flatten(0, 1),
    torch.from_numpy(labels)[:, 1:].flatten(),
  )
  total = language + config["balance"]["weight"] * found
  np.testing.assert_allclose(output.loss.item(), total.item(), rtol=1e-5)


def test_frozen_experts_are_copies_of_the_base_s_ffns(tmp_path):
  run = tmp_path / "run"
  random_run.write_moe(run, trained=["decoder/.*/router/.*"])
  held = folders.read_all(export(run, tmp_path / "hf", "native-moe"))
  base = base_lib.BaseReader(run / "tuning")
  for linear, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
    kernel = base.read(f"decoder/layers/mlp/{linear}_proj/kernel")
    for layer in range(2):
      stem = f"language_model.model.layers.{layer}.block_sparse_moe"
      for expert in range(4):
        name = f"{stem}.experts.{expert}.{theirs}.weight"
        np.testing.assert_array_equal(held[name], kernel[layer].T)
  assert held[
    "language_model.model.layers.0.block_sparse_moe.gate.weight"
  ].any()
  gate = "language_model.model.layers.1.block_sparse_moe.gate.weight"
  assert not held[gate].any()


@pytest.mark.parametrize(
  ("format", "changes", "message"),
  [
    ("merged", {}, "layers 0 have 4 FFNs each.* --format native-moe"),
    ("experts", {}, "PEFT's adapters .* no place"),
    ("native-moe", dict(moe=dict(top_k=1)), "top_k=1 an expert's output"),
    ("native-moe", dict(decoder=small.PHI), "head has no bias"),
    (
      "native-moe",
      dict(decoder=dict(attention_bias="qkv")),
      "of the form of qwen2: use --format mole",
    ),
    (
      "native-moe",
      dict(moe=dict(layers="dense", num_experts=(2, 4))),
      "layers 0 have 2; layers 1 have 4",
    ),
    (
      "native-moe",
      dict(mole=dict(ADAPTERS, num_experts=3)),
      "layers 1 have mixtures of LoRA experts",
    ),
    (
      "native-moe",
      dict(moe=dict(eval_capacity_factor=1.0)),
      "eval_capacity_factor=1.0.*--ignore-capacity",
    ),
    ("mole", dict(moe=dict(eval_capacity_factor=1.5)), "--ignore-capacity"),
    ("mole --without-base", dict(lora=LORA), "base .* has whole FFNs"),
  ],
)
def test_what_a_format_cannot_hold_is_refused(
  format, changes, message, tmp_path
):
  random_run.write_moe(tmp_path / "run", **changes)
  format, *more = format.split(" ")
  with pytest.raises(tensors.CheckpointError, match=message):
    export(tmp_path / "run", tmp_path / "hf", format, without_base=bool(more))
  assert not (tmp_path / "hf").exists()


def test_dropped_tokens_are_told_and_compared_undropped(tmp_path, monkeypatch):
  run = tmp_path / "run"
  random_run.write_moe(run, moe=dict(eval_capacity_factor=0.5))
  arguments = ["to-hf", "--ckpt", str(run), "--format", "native-moe"]
  arguments += ["--out", str(tmp_path / "hf")]
  assert convert.main(arguments) == 2
  assert convert.main([*arguments, "--ignore-capacity"]) == 0
  report = assert_verified(run, tmp_path / "hf", monkeypatch)
  assert "tokens are dropped at evaluation" in [c.what for c in report.checks]


def test_stages_before_and_with_experts_are_told_apart(tmp_path, capsys):
  run = tmp_path / "run"
  config, flat = random_run.write_moe(run, decoder=dict(num_layers=3))
  assert convert.main(["inspect", str(run)]) == 0
  assert "0, 2 of 3 layers, 2 a token" in capsys.readouterr().out
  assert convert.main(["inspect", str(run / "tuning")]) == 0
  assert "FFNs" not in capsys.readouterr().out
  arguments = ["to-hf", "--ckpt", str(run / "tuning"), "--out"]
  arguments.append(str(tmp_path / "hf"))
  assert convert.main([*arguments, "--format", "native-moe"]) == 2
  assert "no layer has whole FFNs" in capsys.readouterr().err
  assert convert.main([*arguments, "--format", "merged"]) == 0
  # What a stage wrote of a whole model with experts.
  base_lib.write_base(run / "experts", flat)
  assert convert.main(["inspect", str(run / "experts")]) == 0
  assert "0, 2 of 3 layers, 2 a token" in capsys.readouterr().out
  values = files.read_json(run / "config.json")
  values["model"]["moe"]["num_experts"] = [2, 4]  # Of no matter before them.
  files.write_json(run / "config.json", values)
  assert convert.main(["inspect", str(run / "tuning")]) == 0
