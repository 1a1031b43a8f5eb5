"""Transformers in float32 is the oracle, rung by rung, on random models."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from mole_jax.inference import generator
from mole_jax.interop import from_hf, sources
from mole_jax.models import attention, llava, vision
from mole_jax.training import base as base_lib
from mole_jax.training import losses, state
from tests.interop import greedy, torch_models
from tests.models import small

NUM_IMAGE_TOKENS = 9
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def convert(model, folder):
  """A Transformers model -> our configuration and flat parameters."""
  model.save_pretrained(folder / "hf")
  from_hf.convert(folder / "hf", folder / "base")
  reader = base_lib.BaseReader(folder / "base")
  config = llava.make_config(sources.full_model_section(reader.about["model"]))
  return config, {
    name: jnp.asarray(reader.read(name)) for name in reader.parameters
  }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  torch.set_num_threads(1)
  model = torch_models.make_llava()
  return model, *convert(model, tmp_path_factory.mktemp("parity"))


def make_batch(seed=0):
  """Rows with three, one and no images, padded on the right."""
  rng = np.random.default_rng(seed)
  image = [torch_models.IMAGE_TOKEN] * NUM_IMAGE_TOKENS
  text = lambda count: rng.integers(0, 49, count).tolist()
  rows = [
    text(3) + image + text(2) + image + image + text(4),
    text(2) + image + text(16),
    text(20),
  ]
  ids = np.zeros((3, 36), np.int32)
  mask = np.zeros((3, 36), np.int32)
  for row, values in enumerate(rows):
    ids[row, : len(values)] = values
    mask[row, : len(values)] = 1
  pixels = rng.normal(size=(4, 12, 12, 3)).astype(np.float32)
  slots = np.zeros((3, 3, 12, 12, 3), np.float32)
  slots[0], slots[1, 0] = pixels[:3], pixels[3]
  return ids, mask, pixels, slots


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_patches_are_embedded_as_by_a_convolution(family, tmp_path):
  model = torch_models.make_llava(family=family)
  config, flat = convert(model, tmp_path)
  pixels = make_pixels(config)
  embeddings = model.model.vision_tower.embeddings
  convolution = (
    embeddings.patch_embeddings.projection
    if family == "dinov2"
    else embeddings.patch_embedding
  )
  with torch.no_grad():
    theirs = (
      convolution(torch_models.to_torch(pixels)).flatten(2).transpose(1, 2)
    )
  ours = vision.patchify(jnp.asarray(pixels), config.vision.patch_size)
  ours = ours @ flat["vision/patch_embedding/kernel"]
  if family != "clip":
    bias = flat["vision/patch_embedding/bias"]
    ours = ours + jnp.broadcast_to(bias, ours.shape)
  torch_models.assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
  ("family", "image_size"),
  # 14 pixels are three patches of 4, and 2 more.
  [("clip", 12), ("siglip", 12), ("siglip", 14), ("dinov2", 20)],
)
def test_every_feature_layer_is_that_of_transformers(
  family, image_size, tmp_path
):
  model = torch_models.make_llava(
    family=family, vision={"image_size": image_size}
  )
  config, flat = convert(model, tmp_path)
  pixels = make_pixels(config)
  with torch.no_grad():
    states = model.model.vision_tower(
      torch_models.to_torch(pixels), output_hidden_states=True
    ).hidden_states
  params = {"params": state.unflatten(flat)["vision"]}
  first = int(vision.FAMILIES[family].has_class_token)
  for layer in (-1, -2, -3, 0, 1, 3):
    tower = vision.VisionTower(
      dataclasses.replace(config.vision, feature_layer=layer)
    )
    ours = tower.apply(params, jnp.asarray(pixels))
    torch_models.assert_close(ours, states[layer][:, first:], 1e-5)


@pytest.mark.parametrize("image_size", [12, 24, 32])
def test_dinov2_sees_other_sizes_than_it_learned_positions_for(
  image_size, tmp_path
):
  model = torch_models.make_llava(family="dinov2")
  config, flat = convert(model, tmp_path)
  assert config.vision.position_grid == 5
  resized = dataclasses.replace(config.vision, image_size=image_size)
  pixels = np.random.default_rng(3).normal(size=(2, image_size, image_size, 3))
  pixels = pixels.astype(np.float32)
  with torch.no_grad():
    theirs = model.model.vision_tower(
      torch_models.to_torch(pixels), output_hidden_states=True
    ).hidden_states[-2]
  params = {"params": state.unflatten(flat)["vision"]}
  tower = vision.VisionTower(resized)
  torch_models.assert_close(
    tower.apply(params, jnp.asarray(pixels)), theirs[:, 1:], 1e-5
  )


def test_positions_are_resized_as_torch_interpolates():
  grid = np.random.default_rng(4).normal(size=(1, 7, 37, 37)).astype(np.float32)
  for target in (8, 16, 37, 50):
    theirs = torch.nn.functional.interpolate(
      torch.from_numpy(grid),
      size=(target, target),
      mode="bicubic",
      align_corners=False,
    )
    ours = vision.resize_positions(
      jnp.asarray(grid[0].transpose(1, 2, 0).reshape(-1, 7)), 37, target
    )
    wanted = theirs[0].permute(1, 2, 0).reshape(-1, 7)
    # torch computes the weights themselves in float32.
    torch_models.assert_close(ours, wanted, 1e-5)


def make_pixels(config, count=3):
  size = config.vision.image_size
  pixels = np.random.default_rng(0).normal(size=(count, size, size, 3))
  return pixels.astype(np.float32)


def test_rotary_positions_are_those_of_llama():
  config = transformers.LlamaConfig(**torch_models.TEXT)
  rng = np.random.default_rng(1)
  positions = np.array([[0, 1, 2, 700, 4000]])
  query = rng.normal(size=(1, 5, 4, 6)).astype(np.float32)
  rotary = modeling_llama.LlamaRotaryEmbedding(config)
  cos, sin = rotary(torch.from_numpy(query), torch.from_numpy(positions))
  heads_first = torch.from_numpy(query).transpose(1, 2)
  theirs, _ = modeling_llama.apply_rotary_pos_emb(
    heads_first, heads_first, cos, sin
  )
  angles = attention.rotary_angles(jnp.asarray(positions), 6, 5000.0)
  ours = attention.rotate(jnp.asarray(query), *angles)
  # Angles up to 4000 rad in float32 are 2e-4 apart.
  torch_models.assert_close(ours, theirs.transpose(1, 2), 1e-3)
  torch_models.assert_close(ours[:, :3], theirs.transpose(1, 2)[:, :3], 1e-5)


def test_each_decoder_layer_is_that_of_llama(pair):
  model, config, flat = pair
  ids, mask, pixels, slots = make_batch()
  with torch.no_grad():
    states = model(
      input_ids=torch.from_numpy(ids).long(),
      attention_mask=torch.from_numpy(mask).long(),
      pixel_values=torch_models.to_torch(pixels),
      output_hidden_states=True,
    ).hidden_states
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  output = llava.Llava(config).apply(
    {"params": state.unflatten(flat)},
    *map(jnp.asarray, (ids, slots, positions, mask)),
    num_segments=1,
    keep_inputs=True,
  )
  ours = [*output.layer_inputs, output.hidden]
  assert len(ours) == len(states) == 3
  is_token = mask.astype(bool)
  for mine, theirs in zip(ours, states, strict=True):
    torch_models.assert_close(
      np.asarray(mine)[is_token], theirs.numpy()[is_token], 1e-5
    )


def test_bfloat16_errs_no_more_than_torch_s(pair, tmp_path):
  model, config, flat = pair
  ids, mask, pixels, slots = make_batch()
  is_token = mask.astype(bool)
  with torch.no_grad():
    exact = torch_logits(model, ids, mask, pixels).numpy()[is_token]
    low = copy.deepcopy(model).to(torch.bfloat16)
    theirs = low(
      input_ids=torch.from_numpy(ids).long(),
      attention_mask=torch.from_numpy(mask).long(),
      pixel_values=torch_models.to_torch(pixels).to(torch.bfloat16),
    )
    theirs = theirs.logits.float().numpy()[is_token]
  ours, _ = run(
    dataclasses.replace(config, dtype="bfloat16"),
    {name: leaf.astype(jnp.bfloat16) for name, leaf in flat.items()},
    ids,
    mask,
    slots,
  )
  error = lambda logits: np.sqrt(np.square(logits - exact).mean())
  assert error(np.asarray(ours)[is_token]) <= 1.2 * error(theirs)


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
    theirs = model.model.get_image_features(
      torch_models.to_torch(pixels)
    ).pooler_output
  ours = llava.Llava(config).apply(
    {"params": state.unflatten(flat)},
    jnp.asarray(pixels[:, None]),
    method="encode_images",
  )
  torch_models.assert_close(ours, torch.stack(list(theirs)), 1e-5)


def torch_logits(model, ids, mask, pixels):
  return model(
    input_ids=torch.from_numpy(ids).long(),
    attention_mask=torch.from_numpy(mask).long(),
    pixel_values=torch_models.to_torch(pixels),
  ).logits


def test_logits_and_loss_with_three_one_and_no_images(pair):
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
  torch_models.assert_close(
    np.asarray(ours)[is_token], logits.numpy()[is_token], 1e-4
  )
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
  # The last row ends where the first does; padding stands before it.
  ids[2], mask[2] = np.roll(ids[2], 16), np.roll(mask[2], 16)
  with torch.no_grad():
    theirs = torch_logits(model, ids, mask, pixels)
  ours, _ = run(config, flat, ids, mask, slots)
  is_token = mask.astype(bool)
  torch_models.assert_close(
    np.asarray(ours)[is_token], theirs.numpy()[is_token], 1e-4
  )


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
  new = {name: leaf for name, leaf in shapes.items() if "/lora_" in name}
  return values, config, small.draw(new, seed, scale=0.1)


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
  torch_models.assert_close(np.asarray(ours)[is_token], theirs, 1e-4)
  for (path, layer), pair_of_leaves in leaves.items():
    for x, leaf in zip("ab", pair_of_leaves, strict=True):
      grad = np.asarray(grads[f"{path}/lora_{x}"][layer])
      grad = grad[0] if grad.ndim == 3 else grad
      torch_models.assert_close(grad, leaf.grad, 1e-4)


def test_greedy_text_is_that_of_transformers(pair):
  model, config, flat = pair
  ids, mask, pixels, slots = make_batch()
  rng = np.random.default_rng(5)
  pixels = rng.integers(0, 2, (4, 12, 12, 3)).astype(np.uint8)
  prompts = [
    generator.Prompt(ids[0], pixels[:3]),
    generator.Prompt(ids[1][:27], pixels[3:]),
    generator.Prompt(ids[2][:20], pixels[:0]),
  ]
  greedy.assert_same_text(model, config, flat, prompts, max_new_tokens=10)
