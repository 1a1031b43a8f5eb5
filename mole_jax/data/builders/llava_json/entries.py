"""The entries of a file, one by one, in flat memory.

A JSON array, JSON lines (both perhaps gzipped) or parquet, told apart by
content. An entry is skipped only where it is certain where the next one
begins; where it is not, reading stops with a fatal problem.
"""

import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mole_jax.data.builders.llava_json import (
  json_array,
  json_lines,
  parquet,
)
from mole_jax.data.builders.llava_json.problems import Place, Problem

# Characters of JSON, pictures in base64 included.
MAX_ENTRY_SIZE = 2**24
_BUFFER = 2**20
_SPACE = b" \t\r\n"
_OTHERS = {
  parquet.MAGIC: "parquet within gzip; unpack it",
  b"\x1f\x8b": "gzipped twice; unpack it once",
  b"PK\x03\x04": "a zip archive; unpack it",
  b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
  b"BZh": "compressed with bzip2; unpack it",
  b"\xfd7zXZ": "compressed with xz; unpack it",
  b"\xff\xfe": "UTF-16 text; save it as UTF-8",
  b"\xfe\xff": "UTF-16 text; save it as UTF-8",
  b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
}


class Entry(NamedTuple):
  """One object of a file, not yet looked into."""

  place: Place
  data: dict[str, Any]


def read_entries(
  file: pathlib.Path, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Entry | Problem]:
  """Reads a file from start to end; exactly one item for each entry of it.

  Args:
    file: what to read.
    on_bytes: told how many bytes of the file were read since it was last
      called; they add up to its size.

  Raises OSError where the file cannot be opened.
  """
  with open(file, "rb", buffering=0) as raw:
    head = raw.read(4)
    raw.seek(0)
    if head == parquet.MAGIC:
      rows = parquet.read_rows(raw, file.name, on_bytes)
      yield from (x if isinstance(x, Problem) else Entry(*x) for x in rows)
      return
    stream = io.BufferedReader(_Counted(raw, on_bytes), _BUFFER)
    end = Place(file.name, 1, 0)
    try:
      if head[:2] == b"\x1f\x8b":
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _BUFFER)
      for item in _read_json(stream, file.name):
        end = Place(file.name, item[0].line, item[0].entry)
        place, data = item
        yield data if isinstance(data, Problem) else Entry(place, data)
    except (EOFError, zlib.error, OSError) as error:
      cause = str(error) or type(error).__name__
      yield end._replace(entry=end.entry + 1).problem(
        "unreadable_file",
        f"the file cannot be read on: {cause}; wanted a whole file. Copy or "
        "download it again.",
        is_fatal=True,
      )


def _read_json(
  stream: io.BufferedReader, name: str
) -> Iterator[tuple[Place, dict[str, Any] | Problem]]:
  """(where, entry or problem), by what the text begins with."""
  start = Place(name, 1, 0)
  head = stream.peek(64)[:64]
  if head.startswith(b"\xef\xbb\xbf"):  # A byte order mark, of Windows.
    stream.read(3)
    head = head[3:]
  for magic, what in _OTHERS.items():
    if head.startswith(magic):
      yield (
        start,
        start.problem(
          "unknown_format",
          f"the file is {what}. Wanted JSON (UTF-8; gzip will do) or parquet.",
          is_fatal=True,
        ),
      )
      return
  line = 1
  while (blank := stream.peek(1)[:1]) and blank in _SPACE:
    line += stream.read(1) == b"\n"
  start = Place(name, line, 0)
  if not blank:
    yield (
      start,
      start.problem(
        "empty", "the file is empty; wanted entries.", is_fatal=True
      ),
    )
  elif blank == b"[":
    yield from json_array.read_array(stream, start, MAX_ENTRY_SIZE)
  elif blank == b"{":
    yield from json_lines.read_lines(stream, start, MAX_ENTRY_SIZE)
  else:
    yield (
      start,
      start.problem(
        "wrong_top_level",
        f"the file begins with {blank!r}; wanted a JSON array [{{...}}, ...], "
        "or one object {...} a line, or parquet.",
        is_fatal=True,
      ),
    )


class _Counted(io.RawIOBase):
  """A file that tells how much of it was read."""

  def __init__(self, raw: Any, on_bytes: Callable[[int], None] | None):
    super().__init__()
    self._raw = raw
    self._on_bytes = on_bytes

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    count = self._raw.readinto(buffer)
    if self._on_bytes is not None and count:
      self._on_bytes(count)
    return count
