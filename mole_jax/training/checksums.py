"""SHA-256 of a checkpoint's files, since Orbax restores a flipped bit as it is.

The list is written before a step is committed: none stands without. Not in it
is Orbax's own note of when that happened, from which no value comes.
"""

import pathlib
from collections.abc import Sequence

from mole_jax.training import files

FILE = "checksums.json"
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
DAMAGED = "damaged"


def write(folder: pathlib.Path) -> None:
  """Lists what lies in the folder of a step."""
  files.write_json(folder / FILE, _read(folder, ()))


def find_damage(folder: pathlib.Path, items: Sequence[str] = ()) -> str | None:
  """What a step holds otherwise than it was written; None if nothing.

  Only of some of its items ("trainable", say) where they are named. A step of
  an earlier version has no list; then there is nothing to compare.
  """
  if not (folder / FILE).exists():
    return None
  try:
    wanted = files.read_json(folder / FILE)
  except ValueError as error:
    return str(error)
  if not isinstance(wanted, dict):
    return f"{folder / FILE} is no list of files."
  if items:
    wanted = {k: v for k, v in wanted.items() if k.split("/", 1)[0] in items}
  found = _read(folder, items)
  for name in sorted(wanted | found):
    if name not in found:
      return f"{folder / name} is missing."
    if name not in wanted:
      return f"{folder / name} was not there when the step was written."
    if found[name] != wanted[name]:
      return f"{folder / name} has changed since it was written (its SHA-256)."
  return None


def _read(folder: pathlib.Path, items: Sequence[str]) -> dict[str, str]:
  """SHA-256 by path within the folder."""
  found = {}
  for top in [folder / item for item in items] or [folder]:
    for file in top.rglob("*"):
      name = file.relative_to(folder).as_posix()
      if file.is_file() and name not in (*_WRITTEN_LATER, FILE):
        found[name] = files.sha256(file)
  return found


def set_aside(step: pathlib.Path) -> pathlib.Path:
  """Moves the folder of a step out of the way; returns where it is now."""
  aside = step.parent.parent / DAMAGED
  aside.mkdir(exist_ok=True)
  target, count = aside / step.name, 1
  while target.exists():
    count += 1
    target = aside / f"{step.name}-{count}"
  return step.rename(target)
