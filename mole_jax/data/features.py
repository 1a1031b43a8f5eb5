"""What a frozen vision tower makes of a split's images, kept beside the data.

    FOLDER/first.npy              number of each record's first image
    FOLDER/part-00000.npy, ...    features [images, P, D]; bfloat16 as uint16
    FOLDER/part-00000.bad.npy     which of these images could not be decoded
    FOLDER/about.json             what they are of; written last

A row behind those of the images is of a black one, as which a broken image
goes into a batch.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from mole_jax.data import images, measure, records

_VERSION = 1  # Of what is stored; a new one makes all features anew.
ABOUT, FIRST = "about.json", "first.npy"
# Of a model's type, that of the files; NumPy alone knows no bfloat16.
_STORED = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


@dataclasses.dataclass(frozen=True)
class Tower:
  """Whose features: `identity` tells it from every other tower.

  dtype: of the features, "float32" or "bfloat16".
  preparation: of the pixels that it is given.
  """

  identity: str
  num_patches: int
  width: int
  dtype: str
  preparation: images.Preparation

  @property
  def shape(self) -> tuple[int, int]:
    """Of the features of one image."""
    return self.num_patches, self.width

  @property
  def stored(self) -> np.dtype:
    return _STORED[self.dtype]

  @property
  def image_bytes(self) -> int:
    """What one image takes on disk."""
    return self.num_patches * self.width * self.stored.itemsize


class _Opened(NamedTuple):
  first: Int64[np.ndarray, " N"]
  is_bad: Bool[np.ndarray, " I"]
  parts: list[np.ndarray]
  rows_per_part: int


class Store:
  """The features of every image of a split, see `feature_writer.make`.

  Opened when first read, anew in each process.

  Args:
    name: of the data set, see `records.open_records`.
    split: of it.
    tower: whose features.
    other_place: where they are kept if the data set came with the package.

  Raises ValueError as `records.identity` does.
  """

  def __init__(
    self, name: str, split: str, tower: Tower, other_place: pathlib.Path
  ):
    self.name, self.split, self.tower = name, split, tower
    known = {
      "version": _VERSION,
      "data": records.identity(name, split),
      "tower": tower.identity,
      "dtype": tower.dtype,
      **dataclasses.asdict(tower.preparation),
    }
    self.about = {"name": name, "split": split, **known}
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    place = (
      other_place
      if name in records.EMBEDDED
      else measure.cache_folder(name, "features")
    )
    self.folder = place / f"{split}-{key.hexdigest()[:32]}"

  def __getstate__(self) -> dict[str, object]:
    return {k: v for k, v in self.__dict__.items() if k != "_opened"}

  @property
  def is_made(self) -> bool:
    return (self.folder / ABOUT).is_file()

  def open(self) -> None:
    """Raises ValueError for files that are not those that were made."""
    _ = self._opened

  def read(self, record: int, count: int) -> Shaped[np.ndarray, "M P D"] | None:
    """Of a record's first `count` images; None if one cannot be decoded."""
    first = int(self._opened.first[record])
    if self._opened.is_bad[first : first + count].any():
      return None
    return self._rows(first, first + count)

  def black(self, count: int) -> Shaped[np.ndarray, "M P D"]:
    """Of `count` black images."""
    last = len(self._opened.is_bad)
    return np.repeat(self._rows(last, last + 1), count, axis=0)

  def _rows(self, start: int, stop: int) -> Shaped[np.ndarray, "M P D"]:
    size, parts = self._opened.rows_per_part, self._opened.parts
    found = [
      part[max(start - i * size, 0) : stop - i * size]
      for i, part in enumerate(parts[: -(-stop // size)])
      if start < (i + 1) * size
    ]
    if len(found) == 1:  # A view: what is not used is not read.
      return found[0]
    none = np.empty((0, *self.tower.shape), self.tower.stored)
    return np.concatenate([none, *found])

  @functools.cached_property
  def _opened(self) -> _Opened:
    try:
      about = json.loads((self.folder / ABOUT).read_text())
      count, size = about["num_images"], about["rows_per_part"]
      parts, bad = [], []
      for i, rows in enumerate(split_rows(count, size)):
        part = np.load(part_file(self.folder, i), mmap_mode="r")
        if part.shape != (len(rows), *self.tower.shape):
          raise ValueError(f"part {i} has shape {part.shape}")
        parts.append(part)
        bad.append(np.load(bad_file(self.folder, i)))
      first = np.load(self.folder / FIRST, mmap_mode="r")
      return _Opened(first, np.concatenate(bad)[:count], parts, size)
    except (OSError, ValueError, KeyError) as error:
      raise ValueError(
        f"{self.folder} is damaged ({error}); remove it, it is made anew."
      ) from error


def split_rows(num_images: int, size: int) -> list[range]:
  """Rows of each part; one more than there are images."""
  stop = num_images + 1
  return [range(i, min(i + size, stop)) for i in range(0, stop, size)]


def part_file(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Features of some images."""
  return folder / f"part-{number:05d}.npy"


def bad_file(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Which of them are of a broken image."""
  return folder / f"part-{number:05d}.bad.npy"
