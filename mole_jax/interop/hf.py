"""What a path holds: every format that can be read, found out by itself."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

from mole_jax.interop import (
  gguf_file,
  hf_config,
  hf_decoder,
  hf_json,
  hf_processor,
  hf_tower,
  llava_mole,
  mixtral,
  moe_llava,
  mole_folder,
  names,
  peft,
  pickles,
  qwen,
)
from mole_jax.interop.sources import Source, Store, located
from mole_jax.interop.tensors import CheckpointError, Folder

PICKLES = (".pt", ".pth", ".bin")
KINDS = (
  "llava, llava_mole, a decoder (llama, mistral, mixtral, qwen, qwen2, "
  "stablelm, phi), a tower (clip_vision_model, siglip_vision_model, dinov2), "
  "an original LLaVA, a MoE-LLaVA, a PEFT adapter, a folder of experts, a "
  ".gguf file or the released LLaVA-MoLE .pt"
)


class Opener:
  """Reads sources; a context manager, since pickles are unpacked on the side.

  allow_pickle: whether PyTorch's pickles may be opened at all.  scratch: a
  folder with room for what they hold.
  """

  def __init__(self, allow_pickle: bool, scratch: pathlib.Path):
    self._allow_pickle = allow_pickle
    self._scratch = scratch
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Opener":
    return self

  def __exit__(self, *error: Any) -> None:
    self._stack.close()

  def source(self, path: pathlib.Path) -> Source:
    """Finds out what a path holds, from configurations and headers alone.

    Raises CheckpointError where it is none of the known kinds, or its tensors
    do not belong together.
    """
    if path.is_file():
      return self._file(path)
    if not path.is_dir():
      raise CheckpointError(f"{path} does not exist.")
    if (path / mole_folder.MIXTURE_FILE).exists():
      return mole_folder.read_experts(path)
    if (path / peft.CONFIG_FILE).exists():
      return self._adapter(path)
    values = hf_json.read_json(path / "config.json")
    store = self._folder(path)
    if values.get("model_type") == mole_folder.MODEL_TYPE:
      return mole_folder.read_mole(path, values, store)
    if moe_llava.is_moe_llava(values):
      return moe_llava.read_checkpoint(values, store, str(path / "config.json"))
    if values.get("model_type") == qwen.MODEL_TYPE:
      return qwen.read_qwen(values, store, str(path / "config.json"))
    return read_model(path, values, store)

  def _file(self, path: pathlib.Path) -> Source:
    if path.suffix == ".gguf":
      file = gguf_file.GgufFile(path)
      found, _ = names.canonical(file.infos)
      section = hf_decoder.decoder_section(file.config(), str(path))
      return Source("GGUF decoder", {"decoder": section}, located(file, found))
    if path.suffix in PICKLES:
      return llava_mole.read_release(path, self._unpickled([path]))
    raise CheckpointError(
      f"{path} is a file; wanted {KINDS}; folders are named as such."
    )

  def _adapter(self, path: pathlib.Path) -> Source:
    """A PEFT folder; LoRA runs of the original LLaVA are such folders too."""
    if (path / peft.WEIGHTS_FILE).exists():
      stores: list[Store] = [Folder(path, peft.WEIGHTS_FILE)]
    else:
      found = pickles.find_pickles(path)
      if not found:
        raise CheckpointError(
          f"{path} holds {peft.CONFIG_FILE} but neither {peft.WEIGHTS_FILE} "
          "nor adapter_model.bin; download the adapter again."
        )
      stores = [self._unpickled(found)]
    projector = path / peft.ORIGINAL_PROJECTOR
    model = {}
    if (path / "config.json").exists():
      values = hf_json.read_json(path / "config.json")
      if is_original(values):
        model = original_sections(values, str(path / "config.json"))
        if not projector.exists():
          raise CheckpointError(
            f"{path} is a LoRA run of the original LLaVA without its "
            f"{projector.name}, which holds the trained projector; without it "
            "the adapter is worth nothing. Get the file from where the adapter "
            "came from."
          )
    if projector.exists():
      stores.append(self._unpickled([projector]))
    return peft.read_adapter(path, stores, model)

  def _folder(self, path: pathlib.Path) -> Store:
    """Safetensors where they are, pickles where there is nothing else."""
    found = pickles.find_pickles(path)
    return (
      self._unpickled(found) if found and not _is_safe(path) else (Folder(path))
    )

  def _unpickled(self, files: list[pathlib.Path]) -> Store:
    opened = pickles.unpickled(
      files, allow=self._allow_pickle, scratch=self._scratch
    )
    return self._stack.enter_context(opened)


def _is_safe(path: pathlib.Path) -> bool:
  return any(path.glob("*.safetensors"))


def is_original(values: Mapping[str, Any]) -> bool:
  """Whether a config.json is that of haotian-liu/LLaVA."""
  return "mm_hidden_size" in values or "mm_vision_tower" in values


def original_sections(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The model section of an original LLaVA's config.json.

  It has no id for the image (-200 stands for it), and names its tower only.
  """
  text = {**values, "model_type": "llama"}
  if values.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
    raise CheckpointError(
      f"{where}: mm_projector_type is {values['mm_projector_type']!r}; wanted "
      "'mlp2x_gelu', that of LLaVA-1.5."
    )
  return {
    "decoder": hf_decoder.decoder_section(text, where),
    "use_visual_tokens": False,
    "feature_layer": values.get("mm_vision_select_layer", -2),
  }


def read_model(
  path: pathlib.Path, values: Mapping[str, Any], store: Store
) -> Source:
  """A whole LLaVA, a decoder or a tower, from its config.json."""
  where = str(path / "config.json")
  model_type = values.get("model_type")
  infos = list(store.infos)
  if model_type in ("clip", "siglip"):
    # The tower of a whole CLIP; its text half is none of ours.
    infos = [name for name in infos if name.startswith("vision_model.")]
    values = {
      "model_type": f"{model_type}_vision_model",
      **values.get("vision_config", {}),
    }
    model_type = values["model_type"]
  found, layouts = names.canonical(infos)
  balance = None
  if is_original(values):
    model = original_sections(values, where)
    kind = "original LLaVA"
  elif model_type == "llava":
    text = values.get("text_config", {})
    model = hf_config.llava_sections(values, where) | mixtral.sections(text)
    balance = mixtral.balance(text)
    kind = f"LLaVA in the names of {' and '.join(sorted(layouts))}"
  elif model_type in hf_decoder.DECODERS:
    section = hf_decoder.decoder_section(values, where)
    model = {"decoder": section} | mixtral.sections(values)
    balance = mixtral.balance(values)
    kind = f"{model_type} decoder"
  elif model_type in hf_tower.TOWERS:
    section = hf_tower.vision_section(values, where)
    model = {"vision": section}
    kind = f"{hf_tower.TITLES[section['family']]} tower"
  else:
    raise CheckpointError(
      f"{where}: model_type is {model_type!r}; wanted {KINDS}."
    )
  if "vision" in model:
    size = hf_processor.processor_size(path)
    if size and model["vision"]["position_grid"]:
      # DINOv2 sees other sizes than it learned positions for.
      model["vision"]["image_size"] = size
  return Source(kind, model, located(store, found), balance)
