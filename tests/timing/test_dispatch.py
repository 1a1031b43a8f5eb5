import pytest

from mole_jax.timing import dispatch

SHAPE = dispatch.Shape(16, 24, 32, 2, "float32")


def test_every_strategy_is_timed_beside_both_baselines():
  seen = []
  rows = dispatch.measure(
    SHAPE, [3], ("masked", "gather"), 2, lambda *entry: seen.append(entry)
  )
  named = [(row["num_experts"], row["strategy"]) for row in rows]
  assert named == seen
  assert named == [(0, "base"), (1, "lora"), (3, "masked"), (3, "gather")]
  assert [row["is_auto"] for row in rows] == [False, False, True, False]
  assert rows[0]["over_base"]["median"] == 1
  assert rows[1]["over_lora"]["median"] == 1
  for row in rows:
    assert row["seconds"]["count"] == 2
    assert row["seconds"]["median"] > 0


@pytest.mark.parametrize("strategy", dispatch.STRATEGIES)
def test_adapters_and_router_have_gradients_and_the_base_has_none(strategy):
  timed = dispatch._make(SHAPE, 3, strategy)
  gradients, dx = timed.program(*timed.arguments)
  assert not any(name.endswith("_proj/kernel") for name in gradients)
  assert abs(dx).max() > 0
  for name, gradient in gradients.items():
    # Without a gate the router learns from the balance loss alone.
    assert (abs(gradient).max() > 0) == ("router" not in name), name
