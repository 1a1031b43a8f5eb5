"""Our own formats of a mixture: `mole` (whole or without base), `experts`.

mole     config.json, model.safetensors, modeling files; without base also
         base_tensors.json, hashes of the base that belongs to it
experts  expert_0/ ... (PEFT folders), router.safetensors, mixture.json
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.interop import (
  hf_config,
  hf_json,
  hf_processor,
  moe_names,
  names,
  peft,
)
from mole_jax.interop.sources import (
  Located,
  Source,
  Store,
  experts_by_layer,
  located,
)
from mole_jax.interop.tensors import CheckpointError, Folder
from mole_jax.models import decoder, moe
from mole_jax.training import blocks

MODEL_TYPE = "llava_mole"
AUTO_MAP = {
  "AutoConfig": "configuration_llava_mole.LlavaMoleConfig",
  "AutoModelForImageTextToText": (
    "modeling_llava_mole.LlavaMoleForConditionalGeneration"
  ),
}
MIXTURE_FILE = "mixture.json"
ROUTER_FILE = "router.safetensors"
BASE_TENSORS = "base_tensors.json"


def settings(
  model: Mapping[str, Any], balance: Mapping[str, Any]
) -> dict[str, Any]:
  """What `LlavaMoleConfig` says of adapters; `model` is config.model."""
  mole, lora = model["mole"], model["lora"]
  has_experts = mole["num_experts"] > 0
  value = lambda key, default: mole[key] if has_experts else default
  return {
    "num_experts": mole["num_experts"],
    "top_k": value("top_k", 1) if mole["num_experts"] > 1 else 1,
    "gate": value("gate", "none") if mole["num_experts"] > 1 else "none",
    "router_scope": (
      value("router_scope", "layer") if mole["num_experts"] > 1 else "layer"
    ),
    "expert_rank": value("rank", 1),
    "expert_alpha": value("alpha", 1.0),
    "expert_dropout": value("dropout", 0.0),
    "lora_rank": lora["rank"],
    "lora_alpha": lora["alpha"],
    "lora_dropout": lora["dropout"],
    "use_visual_tokens": model["use_visual_tokens"],
    "balance": balance["loss"],
    "balance_weight": balance["weight"],
    **_ffn_settings(model),
  }


def _ffn_settings(model: Mapping[str, Any]) -> dict[str, Any]:
  """What `LlavaMoleConfig` says of experts that are whole FFNs, if any."""
  # A part of a model, such as adapters alone, does not have them.
  kinds = experts_by_layer(model) if "moe" in model else ()
  if not any(kinds):
    return {}
  config = moe.MoeConfig(**model["moe"])
  return {
    "ffn_experts": list(kinds),
    "ffn_top_k": config.top_k,
    "ffn_capacity_factor": config.capacity_factor,
  }


def mole_config(
  model: Mapping[str, Any], balance: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
  """config.json of a LLaVA-MoLE with its own modeling file."""
  return hf_config.llava_config(model, dtype) | {
    "architectures": ["LlavaMoleForConditionalGeneration"],
    "model_type": MODEL_TYPE,
    "auto_map": AUTO_MAP,
    "head_bias": decoder.DecoderConfig(**model["decoder"]).head_bias,
    **settings(model, balance),
  }


def _sections(
  values: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The inverse of `settings`: of config.model, and config.balance."""
  try:
    model = {
      "lora": {
        key: values[f"lora_{key}"] for key in ("rank", "alpha", "dropout")
      },
      "mole": {
        key: values[key]
        for key in ("num_experts", "top_k", "gate", "router_scope")
      }
      | {key: values[f"expert_{key}"] for key in ("rank", "alpha", "dropout")},
      "use_visual_tokens": values["use_visual_tokens"],
    }
    balance = {"loss": values["balance"], "weight": values["balance_weight"]}
    if values.get("ffn_experts"):
      model["moe"] = moe_names.section(values["ffn_experts"]) | {
        "top_k": values["ffn_top_k"],
        "capacity_factor": values["ffn_capacity_factor"],
        "eval_capacity_factor": 0.0,  # PyTorch's code drops nothing.
      }
  except KeyError as error:
    raise CheckpointError(
      f"{where} lacks {error}, which a mixture written by `to-hf` has."
    ) from None
  return model, balance


def read_mole(
  path: pathlib.Path, values: Mapping[str, Any], store: Store
) -> Source:
  """A `mole` folder; one without base needs that base in --llm."""
  where = str(path / "config.json")
  model, balance = _sections(values, where)
  model = hf_config.llava_sections(values, where) | model
  size = hf_processor.processor_size(path)
  if size and model["vision"]["position_grid"]:
    model["vision"]["image_size"] = size
  found, _ = names.canonical(store.infos)
  file = path / BASE_TENSORS
  if not file.exists():
    kind = "LLaVA with experts, as mole_jax writes them"
    return Source(kind, model, located(store, found), balance)
  base = hf_json.read_json(file)
  kind = f"mixture without its base ({base['name']})"
  return Source(
    kind,
    model,
    located(store, found),
    balance,
    base_tensors=_base_tensors(base),
  )


def read_experts(path: pathlib.Path) -> Source:
  """An `experts` folder as a `Source`; its base is given in --llm."""
  where = path / MIXTURE_FILE
  values = hf_json.read_json(where)
  model, balance = _sections(values, str(where))
  if "image_token_index" in values:
    model["image_token_id"] = values["image_token_index"]
  folders = [path / f"expert_{e}" for e in range(model["mole"]["num_experts"])]
  sources = [
    peft.read_adapter(f, [Folder(f, peft.WEIGHTS_FILE)], {}) for f in folders
  ]
  _check_settings(where, model, folders, sources)
  first = sources[0]
  tensors: dict[str, Located] = {}
  for name, place in first.tensors.items():
    absent = [
      folder
      for folder, source in zip(folders, sources, strict=True)
      if name not in source.tensors
    ]
    if absent:
      raise CheckpointError(
        f"{absent[0]} lacks {name}, which {folders[0]} has; experts must have "
        "the same modules."
      )
    if ".mlp." in name:
      parts = tuple(source.tensors[name].parts[0] for source in sources)
      tensors[name] = Located(parts, is_stacked=True)
      continue
    # Attention's LoRA and the projector: one for all, a copy in each.
    wanted = place.read()
    for folder, source in zip(folders[1:], sources[1:], strict=True):
      if not np.array_equal(wanted, source.tensors[name].read()):
        raise CheckpointError(
          f"{name} differs between {folders[0]} and {folder}: a mixture has "
          "one for all its experts."
        )
    tensors[name] = place
  router = Folder(path, ROUTER_FILE)
  found, _ = names.canonical(router.infos)
  tensors |= located(router, found)
  kind = f"{len(folders)} PEFT experts with their router"
  hashes = _base_tensors(values["base"])
  return Source(kind, model, tensors, balance, base_tensors=hashes)


def _check_settings(
  where: pathlib.Path,
  model: Mapping[str, Any],
  folders: Sequence[pathlib.Path],
  sources: Sequence[Source],
) -> None:
  """Raises CheckpointError unless each expert is scaled as the mixture is."""
  for folder, source in zip(folders, sources, strict=True):
    for part in ("lora", "mole"):
      wanted, found = (
        {key: section.get(key, 0) for key in ("rank", "alpha")}
        for section in (model[part], source.model[part])
      )
      if found != wanted and (found["rank"] or wanted["rank"]):
        raise CheckpointError(
          f"{folder / peft.CONFIG_FILE}: {part} is of {found}, but in {where} "
          f"of {wanted}; set both alike."
        )


def _base_tensors(base: Mapping[str, Any]) -> dict[str, str]:
  """Hashes by canonical name; the files have names as PyTorch's modules."""
  found, _ = names.canonical(base["tensors"])
  return {name: base["tensors"][there] for name, there in found.items()}


def digest(array: np.ndarray) -> str:
  """SHA-256 of a tensor as float32, which holds bfloat16 exactly.

  So the hash is that of the values, whatever type they are stored in.
  """
  sha = hashlib.sha256(f"{list(array.shape)}\n".encode())
  for data in blocks.as_bytes(array, np.dtype(np.float32)):
    sha.update(data)
  return sha.hexdigest()


def check_base(source: Source) -> None:
  """Raises CheckpointError where a whole source has another base than its own.

  Tensors that adapters do not bring are compared with the hashes that the
  adapters carry.
  """
  other = [
    name
    for name, wanted in source.base_tensors.items()
    if name not in source.tensors
    or digest(source.tensors[name].read()) != wanted
  ]
  if other:
    raise CheckpointError(
      f"--llm is not the base that these adapters were trained on: "
      f"{len(other)} of {len(source.base_tensors)} tensors differ, such as "
      f"{', '.join(other[:3])}."
    )
