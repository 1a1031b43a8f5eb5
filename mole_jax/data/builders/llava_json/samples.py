"""Entries to samples: what LLaVA's JSON means, checked.

Every entry becomes one sample or one problem, so that whoever counts both has
read = used + skipped + failed: skipped for a problem, failed for a fatal one.
A fatal problem counts as an entry, as which the place was read where it is.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mole_jax.data.builders.llava_json.entries import Entry, read_entries
from mole_jax.data.builders.llava_json.paths import ImageFolder
from mole_jax.data.builders.llava_json.pictures import (
  MAX_IMAGE_BYTES,
  Image,
  check_image,
  load_image,
  read_images,
)
from mole_jax.data.builders.llava_json.problems import (
  EntryError,
  Place,
  Problem,
)
from mole_jax.data.builders.llava_json.seen import Seen
from mole_jax.data.builders.llava_json.turns import read_turns, text
from mole_jax.data.records import Turn

__all__ = [
  "LLAVA",
  "MAX_IMAGE_BYTES",
  "EntryError",
  "Image",
  "Layout",
  "Problem",
  "Sample",
  "check_image",
  "load_image",
  "read_samples",
]


class Sample(NamedTuple):
  """One conversation that can be used.

  `turns` are a "system" turn or none, then "human" and "gpt" in turn, an
  answer last, "kind" "" where none is given; the questions hold as many
  `<image>` as there are images. `source` is what must not cross a split: the
  first image's name in the file (without images, the id). `line` is the row
  of a parquet file.
  `same_id` is the id in the file where another entry has it too: then `id` is
  that with "#" and the number of the entry. `place` is for messages.
  """

  id: str
  line: int
  turns: list[Turn]
  images: list[Image]
  domain: str | None
  source: str
  same_id: str | None = None
  place: Place | None = None

  def problem(self, reason: str, message: str) -> Problem:
    """A problem with this sample that its reader could not know."""
    place = self.place or Place("the file", self.line, 0)
    return place.problem(reason, message, id=self.id)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A published layout; `to_llava` makes an entry of LLaVA's from one of its.

  That is {"id", "image", "conversations": [{"from", "value"}], "domain"};
  all but the conversations may be missing. KeyError, TypeError, ValueError
  of `to_llava` become a problem of the entry.
  """

  name: str
  to_llava: Callable[[dict[str, Any]], dict[str, Any]]


def _to_llava(entry: dict[str, Any]) -> dict[str, Any]:
  """LLaVA's own, or ShareGPT's words for the same things."""
  for theirs, ours in (("messages", "conversations"), ("images", "image")):
    # Tables hold null for what a row does not have.
    if entry.get(theirs) is not None:
      if entry.get(ours) is not None:
        raise EntryError(
          "layout", f"the entry has {ours!r} and {theirs!r}; keep one of them."
        )
      entry = {**entry, ours: entry[theirs]}
  return entry


LLAVA = Layout("llava", _to_llava)


def read_samples(
  file: pathlib.Path,
  images: pathlib.Path | None,
  *,
  layout: Layout = LLAVA,
  on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Sample | Problem]:
  """Reads a file in order: JSON, JSON lines, gzip of them, parquet.

  In flat memory but for two hashes an entry. No image is opened.

  Args:
    file: what to read, its format told by its content.
    images: the folder of the images; None where no entry names a path.
    layout: what the entries look like.
    on_bytes: told how many bytes of the file were read since it was last
      called.

  Raises ValueError at once where file or folder are not there, and while
  reading where pyarrow is needed and missing.
  """
  if not file.is_file():
    what = "a folder" if file.is_dir() else "not there"
    raise ValueError(
      f"--json={str(file)!r} is {what}; wanted a JSON, JSONL or parquet file."
    )
  try:
    file.open("rb").close()
  except OSError as error:
    raise ValueError(
      f"--json={str(file)!r} cannot be read: {error.strerror}."
    ) from error
  folder = None if images is None else ImageFolder(images)
  return _read(read_entries(file, on_bytes), folder, layout)


def _read(
  entries: Iterator[Entry | Problem], folder: ImageFolder | None, layout: Layout
) -> Iterator[Sample | Problem]:
  ids, contents = Seen(), Seen()
  for entry in entries:
    if isinstance(entry, Problem):
      yield entry
      continue
    place, data = entry
    id = _raw_id(data)
    try:
      data = _rearranged(layout, data)
      id = _read_id(data, place)
      sample = _to_sample(data, id, place, folder)
      if not contents.add(*_content(sample)):
        raise EntryError(
          "duplicate_entry",
          "an entry before this has the same id, turns and images; remove "
          "one. (To see it more often, give its data set a larger weight.)",
        )
      if not ids.add(id.encode()):
        sample = sample._replace(id=f"{id}#{place.entry}", same_id=id)
    except EntryError as error:
      is_fatal = error.reason == "no_image_folder"
      yield place.problem(error.reason, str(error), id=id, is_fatal=is_fatal)
      if is_fatal:
        return
      continue
    yield sample


def _rearranged(layout: Layout, data: dict[str, Any]) -> dict[str, Any]:
  try:
    return layout.to_llava(data)
  except EntryError:
    raise
  except (KeyError, TypeError, ValueError, IndexError) as error:
    raise EntryError(
      "layout",
      f"the entry is not in the layout {layout.name!r}: "
      f"{type(error).__name__}: {error}.",
    ) from error


def _raw_id(data: Mapping[str, Any]) -> str | None:
  """What the file says, if it can be printed, for messages until it is read."""
  try:
    return text(data.get("id"), "the id", "bad_id")
  except EntryError:
    return None


def _read_id(data: Mapping[str, Any], place: Place) -> str:
  id = data.get("id")
  if id is None:
    return f"{place.file}:{place.entry}"
  if isinstance(id, int) and not isinstance(id, bool) and abs(id) < 2**64:
    return str(id)
  return text(id, "the id", "bad_id")


def _to_sample(
  data: Mapping[str, Any],
  id: str,
  place: Place,
  folder: ImageFolder | None,
) -> Sample:
  turns, num_markers = read_turns(data)
  value = data.get("image")
  for each in value if isinstance(value, list) else [value]:
    if isinstance(each, str):
      text(each, "the image path", "image_path")
  found, name = read_images(value, folder)
  if num_markers != len(found):
    raise EntryError(
      "image_count",
      f"{num_markers} <image> marker{'s' * (num_markers != 1)} but "
      f"{len(found)} image{'s' * (len(found) != 1)}; wanted one marker an "
      "image, in the questions.",
    )
  domain = data.get("domain")
  if domain is not None:
    domain = text(domain, "the domain", "bad_domain")
  return Sample(id, place.line, turns, found, domain, name or id, place=place)


def _content(sample: Sample) -> list[bytes]:
  parts = [sample.id]
  parts += [turn["from"] + turn["value"] for turn in sample.turns]
  return [part.encode() for part in parts] + [
    str(image.path).encode() if image.data is None else image.data
    for image in sample.images
  ]
