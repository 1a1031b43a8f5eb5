"""Decoders other than Llama: Transformers is the oracle, in and out again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mole_jax.inference import generator
from mole_jax.interop import from_hf, hf_decoder, names, sources, tensors, to_hf
from mole_jax.interop import verify as verify_lib
from mole_jax.models import decoder as decoder_lib
from mole_jax.models import llava
from mole_jax.training import base as base_lib
from mole_jax.training import state
from tests.interop import folders, greedy, in_process, random_run, torch_models

pytestmark = pytest.mark.filterwarnings(
  # Of PEFT 0.21 under Transformers 5.24.
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
KINDS = tuple(torch_models.DECODERS)
VOCAB = 1152  # Of the embedded tokenizer.


def read(base):
  """Configuration and flat parameters of a converted base."""
  reader = base_lib.BaseReader(base)
  config = llava.make_config(sources.full_model_section(reader.about["model"]))
  return config, reader.read_onto(dict.fromkeys(reader.parameters))


def assert_same_base(one, other):
  one, other = (base_lib.BaseReader(path).about for path in (one, other))
  for part in ("vision", "decoder", "image_token_id"):
    assert one["model"][part] == other["model"][part]
  assert one["sha256"] == other["sha256"]


def export(ckpt, out, format, **options):
  to_hf.convert(ckpt, out, format=format, max_shard_bytes=10**5, **options)
  return out


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp("tower") / "clip"
  config = torch_models.tower_config("clip")
  torch_models.randomise(transformers.CLIPVisionModel(config)).save_pretrained(
    folder
  )
  return folder


@pytest.fixture(scope="module", params=KINDS)
def case(request, clip, tmp_path_factory):
  """A kind, its decoder in Transformers, and a folder: llm, base."""
  kind, folder = request.param, tmp_path_factory.mktemp(request.param)
  config = torch_models.text_config(kind, vocab_size=VOCAB)
  config._attn_implementation = "eager"
  model = torch_models.randomise(torch_models.DECODERS[kind][1](config))
  model.save_pretrained(folder / "llm")
  torch_models.copy_embedded_tokenizer(folder / "llm")
  from_hf.convert(folder / "llm", folder / "base", vision=clip)
  return kind, model, folder


def test_layers_logits_and_gradients_are_those_of_transformers(case):
  kind, model, folder = case
  config, flat = read(folder / "base")
  assert config.decoder.norm == ("rms" if kind in KINDS[:2] else "layer")
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 900, (2, 14)).astype(np.int32)
  mask = np.ones_like(ids)
  mask[1, 11:] = 0
  is_token = mask.astype(bool)
  model.zero_grad()
  theirs = model(
    input_ids=torch.from_numpy(ids).long(),
    attention_mask=torch.from_numpy(mask).long(),
    output_hidden_states=True,
  )
  weight = rng.normal(size=theirs.logits.shape) * mask[..., None]
  weight = weight.astype(np.float32)
  (theirs.logits * torch.from_numpy(weight)).sum().backward()
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  batch = [jnp.asarray(ids), None, jnp.asarray(positions), jnp.asarray(mask)]
  module = llava.Llava(config)

  def objective(flat):
    params = {"params": state.unflatten(flat)}
    output = module.apply(params, *batch, 1, keep_inputs=True)
    logits = module.apply(params, output.hidden, method="unembed")
    return jnp.sum(logits * weight), (output, logits)

  function = jax.jit(jax.grad(objective, has_aux=True))
  grads, (output, logits) = function(flat)
  ours = [*output.layer_inputs, output.hidden]
  assert len(ours) == len(theirs.hidden_states) == 3
  for mine, other in zip(ours, theirs.hidden_states, strict=True):
    other = other.detach().numpy()[is_token]
    torch_models.assert_close(np.asarray(mine)[is_token], other, 1e-5)
  torch_models.assert_close(
    np.asarray(logits)[is_token], theirs.logits.detach().numpy()[is_token]
  )
  stored, compared = dict(model.named_parameters()), 0
  about = base_lib.BaseReader(folder / "base").about
  for row in sources.rows_of(about["model"]):
    if not row.path.startswith("decoder/"):
      continue
    for layer, name in enumerate(names.layer_names(row, 2)):
      grad = np.asarray(grads[row.path])
      grad = grad[layer] if "{}" in row.tensor else grad
      wanted = stored[name.removeprefix("language_model.")].grad.numpy()
      torch_models.assert_close(names.to_theirs(row.kind, grad, 4), wanted)
      compared += 1
  assert compared == len(stored)


def test_greedy_text_is_that_of_transformers(case):
  _, model, folder = case
  config, flat = read(folder / "base")
  rng = np.random.default_rng(1)
  no_images = np.zeros((0, 12, 12, 3), np.uint8)
  prompts = [
    generator.Prompt(rng.integers(4, 900, count).astype(np.int32), no_images)
    for count in (7, 12)
  ]
  greedy.assert_same_text(model, config, flat, prompts, max_new_tokens=8)


def test_it_goes_out_and_comes_in_again_bit_for_bit(
  case, tmp_path, monkeypatch
):
  kind, _, folder = case
  base = folder / "base"
  format = "mole" if kind == "phi" else "merged"
  if kind == "phi":  # The head of a decoder alone has a bias.
    with pytest.raises(tensors.CheckpointError, match="head has no bias"):
      export(base, tmp_path / "x", "merged")
    with pytest.raises(tensors.CheckpointError, match="no adapters"):
      export(base, tmp_path / "x", "mole", without_base=True)
  export(base, tmp_path / "hf", format)
  values = json.loads((tmp_path / "hf" / "config.json").read_text())
  wanted = "llama" if kind == "mistral" else kind
  assert values["text_config"]["model_type"] in (kind, wanted)
  from_hf.convert(tmp_path / "hf", tmp_path / "again")
  assert_same_base(base, tmp_path / "again")
  in_process.patch(monkeypatch)
  report = verify_lib.verify(base, tmp_path / "hf")
  assert report.is_equal, report.checks


def test_a_head_s_bias_grows_with_the_vocabulary(clip, tmp_path):
  config = torch_models.text_config("phi", vocab_size=49)
  model = torch_models.randomise(transformers.PhiForCausalLM(config))
  model.save_pretrained(tmp_path / "llm")
  torch_models.write_tokenizer(tmp_path / "llm", has_image=False)
  from_hf.convert(tmp_path / "llm", tmp_path / "base", vision=clip)
  bias = base_lib.BaseReader(tmp_path / "base").read("decoder/lm_head_bias")
  wanted = model.lm_head.bias.detach().numpy()
  assert bias.shape == (from_hf.VOCAB_MULTIPLE,)
  np.testing.assert_array_equal(bias[:49], wanted)
  np.testing.assert_allclose(bias[49:], wanted.mean(), rtol=1e-6)


@pytest.mark.parametrize("case", ["stablelm", "phi"], indirect=True)
def test_a_mixture_on_it_goes_out_with_its_modeling_file(
  case, tmp_path, monkeypatch
):
  kind, _, folder = case
  changes = dict(num_experts=3, top_k=2, gate="prob")
  random_run.write_on(folder / "base", tmp_path / "run", **changes)
  export(tmp_path / "run", tmp_path / "hf", "mole")
  in_process.patch(monkeypatch)
  report = verify_lib.verify(tmp_path / "run", tmp_path / "hf")
  assert report.is_equal, report.checks
  if kind == "phi":
    refuses = pytest.raises(tensors.CheckpointError, match="head .* has a bias")
    with refuses:
      export(tmp_path / "run", tmp_path / "x", "experts")


@pytest.fixture(scope="module")
def phi_llava(tmp_path_factory):
  """A stock LLaVA with a Phi: its head has no bias; folders llava, base."""
  folder = tmp_path_factory.mktemp("phi-llava")
  config = transformers.LlavaConfig(
    vision_config=torch_models.tower_config("siglip"),
    text_config=torch_models.text_config("phi", vocab_size=VOCAB),
    image_token_index=3,
    image_seq_length=9,
    vision_feature_select_strategy="full",
  )
  model = transformers.LlavaForConditionalGeneration(config)
  torch_models.randomise(model).save_pretrained(folder / "llava")
  torch_models.copy_embedded_tokenizer(folder / "llava")
  from_hf.convert(folder / "llava", folder / "base")
  return folder


def test_a_stock_llava_with_a_phi_is_read_and_written(
  phi_llava, tmp_path, monkeypatch
):
  export(phi_llava / "base", tmp_path / "hf", "merged")
  held, written = (
    folders.canonical(path) for path in (phi_llava / "llava", tmp_path / "hf")
  )
  assert held.keys() == written.keys()
  for name in held:
    np.testing.assert_array_equal(written[name], held[name], err_msg=name)
  in_process.patch(monkeypatch)
  # The folder that was read, not the one that was written.
  report = verify_lib.verify(phi_llava / "base", phi_llava / "llava")
  assert report.is_equal, report.checks


def test_adapters_of_a_phi_go_out_alone(phi_llava, tmp_path, monkeypatch):
  run, stock = tmp_path / "run", phi_llava / "llava"
  _, flat = random_run.write_on(phi_llava / "base", run, num_experts=2)
  wanted = {path: base_lib.digest(leaf) for path, leaf in flat.items()}
  export(run, tmp_path / "experts", "experts")
  export(run, tmp_path / "small", "mole", without_base=True)
  in_process.patch(monkeypatch)
  for name in ("experts", "small"):
    report = verify_lib.verify(run, tmp_path / name, stock)
    assert report.is_equal, report.checks
    from_hf.convert(tmp_path / name, tmp_path / f"{name}-base", llm=stock)
    entries = base_lib.BaseReader(tmp_path / f"{name}-base").parameters
    assert {path: e["sha256"] for path, e in entries.items()} == wanted


def as_qwen(model):
  """Configuration and tensors of a Qwen2 as the Qwen of 2023 stores them."""
  c, there = model.config, model.state_dict()
  arrays = {
    "transformer.wte.weight": there["model.embed_tokens.weight"],
    "transformer.ln_f.weight": there["model.norm.weight"],
    "transformer.rotary_emb.inv_freq": torch.ones(3),
    "lm_head.weight": there["lm_head.weight"],
  }
  for layer in range(c.num_hidden_layers):
    theirs, ours = f"transformer.h.{layer}", f"model.layers.{layer}"
    for new, old in (
      ("ln_1", "input_layernorm"),
      ("ln_2", "post_attention_layernorm"),
      ("attn.c_proj", "self_attn.o_proj"),
      ("mlp.w1", "mlp.up_proj"),
      ("mlp.w2", "mlp.gate_proj"),
      ("mlp.c_proj", "mlp.down_proj"),
    ):
      arrays[f"{theirs}.{new}.weight"] = there[f"{ours}.{old}.weight"]
    for kind in ("weight", "bias"):
      parts = [there[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
      arrays[f"{theirs}.attn.c_attn.{kind}"] = torch.cat(parts)
  config = {
    "model_type": "qwen",
    "vocab_size": c.vocab_size,
    "hidden_size": c.hidden_size,
    "intermediate_size": 2 * c.intermediate_size,
    "num_hidden_layers": c.num_hidden_layers,
    "num_attention_heads": c.num_attention_heads,
    "kv_channels": c.hidden_size // c.num_attention_heads,
    "layer_norm_epsilon": c.rms_norm_eps,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "seq_length": c.max_position_embeddings,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
  }
  return config, {name: tensor.numpy() for name, tensor in arrays.items()}


def test_a_qwen_of_2023_is_the_qwen2_with_its_weights(clip, tmp_path):
  config = torch_models.text_config(
    "qwen2", vocab_size=VOCAB, num_key_value_heads=4
  )
  model = torch_models.randomise(transformers.Qwen2ForCausalLM(config))
  model.save_pretrained(tmp_path / "qwen2")
  values, arrays = as_qwen(model)
  folders.save(tmp_path / "qwen", arrays, values)
  for name in ("qwen", "qwen2"):
    torch_models.copy_embedded_tokenizer(tmp_path / name)
    from_hf.convert(tmp_path / name, tmp_path / f"{name}-base", vision=clip)
  assert_same_base(tmp_path / "qwen-base", tmp_path / "qwen2-base")
  values["rotary_pct"] = 0.5
  arrays["transformer.h.0.attn.q_norm.weight"] = np.ones(3)
  folders.save(tmp_path / "tensors", arrays, values | {"rotary_pct": 1.0})
  with pytest.raises(tensors.CheckpointError, match="no such tensors:\n.*q_n"):
    from_hf.convert(tmp_path / "tensors", tmp_path / "x", vision=clip)
  folders.save(tmp_path / "settings", arrays, values)
  with pytest.raises(tensors.CheckpointError, match="rotary_pct is 0.5"):
    from_hf.convert(tmp_path / "settings", tmp_path / "x", vision=clip)


@pytest.mark.parametrize(
  ("kind", "change", "message"),
  [
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is T"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True; wanted False"),
    ("phi", {"hidden_act": "relu"}, "'relu'; wanted 'gelu_new' or 'gelu_py"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"partial_rotary_factor": 0.5}, "factor is 0.5, but a llama"),
    (
      "stablelm",
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      "rotary positions of type 'linear'",
    ),
  ],
)
def test_what_the_decoder_cannot_follow_is_refused(kind, change, message):
  with pytest.raises(tensors.CheckpointError, match=f"here: .*{message}"):
    hf_decoder.decoder_section({"model_type": kind, **change}, "here")


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_a_configuration_comes_back_from_the_file_written(kind):
  config = torch_models.text_config(kind).to_dict()
  section = hf_decoder.decoder_section(config, "here")
  shape = decoder_lib.DecoderConfig(**section)
  again = hf_decoder.decoder_section(hf_decoder.text_config(shape), "there")
  assert again == section
  # Older files of Transformers 4 have keys of their own for positions.
  rope = config.pop("rope_parameters")
  del rope["rope_type"]
  assert hf_decoder.decoder_section(config | rope, "here") == section


def test_the_first_files_of_stablelm_say_the_same_in_other_words():
  values = dict(hidden_size=64, num_attention_heads=4, use_qkv_bias=True)
  own = {"norm_eps": 1e-6, "rope_pct": 0.5, "model_type": "stablelm_epoch"}
  words = {"layer_norm_eps": 1e-6, "partial_rotary_factor": 0.5}
  words["model_type"] = "stablelm"
  section = hf_decoder.decoder_section(values | own, "here")
  assert section == hf_decoder.decoder_section(values | words, "here")
  assert section["norm_eps"] == 1e-6 and section["rotary_fraction"] == 0.5


def test_a_llama_with_biases_in_attention_is_one_too():
  section = hf_decoder.decoder_section({"attention_bias": True}, "here")
  assert section["attention_bias"] == "all"
  written = hf_decoder.text_config(decoder_lib.DecoderConfig(**section))
  assert written["model_type"] == "llama" and written["attention_bias"]


@pytest.mark.parametrize(
  "change",
  [
    dict(norm="layer", attention_bias="all"),
    dict(mlp="gelu"),
    dict(rotary_fraction=0.5),
    dict(attention_bias="qkv", sliding_window=64),
    dict(norm="layer", head_dim=64),
  ],
  ids=str,
)
def test_a_decoder_that_transformers_lacks_is_not_written(change):
  with pytest.raises(tensors.CheckpointError, match="has no decoder with"):
    hf_decoder.text_config(decoder_lib.DecoderConfig(**change))
