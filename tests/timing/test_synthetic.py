import jax
import numpy as np
import pytest

from mole_jax.timing import synthetic
from mole_jax.training import step
from tests.training import small_run


@pytest.fixture(scope="module")
def stage():
  config = small_run.make_config()
  config["base"]["dtype"] = "bfloat16"
  config["mesh"]["fsdp"] = 2
  return small_run.make_stage(config, "mole", num_devices=2)


def test_weights_have_the_types_and_places_of_the_stage(stage):
  (trainable, opt_state), frozen = synthetic.parameters(stage)
  wanted = stage.state_shapes()
  for name, leaf in wanted.trainable.items():
    assert trainable[name].shape == leaf.shape
    assert trainable[name].dtype == "float32"
    assert trainable[name].sharding == leaf.sharding
  for name, leaf in stage.frozen_shapes.items():
    assert frozen[name].shape == leaf.shape
    assert frozen[name].dtype == "bfloat16"
    assert frozen[name].sharding == stage.shardings["frozen"][name]
  assert jax.tree.structure(opt_state) == jax.tree.structure(wanted.opt_state)


def test_weights_are_made_without_copies_in_another_type(stage):
  analysis = synthetic.maker(stage).lower(jax.random.key(0)).compile()
  memory = analysis.memory_analysis()
  largest = max(leaf.size for leaf in stage.frozen_shapes.values())
  # At most the float32 draws of one layer's or embedding's parameters.
  assert memory.temp_size_in_bytes < 8 * 4 * largest


def test_no_weight_but_biases_is_zero_and_layers_differ(stage):
  (trainable, _), frozen = synthetic.parameters(stage)
  for name, leaf in {**trainable, **frozen}.items():
    values = np.asarray(leaf, np.float32)
    assert np.any(values) != name.endswith("bias"), name
    if "layers/" in name and name.endswith("kernel"):
      assert np.any(values[0] != values[1]), name


def test_batches_fit_the_step_and_use_every_image_slot(stage):
  batch, settings = synthetic.batch(stage), stage.settings
  wanted = step.batch_shapes(
    batch_size=settings["batch_size"],
    max_length=settings["max_length"],
    max_images=settings["max_images"],
    max_segments=settings["max_segments"],
    image_size=stage.model_config.vision.image_size,
  )
  del wanted["signals"]  # The loop says that.
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in wanted.items()
  }
  is_image = batch["input_ids"] == stage.model_config.image_token_id
  taken = stage.model_config.num_image_tokens
  assert np.all(is_image.sum(1) == settings["max_images"] * taken)
  assert np.all((batch["labels"] < 0) == is_image)
  assert np.all(batch["segment_ids"] > 0)
  # Two images, so two segments a row, with positions of their own.
  assert synthetic.num_samples(batch) == 2 * settings["batch_size"]
  starts = batch["positions"] == 0
  assert np.all(starts.sum(1) == 2)
  for segment in (1, 2):
    inside = (batch["segment_ids"] == segment) & is_image
    assert np.all(inside.sum(1) == taken)


def test_rows_too_short_for_their_images_are_refused():
  stage = small_run.make_stage(small_run.make_config(max_length=13), "mole")
  with pytest.raises(ValueError, match="set max_length to 14 or more"):
    synthetic.batch(stage)
  stage = small_run.make_stage(small_run.make_config(max_length=14), "mole")
  assert synthetic.num_samples(synthetic.batch(stage)) == 4  # One a row.
