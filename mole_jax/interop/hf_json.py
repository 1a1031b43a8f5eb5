"""Configurations in JSON, read and checked."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.interop.tensors import CheckpointError


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A configuration; CheckpointError where there is none."""
  if not file.is_file():
    raise CheckpointError(
      f"{file.parent} holds no {file.name}; name a folder in Hugging Face's "
      "layout."
    )
  try:
    values = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{file} is not valid JSON: {error}.") from None
  if not isinstance(values, dict):
    raise CheckpointError(f"{file} holds no JSON object.")
  return values


def check(
  c: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]], where: str
) -> None:
  """Raises CheckpointError for the first setting with another value."""
  for key, allowed in wanted.items():
    if key in c and c[key] not in allowed:
      raise CheckpointError(
        f"{where}: {key} is {c[key]!r}; wanted "
        f"{' or '.join(map(repr, allowed))}."
      )
