"""The CLIP tower against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import vision
from tests.models import small

CONFIG = vision.VisionConfig(
  image_size=12,
  patch_size=4,
  hidden_size=16,
  intermediate_size=24,
  num_layers=3,
  num_heads=2,
)


def make(config=CONFIG):
  tower = vision.VisionTower(config)
  images = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
  shapes = jax.eval_shape(
    lambda: tower.init(jax.random.key(1), images)["params"]
  )
  return tower, small.draw(shapes, 2, scale=0.4), images


def numpy_tower(params, images, config, num_layers):
  """CLIPVisionModel as its paper and its published code run it, float64."""
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  size, width = config.patch_size, config.hidden_size
  side = config.image_size // size

  def norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    variance = (x**2).mean(-1, keepdims=True)
    x = x / np.sqrt(variance + config.layer_norm_eps)
    return x * w["scale"] + w["bias"]

  outputs = []
  for image in np.asarray(images, np.float64):
    rows = [p["class_embedding"]]
    for i in range(side):
      for j in range(side):
        patch = image[i * size : (i + 1) * size, j * size : (j + 1) * size]
        rows.append(patch.reshape(-1) @ p["patch_embedding"]["kernel"])
    x = norm(np.stack(rows) + p["position_embedding"], p["pre_layrnorm"])
    for layer in range(num_layers):
      w = jax.tree.map(lambda v, layer=layer: v[layer], p["layers"])
      linear = lambda name, x, w=w: x @ w[name]["kernel"] + w[name]["bias"]
      y = norm(x, w["layer_norm1"])
      q, k, v = (linear(name, y) for name in ("q_proj", "k_proj", "v_proj"))
      heads = []
      for n in range(config.num_heads):
        cut = slice(
          n * width // config.num_heads, (n + 1) * width // config.num_heads
        )
        scores = q[:, cut] @ k[:, cut].T / np.sqrt(width // config.num_heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, cut])
      x = x + linear("out_proj", np.concatenate(heads, -1))
      y = linear("fc1", norm(x, w["layer_norm2"]))
      x = x + linear("fc2", y / (1 + np.exp(-1.702 * y)))
    outputs.append(x[1:])
  return np.stack(outputs)


@pytest.mark.parametrize(
  ("feature_layer", "num_layers"), [(-1, 3), (-2, 2), (1, 1)]
)
def test_tower_is_clip_up_to_the_feature_layer(feature_layer, num_layers):
  config = dataclasses.replace(CONFIG, feature_layer=feature_layer)
  tower, params, images = make(config)
  assert params["layers"]["fc1"]["kernel"].shape[0] == 3
  features = tower.apply({"params": params}, images)
  assert features.shape == (2, 9, 16)
  expected = numpy_tower(params, images, config, num_layers)
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_layers_behind_the_feature_layer_are_not_run():
  config = dataclasses.replace(CONFIG, feature_layer=-2)
  tower, params, images = make(config)
  loss = lambda p: jnp.square(tower.apply({"params": p}, images)).sum()
  gradient = jax.grad(loss)(params)["layers"]["fc1"]["kernel"]
  assert jnp.all(gradient[2] == 0) and jnp.any(gradient[1] != 0)


def test_patches_run_over_rows_then_columns():
  image = jnp.arange(16.0).reshape(1, 4, 4, 1) * jnp.ones((1, 1, 1, 3))
  patches = vision.patchify(image, 2)
  np.testing.assert_array_equal(patches[0, :, 0], [0, 2, 8, 10])
  np.testing.assert_array_equal(patches[0, 0, ::3], [0, 1, 4, 5])


def test_pixels_that_fill_no_patch_are_left_out():
  image = jnp.arange(25.0).reshape(1, 5, 5, 1) * jnp.ones((1, 1, 1, 3))
  patches = vision.patchify(image, 2)
  np.testing.assert_array_equal(patches, vision.patchify(image[:, :4, :4], 2))


def test_siglip_so400m_makes_a_feature_of_each_of_729_patches():
  config = vision.VisionConfig(
    family="siglip",
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    feature_layer=-2,
  )
  assert config.num_used_layers == 26
  tower = vision.VisionTower(config)
  image = jax.ShapeDtypeStruct((1, 384, 384, 3), "float32")
  key = jax.eval_shape(lambda: jax.random.key(0))
  features, shapes = jax.eval_shape(tower.init_with_output, key, image)
  assert features.shape == (1, 27 * 27, 1152)
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  # Patches, positions; q, k, v, out, two norms, and the MLP of each layer.
  assert sum(sizes) == (14 * 14 * 3 + 1 + 729) * 1152 + 27 * (
    4 * (1152 + 1) * 1152 + 2 * 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
  )


def test_exact_gelu_is_the_erf_one():
  from math import erf, sqrt

  x = np.linspace(-3, 3, 13)
  expected = [0.5 * v * (1 + erf(v / sqrt(2))) for v in x]
  found = vision.activate(jnp.asarray(x, jnp.float32), "gelu")
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(image_size=3), "vision.patch_size=4 must lie .*image_size=3"),
    (dict(num_heads=3), "vision.hidden_size=16 must be a multiple"),
    (dict(hidden_act="relu"), "vision.hidden_act='relu' must be one of"),
    (dict(feature_layer=-5), "vision.feature_layer=-5 must lie between"),
  ],
)
def test_a_wrong_setting_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)
