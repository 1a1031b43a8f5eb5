"""Transformers in float32 is the oracle, rung by rung, on random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mole_jax.interop import formats, hf
from mole_jax.models import llava, vision
from mole_jax.training import base as base_lib
from mole_jax.training import losses, state
from tests.interop import torch_models

NUM_IMAGE_TOKENS = 9
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def convert(model, folder):
  """A Transformers model -> our configuration and flat parameters."""
  model.save_pretrained(folder / "hf")
  formats.from_hf(folder / "hf", folder / "base")
  reader = base_lib.BaseReader(folder / "base")
  config = llava.make_config(hf.full_model_section(reader.about["model"]))
  return config, {
    name: leaf
    for number in range(len(reader.parts()))
    for name, leaf in reader.read_part(number).items()
  }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  torch.set_num_threads(1)
  model = torch_models.make_llava()
  return model, *convert(model, tmp_path_factory.mktemp("parity"))


def make_batch(seed=0):
  """Rows of two, one and no images; the third is padded on the right."""
  rng = np.random.default_rng(seed)
  image = [torch_models.IMAGE_TOKEN] * NUM_IMAGE_TOKENS
  text = lambda count: rng.integers(0, 49, count).tolist()
  rows = [
    text(3) + image + text(2) + image + text(4),
    text(2) + image + text(16),
    text(20),
  ]
  ids = np.zeros((3, 27), np.int32)
  mask = np.zeros((3, 27), np.int32)
  for row, values in enumerate(rows):
    ids[row, : len(values)] = values
    mask[row, : len(values)] = 1
  pixels = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
  slots = np.zeros((3, 2, 12, 12, 3), np.float32)
  slots[0], slots[1, 0] = pixels[:2], pixels[2]
  return ids, mask, pixels, slots


def to_torch(pixels):
  return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def assert_close(ours, theirs, rtol):
  """Relative to the largest value."""
  theirs = theirs.detach().numpy() if torch.is_tensor(theirs) else theirs
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


@pytest.mark.parametrize("feature_layer", [-1, -2, -3, 0, 1, 3])
def test_every_feature_layer_is_that_of_clip(feature_layer, tmp_path):
  model = torch_models.make_llava(feature_layer)
  config, flat = convert(model, tmp_path)
  _, _, pixels, _ = make_batch()
  with torch.no_grad():
    states = model.model.vision_tower(
      to_torch(pixels), output_hidden_states=True
    ).hidden_states
  tower = vision.VisionTower(config.vision)
  params = state.unflatten(flat)["vision"]
  ours = tower.apply({"params": params}, jnp.asarray(pixels))
  assert_close(ours, states[feature_layer][:, 1:], 1e-5)


def run(config, flat, ids, mask, slots):
  """Logits and final hidden states, padding on either side."""
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  model = llava.Llava(config)
  params = {"params": state.unflatten(flat)}
  arrays = map(jnp.asarray, (ids, slots, positions, mask))
  output = model.apply(params, *arrays, num_segments=1)
  return model.apply(params, output.hidden, method="unembed"), output.hidden


def test_projected_features_are_those_of_llava(pair):
  model, config, flat = pair
  _, _, pixels, _ = make_batch()
  with torch.no_grad():
    theirs = model.model.get_image_features(to_torch(pixels)).pooler_output
  ours = llava.Llava(config).apply(
    {"params": state.unflatten(flat)},
    jnp.asarray(pixels[:, None]),
    method="encode_images",
  )
  assert_close(ours, torch.stack(list(theirs)), 1e-5)


def torch_logits(model, ids, mask, pixels):
  return model(
    input_ids=torch.from_numpy(ids).long(),
    attention_mask=torch.from_numpy(mask).long(),
    pixel_values=to_torch(pixels),
  ).logits


def test_logits_and_loss_with_two_one_and_no_images(pair):
  model, config, flat = pair
  ids, mask, pixels, slots = make_batch()
  labels = np.where((ids != torch_models.IMAGE_TOKEN) & (mask > 0), ids, -100)
  with torch.no_grad():
    logits = torch_logits(model, ids, mask, pixels)
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].reshape(-1, 50),
      torch.from_numpy(labels[:, 1:]).long().reshape(-1),
    )
  ours, hidden = run(config, flat, ids, mask, slots)
  is_token = mask.astype(bool)
  assert_close(np.asarray(ours)[is_token], logits.numpy()[is_token], 1e-4)
  domains = np.where(is_token, 0, -1)
  sums = losses.next_token_sums(
    hidden,
    jnp.asarray(labels),
    jnp.asarray(domains),
    lambda hidden: llava.Llava(config).apply(
      {"params": state.unflatten(flat)}, hidden, method="unembed"
    ),
    1,
    8,
  )
  assert float(sums.loss[0] / sums.count[0]) == pytest.approx(
    float(loss), rel=1e-5
  )


def test_tied_embeddings_and_left_padding(tmp_path):
  model = torch_models.make_llava(tie_word_embeddings=True)
  config, flat = convert(model, tmp_path)
  assert "decoder/lm_head" not in flat
  ids, mask, pixels, slots = make_batch()
  # Row 1 ends where row 0 does; its first tokens become padding.
  ids[2], mask[2] = np.roll(ids[2], 7), np.roll(mask[2], 7)
  with torch.no_grad():
    theirs = torch_logits(model, ids, mask, pixels)
  ours, _ = run(config, flat, ids, mask, slots)
  is_token = mask.astype(bool)
  assert_close(np.asarray(ours)[is_token], theirs.numpy()[is_token], 1e-4)


def with_lora(config, flat, seed=1):
  """Our model with plain LoRA everywhere, and its random matrices."""
  values = {
    "vision": vars(config.vision),
    "decoder": vars(config.decoder),
    "lora": dict(rank=3, alpha=5.0, dropout=0.0),
    "mole": dict(num_experts=1, rank=4, alpha=6.0, dropout=0.0),
    "image_token_id": config.image_token_id,
    "use_visual_tokens": False,
  }
  config = llava.make_config(values)
  shapes = state.parameter_shapes(config)
  new = [name for name in shapes if "/lora_" in name]
  keys = jax.random.split(jax.random.key(seed), len(new))
  return (
    values,
    config,
    {
      name: 0.1 * jax.random.normal(key, shapes[name].shape)
      for name, key in zip(new, keys, strict=True)
    },
  )


def torch_lora(model, added):
  """PyTorch leaves for each matrix, added to the outputs by hooks."""
  leaves, hooks = {}, []
  for layer, block in enumerate(model.model.language_model.layers):
    for name in (*ATTENTION, *MLP):
      part = "self_attn" if name in ATTENTION else "mlp"
      path = f"decoder/layers/{part}/{name}"
      a, b = (np.asarray(added[f"{path}/lora_{x}"][layer]) for x in "ab")
      a, b = (x[0] if x.ndim == 3 else x for x in (a, b))
      a, b = (torch.from_numpy(x.copy()).requires_grad_() for x in (a, b))
      scale = 5.0 / 3 if name in ATTENTION else 6.0 / 4
      leaves[path, layer] = (a, b)
      hooks.append(
        getattr(getattr(block, part), name).register_forward_hook(
          lambda _, inputs, out, a=a, b=b, scale=scale: (
            out + scale * (inputs[0] @ a @ b)
          )
        )
      )
  return leaves, hooks


def test_gradients_of_every_lora_matrix_and_the_merged_export(pair, tmp_path):
  model, base_config, flat = pair
  _, config, added = with_lora(base_config, flat)
  ids, mask, pixels, slots = make_batch()
  leaves, hooks = torch_lora(model, added)
  try:
    logits = torch_logits(model, ids, mask, pixels)
  finally:
    for hook in hooks:
      hook.remove()
  weight = np.random.default_rng(2).normal(size=logits.shape)
  weight = (weight * mask[..., None]).astype(np.float32)
  (logits * torch.from_numpy(weight)).sum().backward()

  def objective(added):
    ours, _ = run(config, {**flat, **added}, ids, mask, slots)
    return jnp.sum(ours * weight), ours

  (_, ours), grads = jax.value_and_grad(objective, has_aux=True)(added)
  is_token = mask.astype(bool)
  theirs = logits.detach().numpy()[is_token]
  assert_close(np.asarray(ours)[is_token], theirs, 1e-4)
  for (path, layer), pair_of_leaves in leaves.items():
    for x, leaf in zip("ab", pair_of_leaves, strict=True):
      grad = np.asarray(grads[f"{path}/lora_{x}"][layer])
      grad = grad[0] if grad.ndim == 3 else grad
      assert_close(grad, leaf.grad, 1e-4)


def test_greedy_text_is_that_of_transformers(pair):
  from mole_jax.inference import generate, generator

  model, config, flat = pair
  ids, mask, pixels, slots = make_batch()
  made = generator.Generator(
    config,
    state.unflatten(flat),
    eos_id=0,
    pad_id=0,
    banned_ids=[],
    image_mean=[0.0] * 3,
    image_std=[1.0 / 255] * 3,
  )
  rng = np.random.default_rng(5)
  pixels = rng.integers(0, 2, (3, 12, 12, 3)).astype(np.uint8)
  prompts = [
    generator.Prompt(ids[0], pixels[:2]),
    generator.Prompt(ids[1], pixels[2:]),
    generator.Prompt(ids[2][:20], pixels[:0]),
  ]
  answers = made(prompts, max_new_tokens=10, sampling=generate.GREEDY)
  for prompt, answer in zip(prompts, answers, strict=True):
    # Values of 0 and 1 are what our normalisation makes of these bytes.
    values = to_torch(prompt.images.astype(np.float32))
    images = {"pixel_values": values} if len(values) else {}
    out = model.generate(
      input_ids=torch.from_numpy(prompt.input_ids)[None].long(),
      **images,
      max_new_tokens=10,
      do_sample=False,
      eos_token_id=0,
      pad_token_id=0,
    )[0, len(prompt.input_ids) :]
    theirs = out.tolist()
    theirs = theirs[: theirs.index(0)] if 0 in theirs else theirs
    assert answer.tokens.tolist() == theirs
