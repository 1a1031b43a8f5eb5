"""Images of many samples decoded in threads, each file once."""

import collections
import concurrent.futures
import os
from typing import NamedTuple

from mole_jax.data.builders.llava_json.pictures import (
  Image,
  check_image,
  describe,
  load_image,
)
from mole_jax.data.builders.llava_json.problems import EntryError
from mole_jax.data.builders.llava_json.seen import Seen

# Pillow decodes without the interpreter's lock. Each holds up to 200 MB.
NUM_THREADS = min(os.cpu_count() or 1, 8)
# Samples under way at once, and results of shared files that stay at hand:
# more, so that no file is forgotten while a thread has it.
WINDOW = 4 * NUM_THREADS
_RECENT = 4096


class Decoded(NamedTuple):
  """An image's size in pixels, format and bytes; or why there is none."""

  width: int = 0
  height: int = 0
  format: str = ""
  num_bytes: int = 0
  error: EntryError | None = None


class Task(NamedTuple):
  """A decoding under way; `is_first` for the first sample with this file."""

  future: concurrent.futures.Future
  is_first: bool


class Decoder:
  """Decodes up to `limit` images (None: all), files once each."""

  def __init__(self, limit: int | None):
    self._limit = limit
    self._pool = concurrent.futures.ThreadPoolExecutor(NUM_THREADS)
    self._seen = Seen()
    self._recent: collections.OrderedDict[str, concurrent.futures.Future] = (
      collections.OrderedDict()
    )
    self._bad: dict[str, concurrent.futures.Future] = {}

  def __enter__(self) -> "Decoder":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(cancel_futures=True)

  def start(self, image: Image) -> Task | None:
    """Begins to decode; None where that is not needed (again)."""
    key = str(image.path)
    if image.path is not None:
      known = self._recent.get(key) or self._bad.get(key)
      if known is not None:
        return Task(known, is_first=False)
    if self._limit == 0:
      return None
    if image.path is not None and not self._seen.add(os.fsencode(key)):
      return None
    if self._limit is not None:
      self._limit -= 1
    future = self._pool.submit(_decode, image)
    if image.path is not None:
      self._recent[key] = future
      if len(self._recent) > _RECENT:
        key, old = self._recent.popitem(last=False)
        if old.result().error is not None:
          self._bad[key] = old
    return Task(future, is_first=True)


def _decode(image: Image) -> Decoded:
  try:
    data = load_image(image)
  except EntryError as error:
    return Decoded(error=error)
  try:
    return Decoded(*check_image(data), len(data))
  except EntryError as error:
    what = EntryError(error.reason, f"{describe(image)}: {error}")
    return Decoded(error=what)
