"""JSON lines, an object each."""

import io
import json
from collections.abc import Iterator
from typing import Any

from mole_jax.data.builders.llava_json.json_parser import (
  BAD_UTF8,
  TOO_DEEP,
  Parser,
  explain,
)
from mole_jax.data.builders.llava_json.problems import (
  EntryError,
  Place,
  Problem,
  shown,
)

_CHUNK = 2**20


def read_lines(
  stream: io.BufferedReader, start: Place, max_size: int
) -> Iterator[tuple[Place, dict[str, Any] | Problem]]:
  """The entries of JSON lines; a line that is none costs that line only."""
  parser = Parser()
  line, number = start.line - 1, 0
  while data := stream.readline(max_size + 1):
    line += 1
    if not data.strip():
      continue
    number += 1
    place = start._replace(line=line, entry=number)
    if len(data) > max_size:
      while data and not data.endswith(b"\n"):
        data = stream.readline(_CHUNK)
      value = EntryError(
        "entry_too_long",
        f"the line is longer than {max_size:,} bytes; shorten it. (Wanted "
        "one entry a line, or one array.)",
      )
    else:
      value = _parse_line(parser, data)
    if isinstance(value, _CutLine) and number == 1 and stream.peek(1):
      message = (
        "an object that goes on over several lines; wanted an array "
        "[{...}, ...] of such objects, or one object a line. Put [ before "
        "and ] behind it, if it is an entry."
      )
      yield place, place.problem("wrong_top_level", message, is_fatal=True)
      return
    if isinstance(value, EntryError):
      value = place.problem(value.reason, str(value))
    yield place, value


class _CutLine(EntryError):
  """A line that ends before its object does."""


def _parse_line(parser: Parser, data: bytes) -> Any:
  """The object of a line, or (returned) the error."""
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    byte = data[error.start]
    return EntryError(
      BAD_UTF8[0], f"byte {error.start + 1} is 0x{byte:02x}: {BAD_UTF8[1]}"
    )
  text = text.strip(" \t\r\n")
  try:
    value, end = parser.parse(text, 0)
  except json.JSONDecodeError as error:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
      return _CutLine(
        "bad_json",
        "the line ends inside its object; wanted a whole object a line. If "
        "it is the last line, the file was cut short.",
      )
    return EntryError("bad_json", explain(error))
  except RecursionError:
    return EntryError(*TOO_DEEP)
  except ValueError as error:
    return EntryError("bad_json", f"the entry is no JSON: {error}.")
  if end < len(text):
    return EntryError(
      "bad_json",
      f"{shown(text[end:])} stands after the object; wanted one a line.",
    )
  return value
