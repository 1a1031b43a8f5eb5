"""Every layout in, and what cannot be used refused with a reason."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors import numpy as safetensors_numpy

from mole_jax.data import tokenizer
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, names, tensors, to_hf
from mole_jax.training import base as base_lib
from tests import test_main
from tests.interop import folders, test_gguf_file, torch_models

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
  from_hf.convert(hf_folder, tmp_path / "plain")
  wanted = base_lib.BaseReader(tmp_path / "plain")
  arrays = renamed(folders.canonical(hf_folder), LAYOUTS[layout])
  # Buffers of older versions are left out without a word.
  tower = LAYOUTS[layout].get(names.TOWER, names.TOWER)
  arrays[f"{tower}embeddings.position_ids"] = np.arange(10)
  extra = {}
  if layout == "original":
    vision = folders.save(tmp_path / "clip", {}, config["vision_config"])
    tower_arrays = {
      name.removeprefix("vision_tower."): array
      for name, array in folders.canonical(hf_folder).items()
      if name.startswith(names.TOWER)
    }
    safetensors_numpy.save_file(tower_arrays, vision / "model.safetensors")
    arrays = {n: a for n, a in arrays.items() if not n.startswith(tower)}
    config = config["text_config"] | {
      "model_type": "llava_llama",
      "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    extra = {"vision": vision}
  source = folders.save(tmp_path / "source", arrays, config)
  from_hf.convert(source, tmp_path / "base", **extra)
  reader = base_lib.BaseReader(tmp_path / "base")
  assert reader.about["sha256"] == wanted.about["sha256"]
  model = dict(reader.about["model"])
  if layout == "original":
    # It has no id for images: here it comes without a tokenizer.
    model["image_token_id"] = torch_models.IMAGE_TOKEN
  assert model == wanted.about["model"]


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
  from_hf.convert(decoder, tmp_path / "base", vision=vision)
  about = base_lib.BaseReader(tmp_path / "base").about
  assert len(about["initialised"]) == 4
  assert all(name.startswith("projector/") for name in about["initialised"])
  with pytest.raises(ValueError, match="stock LLaVA needs the id"):
    to_hf.convert(
      tmp_path / "base",
      tmp_path / "x",
      format="merged",
      max_shard_bytes=10**9,
    )
  with pytest.raises(ValueError, match="has no vision; give its folder with"):
    from_hf.convert(decoder, tmp_path / "x")
  with pytest.raises(ValueError, match="holds a llama decoder, not a vision"):
    from_hf.convert(decoder, tmp_path / "x", vision=decoder)


def test_missing_and_unknown_tensors_are_all_listed(hf_folder, tmp_path):
  config = json.loads((hf_folder / "config.json").read_text())
  arrays = folders.canonical(hf_folder)
  moved = f"{names.LLM}layers.1.mlp.up_proj.weight"
  arrays[f"{names.LLM}layers.1.mlp.upp_proj.weight"] = arrays.pop(moved)
  del arrays[names.HEAD]
  source = folders.save(tmp_path / "source", arrays, config)
  with pytest.raises(tensors.CheckpointError) as error:
    from_hf.convert(source, tmp_path / "out")
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
  source = folders.save(
    tmp_path / "source", folders.canonical(hf_folder), config
  )
  with pytest.raises(tensors.CheckpointError) as error:
    from_hf.convert(source, tmp_path / "out")
  assert str(error.value).count("\n") == 2 * 3
  assert "up_proj.weight is [40, 24], for " in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "blip"}, "model_type is 'blip'; wanted llava"),
    ({"vision_feature_layer": [-2, -5]}, "wanted a single layer"),
    ({"vision_feature_select_strategy": "full"}, "'full'; wanted 'default'"),
    ({"text_config": {"model_type": "qwen3"}}, "model_type is 'qwen3'"),
    ({"text_config": {"mlp_bias": True}}, "mlp_bias is True"),
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
  source = folders.save(
    tmp_path / "source", folders.canonical(hf_folder), config | change
  )
  with pytest.raises(tensors.CheckpointError, match=message):
    from_hf.convert(source, tmp_path / "out")


def test_a_converted_checkpoint_loads_and_answers_like_transformers(tmp_path):
  torch_models.save_for_embedded_data(tmp_path / "llava")
  from_hf.convert(tmp_path / "llava", tmp_path / "base")
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
      pixel_values=torch_models.to_torch(pixels),
    ).logits.numpy()
  difference = np.abs(np.asarray(ours.logits(ids, pixels)) - logits).max()
  assert difference <= 1e-4 * np.abs(logits).max()
  (answer,) = ours.generate("What is shown?", max_new_tokens=2)
  assert isinstance(answer, str)


def test_a_config_that_contradicts_a_converted_base_is_refused(tmp_path):
  torch_models.save_for_embedded_data(tmp_path / "llava")
  base = tmp_path / "base"
  from_hf.convert(tmp_path / "llava", base)
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


def save_clip(folder):
  config = torch_models.tower_config("clip")
  tower = torch_models.randomise(transformers.CLIPVisionModel(config))
  tower.save_pretrained(folder)


@pytest.mark.parametrize("family", ["siglip", "dinov2"])
def test_other_towers_make_a_llava_that_answers_like_transformers(
  family, tmp_path
):
  config = torch_models.tower_config(family)
  kinds = {
    "siglip": transformers.SiglipVisionModel,
    "dinov2": transformers.Dinov2Model,
  }
  tower = torch_models.randomise(kinds[family](config))
  tower.save_pretrained(tmp_path / "tower")
  torch_models.save_smollm2(tmp_path / "llm")
  from_hf.convert(
    tmp_path / "llm", tmp_path / "base", vision=tmp_path / "tower"
  )
  assert base_lib.BaseReader(tmp_path / "base").about["initialised"]
  to_hf.convert(
    tmp_path / "base",
    tmp_path / "hf",
    format="merged",
    max_shard_bytes=10**9,
  )
  theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "hf", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  # What nothing computes with came along too.
  stored = tower.state_dict()
  for name, tensor in theirs.model.vision_tower.state_dict().items():
    assert torch.equal(tensor, stored[name]), name
  ours = pretrained.load(tmp_path / "base")
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 250, (1, 40))
  ids[:, 2 : 2 + ours.num_image_tokens] = ours.image_token_id
  side = config.image_size
  pixels = rng.normal(size=(1, side, side, 3)).astype(np.float32)
  torch_models.assert_close(
    ours.logits(ids, pixels), torch_models.logits_of(theirs, ids, pixels)
  )
  from_hf.convert(tmp_path / "hf", tmp_path / "again")
  first, again = (
    base_lib.BaseReader(tmp_path / name).about for name in ("base", "again")
  )
  for key in ("model", "sha256"):
    assert first[key] == again[key]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_whole_clip_the_tower_is_taken(family, tmp_path):
  text = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=60,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
  )
  kinds = {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
  }
  make_config, make_model = kinds[family]
  tower = torch_models.tower_config(family).to_dict()
  whole = make_model(make_config(vision_config=tower, text_config=text))
  torch_models.randomise(whole).save_pretrained(tmp_path / "whole")
  torch_models.save_smollm2(tmp_path / "llm")
  from_hf.convert(
    tmp_path / "llm", tmp_path / "base", vision=tmp_path / "whole"
  )
  reader = base_lib.BaseReader(tmp_path / "base")
  kernel = reader.read("vision/layers/fc1/kernel")[1]
  wanted = whole.vision_model.encoder.layers[1].mlp.fc1.weight
  np.testing.assert_array_equal(kernel.T, wanted.detach().numpy())


def test_a_gguf_file_is_a_decoder_like_its_folder(tmp_path):
  decoder = test_gguf_file.make_model(is_tied=True)
  decoder.save_pretrained(tmp_path / "llm")
  torch_models.write_tokenizer(tmp_path / "llm", has_image=False)
  save_clip(tmp_path / "clip")
  file = tmp_path / "llm" / "model.gguf"
  test_gguf_file.write_permuted(file, decoder, test_gguf_file.F32)
  for name, source in (("folder", tmp_path / "llm"), ("file", file)):
    from_hf.convert(source, tmp_path / name, vision=tmp_path / "clip")
  folder, of_file = (
    base_lib.BaseReader(tmp_path / name).about for name in ("folder", "file")
  )
  # Tokenizer and template stand beside the file.
  assert of_file["config"]["data"] == folder["config"]["data"]
  assert of_file["sha256"] == folder["sha256"]


def test_rows_longer_than_attention_reaches_are_refused(tmp_path):
  text = torch_models.TEXT | {"vocab_size": 1152}
  config = transformers.MistralConfig(**text, sliding_window=300)
  decoder = transformers.MistralForCausalLM(config)
  torch_models.randomise(decoder).save_pretrained(tmp_path / "mistral")
  save_clip(tmp_path / "clip")
  torch_models.copy_embedded_tokenizer(tmp_path / "mistral")
  base = tmp_path / "base"
  from_hf.convert(tmp_path / "mistral", base, vision=tmp_path / "clip")
  about = base_lib.BaseReader(base).about
  assert about["model"]["decoder"]["sliding_window"] == 300
  done = test_main.run(
    f"--workdir={tmp_path}/run",
    "--config.stages.mole.max_length=301",
    config=f"configs/mole3.py:{base}",
  )
  assert done.returncode == 2
  assert "config.stages.mole.max_length is 301 tokens" in done.stderr
  ours = pretrained.load(base)
  with pytest.raises(ValueError, match="a padded prompt with max_new_tokens"):
    ours.generate("Hello", max_new_tokens=290)


def test_a_sentencepiece_model_becomes_the_tokenizer(tmp_path):
  torch_models.save_smollm2(tmp_path / "llm")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (tmp_path / "llm" / name).unlink()
  (tmp_path / "llm" / "chat_template.jinja").unlink()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a man walks", "three walking men"] * 20),
    model_prefix=str(tmp_path / "llm" / "tokenizer"),
    model_type="bpe",
    vocab_size=290,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  save_clip(tmp_path / "clip")
  from_hf.convert(tmp_path / "llm", tmp_path / "base", vision=tmp_path / "clip")
  about = base_lib.BaseReader(tmp_path / "base").about
  assert about["config"]["data"]["template"] == "vicuna"
  processor = sentencepiece.SentencePieceProcessor(
    model_file=str(tmp_path / "llm" / "tokenizer.model")
  )
  text = tokenizer.Tokenizer(tmp_path / "base" / "tokenizer.json")
  assert text.encode("men walk") == processor.encode("men walk")
  assert text.image_id == processor.vocab_size()


def test_a_tokenizer_without_the_model_s_image_token_gets_it(
  hf_folder, tmp_path
):
  folder = tmp_path / "llava"
  shutil.copytree(hf_folder, folder)
  torch_models.write_tokenizer(folder, has_image=False)
  from_hf.convert(folder, tmp_path / "base")
  text = tokenizer.Tokenizer(tmp_path / "base" / "tokenizer.json")
  assert text.image_id == torch_models.IMAGE_TOKEN
  values = json.loads((folder / "config.json").read_text())
  values["image_token_index"] = 7
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(tensors.CheckpointError, match="<image> is 49, but .* 7"):
    from_hf.convert(folder, tmp_path / "other")
  assert not list(tmp_path.glob("other*"))
