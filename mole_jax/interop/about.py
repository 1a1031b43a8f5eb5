"""What a checkpoint on disk is, from its headers."""

import pathlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import rich.table

from mole_jax.interop import hf, opened, pickles, sources, tables
from mole_jax.interop.tensors import CheckpointError
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files


def describe(
  path: pathlib.Path, allow_pickle: bool = False
) -> list[rich.table.Table]:
  """Tables about a base, a run, or anything that `from-hf` reads.

  Raises ValueError where it is none of them, or is damaged.
  """
  if not path.exists():
    raise CheckpointError(f"{path} does not exist.")
  if (path / base_lib.BASE_FILE).exists():
    return [_base(path)]
  if any((parent / "run.json").exists() for parent in (path, *path.parents)):
    return [_run(path)]
  with (
    tempfile.TemporaryDirectory() as scratch,
    hf.Opener(allow_pickle, pathlib.Path(scratch)) as opener,
  ):
    return [_foreign(path, opener)]


def _base(path: pathlib.Path) -> rich.table.Table:
  reader = base_lib.BaseReader(path)
  table = tables.new_table(f"{path}: a base")
  table.add_row("source", reader.about.get("source", "trained here"))
  tables.add_counts(table, reader.parameters)
  model = reader.about.get("model", {})
  if not model and (path.absolute().parent / "config.json").exists():
    model = opened.open_checkpoint(path.absolute()).model  # RUN/<stage>.
  _add_model(table, model)
  table.add_row("sha256", reader.about["sha256"])
  return table


def _run(path: pathlib.Path) -> rich.table.Table:
  trained = checkpoint.read_trained(path)
  config = trained.config
  table = tables.new_table(f"{path}: a run of {config['name']}")
  table.add_row("variant", config["variant"])
  table.add_row("seed", str(config["seed"]))
  table.add_row("stage, step", f"{trained.stage}, {trained.step}")
  tables.add_counts(table, tables.entries(trained.trainable.shapes), "trained ")
  if trained.base is not None:
    table.add_row("base", str(trained.base.directory))
    table.add_row("base's sha256", trained.base.about["sha256"])
  _add_model(table, opened.open_checkpoint(path).model)
  return table


def _foreign(path: pathlib.Path, opener: hf.Opener) -> rich.table.Table:
  source = opener.source(path)
  table = tables.new_table(f"{path}: {source.kind}")
  infos = {name: place.info() for name, place in source.tensors.items()}
  # "language_model", "vision_tower", "multi_modal_projector".
  groups: dict[str, list[str]] = {}
  for name in infos:
    is_adapter = ".lora_" in name or "router." in name
    group = "adapters" if is_adapter else name.split(".")[0]
    if ".mlp.experts." in name or name.endswith(".mlp.gate.weight"):
      group = "experts and their routers"
    groups.setdefault(group, []).append(name)
  for group, members in groups.items():
    count = sum(int(np.prod(infos[n].shape, dtype=np.int64)) for n in members)
    types = ", ".join(sorted({str(infos[name].dtype) for name in members}))
    table.add_row(group, f"{count:,} parameters, {types}")
  _add_model(table, source.model)
  for note in source.notes:
    table.add_row("note", note)
  for file, sha256 in _hashes(path, {info.file for info in infos.values()}):
    table.add_row(f"sha256 of {file}", sha256)
  return table


def _hashes(
  path: pathlib.Path, names: Collection[str]
) -> Iterator[tuple[str, str]]:
  """Hashes of the files that tensors come from, as `sha256sum` prints them."""
  if path.is_file():
    found = [path]
  else:
    found = [path / name for name in sorted(names)]
    if not all(file.is_file() for file in found):
      # Unpickled elsewhere, or in folders of their own.
      found = pickles.find_pickles(path) or sorted(path.rglob("*.safetensors"))
  for file in found:
    name = str(file.relative_to(path) if path.is_dir() else file.name)
    yield name, files.sha256(file)


def _add_model(table: rich.table.Table, model: Mapping[str, Any]) -> None:
  """Rows with the settings that give the model its shape."""
  kinds = sources.experts_by_layer(model) if "decoder" in model else ()
  for number in sorted(set(kinds) - {0}):
    layers = [str(i) for i, kind in enumerate(kinds) if kind == number]
    table.add_row(
      f"layers with {number} FFNs",
      f"{', '.join(layers)} of {len(kinds)} layers, "
      f"{model['moe']['top_k']} a token",
    )
  for section, values in model.items():
    if isinstance(values, Mapping):
      text = ", ".join(f"{key} {value}" for key, value in values.items())
    else:
      text = str(values)
    table.add_row(f"model.{section}", text)
