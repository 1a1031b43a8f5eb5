"""Names of experts that are whole FFNs, in every layout.

Canonically a layer's experts are one tensor a linear map, stacked, and their
router is a map without bias:

    ...layers.0.mlp.experts.gate_proj.weight    [experts, out, in]
    ...layers.0.mlp.gate.weight                 [experts, width]

On disk experts stand apart: Mixtral calls them `block_sparse_moe.experts.0.w1`,
DeepSpeed (hence MoE-LLaVA) `mlp.deepspeed_moe.experts.deepspeed_experts.0.` and
what the map is called in a plain FFN.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.interop import names
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import moe, pattern

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LINEARS = {theirs: ours for ours, theirs in MIXTRAL.items()}
_MIXTRAL_EXPERT = re.compile(
  r"(.*\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.(weight)"
)
DEEPSPEED_EXPERT = re.compile(
  r"(.*\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)"
)
_ROUTERS = {
  ".block_sparse_moe.gate.weight": ".mlp.gate.weight",
  ".mlp.deepspeed_moe.gate.wg.weight": ".mlp.gate.weight",
}


def rows(
  all_rows: Iterable[names.Name], kinds: Sequence[int]
) -> list[names.Name]:
  """Rows of a decoder whose layers have `kinds` experts (0: one FFN).

  Those of plain FFNs are left for the layers that have one, and each number of
  experts brings rows of its own.
  """
  result = list(all_rows)
  if not any(kinds):
    return result
  layers = {kind: _layers(kinds, kind) for kind in dict.fromkeys(kinds)}
  result = [
    row._replace(layers=layers.get(0, ()))
    if row.path.startswith("decoder/layers/mlp/")
    else row
    for row in result
  ]
  for kind, numbers in layers.items():
    if kind:
      result += _of_kind(f"decoder/layers/{pattern.family(kind)}", numbers)
  return result


def _layers(kinds: Sequence[int], kind: int) -> tuple[int, ...]:
  return tuple(i for i, number in enumerate(kinds) if number == kind)


def _of_kind(path: str, layers: tuple[int, ...]) -> Iterator[names.Name]:
  mlp = f"{names.LLM}layers.{{}}.mlp"
  for linear in names.MLP:
    for ours, theirs, kind in (
      ("kernel", "weight", "linear"),
      ("bias", "bias", "same"),
      ("lora_a", "lora_a", "linear"),
      ("lora_b", "lora_b", "linear"),
    ):
      yield names.Name(
        f"{path}/experts/{linear}/{ours}",
        f"{mlp}.experts.{linear}.{theirs}",
        kind,
        layers,
      )
  yield names.Name(
    f"{path}/router/kernel", f"{mlp}.gate.weight", "linear", layers
  )


def gather(
  found: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, list[str]]]:
  """Names that stand alone, and experts' names in the order of the experts.

  `found`: name with a canonical beginning -> name on disk. Raises
  CheckpointError that lists the experts that are missing.
  """
  alone: dict[str, str] = {}
  experts: dict[str, dict[int, str]] = {}
  for name, there in found.items():
    meant = _expert(name)
    if meant is None:
      alone[_router(name)] = there
    else:
      experts.setdefault(meant[0], {})[meant[1]] = there
  missing = [
    f"{name} of expert {expert}"
    for name, places in experts.items()
    for expert in range(1 + max(places))
    if expert not in places
  ]
  if missing:
    raise CheckpointError(
      "experts are missing; download the checkpoint again:\n  "
      + "\n  ".join(missing)
    )
  stacked = {
    name: [places[expert] for expert in range(len(places))]
    for name, places in experts.items()
  }
  return alone, stacked


def _expert(name: str) -> tuple[str, int] | None:
  """The stacked tensor that an expert's belongs to, and which expert."""
  match = _MIXTRAL_EXPERT.fullmatch(name)
  if match:
    stem, expert, linear, weight = match.groups()
    return f"{stem}.mlp.experts.{_LINEARS[linear]}.{weight}", int(expert)
  match = DEEPSPEED_EXPERT.fullmatch(name)
  if match:
    stem, expert, rest = match.groups()
    return f"{stem}.experts.{rest}", int(expert)
  return None


def _router(name: str) -> str:
  for theirs, ours in _ROUTERS.items():
    if name.endswith(theirs):
      return name.removesuffix(theirs) + ours
  return name


def section(kinds: Sequence[int]) -> dict[str, Any]:
  """layers (a word where one tells them) and num_experts of config.model.moe.

  `kinds`: experts of each layer, 0 for a plain FFN.
  """
  layers = [i for i, kind in enumerate(kinds) if kind]
  numbers = [kind for kind in kinds if kind]
  for word in moe.LAYERS:
    named = moe.experts_by_layer(moe.MoeConfig(layers=word), len(kinds))
    if all(bool(a) == bool(b) for a, b in zip(named, kinds, strict=True)):
      layers = word
      break
  if len(set(numbers)) == 1:
    numbers = numbers[0]
  return {"layers": layers, "num_experts": numbers}


def as_mixtral(
  name: str, array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
  """A canonical tensor as Mixtral stores it: its experts apart."""
  match = re.fullmatch(r"(.*)\.mlp\.experts\.(\w+)\.weight", name)
  if match:
    stem, linear = match.groups()
    for expert, part in enumerate(array):
      stored = f"{stem}.block_sparse_moe.experts.{expert}.{MIXTRAL[linear]}"
      yield f"{stored}.weight", part
    return
  yield name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight"), array
