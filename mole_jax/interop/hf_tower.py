"""A vision tower's config.json in Transformers' words, to ours and back."""

from collections.abc import Mapping
from typing import Any

from mole_jax.interop import hf_json
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import vision

CLIP = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 32,
  "num_channels": 3,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
LLAVA_CLIP = {  # The tower of a LLaVA that names none.
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "image_size": 336,
  "patch_size": 14,
}
SIGLIP = CLIP | {
  "patch_size": 16,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
DINOV2 = {
  "hidden_size": 768,
  "mlp_ratio": 4,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 14,
  "num_channels": 3,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "qkv_bias": True,
  "use_swiglu_ffn": False,
}
# model_type -> family (of models/vision.py) and defaults.
TOWERS = {
  "clip_vision_model": ("clip", CLIP),
  "siglip_vision_model": ("siglip", SIGLIP),
  "dinov2": ("dinov2", DINOV2),
}
TITLES = {"clip": "CLIP", "siglip": "SigLIP", "dinov2": "DINOv2"}
# Without a class token there is none to drop.
SELECT_STRATEGIES = {"clip": "default", "siglip": "full", "dinov2": "default"}


def vision_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.vision of a tower's config.json, feature layer -1.

  Raises CheckpointError for a setting that the tower cannot follow.
  """
  kind = values.get("model_type", "clip_vision_model")
  if kind not in TOWERS:
    raise CheckpointError(
      f"{where}: the tower's model_type is {kind!r}; wanted one of "
      f"{', '.join(TOWERS)}."
    )
  family, defaults = TOWERS[kind]
  c = defaults | {k: v for k, v in values.items() if k in defaults}
  wanted = {
    "num_channels": (3,),
    "hidden_act": vision.ACTIVATIONS,
    "qkv_bias": (True,),
    "use_swiglu_ffn": (False,),
  }
  hf_json.check(c, wanted, where)
  width, is_dinov2 = c["hidden_size"], family == "dinov2"
  if is_dinov2 and c["mlp_ratio"] != int(c["mlp_ratio"]):
    raise CheckpointError(
      f"{where}: mlp_ratio is {c['mlp_ratio']}; wanted a whole number."
    )
  return {
    "family": family,
    "image_size": c["image_size"],
    "patch_size": c["patch_size"],
    "hidden_size": width,
    "intermediate_size": (
      int(width * c["mlp_ratio"]) if is_dinov2 else c["intermediate_size"]
    ),
    "num_layers": c["num_hidden_layers"],
    "num_heads": c["num_attention_heads"],
    "hidden_act": c["hidden_act"],
    "layer_norm_eps": c["layer_norm_eps"],
    "position_grid": c["image_size"] // c["patch_size"] if is_dinov2 else 0,
    "feature_layer": -1,
  }


def tower_config(v: Mapping[str, Any]) -> dict[str, Any]:
  """A tower's config.json; `v` as `config.model.vision` holds it."""
  values = {
    "image_size": v["image_size"],
    "patch_size": v["patch_size"],
    "num_channels": 3,
    "hidden_size": v["hidden_size"],
    "num_hidden_layers": v["num_layers"],
    "num_attention_heads": v["num_heads"],
    "hidden_act": v["hidden_act"],
    "layer_norm_eps": v["layer_norm_eps"],
  }
  if v["family"] == "dinov2":
    return values | {
      "model_type": "dinov2",
      "image_size": v["position_grid"] * v["patch_size"],
      "mlp_ratio": v["intermediate_size"] // v["hidden_size"],
      "qkv_bias": True,
      "use_swiglu_ffn": False,
    }
  values["intermediate_size"] = v["intermediate_size"]
  if v["family"] == "siglip":
    return values | {"model_type": "siglip_vision_model"}
  return values | {"model_type": "clip_vision_model", "projection_dim": 768}
