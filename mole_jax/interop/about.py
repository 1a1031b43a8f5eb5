"""What a checkpoint on disk is, from its headers."""

import pathlib
from collections.abc import Mapping
from typing import Any

import rich.table

from mole_jax.interop import formats, hf
from mole_jax.interop.tensors import CheckpointError
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint


def describe(path: pathlib.Path) -> list[rich.table.Table]:
  """Tables about a base, a run, or a folder in Hugging Face's layout.

  Raises ValueError where it is none of them, or is damaged.
  """
  if not path.exists():
    raise CheckpointError(f"{path} does not exist.")
  if (path / base_lib.BASE_FILE).exists():
    return [_base(path)]
  if any((parent / "run.json").exists() for parent in (path, *path.parents)):
    return [_run(path)]
  return [_folder(path)]


def _base(path: pathlib.Path) -> rich.table.Table:
  reader = base_lib.BaseReader(path)
  table = formats.new_table(f"{path}: a base")
  table.add_row("source", reader.about.get("source", "trained here"))
  formats.add_counts(table, reader.parameters)
  _add_model(table, reader.about.get("model", {}))
  table.add_row("sha256", reader.about["sha256"])
  return table


def _run(path: pathlib.Path) -> rich.table.Table:
  trained = checkpoint.read_trained(path)
  config = trained.config
  table = formats.new_table(f"{path}: a run of {config['name']}")
  table.add_row("variant", config["variant"])
  table.add_row("seed", str(config["seed"]))
  table.add_row("stage, step", f"{trained.stage}, {trained.step}")
  formats.add_counts(table, formats.entries(trained.trainable), "trained ")
  if trained.base is not None:
    table.add_row("base", str(trained.base.directory))
    table.add_row("base's sha256", trained.base.about["sha256"])
  _add_model(table, config["model"])
  return table


def _folder(path: pathlib.Path) -> rich.table.Table:
  source = hf.read_source(path)
  table = formats.new_table(f"{path}: {source.kind}")
  # "language_model", "vision_tower", "multi_modal_projector".
  for part in dict.fromkeys(name.split(".")[0] for name in source.tensors):
    infos = [
      source.info(name) for name in source.tensors if name.startswith(part)
    ]
    count = sum(info.num_bytes // info.dtype.itemsize for info in infos)
    types = ", ".join(sorted({str(info.dtype) for info in infos}))
    table.add_row(part, f"{count:,} parameters, {types}")
  files = sorted({source.info(name).file for name in source.tensors})
  table.add_row("files", ", ".join(files))
  _add_model(table, source.model)
  return table


def _add_model(table: rich.table.Table, model: Mapping[str, Any]) -> None:
  """Rows with the settings that give the model its shape."""
  for section, values in model.items():
    if isinstance(values, Mapping):
      text = ", ".join(f"{key} {value}" for key, value in values.items())
    else:
      text = str(values)
    table.add_row(f"model.{section}", text)
