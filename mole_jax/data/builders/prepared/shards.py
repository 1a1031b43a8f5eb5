"""One shard of a data set, and the process that writes shards."""

import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import numpy as np
from array_record.python import array_record_module
from PIL import Image as pillow

from mole_jax.data import images, records, workers
from mole_jax.data.builders.llava_json import samples
from mole_jax.data.builders.llava_json.pictures import describe
from mole_jax.data.builders.prepared import spool, stored

# A row for each record, in the order in which the records are stored. `domain`
# is an index into the domains of the data set.
LENGTHS = np.dtype(
  [
    ("images", "<u4"),
    ("turns", "<u4"),
    ("characters", "<u4"),
    ("answer_characters", "<u4"),
    ("domain", "<u4"),
  ]
)
SPLIT = records.BUILT_SPLIT
# Of a process that writes shards.
PROGRAM = "from mole_jax.data.builders.prepared import shards; shards.main()"
_JPEG_QUALITY = _WEBP_QUALITY = 92
_REPORT_SECONDS = 0.25


class ChangedInput(ValueError):
  """An image is no longer what it was when its shard was written."""


class Job(NamedTuple):
  """What a shard is made of; JSON, for it goes to another process.

  `work` holds the spool and what is known of a shard, `data` the shard.
  """

  work: str
  data: str
  file: str
  name: str
  shard: int
  max_image_side: int

  def __str__(self) -> str:
    return f"shard {self.shard}"

  def plan(self) -> spool.Plan:
    """The plan that the shard belongs to."""
    plan = spool.read_plan(pathlib.Path(self.work))
    if plan is None:
      raise FileNotFoundError(f"{self.work} holds no {spool.PLAN}")
    return plan

  def path(self, num_shards: int) -> pathlib.Path:
    """Where the shard stands when it is whole."""
    return pathlib.Path(self.data) / shard_name(
      self.name, self.shard, num_shards
    )

  def text_path(self, num_shards: int) -> pathlib.Path:
    """Where the records of the shard stand without their images."""
    return pathlib.Path(self.data) / text_name(self.shard, num_shards)

  def beside(self, suffix: str) -> pathlib.Path:
    """A file with what is known of the shard."""
    return pathlib.Path(self.work) / f"shard-{self.shard:05d}{suffix}"


def shard_name(name: str, shard: int, num_shards: int) -> str:
  """The file name of a shard, as TFDS has it."""
  return f"{name}-{SPLIT}.array_record-{shard:05d}-of-{num_shards:05d}"


def text_name(shard: int, num_shards: int) -> str:
  """The file name of a shard's texts, which TFDS must not take for a shard."""
  return f"{SPLIT}-text-{shard:05d}-of-{num_shards:05d}.array_record"


def no_report(done: int, skipped: dict[str, int]) -> None:
  """Tells nobody how far a shard is."""


def write_shard(
  job: Job, report: Callable[[int, dict[str, int]], Any] = no_report
) -> dict[str, Any]:
  """Writes a shard, or finds it written; returns what is known of it.

  The returned {"records", "file" and "text": {"bytes", "sha256"},
  "record_bytes", "skipped": {reason: n}, "failed", "images", "image_bytes",
  "resized", "domains"} is written last, so it stands for a whole shard.

  Args:
    job: which shard.
    report: called now and then with the records that are done and the skipped
      ones by reason.

  Raises:
    ChangedInput: for a written shard whose images were touched since.
    OSError: where it cannot be written.
  """
  plan = job.plan()
  places = plan.span(job.shard)
  path, text_path = job.path(plan.num_shards), job.text_path(plan.num_shards)
  if job.beside(".json").exists():
    known = json.loads(job.beside(".json").read_text())
    if _has_size(path, known["file"]) and _has_size(text_path, known["text"]):
      _check_images(job, places)
      return known
  # Smaller groups than the default: a record is read without its neighbours,
  # texts one after the other.
  file = _Output(path, "group_size:1")
  text = _Output(text_path, "group_size:256,zstd:3")
  told = time.monotonic()
  # Written as it goes: whoever stops for what is skipped reads it there.
  with job.beside(".skipped.jsonl").open("w", buffering=1) as log:
    writing = _Shard(job, plan.domains, log)
    for done, sample in enumerate(
      spool.shuffled(pathlib.Path(job.work), places)
    ):
      if time.monotonic() > told + _REPORT_SECONDS:
        report(done, dict(writing.skipped))
        told = time.monotonic()
      record = writing.add(sample)
      if record is not None:
        file.write(record.data)
        text.write(record.text)
  return writing.finish(file=file.finish(), text=text.finish())


class _Output:
  """An ArrayRecord file that is whole or absent."""

  def __init__(self, path: pathlib.Path, options: str):
    self._path = path
    self._partial = path.with_name(path.name + ".partial")
    writer = array_record_module.ArrayRecordWriter(str(self._partial), options)
    self._writer = writer
    self.write = writer.write

  def finish(self) -> dict[str, Any]:
    """Puts the file in its place; returns its {"bytes", "sha256"}."""
    try:
      self._writer.close()
    except RuntimeError as error:  # That the disk is full is noticed here.
      with contextlib.suppress(OSError):
        self._partial.unlink()
      raise OSError(str(error)) from None
    with self._partial.open("rb") as file:
      os.fsync(file.fileno())
      sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(self._partial, self._path)
    return {"bytes": self._path.stat().st_size, "sha256": sha256}


def _has_size(path: pathlib.Path, known: dict[str, Any]) -> bool:
  return path.exists() and path.stat().st_size == known["bytes"]


class _Shard:
  """What a shard is known by, as its records come."""

  def __init__(self, job: Job, domains: list[str], log: TextIO):
    self.skipped: collections.Counter[str] = collections.Counter()
    self._job = job
    self._domains = {domain: i for i, domain in enumerate(domains)}
    self._lengths: list[tuple[int, ...]] = []
    self._stamps: list[tuple[int, int]] = []
    self._log = log
    self._counts = collections.Counter[str]()
    self._in_domain: collections.Counter[str] = collections.Counter()

  def add(self, sample: samples.Sample) -> stored.Stored | None:
    """A sample as a record's bytes; None if it is skipped."""
    self._stamps += [_stamp(i.path) for i in sample.images if i.path]
    try:
      read = [self._image(image) for image in sample.images]
      record = stored.store(sample, [data for data, _ in read])
    except Exception as error:  # One record must not end a million.
      self._skip(sample, error)
      return None
    answers = [t["value"] for t in sample.turns if t["from"] == "gpt"]
    self._lengths.append(
      (
        len(read),
        len(sample.turns),
        sum(len(turn["value"]) for turn in sample.turns),
        sum(map(len, answers)),
        self._domains[sample.domain or ""],
      )
    )
    self._in_domain[sample.domain or ""] += 1
    self._counts["records"] += 1
    self._counts["record_bytes"] += len(record.data)
    self._counts["images"] += len(read)
    self._counts["image_bytes"] += sum(len(data) for data, _ in read)
    self._counts["resized"] += sum(resized for _, resized in read)
    return record

  def finish(
    self, *, file: dict[str, Any], text: dict[str, Any]
  ) -> dict[str, Any]:
    """Writes down what is known; the shard is there for good after it."""
    job = self._job
    lengths = np.array(self._lengths, LENGTHS)
    _save(job.beside(".lengths.npy"), lengths)
    stamps = np.array(self._stamps, np.int64).reshape(-1, 2)
    _save(job.beside(".stamps.npy"), stamps)
    known = {
      "file": file,
      "text": text,
      "skipped": dict(sorted(self.skipped.items())),
      "domains": dict(sorted(self._in_domain.items())),
    }
    for key in (
      "records",
      "record_bytes",
      "images",
      "image_bytes",
      "resized",
      "failed",
    ):
      known[key] = self._counts[key]
    spool.write_whole(job.beside(".json"), json.dumps(known).encode())
    return known

  def _image(self, image: samples.Image) -> tuple[bytes, bool]:
    data = samples.load_image(image)
    try:
      width, height, format = samples.check_image(data)
    except samples.EntryError as error:
      raise samples.EntryError(
        error.reason, f"{describe(image)}: {error}"
      ) from error
    side = self._job.max_image_side
    if max(width, height) <= side:
      return data, False
    return shrink(data, side, format), True

  def _skip(self, sample: samples.Sample, error: Exception) -> None:
    """Logs a sample whose images are bad, or whose reading went wrong.

    The second is no fault of the record, as far as anybody knows.
    """
    if isinstance(error, samples.EntryError):
      reason, message = error.reason, str(error)
      self.skipped[reason] += 1
    else:
      reason, message = "failed", f"{type(error).__name__}: {error}"
      self._counts["failed"] += 1
    problem = sample.problem(reason, message)
    self._log.write(spool.log_line(self._job.file, problem))


def shrink(data: bytes, side: int, format: str) -> bytes:
  """An encoded image, upright and with no side above `side` pixels.

  JPEG and WebP stay what they are, at quality 92; the rest becomes PNG.
  Transparent parts become white, as they would in training.
  """
  image = images.open_image(data)
  scale = side / max(image.size)
  width, height = (max(1, round(length * scale)) for length in image.size)
  image = image.resize((width, height), pillow.Resampling.LANCZOS)
  buffer = io.BytesIO()
  if format == "JPEG":
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
  elif format == "WEBP":
    image.save(buffer, "WEBP", quality=_WEBP_QUALITY)
  else:
    image.save(buffer, "PNG")
  return buffer.getvalue()


def _check_images(job: Job, places: range) -> None:
  """Raises ChangedInput if a file of a written shard was touched since."""
  stamps = np.load(job.beside(".stamps.npy")).tolist()
  if not stamps:
    return
  paths = (
    image.path
    for sample in spool.shuffled(pathlib.Path(job.work), places)
    for image in sample.images
    if image.path
  )
  for path, stamp in zip(paths, stamps, strict=True):
    if list(_stamp(path)) != stamp:
      raise ChangedInput(
        f"{path} has changed since a shard was written from it. Put the file "
        f"back, or remove {pathlib.Path(job.work).parent} to build anew."
      )


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  """Bytes and time of the last change, nanoseconds; of no file, -1 and 0."""
  try:
    status = path.stat()
  except (OSError, ValueError):
    return -1, 0
  return status.st_size, status.st_mtime_ns


def _save(path: pathlib.Path, values: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, values)
  spool.write_whole(path, buffer.getvalue())


def main() -> None:
  """Writes the shards that come in; reports {"done", "skipped"}."""

  def do(job, report):
    return write_shard(
      Job(**job), lambda done, skipped: report(done=done, skipped=skipped)
    )

  workers.serve(do)
