"""MoE-LLaVA's published layout in, written here tensor by tensor.

Names and keys are those of PKU-YuanGroup/MoE-LLaVA (commit 6cb5f66) and of
the config.json of LanguageBind/MoE-LLaVA-OpenChat-7B-4e.
"""

import numpy as np
import pytest
import transformers

from mole_jax import convert
from mole_jax.interop import from_hf, tensors
from mole_jax.training import base as base_lib
from tests.interop import folders, torch_models

WIDTH, HIDDEN, VOCAB, LAYERS, HEADS, KV_HEADS, TOWER = 32, 40, 50, 3, 4, 2, 16
HEAD = WIDTH // HEADS
MOE = {
  "capacity_factor": 1.5,
  "ep_size": 1,
  "eval_capacity_factor": 2.0,
  "min_capacity": 0,
  "moe_enable": True,
  "moe_layers_idx": [0, 2],
  "moe_mode": "sparse",
  "num_experts": [4, 4],
  "router_aux_loss_coef": 0.02,
  "top_k_experts": 2,
  "train_modules": ["up_proj", "down_proj", "gate_proj", "wg"],
  "use_residual": False,
}
COMMON = {
  "hidden_size": WIDTH,
  "image_aspect_ratio": "pad",
  "image_projector_type": "mlp2x_gelu",
  "max_position_embeddings": 64,
  "mm_hidden_size": TOWER,
  "mm_image_tower": "openai/clip-vit-large-patch14-336",
  "mm_use_im_start_end": False,
  "mm_video_tower": None,
  "mm_vision_select_feature": "patch",
  "mm_vision_select_layer": -2,
  "num_attention_heads": HEADS,
  "num_hidden_layers": LAYERS,
  "tie_word_embeddings": False,
  "vocab_size": VOCAB,
}
SWIGLU = {
  "gate_proj": (HIDDEN, WIDTH),
  "up_proj": (HIDDEN, WIDTH),
  "down_proj": (WIDTH, HIDDEN),
}
# By decoder: settings, tensors of an FFN, and its tensors outside of FFNs.
SETTINGS = {
  "mistral": {
    "hidden_act": "silu",
    "intermediate_size": HIDDEN,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
  },
  "stablelm": {
    "hidden_act": "silu",
    "intermediate_size": HIDDEN,
    "norm_eps": 1e-5,
    "num_key_value_heads": KV_HEADS,
    "rope_pct": 0.25,
    "rope_theta": 10000,
    "use_qkv_bias": True,
  },
  "phi": {
    "hidden_act": "gelu_new",
    "intermediate_size": HIDDEN,
    "layer_norm_eps": 1e-5,
    "num_key_value_heads": KV_HEADS,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
  },
  "qwen": {
    "intermediate_size": 2 * HIDDEN,
    "kv_channels": HEAD,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
  },
}
FFNS = {
  "mistral": {f"{x}.weight": shape for x, shape in SWIGLU.items()},
  "stablelm": {f"{x}.weight": shape for x, shape in SWIGLU.items()},
  "phi": {
    "fc1.weight": (HIDDEN, WIDTH),
    "fc1.bias": (HIDDEN,),
    "fc2.weight": (WIDTH, HIDDEN),
    "fc2.bias": (WIDTH,),
  },
  "qwen": {
    "w1.weight": (HIDDEN, WIDTH),
    "w2.weight": (HIDDEN, WIDTH),
    "c_proj.weight": (WIDTH, HIDDEN),
  },
}
# An FFN's tensor -> our parameter; Qwen's w1 is up and w2 is gate.
OURS = {
  "gate_proj.weight": "gate_proj/kernel",
  "up_proj.weight": "up_proj/kernel",
  "down_proj.weight": "down_proj/kernel",
  "fc1.weight": "fc1/kernel",
  "fc1.bias": "fc1/bias",
  "fc2.weight": "fc2/kernel",
  "fc2.bias": "fc2/bias",
  "w1.weight": "up_proj/kernel",
  "w2.weight": "gate_proj/kernel",
  "c_proj.weight": "down_proj/kernel",
}


def of_layer(kind):
  """Tensors of a layer outside of its FFN."""
  sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
  shapes = {f"self_attn.{x}_proj.weight": (n, WIDTH) for x, n in sizes.items()}
  biases = {f"self_attn.{x}_proj.bias": (n,) for x, n in sizes.items()}
  both = ("input_layernorm", "post_attention_layernorm")
  scales = {f"{x}.weight": (WIDTH,) for x in both}
  shifts = {f"{x}.bias": (WIDTH,) for x in both}
  out = {"self_attn.o_proj.weight": (WIDTH, WIDTH)}
  if kind == "mistral":
    return shapes | out | scales
  if kind == "stablelm":
    return shapes | biases | out | scales | shifts
  if kind == "phi":
    norm = {f"input_layernorm.{x}": (WIDTH,) for x in ("weight", "bias")}
    out = {
      "self_attn.dense.weight": (WIDTH, WIDTH),
      "self_attn.dense.bias": (WIDTH,),
    }
    return shapes | biases | out | norm
  return {
    "ln_1.weight": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "attn.c_attn.weight": (3 * WIDTH, WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
  }


def outside(kind):
  """Tensors outside of the layers, the projector among them."""
  body = "transformer" if kind == "qwen" else "model"
  table = {"qwen": "transformer.wte"}.get(kind, "model.embed_tokens")
  norm = {"qwen": "transformer.ln_f", "phi": "model.final_layernorm"}
  norm = norm.get(kind, "model.norm")
  shapes = {
    f"{table}.weight": (VOCAB, WIDTH),
    f"{norm}.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
    f"{body}.mm_projector.image_spatial_proj.0.weight": (WIDTH, TOWER),
    f"{body}.mm_projector.image_spatial_proj.0.bias": (WIDTH,),
    f"{body}.mm_projector.image_spatial_proj.2.weight": (WIDTH, WIDTH),
    f"{body}.mm_projector.image_spatial_proj.2.bias": (WIDTH,),
  }
  if kind in ("stablelm", "phi"):
    shapes[f"{norm}.bias"] = (WIDTH,)
  if kind == "phi":
    shapes["lm_head.bias"] = (VOCAB,)
  return shapes


def write(kind, folder, clip, **moe):
  """A random checkpoint; returns its tensors by name."""
  layers = "transformer.h" if kind == "qwen" else "model.layers"
  rng = np.random.default_rng(0)
  shapes = outside(kind)
  for i in range(LAYERS):
    own = of_layer(kind)
    if i in MOE["moe_layers_idx"]:
      own["mlp.deepspeed_moe.gate.wg.weight"] = (4, WIDTH)
      for e in range(4):
        stem = f"mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
        own |= {f"{stem}.{x}": shape for x, shape in FFNS[kind].items()}
    else:
      own |= {f"mlp.{x}": shape for x, shape in FFNS[kind].items()}
    shapes |= {f"{layers}.{i}.{x}": shape for x, shape in own.items()}
  arrays = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  # The tower goes along, by the names of Transformers 4.
  body = layers.split(".")[0]
  for name, array in folders.read_all(clip).items():
    arrays[f"{body}.image_tower.image_tower.vision_model.{name}"] = array
  values = COMMON | SETTINGS[kind] | {"model_type": f"moe_llava_{kind}"}
  folders.save(folder, arrays, values | {"moe": MOE | moe})
  torch_models.write_tokenizer(folder)
  return arrays


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tower") / "clip"
  model = transformers.CLIPVisionModel(torch_models.tower_config("clip"))
  torch_models.randomise(model).save_pretrained(folder)
  return folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_experts_and_routers_come_in_where_they_belong(kind, clip, tmp_path):
  arrays = write(kind, tmp_path / "hf", clip)
  from_hf.convert(tmp_path / "hf", tmp_path / "base", vision=clip)
  reader = base_lib.BaseReader(tmp_path / "base")
  layers = "transformer.h" if kind == "qwen" else "model.layers"
  stem = "mlp.deepspeed_moe"
  ours = "decoder/layers"
  wanted = {
    f"{ours}/moe_x4/router/kernel": np.stack(
      [arrays[f"{layers}.{i}.{stem}.gate.wg.weight"].T for i in (0, 2)]
    )
  }
  for theirs in FFNS[kind]:
    plain = arrays[f"{layers}.1.mlp.{theirs}"].T[None]
    experts = [
      [
        arrays[f"{layers}.{i}.{stem}.experts.deepspeed_experts.{e}.{theirs}"].T
        for e in range(4)
      ]
      for i in (0, 2)
    ]
    wanted[f"{ours}/mlp/{OURS[theirs]}"] = plain
    wanted[f"{ours}/moe_x4/experts/{OURS[theirs]}"] = np.array(experts)
  found = [path for path in reader.parameters if "/m" in path]
  assert set(wanted) == {path for path in found if path.startswith(ours)}
  for path, array in wanted.items():
    np.testing.assert_array_equal(reader.read(path), array, err_msg=path)
  body = layers.split(".")[0]
  for i, linear in ((0, "linear_1"), (2, "linear_2")):
    theirs = arrays[f"{body}.mm_projector.image_spatial_proj.{i}.weight"]
    kernel = reader.read(f"projector/{linear}/kernel")
    np.testing.assert_array_equal(kernel, theirs.T)
  assert not reader.about["initialised"]
  model, config = (reader.about[key] for key in ("model", "config"))
  assert model["moe"] == {
    "layers": "sparse",
    "num_experts": 4,
    "top_k": 2,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
  }
  assert model["vision"]["feature_layer"] == -2
  assert config["balance"] == {"loss": "moe_llava", "weight": 0.02}
  assert config["stages"]["base"]["use_experts"]


def test_inspect_tells_of_experts_and_layers(clip, tmp_path, capsys):
  write("mistral", tmp_path / "hf", clip, min_capacity=4)
  assert convert.main(["inspect", str(tmp_path / "hf")]) == 0
  told = " ".join(capsys.readouterr().out.replace("│", " ").split())
  for text in (
    "MoE-LLaVA (mistral)",
    "layers with 4 FFNs 0, 2 of 3 layers, 2 a token",
    "experts and their routers",
    "openai/clip-vit-large-patch14-336",
    "here it is the second likeliest",
    "min_capacity=4",
  ):
    assert text in told, text


@pytest.mark.parametrize(
  ("settings", "moe", "message"),
  [
    ({}, {"use_residual": True}, "use_residual is true: each layer"),
    ({}, {"top_k_experts": -1}, "top_k=-1 must lie between"),
    ({}, {"num_experts": [4, 4, 4]}, "do not tell the experts of 3 layers"),
    ({}, {"num_experts": [3]}, r"experts.gate_proj.weight is \[4, 40, 32\]"),
    ({"model_type": "moe_llava_minicpm"}, {}, "'moe_llava_minicpm'; of MoE"),
    ({"mm_video_tower": "LanguageBind_Video"}, {}, "mm_video_tower is 'Lang"),
    ({"image_projector_type": "qformer2_64"}, {}, "projector_type is 'qform"),
  ],
)
def test_what_cannot_be_followed_is_refused(
  settings, moe, message, clip, tmp_path
):
  arrays = write("mistral", tmp_path / "hf", clip)
  values = COMMON | SETTINGS["mistral"] | {"model_type": "moe_llava_mistral"}
  values |= {"moe": MOE | moe} | settings
  folders.save(tmp_path / "other", arrays, values)
  with pytest.raises(tensors.CheckpointError, match=message):
    from_hf.convert(tmp_path / "other", tmp_path / "base", vision=clip)


def test_missing_experts_are_listed(clip, tmp_path):
  arrays = write("mistral", tmp_path / "hf", clip)
  stem = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts"
  del arrays[f"{stem}.1.up_proj.weight"]
  values = COMMON | SETTINGS["mistral"] | {"model_type": "moe_llava_mistral"}
  folders.save(tmp_path / "other", arrays, values | {"moe": MOE})
  with pytest.raises(
    tensors.CheckpointError,
    match=r"layers\.2\.mlp\.experts\.up_proj\.weight of expert 1",
  ):
    from_hf.convert(tmp_path / "other", tmp_path / "base", vision=clip)


def test_their_stages_without_experts_come_in_too(clip, tmp_path):
  arrays = write("mistral", tmp_path / "hf", clip)
  arrays = {n: a for n, a in arrays.items() if "deepspeed" not in n}
  for i in (0, 2):
    for name, shape in FFNS["mistral"].items():
      arrays[f"model.layers.{i}.mlp.{name}"] = np.ones(shape, np.float32)
  values = COMMON | SETTINGS["mistral"] | {"model_type": "llava_mistral"}
  folders.save(tmp_path / "stage2", arrays, values)
  from_hf.convert(tmp_path / "stage2", tmp_path / "base", vision=clip)
  about = base_lib.BaseReader(tmp_path / "base").about
  assert "moe" not in about["model"]
  assert "decoder/layers/mlp/gate_proj/kernel" in about["parameters"]
