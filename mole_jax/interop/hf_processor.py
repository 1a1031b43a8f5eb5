"""What a folder's image processor does to pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop import hf_json
from mole_jax.interop.tensors import CheckpointError

PROCESSOR_FILE = "preprocessor_config.json"
NORMALISATION = ("image_mean", "image_std")
RESAMPLE = {2: "bilinear", 3: "bicubic"}
# openai/clip-vit-large-patch14-336, preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
      values = hf_json.read_json(path)
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
  values = hf_json.read_json(path)
  for key in ("crop_size", "size"):
    size = values.get(key)
    if isinstance(size, Mapping):
      size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, int):
      return size
  return None
