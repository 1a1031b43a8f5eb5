"""What formats can hold, and our parameters as their tensors."""

import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.interop import names, sources
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder, lora, moe

TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"

Reader = Callable[[str], "np.ndarray | MergedKernel"]


def check_stock(model: Mapping[str, Any]) -> None:
  """Raises CheckpointError where stock LLaVA has no place for a model."""
  if any(sources.experts_by_layer(model)):
    raise CheckpointError(
      f"{_experts_in_words(model)}, and this stock LLaVA's decoder has one: "
      "use --format native-moe, a LLaVA with Mixtral, or mole."
    )
  if model["mole"]["num_experts"] > 1:
    raise CheckpointError(
      f"a mixture of {model['mole']['num_experts']} experts cannot be merged: "
      "which expert serves depends on the token, and stock LLaVA has one "
      "matrix. Use --format mole."
    )
  check_text_model(model)


def check_text_model(model: Mapping[str, Any]) -> None:
  """Raises CheckpointError where stock LLaVA lacks a part, adapters aside."""
  if model["image_token_id"] == sources.NO_IMAGE_TOKEN:
    raise CheckpointError(
      "stock LLaVA needs the id that stands for images, and the base, "
      "converted without a tokenizer, has none: convert it again with "
      "tokenizer.json beside its weights."
    )
  if model["use_visual_tokens"]:
    raise CheckpointError(
      "stock LLaVA has no visual_start and visual_end vectors: use --format "
      "mole."
    )
  if has_head_bias(model):
    raise CheckpointError(
      "stock LLaVA's language-model head has no bias, as this decoder's has: "
      "use --format mole."
    )


def check_capacity(model: Mapping[str, Any], *, ignores_capacity: bool) -> None:
  """Raises CheckpointError where evaluation drops tokens that PyTorch keeps.

  `ignores_capacity`: that is known, and wanted.
  """
  if drops_tokens(model) and not ignores_capacity:
    raise CheckpointError(
      f"{_experts_in_words(model)}, and at evaluation "
      f"(model.moe.eval_capacity_factor="
      f"{model['moe']['eval_capacity_factor']}) tokens beyond their capacity "
      "are dropped; in PyTorch none would be, and answers would be others "
      f"(from {_most_experts(model) / model['moe']['top_k']:g} on none is here "
      "either). --ignore-capacity writes it all the same."
    )


def drops_tokens(model: Mapping[str, Any]) -> bool:
  """Whether experts that are whole FFNs may drop tokens at evaluation."""
  number = _most_experts(model)
  if not number:
    return False
  c = moe.MoeConfig(**model["moe"])
  return 0 < c.eval_capacity_factor < number / c.top_k


def _most_experts(model: Mapping[str, Any]) -> int:
  return max(sources.experts_by_layer(model))


def _experts_in_words(model: Mapping[str, Any]) -> str:
  kinds = sources.experts_by_layer(model)
  layers = ", ".join(str(i) for i, kind in enumerate(kinds) if kind)
  numbers = sorted(set(kinds) - {0})
  return f"layers {layers} have {' or '.join(map(str, numbers))} FFNs each"


def check_mole(
  model: Mapping[str, Any], *, ignores_capacity: bool = False
) -> None:
  """Raises CheckpointError where stock LLaVA would do, or tokens are dropped.

  `ignores_capacity`: see `check_capacity`.
  """
  check_capacity(model, ignores_capacity=ignores_capacity)
  if not (
    any(sources.experts_by_layer(model))
    or model["mole"]["num_experts"]
    or model["lora"]["rank"]
    or model["use_visual_tokens"]
    or has_head_bias(model)
  ):
    raise CheckpointError(
      "the checkpoint has neither experts nor LoRA nor visual tokens nor a "
      "head with a bias: use --format merged."
    )


def has_head_bias(model: Mapping[str, Any]) -> bool:
  """Whether the language-model head has a bias; `model` is config.model."""
  return decoder.DecoderConfig(**model["decoder"]).head_bias


def check_experts(model: Mapping[str, Any]) -> None:
  """Raises CheckpointError where PEFT has no place for a model."""
  if any(sources.experts_by_layer(model)):
    raise CheckpointError(
      f"{_experts_in_words(model)}, and PEFT's adapters of a LLaVA have no "
      "place for them: use --format mole, or native-moe."
    )
  if not (model["mole"]["num_experts"] or model["lora"]["rank"]):
    raise CheckpointError(
      "the checkpoint has neither experts nor LoRA: use --format merged."
    )
  if model["mole"]["num_experts"] <= 1 and model["use_visual_tokens"]:
    raise CheckpointError(
      "a PEFT adapter of stock LLaVA has no visual_start and visual_end "
      "vectors: use --format mole."
    )


def is_added(row: names.Name) -> bool:
  """Whether a parameter goes where a base stays behind.

  Adapters, and the projector: they were trained behind it.
  """
  return names.is_adapter(row) or row.path.startswith("projector/")


class MergedKernel:
  """W + scale A B of all layers, in float32; computed as a layer is taken."""

  dtype = np.dtype(np.float32)

  def __init__(
    self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
  ):
    self._kernel, self._a, self._b, self._scale = kernel, a, b, scale

  def __len__(self) -> int:
    return len(self._kernel)

  def __getitem__(self, layer: int) -> np.ndarray:
    change = self._scale * (self._a[layer] @ self._b[layer])
    change += self._kernel[layer]
    return change

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(np.stack(list(self)), dtype)


def merged_reader(params: Any, model: Mapping[str, Any]) -> Reader:
  """Kernels with their LoRA added: W + (alpha / r) A B, in float32.
  `params` gives arrays by path and says with `in` which there are; `model` is
  `config.model`, a plain FFN has one LoRA expert at most.
  """

  def read(path: str) -> np.ndarray | MergedKernel:
    kernel = np.asarray(params[path])
    stem = path.removesuffix("/kernel")
    if f"{stem}/lora_a" not in params:
      return kernel
    section = model["lora" if "/self_attn/" in path else "mole"]
    scale = lora.scaling(section["alpha"], section["rank"])
    a = np.asarray(params[f"{stem}/lora_a"], np.float32)
    b = np.asarray(params[f"{stem}/lora_b"], np.float32)
    # [layer, expert, in, rank]: a plain FFN has a single expert at most.
    if a.ndim == 4 and kernel.ndim == 3:
      a, b = a[:, 0], b[:, 0]
    return MergedKernel(kernel, a, b, scale)

  return read


def tensors(
  model: Mapping[str, Any],
  rows: Sequence[names.Name],
  read: Reader,
  dtype_of: Callable[[str], np.dtype],
) -> Iterator[tuple[str, np.ndarray]]:
  """Tensors by canonical name, one parameter in memory at a time.

  Tensors are views of it: let go of one before the next is asked for.

  Args:
    model: `config.model`.
    rows: what to write.
    read: a parameter by path; layers stacked.
    dtype_of: what type a parameter, by path, is written in.
  """
  counts = sources.num_layers(model)
  patch_size = model["vision"]["patch_size"]
  for row in rows:
    parameter = read(row.path)
    layers = parameter if "{}" in row.tensor else parameter[None]
    there = names.layer_names(row, counts[row.path.split("/")[0]])
    for name, array in zip(there, layers, strict=True):
      array = names.to_theirs(row.kind, array, patch_size)
      yield name, array.astype(dtype_of(row.path), copy=False)
      del array
    del parameter, layers


def write_modeling(out: pathlib.Path) -> None:
  """Copies the PyTorch files that config.json's auto_map names."""
  for file in sorted(TORCH_FILES.glob("*.py")):
    shutil.copyfile(file, out / file.name)
