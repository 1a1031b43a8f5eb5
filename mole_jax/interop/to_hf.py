"""Weights out: a checkpoint of ours to folders that PyTorch users load."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.table

from mole_jax.interop import (
  card,
  from_hf,
  hf_config,
  mixtral,
  moe_names,
  mole_folder,
  names,
  peft,
  processor,
  sources,
  tables,
  write_hf,
)
from mole_jax.interop import opened as opened_lib
from mole_jax.interop.tensors import (
  CheckpointError,
  Folder,
  ShardWriter,
  new_directory,
)

FORMATS = ("merged", "native-moe", "mole", "experts")


@dataclasses.dataclass(frozen=True)
class _Job:
  """One export: what is written, as which type, in which shards.

  model: `config.model` of what is written; `rows` and `read` are of it.
  """

  opened: opened_lib.Opened
  format: str
  model: Mapping[str, Any]
  read: write_hf.Reader
  rows: list[names.Name]
  without_base: bool
  dtype: np.dtype | None  # None keeps each parameter's.
  max_shard_bytes: int

  def dtype_of(self, path: str) -> np.dtype:
    return self.dtype or self.opened.params.dtype(path)


def convert(
  ckpt: pathlib.Path,
  out: pathlib.Path,
  *,
  format: str,
  max_shard_bytes: int,
  dtype: str | None = None,
  without_base: bool = False,
  ignores_capacity: bool = False,
  dry_run: bool = False,
) -> rich.table.Table:
  """Writes a checkpoint for PyTorch.

  Args:
    ckpt: a base that `from-hf` wrote, or a run, a stage or a step of it.
    out: where to write; must not exist.
    format: "merged", a stock LLaVA, plain LoRA added into its base;
      "native-moe", a stock LLaVA with Mixtral, for experts that are whole
      FFNs; "mole", adapters and experts as they are, with their own modeling
      file; or "experts", one PEFT folder an expert with the router beside them.
    max_shard_bytes: size of a shard.
    dtype: of the tensors; None keeps the type of each parameter.
    without_base: of "mole", only what adapters add, and hashes of their base.
    ignores_capacity: write experts that drop tokens at evaluation to a format
      that drops none.
    dry_run: checks everything that headers tell, and writes nothing.

  Returns a table of what was done. Raises ValueError, having written nothing,
  where the format cannot hold the model.
  """
  opened = opened_lib.open_checkpoint(ckpt)
  model = opened.model
  rows = sources.rows_of(model)
  read: write_hf.Reader = opened.params.__getitem__
  if without_base and format != "mole":
    raise CheckpointError(
      "--without-base goes with --format mole; experts never hold their base."
    )
  if format == "merged":
    write_hf.check_stock(model)
    rows = [row for row in rows if not names.is_adapter(row)]
    read = write_hf.merged_reader(opened.params, model)
  elif format == "native-moe":
    mixtral.check(model, ignores_capacity=ignores_capacity)
    read = mixtral.reader(opened.params, model)
    model = mixtral.as_dense(model)
    rows = sources.rows_of(model)
  elif format == "mole":
    write_hf.check_mole(model, ignores_capacity=ignores_capacity)
  else:
    write_hf.check_experts(model)
  if without_base and not opened.has_adapters:
    raise CheckpointError(
      f"{ckpt} has no adapters: without its base nothing is left of it."
    )
  if without_base or format == "experts":
    if "config" not in opened.about and model["use_visual_tokens"]:
      raise CheckpointError(
        "the base of this run was trained with it, with visual_start and "
        "visual_end vectors: no stock LLaVA is that base, so adapters alone "
        "are worth nothing. Use --format mole with the base."
      )
    if any(sources.experts_by_layer(model)):
      raise CheckpointError(
        "the base of this run has whole FFNs as experts: no stock LLaVA is "
        "that base. Use --format mole with the base."
      )
    if write_hf.has_head_bias(model):
      raise CheckpointError(
        "the head of this decoder has a bias, and stock LLaVA's has none, so "
        "it cannot be the base of adapters alone. Use --format mole with the "
        "base."
      )
    rows = [row for row in rows if write_hf.is_added(row)]
    left = sorted(opened.params.trained - {row.path for row in rows})
    if left:
      raise CheckpointError(
        f"the run trained parameters of its base too ({', '.join(left[:3])}), "
        "which would stay behind: use --format mole with the base."
      )
  job = _Job(
    opened,
    format,
    model,
    read,
    rows,
    without_base,
    sources.DTYPES[dtype] if dtype else None,
    max_shard_bytes,
  )
  shapes = {
    row.path: jax.ShapeDtypeStruct(
      sources.parameter_shapes(model)[row.path].shape, job.dtype_of(row.path)
    )
    for row in rows
  }
  table = tables.new_table(f"written in the format {format!r}")
  table.add_row("from", opened.what)
  tables.add_counts(table, tables.entries(shapes))
  num_bytes = sum(leaf.dtype.itemsize * leaf.size for leaf in shapes.values())
  table.add_row("size", f"{num_bytes / 1e9:.2f} GB")
  if dry_run:
    return table
  with new_directory(out) as partial:
    if format == "experts":
      _write_experts(job, partial)
    else:
      _write_model(job, partial)
    (partial / "README.md").write_text(
      card.write(opened, format, without_base=without_base)
    )
  return table


def _write_model(job: _Job, out: pathlib.Path) -> None:
  """All formats but "experts": one model, base and all."""
  opened, model = job.opened, job.model
  family = model["vision"]["family"]
  is_mole = job.format == "mole"
  of_base = _unused(job, family)
  unused = {} if job.without_base else of_base
  # Our own modeling file gets names as modules have them: no conversion table
  # of Transformers knows it.
  rename: Callable[[str], str] = (
    names.in_memory if is_mole else lambda name: names.on_disk(name, family)
  )
  # Adapters alone are one file: the modeling file asks for it by name.
  max_bytes = 2**62 if job.without_base else job.max_shard_bytes
  with ShardWriter(out, max_bytes) as writer:
    for name, array in write_hf.tensors(
      model, job.rows, job.read, job.dtype_of
    ):
      # Stock names: experts apart. Ours: stacked.
      parts = [(name, array)] if is_mole else moe_names.as_mixtral(name, array)
      for part, values in parts:
        writer.add(rename(part), values)
        del values
      del array, parts
    for name, array in unused.items():
      writer.add(rename(name), array)
  dtype = str(job.dtype_of("decoder/embed_tokens"))
  if is_mole:
    values = mole_folder.mole_config(model, opened.balance, dtype)
    write_hf.write_modeling(out)
  elif job.format == "native-moe":
    values = mixtral.config(model, opened.balance["weight"], dtype)
  else:
    values = hf_config.llava_config(model, dtype)
  if family == "siglip":
    has_head = any(".head." in name for name in of_base)
    values["vision_config"]["vision_use_head"] = has_head
  if job.without_base:
    values["base_name"] = base_name(opened)
    _write_json(out / mole_folder.BASE_TENSORS, _base(job))
  _write_json(out / "config.json", values)
  processor.write(opened, out)
  _check_written(Folder(out), model, job.rows, str(out), unused)


def _write_experts(job: _Job, out: pathlib.Path) -> None:
  """One PEFT folder an expert; plain LoRA is such a folder itself."""
  opened, model = job.opened, job.opened.model
  num_experts = model["mole"]["num_experts"]
  config = peft.adapter_config(model)
  if num_experts <= 1:
    _write_expert(job, out, config, 0)
    return
  for expert in range(num_experts):
    folder = out / f"expert_{expert}"
    folder.mkdir()
    _write_expert(job, folder, config, expert)
  router = [
    row
    for row in job.rows
    if "router" in row.path or row.path.startswith("visual_")
  ]
  read = opened.params.__getitem__
  with ShardWriter(out, 2**62, mole_folder.ROUTER_FILE) as writer:
    for name, array in write_hf.tensors(model, router, read, job.dtype_of):
      writer.add(names.in_memory(name), array)
      del array
  values = mole_folder.settings(model, opened.balance)
  values["image_token_index"] = model["image_token_id"]
  values["base"] = _base(job)
  _write_json(out / mole_folder.MIXTURE_FILE, values)


def _write_expert(
  job: _Job, folder: pathlib.Path, config: Mapping[str, Any], expert: int
) -> None:
  """What PEFT loads: attention's LoRA, one expert's, and the projector."""
  model, params = job.opened.model, job.opened.params
  rows = [
    row
    for row in job.rows
    if "router" not in row.path and not row.path.startswith("visual_")
  ]

  def read(path: str) -> np.ndarray:
    is_expert = "/mlp/" in path and "/lora_" in path
    return params[path][:, expert] if is_expert else params[path]

  with ShardWriter(folder, 2**62, peft.WEIGHTS_FILE) as writer:
    for name, array in write_hf.tensors(model, rows, read, job.dtype_of):
      writer.add(peft.stored_name(name), array)
      del array
  _write_json(folder / peft.CONFIG_FILE, config)


def base_name(opened: opened_lib.Opened) -> str:
  """What the base is called, for people."""
  if "config" in opened.about:
    return opened.about["config"]["name"]
  return f"base of {opened.what}"


def _base(job: _Job) -> dict[str, Any]:
  """Name of the base that adapters belong to, and hashes of its tensors."""
  opened, model = job.opened, job.opened.model
  written = {row.path for row in job.rows}
  rows = [row for row in sources.rows_of(model) if row.path not in written]
  read = opened.params.__getitem__
  hashes = {}
  for name, array in write_hf.tensors(model, rows, read, opened.params.dtype):
    hashes[names.in_memory(name)] = mole_folder.digest(array)
    del array
  return {"name": base_name(opened), "tensors": hashes}


def _unused(job: _Job, family: str) -> dict[str, np.ndarray]:
  """Tensors that nothing computes with: as they came, else as they start."""
  opened, held = job.opened, {}
  if opened.folder is not None:
    path = opened.folder / from_hf.UNUSED_FOLDER
    if path.exists():
      folder = Folder(path)
      held = {name: folder.read(name) for name in folder.infos}
  width = opened.model["vision"]["hidden_size"]
  dtype = job.dtype_of("vision/position_embedding")
  for name, value in names.unused(family).items():
    if value is not None and name not in held:
      is_token = name.endswith("mask_token")
      held[name] = np.full((1, width) if is_token else width, value, dtype)
  if job.dtype is not None:
    return {name: array.astype(job.dtype) for name, array in held.items()}
  return held


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


def _check_written(
  folder: Folder,
  model: Mapping[str, Any],
  rows: Sequence[names.Name],
  where: str,
  unused: Mapping[str, np.ndarray],
) -> None:
  """Raises CheckpointError unless the tensors are exactly those of `rows`."""
  wanted = names.tensor_names(rows, sources.num_layers(model))
  found, _ = names.canonical(folder.infos)
  found = sources.located(folder, found)
  names.check_coverage(found, [*wanted, *unused], where)
