"""JSON files that are whole or absent; SHA-256 of a file."""

import hashlib
import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that the file is whole or absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
  os.replace(temporary, path)


def sha256(path: pathlib.Path) -> str:
  """Of what a file holds, as `sha256sum` prints it."""
  with path.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON; ValueError that names the file if it is broken."""
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not valid JSON: {error}.") from None
