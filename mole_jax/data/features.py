"""Features of a frozen tower, kept on disk beside the pictures they are of.

A store holds those of every image of a split, in the order of the records. It
is made once, whole or not at all.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Num, UInt8

from mole_jax.data import images, measure, records

_ABOUT, _FEATURES, _FIRST, _BAD = (
  "about.json",
  "features.bin",
  "first.npy",
  "bad.npy",
)
_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Pixels uint8[N,H,W,3] -> features[N,P,D].
Encode = Callable[[np.ndarray], np.ndarray]
# Called with how many records are done, and of how many.
Report = Callable[[int, int], Any]


class Store:
  """Features of a split; opened anew in each process.

  shape: patches and width, (P, D), of one image.
  dtype: float32 or bfloat16.
  """

  def __init__(self, folder: pathlib.Path):
    about = json.loads((folder / _ABOUT).read_text())
    self.folder = folder
    self.shape: tuple[int, int] = tuple(about["shape"])
    self.dtype = _DTYPES[about["dtype"]]
    self.num_images: int = about["images"]

  def __getstate__(self) -> dict[str, Any]:
    known = dict(self.__dict__)
    known.pop("_opened", None)
    return known

  @functools.cached_property
  def _opened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (self.num_images, *self.shape)
    return (
      np.memmap(self.folder / _FEATURES, self.dtype, "r", shape=shape)
      if self.num_images
      else np.empty(shape, self.dtype),
      np.load(self.folder / _FIRST),
      np.load(self.folder / _BAD),
    )

  def read(self, record: int, count: int) -> Num[np.ndarray, "M P D"]:
    """Features of the first `count` images of a record of the split.

    Raises ValueError where one of these could not be decoded.
    """
    features, first, bad = self._opened
    span = slice(int(first[record]), int(first[record]) + count)
    if bad[span].any():
      raise ValueError(f"an image of record {record} could not be decoded")
    return np.array(features[span])


def find_or_make(
  name: str,
  split: str,
  key: str,
  shape: tuple[int, int],
  dtype: str,
  preparation: images.Preparation,
  encode: Encode,
  *,
  batch_size: int,
  report: Report,
) -> Store:
  """Opens the store of a split, or makes it.

  Args:
    name: of the data set, see `records.open_records`.
    split: e.g. "train".
    key: a hash of the tower and of how images are prepared.
    shape: patches and width of one image's features.
    dtype: "float32" or "bfloat16".
    preparation: size of the images and how they get it.
    encode: the tower, on `batch_size` images at a time.
    batch_size: images; the last ones are padded to as many.
    report: called as it goes on.

  Raises:
    ValueError: where the disk is too full, with what is needed.
  """
  known = records.identity(name, split)[:16]
  folder = measure.cache_folder(name, "features") / f"{split}-{known}-{key}"
  with _alone(folder):
    if not (folder / _ABOUT).is_file():
      _make(
        folder, name, split, shape, dtype, preparation, encode, batch_size,
        report,
      )  # fmt: skip
  return Store(folder)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Waits until no other process makes the same store."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  with folder.with_name(folder.name + ".lock").open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _make(
  folder: pathlib.Path,
  name: str,
  split: str,
  shape: tuple[int, int],
  dtype: str,
  preparation: images.Preparation,
  encode: Encode,
  batch_size: int,
  report: Report,
) -> None:
  rows = records.open_records(name, split)
  texts = records.open_texts(name, split)
  counts = np.array(
    [
      record["num_images"]
      for start in range(0, len(texts), 4096)
      for record in texts.read(start, min(start + 4096, len(texts)))
    ],
    np.int64,
  )
  num_images = int(counts.sum())
  size = num_images * shape[0] * shape[1] * _DTYPES[dtype].itemsize
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)  # Of a run that was killed.
  free = shutil.disk_usage(folder.parent).free
  if size > free:
    raise ValueError(
      f"the features of {num_images:,} images of {name} take {size:,} bytes, "
      f"and {folder.parent} has {free:,} free; make room, set XDG_CACHE_HOME, "
      'or use --config.data.features="none".'
    )
  partial.mkdir()
  bad = np.zeros(num_images, bool)
  with (partial / _FEATURES).open("wb") as file:
    pixels = _decoded(rows, preparation, batch_size, bad, report)
    for batch, used in pixels:
      found = np.asarray(encode(batch), _DTYPES[dtype])[:used]
      file.write(np.ascontiguousarray(found).tobytes())
    file.flush()
    os.fsync(file.fileno())
  np.save(partial / _FIRST, np.concatenate([[0], np.cumsum(counts)])[:-1])
  np.save(partial / _BAD, bad)
  about = {"shape": shape, "dtype": dtype, "images": num_images}
  (partial / _ABOUT).write_text(json.dumps(about))
  os.rename(partial, folder)


def _decoded(
  rows: records.Records,
  preparation: images.Preparation,
  batch_size: int,
  bad: np.ndarray,
  report: Report,
) -> Iterator[tuple[UInt8[np.ndarray, "N H W 3"], int]]:
  """Pixels of all images in order, in whole batches, and how many count.

  What cannot be decoded is black, and marked in `bad`.
  """
  size = preparation.image_size

  def decode(data: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    try:
      return images.decode_image(data, preparation)
    except ValueError:
      return None

  batch = np.zeros((batch_size, size, size, 3), np.uint8)
  place = 0
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for number in range(len(rows)):
      try:
        encoded = rows[number]["images"]
      except ValueError:  # Its images are counted, for its text is known.
        raise ValueError(
          f"record {number} cannot be read; features need all of them. Copy "
          'the set again, or use --config.data.features="none".'
        ) from None
      for pixels in pool.map(decode, encoded):
        slot = place % batch_size
        bad[place] = pixels is None
        batch[slot] = 0 if pixels is None else pixels
        place += 1
        if slot == batch_size - 1:
          yield batch, batch_size
      report(number + 1, len(rows))
  if place % batch_size:
    yield batch, place % batch_size
