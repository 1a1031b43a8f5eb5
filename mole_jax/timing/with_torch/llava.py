"""Transformers' LLaVA with a CLIP tower and a Llama, of a config's shapes.

And what the programs that run it share.
"""

import os
import resource
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

GIB = 2**30


def use_cores() -> None:
  """A thread on each core that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def peak_memory(device: torch.device) -> dict[str, Any]:
  """Of the device, or of the process on a CPU; ends what a program serves."""
  if device.type == "cuda":
    peak = torch.cuda.max_memory_allocated()
    return {"memory": {"peak_gib": peak / GIB, "of": "device"}}
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"memory": {"peak_gib": peak / GIB, "of": "process"}}


def make_inputs(
  spec: Mapping[str, Any],
  num_rows: int,
  num_tokens: int,
  num_images: int,
  device: torch.device,
) -> dict[str, torch.Tensor]:
  """Full rows of random tokens, their images after the first of them."""
  image, side = spec["image_token_id"], spec["vision"]["image_size"]
  shape = (num_rows, num_tokens)
  ids = torch.randint(4, spec["decoder"]["vocab_size"], shape)
  ids[ids == image] = 4 if image != 4 else 5
  ids[:, 1 : 1 + num_images * num_patches(spec)] = image
  inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
  if num_images:
    pixels = torch.randn(num_rows * num_images, 3, side, side)
    inputs["pixel_values"] = pixels.to(getattr(torch, spec["dtype"]))
  return {key: value.to(device) for key, value in inputs.items()}


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
