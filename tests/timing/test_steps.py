"""Numbers of a timed step agree with each other and with the training loop."""

import itertools
import time
import types

import jax
import numpy as np
import pytest

from mole_jax.timing import profile, steps, synthetic
from mole_jax.training import flops, loop, metrics, state
from tests.training import small_run


@pytest.fixture(scope="module")
def stage():
  return small_run.make_stage(small_run.make_config(), "mole")


@pytest.fixture(scope="module")
def compiled(stage):
  return steps.compile_step(stage)


def make_run(stage, step, batches=None):
  batches = batches or steps.synthetic_batches(stage)
  return steps.Run(stage, step, batches, synthetic.parameters(stage))


def test_compilation_is_timed_with_an_empty_cache_and_a_full_one(compiled):
  before = jax.config.jax_compilation_cache_dir
  assert set(compiled.seconds) == {"cold", "warm"}
  assert compiled.seconds["cold"] > compiled.seconds["warm"] > 0
  assert jax.config.jax_compilation_cache_dir == before
  assert compiled.memory["total_gib"] > 0


def test_predicted_memory_counts_donated_arguments_once():
  sizes = {
    "argument_size_in_bytes": 8 * 2**30,
    "output_size_in_bytes": 3 * 2**30,
    "alias_size_in_bytes": 2 * 2**30,
    "temp_size_in_bytes": 4 * 2**30,
    "generated_code_size_in_bytes": 0,
  }
  program = types.SimpleNamespace(
    memory_analysis=lambda: types.SimpleNamespace(**sizes)
  )
  # Outputs of 3, of which 2 lie in arguments.
  assert steps.predicted_memory(program)["total_gib"] == 8 + 1 + 4
  assert (
    steps.predicted_memory(types.SimpleNamespace(memory_analysis=lambda: None))
    is None
  )


def test_a_run_trains_as_the_step_itself_does(stage, compiled):
  run = make_run(stage, compiled.step)
  rows = [run.steps(2), run.steps(1)]
  assert [len(row["seconds"]) for row in rows] == [2, 1]
  (trainable, opt_state), frozen = synthetic.parameters(stage)
  losses = []
  for number, batch in enumerate(itertools.islice(batches_of(stage), 3)):
    trainable, opt_state, values = compiled.step(
      trainable, frozen, opt_state, batch, np.int32(number)
    )
    losses.append(float(values["loss"]))
  np.testing.assert_allclose(run.losses, losses, rtol=1e-6)


def batches_of(stage):
  for batch in steps.synthetic_batches(stage):
    yield loop.to_devices(batch, stage.shardings["batch"])


def test_a_report_follows_from_its_timings(stage):
  rows = {
    "seconds": [0.5, 0.25, 1.0],
    "waited": [0.1, 0.0, 0.075],
    "samples": [4, 4, 4],
    "tokens": [200, 200, 200],
  }
  found = steps.report(stage, rows)
  settings = stage.settings
  positions = settings["batch_size"] * settings["max_length"]
  assert found["tokens_per_second"] == positions / 0.5
  assert found["text_tokens_per_second"] == 200 / 0.5
  assert found["samples_per_second"] == 4 / 0.5
  assert found["stall_share"] == pytest.approx(0.1)
  assert found["mfu"] is None  # A CPU.
  step_flops = flops.step_flops(
    stage.model_config,
    stage.trainable_shapes,
    settings["batch_size"],
    settings["max_length"],
    settings["max_images"],
  )
  assert found["tflops_per_second_per_device"] == step_flops / 0.5 / 1e12
  assert steps.describe(stage)["flops"]["total"] == step_flops


def test_waiting_for_batches_is_told(stage, compiled):
  def slow():
    for batch in steps.synthetic_batches(stage):
      time.sleep(0.2)
      yield batch

  found = make_run(stage, compiled.step, slow()).steps(2)
  assert all(waited >= 0.2 for waited in found["waited"])
  # In the seconds of the step before, which was at work meanwhile.
  assert sum(found["waited"]) < sum(found["seconds"])
  assert steps.report(stage, found)["stall_share"] > 0


def test_a_loss_that_is_not_finite_ends_the_run(stage, compiled):
  (trainable, opt_state), frozen = synthetic.parameters(stage)
  frozen["decoder/norm/scale"] = frozen["decoder/norm/scale"] * np.nan
  weights = (state.TrainState(trainable, opt_state), frozen)
  batches = steps.synthetic_batches(stage)
  run = steps.Run(stage, compiled.step, batches, weights)
  with pytest.raises(metrics.NonFiniteLossError):
    run.steps(1)


def test_a_profile_names_places_of_the_model(stage, compiled):
  run = make_run(stage, compiled.step)
  run.steps(1)
  found = profile.profile(run, compiled.step, 2)
  by_op = sum(row["seconds"] for row in found["by_op"])
  assert 0 < by_op <= found["busy_seconds"] * (1 + 1e-9)
  assert any("decoder/layers/mlp" in place for place in found["by_place"])


def test_places_are_short_and_tell_the_pass():
  scope = "decoder/while/body/closed_call/checkpoint"
  end = "layers/mlp/up_proj/dot_general"
  for name, wanted in (
    (f"jit(f)/jvp(Llava)/{scope}/{end}", f"forward decoder/{end}"),
    (f"jit(f)/transpose(jvp(Llava))/{scope}/{end}", f"backward decoder/{end}"),
    (
      f"jit(f)/transpose(jvp(Llava))/{scope}/rematted_computation/{end}",
      f"recomputed decoder/{end}",
    ),
    ("jit(f)/sqrt", "update sqrt"),
  ):
    assert profile.place(name) == wanted
