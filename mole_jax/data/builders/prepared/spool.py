"""Samples in the order of their file -> a plan that any process can work on.

The samples are copied to one file, the spool, with the place of each in it, so
that a shard takes its records by number however many there are, and no process
holds more than one at a time.
"""

import array
import collections
import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from mole_jax.data.builders.llava_json.problems import Place, by_reason
from mole_jax.data.builders.llava_json.samples import Image, Problem, Sample

SPOOL, PLAN, SKIPPED = "spool.bin", "plan.json", "spool-skipped.jsonl"
# A shard is what a kill costs and what one worker can do.
_SHARD_BYTES, _SHARD_RECORDS = 256 * 2**20, 50_000
_NUM_PROBED = 1024  # Records whose image files are measured for that.
_HEADER = struct.Struct("<I")


class BadInput(ValueError):
  """What is in the input keeps it from being built."""


class Plan(NamedTuple):
  """What the first reading found, and how the records are cut into shards.

  `skipped` is by reason; `domains` are sorted; `num_renamed` samples had the
  id of an earlier one and got another.
  """

  num_read: int
  num_samples: int
  skipped: dict[str, int]
  domains: list[str]
  num_renamed: int
  num_shards: int

  def span(self, shard: int) -> range:
    """Places in the shuffled order of the records of a shard."""
    first, last = (
      number * self.num_samples // self.num_shards
      for number in (shard, shard + 1)
    )
    return range(first, last)


def write(
  samples: Iterable[Sample | Problem],
  folder: pathlib.Path,
  *,
  file: str,
  domain: str,
  seed: int,
  num_shards: int | None,
) -> Plan:
  """Copies samples into `folder` and plans the shards; the plan comes last.

  Args:
    samples: in any order; a problem is logged with its line and left out.
    folder: exists; what an earlier try left there is overwritten.
    file: what the log calls the source.
    domain: of a sample that names none.
    seed: of the order of the records.
    num_shards: None takes as many as the records and their images need.

  Raises:
    BadInput: for a problem that ends the reading, or if no sample is left.
    OSError: where the disk is full.
  """
  offsets = array.array("Q")
  num_renamed = 0
  skipped: collections.Counter[str] = collections.Counter()
  domains: set[str] = set()
  with (
    (folder / SPOOL).open("wb") as spool,
    (folder / SKIPPED).open("w", encoding="utf-8") as log,
  ):
    for sample in samples:
      if isinstance(sample, Problem):
        log.write(log_line(file, sample))
        if sample.is_fatal:
          raise BadInput(
            f"{sample.message} Before it came {len(offsets):,} records that "
            f"can be used, skipped: {by_reason(skipped)}."
          )
        skipped[sample.reason] += 1
        continue
      sample = sample._replace(domain=sample.domain or domain)
      domains.add(sample.domain)
      offsets.append(spool.tell())
      num_renamed += sample.same_id is not None
      _put(spool, sample)
  num_samples = len(offsets)
  if not num_samples:
    raise BadInput(
      f"{file}: none of {sum(skipped.values()):,} records can be used; "
      f"skipped: {by_reason(skipped)}. {folder / SKIPPED} names each with its "
      "line."
    )
  order = _permutation(num_samples, seed)
  np.save(folder / "offsets.npy", np.frombuffer(offsets, np.uint64))
  np.save(folder / "order.npy", order)
  if num_shards is None:
    num_shards = max(
      -(-_estimate_bytes(folder, order) // _SHARD_BYTES),
      -(-num_samples // _SHARD_RECORDS),
    )
  plan = Plan(
    num_read=num_samples + sum(skipped.values()),
    num_samples=num_samples,
    skipped=dict(sorted(skipped.items())),
    domains=sorted(domains),
    num_renamed=num_renamed,
    num_shards=min(num_shards, num_samples),
  )
  write_whole(folder / PLAN, json.dumps(plan._asdict()).encode())
  return plan


def read_plan(folder: pathlib.Path) -> Plan | None:
  """The plan of an earlier `write`, None if that did not finish."""
  try:
    return Plan(**json.loads((folder / PLAN).read_text()))
  except FileNotFoundError:
    return None


def log_line(file: str, problem: Problem) -> str:
  """A line of skipped.jsonl."""
  fields = {
    "file": file,
    "line": problem.line,
    "id": problem.id,
    "reason": problem.reason,
    "message": problem.message,
  }
  return json.dumps(fields, ensure_ascii=True) + "\n"


class Spool:
  """The samples of a finished spool by number; a context manager."""

  def __init__(self, folder: pathlib.Path):
    self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    self._file = (folder / SPOOL).open("rb")

  def __enter__(self) -> "Spool":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def read(self, index: int) -> Sample:
    """Sample `index`, counted as it stood in the file."""
    self._file.seek(int(self._offsets[index]))
    (size,) = _HEADER.unpack(self._file.read(_HEADER.size))
    fields = json.loads(self._file.read(size))
    images = [
      Image(pathlib.Path(path), None)
      if path is not None
      else Image(None, self._file.read(num_bytes))
      for path, num_bytes in fields.pop("images")
    ]
    place = fields.pop("place")
    return Sample(
      **fields, images=images, place=None if place is None else Place(*place)
    )


def shuffled(folder: pathlib.Path, places: range) -> Iterator[Sample]:
  """The samples of a stretch of the shuffled order."""
  order = np.load(folder / "order.npy", mmap_mode="r")
  with Spool(folder) as spool:
    for index in order[places.start : places.stop].tolist():
      yield spool.read(index)


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is whole or absent, whatever happens."""
  temporary = path.with_name(path.name + ".partial")
  with temporary.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _put(spool: Any, sample: Sample) -> None:
  fields = sample._asdict()
  blobs = [image.data or b"" for image in sample.images if image.path is None]
  fields["images"] = [
    (None, len(image.data or b""))
    if image.path is None
    else (os.fspath(image.path), 0)
    for image in sample.images
  ]
  # A folder's name may be no UTF-8.
  header = json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass")
  spool.write(_HEADER.pack(len(header)) + header)
  for blob in blobs:
    spool.write(blob)


def _permutation(size: int, seed: int) -> Int64[np.ndarray, " _"]:
  # Raw bits and a stable sort: the same in every version of NumPy.
  bits = np.random.Philox(np.random.SeedSequence(seed))
  return np.argsort(bits.random_raw(size), kind="stable")


def _estimate_bytes(
  folder: pathlib.Path, order: Int64[np.ndarray, " N"]
) -> int:
  """Bytes of all records, the image files of some of them measured."""
  probed = order[:_NUM_PROBED].tolist()
  size = 0
  with Spool(folder) as spool:
    for index in probed:
      for image in spool.read(index).images:
        # Whoever reads a missing file will say so.
        with contextlib.suppress(OSError):
          size += image.path.stat().st_size if image.path else 0
  return (folder / SPOOL).stat().st_size + size * len(order) // len(probed)
