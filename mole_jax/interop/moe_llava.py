"""MoE-LLaVA as its authors publish it (PKU-YuanGroup/MoE-LLaVA).

Lin et al. 2024 (arXiv 2401.15947). The state dict is that of DeepSpeed's
`MoE` in a LLaVA of theirs: decoder, experts, projector, and mostly the tower;
config.json says the rest, the tower by its name only. Their stage I and II
models, without experts, have the same names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop import hf_decoder, hf_json, moe_names, names, qwen
from mole_jax.interop.sources import Located, Source, Store, located
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import moe

# Their model_type without "moe_" and "llava_" -> the decoder's.
DECODERS = {
  "llama": "llama",
  "mistral": "mistral",
  "phi": "phi",
  "qwen": qwen.MODEL_TYPE,
  "qwen1_5": "qwen2",
  "stablelm": "stablelm_epoch",
}
# What config.json must say, where it says anything.
_WANTED = {
  "image_projector_type": ("mlp2x_gelu",),
  "mm_use_im_start_end": (False,),
  "mm_video_tower": (None,),
  "mm_vision_select_feature": ("patch",),
}
_KEYS = (
  "num_experts",
  "top_k_experts",
  "capacity_factor",
  "eval_capacity_factor",
)
_SIGLIP = "google/"  # How they tell a SigLIP from a CLIP.


def is_moe_llava(values: Mapping[str, Any]) -> bool:
  """Whether a config.json is MoE-LLaVA's."""
  return "mm_image_tower" in values


def read_checkpoint(
  values: Mapping[str, Any], store: Store, where: str
) -> Source:
  """A published checkpoint; `--vision` tells the shape of its tower.

  Args:
    values: its config.json, found at `where`.
    store: its tensors.

  Raises CheckpointError for settings that the model cannot follow, names that
  it does not have, and experts that are missing.
  """
  kind = str(values.get("model_type"))
  name = kind.removeprefix("moe_").removeprefix("llava_")
  if name not in DECODERS:
    raise CheckpointError(
      f"{where}: model_type is {kind!r}; of MoE-LLaVA's are read: "
      f"{', '.join(f'moe_llava_{x}' for x in DECODERS)}."
    )
  hf_json.check(values, _WANTED, where)
  is_qwen = DECODERS[name] == qwen.MODEL_TYPE
  text = {**values, "model_type": DECODERS[name]}
  section = (
    qwen.decoder_section(text, where)
    if is_qwen
    else hf_decoder.decoder_section(text, where)
  )
  model = {
    "decoder": section,
    "use_visual_tokens": False,
    "feature_layer": values.get("mm_vision_select_layer", -2),
  }
  tower = values["mm_image_tower"]
  notes = [f"its tower is {tower}."]
  if is_qwen:
    notes.append(qwen.note(section))
  if str(tower).startswith(_SIGLIP):
    notes.append(
      "the original leaves out SigLIP's first patch, as if it were a class "
      "token; here all patches are used."
    )
  tensors = _of_qwen(store) if is_qwen else _of_llama(store)
  settings = values.get("moe") or {}
  if not settings.get("moe_enable", False):
    kind = f"MoE-LLaVA without experts ({name})"
    return Source(kind, model, tensors, notes=tuple(notes))
  model["moe"] = _moe_section(settings, section["num_layers"], where)
  weight = settings.get("router_aux_loss_coef", 0.01)
  notes.append(
    "the original draws its second expert at random at evaluation too; here "
    "it is the second likeliest (model.moe.use_gumbel_noise: in training)."
  )
  if settings.get("min_capacity", 0):
    notes.append(
      f"min_capacity={settings['min_capacity']}, the least tokens an expert "
      "takes of however few, is not followed."
    )
  return Source(
    f"MoE-LLaVA ({name})",
    model,
    tensors,
    {"loss": "moe_llava", "weight": weight},
    tuple(notes),
  )


def _moe_section(
  settings: Mapping[str, Any], num_layers: int, where: str
) -> dict[str, Any]:
  """config.model.moe of the section "moe" of a config.json."""
  if settings.get("use_residual", False):
    raise CheckpointError(
      f"{where}: moe.use_residual is true: each layer then adds one more FFN, "
      "for every token, weighed against the experts by a learned coefficient; "
      "no layer here has that."
    )
  missing = [key for key in _KEYS if key not in settings]
  if missing:
    raise CheckpointError(
      f"{where}: moe lacks {', '.join(missing)}, which MoE-LLaVA writes."
    )
  layers = settings.get("moe_layers_idx")
  if layers is None:
    config = moe.MoeConfig(layers=settings.get("moe_mode", "sparse"))
    found = moe.experts_by_layer(config, num_layers)
    layers = [i for i, number in enumerate(found) if number]
  numbers = settings["num_experts"]
  if not isinstance(numbers, Sequence):
    numbers = [numbers]
  if len(numbers) == 1:
    numbers = list(numbers) * len(layers)
  if len(numbers) != len(layers) or any(i >= num_layers for i in layers):
    raise CheckpointError(
      f"{where}: moe.num_experts={numbers} and moe.moe_layers_idx={layers} do "
      f"not tell the experts of {num_layers} layers."
    )
  by_layer = dict(zip(layers, numbers, strict=True))
  section = moe_names.section([by_layer.get(i, 0) for i in range(num_layers)])
  section |= {
    "top_k": settings["top_k_experts"],
    "capacity_factor": float(settings["capacity_factor"]),
    "eval_capacity_factor": float(settings["eval_capacity_factor"]),
  }
  try:
    moe.MoeConfig(**section)
  except ValueError as error:
    raise CheckpointError(f"{where}: {error}") from None
  return section


def _of_llama(store: Store) -> dict[str, Located]:
  found, _ = names.canonical(store.infos)
  return located(store, found)


def _of_qwen(store: Store) -> dict[str, Located]:
  """Qwen of 2023: names of its own, in experts too."""
  tensors: dict[str, Located] = {}
  others: dict[str, str] = {}
  for name in store.infos:
    expert = moe_names.DEEPSPEED_EXPERT.fullmatch(name)
    plain = f"{expert[1]}.{expert[3]}" if expert else name
    found = qwen.canonical(plain)
    if expert and found:
      ((meant, _),) = found.items()
      # As the others write it: the map's name after the expert's number.
      stem, _, rest = meant.partition(".mlp.")
      between = name.removeprefix(expert[1]).removesuffix(expert[3])
      others[f"{stem}.mlp{between}{rest}"] = name
    elif found:
      for meant, third in found.items():
        tensors[meant] = Located(((store, name),), third=third)
    elif not name.endswith(names.BUFFERS):
      (meant,), _ = names.canonical([_as_llama(name)])
      others[meant] = name
  return tensors | located(store, others)


def _as_llama(name: str) -> str:
  """Projector, tower and routers, under the names that all but Qwen have."""
  name = re.sub(r"^transformer\.h\.", "model.layers.", name)
  return re.sub(r"^transformer\.", "model.", name)
