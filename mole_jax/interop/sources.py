"""A model found on disk, by canonical names, whatever its format.

A reader of a format (hf.py, peft.py, llava_mole.py) makes a `Source`; what
follows (completion, checks, conversion) knows no format any more.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from mole_jax.interop import moe_names, names
from mole_jax.interop.tensors import CheckpointError, TensorInfo
from mole_jax.models import decoder, llava, moe
from mole_jax.training import state

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NO_IMAGE_TOKEN = -1  # The original LLaVA and plain decoders have none.
NO_LORA = {"rank": 0, "alpha": 1.0, "dropout": 0.0}
NO_MIXTURE = {"num_experts": 0}


@runtime_checkable
class Store(Protocol):
  """Tensors by name: `tensors.Folder`, `gguf_file.GgufFile`."""

  infos: dict[str, TensorInfo]

  def read(self, name: str) -> np.ndarray: ...


class Located(NamedTuple):
  """Where a tensor is: in a store, or as parts (experts) to be stacked.

  is_flat: axes of size 1 are dropped.  third: it is this third, from 0, of the
  rows of a tensor (q, k or v of a map that makes all).
  """

  parts: tuple[tuple[Store, str], ...]
  is_stacked: bool = False
  is_flat: bool = False
  third: int | None = None

  def info(self) -> TensorInfo:
    """Shape and type, from headers; the file is that of the first part."""
    infos = [store.infos[name] for store, name in self.parts]
    shape = infos[0].shape
    if len({info.shape for info in infos}) > 1:
      raise CheckpointError(
        f"{self.parts[0][1]} and its siblings differ in shape: "
        f"{[list(info.shape) for info in infos]}; experts must be alike."
      )
    if self.is_flat:
      shape = tuple(size for size in shape if size != 1)
    if self.is_stacked:
      shape = (len(infos), *shape)
    if self.third is not None:
      rows, *others = shape
      if rows % 3:
        raise CheckpointError(
          f"{self.parts[0][1]} has {rows} rows; wanted three equal parts: "
          "queries, keys and values."
        )
      shape = (rows // 3, *others)
    return infos[0]._replace(shape=shape)

  def read(self) -> np.ndarray:
    arrays = [store.read(name) for store, name in self.parts]
    if self.is_stacked:
      return np.stack(arrays)
    if self.third is not None:
      return np.split(arrays[0], 3)[self.third]
    return arrays[0].squeeze() if self.is_flat else arrays[0]


def located(store: Store, found: Mapping[str, str]) -> dict[str, Located]:
  """Canonical name -> place, of names in one store; experts are stacked."""
  alone, experts = moe_names.gather(found)
  places = {name: Located(((store, there),)) for name, there in alone.items()}
  for name, parts in experts.items():
    stored = tuple((store, there) for there in parts)
    places[name] = Located(stored, is_stacked=True)
  return places


@dataclasses.dataclass(frozen=True)
class Source:
  """A model found on disk, or a part of one.

  kind: what it is, in words.
  model: what config.model says of it: vision, decoder, lora, mole,
    image_token_id, use_visual_tokens; parts that are not there are absent.
    `feature_layer` stands alone where the source chooses a layer of a tower
    that it does not hold.
  tensors: canonical name -> place.
  balance: the balance loss that a mixture was trained with, config.balance.
  notes: what the user should know, sentences.
  base_tensors: SHA-256 of each tensor of the base that adapters belong to, as
    `digest` makes them; empty where the source does not say.
  """

  kind: str
  model: dict[str, Any]
  tensors: dict[str, Located]
  balance: dict[str, Any] | None = None
  notes: tuple[str, ...] = ()
  base_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def holds(self, part: str) -> bool:
    """Whether the tensors of a part are there, its adapters aside."""
    return any(
      name.startswith(prefix)
      and ".lora_" not in name
      and ".router." not in name
      for name in self.tensors
      for prefix in _PREFIXES[part]
    )


_PREFIXES = {
  "decoder": (f"{names.LLM}layers.",),
  "vision": (names.TOWER,),
  "projector": (f"{names.PROJECTOR}linear_",),
}


def combine(
  source: Source, llm: Source | None = None, vision: Source | None = None
) -> Source:
  """A whole model: what `source` holds, completed by the other folders.

  What the source has itself is taken from it, then from `llm` (a decoder, or
  a whole LLaVA under an adapter), then from `vision`. A folder given must
  bring something that is still missing: raises CheckpointError where it does
  not, or where a part is missing in the end.
  """
  model, tensors = dict(source.model), dict(source.tensors)
  kinds = [source.kind]
  held = {part for part in _PREFIXES if source.holds(part)}
  for flag, part, extra in (
    ("--llm", "decoder", llm),
    ("--vision", "vision", vision),
  ):
    if extra is None:
      continue
    if part not in extra.model or not extra.holds(part):
      raise CheckpointError(f"{flag} holds a {extra.kind}, not a {part}.")
    if part in held and part in model:
      raise CheckpointError(
        f"{flag} brings a {part}, but there is one already ({kinds[0]}); leave "
        f"{flag} out."
      )
    kinds.append(extra.kind)
    brought = {part for part in _PREFIXES if extra.holds(part)} - held
    for name, place in extra.tensors.items():
      in_held = any(name.startswith(_PREFIXES[part]) for part in held)
      if name not in tensors and not in_held:
        tensors[name] = place
    held |= brought
    for key, value in extra.model.items():
      model.setdefault(key, value)
  for part, flag in (("decoder", "--llm"), ("vision", "--vision")):
    if part not in model or part not in held:
      raise CheckpointError(
        f"the source ({' + '.join(kinds)}) has no {part}; give its folder with "
        f"{flag}."
      )
  if "feature_layer" in model:
    layer = model.pop("feature_layer")
    model["vision"] = model["vision"] | {"feature_layer": layer}
  model.setdefault("use_visual_tokens", False)
  return dataclasses.replace(
    source, kind=" + ".join(kinds), model=model, tensors=tensors
  )


def full_model_section(model: Mapping[str, Any]) -> dict[str, Any]:
  """`config.model` of what is on disk, for `llava.make_config`."""
  section = {
    "vision": model["vision"],
    "decoder": model["decoder"],
    "lora": model.get("lora", NO_LORA),
    "mole": model.get("mole", NO_MIXTURE),
    "image_token_id": model.get("image_token_id", NO_IMAGE_TOKEN),
    "use_visual_tokens": model["use_visual_tokens"],
  }
  return section | ({"moe": model["moe"]} if "moe" in model else {})


def experts_by_layer(model: Mapping[str, Any]) -> tuple[int, ...]:
  """Experts of each of the decoder's layers that are whole FFNs; 0: one FFN."""
  config = moe.MoeConfig(**model.get("moe", {}))
  return moe.experts_by_layer(config, model["decoder"]["num_layers"])


def parameter_shapes(
  model: Mapping[str, Any],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Names and shapes of what a model section describes."""
  return state.parameter_shapes(llava.make_config(full_model_section(model)))


def rows_of(model: Mapping[str, Any]) -> list[names.Name]:
  """The parameters that a model section has, with their tensors."""
  shapes = parameter_shapes(model)
  shape = decoder.DecoderConfig(**model["decoder"])
  rows = names.rows(model["vision"]["family"], shape.is_parallel)
  rows = moe_names.rows(rows, experts_by_layer(model))
  return [row for row in rows if row.path in shapes]


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


class Plan(NamedTuple):
  """What a conversion will do.

  rows: parameters to read.  new: those to initialise: a projector or the
  adapters of a module that the source wholly lacks.  unused: tensors to keep
  although nothing computes with them.
  """

  rows: list[names.Name]
  new: list[str]
  unused: list[str]


def plan(source: Source) -> Plan:
  """Checks a whole source against its configuration.

  Raises CheckpointError that lists every tensor missing, unknown or of a shape
  that the configuration contradicts.
  """
  model = source.model
  counts = num_layers(model)
  wanted, rows, new = rows_of(model), [], []
  for row in wanted:
    there = _tensors_of(row, counts)
    may_be_new = row.path.startswith("projector/") or "/lora_" in row.path
    module = row.path.rsplit("/", 1)[0]
    is_absent = not any(name in source.tensors for name in there)
    is_new = may_be_new and is_absent
    if is_new and _is_wholly_absent(source, module, wanted, counts):
      new.append(row.path)
    else:
      rows.append(row)
  family = model["vision"]["family"]
  unused = [name for name in names.unused(family) if name in source.tensors]
  tied = model["decoder"]["tie_word_embeddings"]
  ignored = {names.HEAD} if tied else set()
  names.check_coverage(
    set(source.tensors) - set(unused) - ignored,
    names.tensor_names(rows, counts),
    source.kind,
  )
  _check_shapes(source, rows)
  return Plan(rows, new, unused)


def _tensors_of(row: names.Name, counts: Mapping[str, int]) -> list[str]:
  return names.layer_names(row, counts[row.path.split("/")[0]])


def _is_wholly_absent(
  source: Source,
  module: str,
  rows: Sequence[names.Name],
  counts: Mapping[str, int],
) -> bool:
  """Whether no tensor of a projector, or of a module's LoRA, is there."""
  if module.startswith("projector/"):
    return not source.holds("projector")
  return not any(
    name in source.tensors
    for row in rows
    if row.path.startswith(f"{module}/lora_")
    for name in _tensors_of(row, counts)
  )


def _check_shapes(source: Source, rows: Sequence[names.Name]) -> None:
  shapes = parameter_shapes(source.model)
  counts = num_layers(source.model)
  patch_size = source.model["vision"]["patch_size"]
  problems = []
  for row in rows:
    is_stacked = "{}" in row.tensor
    ours = shapes[row.path].shape[is_stacked:]
    wanted = names.shape_there(row.kind, ours, patch_size)
    for name in _tensors_of(row, counts):
      found = source.tensors[name].info().shape
      if tuple(found) != wanted:
        problems.append(
          f"{name} is {list(found)}, for {row.path} {list(wanted)}"
        )
  if problems:
    raise CheckpointError(
      f"{source.kind}: tensors contradict the configuration:\n  "
      + "\n  ".join(problems)
    )


def read_parameters(
  source: Source, rows: Sequence[names.Name], dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
  """Parameters one at a time, layers stacked; `dtype` None keeps each one's.

  Let go of one before the next is asked for: then only one is in memory.
  """
  counts = num_layers(source.model)
  for row in rows:
    on_disk = _tensors_of(row, counts)
    if "{}" not in row.tensor:
      array = names.to_ours(row.kind, source.tensors[on_disk[0]].read())
      kept = array.dtype if dtype is None else dtype
      yield row.path, array.astype(kept, copy=False)
      del array
      continue
    stacked = None
    for layer, name in enumerate(on_disk):
      array = names.to_ours(row.kind, source.tensors[name].read())
      if stacked is None:
        kept = array.dtype if dtype is None else dtype
        stacked = np.empty((len(on_disk), *array.shape), kept)
      elif dtype is None and array.dtype != stacked.dtype:
        raise CheckpointError(
          f"{name} is {array.dtype}, other layers {stacked.dtype}; choose one "
          "with --dtype."
        )
      stacked[layer] = array
      del array
    yield row.path, stacked
    del stacked
