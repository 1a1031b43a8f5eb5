"""FLOPs per step against numbers computed by hand."""

import math

import jax
import numpy as np
import pytest

from mole_jax.models import block_attention, llava
from mole_jax.training import flops, state, step
from mole_jax.training import stage as stage_lib
from tests.models import small
from tests.training import small_run

ADAPTERS = (r".*/lora_[ab]", r".*/router/.*")
ALL = (r".*",)


def names(config, patterns):
  trainable, _ = state.split(state.parameter_shapes(config), patterns)
  return list(trainable)


def count(config, patterns, rows=2, tokens=10, images=1, **kwargs):
  trained = names(config, patterns)
  return flops.step_flops_by_part(
    config, trained, rows, tokens, images, **kwargs
  )


@pytest.fixture(scope="module")
def config():
  return llava.make_config(small.changed(use_visual_tokens=False))


# The small model: decoder D=16, F=24, 2 layers, 2 heads of 8 and 1 key-value
# head, V=40; tower W=16, F=24, 2 layers, 4 patches of 4x4x3 = 48 and a class
# token. 20 tokens and 2 images in the batch.
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
LORA = (16 + 16) * 2 + 2 * (16 + 8) * 2 + (16 + 16) * 2 + 3 * (16 + 24) * 2


def test_adapters_alone_cost_four_for_the_base_and_six_for_themselves(config):
  assert count(config, ADAPTERS) == {
    "decoder": 4 * 20 * 2 * LAYER,
    "adapters": 6 * 20 * 2 * LORA,
    "router": 6 * 20 * 2 * 16 * 3,
    "head": 4 * 20 * 16 * 40,
    # Rows x layers x (T^2 / 2) x width x 2 products x 2 FLOPs x 3 passes.
    "attention": 2 * 2 * 50 * 16 * 2 * 2 * 3,
    # Nothing before the decoder is trained: forward only.
    "projector": 2 * 8 * (16 * 16 + 16 * 16),
    "vision": 2 * 8 * 48 * 16
    + 2 * 10 * 2 * (4 * 16 * 16 + 2 * 16 * 24)
    + 2 * 2 * 25 * 16 * 2 * 2,
  }


def test_training_everything_costs_six(config):
  full = count(config, ALL)
  adapters = count(config, ADAPTERS)
  assert full["decoder"] == adapters["decoder"] / 4 * 6
  assert full["head"] == adapters["head"] / 4 * 6
  assert full["projector"] == adapters["projector"] / 2 * 6
  layers = 6 * 10 * 2 * (4 * 16 * 16 + 2 * 16 * 24) + 6 * 2 * 25 * 16 * 2 * 2
  assert full["vision"] == 4 * 8 * 48 * 16 + layers  # Pixels: no gradient.
  for part in ("attention", "adapters", "router"):
    assert full[part] == adapters[part]


def test_a_trained_projector_needs_no_gradient_of_the_features(config):
  parts = count(config, (*ADAPTERS, r"projector/.*"))
  assert parts["projector"] == 4 * 8 * 16 * 16 + 6 * 8 * 16 * 16
  assert parts["vision"] == count(config, ADAPTERS)["vision"]


def test_a_trained_head_alone_needs_one_forward_pass_before_it(config):
  parts = count(config, (r"decoder/lm_head",))
  assert parts["head"] == 4 * 20 * 16 * 40
  assert parts["decoder"] == 2 * 20 * 2 * LAYER
  assert parts["attention"] == 2 * 2 * 50 * 16 * 2 * 2


def test_a_mixture_counts_the_experts_that_a_token_uses(config):
  values = small.VALUES | {"use_visual_tokens": False}

  def adapters(num_experts, top_k):
    mole = dict(num_experts=num_experts, top_k=top_k, rank=2, alpha=4.0)
    lora = dict(rank=0, alpha=4.0, dropout=0.0)
    changed = llava.make_config(values | {"mole": mole, "lora": lora})
    return count(changed, (r".*/lora_[ab]",))["adapters"]

  assert adapters(1, 1) == adapters(8, 1) == adapters(8, 2) / 2 > 0


def test_features_in_place_of_pixels_leave_the_tower_out(config):
  parts = count(config, ADAPTERS, uses_features=True)
  assert parts["vision"] == 0
  assert parts["projector"] == count(config, ADAPTERS)["projector"]


def test_text_alone_costs_nothing_for_images(config):
  parts = count(config, ADAPTERS, images=0)
  assert parts["vision"] == parts["projector"] == 0


@pytest.mark.parametrize("form", [{}, small.PHI], ids=["Llama", "Phi"])
def test_every_matrix_of_the_model_is_counted_once(form):
  config = llava.make_config(small.changed(decoder=form))
  products = {
    product.name: product.macs
    for product in flops.decoder_products(config)
    + [*flops.projector_products(config), *flops.tower_products(config)]
  }
  shapes = state.parameter_shapes(config)
  for name, leaf in shapes.items():
    if name.endswith(("kernel", "lora_a", "lora_b", "lm_head")):
      used = 1 if "/lora_" not in name or "attn" in name else 1 / 3
      if name != "vision/patch_embedding/kernel":
        assert products.pop(name) == used * leaf.size, name
  assert not products


def test_llava_7b_costs_about_28_gflop_a_token():
  values = small_run.rundir.plain(small_run.read_config("lora", "7b"))
  config = state.model_config(values, "mole")
  patterns = values["stages"]["mole"]["trainable"]
  parts = count(config, patterns, rows=1, tokens=2048, images=1)
  decoder = ("decoder", "attention", "adapters", "head")
  per_token = sum(parts[part] for part in decoder) / 2048
  # 32 layers of 4 x 4096^2 + 3 x 4096 x 11008, a head of 32064 x 4096.
  layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
  lora = 32 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
  attention = 6 * 32 * 2048 * 4096
  wanted = 4 * (layers + 32064 * 4096) + 6 * lora + attention
  assert per_token == wanted
  assert 28e9 < per_token < 28.7e9


def test_it_is_what_the_traced_step_multiplies():
  # As many positions as the loss takes at once, so that nothing is padded.
  values = small_run.make_config(
    max_length=stage_lib.CHUNK_TOKENS, batch_size=2
  )
  stage = small_run.make_stage(values, "base")
  shapes, settings = stage.state_shapes(), stage.settings
  size = [settings[key] for key in ("batch_size", "max_length", "max_images")]
  batch = step.batch_shapes(
    batch_size=size[0],
    max_length=size[1],
    max_images=size[2],
    max_segments=settings["max_segments"],
    image_size=stage.model_config.vision.image_size,
  )
  traced = jax.make_jaxpr(stage.train_step)(
    shapes.trainable, {}, shapes.opt_state, batch, np.int32(0)
  )
  parts = flops.step_flops_by_part(
    stage.model_config, stage.trainable_shapes, *size
  )
  # What the formula leaves out: of the upper triangle what lies in blocks on
  # the diagonal, and logits that are computed again backward.
  num_blocks = settings["max_length"] // block_attention.BLOCK
  known = sum(parts.values()) + parts["attention"] / num_blocks
  known += parts["head"] / 3
  # The rest: a gradient of pixels (dead code), sums by domain.
  assert products_of(traced.jaxpr) == pytest.approx(known, rel=2e-3)


def products_of(jaxpr):
  """FLOPs of every matrix product in a program, loops counted in full."""
  total = 0
  for equation in jaxpr.eqns:
    parameters = equation.params
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = parameters["dimension_numbers"]
      depth = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2 * math.prod([*equation.outvars[0].aval.shape, *depth])
    times = parameters["length"] if equation.primitive.name == "scan" else 1
    for inner in inner_programs(list(parameters.values())):
      total += times * products_of(inner)
  return total


def inner_programs(value):
  if isinstance(value, list | tuple):
    return [found for entry in value for found in inner_programs(entry)]
  value = getattr(value, "jaxpr", value)
  return [value] if hasattr(value, "eqns") else []
