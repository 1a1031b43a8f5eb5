"""Makes the features of `features.Store`: decodes, asks the tower, writes."""

import collections
import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mole_jax.data import features, images, records, workers
from mole_jax.data.features import Store

_PART_BYTES = 2**30  # A killed run does the part anew that it was at.
_CHUNK = 2048  # Records read at once.
_WAY_OUT = "or read pixels, with --config.data.features=none"

# uint8[B,H,W,3] -> what np.asarray makes [B,P,D] of the tower's type, maybe
# later.
Encode = Callable[[np.ndarray], Any]
# Called with a data set, how many images were seen, and of how many.
Report = Callable[[str, int, int], Any]


def make(
  stores: Sequence[Store],
  encode: Encode,
  batch_size: int,
  tell: Callable[[str], Any],
  report: Report,
) -> None:
  """Makes the features that are not there, and checks those that are.

  Finished parts of what a killed process began are kept. Where another
  process is at it, waits for that one.

  Args:
    stores: for one tower.
    encode: that tower.
    batch_size: images that it is given at once.
    tell: called with a sentence for people: what is made, and its size.
    report: called now and then.

  Raises ValueError where there is no place for them, or they are damaged.
  """
  missing = {each.folder: each for each in stores if not each.is_made}
  makers = [_Maker(store) for store in missing.values()]
  try:
    for maker in makers:
      maker.count_images()
    _check_room(makers)
    for maker in makers:
      tell(maker.describe())
      maker.make(encode, batch_size, report)
  except OSError as error:
    raise ValueError(
      f"features cannot be kept: {error}; make room or give leave to write "
      f"there, {_WAY_OUT}."
    ) from error
  for store in stores:
    store.open()


class _Maker:
  """Fills the folder of one store."""

  def __init__(self, store: Store):
    self._store = store
    self.folder = store.folder
    self._tower = store.tower
    self._size = max(1, _PART_BYTES // store.tower.image_bytes)
    self._first = np.zeros(1, np.int64)

  def count_images(self) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / features.FIRST
    if not path.is_file():
      texts = records.open_texts(self._store.name, self._store.split)
      counts = [0]
      for start in range(0, len(texts), _CHUNK):
        stop = min(start + _CHUNK, len(texts))
        counts += [each["num_images"] for each in texts.read(start, stop)]
      with _whole(path) as file:
        np.save(file, np.cumsum(counts, dtype=np.int64))
    self._first = np.load(path)

  @property
  def num_images(self) -> int:
    return int(self._first[-1])

  @property
  def num_bytes(self) -> int:
    return (self.num_images + 1) * self._tower.image_bytes

  def num_bytes_left(self) -> int:
    left = [rows for i, rows in self._parts() if not self._has(i, rows)]
    return sum(map(len, left)) * self._tower.image_bytes

  def describe(self) -> str:
    patches, width = self._tower.shape
    left = self.num_bytes_left()
    kept = (
      "" if left == self.num_bytes else f", {left:,} of them are to be made"
    )
    return (
      f"features of {self._store.name}: {self.num_images:,} images x {patches} "
      f"x {width} {self._tower.dtype} = {self.num_bytes:,} bytes{kept}, in "
      f"{self.folder}"
    )

  def make(self, encode: Encode, batch_size: int, report: Report) -> None:
    with _locked(self.folder) as is_alone:
      if self._store.is_made:  # By the process whose lock this was.
        return
      if is_alone:
        for left in self.folder.glob(".partial-part-*"):
          left.unlink()
      tell = lambda done: report(self._store.name, done, self.num_images)
      tell(0)
      for i, rows in self._parts():
        if not self._has(i, rows):
          self._make_part(i, rows, encode, batch_size, tell)
      about = {
        **self._store.about,
        "num_images": self.num_images,
        "rows_per_part": self._size,
        "shape": self._tower.shape,
      }
      with _whole(self.folder / features.ABOUT) as file:
        file.write(json.dumps(about, indent=2).encode() + b"\n")

  def _parts(self) -> Iterator[tuple[int, range]]:
    return enumerate(features.split_rows(self.num_images, self._size))

  def _has(self, number: int, rows: range) -> bool:
    """Whether a part is there, by another `_PART_BYTES` or not."""
    try:
      part = np.load(features.part_file(self.folder, number), mmap_mode="r")
      is_bad = np.load(features.bad_file(self.folder, number))
    except (OSError, ValueError):
      return False
    return part.shape == (len(rows), *self._tower.shape) and is_bad.shape == (
      len(rows),
    )

  def _make_part(
    self,
    number: int,
    rows: range,
    encode: Encode,
    batch_size: int,
    tell: Callable[[int], Any],
  ) -> None:
    shape = (len(rows), *self._tower.shape)
    stored = self._tower.stored
    is_bad = np.zeros(len(rows), bool)
    done = 0
    with _whole(features.part_file(self.folder, number)) as file:
      np.lib.format.write_array_header_2_0(
        file,
        {
          "descr": np.lib.format.dtype_to_descr(stored),
          "fortran_order": False,
          "shape": shape,
        },
      )

      def finish(count, coming):
        nonlocal done
        # Not through a map of the file: a full disk must raise, not kill.
        array = np.ascontiguousarray(np.asarray(coming)[:count])
        file.write(array.view(stored).data)
        done += count
        tell(min(rows.start + done, self.num_images))

      pending = None
      for count, pixels in self._batches(rows, batch_size, is_bad):
        # The tower is at work on this batch while the last one is written.
        coming = encode(pixels)
        if pending is not None:
          finish(*pending)
        pending = (count, coming)
      assert pending is not None  # No part is empty.
      finish(*pending)
      # Before its part is: a part counts where both are there.
      with _whole(features.bad_file(self.folder, number)) as other:
        np.save(other, is_bad)

  def _batches(
    self, rows: range, batch_size: int, is_bad: Bool[np.ndarray, " I"]
  ) -> Iterator[tuple[int, np.ndarray]]:
    """How many images and their pixels; marks those that are broken."""
    size = self._tower.preparation.image_size
    empty = lambda: np.zeros((batch_size, size, size, 3), np.uint8)
    batch, count = empty(), 0
    with contextlib.closing(self._pictures(rows)) as pictures:
      for place, pixels in enumerate(pictures):
        if pixels is None:
          is_bad[place] = True
        else:
          batch[count] = pixels
        count += 1
        if count == batch_size:
          yield count, batch
          batch, count = empty(), 0
    if count:
      yield count, batch

  def _pictures(self, rows: range) -> Iterator[np.ndarray | None]:
    """Images of a part, and the black one, decoded ahead by threads."""
    source = records.open_records(self._store.name, self._store.split)
    first, preparation = self._first, self._tower.preparation

    def decode(record: int) -> list[np.ndarray | None]:
      count = int(first[record + 1] - first[record])
      try:
        encoded = source[record]["images"]
      except ValueError:
        return [None] * count
      if len(encoded) != count:  # Its text is not of this record.
        return [None] * count
      return [_decode(data, preparation) for data in encoded]

    stop = min(rows.stop, self.num_images)
    begin = int(np.searchsorted(first, rows.start, "right")) - 1
    end = int(np.searchsorted(first, stop, "left"))
    waiting = iter(
      record
      for record in range(begin, end)
      if first[record + 1] > first[record]
    )
    num_threads = workers.num_cores()
    running: collections.deque[tuple[int, concurrent.futures.Future]]
    running = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
      while True:
        while len(running) < 4 * num_threads:
          record = next(waiting, None)
          if record is None:
            break
          running.append((record, pool.submit(decode, record)))
        if not running:
          break
        record, coming = running.popleft()
        for number, pixels in enumerate(coming.result(), int(first[record])):
          if rows.start <= number < stop:
            yield pixels
    if rows.stop > self.num_images:
      size = preparation.image_size
      yield np.zeros((size, size, 3), np.uint8)


def _decode(data: bytes, preparation: images.Preparation) -> np.ndarray | None:
  try:
    return images.decode_image(data, preparation)
  except ValueError:
    return None


def _check_room(makers: Sequence[_Maker]) -> None:
  """Raises ValueError where a disk has less left than will be written."""
  wanted: dict[int, list[_Maker]] = {}
  for maker in makers:
    wanted.setdefault(maker.folder.stat().st_dev, []).append(maker)
  for group in wanted.values():
    needed = sum(maker.num_bytes_left() for maker in group)
    free = shutil.disk_usage(group[0].folder).free
    if needed > free:
      raise ValueError(
        "; ".join(maker.describe() for maker in group)
        + f": {needed:,} bytes to write, but {free:,} are free on that disk; "
        f"make room, move the data set to a larger disk, {_WAY_OUT}."
      )


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[Any]:
  """A binary file that is whole or absent."""
  descriptor, partial = tempfile.mkstemp(
    prefix=f".partial-{path.name}-", dir=path.parent
  )
  try:
    with os.fdopen(descriptor, "wb") as file:
      yield file
      file.flush()
      # A name must not reach the disk before its content does.
      os.fsync(file.fileno())
    os.chmod(partial, 0o644)
    os.replace(partial, path)
  except BaseException:
    pathlib.Path(partial).unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Waits for the lock of a folder; False where locks do not work.

  Two processes then do the same, which does no harm. The kernel drops a lock
  with its process.
  """
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    is_alone = False
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
      is_alone = True
    yield is_alone
  finally:
    os.close(descriptor)
