"""Training is the same on one device and on any mesh: losses, choices, all."""

import jax
import numpy as np
import pytest

from mole_jax.training import losses, state
from tests.models import small
from tests.parallel import one_device
from tests.training import small_run

NUM_STEPS = 20
MESHES = {
  "data 2": (2, 1, 1, 1),
  "fsdp 2": (1, 2, 1, 1),
  "expert 2": (1, 1, 2, 1),
  "tensor 2": (1, 1, 1, 2),
  "fsdp 2, tensor 2": (1, 2, 1, 2),
  "data 4": (4, 1, 1, 1),
  "fsdp 8": (1, 8, 1, 1),
  "data 2, fsdp 2, expert 2": (2, 2, 2, 1),
  "fsdp 2, expert 2, tensor 2": (1, 2, 2, 2),
}


def make_config(mesh, dispatch):
  config = small_run.make_config(
    num_steps=NUM_STEPS, batch_size=8, log_every=1, checkpoint_every=NUM_STEPS
  )
  config["mesh"] = dict(zip(small_run.AXES, mesh, strict=True))
  config["model"]["decoder"]["num_kv_heads"] = 2
  config["model"]["mole"].update(num_experts=4, dispatch=dispatch, block_rows=8)
  return config


def train(mesh, dispatch, text, run):
  config = make_config(mesh, dispatch)
  base = small_run.make_base(config)
  params, rows = small_run.train(
    config, "mole", run, text, base, num_devices=int(np.prod(mesh))
  )
  return config, params, rows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["masked", "gather"])
def one(request, text, tmp_path_factory):
  """A run on one device."""
  run = tmp_path_factory.mktemp("one")
  return request.param, *train((1, 1, 1, 1), request.param, text, run)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_of_twenty_steps_are_those_of_one_device(
  one, mesh, text, tmp_path
):
  dispatch, _, _, expected = one
  _, _, rows = train(mesh, dispatch, text, tmp_path)
  for number in range(1, NUM_STEPS + 1):
    for key in ("loss", "lm_loss", "balance_loss", "grad_norm", "expert_load"):
      np.testing.assert_allclose(
        rows[number][key], expected[number][key], rtol=1e-6, err_msg=key
      )


def compute(mesh, dispatch, form):
  """Loss, gradients and choices of a random model on a mesh.

  `form` changes the decoder.
  """
  stage = small_run.make_stage(
    make_config(mesh, dispatch), "mole", int(np.prod(mesh))
  )
  config, model, params = small.make(
    decoder={"num_kv_heads": 2} | form,
    mole=dict(num_experts=4, top_k=2, gate="prob")
    | {"dispatch": dispatch, "block_rows": 8},
  )
  random = np.random.default_rng(0)
  ids, positions, segments = one_device.make_rows(random)
  ids[:, 2:8] = config.image_token_id
  pixels = random.normal(size=(8, 1, 8, 8, 3)).astype(np.float32)
  batch = (ids, pixels, positions, segments)

  def loss(flat, batch):
    output = model.apply({"params": state.unflatten(flat)}, *batch, 2)
    segments = batch[-1]
    balance = losses.balance_loss(output.routing, segments, 2, "pooled")
    params = {"params": state.unflatten(flat)}
    logits = model.apply(params, output.hidden, method="unembed")
    value = (output.hidden**2).mean() + (logits**2).mean() + balance
    return value, output.routing.chosen

  function, args = one_device.gradient_program(
    loss, stage.mesh, config, params, batch
  )
  (value, chosen), grads = function(*args)
  return jax.device_get((value, chosen, grads))


@pytest.mark.parametrize(
  ("dispatch", "form"),
  [("masked", {}), ("gather", {}), ("gather", small.PHI)],
  ids=["masked", "gather", "gather, Phi"],
)
def test_gradients_and_choices_are_those_of_one_device(dispatch, form):
  expected = compute((1, 1, 1, 1), dispatch, form)
  for mesh in ((2, 4, 1, 1), (1, 2, 2, 2)):
    value, chosen, grads = compute(mesh, dispatch, form)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(chosen, expected[1])
    one_device.assert_same_gradients(grads, expected[2])


def test_parameters_and_their_moments_are_cut_alike():
  stage = small_run.make_stage(make_config((1, 2, 2, 2), "masked"), "mole", 8)
  (trainable, opt_state), frozen = stage.start(
    0, small_run.make_base(make_config((1, 2, 2, 2), "masked"))
  )
  name = "decoder/layers/mlp/down_proj/lora_a"
  layers, experts, width, rank = trainable[name].shape
  local = (layers, experts // 2, width // 4, rank)
  assert trainable[name].addressable_shards[0].data.shape == local
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    if name in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 2
  for moment in moments:
    assert moment.addressable_shards[0].data.shape == local
  kernel = frozen["decoder/layers/mlp/down_proj/kernel"]
  shard = kernel.addressable_shards[0].data
  assert shard.size * 4 == kernel.size


def test_what_a_mesh_would_tear_is_refused_with_the_nearest_sizes():
  config = make_config((1, 1, 8, 1), "masked")
  with pytest.raises(ValueError, match=r"mesh.expert=8 .*experts=4; use 4\."):
    small_run.make_stage(config, "mole", 8)
  config = make_config((1, 1, 2, 4), "masked")
  with pytest.raises(ValueError, match=r"mesh.tensor=4 .*kv_heads=2.*use 2\."):
    small_run.make_stage(config, "mole", 8)
