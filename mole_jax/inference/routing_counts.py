"""Which experts served a benchmark's tokens: counts by layer, and pathways."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mole_jax.inference import answering, pretrained

MODALITIES = ("image", "text")
NUM_PATHWAYS = 100


def count_routing(
  model: pretrained.Model,
  questions: Sequence[answering.Question],
  predictions: Sequence[answering.Prediction],
) -> dict[str, Any]:
  """What routing.json holds: of which layers, and what they chose.

  `layers` are the decoder's layers whose tokens choose, `experts` how many
  each of them has, `num_experts` the most; lists by layer are in this order.
  A model without a router has one way through each layer.
  """
  layers = model.routed_layers
  experts = [model.experts_of_layers.get(layer, 1) for layer in layers]
  return {
    "num_layers": len(layers),
    "layers": layers,
    "num_experts": max(experts),
    "experts": experts,
    "counts": count_experts(model, questions, predictions),
    "pathways": count_pathways(model, questions, predictions),
  }


def count_experts(
  model: pretrained.Model,
  questions: Sequence[answering.Question],
  predictions: Sequence[answering.Prediction],
) -> dict[str, dict[str, list[list[int]]]]:
  """Tokens that each expert served, prompts and answers.

  Domain -> "image" or "text" -> [experts] for each layer whose tokens choose;
  zeros for experts that a layer does not have. With k experts a token counts k
  times; in a dense mixture, once, for the likeliest.
  """
  num_experts = max(1, model.num_experts)
  shape = (len(model.routed_layers), num_experts)
  counts = {
    q.domain: {key: np.zeros(shape, np.int64) for key in MODALITIES}
    for q in questions
  }
  for q, p in zip(questions, predictions, strict=True):
    for key, members in _members(model, p):
      counts[q.domain][key] += np.stack(
        [
          np.bincount(layer[layer >= 0], minlength=num_experts)
          for layer in distinct(p.experts, num_experts)[:, members]
        ]
      )
  return {
    domain: {key: value.tolist() for key, value in entry.items()}
    for domain, entry in counts.items()
  }


def count_pathways(
  model: pretrained.Model,
  questions: Sequence[answering.Question],
  predictions: Sequence[answering.Prediction],
) -> dict[str, dict[str, Any]]:
  """How often tokens took each pathway: their first choices, layer by layer.

  "image" or "text" -> `num_tokens`, `num_distinct` pathways that they took, and
  the `commonest` of these as [pathway, tokens], NUM_PATHWAYS at most. Lin et
  al. 2024 (arXiv 2401.15947) find pathways by PCA; these are exact.
  """
  counters = {key: collections.Counter() for key in MODALITIES}
  for p in predictions:
    for key, members in _members(model, p):
      counters[key].update(map(tuple, p.experts[:, members, 0].T.tolist()))
  return {
    key: {
      "num_tokens": counter.total(),
      "num_distinct": len(counter),
      "commonest": [
        [list(pathway), count]
        # By number, then in order: the same file for the same counts.
        for pathway, count in sorted(
          counter.items(), key=lambda item: (-item[1], item[0])
        )[:NUM_PATHWAYS]
      ],
    }
    for key, counter in counters.items()
  }


def distinct(
  chosen: Int[np.ndarray, "L T k"], num_experts: int
) -> Int[np.ndarray, "L T k2"]:
  """A dense mixture sends each token everywhere: keep its likeliest."""
  return chosen[..., :1] if chosen.shape[-1] == num_experts else chosen


def _members(
  model: pretrained.Model, prediction: answering.Prediction
) -> Iterator[tuple[str, Bool[np.ndarray, " N"]]]:
  """Each modality and which of the tokens that were routed are of it."""
  ids = np.concatenate([prediction.prompt_ids, prediction.answer_ids])
  is_image = ids == model.image_token_id
  is_routed = prediction.experts[0, :, 0] >= 0
  yield "image", is_image & is_routed
  yield "text", ~is_image & is_routed
