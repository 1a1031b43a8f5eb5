"""The released LLaVA-MoLE file against the mixture of the paper's spec."""

import pathlib
import shutil

import numpy as np
import pytest
import torch
import transformers

from mole_jax.data import tokenizer
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, llava_mole, tensors, to_hf
from mole_jax.training import base as base_lib
from tests.interop import spec_mole, torch_models

NUM_EXPERTS, RANK, ALPHA = 3, 2, 7
FILE = f"llava_mole_r{RANK}_a{ALPHA}_e{NUM_EXPERTS}.pt"
LLM = "llm_model.base_model.model."
TOWER = "vit.vision_tower.vision_model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate", "up", "down")
TEXT = torch_models.TEXT | {"vocab_size": 1152}


def draw(generator, *shape):
  return 0.3 * torch.randn(shape, generator=generator)


def make_release(llama, clip):
  """The state dict of a release: base, adapters, projector, visual tokens."""
  generator = torch.Generator().manual_seed(5)
  state = {}
  for name, tensor in llama.state_dict().items():
    name = name.replace(".mlp.", ".mlp.original_module.")
    if ".self_attn." in name:
      name = name.replace(".weight", ".base_layer.weight")
    state[LLM + name] = tensor
  for name, tensor in clip.state_dict().items():
    state[TOWER + name.removeprefix("vision_model.")] = tensor
  for layer, block in enumerate(llama.model.layers):
    stem = f"{LLM}model.layers.{layer}"
    for name in ATTENTION:
      linear = getattr(block.self_attn, name)
      for x, shape in (
        ("A", (RANK, linear.in_features)),
        ("B", (linear.out_features, RANK)),
      ):
        state[f"{stem}.self_attn.{name}.lora_{x}.default.weight"] = draw(
          generator, *shape
        )
    for name in MLP:
      linear = getattr(block.mlp, f"{name}_proj")
      for expert in range(NUM_EXPERTS):
        to = f"{stem}.mlp.moe_{name}.{expert}"
        state[f"{to}.lora_A"] = draw(generator, RANK, linear.in_features)
        state[f"{to}.lora_B"] = draw(generator, linear.out_features, RANK)
    width = TEXT["hidden_size"]
    state[f"{stem}.mlp.router.weight"] = draw(generator, NUM_EXPERTS, width)
    state[f"{stem}.mlp.router.bias"] = draw(generator, NUM_EXPERTS)
  for number, width_in in ((0, torch_models.VISION["hidden_size"]), (2, width)):
    to = f"in_adaptor.projector.{number}"
    state[f"{to}.weight"] = draw(generator, width, width_in)
    state[f"{to}.bias"] = draw(generator, width)
  for side in ("start", "end"):
    state[f"in_adaptor.visual_{side}_token"] = draw(generator, 1, 1, width)
  # One table under two names, and buffers that older Transformers stored.
  state["in_adaptor.text_embed.weight"] = state[
    f"{LLM}model.embed_tokens.weight"
  ]
  state[f"{TOWER}embeddings.position_ids"] = torch.arange(10)[None]
  state[f"{LLM}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
  return state


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """A folder with Vicuna, CLIP and the release; its state dict; CLIP."""
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp("release")
  llama = torch_models.randomise(
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
  )
  llama.save_pretrained(folder / "llama")
  shutil.copyfile(
    tokenizer.EMBEDDED_TOKENIZER, folder / "llama" / "tokenizer.json"
  )
  clip = torch_models.randomise(
    transformers.CLIPVisionModel(
      transformers.CLIPVisionConfig(**torch_models.VISION)
    ),
    seed=2,
  )
  clip.save_pretrained(folder / "clip")
  state = make_release(llama, clip)
  torch.save({"state_dict": state, "step": 9}, folder / FILE)
  from_hf.convert(
    folder / FILE,
    folder / "base",
    llm=folder / "llama",
    vision=folder / "clip",
    allow_pickle=True,
  )
  return folder, state, clip


def make_spec(state):
  """The decoder of the paper's spec with the tensors of a release."""
  layers = TEXT["num_hidden_layers"]
  decoder = spec_mole.MoleDecoder(
    spec_mole.Spec(
      vocab=TEXT["vocab_size"],
      width=TEXT["hidden_size"],
      mlp_width=TEXT["intermediate_size"],
      num_layers=layers,
      num_heads=TEXT["num_attention_heads"],
      num_kv_heads=TEXT["num_key_value_heads"],
      head_dim=TEXT["head_dim"],
      num_experts=NUM_EXPERTS,
      rank=RANK,
      alpha=float(ALPHA),
      norm_eps=TEXT["rms_norm_eps"],
      rope_theta=TEXT["rope_parameters"]["rope_theta"],
    )
  )
  values = {
    "embedding": state[f"{LLM}model.embed_tokens.weight"],
    "norm.weight": state[f"{LLM}model.norm.weight"],
    "head": state[f"{LLM}lm_head.weight"],
  }
  for layer in range(layers):
    stem, to = f"{LLM}model.layers.{layer}", f"blocks.{layer}"
    norms = ("input_layernorm", "post_attention_layernorm")
    for norm, name in zip(norms, ("attention", "mlp"), strict=True):
      values[f"{to}.{name}_norm.weight"] = state[f"{stem}.{norm}.weight"]
    for name in ATTENTION:
      there, here = f"{stem}.self_attn.{name}", f"{to}.attention.{name[0]}"
      values[f"{here}.base"] = state[f"{there}.base_layer.weight"]
      for x in "ab":
        values[f"{here}.lora_{x}"] = state[
          f"{there}.lora_{x.upper()}.default.weight"
        ]
    for name in MLP:
      here = f"{to}.mlp.{name}"
      values[f"{here}.base"] = state[
        f"{stem}.mlp.original_module.{name}_proj.weight"
      ]
      for x in "ab":
        values[f"{here}.lora_{x}"] = torch.stack(
          [
            state[f"{stem}.mlp.moe_{name}.{expert}.lora_{x.upper()}"]
            for expert in range(NUM_EXPERTS)
          ]
        )
    for kind in ("weight", "bias"):
      values[f"routers.{layer}.{kind}"] = state[f"{stem}.mlp.router.{kind}"]
  decoder.load_state_dict(values)
  return decoder


def image_positions(state, clip, pixels):
  """What an image becomes: CLIP's last layer, projected, wrapped."""
  x = clip(
    torch_models.to_torch(pixels),
    output_hidden_states=True,
  ).hidden_states[-1][:, 1:]
  adaptor = "in_adaptor.projector"
  x = x @ state[f"{adaptor}.0.weight"].T + state[f"{adaptor}.0.bias"]
  x = torch.nn.functional.gelu(x)
  x = x @ state[f"{adaptor}.2.weight"].T + state[f"{adaptor}.2.bias"]
  start, end = (
    state[f"in_adaptor.visual_{side}_token"] for side in ("start", "end")
  )
  return torch.cat([start, x, end], 1)[0]


def test_a_release_computes_what_the_spec_says(parts):
  folder, state, clip = parts
  ids, pixels = torch_models.make_batch(num_image_tokens=9 + 2)
  decoder = make_spec(state)
  with torch.no_grad():
    more = image_positions(state, clip, pixels)
    # Positions of an image are looked up like words, behind the vocabulary.
    decoder.embedding = torch.nn.Parameter(torch.cat([decoder.embedding, more]))
    looked_up = ids.copy()
    looked_up[ids == 3] = TEXT["vocab_size"] + np.arange(len(more))
    output = decoder(
      torch.from_numpy(looked_up), torch.ones(ids.shape, dtype=torch.bool)
    )
  chosen = output.chosen.numpy()
  assert set(np.unique(chosen)) == set(range(NUM_EXPERTS))
  ours = pretrained.load(folder / "base")
  torch_models.assert_close(ours.logits(ids, pixels), output.logits.numpy())


def read_hashes(base):
  entries = base_lib.BaseReader(base).parameters
  return {path: entry["sha256"] for path, entry in entries.items()}


def test_a_release_goes_out_as_mole_and_comes_in_bit_for_bit(parts, tmp_path):
  folder, _, _ = parts
  to_hf.convert(
    folder / "base", tmp_path / "mole", format="mole", max_shard_bytes=10**9
  )
  from_hf.convert(tmp_path / "mole", tmp_path / "again")
  assert read_hashes(tmp_path / "again") == read_hashes(folder / "base")
  one, other = (
    base_lib.BaseReader(base).about["config"]
    for base in (folder / "base", tmp_path / "again")
  )
  for section in ("model", "balance", "data"):
    assert one[section] == other[section]
  batch = torch_models.make_batch(num_image_tokens=9 + 2)
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "mole", trust_remote_code=True
  )
  torch_models.assert_close(
    pretrained.load(folder / "base").logits(*batch),
    torch_models.logits_of(theirs, *batch),
  )


class Memory:
  """Tensors as a `sources.Store` has them."""

  def __init__(self, state):
    self._arrays = {name: t.detach().numpy() for name, t in state.items()}
    self.infos = {
      name: tensors.TensorInfo(array.shape, array.dtype, "memory")
      for name, array in self._arrays.items()
    }

  def read(self, name):
    return self._arrays[name]


def read(state, name=FILE):
  return llava_mole.read_release(pathlib.Path(name), Memory(state))


def test_settings_come_from_the_tensors_and_the_name(parts):
  _, state, _ = parts
  source = read(state)
  assert source.model["mole"] == {
    "num_experts": NUM_EXPERTS,
    "top_k": 1,
    "rank": RANK,
    "alpha": ALPHA,
    "dropout": 0.05,
    "gate": "none",
    "router_scope": "layer",
  }
  assert source.model["lora"] == {"rank": RANK, "alpha": ALPHA, "dropout": 0.05}
  assert source.model["feature_layer"] == -1
  assert source.model["use_visual_tokens"]
  assert f"alpha {ALPHA} is from the file's name." in source.notes
  # A name that says nothing, or is of another rank.
  for name in ("model.pt", "llava_mole_r32_a64_e3.pt"):
    source = read(state, name)
    assert source.model["mole"]["alpha"] == 2 * RANK
    assert source.model["lora"]["alpha"] == 2 * RANK
    told = "alpha is taken to be 4, twice the rank"
    assert any(told in note and "_r2_a4_" in note for note in source.notes)


def test_a_release_of_adapters_alone_takes_the_rest_from_its_parts(
  parts, tmp_path
):
  folder, state, _ = parts
  # Its own program loads it with strict=False over Vicuna and CLIP.
  adapters = {
    name: tensor
    for name, tensor in state.items()
    if "lora_" in name or "router" in name or "in_adaptor" in name
  }
  torch.save({"state_dict": adapters}, tmp_path / FILE)
  from_hf.convert(
    tmp_path / FILE,
    tmp_path / "base",
    llm=folder / "llama",
    vision=folder / "clip",
    allow_pickle=True,
  )
  assert read_hashes(tmp_path / "base") == read_hashes(folder / "base")


def refusal(state):
  with pytest.raises(tensors.CheckpointError) as error:
    read(state)
  return str(error.value)


def without(state, fragment):
  return {
    name: tensor for name, tensor in state.items() if fragment not in name
  }


def test_what_is_no_release_is_refused(parts, tmp_path):
  folder, state, _ = parts
  message = refusal(without(state, "layers.1.mlp.moe_up.2."))
  assert "experts are missing" in message
  for x in "ab":
    assert f"layers.1.mlp.up_proj.lora_{x} of expert 2" in message
  assert "layers.0" not in message and "expert 1" not in message
  message = refusal(state | {"in_adaptor.resampler.weight": torch.ones(1)})
  assert "unknown tensors:\n  in_adaptor.resampler.weight" in message
  message = refusal(without(state, "moe_"))
  assert "it holds no mlp.moe_gate.N.lora_A" in message
  with pytest.raises(tensors.CheckpointError, match="--allow-pickle"):
    from_hf.convert(
      folder / FILE, tmp_path / "out", llm=folder / "llama", vision=folder
    )
  with pytest.raises(tensors.CheckpointError, match="give its folder with --l"):
    from_hf.convert(folder / FILE, tmp_path / "out", allow_pickle=True)
  assert not (tmp_path / "out").exists()
