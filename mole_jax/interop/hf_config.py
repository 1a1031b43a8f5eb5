"""A LLaVA's config.json in Transformers' words, to our model section and back.

Its decoder is `hf_decoder`'s, its tower `hf_tower`'s.
"""

from collections.abc import Mapping
from typing import Any

from mole_jax.interop import hf_decoder, hf_tower
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder


def llava_sections(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """vision, decoder and image_token_id of a LLaVA config.json.

  Raises CheckpointError where the model is not LLaVA-1.5's: several feature
  layers, class token kept, another activation in the projector.
  """
  tower = hf_tower.vision_section(
    values.get("vision_config") or hf_tower.LLAVA_CLIP, where
  )
  layer = values.get("vision_feature_layer", -2)
  if not isinstance(layer, int):
    raise CheckpointError(
      f"{where}: vision_feature_layer is {layer!r}; wanted a single layer."
    )
  strategy = hf_tower.SELECT_STRATEGIES[tower["family"]]
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
  text = hf_decoder.decoder_section(values.get("text_config", {}), where)
  # Stock LLaVA's head has no bias; a LLaVA-MoLE says whether its has.
  text["head_bias"] = values.get("head_bias", False)
  image_token = values.get("image_token_index", values.get("image_token_id"))
  return {
    "vision": tower,
    "decoder": text,
    "image_token_id": 32000 if image_token is None else image_token,
    "use_visual_tokens": False,
  }


def llava_config(model: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """config.json of a stock LLaVA; `model` as `config.model` holds it.

  Both majors read it: the rotary base stands where each of them looks. Raises
  CheckpointError where Transformers has no such decoder. It says nothing of
  the head's bias, which stock LLaVA has not.
  """
  v = model["vision"]
  text = hf_decoder.text_config(decoder.DecoderConfig(**model["decoder"]))
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
    "vision_feature_select_strategy": hf_tower.SELECT_STRATEGIES[v["family"]],
    "text_config": text,
    "vision_config": hf_tower.tower_config(v),
  }
