"""Two dictionaries by path patterns."""

import pytest

from mole_jax.training import state
from tests.training import small_run

TREE = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_flat_names_are_paths_and_go_back():
  flat = state.flatten(TREE)
  assert flat == {"a/b": 1, "a/c/d": 2, "e": 3}
  assert state.unflatten(flat) == TREE


def test_every_parameter_is_in_exactly_one_dictionary():
  flat = state.flatten(TREE)
  trainable, frozen = state.split(flat, [r"a/.*"])
  assert trainable == {"a/b": 1, "a/c/d": 2}
  assert frozen == {"e": 3}


def test_a_pattern_that_matches_nothing_is_an_error_with_a_name():
  config = small_run.make_config()
  shapes = state.parameter_shapes(state.model_config(config, "mole"))
  with pytest.raises(ValueError, match=r"matches no parameter.*lora_"):
    state.split(shapes, [r".*/lora_c"])
  with pytest.raises(ValueError, match="no regular expression"):
    state.split(shapes, [r"(lora"])


def test_a_stage_without_adapters_has_none():
  config = small_run.make_config()
  base = state.parameter_shapes(state.model_config(config, "base"))
  mole = state.parameter_shapes(state.model_config(config, "mole"))
  new = set(mole) - set(base)
  assert set(base) < set(mole)
  assert all("lora_" in name or "router/" in name for name in new)


def test_counts_add_up_to_the_model():
  config = small_run.make_config()
  shapes = state.parameter_shapes(state.model_config(config, "mole"))
  patterns = config["stages"]["mole"]["trainable"]
  counts = state.count_parameters(shapes, patterns)
  total = sum(trainable + frozen for trainable, frozen in counts.values())
  assert total == sum(leaf.size for leaf in shapes.values())
  # Router: (16 + 1) x 3 experts x 2 layers.
  assert counts["routers"] == (102, 0)
