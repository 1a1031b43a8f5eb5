"""Adapters that PEFT and the original LLaVA wrote, in and out again."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers

from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, tensors, to_hf, verify
from mole_jax.interop import peft as interop_peft
from mole_jax.training import base as base_lib
from tests.interop import in_process, torch_models

# Of PEFT 0.21 under Transformers 5.24.
pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ATTENTION = "q_proj|k_proj|v_proj|o_proj"
MLP = "gate_proj|up_proj|down_proj"
ADAPTERS = {
  "everything, projector too": dict(
    r=3,
    lora_alpha=5,
    target_modules=rf".*language_model.*\.({ATTENTION}|{MLP})",
    modules_to_save=["multi_modal_projector"],
  ),
  "q and v, scaled by the root of the rank": dict(
    r=3,
    lora_alpha=2,
    use_rslora=True,
    target_modules=r".*language_model.*\.(q_proj|v_proj)",
  ),
  "MLP of another rank and factor": dict(
    r=2,
    lora_alpha=3,
    target_modules=rf".*language_model.*\.({ATTENTION}|{MLP})",
    rank_pattern={MLP: 4},
    alpha_pattern={rf".*mlp\.({MLP})": 7},
  ),
}


def read_parameters(base):
  """Hash by parameter."""
  entries = base_lib.BaseReader(base).parameters
  return {path: entry["sha256"] for path, entry in entries.items()}


def load_llava(folder):
  return transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def adapt(model, folder, **settings):
  """Saves a random adapter of a model; returns the model with it."""
  config = peft.LoraConfig(**settings)
  adapted = peft.get_peft_model(model, config).eval()
  generator = torch.Generator().manual_seed(1)
  for name, parameter in adapted.named_parameters():
    if "lora_" in name or "modules_to_save" in name:
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.data.copy_(0.3 * noise)
  adapted.save_pretrained(folder)
  return adapted


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
  """A LLaVA, and its parts as folders of their own."""
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp("stock")
  torch_models.save_for_embedded_data(folder / "llava")
  model = load_llava(folder / "llava")
  config = model.config.text_config
  decoder = transformers.LlamaForCausalLM(config).eval()
  decoder.model = model.model.language_model
  decoder.lm_head = model.lm_head
  decoder.save_pretrained(folder / "llama")
  shutil.copy(folder / "llava" / "tokenizer.json", folder / "llama")
  tower = transformers.CLIPVisionModel(model.config.vision_config)
  tower.load_state_dict(model.model.vision_tower.state_dict())
  tower.save_pretrained(folder / "clip")
  return folder


@pytest.fixture(scope="module")
def adapter(stock, tmp_path_factory):
  """A plain adapter to be spoilt: its folder."""
  folder = tmp_path_factory.mktemp("adapter") / "adapter"
  adapt(
    load_llava(stock / "llava"),
    folder,
    r=2,
    target_modules=r".*language_model.*\.(q_proj|v_proj)",
  )
  return folder


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_computes_what_it_does_in_peft(case, stock, tmp_path):
  adapted = adapt(
    load_llava(stock / "llava"), tmp_path / "adapter", **ADAPTERS[case]
  )
  from_hf.convert(tmp_path / "adapter", tmp_path / "base", llm=stock / "llava")
  ids, pixels = torch_models.make_batch()
  theirs = torch_models.logits_of(adapted, ids, pixels)
  ours = pretrained.load(tmp_path / "base")
  torch_models.assert_close(ours.logits(ids, pixels), theirs)
  with adapted.disable_adapter():  # The adapter is no trifle.
    plain = torch_models.logits_of(adapted, ids, pixels)
  assert np.abs(plain - theirs).max() > 0.1 * np.abs(theirs).max()


def test_an_adapter_of_a_decoder_alone_needs_a_tower(stock, tmp_path):
  decoder = transformers.LlamaForCausalLM.from_pretrained(stock / "llama")
  adapted = adapt(
    decoder, tmp_path / "adapter", r=2, target_modules=["k_proj", "down_proj"]
  )
  with pytest.raises(tensors.CheckpointError, match="give its folder with --v"):
    from_hf.convert(
      tmp_path / "adapter", tmp_path / "base", llm=stock / "llama"
    )
  from_hf.convert(
    tmp_path / "adapter",
    tmp_path / "base",
    llm=stock / "llama",
    vision=stock / "clip",
  )
  ids, _ = torch_models.make_batch()
  with torch.no_grad():
    theirs = adapted(input_ids=torch.from_numpy(ids[:1])).logits.numpy()
  ours = pretrained.load(tmp_path / "base")
  torch_models.assert_close(ours.logits(ids[:1]), theirs)


def test_an_adapter_goes_out_and_comes_in_bit_for_bit(
  stock, tmp_path, recwarn, monkeypatch
):
  adapted = adapt(
    load_llava(stock / "llava"),
    tmp_path / "adapter",
    **ADAPTERS["MLP of another rank and factor"],
    modules_to_save=["multi_modal_projector"],
  )
  for source, base in (("adapter", "base"), ("out", "again")):
    from_hf.convert(tmp_path / source, tmp_path / base, llm=stock / "llava")
    if base == "base":
      to_hf.convert(
        tmp_path / "base",
        tmp_path / "out",
        format="experts",
        max_shard_bytes=10**9,
      )
  assert read_parameters(tmp_path / "base") == read_parameters(
    tmp_path / "again"
  )
  recwarn.clear()
  theirs = peft.PeftModel.from_pretrained(
    load_llava(stock / "llava"), tmp_path / "out"
  ).eval()
  said = [
    str(w.message) for w in recwarn if "is_gradient" not in str(w.message)
  ]
  assert not said
  stored = tensors.Folder(tmp_path / "out", "adapter_model.safetensors")
  assert set(peft.get_peft_model_state_dict(theirs)) == set(stored.infos)
  batch = torch_models.make_batch()
  torch_models.assert_close(
    torch_models.logits_of(theirs, *batch),
    torch_models.logits_of(adapted, *batch),
    1e-6,
  )
  in_process.patch(monkeypatch)
  found = verify.verify(tmp_path / "base", tmp_path / "out", stock / "llava")
  assert found.is_equal and found.format == "adapter"


def change(adapter, folder, **settings):
  """A copy of an adapter with other settings."""
  shutil.copytree(adapter, folder)
  file = folder / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))
  return folder


def refusal(out, src, **options):
  with pytest.raises(tensors.CheckpointError) as error:
    from_hf.convert(src, out, **options)
  assert not out.exists()
  return str(error.value)


@pytest.mark.parametrize(
  "settings",
  [
    dict(use_dora=True),
    dict(bias="all"),
    dict(peft_type="LOHA"),
    dict(init_lora_weights="pissa"),
    dict(layers_to_transform=[1]),
    dict(of_a_later_peft={"x": 1}),
  ],
  ids=lambda settings: next(iter(settings)),
)
def test_what_is_more_than_plain_lora_is_refused(
  settings, adapter, stock, tmp_path
):
  src = change(adapter, tmp_path / "adapter", **settings)
  message = refusal(tmp_path / "base", src, llm=stock / "llava")
  ((key, value),) = settings.items()
  assert f"{key} is {value!r}; wanted" in message
  assert "Merge the adapter into its base with PEFT" in message


def test_modules_of_a_group_that_differ_are_refused(adapter, stock, tmp_path):
  src = change(adapter, tmp_path / "adapter", alpha_pattern={"v_proj": 3})
  message = refusal(tmp_path / "base", src, llm=stock / "llava")
  for told in ("q_proj: r=2, alpha=8", "v_proj: r=2, alpha=3", "Merge the ad"):
    assert told in message


def test_an_adapter_on_the_tower_or_the_words_is_refused(stock, tmp_path):
  name = "base_model.model.model.language_model.embed_tokens.lora_embedding_A"
  assert interop_peft.canonical(name) is None
  adapt(
    load_llava(stock / "llava"),
    tmp_path / "adapter",
    target_modules=["q_proj"],
  )
  message = refusal(
    tmp_path / "base", tmp_path / "adapter", llm=stock / "llava"
  )
  assert "vision_tower" in message and "language_model" not in message
  assert "Merge the adapter into its base with PEFT" in message


def test_an_adapter_without_its_base_is_refused(adapter, tmp_path):
  message = refusal(tmp_path / "base", adapter)
  assert "has no decoder; give its folder with --llm" in message


def test_an_incomplete_adapter_is_refused(adapter, stock, tmp_path):
  src = change(adapter, tmp_path / "adapter")
  held = tensors.Folder(src, "adapter_model.safetensors")
  kept = {
    name: torch.from_numpy(held.read(name))
    for name in held.infos
    if "layers.1.self_attn.v_proj.lora_B" not in name
  }
  (src / "adapter_model.safetensors").unlink()
  message = refusal(tmp_path / "base", src, llm=stock / "llava")
  assert "neither adapter_model.safetensors nor adapter_model.bin" in message
  torch.save(kept, src / "adapter_model.bin")
  message = refusal(
    tmp_path / "base", src, llm=stock / "llava", allow_pickle=True
  )
  assert "missing language_model.model.layers.1.self_attn.v_proj.lora_b" in (
    message
  )


def test_a_pickled_adapter_is_read_when_allowed(adapter, stock, tmp_path):
  src = change(adapter, tmp_path / "adapter")
  held = tensors.Folder(src, "adapter_model.safetensors")
  # Of that time: the names of Transformers 4.
  old, new = "language_model.model.", "model.language_model."
  torch.save(
    {
      name.replace(new, old): torch.from_numpy(held.read(name))
      for name in held.infos
    },
    src / "adapter_model.bin",
  )
  (src / "adapter_model.safetensors").unlink()
  message = refusal(tmp_path / "base", src, llm=stock / "llava")
  assert "adapter_model.bin" in message and "--allow-pickle" in message
  from_hf.convert(
    src, tmp_path / "pickled", llm=stock / "llava", allow_pickle=True
  )
  from_hf.convert(adapter, tmp_path / "safe", llm=stock / "llava")
  assert read_parameters(tmp_path / "pickled") == read_parameters(
    tmp_path / "safe"
  )


def make_original(folder, stock):
  """A LoRA run of haotian-liu/LLaVA; returns the model that it stands for."""
  model = load_llava(stock / "llava")
  text = transformers.LlamaForCausalLM.from_pretrained(stock / "llama")
  adapted = adapt(
    text,
    folder,
    r=4,
    lora_alpha=6,
    target_modules=[*ATTENTION.split("|"), *MLP.split("|")],
  )
  held = tensors.Folder(folder, "adapter_model.safetensors")
  torch.save(
    {name: torch.from_numpy(held.read(name)) for name in held.infos},
    folder / "adapter_model.bin",
  )
  (folder / "adapter_model.safetensors").unlink()
  projector = model.model.multi_modal_projector
  torch_models.randomise(projector, seed=7)
  torch.save(
    {
      f"base_model.model.model.mm_projector.{number}.{kind}": tensor.data
      for number, linear in ((0, projector.linear_1), (2, projector.linear_2))
      for kind, tensor in linear.named_parameters()
    },
    folder / "non_lora_trainables.bin",
  )
  values = json.loads((stock / "llama" / "config.json").read_text())
  values |= {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_hidden_size": torch_models.VISION["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
  }
  (folder / "config.json").write_text(json.dumps(values))
  merged = adapted.merge_and_unload()
  model.model.language_model.load_state_dict(merged.model.state_dict())
  model.lm_head.load_state_dict(merged.lm_head.state_dict())
  return model


def test_a_lora_run_of_the_original_brings_its_projector(stock, tmp_path):
  model = make_original(tmp_path / "lora", stock)
  parts = dict(llm=stock / "llama", vision=stock / "clip", allow_pickle=True)
  from_hf.convert(tmp_path / "lora", tmp_path / "base", **parts)
  about = base_lib.BaseReader(tmp_path / "base").about
  assert about["source"].startswith("original LLaVA LoRA for ")
  assert about["model"]["vision"]["feature_layer"] == -2
  assert not about["initialised"]
  batch = torch_models.make_batch()
  torch_models.assert_close(
    pretrained.load(tmp_path / "base").logits(*batch),
    torch_models.logits_of(model, *batch),
  )
  (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
  message = refusal(tmp_path / "other", tmp_path / "lora", **parts)
  assert "without its non_lora_trainables.bin, which holds the trained" in (
    message
  )
