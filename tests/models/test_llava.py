"""The whole model: images in their places, any number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import llava
from tests.models import small

IMAGE = small.VALUES["image_token_id"]


def run(model, params, ids, pixels, segment_ids=None):
  tokens = ids.shape[1]
  if segment_ids is None:
    segment_ids = jnp.ones_like(ids)
  positions = jnp.broadcast_to(jnp.arange(tokens), ids.shape)
  return small.apply(model, params, ids, pixels, positions, segment_ids, 2)


def test_features_go_to_the_image_positions_in_order():
  x = jnp.zeros((2, 7, 2))
  is_image = jnp.asarray([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0]], bool)
  features = 1.0 + jnp.arange(2 * 4 * 2.0).reshape(2, 4, 2)
  placed = llava.place_image_features(x, features, is_image)
  np.testing.assert_array_equal(placed[0, jnp.array([1, 2, 4, 5])], features[0])
  # The second row has one image of two: the other one's features are dropped.
  np.testing.assert_array_equal(placed[1, 3:5], features[1, :2])
  assert jnp.all(placed[~is_image] == 0)


def test_number_of_image_tokens_counts_start_and_end():
  config, _, _ = small.make()
  assert config.num_image_tokens == 4 + 2
  config, _, params = small.make(use_visual_tokens=False)
  assert config.num_image_tokens == 4
  assert "visual_start" not in params


def test_unused_image_slots_change_nothing():
  config, model, params = small.make()
  ids = jnp.asarray([[1, 5, *[IMAGE] * 6, 7, 8]])
  pixels = jax.random.normal(jax.random.key(0), (1, 1, 8, 8, 3))
  more = jnp.concatenate([pixels, 9 * jnp.ones((1, 2, 8, 8, 3))], axis=1)
  one = run(model, params, ids, pixels).hidden
  np.testing.assert_allclose(
    run(model, params, ids, more).hidden, one, rtol=1e-5, atol=1e-6
  )


def test_a_row_of_text_needs_no_image():
  config, model, params = small.make()
  ids = jnp.asarray([[1, 5, 6, 7]])
  without = run(model, params, ids, None).hidden
  unused = jnp.ones((1, 2, 8, 8, 3))
  np.testing.assert_allclose(
    run(model, params, ids, unused).hidden, without, rtol=1e-5, atol=1e-6
  )


def test_two_images_in_a_row_keep_their_order():
  config, model, params = small.make()
  ids = jnp.asarray([[1, *[IMAGE] * 6, 5, *[IMAGE] * 6, 7]])
  pixels = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 3))
  once = run(model, params, ids, pixels).hidden
  swapped = run(model, params, ids, pixels[:, ::-1]).hidden
  assert jnp.abs(once - swapped).max() > 1e-3


def test_wrong_keys_of_a_model_are_listed():
  values = small.changed(decoder={"width": 3})
  with pytest.raises(ValueError, match=r"config.model.decoder has no \['wid"):
    llava.make_config(values)
  with pytest.raises(ValueError, match="lacks the section 'vision'"):
    llava.make_config({"image_token_id": 3})
