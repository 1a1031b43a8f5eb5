"""Frozen kernels in 8 bits: how exact, how they are held, what is refused."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import lora
from mole_jax.parallel import activations, sharding
from mole_jax.timing import synthetic
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, losses, quantised, state
from mole_jax.training import stage as stage_lib
from tests.models import small
from tests.parallel import one_device
from tests.training import small_run

UP = "decoder/layers/mlp/up_proj/kernel"


def make_config(**changes):
  """The small run, its adapters on a base in 8 bits."""
  config = small_run.make_config(**changes)
  config["stages"]["mole"]["quantize"] = "int8"
  return config


def of_decoder(flat):
  """Paths of the kernels that are quantised, written out."""
  attention = [f"self_attn/{name}_proj" for name in "qkvo"]
  mlp = ["mlp/gate_proj", "mlp/up_proj", "mlp/down_proj", "mlp/fc1", "mlp/fc2"]
  names = [f"decoder/layers/{name}/kernel" for name in attention + mlp]
  return tuple(name for name in names if name in flat)


def quantise(flat):
  """What a stage holds of parameters, by path."""
  make = quantised.maker(of_decoder(flat))
  return {k: v for n, leaf in flat.items() for k, v in make(n, leaf).items()}


def dequantise(flat):
  """Kernels and their scales -> float32 kernels; the rest as it is."""
  whole = dict(flat)
  for name in of_decoder(flat):
    scale = whole.pop(quantised.scale_of(name))
    whole[name] = flat[name].astype(jnp.float32) * scale[:, None]
  return whole


def test_a_weight_moves_by_half_a_step_at_most():
  factors = jnp.array([[1.0, 100.0, 0.0], [1e-3, 1.0, 7.0]])[:, None]
  kernel = factors * jax.random.normal(jax.random.key(0), (2, 40, 3))
  held = quantised.maker((UP,))(UP, kernel)
  assert {k: (v.shape, v.dtype) for k, v in held.items()} == {
    k: (v.shape, v.dtype) for k, v in quantised.shapes(UP, (2, 40, 3)).items()
  }
  whole = np.asarray(dequantise(held)[UP])
  # 255 steps from end to end, for each layer and output on its own.
  step = np.abs(np.asarray(kernel)).max(1, keepdims=True) / 127.5
  assert np.all(np.abs(whole - kernel) <= step * (0.5 + 1e-4))
  assert quantised.maker((UP,))("other", kernel) == {"other": kernel}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_dequantised_kernel(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x, dy = (
    jax.random.normal(key, shape).astype(dtype)
    for key, shape in zip(keys, ((2, 5, 7), (2, 5, 3)), strict=False)
  )
  w = jax.random.randint(keys[2], (7, 3), -127, 128, jnp.int8)
  scale = jnp.array([0.01, 0.3, 2.0])
  product = lambda x: lora.quantised_matmul(x, w, scale)
  y, vjp = jax.vjp(product, x)
  whole = (w.astype(jnp.float32) * scale[None]).astype(dtype)
  wanted, wanted_vjp = jax.vjp(lambda x: lora.matmul(x, whole), x)
  assert y.dtype == x.dtype
  np.testing.assert_array_equal(y, wanted)
  np.testing.assert_array_equal(vjp(dy)[0], wanted_vjp(dy)[0])


def test_nothing_whole_is_kept_for_the_backward_pass():
  x, w, scale = jnp.ones((2, 7)), jnp.ones((7, 3), jnp.int8), jnp.ones(3)
  _, vjp = jax.vjp(lambda x: lora.quantised_matmul(x, w, scale), x)
  kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == (7, 3)]
  assert [leaf.dtype for leaf in kept] == ["int8"]


def make_loss(model, batch):
  """Value, and logits, of flat parameters."""
  ids, positions, segments = map(jnp.asarray, batch)

  def loss(flat):
    params = {"params": state.unflatten(flat)}
    output = model.apply(params, ids, None, positions, segments, 2)
    logits = model.apply(params, output.hidden, method="unembed")
    balance = losses.balance_loss(output.routing, segments, 2, "pooled")
    return (logits**2).mean() + balance, logits

  return loss


@pytest.mark.parametrize("form", [{}, small.PHI], ids=["llama", "phi"])
def test_logits_move_as_weights_that_move_by_a_step_do(form):
  """Rounding is noise, evenly spread over a step: draw such noise instead."""
  _, model, params = small.make(decoder=form)
  flat = state.flatten(params)
  # No mixture: a token whose router is undecided jumps to another expert.
  flat = {n: leaf * (not n.endswith("lora_b")) for n, leaf in flat.items()}
  batch = one_device.make_rows(np.random.default_rng(0))
  loss = jax.jit(make_loss(model, batch))
  rms = lambda x: float(jnp.sqrt((x**2).mean()))
  exact = loss(flat)[1]

  def noisy(seed):
    random = np.random.default_rng(seed)
    moved = dict(flat)
    for name in of_decoder(flat):
      kernel = np.asarray(flat[name])
      step = np.abs(kernel).max(1, keepdims=True) / 127.5
      noise = random.uniform(-0.5, 0.5, kernel.shape) * step
      moved[name] = jnp.asarray(kernel + noise, jnp.float32)
    return rms(loss(moved)[1] - exact)

  drawn = [noisy(seed) for seed in range(8)]
  moved = rms(loss(quantise(flat))[1] - exact)
  assert 0 < moved < 2 * max(drawn)
  assert moved > min(drawn) / 2


@pytest.mark.parametrize("form", [{}, small.PHI], ids=["llama", "phi"])
def test_gradients_are_those_of_the_dequantised_model(form):
  _, model, params = small.make(decoder=form)
  held = quantise(state.flatten(params))
  whole = dequantise(held)
  trained = [n for n in whole if "lora_" in n or "router/" in n]
  loss = make_loss(model, one_device.make_rows(np.random.default_rng(0)))

  def gradients(flat):
    of = lambda own: loss(flat | own)[0]
    own = {name: flat[name] for name in trained}
    return jax.device_get(jax.jit(jax.grad(of))(own))

  found, wanted = gradients(held), gradients(whole)
  assert all(np.any(grad) for n, grad in wanted.items() if "lora_b" in n)
  one_device.assert_same_gradients(found, wanted)


def test_a_base_is_quantised_as_it_is_read(tmp_path):
  """Nothing else is changed, and neither is what stands on disk."""
  config = make_config()
  config["mesh"]["fsdp"] = 2
  config["base"]["dtype"] = "bfloat16"
  base = small_run.make_base(config)
  sha256 = base_lib.write_base(tmp_path, base).sha256
  stage = small_run.make_stage(config, "mole", num_devices=2)
  read = stage_lib.load_base(stage, config, tmp_path, sha256)
  kernels = of_decoder(base)
  assert len(kernels) == 7
  assert read.keys() == base.keys() | {*map(quantised.scale_of, kernels)}
  for name, leaf in quantise(base).items():
    np.testing.assert_array_equal(read[name], leaf, err_msg=name)
  _, frozen = stage.start(0, read)
  _, also = stage.start(0, base)  # Of one that was read whole.
  assert frozen.keys() == stage.frozen_shapes.keys()
  for name, leaf in stage.frozen_shapes.items():
    assert (frozen[name].shape, frozen[name].dtype) == (leaf.shape, leaf.dtype)
    assert frozen[name].sharding == stage.shardings["frozen"][name]
    np.testing.assert_array_equal(frozen[name], also[name], err_msg=name)
  assert frozen[UP].dtype == "int8"
  assert frozen["decoder/embed_tokens"].dtype == "bfloat16"
  assert base_lib.read_reference(tmp_path).sha256 == sha256


def test_parameters_are_read_one_by_one(tmp_path, monkeypatch):
  config = make_config()
  base = small_run.make_base(config)
  sha256 = base_lib.write_base(tmp_path, base).sha256
  stage = small_run.make_stage(config, "mole")
  asked = []
  read_onto = base_lib.BaseReader.read_onto
  monkeypatch.setattr(
    base_lib.BaseReader,
    "read_onto",
    lambda self, places: asked.append([*places]) or read_onto(self, places),
  )
  stage_lib.load_base(stage, config, tmp_path, sha256)
  assert sorted(asked) == sorted([name] for name in base)


def test_a_run_trains_resumes_and_is_read_in_8_bits(tmp_path):
  text = small_run.make_tokenizer(tmp_path)
  config = make_config()
  files.write_json(tmp_path / "config.json", config)
  base = small_run.make_base(config)
  written = base_lib.write_base(tmp_path / "base", base)
  reference = base_lib.BaseReference("base", written.sha256)
  final, rows = small_run.train(config, "mole", tmp_path, text, base, reference)
  assert all(np.isfinite(row["loss"]) for row in rows.values())
  model = checkpoint.read_model(tmp_path)
  assert model.params.keys() == final.keys()
  for name, leaf in final.items():
    np.testing.assert_array_equal(model.params[name], leaf, err_msg=name)
  assert model.params[UP].dtype == "int8"


def test_weights_are_gathered_as_8_bits():
  config = make_config()
  config["mesh"]["fsdp"] = 4
  config["model"]["decoder"]["intermediate_size"] = 48  # The tower's is 24.
  stage = small_run.make_stage(config, "mole", num_devices=4)
  text = stage.lower().compile().as_text()
  gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", text)
  sides = [
    (dtype, sorted(map(int, shape.split(",")))) for dtype, shape in gathers
  ]
  kinds = {dtype for dtype, shape in sides if shape[-2:] == [16, 48]}
  assert kinds == {"s8"}


def test_a_part_of_a_mesh_has_the_scales_of_its_outputs():
  spec = lambda name: sharding.partition_spec(f"decoder/layers/{name}")
  for name in ("self_attn/q_proj", "mlp/up_proj", "mlp/fc1"):
    assert spec(f"{name}/kernel_scale")[1] == spec(f"{name}/kernel")[2]
  for name in ("self_attn/o_proj", "mlp/down_proj", "mlp/fc2"):
    assert not spec(f"{name}/kernel_scale")


def test_gradients_on_a_mesh_are_those_of_one_device():
  config, model, params = small.make()
  held = quantise(state.flatten(params))
  trained = [n for n in held if "lora_" in n]
  loss = make_loss(model, one_device.make_rows(np.random.default_rng(0)))

  def gradients(axes):
    mesh = small_run.make_stage(
      make_config() | {"mesh": dict(zip(small_run.AXES, axes, strict=True))},
      "mole",
      int(np.prod(axes)),
    ).mesh
    shapes = jax.eval_shape(lambda: held)
    places = sharding.parameter_shardings(shapes, mesh)
    of = lambda own, flat: loss(flat | own)[0]
    function = jax.jit(
      activations.on_mesh(jax.grad(of), mesh),
      in_shardings=({n: places[n] for n in trained}, places),
    )
    flat = jax.device_put(held, places)
    return jax.device_get(function({n: flat[n] for n in trained}, flat))

  # Sums in another order, as in test_same_on_every_mesh.
  wanted = gradients((1, 1, 1, 1))
  one_device.assert_same_gradients(gradients((1, 4, 1, 1)), wanted)


def test_random_weights_for_timings_have_their_size():
  stage = small_run.make_stage(make_config(), "mole")
  _, frozen = synthetic.parameters(stage)
  whole = np.asarray(dequantise(frozen)[UP])
  assert frozen[UP].dtype == "int8" and np.any(frozen[UP][0] != frozen[UP][1])
  np.testing.assert_allclose(whole.std(), 16**-0.5, rtol=0.1)


def change(config, **settings):
  config["stages"]["mole"].update(settings)
  return config


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"quantize": "int4"}, r"quantize='int4' must be one of \('none', 'int8'"),
    ({"use_adapters": False, "trainable": ["projector/.*"]}, "whole base"),
    ({"trainable": [".*"]}, r"down_proj/kernel' and 6 more.*cannot be trained"),
  ],
)
def test_what_cannot_be_in_8_bits_is_refused_before_weights_are_read(
  settings, message
):
  with pytest.raises(ValueError, match=message):
    small_run.make_stage(change(make_config(), **settings), "mole")


def test_experts_that_are_ffns_are_refused():
  config = small_run.make_config("moe_llava")
  config["stages"]["experts"]["quantize"] = "int8"
  config["stages"]["experts"]["use_adapters"] = True
  with pytest.raises(ValueError, match="not there for FFNs that are experts"):
    quantised.kernels(config, "experts")


def test_a_missing_qwix_is_said_before_weights_are_read(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  stage = small_run.make_stage(make_config(), "mole")  # A dry run needs none.
  with pytest.raises(ValueError, match=r"pip install -e '\.\[quantized\]'"):
    stage_lib.load_base(stage, make_config(), tmp_path, "")
  assert quantised.maker(()) is None
