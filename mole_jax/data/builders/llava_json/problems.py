"""What is wrong with an entry of a file, and where."""

from collections.abc import Mapping
from typing import NamedTuple

_MAX_SHOWN = 60  # Characters of somebody's text in a message.


class Problem(NamedTuple):
  """An entry that cannot be used, or (`is_fatal`) the end of reading.

  `reason` is a short code for the accounting. `line` counts from 1; of a
  parquet file it is the row. `message` says where, what, what was wanted and
  the way out, on one line. What comes after a fatal problem was not read.
  """

  reason: str
  line: int
  id: str | None
  message: str
  is_fatal: bool


class Place(NamedTuple):
  """Where an entry begins: "train.json line 3, entry 2"."""

  file: str
  line: int
  entry: int
  unit: str = "line"

  def problem(
    self,
    reason: str,
    message: str,
    *,
    id: str | None = None,
    is_fatal: bool = False,
  ) -> Problem:
    """A problem of this entry."""
    where = f"{self.file} {self.unit} {self.line}"
    # Whole arrays stand on one line: there the line alone says nothing.
    if self.entry and self.unit == "line":
      where += f", entry {self.entry}"
    if id is not None:
      where += f", id {shown(id)}"
    if is_fatal:
      message += " Reading stopped here."
    return Problem(reason, self.line, id, f"{where}: {message}", is_fatal)


class EntryError(ValueError):
  """Raised inside an entry; `reason` as in `Problem`."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


def by_reason(counts: Mapping[str, int]) -> str:
  """Numbers by reason in words, the largest first."""
  rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
  return ", ".join(f"{reason} {count:,}" for reason, count in rows) or "none"


def shown(value: object) -> str:
  """A value as it can be printed anywhere: escaped, on one line, short."""
  if isinstance(value, str | bytes):
    cut = value[:_MAX_SHOWN]
    return repr(cut) + ("..." if len(value) > _MAX_SHOWN else "")
  if isinstance(value, dict):
    names = ", ".join(shown(key) for key in list(value)[:6])
    return f"an object with the keys {names}" if value else "an empty object"
  if isinstance(value, list):
    return f"a list of {len(value)}"
  if isinstance(value, int) and value.bit_length() > 200:
    return "a number of many digits"  # Python refuses to print the longest.
  text = repr(value)
  return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
