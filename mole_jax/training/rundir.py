"""The run directory: one config, one writer, the newest state."""

import datetime
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.training import checkpoint, files

# Settings that change nothing about the result: free to differ on a rerun.
FREE = (
  "log_every",
  "checkpoint_every",
  "max_checkpoints",
  "max_skipped",
  "num_workers",
)
# What is read, and how it is drawn: may be changed where that is asked for.
_DATA = re.compile(
  r"stages\.(?P<stage>[^.]+)\.mixture\.|data\.(batching|domains|features)"
)
CHANGES_FILE = "data_changes.jsonl"

# Settings of config.data that loading reads and that were added, with what
# earlier runs did.
_ADDED = {"template": "vicuna", "image_resample": "bicubic"}


# A stage's settings that were added, with what earlier runs did: no difference.
_ADDED_TO_STAGES = {"quantize": "none"}


class LockedError(RuntimeError):
  """Another process is writing to the run directory."""


class Lock:
  """Holds a run directory for one process; a context manager.

  The kernel drops the lock with its process, so none is ever stale.
  """

  def __init__(self, run: pathlib.Path):
    self._run = run

  def __enter__(self) -> "Lock":
    self._run.mkdir(parents=True, exist_ok=True)
    path = self._run / ".lock"
    self._file = path.open("a+")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._file.seek(0)
      holder = self._file.read().strip()
      self._file.close()
      raise LockedError(
        f"{self._run} is in use by process {holder}; wait for it or stop it, "
        "or choose another --workdir."
      ) from None
    self._file.truncate(0)
    self._file.write(str(os.getpid()))
    self._file.flush()
    return self

  def __exit__(self, *_) -> None:
    self._file.close()


def plain(config: Any) -> dict[str, Any]:
  """A ConfigDict as what JSON holds: nested dictionaries, lists, scalars."""
  return json.loads(json.dumps(config.to_dict()))


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """Lines "key: old -> new" for settings that change the result."""
  lines = []
  for key in sorted(set(old) | set(new)):
    path = f"{prefix}{key}"
    if key in FREE:
      continue
    if key in _ADDED_TO_STAGES:
      default = _ADDED_TO_STAGES[key]
      if old.get(key, default) == new.get(key, default):
        continue
    if key not in old or key not in new:
      side = "only in the workdir" if key in old else "new"
      lines.append(f"{path}: {side}")
    elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
      lines += differences(old[key], new[key], f"{path}.")
    elif old[key] != new[key]:
      lines.append(f"{path}: {old[key]!r} -> {new[key]!r}")
  return lines


def claim(
  run: pathlib.Path,
  config: Mapping[str, Any],
  *,
  is_data_change_accepted: bool = False,
) -> None:
  """Writes the config of a new run, or checks that of an old one.

  Raises ValueError that lists the differences where the run directory belongs
  to another configuration. Those of the data may be accepted: they are
  written down, with the steps that each stage has behind it. A run that ended
  before its first checkpoint leaves nothing to protect.
  """
  path = run / "config.json"
  if path.exists():
    old = files.read_json(path)
    lines = differences(old, config) if _has_begun(run, old) else []
    of_data = [line for line in lines if _DATA.match(line)]
    if len(of_data) < len(lines) or (lines and not is_data_change_accepted):
      way_out = ""
      if len(of_data) == len(lines):
        way_out = (
          "\nThey are all of the data: --accept_data_change goes on with the "
          "new ones from the step that stands."
        )
      raise ValueError(
        f"{run} holds a run of another config; choose another --workdir, or "
        "undo these differences (workdir -> now):\n  "
        + "\n  ".join(lines)
        + way_out
      )
    concerned: dict[str, list[str]] = {}
    for line in of_data:
      stage = re.match(_DATA, line)["stage"]
      for name in [stage] if stage else config["stages"]:
        concerned.setdefault(name, []).append(line)
    for stage, changes in concerned.items():
      steps = checkpoint.list_steps(run, stage)
      if steps:
        write_change(run, stage, steps[-1], changes)
  files.write_json(path, config)


def _has_begun(run: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Whether there is anything in a run directory that a config made."""
  return "stages" not in config or any(
    checkpoint.list_steps(run, stage) or (run / stage / "base.json").exists()
    for stage in config["stages"]
  )


def write_change(
  run: pathlib.Path, stage: str, step: int, lines: Sequence[str]
) -> None:
  """Writes down that a stage reads other data from a step on."""
  change = {
    "stage": stage,
    "after_step": step,
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "changes": list(lines),
  }
  with (run / CHANGES_FILE).open("a", encoding="utf-8") as file:
    file.write(json.dumps(change) + "\n")


def check_age(run: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises ValueError for a run whose config lacks settings of today."""
  missing = {k: v for k, v in _ADDED.items() if k not in config["data"]}
  if missing:
    lines = ", ".join(f'"{key}": "{value}"' for key, value in missing.items())
    raise ValueError(
      f"{run / 'config.json'} was written by an older version: its section "
      f"'data' lacks {', '.join(missing)}; that version did the same as "
      f"{lines}: add this there."
    )
