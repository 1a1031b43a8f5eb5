"""Transformers' config.json to our model section and back.

A key that a file leaves out has the default of Transformers 5.23, as the
loaders of LLaVA-1.5's own files (which leave out most) rely on.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder, vision

_TEXT = {  # What every decoder's file may say.
  "num_key_value_heads": None,
  "head_dim": None,
  "rope_theta": None,
  "rope_parameters": None,
  "rope_scaling": None,
  "partial_rotary_factor": None,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
}
LLAMA = _TEXT | {
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "vocab_size": 32000,
  "rms_norm_eps": 1e-6,
  "attention_bias": False,
  "mlp_bias": False,
  "max_position_embeddings": 2048,
}
MISTRAL = LLAMA | {
  "intermediate_size": 14336,
  "num_key_value_heads": 8,
  "sliding_window": 4096,
  "max_position_embeddings": 131072,
}
MIXTRAL = MISTRAL | {
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "sliding_window": None,
}
QWEN2 = _TEXT | {
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "vocab_size": 151936,
  "rms_norm_eps": 1e-6,
  "use_sliding_window": False,
  "max_position_embeddings": 32768,
}
STABLELM = _TEXT | {
  "hidden_size": 2560,
  "intermediate_size": 6912,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "vocab_size": 50304,
  "layer_norm_eps": 1e-5,
  "partial_rotary_factor": 0.25,
  "use_qkv_bias": False,
  "qk_layernorm": False,
  "use_parallel_residual": False,
  "max_position_embeddings": 4096,
}
PHI = _TEXT | {
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 24,
  "num_attention_heads": 32,
  "vocab_size": 51200,
  "layer_norm_eps": 1e-5,
  "hidden_act": "gelu_new",
  "partial_rotary_factor": 0.5,
  "qk_layernorm": False,
  "max_position_embeddings": 2048,
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
DECODERS = {
  "llama": LLAMA,
  "mistral": MISTRAL,
  "mixtral": MIXTRAL,
  "qwen2": QWEN2,
  "stablelm": STABLELM,
  "stablelm_epoch": STABLELM,
  "phi": PHI,
}
# Keys of StabilityAI's own code (stablelm_epoch), Transformers' words for them.
_EPOCH = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
# What a decoder's file must say, where it says anything; by model_type.
_SILU = {"hidden_act": ("silu",)}
_WANTED = {
  "llama": _SILU | {"mlp_bias": (False,)},
  "mistral": _SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
  "mixtral": _SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
  "qwen2": _SILU | {"use_sliding_window": (False,)},
  "stablelm": _SILU
  | {"use_parallel_residual": (False,), "qk_layernorm": (False,)},
  # Two names of one function.
  "phi": {
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
    "qk_layernorm": (False,),
  },
}
PROCESSOR_FILE = "preprocessor_config.json"
NORMALISATION = ("image_mean", "image_std")
RESAMPLE = {2: "bilinear", 3: "bicubic"}
# openai/clip-vit-large-patch14-336, preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def decoder_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.decoder of a decoder's config.json.

  The head's bias is that of a decoder alone: LLaVA's head has none. Raises
  CheckpointError for a setting that the decoder cannot follow.
  """
  kind = values.get("model_type", "llama")
  if kind not in DECODERS:
    raise CheckpointError(
      f"{where}: model_type is {kind!r}; wanted one of {sorted(DECODERS)}."
    )
  if kind == "stablelm_epoch":
    values = {_EPOCH.get(key, key): value for key, value in values.items()}
    kind = "stablelm"
  defaults = DECODERS[kind]
  c = defaults | {k: v for k, v in values.items() if k in defaults}
  theta, scaling, fraction = _rope(c)
  check(c, _WANTED[kind], where)
  if scaling != "default":
    raise CheckpointError(
      f"{where}: rotary positions of type {scaling!r}; wanted 'default'."
    )
  is_partial = "layer_norm_eps" in c  # StableLM and Phi.
  if fraction != 1 and not is_partial:
    raise CheckpointError(
      f"{where}: partial_rotary_factor is {fraction}, but a {kind} turns all "
      "dimensions of a head; wanted 1, or none."
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
    "norm": "layer" if is_partial else "rms",
    "norm_eps": c["layer_norm_eps" if is_partial else "rms_norm_eps"],
    "rope_theta": theta,
    "rotary_fraction": fraction,
    "attention_bias": _attention_bias(kind, c),
    "mlp": "gelu" if kind == "phi" else "swiglu",
    "is_parallel": kind == "phi",
    "head_bias": kind == "phi",
    "sliding_window": (kind in ("mistral", "mixtral") and c["sliding_window"])
    or 0,
    "max_position_embeddings": c["max_position_embeddings"],
    "tie_word_embeddings": c["tie_word_embeddings"],
  }


def check(
  c: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]], where: str
) -> None:
  """Raises CheckpointError for the first setting with another value."""
  for key, allowed in wanted.items():
    if key in c and c[key] not in allowed:
      raise CheckpointError(
        f"{where}: {key} is {c[key]!r}; wanted "
        f"{' or '.join(map(repr, allowed))}."
      )


def _attention_bias(kind: str, c: Mapping[str, Any]) -> str:
  """`DecoderConfig.attention_bias` of a model_type."""
  if kind == "phi" or (kind == "llama" and c["attention_bias"]):
    return "all"
  if kind == "qwen2" or (kind == "stablelm" and c["use_qkv_bias"]):
    return "qkv"
  return "none"


def _rope(c: Mapping[str, Any]) -> tuple[float, str, float]:
  """Base, kind and share of a head that is turned.

  `rope_parameters` in Transformers 5, else keys of their own.
  """
  new = c["rope_parameters"] or {}
  old = c["rope_scaling"] or {}
  theta = new.get("rope_theta", c["rope_theta"])
  kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
  share = new.get("partial_rotary_factor", c["partial_rotary_factor"])
  return (
    float(10000.0 if theta is None else theta),
    kind,
    float(1.0 if share is None else share),
  )


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
  check(c, wanted, where)
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


def llava_sections(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """vision, decoder and image_token_id of a LLaVA config.json.

  Raises CheckpointError where the model is not LLaVA-1.5's: several feature
  layers, class token kept, another activation in the projector.
  """
  tower = vision_section(values.get("vision_config") or LLAVA_CLIP, where)
  layer = values.get("vision_feature_layer", -2)
  if not isinstance(layer, int):
    raise CheckpointError(
      f"{where}: vision_feature_layer is {layer!r}; wanted a single layer."
    )
  strategy = SELECT_STRATEGIES[tower["family"]]
  for key, wanted in (
    ("vision_feature_select_strategy", strategy),
    ("projector_hidden_act", "gelu"),
    ("multimodal_projector_bias", True),
  ):
    if values.get(key, wanted) != wanted:
      raise CheckpointError(
        f"{where}: {key} is {values[key]!r}; wanted {wanted!r}."
      )
  tower["feature_layer"] = layer
  text = decoder_section(values.get("text_config", {}), where)
  # Stock LLaVA's head has no bias; a LLaVA-MoLE says whether its has.
  text["head_bias"] = values.get("head_bias", False)
  image_token = values.get("image_token_index", values.get("image_token_id"))
  return {
    "vision": tower,
    "decoder": text,
    "image_token_id": 32000 if image_token is None else image_token,
    "use_visual_tokens": False,
  }


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A configuration; CheckpointError where there is none."""
  if not file.is_file():
    raise CheckpointError(
      f"{file.parent} holds no {file.name}; name a folder in Hugging Face's "
      "layout."
    )
  try:
    values = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{file} is not valid JSON: {error}.") from None
  if not isinstance(values, dict):
    raise CheckpointError(f"{file} holds no JSON object.")
  return values


def image_settings(folders: Sequence[pathlib.Path]) -> dict[str, Any]:
  """image_mean, image_std and image_resample of config.data.

  Those of the first folder with an image processor; else CLIP's.
  """
  settings = {
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "image_resample": "bicubic",
  }
  for folder in folders:
    path = folder / PROCESSOR_FILE
    if path.is_file():
      values = read_json(path)
      try:
        settings |= {k: [float(x) for x in values[k]] for k in NORMALISATION}
        # Pillow's numbers of its filters.
        settings["image_resample"] = RESAMPLE[values.get("resample", 3)]
        factor = float(values.get("rescale_factor", 1 / 255))
      except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
          f"{path} is no image processor's: {type(error).__name__} {error}; "
          f"wanted {' and '.join(NORMALISATION)}, and resample 2 or 3."
        ) from None
      if abs(factor * 255 - 1) > 1e-3:
        raise CheckpointError(
          f"{path}: rescale_factor is {factor}; wanted 1/255: pixels are "
          "scaled to 0 to 1 here."
        )
      break
  return settings


def processor_size(folder: pathlib.Path) -> int | None:
  """Side of the square images that a folder's processor makes, in pixels."""
  path = folder / PROCESSOR_FILE
  if not path.is_file():
    return None
  values = read_json(path)
  for key in ("crop_size", "size"):
    size = values.get(key)
    if isinstance(size, Mapping):
      size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, int):
      return size
  return None


def llava_config(model: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """config.json of a stock LLaVA; `model` as `config.model` holds it.

  Both majors read it: the rotary base stands where each of them looks. Raises
  CheckpointError where Transformers has no such decoder. It says nothing of
  the head's bias, which stock LLaVA has not.
  """
  v = model["vision"]
  text = text_config(decoder.DecoderConfig(**model["decoder"]))
  num_patches = (v["image_size"] // v["patch_size"]) ** 2
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": dtype,
    "torch_dtype": dtype,
    "image_token_index": model["image_token_id"],
    "image_seq_length": num_patches + 2 * model["use_visual_tokens"],
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": text["tie_word_embeddings"],
    "vision_feature_layer": v["feature_layer"],
    "vision_feature_select_strategy": SELECT_STRATEGIES[v["family"]],
    "text_config": text,
    "vision_config": tower_config(v),
  }


def text_config(d: decoder.DecoderConfig) -> dict[str, Any]:
  """A decoder's config.json, its head's bias left out.

  Raises CheckpointError where Transformers has no such decoder.
  """
  kind = _model_type(d)
  rope = {"rope_theta": d.rope_theta, "rope_type": "default"}
  values = {
    "model_type": kind,
    "architectures": [_CLASSES[kind]],
    "vocab_size": d.vocab_size,
    "hidden_size": d.hidden_size,
    "intermediate_size": d.intermediate_size,
    "num_hidden_layers": d.num_layers,
    "num_attention_heads": d.num_heads,
    "num_key_value_heads": d.num_kv_heads,
    "rope_theta": d.rope_theta,
    "rope_parameters": rope,
    "max_position_embeddings": d.max_position_embeddings,
    "tie_word_embeddings": d.tie_word_embeddings,
    "hidden_act": "gelu_new" if kind == "phi" else "silu",
  }
  if kind != "stablelm":  # It derives the width of a head.
    values["head_dim"] = d.head_dim
  if d.norm == "rms":
    values["rms_norm_eps"] = d.norm_eps
    values["sliding_window"] = d.sliding_window or None
  else:
    values["layer_norm_eps"] = d.norm_eps
    values["qk_layernorm"] = False
    values["partial_rotary_factor"] = d.rotary_fraction
    rope["partial_rotary_factor"] = d.rotary_fraction
  if kind in ("llama", "mistral"):
    values["attention_bias"] = d.attention_bias == "all"
    values["mlp_bias"] = False
  elif kind == "qwen2":
    values["use_sliding_window"] = False
  elif kind == "stablelm":
    values["use_qkv_bias"] = d.attention_bias == "qkv"
    values["use_parallel_residual"] = False
  return values


_CLASSES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "stablelm": "StableLmForCausalLM",
  "phi": "PhiForCausalLM",
}


def _model_type(d: decoder.DecoderConfig) -> str:
  """Whose form a decoder has; CheckpointError where it is none's."""
  form = (d.norm, d.mlp, d.is_parallel)
  bias, has_window = d.attention_bias, d.sliding_window > 0
  if form == ("rms", "swiglu", False) and d.rotary_fraction == 1:
    if not has_window:
      return "qwen2" if bias == "qkv" else "llama"
    if bias == "none":
      return "mistral"
  elif form == ("layer", "swiglu", False) and not has_window:
    if bias != "all" and d.head_dim * d.num_heads == d.hidden_size:
      return "stablelm"
  elif form == ("layer", "gelu", True) and not has_window and bias == "all":
    return "phi"
  raise CheckpointError(
    f"Transformers has no decoder with norm={d.norm!r}, mlp={d.mlp!r}, "
    f"is_parallel={d.is_parallel}, attention_bias={bias!r}, "
    f"rotary_fraction={d.rotary_fraction}, sliding_window={d.sliding_window} "
    f"and {d.num_heads} heads of {d.head_dim} in {d.hidden_size}; wanted the "
    f"form of one of {', '.join(_CLASSES)}."
  )


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
