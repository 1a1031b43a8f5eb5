"""Transformers' config.json to our model section and back.

A key that a file leaves out has the default of Transformers 5.23, as the
loaders of LLaVA-1.5's own files (which leave out most) rely on.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop.tensors import CheckpointError

LLAMA = {
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": None,
  "head_dim": None,
  "vocab_size": 32000,
  "rms_norm_eps": 1e-6,
  "rope_theta": None,
  "rope_parameters": None,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "sliding_window": None,
  "max_position_embeddings": 2048,
}
MISTRAL = LLAMA | {
  "intermediate_size": 14336,
  "num_key_value_heads": 8,
  "sliding_window": 4096,
}
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
DECODERS = {"llama": LLAMA, "mistral": MISTRAL}
NORMALISATION = ("image_mean", "image_std")
# openai/clip-vit-large-patch14-336, preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def decoder_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.decoder of a Llama-family config.json.

  Raises CheckpointError for a setting that the decoder cannot follow.
  """
  kind = values.get("model_type", "llama")
  if kind not in DECODERS:
    raise CheckpointError(
      f"{where}: model_type is {kind!r}; wanted one of {sorted(DECODERS)}."
    )
  c = DECODERS[kind] | {k: v for k, v in values.items() if k in LLAMA}
  theta, scaling = _rope(c)
  for key, wanted in (
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
  ):
    if c[key] != wanted:
      raise CheckpointError(f"{where}: {key} is {c[key]!r}; wanted {wanted!r}.")
  if scaling != "default":
    raise CheckpointError(
      f"{where}: rotary positions of type {scaling!r}; wanted 'default'."
    )
  heads = c["num_attention_heads"]
  return {
    "vocab_size": c["vocab_size"],
    "hidden_size": c["hidden_size"],
    "intermediate_size": c["intermediate_size"],
    "num_layers": c["num_hidden_layers"],
    "num_heads": heads,
    "num_kv_heads": c["num_key_value_heads"] or heads,
    "head_dim": c["head_dim"] or c["hidden_size"] // heads,
    "rms_norm_eps": c["rms_norm_eps"],
    "rope_theta": theta,
    "tie_word_embeddings": c["tie_word_embeddings"],
  }


def _rope(c: Mapping[str, Any]) -> tuple[float, str]:
  """Base and kind: `rope_parameters` in Transformers 5, else two keys."""
  new = c["rope_parameters"] or {}
  old = c["rope_scaling"] or {}
  theta = new.get("rope_theta", c["rope_theta"])
  kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
  return float(10000.0 if theta is None else theta), kind


def vision_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.vision of a CLIP tower's config.json, feature layer -1."""
  kind = values.get("model_type", "clip_vision_model")
  if kind != "clip_vision_model":
    raise CheckpointError(
      f"{where}: the tower's model_type is {kind!r}; wanted "
      "'clip_vision_model'."
    )
  c = CLIP | {k: v for k, v in values.items() if k in CLIP}
  if c["num_channels"] != 3:
    raise CheckpointError(f"{where}: num_channels={c['num_channels']}, not 3.")
  if c["hidden_act"] not in ("quick_gelu", "gelu"):
    raise CheckpointError(
      f"{where}: hidden_act is {c['hidden_act']!r}; wanted quick_gelu or gelu."
    )
  return {
    "image_size": c["image_size"],
    "patch_size": c["patch_size"],
    "hidden_size": c["hidden_size"],
    "intermediate_size": c["intermediate_size"],
    "num_layers": c["num_hidden_layers"],
    "num_heads": c["num_attention_heads"],
    "hidden_act": c["hidden_act"],
    "layer_norm_eps": c["layer_norm_eps"],
    "feature_layer": -1,
  }


def llava_sections(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """vision, decoder and image_token_id of a LLaVA config.json.

  Raises CheckpointError where the model is not LLaVA-1.5's: several feature
  layers, class token kept, another activation in the projector.
  """
  vision = vision_section(values.get("vision_config") or LLAVA_CLIP, where)
  layer = values.get("vision_feature_layer", -2)
  if not isinstance(layer, int):
    raise CheckpointError(
      f"{where}: vision_feature_layer is {layer!r}; wanted a single layer."
    )
  for key, wanted in (
    ("vision_feature_select_strategy", "default"),
    ("projector_hidden_act", "gelu"),
    ("multimodal_projector_bias", True),
  ):
    if values.get(key, wanted) != wanted:
      raise CheckpointError(
        f"{where}: {key} is {values[key]!r}; wanted {wanted!r}."
      )
  vision["feature_layer"] = layer
  decoder = decoder_section(values.get("text_config", {}), where)
  image_token = values.get("image_token_index", values.get("image_token_id"))
  return {
    "vision": vision,
    "decoder": decoder,
    "image_token_id": 32000 if image_token is None else image_token,
    "use_visual_tokens": False,
  }


def normalisation(folders: Sequence[pathlib.Path]) -> dict[str, list[float]]:
  """image_mean and image_std of the first folder that tells; else CLIP's."""
  for folder in folders:
    path = folder / "preprocessor_config.json"
    if path.is_file():
      try:
        values = json.loads(path.read_text())
        mean, std = ([float(x) for x in values[k]] for k in NORMALISATION)
      except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
          f"{path} is no image processor's: {type(error).__name__} {error}; "
          f"wanted JSON with {' and '.join(NORMALISATION)}."
        ) from None
      return {"image_mean": mean, "image_std": std}
  return {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}


def mole_config(
  model: Mapping[str, Any], balance: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
  """config.json of a LLaVA-MoLE with its own modeling file."""
  mole, lora = model["mole"], model["lora"]
  return llava_config(model, dtype) | {
    "architectures": ["LlavaMoleForConditionalGeneration"],
    "model_type": "llava_mole",
    "auto_map": {
      "AutoConfig": "configuration_llava_mole.LlavaMoleConfig",
      "AutoModelForImageTextToText": (
        "modeling_llava_mole.LlavaMoleForConditionalGeneration"
      ),
    },
    "num_experts": mole["num_experts"],
    "top_k": mole["top_k"],
    "gate": mole["gate"],
    "router_scope": mole["router_scope"],
    "expert_rank": mole["rank"],
    "expert_alpha": mole["alpha"],
    "expert_dropout": mole["dropout"],
    "lora_rank": lora["rank"],
    "lora_alpha": lora["alpha"],
    "lora_dropout": lora["dropout"],
    "use_visual_tokens": model["use_visual_tokens"],
    "balance": balance["loss"],
    "balance_weight": balance["weight"],
  }


def llava_config(model: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """config.json of a stock LLaVA; `model` as `config.model` holds it.

  Both majors read it: the rotary base stands where each of them looks.
  """
  v, d = model["vision"], model["decoder"]
  theta = d["rope_theta"]
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": dtype,
    "torch_dtype": dtype,
    "image_token_index": model["image_token_id"],
    "image_seq_length": (v["image_size"] // v["patch_size"]) ** 2
    + 2 * model["use_visual_tokens"],
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": d["tie_word_embeddings"],
    "vision_feature_layer": v["feature_layer"],
    "vision_feature_select_strategy": "default",
    "text_config": {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "vocab_size": d["vocab_size"],
      "hidden_size": d["hidden_size"],
      "intermediate_size": d["intermediate_size"],
      "num_hidden_layers": d["num_layers"],
      "num_attention_heads": d["num_heads"],
      "num_key_value_heads": d["num_kv_heads"],
      "head_dim": d["head_dim"],
      "rms_norm_eps": d["rms_norm_eps"],
      "rope_theta": theta,
      "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
      "tie_word_embeddings": d["tie_word_embeddings"],
      "hidden_act": "silu",
      "attention_bias": False,
      "mlp_bias": False,
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      "image_size": v["image_size"],
      "patch_size": v["patch_size"],
      "num_channels": 3,
      "hidden_size": v["hidden_size"],
      "intermediate_size": v["intermediate_size"],
      "num_hidden_layers": v["num_layers"],
      "num_attention_heads": v["num_heads"],
      "hidden_act": v["hidden_act"],
      "layer_norm_eps": v["layer_norm_eps"],
      "projection_dim": 768,
    },
  }
