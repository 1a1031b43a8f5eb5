"""PEFT adapter folders: plain LoRA in, and the words of PEFT for out.

Names as PEFT 0.21 stores them for a `LlavaForConditionalGeneration` or a
decoder alone: `base_model.model.<module>.lora_A.weight`, modules that were
trained whole under their own name. haotian-liu/LLaVA's LoRA runs are the same
with the projector in `non_lora_trainables.bin`.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop import hf_json, names
from mole_jax.interop.sources import (
  NO_LORA,
  NO_MIXTURE,
  Located,
  Source,
  Store,
)
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder, ffn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGINAL_PROJECTOR = pathlib.Path("non_lora_trainables.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.*)\.lora_(A|B)(?:\.\w+)?\.weight")
# Settings that the tensors show, or that are read below.
_FOLLOWED = {
  "alpha_pattern",
  "lora_alpha",
  "lora_dropout",
  "modules_to_save",
  "r",
  "rank_pattern",
  "target_modules",
  "use_rslora",
}
# Settings that change nothing once an adapter is trained.
_IGNORED = {
  "auto_mapping",
  "base_model_name_or_path",
  "ensure_weight_tying",
  "eva_config",
  "exclude_modules",
  "inference_mode",
  "layers_pattern",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
}
# Any other setting changes the mathematics where it is set at all. Of these,
# some values do not: the other initialisations change the base.
_PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_MERGE = "Merge the adapter into its base with PEFT and convert that."


def read_adapter(
  path: pathlib.Path, stores: Sequence[Store], model: Mapping[str, Any]
) -> Source:
  """An adapter folder as a `Source`: plain LoRA, its base to be given.

  Args:
    path: the folder, with adapter_config.json.
    stores: its tensors, and those of `non_lora_trainables.bin`.
    model: what the config.json of the original LLaVA says of its base; else
      empty.

  Raises CheckpointError for an adapter that is no plain LoRA on q, k, v, o
  (one rank and factor) and gate, up, down or fc1, fc2 (one rank and factor).
  """
  where = path / CONFIG_FILE
  values = hf_json.read_json(where)
  _check_plain(where, values)
  places: dict[str, tuple[Store, str]] = {}
  unknown = []
  for store in stores:
    for name in store.infos:
      meant = canonical(name)
      if meant is None or meant in places:
        unknown.append(name)
      else:
        places[meant] = (store, name)
  if unknown:
    raise CheckpointError(
      f"{path}: tensors that are no LoRA on a decoder's linear maps and no "
      f"part of LLaVA. {_MERGE}\n  " + "\n  ".join(sorted(unknown))
    )
  lora = _group(where, values, places, "self_attn")
  mole = _group(where, values, places, "mlp")
  if lora is None and mole is None:
    raise CheckpointError(f"{path} holds no LoRA matrix.")
  sections = {
    "lora": NO_LORA if lora is None else lora,
    "mole": NO_MIXTURE if mole is None else {"num_experts": 1, **mole},
  }
  base = values.get("base_model_name_or_path")
  kind = ("original LLaVA LoRA" if model else "LoRA") + (
    f" for {base}" if base else ""
  )
  tensors = {
    # One expert: the experts' axis is there, of size 1.
    name: Located((place,), is_stacked=".mlp." in name and ".lora_" in name)
    for name, place in places.items()
  }
  return Source(kind, {**model, **sections}, tensors)


def _check_plain(where: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Raises CheckpointError for settings that make it more than plain LoRA."""
  problems = []
  for key, value in values.items():
    allowed = _PLAIN.get(key, ())
    is_known = key in _FOLLOWED or key in _IGNORED
    if value and not is_known and value not in allowed:
      wanted = " or ".join(map(repr, allowed)) or "nothing"
      problems.append(f"{key} is {value!r}; wanted {wanted}")
  if problems:
    raise CheckpointError(
      f"{where} is not that of plain LoRA. {_MERGE}\n  " + "\n  ".join(problems)
    )


def canonical(name: str) -> str | None:
  """The canonical name of a tensor in an adapter; None if it has none."""
  stem = name.removeprefix(PREFIX)
  found = _FACTOR.fullmatch(stem)
  module = found[1] + ".weight" if found else stem
  try:
    (meant,), _ = names.canonical([module])
  except (CheckpointError, ValueError):
    return None
  if not found:  # Of an embedding, of DoRA: no pair of matrices.
    return None if ".lora_" in meant else meant
  meant = meant.removesuffix("weight") + f"lora_{found[2].lower()}"
  pattern = re.sub(r"\.layers\.\d+\.", ".layers.{}.", meant)
  return meant if pattern in names.ADAPTER_TENSORS else None


def _group(
  where: pathlib.Path,
  values: Mapping[str, Any],
  places: Mapping[str, tuple[Store, str]],
  part: str,
) -> dict[str, Any] | None:
  """Rank, alpha and dropout of the attention's or the MLP's adapters."""
  found: dict[tuple[int, float], str] = {}
  for name, (store, there) in places.items():
    if f".{part}." not in name or not name.endswith("lora_a"):
      continue
    module = there.removeprefix(PREFIX).split(".lora_")[0]
    rank = int(store.infos[there].shape[0])
    alpha = _alpha(values, module)
    if values.get("use_rslora"):
      # alpha / sqrt(r) there (Kalajdzievski 2023), alpha / r here.
      alpha *= math.sqrt(rank)
    found[rank, alpha] = module
  if not found:
    return None
  if len(found) > 1:
    raise CheckpointError(
      f"{where}: {part} has modules of different rank or alpha ("
      + "; ".join(f"{m}: r={r}, alpha={a:g}" for (r, a), m in found.items())
      + f"), but config.model has one of each. {_MERGE}"
    )
  ((rank, alpha),) = found
  dropout = float(values.get("lora_dropout", 0.0))
  return {"rank": rank, "alpha": alpha, "dropout": dropout}


def _alpha(values: Mapping[str, Any], module: str) -> float:
  """Alpha of a module: that of the first pattern that PEFT matches it with."""
  for pattern, alpha in (values.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return float(alpha)
  return float(values["lora_alpha"])


def stored_name(canonical_name: str) -> str:
  """A canonical name as PEFT stores it for stock LLaVA of Transformers 5."""
  for x in "ab":
    if canonical_name.endswith(f".lora_{x}"):
      stem = canonical_name.removesuffix(f".lora_{x}")
      return f"{PREFIX}{names.in_memory(stem)}.lora_{x.upper()}.weight"
  return PREFIX + names.in_memory(canonical_name)


def adapter_config(model: Mapping[str, Any]) -> dict[str, Any]:
  """adapter_config.json of plain LoRA, or of one expert of a mixture.

  `model` is config.model. The base has no name: PEFT would take one for a path,
  or ask the hub for it.
  """
  lora, mole = model["lora"], model["mole"]
  groups = []
  shape = decoder.DecoderConfig(**model["decoder"])
  if lora["rank"]:
    output = "dense" if shape.is_parallel else "o_proj"
    groups.append((lora, ("q_proj", "k_proj", "v_proj", output)))
  if mole["num_experts"]:
    groups.append((mole, tuple(ffn.linear_shapes(shape.mlp, 1, 1))))
  modules = "|".join(module for _, group in groups for module in group)
  first = groups[0][0]
  # The second group's modules, where they differ from the first's.
  other = {
    key: {
      module: group[key]
      for group, linears in groups[1:]
      for module in linears
      if group[key] != first[key]
    }
    for key in ("rank", "alpha")
  }
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": first["rank"],
    "lora_alpha": first["alpha"],
    "lora_dropout": first["dropout"],
    # A tower has modules of the same names.
    "target_modules": rf".*language_model.*\.({modules})",
    "modules_to_save": ["multi_modal_projector"],
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "inference_mode": True,
    "rank_pattern": other["rank"],
    "alpha_pattern": other["alpha"],
  }
