"""json's decoder, strict where that one is lax."""

import json
from typing import Any

from mole_jax.data.builders.llava_json.problems import EntryError, shown

# Arguments of EntryError.
TOO_DEEP = (
  "too_deep",
  "the entry is nested too deep (about 1,000 levels); wanted an object with "
  "an id, an image and turns.",
)
BAD_UTF8 = (
  "bad_utf8",
  "the entry holds bytes that are no UTF-8; save the file as UTF-8.",
)


class Parser:
  """json's decoder, with what it lets pass held against the entry."""

  def __init__(self):
    self._faults: list[EntryError] = []
    # Noted and not raised: so the entry's end is found all the same.
    self._decoder = json.JSONDecoder(
      object_pairs_hook=self._object, parse_constant=self._constant
    )

  def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
      keys = [key for key, _ in pairs]
      key = next(key for key in keys if keys.count(key) > 1)
      self._faults.append(
        EntryError(
          "duplicate_key",
          f"the key {shown(key)} stands twice in one object; keep one.",
        )
      )
    return result

  def _constant(self, name: str) -> None:
    self._faults.append(
      EntryError("nan", f"{name} is not JSON; write a number or null.")
    )

  def parse(self, text: str, start: int) -> tuple[Any, int]:
    """The value at `start` (or EntryError) and where it ends.

    Raises ValueError, of json, for what is no JSON; RecursionError.
    """
    self._faults.clear()
    value, end = self._decoder.raw_decode(text, start)
    if self._faults:
      value = self._faults[0]
    elif not isinstance(value, dict):
      value = EntryError(
        "not_an_object",
        f"the entry is {shown(value)}; wanted an object {{...}}.",
      )
    return value, end


def explain(error: json.JSONDecodeError) -> str:
  """What is wrong, with the text around it."""
  before = error.doc[max(0, error.pos - 20) : error.pos]
  behind = error.doc[error.pos : error.pos + 20]
  message = f"the entry is no JSON: {error.msg}, near {shown(before + behind)}"
  # What people write by hand most often, and json's words do not say.
  if before.rstrip().endswith(",") and behind.lstrip()[:1] in ("}", "]"):
    return f"{message}; remove the comma before the {behind.lstrip()[0]}."
  if "'" in behind[:1]:
    return f"{message}; write \" for each '."
  if "',' delimiter" in error.msg:
    return f"{message}; put the comma or the closing bracket that lacks there."
  return f"{message}; mend it."
