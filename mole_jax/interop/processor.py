"""Beside exported weights: tokenizer, image processor and chat template."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from mole_jax.data import tokenizer as tokenizer_lib
from mole_jax.data.conversation import IMAGE_MARKER
from mole_jax.interop import from_hf, hf_processor, hf_tower, vicuna_jinja
from mole_jax.interop.opened import Opened

RESAMPLE = {name: number for number, name in hf_processor.RESAMPLE.items()}


def write(opened: Opened, out: pathlib.Path) -> None:
  """Writes tokenizer, image processor and chat template into a folder.

  A converted base goes out with the files it came in with. A run was trained
  with pictures padded to squares, and says so.
  """
  data = opened.data
  path = pathlib.Path(data["tokenizer"])
  if data["tokenizer"] == "embedded":
    path = tokenizer_lib.EMBEDDED_TOKENIZER
  is_run = opened.config is not None
  for name in from_hf.COMPANIONS:
    is_processor = name in ("preprocessor_config.json", "processor_config.json")
    if not (is_run and is_processor):
      from_hf.copy_file(path.parent / name, out / name)
  from_hf.copy_file(path, out / "tokenizer.json")
  if not (out / "tokenizer.json").exists():
    return  # Converted without one; nothing below works without it.
  if not (out / "tokenizer_config.json").exists():
    _write(
      out / "tokenizer_config.json", _tokenizer_config(out / "tokenizer.json")
    )
  if not (out / "preprocessor_config.json").exists():
    _write(out / "preprocessor_config.json", _image_processor(opened))
  if not (out / "processor_config.json").exists():
    _write(out / "processor_config.json", _processor(opened))
  if (
    data["template"] == "vicuna" and not (out / "chat_template.jinja").exists()
  ):
    template = vicuna_jinja.write(data["system"], data["use_bos"])
    (out / "chat_template.jinja").write_text(template)


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


def _tokenizer_config(path: pathlib.Path) -> dict[str, Any]:
  text = tokenizer_lib.Tokenizer(path)
  name = tokenizers.Tokenizer.from_file(str(path)).id_to_token
  names = {
    f"{key}_token": name(token_id)
    for key, token_id in (
      ("bos", text.bos_id),
      ("eos", text.eos_id),
      ("pad", text.pad_id),
    )
    if token_id is not None
  }
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **names,
    "extra_special_tokens": {"image_token": IMAGE_MARKER},
    "padding_side": "left",
  }


def _image_processor(opened: Opened) -> dict[str, Any]:
  """Pad to a square, resize, normalise, as training did."""
  size, data = opened.model["vision"]["image_size"], opened.data
  return {
    "image_processor_type": "LlavaImageProcessor",
    "do_convert_rgb": True,
    "do_pad": True,
    "do_resize": True,
    "size": {"shortest_edge": size},
    "resample": RESAMPLE[data["image_resample"]],
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(data["image_mean"]),
    "image_std": list(data["image_std"]),
  }


def _processor(opened: Opened) -> dict[str, Any]:
  vision = opened.model["vision"]
  strategy = hf_tower.SELECT_STRATEGIES[vision["family"]]
  # With "default" the processor takes one away, for the class token.
  more = int(strategy == "default") + 2 * opened.model["use_visual_tokens"]
  return {
    "processor_class": "LlavaProcessor",
    "patch_size": vision["patch_size"],
    "vision_feature_select_strategy": strategy,
    "image_token": IMAGE_MARKER,
    "num_additional_image_tokens": more,
  }
