"""Our parameters to folders that PyTorch users load."""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.interop import hf, names
from mole_jax.interop.tensors import CheckpointError, ShardWriter
from mole_jax.models import lora

TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"

Reader = Callable[[str], np.ndarray]


def check_stock(model: Mapping[str, Any]) -> None:
  """Raises CheckpointError where stock LLaVA has no place for a model."""
  if model["mole"]["num_experts"] > 1:
    raise CheckpointError(
      f"a mixture of {model['mole']['num_experts']} experts cannot be merged: "
      "which expert serves depends on the token, and stock LLaVA has one "
      "matrix. Use --format mole."
    )
  if model["image_token_id"] == hf.NO_IMAGE_TOKEN:
    raise CheckpointError(
      "stock LLaVA needs the id that stands for images, and the base (of an "
      "original LLaVA, or of parts) has none: train with "
      "config.model.image_token_id set, and export the run."
    )
  if model["use_visual_tokens"]:
    raise CheckpointError(
      "stock LLaVA has no visual_start and visual_end vectors: use --format "
      "mole."
    )


def check_mole(
  model: Mapping[str, Any], config: Mapping[str, Any] | None
) -> None:
  """Raises CheckpointError where there is no adapter to write."""
  if config is None or not (
    model["mole"]["num_experts"] or model["lora"]["rank"]
  ):
    raise CheckpointError(
      "the checkpoint has neither experts nor LoRA: use --format merged."
    )


def merged_reader(params: Any, model: Mapping[str, Any]) -> Reader:
  """Kernels with their LoRA added: W + (alpha / r) A B, in float32.

  `params` gives arrays by path and says with `in` which there are; `model` is
  `config.model`, one expert at most.
  """

  def read(path: str) -> np.ndarray:
    kernel = np.asarray(params[path])
    stem = path.removesuffix("/kernel")
    if f"{stem}/lora_a" not in params:
      return kernel
    section = model["mole" if "/mlp/" in path else "lora"]
    scale = lora.scaling(section["alpha"], section["rank"])
    a = np.asarray(params[f"{stem}/lora_a"], np.float32)
    b = np.asarray(params[f"{stem}/lora_b"], np.float32)
    if a.ndim == 4:  # [layer, expert, in, rank], of a single expert.
      a, b = a[:, 0], b[:, 0]
    return kernel.astype(np.float32) + scale * (a @ b)

  return read


def write_tensors(
  out: pathlib.Path,
  model: Mapping[str, Any],
  rows: Sequence[names.Name],
  read: Reader,
  unused: Mapping[str, np.ndarray],
  rename: Callable[[str], str],
  *,
  dtype: np.dtype,
  max_shard_bytes: int,
) -> None:
  """Writes parameters as tensors, one parameter in memory at a time.

  Args:
    out: an empty directory.
    model: `config.model` of what is written.
    rows: which parameters.
    read: gives the parameter at a path.
    unused: tensors that stock LLaVA has and nothing computes with.
    rename: canonical name -> name on disk.
    dtype: of all tensors.
    max_shard_bytes: size of a shard.
  """
  width = model["vision"]["hidden_size"]
  # A final norm that no feature layer passes: as Transformers initialises it.
  default = dict(
    zip(names.UNUSED, (np.ones(width), np.zeros(width)), strict=True)
  )
  counts = hf.num_layers(model)
  with ShardWriter(out, max_shard_bytes) as writer:
    for row in rows:
      parameter = read(row.path)
      layers = parameter if "{}" in row.tensor else parameter[None]
      on_disk = names.layer_names(row, counts[row.path.split("/")[0]])
      for name, array in zip(on_disk, layers, strict=True):
        patch_size = model["vision"]["patch_size"]
        array = names.to_theirs(row.kind, array, patch_size)
        writer.add(rename(name), array.astype(dtype, copy=False))
      del parameter, layers
    for name, array in (default | dict(unused)).items():
      writer.add(rename(name), array.astype(dtype))


def write_config(out: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes config.json."""
  (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def write_modeling(out: pathlib.Path) -> None:
  """Copies the PyTorch files that config.json's auto_map names."""
  for file in sorted(TORCH_FILES.glob("*.py")):
    shutil.copyfile(file, out / file.name)


def write_processor(
  out: pathlib.Path, model: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
  """preprocessor_config.json: pad to a square, resize, normalise."""
  size = model["vision"]["image_size"]
  values = {
    "image_processor_type": "LlavaImageProcessor",
    "do_convert_rgb": True,
    "do_pad": True,
    "do_resize": True,
    "size": {"shortest_edge": size},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(about["image_mean"]),
    "image_std": list(about["image_std"]),
  }
  path = out / "preprocessor_config.json"
  path.write_text(json.dumps(values, indent=2) + "\n")
