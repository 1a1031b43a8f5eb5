"""A mixture in PyTorch: the same outputs, routing, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mole_jax.inference import pretrained
from mole_jax.interop import to_hf
from mole_jax.models import llava
from mole_jax.training import files, losses, state
from tests.interop import random_run

NUM_TOKENS = 14
CASES = {
  "release": dict(gate="none"),
  "switch, balanced per layer": dict(gate="prob"),
  "two of three, one router": dict(
    gate="straight_through", top_k=2, router_scope="shared"
  ),
  "dense": dict(gate="prob", top_k=3),
  "plain LoRA": dict(num_experts=1),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """A run, and what Transformers loads of its export."""
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp("mole")
  mole = CASES[request.param]
  name = "lora" if mole.get("num_experts") == 1 else "mole3"
  config, flat = random_run.write(folder / "run", name, dropout=0.0, **mole)
  config["balance"]["loss"] = (
    "per_layer" if "per layer" in request.param else "pooled"
  )
  files.write_json(folder / "run" / "config.json", config)
  to_hf.convert(
    folder / "run", folder / "hf", format="mole", max_shard_bytes=10**4
  )
  model, info = transformers.AutoModelForImageTextToText.from_pretrained(
    folder / "hf", trust_remote_code=True, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  return config, flat, pretrained.load(folder / "run"), model.eval(), folder


def make_batch(image_token_id):
  """Two rows, the second padded on the right; an image of 6 positions each."""
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 98, (2, NUM_TOKENS)).astype(np.int32)
  ids[:, 2:8] = image_token_id
  mask = np.ones_like(ids)
  mask[1, 11:] = 0
  pixels = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
  labels = np.where((ids != image_token_id) & (mask > 0), ids, -100)
  return ids, mask, pixels, labels


def torch_arguments(ids, mask, pixels):
  return dict(
    input_ids=torch.from_numpy(ids).long(),
    attention_mask=torch.from_numpy(mask).long(),
    pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
  )


def assert_close(ours, theirs, rtol=1e-4):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()


def test_logits_and_routing_are_ours(case):
  _, _, ours, model, _ = case
  ids, mask, pixels, _ = make_batch(ours.image_token_id)
  with torch.no_grad():
    theirs = model(**torch_arguments(ids, mask, pixels)).logits.numpy()
  is_token = mask.astype(bool)
  logits = np.asarray(ours.logits(ids, pixels, mask))
  assert_close(logits[is_token], theirs[is_token])
  if model.config.num_experts == 1:
    return
  chosen, _ = model.routing()
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  output = llava.Llava(ours.model_config).apply(
    {"params": ours.params},
    jnp.asarray(ids),
    jnp.asarray(pixels[:, None]),
    jnp.asarray(positions),
    jnp.asarray(mask),
    1,
  )
  np.testing.assert_array_equal(
    np.asarray(output.routing.chosen)[:, is_token], chosen.numpy()[:, is_token]
  )


def test_loss_and_the_gradient_of_every_adapter_are_ours(case):
  config, flat, ours, model, _ = case
  ids, mask, pixels, labels = make_batch(ours.image_token_id)
  model.zero_grad()
  out = model(
    **torch_arguments(ids, mask, pixels),
    labels=torch.from_numpy(labels).long(),
  )
  out.loss.backward()
  llava_model = llava.Llava(ours.model_config)
  patterns = config["stages"]["mole"]["trainable"]
  trainable, frozen = state.split(flat, patterns)
  positions = jnp.asarray(np.maximum(np.cumsum(mask, axis=1) - 1, 0))

  def loss_fn(trainable):
    params = {"params": state.unflatten({**frozen, **trainable})}
    output = llava_model.apply(
      params,
      jnp.asarray(ids),
      jnp.asarray(pixels[:, None]),
      positions,
      jnp.asarray(mask),
      1,
    )
    sums = losses.next_token_sums(
      output.hidden,
      jnp.asarray(labels),
      jnp.asarray(mask - 1),
      lambda hidden: llava_model.apply(params, hidden, method="unembed"),
      1,
      NUM_TOKENS,
    )
    loss = sums.loss.sum() / sums.count.sum()
    if output.routing is None:
      return loss
    balance = losses.balance_loss(
      output.routing, jnp.asarray(mask), 1, config["balance"]["loss"]
    )
    return loss + config["balance"]["weight"] * balance

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(trainable)
  assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
  theirs = dict(model.named_parameters())
  compared = 0
  for path, grad in grads.items():
    is_router = "router" in path
    if is_router and config["model"]["mole"]["gate"] == "none":
      assert jnp.any(grad != 0), path  # From the balance loss alone.
    for name, wanted in torch_gradients(path, theirs):
      assert_close(one_layer(grad, name, path), wanted, 1e-3)
      compared += 1
  assert compared >= len(grads)


def torch_gradients(path, parameters):
  """The gradients in PyTorch of one of our parameters, by layer."""
  tail = {
    "kernel": "weight",
    "scale": "weight",
  }
  *parents, leaf = path.split("/")
  leaf = tail.get(leaf, leaf)
  stem = ".".join([*parents, leaf])
  for ours, name in (
    ("decoder.layers.", "model.language_model.layers.{}."),
    ("decoder.", "model.language_model."),
    ("projector.", "model.multi_modal_projector."),
    ("visual_", "model.multi_modal_projector.visual_"),
  ):
    if stem.startswith(ours):
      stem = name + stem.removeprefix(ours)
      break
  layers = range(2) if "{}" in stem else [None]
  for layer in layers:
    yield stem.format(layer), parameters[stem.format(layer)].grad.numpy()


def one_layer(grad, name, path):
  """Our gradient as PyTorch has it."""
  grad = np.asarray(grad)
  if ".layers." in name:
    grad = grad[int(name.split(".layers.")[1].split(".")[0])]
  is_matrix = path.endswith(("kernel", "lora_a", "lora_b"))
  grad = grad.swapaxes(-1, -2) if is_matrix else grad
  return grad


def test_it_generates_trains_saves_and_reloads(case, tmp_path):
  _, _, ours, model, folder = case
  ids, mask, pixels, labels = make_batch(ours.image_token_id)
  arguments = torch_arguments(ids[:1], mask[:1], pixels[:1])
  out = model.generate(
    **arguments, max_new_tokens=4, do_sample=False, eos_token_id=1
  )
  assert out.shape[1] <= NUM_TOKENS + 4
  logits = np.asarray(ours.logits(ids[:1], pixels[:1]))
  assert int(out[0, NUM_TOKENS]) == int(logits[0, -1].argmax())
  fresh = transformers.AutoModelForImageTextToText.from_pretrained(
    folder / "hf", trust_remote_code=True
  )
  adapters = [p for n, p in fresh.named_parameters() if "lora_" in n]
  before = [p.detach().clone() for p in adapters]
  optimizer = torch.optim.AdamW(adapters, lr=1e-2)
  loss = fresh.train()(
    **torch_arguments(ids, mask, pixels),
    labels=torch.from_numpy(labels).long(),
  ).loss
  loss.backward()
  optimizer.step()
  assert any(
    not torch.equal(a, b) for a, b in zip(adapters, before, strict=True)
  )
  fresh.save_pretrained(tmp_path / "saved")
  again = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "saved", trust_remote_code=True
  )
  for name, value in fresh.state_dict().items():
    assert torch.equal(again.state_dict()[name], value), name
