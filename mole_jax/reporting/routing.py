"""Numbers behind the pictures of routing, from what routing.json counts.

Shapes: L layers whose tokens choose, E experts of the layer with most.
"""

import dataclasses
from typing import Any

import numpy as np

MODALITIES = ("image", "text")


@dataclasses.dataclass(frozen=True)
class Pathways:
  """The commonest ways of tokens through the layers.

  chosen: int[P, L], the first choice in each layer, commonest pathway first.
  shares: float[P], of all tokens of the modality.
  num_tokens, num_distinct: tokens of the modality, pathways that they took.
  """

  chosen: np.ndarray
  shares: np.ndarray
  num_tokens: int
  num_distinct: int


def choose_layers(num_layers: int, most: int = 4) -> tuple[int, ...]:
  """At most `most` layers, evenly spread, the first and last among them."""
  places = np.linspace(0, num_layers - 1, min(most, num_layers))
  return tuple(int(round(place)) for place in places)


def layers(routing: dict[str, Any]) -> tuple[int, ...]:
  """Numbers in the decoder of the L layers; older files have all of them."""
  return tuple(routing.get("layers") or range(routing["num_layers"]))


def experts_by_layer(routing: dict[str, Any]) -> np.ndarray:
  """int[L]: experts that each layer has; alike in older files."""
  every = [routing["num_experts"]] * routing["num_layers"]
  return np.array(routing.get("experts") or every)


def has_expert(routing: dict[str, Any]) -> np.ndarray:
  """bool[L, E]: whether a layer has an expert of that number."""
  numbers = np.arange(routing["num_experts"])
  return numbers < experts_by_layer(routing)[:, None]


def expert_shares(
  routing: dict[str, Any],
  domain: str | None = None,
  modality: str | None = None,
) -> np.ndarray:
  """float[L, E]: share of a layer's choices that fell on each expert.

  Of one domain and modality, or of all where None. NaN in a layer that saw no
  token, 0 for an expert that the layer does not have.
  """
  total = _counts(routing, domain, modality)
  return _divide(total, total.sum(axis=-1, keepdims=True))


def image_shares(routing: dict[str, Any]) -> np.ndarray:
  """float[L, E]: of the tokens that an expert serves, how many are of images.

  NaN where it serves none; the rest is text.
  """
  image = _counts(routing, None, "image")
  return _divide(image, image + _counts(routing, None, "text"))


def balanced_image_shares(routing: dict[str, Any]) -> np.ndarray:
  """float[L]: the `image_shares` of experts that see no difference."""
  image = _counts(routing, None, "image").sum(axis=-1)
  return _divide(image, image + _counts(routing, None, "text").sum(axis=-1))


def pathways(
  routing: dict[str, Any], modality: str, most: int = 10
) -> Pathways | None:
  """The commonest pathways of a modality; None where it has no token."""
  entry = routing["pathways"][modality]
  if not entry["num_tokens"]:
    return None
  commonest = entry["commonest"][:most]
  return Pathways(
    np.array([chosen for chosen, _ in commonest], int),
    np.array([count for _, count in commonest]) / entry["num_tokens"],
    entry["num_tokens"],
    entry["num_distinct"],
  )


def _counts(routing, domain: str | None, modality: str | None) -> np.ndarray:
  domains = tuple(routing["counts"]) if domain is None else (domain,)
  modalities = MODALITIES if modality is None else (modality,)
  return np.sum(
    [routing["counts"][d][m] for d in domains for m in modalities],
    axis=0,
    dtype=float,
  )


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """NaN where there is nothing to divide by."""
  empty = np.full(part.shape, np.nan)
  return np.divide(part, whole, out=empty, where=whole > 0)
