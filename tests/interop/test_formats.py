"""Every layout in, stock LLaVA out, round trips bit for bit."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import numpy as safetensors_numpy

from mole_jax import convert
from mole_jax.inference import pretrained
from mole_jax.interop import formats, names, tensors, write_hf
from mole_jax.training import base as base_lib
from tests import test_main
from tests.interop import random_run, torch_models


@pytest.fixture(scope="module")
def model():
  torch.set_num_threads(1)
  return torch_models.make_llava()


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("hf") / "llava"
  model.save_pretrained(folder)
  (folder / "tokenizer.json").write_text("{}")
  return folder


def read_all(folder):
  held = tensors.Folder(folder)
  return {name: held.read(name) for name in held.infos}


def canonical(folder):
  """The tensors of a folder by canonical name."""
  arrays = read_all(folder)
  return {
    name: arrays[on_disk]
    for name, on_disk in names.canonical(arrays)[0].items()
  }


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def merge(ckpt, out):
  formats.to_hf(ckpt, out, format="merged", max_shard_bytes=10**9)


def save(folder, arrays, config):
  folder.mkdir(parents=True)
  arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
  safetensors_numpy.save_file(arrays, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  return folder


LAYOUTS = {
  "memory of Transformers 5": {
    names.TOWER: "model.vision_tower.",
    names.PROJECTOR: "model.multi_modal_projector.",
    names.LLM: "model.language_model.",
    names.HEAD: "lm_head.weight",
  },
  "disk of Transformers 4": {},
  "disk of Transformers 5": {names.TOWER: "vision_tower."},
  "original": {
    names.TOWER: "model.vision_tower.vision_tower.vision_model.",
    f"{names.PROJECTOR}linear_1": "model.mm_projector.0",
    f"{names.PROJECTOR}linear_2": "model.mm_projector.2",
    names.LLM: "model.",
    names.HEAD: "lm_head.weight",
  },
}


def renamed(arrays, prefixes):
  result = {}
  for name, array in arrays.items():
    for ours, theirs in prefixes.items():
      if name.startswith(ours):
        name = theirs + name.removeprefix(ours)
        break
    result[name] = array
  return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_base(layout, hf_folder, tmp_path):
  config = json.loads((hf_folder / "config.json").read_text())
  formats.from_hf(hf_folder, tmp_path / "plain")
  wanted = base_lib.BaseReader(tmp_path / "plain")
  arrays = renamed(canonical(hf_folder), LAYOUTS[layout])
  # Buffers of older versions are left out without a word.
  tower = LAYOUTS[layout].get(names.TOWER, names.TOWER)
  arrays[f"{tower}embeddings.position_ids"] = np.arange(10)
  extra = {}
  if layout == "original":
    vision = save(tmp_path / "clip", {}, config["vision_config"])
    tower_arrays = {
      name.removeprefix("vision_tower."): array
      for name, array in canonical(hf_folder).items()
      if name.startswith(names.TOWER)
    }
    safetensors_numpy.save_file(tower_arrays, vision / "model.safetensors")
    arrays = {n: a for n, a in arrays.items() if not n.startswith(tower)}
    config = config["text_config"] | {
      "model_type": "llava_llama",
      "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    extra = {"vision": vision}
  source = save(tmp_path / "source", arrays, config)
  formats.from_hf(source, tmp_path / "base", **extra)
  reader = base_lib.BaseReader(tmp_path / "base")
  assert reader.about["sha256"] == wanted.about["sha256"]
  if layout == "original":
    # Its feature layer is chosen in training, and no id stands for images.
    assert "image_token_id" not in reader.about["model"]
  else:
    assert reader.about["model"] == wanted.about["model"]


@pytest.mark.parametrize("max_shard", ["2GB", "3KB"])
def test_in_out_in_is_bitwise_and_transformers_loads_it(
  max_shard, model, hf_folder, tmp_path, capsys
):
  base, out, again = (str(tmp_path / name) for name in ("base", "out", "again"))
  assert convert.main(["from-hf", "--src", str(hf_folder), "--out", base]) == 0
  options = ["--ckpt", base, "--out", out, "--max-shard-size", max_shard]
  assert convert.main(["to-hf", "--format", "merged", *options]) == 0
  assert convert.main(["from-hf", "--src", out, "--out", again]) == 0
  assert_same(canonical(tmp_path / "out"), canonical(hf_folder))
  readers = [base_lib.BaseReader(tmp_path / n) for n in ("base", "again")]
  for key in ("model", "parameters", "sha256", "image_mean"):
    assert readers[0].about[key] == readers[1].about[key]
  assert (tmp_path / "out" / "tokenizer.json").exists()
  loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, parameter in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], parameter), name
  assert "converted to a base" in capsys.readouterr().out


def test_bfloat16_rounds_once_and_is_kept(hf_folder, tmp_path):
  formats.from_hf(hf_folder, tmp_path / "base", dtype="bfloat16")
  merge(tmp_path / "base", tmp_path / "out")
  wanted = canonical(hf_folder)
  for name, array in canonical(tmp_path / "out").items():
    assert array.dtype == ml_dtypes.bfloat16
    rounded = wanted[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(array, rounded, err_msg=name)


def test_parts_become_a_llava_with_a_new_projector(model, tmp_path):
  vision, decoder = tmp_path / "clip", tmp_path / "llama"
  config = transformers.CLIPVisionConfig(**torch_models.VISION)
  torch_models.randomise(transformers.CLIPVisionModel(config)).save_pretrained(
    vision
  )
  config = transformers.LlamaConfig(**torch_models.TEXT)
  torch_models.randomise(transformers.LlamaForCausalLM(config)).save_pretrained(
    decoder
  )
  formats.from_hf(decoder, tmp_path / "base", vision=vision)
  about = base_lib.BaseReader(tmp_path / "base").about
  assert len(about["initialised"]) == 4
  assert all(name.startswith("projector/") for name in about["initialised"])
  with pytest.raises(ValueError, match="stock LLaVA needs the id"):
    merge(tmp_path / "base", tmp_path / "x")
  with pytest.raises(ValueError, match="has no vision; give its folder with"):
    formats.from_hf(decoder, tmp_path / "x")
  with pytest.raises(ValueError, match="holds a llama decoder, not a vision"):
    formats.from_hf(decoder, tmp_path / "x", vision=decoder)


def test_missing_and_unknown_tensors_are_all_listed(hf_folder, tmp_path):
  config = json.loads((hf_folder / "config.json").read_text())
  arrays = canonical(hf_folder)
  moved = f"{names.LLM}layers.1.mlp.up_proj.weight"
  arrays[f"{names.LLM}layers.1.mlp.upp_proj.weight"] = arrays.pop(moved)
  del arrays[names.HEAD]
  source = save(tmp_path / "source", arrays, config)
  with pytest.raises(tensors.CheckpointError) as error:
    formats.from_hf(source, tmp_path / "out")
  text = str(error.value)
  assert f"missing {names.HEAD}" in text
  assert f"missing {moved} (did it become {names.LLM}layers.1.mlp.upp" in text
  assert "unknown" in text
  assert not list(tmp_path.glob("out*"))


def test_tensors_that_contradict_the_configuration_are_all_listed(
  hf_folder, tmp_path
):
  config = json.loads((hf_folder / "config.json").read_text())
  config["text_config"]["intermediate_size"] = 41
  source = save(tmp_path / "source", canonical(hf_folder), config)
  with pytest.raises(tensors.CheckpointError) as error:
    formats.from_hf(source, tmp_path / "out")
  assert str(error.value).count("\n") == 2 * 3
  assert "up_proj.weight is [40, 24], for " in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "blip"}, "model_type is 'blip'; wanted llava"),
    ({"vision_feature_layer": [-2, -5]}, "wanted a single layer"),
    ({"vision_feature_select_strategy": "full"}, "'full'; wanted 'default'"),
    ({"text_config": {"model_type": "qwen2"}}, "model_type is 'qwen2'"),
    ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
    (
      {"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
      "rotary positions of type 'linear'",
    ),
    ({"vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu'"),
  ],
)
def test_a_model_that_we_cannot_follow_is_refused(
  change, message, hf_folder, tmp_path
):
  config = json.loads((hf_folder / "config.json").read_text())
  source = save(tmp_path / "source", canonical(hf_folder), config | change)
  with pytest.raises(tensors.CheckpointError, match=message):
    formats.from_hf(source, tmp_path / "out")


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
  arguments = ["to-hf", "--ckpt", str(tmp_path / "no"), "--out", "x"]
  assert convert.main([*arguments, "--format", "mole"]) == 2
  assert "does not exist" in capsys.readouterr().err


def test_a_converted_checkpoint_loads_and_answers_like_transformers(tmp_path):
  torch_models.save_for_embedded_data(tmp_path / "llava")
  formats.from_hf(tmp_path / "llava", tmp_path / "base")
  ours = pretrained.load(tmp_path / "base")
  theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "llava"
  )
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 900, (1, 16))
  ids[:, 2 : 2 + ours.num_image_tokens] = ours.image_token_id
  pixels = rng.normal(size=(1, 12, 12, 3)).astype(np.float32)
  with torch.no_grad():
    logits = theirs(
      input_ids=torch.from_numpy(ids),
      pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
    ).logits.numpy()
  difference = np.abs(np.asarray(ours.logits(ids, pixels)) - logits).max()
  assert difference <= 1e-4 * np.abs(logits).max()
  (answer,) = ours.generate("What is shown?", max_new_tokens=2)
  assert isinstance(answer, str)


def test_a_config_that_contradicts_a_converted_base_is_refused(tmp_path):
  torch_models.save_for_embedded_data(tmp_path / "llava")
  base = tmp_path / "base"
  formats.from_hf(tmp_path / "llava", base)
  done = test_main.run(
    f"--workdir={tmp_path}/run",
    "--config.model.decoder.rope_theta=1e6",
    "--config.model.vision.hidden_act=gelu",
    config=f"configs/mole3.py:{base}",
  )
  assert done.returncode == 2
  for difference in (
    "vision.hidden_act is 'gelu', the base's 'quick_gelu'",
    "decoder.rope_theta is 1000000.0, the base's 5000.0",
  ):
    assert difference in done.stderr
  assert "Traceback" not in done.stderr
