"""A JSON array of any size, an entry at a time."""

import codecs
import io
import json
import re
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
_SPACE = re.compile(r"[ \t\n\r]*")
# Bytes that are no UTF-8 are kept as these until their entry is known.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# A literal, a number or an escape that the buffer's end cuts is found wrong
# where it begins: at most "\ud83d\ude0" or "-Infinit" before the end.
_LOOKAHEAD = 16
_LITERALS = ("true", "false", "null", "NaN", "-Infinity", "Infinity")


class _Text:
  """A window on decoded text that moves and grows; `line` is that of `at`."""

  def __init__(self, stream: io.BufferedReader, line: int):
    self._stream = stream
    self._decoder = codecs.getincrementaldecoder("utf-8")()
    self.text = ""
    self.at = 0
    self.line = line
    self.has_bad_bytes = False

  def grow(self) -> bool:
    """Reads on, at least doubling what is unread; False at the end."""
    rest = self.text[self.at :]
    # Doubled, so that trying a long entry again costs no square of it.
    data = self._stream.read(max(_CHUNK, len(rest)))
    new = self._decode(data)
    self.text, self.at = rest + new, 0
    return bool(data) or bool(new)

  def _decode(self, data: bytes) -> str:
    state = self._decoder.getstate()
    try:
      return self._decoder.decode(data, final=not data)
    except UnicodeDecodeError:
      # From here on every entry is looked through for what stands for them.
      self.has_bad_bytes = True
      self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
      self._decoder.setstate(state)
      return self._decoder.decode(data, final=not data)

  def move(self, end: int) -> None:
    self.line += self.text.count("\n", self.at, end)
    self.at = end

  def next(self) -> str:
    """The next character that is no white space, "" at the end."""
    while True:
      self.move(_SPACE.match(self.text, self.at).end())
      if self.at < len(self.text):
        return self.text[self.at]
      if not self.grow():
        return ""


def read_array(
  stream: io.BufferedReader, start: Place, max_size: int
) -> Iterator[tuple[Place, dict[str, Any] | Problem]]:
  """The entries of `[{...}, ...]`, of which at most one is held.

  What breaks JSON's grammar is fatal: nobody can tell where the next entry
  begins. NaN, a key twice, bytes that are no UTF-8 cost their entry only.
  """
  text, parser = _Text(stream, start.line), Parser()
  text.next()
  text.at += 1  # The bracket.
  number = 0

  def fatal(reason, message):
    place = start._replace(line=text.line, entry=number)
    return place, place.problem(reason, message, is_fatal=True)

  character = text.next()
  if character == "]":
    yield fatal("empty", "the array is empty; wanted entries.")
    return
  while True:
    number += 1
    place = start._replace(line=text.line, entry=number)
    if character in ("", "]"):
      yield fatal(*(_TRAILING_COMMA if character else _CUT_SHORT))
      return
    try:
      value, end = _parse_growing(parser, text, max_size)
    except EntryError as error:
      yield fatal(error.reason, str(error))
      return
    value = _checked(value, text, end)
    text.move(end)
    if isinstance(value, EntryError):
      value = place.problem(value.reason, str(value))
    yield place, value
    character = text.next()
    if character == "]":
      break
    if character != ",":
      number += 1
      yield fatal(*(_NO_COMMA if character else _CUT_SHORT))
      return
    text.move(text.at + 1)
    character = text.next()
  text.move(text.at + 1)
  if text.next():
    number += 1
    yield fatal(
      "after_the_end",
      f"{text.text[text.at]!r} stands after the array's ]; wanted one array "
      "a file. Remove what follows, or join the arrays.",
    )


_TRAILING_COMMA = (
  "bad_json",
  "a comma before the array's ]; remove that comma.",
)
_NO_COMMA = ("bad_json", "wanted a comma or ] after the entry before this.")
_CUT_SHORT = (
  "truncated",
  "the file ends inside the array; wanted a ] at its end. Copy or download "
  "it again, or write the ].",
)


def _parse_growing(
  parser: Parser, text: _Text, max_size: int
) -> tuple[Any, int]:
  """Parses the value at the window's place, reading on where it is cut.

  Raises EntryError where that is impossible, `text.line` at the fault.
  """
  is_end = False
  while True:
    try:
      value, end = parser.parse(text.text, text.at)
      # A bare number may go on behind the window.
      if end < len(text.text) or isinstance(value, dict) or is_end:
        return value, end
      fault = text.at
    except json.JSONDecodeError as error:
      fault = error.pos  # Not the error: that holds the text, in a cycle.
      is_cut = error.msg.startswith("Unterminated string") or (
        error.pos > len(text.text) - _LOOKAHEAD
      )
      if is_end and _ends_inside(error):
        raise _cut_short(error, text) from error
      if is_end or not is_cut:
        text.move(error.pos)
        raise EntryError("bad_json", explain(error)) from error
    except RecursionError as error:
      raise EntryError(*TOO_DEEP) from error
    except ValueError as error:  # A number of thousands of digits.
      raise EntryError("bad_json", f"the entry is no JSON: {error}.") from error
    if len(text.text) - text.at > max_size:
      text.move(fault)
      raise EntryError(
        "entry_too_long",
        f"the entry is longer than {max_size:,} characters, or a text in "
        'it lacks its closing ". Shorten it, or close it.',
      )
    is_end = not text.grow()


def _ends_inside(error: json.JSONDecodeError) -> bool:
  """Whether what is wrong at the end of the file is only that it ends."""
  rest = error.doc[error.pos :].strip()
  return (
    rest in ("", ",")
    or error.msg.startswith("Unterminated string")
    or (error.msg.startswith("Invalid \\") and '"' not in rest)
    or any(word.startswith(rest) for word in _LITERALS)
  )


def _cut_short(error: json.JSONDecodeError, text: _Text) -> EntryError:
  """The file's end inside an entry, as a cut or a missing quote."""
  if not error.msg.startswith("Unterminated string"):
    return EntryError(*_CUT_SHORT)
  text.move(error.pos)
  return EntryError(
    "truncated",
    f"the file ends inside the text that begins {shown(error.doc[error.pos :])}"
    '; write its closing ", or copy or download the file again.',
  )


def _checked(value: Any, text: _Text, end: int) -> Any:
  if text.has_bad_bytes and _NOT_UTF8.search(text.text, text.at, end):
    return EntryError(*BAD_UTF8)
  return value
