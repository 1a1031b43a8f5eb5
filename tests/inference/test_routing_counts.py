"""Counts of experts and pathways where the routing is known beforehand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.inference import answering, routing_counts, scoring
from tests.inference import tiny

NO_PIXELS = np.zeros((0, 8, 8, 3), np.uint8)
IMAGE = 3  # The id at positions of an image.


def make_pair(domain, ids, experts):
  """A question and its prediction; `experts` are [L, T, k], ids [T]."""
  question = answering.Question("q", domain, "side", "What?", "x", NO_PIXELS)
  ids, experts = np.array(ids, np.int32), np.array(experts, np.int32)
  prompt, answer = ids[:-1], ids[-1:]
  return question, answering.Prediction("", "", prompt, answer, experts)


def test_layers_with_fewer_experts_and_tokens_without_are_counted_right(
  tmp_path,
):
  model = tiny.make_moe_model(tmp_path, num_experts=(4, 2))
  pairs = [
    make_pair(
      "a",
      [IMAGE, IMAGE, 9, 9, 8],
      # The last token was never routed; layer 2 chooses one expert.
      [
        [[0, 1], [0, 2], [2, 3], [3, 2], [-1, -1]],
        [[1, -1], [1, -1], [0, -1], [1, -1], [-1, -1]],
      ],
    ),
    make_pair("b", [9, 8], [[[2, 0], [2, 1]], [[0, -1], [0, -1]]]),
  ]
  questions, predictions = zip(*pairs, strict=True)
  routing = routing_counts.count_routing(model, questions, predictions)
  assert routing == {
    "num_layers": 2,
    "layers": (0, 2),
    "num_experts": 4,
    "experts": [4, 2],
    "counts": {
      "a": {
        "image": [[2, 1, 1, 0], [0, 2, 0, 0]],
        "text": [[0, 0, 2, 2], [1, 1, 0, 0]],
      },
      "b": {
        "image": [[0, 0, 0, 0], [0, 0, 0, 0]],
        "text": [[1, 1, 2, 0], [2, 0, 0, 0]],
      },
    },
    "pathways": {
      "image": {"num_tokens": 2, "num_distinct": 1, "commonest": [[[0, 1], 2]]},
      "text": {
        "num_tokens": 4,
        "num_distinct": 2,
        "commonest": [[[2, 0], 3], [[3, 1], 1]],
      },
    },
  }


def test_only_the_commonest_pathways_are_kept_with_the_number_of_all(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(routing_counts, "NUM_PATHWAYS", 2)
  model = tiny.make_moe_model(tmp_path)
  firsts = [[3, 1, 1, 0, 2], [0, 0, 0, 0, 1]]
  pair = make_pair("a", [9] * 5, np.array(firsts)[..., None])
  found = routing_counts.count_pathways(model, [pair[0]], [pair[1]])
  assert found["text"] == {
    "num_tokens": 5,
    "num_distinct": 4,
    "commonest": [[[1, 0], 2], [[0, 0], 1]],  # Ties in order.
  }


def test_a_dense_mixture_counts_the_likeliest_expert():
  chosen = np.array([[[2, 0, 1], [1, 2, 0]]])
  assert routing_counts.distinct(chosen, 3).tolist() == [[[2], [1]]]
  assert routing_counts.distinct(chosen[..., :2], 3).shape == (1, 2, 2)


def test_plain_lora_counts_all_tokens_for_expert_0(tmp_path):
  model = tiny.make_model(tmp_path, num_experts=1)
  pair = make_pair("a", [1, IMAGE, IMAGE, 9, 8], np.zeros((2, 5, 1)))
  routing = routing_counts.count_routing(model, [pair[0]], [pair[1]])
  assert routing["counts"] == {"a": {"image": [[2], [2]], "text": [[3], [3]]}}
  assert (routing["experts"], routing["num_experts"]) == ([1, 1], 1)


def route_by_modality(params):
  """Parameters with which an image token's and a text token's ways are known.

  Attention and FFNs add nothing, so that a token's first coordinate stays what
  its embedding or the projector made it: +1 of text, -1 of images. Routers
  read that alone. Images: 0 then 1 in layer 0, 1 then 0 in layer 2; text: 2
  then 1 and 3 then 0 (second choices are ties, which go to the first).
  """
  params = dict(params)
  for name, leaf in params.items():
    if name.startswith("decoder/") and name.endswith("/scale"):
      params[name] = jnp.ones_like(leaf)
    elif "o_proj" in name or "down_proj" in name or "linear_2" in name:
      params[name] = jnp.zeros_like(leaf)
  bias = params["projector/linear_2/bias"]
  params["projector/linear_2/bias"] = bias.at[0].set(-1.0)
  table = params["decoder/embed_tokens"]
  params["decoder/embed_tokens"] = table.at[:, 0].set(1.0)
  router = np.zeros(params["decoder/layers/moe_x4/router/kernel"].shape)
  router[0, 0, [0, 2]] = -1.0, 1.0
  router[1, 0, [1, 3]] = -1.0, 1.0
  params["decoder/layers/moe_x4/router/kernel"] = jnp.asarray(
    router, jnp.float32
  )
  return params


@pytest.fixture(scope="module")
def known(tmp_path_factory):
  """The folder of an evaluation, done as always, of `route_by_modality`."""
  folder = tmp_path_factory.mktemp("known")
  model = tiny.make_moe_model(folder, change=route_by_modality)
  asked = [("Which side?", "left", "side")]
  rows = [
    tiny.make_record(0, "general", asked),
    tiny.make_record(1, "general", asked, has_image=False),
  ]
  scoring.evaluate(
    model, {"general": rows}, folder / "out", batch_size=2, max_new_tokens=3
  )
  return folder / "out"


def test_a_model_whose_routers_read_the_modality_is_counted_as_made(known):
  routing = json.loads((known / "routing.json").read_text())
  assert (routing["layers"], routing["experts"]) == ([0, 2], [4, 4])
  counts = routing["counts"]["general"]
  num_text = counts["text"][0][2]
  assert num_text > 2 * len("Which side?")
  assert counts == {
    "image": [[4, 4, 0, 0], [4, 4, 0, 0]],  # 2 x 2 patches.
    "text": [[0, num_text, num_text, 0], [num_text, 0, 0, num_text]],
  }
  assert routing["pathways"] == {
    "image": {"num_tokens": 4, "num_distinct": 1, "commonest": [[[0, 1], 4]]},
    "text": {
      "num_tokens": num_text,
      "num_distinct": 1,
      "commonest": [[[2, 3], num_text]],
    },
  }


def test_samples_have_both_choices_of_each_token(known):
  samples = json.loads((known / "samples.json").read_text())
  for sample in samples:
    for token in sample["tokens"]:
      assert token["experts"] == [2, 3]
      assert token["choices"] == [[2, 1], [3, 0]]
  images = [sample["image_experts"] for sample in samples if sample["image"]]
  assert images == [[[0] * 4, [1] * 4]]
