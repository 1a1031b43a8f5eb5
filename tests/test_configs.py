"""The recipes: they build, count their parameters and lower, weights or not."""

import jax
import pytest

from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import rundir, state
from mole_jax.training import stage as stage_lib
from tests.training import small_run

ONE = dict(data=1, fsdp=1, expert=1, tensor=1)


def make_stage(name, variant):
  config = rundir.plain(small_run.read_config(name, variant))
  mesh = mesh_lib.make_mesh(ONE, jax.devices()[:1])
  return stage_lib.Stage(config, config["stage_names"][-1], mesh)


def test_7b_has_the_parameters_of_the_paper():
  counts = make_stage("mole3", "7b").counts
  assert counts["experts"][0] == 32 * 3 * 32 * 3 * (4096 + 11008)
  assert counts["experts"][0] / 1e6 == pytest.approx(139.2, abs=0.05)
  assert counts["attention LoRA"][0] / 1e6 == pytest.approx(33.6, abs=0.05)
  assert counts["routers"][0] / 1e6 == pytest.approx(0.39, abs=0.005)
  # Vicuna-7B with its 64 rows of padding: 6.738 B + 2 x 64 x 4096.
  assert counts["decoder"][1] == 6_738_415_616 + 2 * 64 * 4096
  # CLIP ViT-L/14 at 336 px without its final norm, which LLaVA never uses.
  assert counts["vision"][1] == 303_507_456 - 2 * 1024


def test_13b_has_the_parameters_of_vicuna():
  counts = make_stage("mole3", "13b").counts
  assert counts["decoder"][1] == 13_015_864_320 + 2 * 64 * 5120


@pytest.mark.parametrize("name", ["mole3", "lora", "dense"])
def test_real_recipes_lower_without_weights(name):
  text = make_stage(name, "7b").lower().as_text()
  assert "4096x11008" in text


@pytest.mark.parametrize("name", ["mole3", "lora", "dense"])
def test_small_has_the_shapes_that_timings_are_told_of(name):
  stage = make_stage(name, "small")
  experts = 1 if name == "lora" else 3
  # Rank 32 on gate, up and down of 8 layers.
  counts = stage.counts
  assert counts["experts"][0] == 8 * experts * 32 * 3 * (512 + 1376)
  layer = 4 * 512**2 + 3 * 512 * 1376 + 2 * 512
  assert counts["decoder"][1] == 8 * layer + 2 * 8192 * 512 + 512
  # 64 positions of the image, 192 of text.
  assert stage.model_config.num_image_tokens == 64
  assert stage.settings["max_length"] == 256


@pytest.mark.parametrize("name", ["mole3", "lora", "dense"])
def test_every_tiny_stage_builds(name):
  config = rundir.plain(small_run.read_config(name))
  mesh = mesh_lib.make_mesh(ONE, jax.devices()[:1])
  for stage in config["stage_names"]:
    counts = stage_lib.Stage(config, stage, mesh).counts
    assert sum(trainable for trainable, _ in counts.values()) > 0


def test_baselines_differ_from_mole3_in_the_mixture_alone():
  mole3, lora, dense = (
    rundir.plain(small_run.read_config(name))
    for name in ("mole3", "lora", "dense")
  )
  keys = lambda other: {
    line.split(":")[0] for line in rundir.differences(mole3, other)
  }
  assert keys(lora) == {
    "name",
    "model.mole.num_experts",
    "stages.mole.trainable",
  }
  assert keys(dense) == {"name", "model.mole.top_k", "model.mole.gate"}


def test_a_wrong_variant_names_the_right_ones():
  for name in ("mole3", "lora", "dense"):
    with pytest.raises(ValueError, match="'70b' is unknown; use one of tiny"):
      small_run.read_config(name, "70b")


def test_dense_mixture_trains_its_router_with_the_language_loss():
  config = rundir.plain(small_run.read_config("dense"))
  model = state.model_config(config, "mole").mole
  assert (model.top_k, model.gate) == (model.num_experts, "prob")


def test_smol_shape_has_the_parameters_of_smollm2_135m():
  counts = make_stage("mole3", "smol_shape").counts
  assert counts["decoder"][1] == 134_515_008
