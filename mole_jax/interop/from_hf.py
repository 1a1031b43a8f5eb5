"""Weights in: any format that hf.py finds out, to a base of ours."""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.table
import tokenizers

from mole_jax.data import layout, sentencepiece_file, templates, tokenizer
from mole_jax.data.conversation import VICUNA_SYSTEM
from mole_jax.interop import (
  hf,
  hf_processor,
  mole_folder,
  sources,
  tables,
  vicuna_jinja,
)
from mole_jax.interop.tensors import (
  CheckpointError,
  ShardWriter,
  new_directory,
)
from mole_jax.models import llava
from mole_jax.training import base as base_lib
from mole_jax.training import state

# Files that make a folder usable, carried along as they are.
COMPANIONS = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.json",
  "chat_template.jinja",
  "generation_config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "LICENSE",
  "LICENSE.txt",
  "NOTICE",
  "USE_POLICY.md",
)
UNUSED_FOLDER = "unused"
# Vocabularies grow to a multiple of this: tiles of an accelerator.
VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class _Text:
  """What the tokenizer adds to a model: `notes` for the user."""

  model: dict[str, Any]
  template: str
  system: str
  use_bos: bool
  notes: tuple[str, ...]


def convert(
  src: pathlib.Path,
  out: pathlib.Path,
  *,
  llm: pathlib.Path | None = None,
  vision: pathlib.Path | None = None,
  dtype: str | None = None,
  allow_pickle: bool = False,
) -> rich.table.Table:
  """Converts a model (completed by others) to a base.

  Args:
    src: a whole LLaVA, a part of one, or adapters; see `hf.KINDS`.
    out: where the base is written; must not exist.
    llm: the decoder, or the whole LLaVA under an adapter, where `src` has
      none.
    vision: the tower, where there is none yet.
    dtype: of the parameters, "float32" or "bfloat16"; None keeps theirs.
    allow_pickle: whether PyTorch's pickles may be read.

  Returns a table of what was done. Raises CheckpointError, having written
  nothing, where the input cannot be used.
  """
  folders = [
    path if path.is_dir() else path.parent
    for path in (src, llm, vision)
    if path is not None
  ]
  kept = sources.DTYPES[dtype] if dtype else None
  with (
    new_directory(out) as partial,
    hf.Opener(allow_pickle, partial) as opener,
  ):
    source = sources.combine(
      opener.source(src),
      None if llm is None else opener.source(llm),
      None if vision is None else opener.source(vision),
    )
    plan = sources.plan(source)
    mole_folder.check_base(source)
    copied = _copy_companions(folders, partial)
    text = _prepare_text(source, folders[: 1 + (llm is not None)], partial)
    settings = hf_processor.image_settings(folders)
    about = _about(source, text, settings, plan.new, out.name)
    about["licences"] = _licences(folders)
    reference = base_lib.write_base(
      partial, _parameters(source, text.model, plan, kept), about
    )
    if plan.unused:
      (partial / UNUSED_FOLDER).mkdir()
      with ShardWriter(partial / UNUSED_FOLDER, 2**31) as writer:
        for name in plan.unused:
          array = source.tensors[name].read()
          writer.add(name, array if kept is None else array.astype(kept))
  table = tables.new_table("converted to a base")
  table.add_row("found", source.kind)
  tables.add_counts(table, base_lib.BaseReader(out).parameters)
  table.add_row("initialised", ", ".join(plan.new) or "nothing")
  table.add_row("kept though unused", ", ".join(plan.unused) or "nothing")
  table.add_row("copied", ", ".join(copied) or "nothing")
  for note in (*source.notes, *text.notes):
    table.add_row("note", note)
  table.add_row("sha256", reference.sha256)
  return table


def _about(
  source: sources.Source,
  text: _Text,
  settings: dict[str, Any],
  new: Sequence[str],
  name: str,
) -> dict[str, Any]:
  """What base.json says beside the parameters."""
  has_adapters = "lora" in text.model or "mole" in text.model
  return {
    "model": text.model,
    "source": source.kind,
    "initialised": list(new),
    # What `mole_jax.load` needs, in the words of a run's config.
    "config": {
      "name": name,
      "seed": 0,
      "model": sources.full_model_section(text.model),
      "balance": source.balance or {"loss": "pooled", "weight": 0.0},
      "stages": {
        "base": {
          "use_adapters": has_adapters,
          "use_experts": "moe" in text.model,
        }
      },
      "data": {
        "tokenizer": "tokenizer.json",
        "template": text.template,
        "system": text.system,
        "use_bos": text.use_bos,
        **settings,
      },
    },
  }


def _parameters(
  source: sources.Source,
  model: dict[str, Any],
  plan: sources.Plan,
  dtype: np.dtype | None,
) -> Iterator[tuple[str, np.ndarray]]:
  """Every parameter of the base, one at a time."""
  vocab_size = model["decoder"]["vocab_size"]
  for path, array in sources.read_parameters(source, plan.rows, dtype):
    if path in ("decoder/embed_tokens", "decoder/lm_head_bias"):
      array = _grow(array, vocab_size, axis=0)
    elif path == "decoder/lm_head":
      array = _grow(array, vocab_size, axis=1)
    yield path, array
    del array
  if plan.new:
    config = llava.make_config(sources.full_model_section(model))
    # Under jit only these are computed, not the whole model.
    initialise = jax.jit(lambda key: state.initialise(config, key, plan.new))
    for name, leaf in initialise(jax.random.key(0)).items():
      yield name, np.asarray(leaf if dtype is None else leaf.astype(dtype))


def _grow(array: np.ndarray, size: int, axis: int) -> np.ndarray:
  """Adds rows (or columns) of the mean of those that are there."""
  more = size - array.shape[axis]
  if not more:
    return array
  mean = array.mean(axis=axis, keepdims=True, dtype=np.float32)
  rows = np.repeat(mean.astype(array.dtype), more, axis=axis)
  return np.concatenate([array, rows], axis=axis)


def _licences(folders: Sequence[pathlib.Path]) -> list[str]:
  """What the model cards of the folders name as licence."""
  found = []
  for folder in folders:
    card = folder / "README.md"
    if card.is_file():
      text = card.read_text(errors="replace")
      match = re.search(r"\A---\n.*?^license: *(\S+)", text, re.M | re.S)
      found += [match[1]] if match else []
  return list(dict.fromkeys(found))


def _copy_companions(
  folders: Sequence[pathlib.Path], partial: pathlib.Path
) -> list[str]:
  copied = []
  for name in COMPANIONS:
    for folder in folders:
      if copy_file(folder / name, partial / name):
        copied.append(name)
  return copied


def copy_file(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Copies a file that exists, unless an earlier folder brought one."""
  if not source.is_file() or target.exists():
    return False
  shutil.copyfile(source, target)
  return True


def _prepare_text(
  source: sources.Source, folders: Sequence[pathlib.Path], out: pathlib.Path
) -> _Text:
  """Makes the tokenizer usable for a LLaVA, and finds the chat template.

  A tokenizer without `<image>` gets it, and the vocabulary room for it.
  """
  model = dict(source.model)
  target = out / "tokenizer.json"
  notes = []
  if not target.exists() and (out / "tokenizer.model").exists():
    sentencepiece_file.convert_sentencepiece(out / "tokenizer.model", target)
    notes.append("tokenizer.json was made from tokenizer.model.")
  if not target.exists():
    notes.append(
      "no tokenizer was found: the base can be exported, but not trained or "
      "asked before a tokenizer.json stands beside it."
    )
    return _Text(model, "vicuna", VICUNA_SYSTEM, True, tuple(notes))
  wanted = model.get("image_token_id", 0)
  image_id = tokenizer.add_image_token(target, target, wanted)
  size = model["decoder"]["vocab_size"]
  if model.setdefault("image_token_id", image_id) != image_id:
    raise CheckpointError(
      f"the tokenizer's <image> is {image_id}, but config.json says "
      f"{wanted}: they do not belong together."
    )
  if image_id >= size:
    grown = -(-(image_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    model["decoder"] = model["decoder"] | {"vocab_size": grown}
    notes.append(
      f"<image> is token {image_id}; the vocabulary grew from {size:,} to "
      f"{grown:,}, new rows are the mean of the others."
    )
  text = tokenizer.Tokenizer(target)
  own = _vicuna_of(out)
  if own is not None:
    return _Text(model, "vicuna", *own, tuple(notes))
  if _has_template(out):
    try:
      template = templates.read_template("tokenizer", text)
    except ValueError as error:
      notes.append(f"Vicuna's chat template is used, since: {error}")
    else:
      # Processors (content as a list) let the tokenizer put BOS first,
      # tokenizers alone do not where there is a template.
      is_processor = layout.find_form(template.script, text).is_list
      use_bos = is_processor and _adds_bos(target, text)
      return _Text(model, "tokenizer", "", use_bos, tuple(notes))
  use_bos = text.bos_id is not None
  return _Text(model, "vicuna", VICUNA_SYSTEM, use_bos, tuple(notes))


def _adds_bos(path: pathlib.Path, text: tokenizer.Tokenizer) -> bool:
  ids = tokenizers.Tokenizer.from_file(str(path)).encode("a").ids
  return text.bos_id is not None and ids[:1] == [text.bos_id]


def _vicuna_of(folder: pathlib.Path) -> tuple[str, bool] | None:
  """System text and use_bos, where the template is one that we wrote."""
  path = folder / "chat_template.jinja"
  return vicuna_jinja.read(path.read_text()) if path.is_file() else None


def _has_template(folder: pathlib.Path) -> bool:
  if (folder / "chat_template.jinja").is_file():
    return True
  return any(
    tokenizer.read_json(folder / name).get("chat_template")
    for name in ("tokenizer_config.json", "chat_template.json")
  )
