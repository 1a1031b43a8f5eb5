"""Hugging Face folders to a base: whole LLaVAs, or a decoder and a tower."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mole_jax.interop import hf_config, names
from mole_jax.interop.tensors import CheckpointError, Folder, TensorInfo
from mole_jax.models import llava
from mole_jax.training import state

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


NO_IMAGE_TOKEN = -1  # The original LLaVA has no id for images.


@dataclasses.dataclass(frozen=True)
class Source:
  """A model found on disk.

  kind: what it is, in words.
  model: what config.model says of it: vision, decoder, image_token_id,
    use_visual_tokens; parts that are not there are absent.
  tensors: canonical name -> (folder, name on disk).
  """

  kind: str
  model: dict[str, Any]
  tensors: dict[str, tuple[Folder, str]]

  def info(self, name: str) -> TensorInfo:
    """What a header says of the tensor with a canonical name."""
    folder, on_disk = self.tensors[name]
    return folder.infos[on_disk]

  def read(self, name: str) -> np.ndarray:
    """The tensor with a canonical name."""
    folder, on_disk = self.tensors[name]
    return folder.read(on_disk)


def read_source(path: pathlib.Path) -> Source:
  """Finds out what a folder holds, from config.json and headers alone.

  Raises CheckpointError where it is none of the known kinds, or its tensors
  do not belong together.
  """
  where = str(path / "config.json")
  values = read_config(path)
  folder = Folder(path)
  found, layouts = names.canonical(folder.infos)
  tensors = {name: (folder, on_disk) for name, on_disk in found.items()}
  model_type = values.get("model_type")
  if "mm_hidden_size" in values or "mm_vision_tower" in values:
    text = {**values, "model_type": "llama"}
    # haotian-liu/LLaVA: -2 unless said, and no id for the image (-200).
    model = {
      "decoder": hf_config.decoder_section(text, where),
      "use_visual_tokens": False,
    }
    kind = "original LLaVA"
  elif model_type == "llava":
    model = hf_config.llava_sections(values, where)
    kind = f"LLaVA in the names of {' and '.join(sorted(layouts))}"
  elif model_type in hf_config.DECODERS:
    model = {"decoder": hf_config.decoder_section(values, where)}
    kind = f"{model_type} decoder"
  elif model_type in ("clip_vision_model", "clip"):
    if model_type == "clip":  # The whole of CLIP; its text half stays out.
      values = values["vision_config"]
      tensors = {n: t for n, t in tensors.items() if n.startswith(names.TOWER)}
    model = {"vision": hf_config.vision_section(values, where)}
    kind = "CLIP tower"
  else:
    raise CheckpointError(
      f"{where}: model_type is {model_type!r}; wanted llava, llama, mistral or "
      "clip_vision_model."
    )
  return Source(kind, model, tensors)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder; CheckpointError where there is none."""
  file = path / "config.json"
  if not file.exists():
    raise CheckpointError(
      f"{path} holds no config.json; name a folder in Hugging Face's layout."
    )
  try:
    config = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{file} is not valid JSON: {error}.") from None
  if not isinstance(config, dict):
    raise CheckpointError(f"{file} holds no JSON object.")
  return config


def combine(
  source: Source, llm: Source | None = None, vision: Source | None = None
) -> Source:
  """A whole model: what `source` holds, completed by the other folders.

  A folder given explicitly must bring something that `source` lacks. Raises
  CheckpointError where something is brought twice or still missing.
  """
  model, tensors, kinds = (
    dict(source.model),
    dict(source.tensors),
    [source.kind],
  )
  for part, extra, flag in (
    ("decoder", llm, "--llm"),
    ("vision", vision, "--vision"),
  ):
    if extra is None:
      if part not in model:
        raise CheckpointError(
          f"the source ({source.kind}) has no {part}; give its folder with "
          f"{flag}."
        )
      continue
    if part not in extra.model:
      raise CheckpointError(f"{flag} holds a {extra.kind}, not a {part}.")
    mine = [name for name in tensors if name.startswith(_prefixes(part))]
    if part in model and mine:
      raise CheckpointError(
        f"{flag} brings a {part}, but the source ({source.kind}) has one; "
        f"leave {flag} out."
      )
    model[part] = extra.model[part]
    kinds.append(extra.kind)
    tensors |= {
      name: place
      for name, place in extra.tensors.items()
      if name.startswith(_prefixes(part))
    }
  model.setdefault("use_visual_tokens", False)
  return Source(" + ".join(kinds), model, tensors)


def _prefixes(part: str) -> tuple[str, ...]:
  return ("language_model.",) if part == "decoder" else (names.TOWER,)


def rows_of(model: Mapping[str, Any]) -> list[names.Name]:
  """The parameters that a model section has, with their tensors."""
  is_tied = model["decoder"]["tie_word_embeddings"]
  return [
    row
    for row in names.TABLE
    if not (is_tied and row.path == "decoder/lm_head")
  ]


def num_layers(model: Mapping[str, Any]) -> dict[str, int]:
  """Layers by part of the model, for `names.tensor_names`."""
  return {
    "decoder": model["decoder"]["num_layers"],
    "vision": model["vision"]["num_layers"],
    # Parts without layers.
    "projector": 0,
    "visual_start": 0,
    "visual_end": 0,
  }


def plan(source: Source) -> tuple[list[names.Name], list[str]]:
  """Parameters to convert, and tensors to keep although nothing uses them.

  A projector that is wholly absent is left to be initialised. Raises
  CheckpointError that lists every tensor missing, unknown or of a shape that
  the configuration contradicts.
  """
  rows = rows_of(source.model)
  has_projector = any(n.startswith(names.PROJECTOR) for n in source.tensors)
  if not has_projector:
    rows = [row for row in rows if not row.path.startswith("projector/")]
  counts = num_layers(source.model)
  unused = [name for name in names.UNUSED if name in source.tensors]
  tied = source.model["decoder"]["tie_word_embeddings"]
  ignored = {names.HEAD} if tied else set()
  names.check_coverage(
    set(source.tensors) - set(unused) - ignored,
    names.tensor_names(rows, counts),
    source.kind,
  )
  shapes = parameter_shapes(source.model)
  problems = []
  for row in rows:
    for name in names.layer_names(row, counts[row.path.split("/")[0]]):
      is_stacked = "{}" in row.tensor
      wanted = (
        shapes[row.path].shape[1:] if is_stacked else shapes[row.path].shape
      )
      found = source.info(name).shape
      if not _fits(row.kind, found, wanted):
        problems.append(
          f"{name} is {list(found)}, for {row.path} {list(wanted)}"
        )
  if problems:
    raise CheckpointError(
      f"{source.kind}: tensors contradict config.json:\n  "
      + "\n  ".join(problems)
    )
  return rows, unused


def _fits(kind: str, found: Sequence[int], wanted: Sequence[int]) -> bool:
  if kind == "linear":
    return tuple(found) == tuple(wanted)[::-1]
  if kind == "patches":
    is_conv = len(found) == 4 and found[2] == found[3]
    return is_conv and (int(np.prod(found[1:])), found[0]) == tuple(wanted)
  return tuple(found) == tuple(wanted)


def full_model_section(model: Mapping[str, Any]) -> dict[str, Any]:
  """`config.model` of the base alone, for `llava.make_config`."""
  return {
    "vision": model["vision"],
    "decoder": model["decoder"],
    "lora": {"rank": 0},
    "mole": {"num_experts": 0},
    "image_token_id": model.get("image_token_id", NO_IMAGE_TOKEN),
    "use_visual_tokens": model["use_visual_tokens"],
  }


def parameter_shapes(
  model: Mapping[str, Any],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes of the base that a model section describes."""
  return state.parameter_shapes(llava.make_config(full_model_section(model)))


def read_parameters(
  source: Source, rows: Sequence[names.Name], dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
  """Parameters one at a time, layers stacked; `dtype` None keeps each one's."""
  counts = num_layers(source.model)
  for row in rows:
    on_disk = names.layer_names(row, counts[row.path.split("/")[0]])
    if "{}" not in row.tensor:
      array = names.to_ours(row.kind, source.read(on_disk[0]))
      kept = array.dtype if dtype is None else dtype
      yield row.path, np.ascontiguousarray(array.astype(kept, copy=False))
      continue
    stacked = None
    for layer, name in enumerate(on_disk):
      array = names.to_ours(row.kind, source.read(name))
      if stacked is None:
        kept = array.dtype if dtype is None else dtype
        stacked = np.empty((len(on_disk), *array.shape), kept)
      elif dtype is None and array.dtype != stacked.dtype:
        raise CheckpointError(
          f"{name} is {array.dtype}, other layers {stacked.dtype}; choose one "
          "with --dtype."
        )
      stacked[layer] = array
    yield row.path, stacked
    del stacked
