"""Transformers' LLaVA with a CLIP tower and a Llama, of a config's shapes."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn


def make_model(
  spec: Mapping[str, Any], device: torch.device, *, uses_cache: bool = False
) -> nn.Module:
  """Random weights on the device, in the type in which they stay."""
  vision, decoder = spec["vision"], spec["decoder"]
  shared = ("hidden_size", "intermediate_size")
  tower = transformers.CLIPVisionConfig(
    **{key: vision[key] for key in shared},
    num_hidden_layers=vision["num_layers"],
    num_attention_heads=vision["num_heads"],
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    hidden_act=vision["hidden_act"],
  )
  text = transformers.LlamaConfig(
    **{key: decoder[key] for key in shared},
    num_hidden_layers=decoder["num_layers"],
    num_attention_heads=decoder["num_heads"],
    num_key_value_heads=decoder["num_kv_heads"],
    head_dim=decoder["head_dim"],
    vocab_size=decoder["vocab_size"],
    rms_norm_eps=decoder["norm_eps"],
    max_position_embeddings=decoder["max_position_embeddings"],
    tie_word_embeddings=decoder["tie_word_embeddings"],
    rope_parameters={
      "rope_type": "default",
      "rope_theta": decoder["rope_theta"],
    },
    use_cache=uses_cache,
  )
  config = transformers.LlavaConfig(
    vision_config=tower,
    text_config=text,
    image_token_index=spec["image_token_id"],
    image_token_id=spec["image_token_id"],
    vision_feature_layer=vision["feature_layer"],
    vision_feature_select_strategy="default",
    image_seq_length=num_patches(spec),
  )
  dtype = getattr(torch, spec["dtype"])
  with device:
    return transformers.AutoModelForImageTextToText.from_config(
      config, dtype=dtype, attn_implementation="sdpa"
    )


def num_patches(spec: Mapping[str, Any]) -> int:
  """Tokens of one picture."""
  vision = spec["vision"]
  return (vision["image_size"] // vision["patch_size"]) ** 2
