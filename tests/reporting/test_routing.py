"""Shares and pathways by hand-made counts."""

import numpy as np

from mole_jax.reporting import routing


def make_routing():
  """Two layers, the second of which has two experts."""
  return {
    "num_layers": 2,
    "layers": [0, 2],
    "num_experts": 3,
    "experts": [3, 2],
    "counts": {
      "a": {"image": [[3, 1, 0], [0, 4, 0]], "text": [[1, 3, 0], [2, 2, 0]]},
      "b": {"image": [[0, 0, 0], [0, 0, 0]], "text": [[0, 4, 0], [4, 0, 0]]},
    },
    "pathways": {
      "image": {"num_tokens": 4, "num_distinct": 2, "commonest": []},
      "text": {"num_tokens": 0, "num_distinct": 0, "commonest": []},
    },
  }


def test_expert_shares_are_counts_over_their_sum():
  made = make_routing()
  np.testing.assert_allclose(
    routing.expert_shares(made, "a"), [[0.5, 0.5, 0], [0.25, 0.75, 0]]
  )
  image = routing.expert_shares(made, "b", "image")
  assert np.isnan(image).all()
  np.testing.assert_allclose(
    routing.expert_shares(made), [[4 / 12, 8 / 12, 0], [0.5, 0.5, 0]]
  )


def test_image_shares_are_of_the_tokens_that_an_expert_serves():
  made = make_routing()
  np.testing.assert_allclose(
    routing.image_shares(made), [[3 / 4, 1 / 8, np.nan], [0, 4 / 6, np.nan]]
  )
  np.testing.assert_allclose(
    routing.balanced_image_shares(made), [1 / 3, 1 / 3]
  )


def test_an_expert_that_starves_is_not_one_that_a_layer_does_not_have():
  made = make_routing()
  assert routing.has_expert(made).tolist() == [[True] * 3, [True, True, False]]


def test_files_that_name_neither_layers_nor_experts_mean_all_of_them():
  made = make_routing()
  del made["layers"], made["experts"]
  assert routing.layers(made) == (0, 1)
  assert routing.experts_by_layer(made).tolist() == [3, 3]


def test_pathways_are_shares_of_all_tokens_of_their_modality():
  made = make_routing()
  made["pathways"]["image"]["commonest"] = [[[0, 1], 2], [[1, 1], 1]]
  found = routing.pathways(made, "image", most=1)
  assert found.chosen.tolist() == [[0, 1]]
  assert found.shares.tolist() == [0.5]
  assert (found.num_tokens, found.num_distinct) == (4, 2)
  assert routing.pathways(made, "text") is None


def test_layers_are_spread_with_both_ends():
  assert routing.choose_layers(4) == (0, 1, 2, 3)
  assert routing.choose_layers(1) == (0,)
  assert routing.choose_layers(32) == (0, 10, 21, 31)
