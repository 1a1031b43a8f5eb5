"""A conversion from end to end: read, check, write, say what was done."""

import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.table

from mole_jax.data.conversation import VICUNA_SYSTEM
from mole_jax.data.tokenizer import EMBEDDED_TOKENIZER
from mole_jax.interop import card, hf, hf_config, names, write_hf
from mole_jax.interop import opened as opened_lib
from mole_jax.interop.tensors import (
  Folder,
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
)
UNUSED_FOLDER = "unused"


def from_hf(
  src: pathlib.Path,
  out: pathlib.Path,
  *,
  llm: pathlib.Path | None = None,
  vision: pathlib.Path | None = None,
  dtype: str | None = None,
) -> rich.table.Table:
  """Converts a folder (completed by others) to a base.

  Args:
    src: a LLaVA in any layout of `names.PREFIXES`, or a decoder or a tower.
    out: where the base is written; must not exist.
    llm: the decoder, where `src` has none.
    vision: the tower, where `src` has none.
    dtype: of the parameters, "float32" or "bfloat16"; None keeps theirs.

  Returns a table of what was done. Raises CheckpointError, having written
  nothing, where the input cannot be used.
  """
  source = hf.combine(
    hf.read_source(src),
    None if llm is None else hf.read_source(llm),
    None if vision is None else hf.read_source(vision),
  )
  rows, unused = hf.plan(source)
  new = [
    n for n in hf.parameter_shapes(source.model) if n.startswith("projector")
  ]
  if any(row.path in new for row in rows):
    new = []
  kept = hf.DTYPES[dtype] if dtype else None

  def parameters() -> Iterator[tuple[str, np.ndarray]]:
    yield from hf.read_parameters(source, rows, kept)
    if new:
      config = llava.make_config(hf.full_model_section(source.model))
      made = state.initialise(config, jax.random.key(0), new)
      for name, leaf in made.items():
        yield name, np.asarray(leaf.astype(kept or leaf.dtype))

  folders = [folder for folder in (src, vision) if folder is not None]
  normalisation = hf_config.normalisation(folders)
  about = {
    "model": source.model,
    "source": source.kind,
    "initialised": new,
    **normalisation,
    # What `mole_jax.load` needs; LLaVA-1.5's template.
    "config": {
      "name": out.name,
      "seed": 0,
      "model": hf.full_model_section(source.model),
      "stages": {"base": {"use_adapters": False}},
      "data": {
        "tokenizer": "tokenizer.json",
        "system": VICUNA_SYSTEM,
        "use_bos": True,
        **normalisation,
      },
    },
  }
  with new_directory(out) as partial:
    reference = base_lib.write_base(partial, parameters(), about)
    if unused:
      (partial / UNUSED_FOLDER).mkdir()
      with ShardWriter(partial / UNUSED_FOLDER, 2**31) as writer:
        for name in unused:
          writer.add(name, source.read(name))
    copied = [
      name
      for name in COMPANIONS
      for folder in (src, llm, vision)
      if folder is not None and _copy(folder / name, partial / name)
    ]
  table = new_table("converted to a base")
  table.add_row("found", source.kind)
  reader = base_lib.BaseReader(out)
  add_counts(table, reader.parameters)
  table.add_row("initialised", ", ".join(new) or "nothing")
  table.add_row("kept though unused", ", ".join(unused) or "nothing")
  table.add_row("copied", ", ".join(copied) or "nothing")
  table.add_row("sha256", reference.sha256)
  return table


def _copy(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Copies a file that exists, unless an earlier folder brought one."""
  if not source.is_file() or target.exists():
    return False
  shutil.copyfile(source, target)
  return True


def new_table(title: str) -> rich.table.Table:
  table = rich.table.Table(title=title, show_header=False)
  table.add_column("what")
  table.add_column("value", overflow="fold")
  return table


def entries(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Shapes and types of arrays, as base.json tells them."""
  return {
    name: {"shape": leaf.shape, "dtype": str(leaf.dtype)}
    for name, leaf in leaves.items()
  }


def add_counts(
  table: rich.table.Table,
  parameters: Mapping[str, Mapping[str, Any]],
  prefix: str = "",
) -> None:
  """Rows with numbers of parameters by part, and their types."""
  counts: dict[str, int] = {}
  for name, entry in parameters.items():
    part = prefix + state.group(name)
    size = int(np.prod(entry["shape"], dtype=np.int64))
    counts[part] = counts.get(part, 0) + size
  for part, count in counts.items():
    table.add_row(part, f"{count:,} parameters")
  types = ", ".join(sorted({e["dtype"] for e in parameters.values()}))
  total = sum(counts.values())
  table.add_row(f"{prefix}in all", f"{total:,} parameters, {types}")


def to_hf(
  ckpt: pathlib.Path,
  out: pathlib.Path,
  *,
  format: str,
  max_shard_bytes: int,
  dtype: str | None = None,
  dry_run: bool = False,
) -> rich.table.Table:
  """Writes a checkpoint for PyTorch.

  Args:
    ckpt: a base that `from_hf` wrote, or a run, a stage or a step of it.
    out: where to write; must not exist.
    format: "merged", a stock LLaVA, plain LoRA added into its base; or
      "mole", adapters as they are, with their own modeling file.
    max_shard_bytes: size of a shard.
    dtype: of the tensors; None is that of the embedding table.
    dry_run: checks everything that headers tell, and writes nothing.

  Returns a table of what was done. Raises ValueError, having written nothing,
  where the format cannot hold the model.
  """
  opened = opened_lib.open_checkpoint(ckpt)
  model = opened.model
  rows = hf.rows_of(model)
  if format == "merged":
    write_hf.check_stock(model)
  else:
    write_hf.check_mole(model, opened.config)
    rows += [row for row in names.ADAPTERS if row.path in opened.params]
  kept = hf.DTYPES[dtype or str(opened.params["decoder/embed_tokens"].dtype)]
  shapes = {
    row.path: jax.ShapeDtypeStruct(opened.params.shape(row.path), kept)
    for row in rows
  }
  table = new_table(f"written in the format {format!r}")
  table.add_row("from", opened.what)
  add_counts(table, entries(shapes))
  num_bytes = kept.itemsize * sum(leaf.size for leaf in shapes.values())
  table.add_row("size", f"{num_bytes / 1e9:.2f} GB")
  if dry_run:
    return table
  with new_directory(out) as partial:
    _write(opened, partial, rows, format, kept, max_shard_bytes)
  return table


def _write(
  opened: opened_lib.Opened,
  out: pathlib.Path,
  rows: list[names.Name],
  format: str,
  dtype: np.dtype,
  max_shard_bytes: int,
) -> None:
  """Everything that a directory of a format holds."""
  model, config = opened.model, opened.config
  unused = {}
  if opened.folder is not None and (opened.folder / UNUSED_FOLDER).exists():
    held = Folder(opened.folder / UNUSED_FOLDER)
    unused = {name: held.read(name) for name in held.infos}
  is_mole = format == "mole"
  write_hf.write_tensors(
    out,
    model,
    rows,
    opened.params.__getitem__
    if is_mole
    else write_hf.merged_reader(opened.params, model),
    unused,
    # Our own modeling file gets names as modules have them: no conversion
    # table of Transformers knows it.
    names.in_memory if is_mole else lambda name: name,
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )
  if is_mole:
    values = hf_config.mole_config(model, config["balance"], str(dtype))
    write_hf.write_modeling(out)
  else:
    values = hf_config.llava_config(model, str(dtype))
  write_hf.write_config(out, values)
  if opened.folder is not None:
    for name in COMPANIONS:
      _copy(opened.folder / name, out / name)
  if config is not None:
    tokenizer = config["data"]["tokenizer"]
    path = EMBEDDED_TOKENIZER if tokenizer == "embedded" else tokenizer
    _copy(pathlib.Path(path), out / "tokenizer.json")
    if not (out / "preprocessor_config.json").exists():
      write_hf.write_processor(out, model, config["data"])
  (out / "README.md").write_text(card.write(opened, format))
  _check_written(out, model, rows)


def _check_written(
  folder: pathlib.Path, model: Mapping[str, Any], rows: list[names.Name]
) -> None:
  """Raises CheckpointError unless the tensors are exactly those of `rows`."""
  wanted = names.tensor_names(rows, hf.num_layers(model))
  found, _ = names.canonical(Folder(folder).infos)
  names.check_coverage(found, [*wanted, *names.UNUSED], str(folder))
