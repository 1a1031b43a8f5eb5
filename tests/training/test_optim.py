"""Schedule, groups, clipping and AdamW against a NumPy step."""

import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.training import optim

SETTINGS = dict(
  lr=0.1,
  lr_factors={"projector": 0.1},
  warmup_ratio=0.2,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.5,
  clip_norm=1.0,
)


def test_schedule_warms_up_and_decays_to_zero():
  schedule = optim.make_schedule(0.1, 0.2, 10)
  values = [float(schedule(i)) for i in range(11)]
  assert values[0] == 0 and values[1] == pytest.approx(0.05)
  assert values[2] == pytest.approx(0.1)
  expected = [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(9)]
  np.testing.assert_allclose(values[2:], expected, atol=1e-7)


def test_first_steps_are_adamw_clipped_with_factors():
  names = ["projector/linear_1/kernel", "decoder/lm_head", "decoder/norm/scale"]
  names += ["decoder/lm_head_bias", "decoder/norm/bias"]
  optimizer, schedule = optim.make_optimizer(SETTINGS, names, 10)
  params = {name: jnp.asarray([[1.0, -2.0]]) for name in names}
  state = optimizer.init(params)
  rng = np.random.default_rng(0)
  moments = {name: (np.zeros((1, 2)), np.zeros((1, 2))) for name in names}
  for number in range(1, 4):
    grads = {name: rng.normal(size=(1, 2)) for name in names}
    updates, state = optimizer.update(
      {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()},
      state,
      params,
    )
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    for name in names:
      g = grads[name] * min(1.0, 1.0 / norm)
      m = 0.9 * moments[name][0] + 0.1 * g
      v = 0.99 * moments[name][1] + 0.01 * g**2
      moments[name] = (m, v)
      adam = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.99**number)) + 1e-8)
      decay = 0.0 if name.endswith(("scale", "bias")) else 0.5
      factor = 0.1 if name.startswith("projector") else 1.0
      rate = float(schedule(number - 1)) * factor
      expected = -rate * (adam + decay * np.array([[1.0, -2.0]]))
      np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-8)


def test_the_longest_prefix_sets_the_factor():
  names = ["projector/linear_1/kernel", "projector/linear_2/kernel", "x"]
  factors = {"projector": 0.1, "projector/linear_2": 0.5}
  assert list(optim.learning_rate_factors(names, factors).values()) == [
    0.1,
    0.5,
    1.0,
  ]
  with pytest.raises(ValueError, match="prefix of no trainable parameter"):
    optim.learning_rate_factors(names, {"vision": 0.1})


def test_a_warm_up_longer_than_the_run_is_refused():
  with pytest.raises(ValueError, match="warmup_ratio=1.0"):
    optim.make_schedule(0.1, 1.0, 10)
