"""Builds a data set: read once, plan, write the shards, put it in place.

OUT/NAME/1.0.0 is whole or absent. What is done so far stands in
OUT/NAME/1.0.0.partial, where the same command finds it again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mole_jax.data import records, workers
from mole_jax.data.builders.llava_json import samples
from mole_jax.data.builders.prepared import finish, shards, spool
from mole_jax.data.builders.prepared.tally import LOG, Tally, TooManySkipped

_FORMAT = 2  # Of what stands beside the shards.
_LOCK_SECONDS = 5.0
_NUM_NAMED = 3  # Bad records that an error names; the log has all.

# Called with what is done ("reading" bytes, "writing" records), how much of it
# so far, and how much there is.
Report = Callable[[str, int, int], Any]


def no_report(phase: str, done: int, total: int) -> None:
  """Tells nobody how far a build is."""


def build(
  file: str | pathlib.Path,
  image_folder: str | pathlib.Path | None,
  *,
  name: str,
  out: str | pathlib.Path,
  domain: str | None = None,
  num_workers: int = 1,
  max_image_side: int = 1024,
  num_shards: int | None = None,
  max_skipped: float | int = 0.001,
  seed: int = 0,
  layout: samples.Layout = samples.LLAVA,
  read: Callable[..., Iterable[samples.Sample | samples.Problem]] = (
    samples.read_samples
  ),
  report: Report = no_report,
) -> dict[str, Any]:
  """Builds OUT/NAME/1.0.0, goes on with it, or finds it built.

  Its records and their order depend on the input, `name`, `domain`,
  `max_image_side`, `num_shards`, `seed` and `layout`, not on `num_workers` or
  on how often the build was ended before.

  Args:
    file: conversations, see `samples.read_samples`.
    image_folder: where the paths of images start; None if there are none.
    name: of the data set; lower case, digits and underscores.
    out: folder of data sets.
    domain: of the records that name none; `name` if None.
    num_workers: processes that read images and write shards.
    max_image_side: pixels; a larger image is stored smaller.
    num_shards: files to write; None: as many as make 256 MiB each.
    max_skipped: share of the records, 0 to 1, that may be bad.
    seed: of the order of the records.
    layout: of the conversations, see `samples.read_samples`.
    read: in place of `samples.read_samples`.
    report: called as the work goes on.

  Returns:
    What prepared.json says, see `info.describe`.

  Raises:
    TooManySkipped: with the counts and where the log is.
    spool.BadInput: where the reading ends early or no record is left.
    ValueError: for wrong options or paths, or an input that has changed since
      the build was begun.
    OSError: where the disk is full, or the set is being built already.
    workers.WorkerError: if a worker fails or dies. Here and above, finished
      shards are kept.
  """
  file = pathlib.Path(file)
  if image_folder is not None:
    # A build may go on from another folder.
    image_folder = pathlib.Path(image_folder).resolve()
  _check_options(name, num_workers, max_image_side, num_shards, max_skipped)
  num_bytes = 0

  def on_bytes(count: int):
    nonlocal num_bytes
    num_bytes += count
    report("reading", num_bytes, wanted["file_bytes"])

  # First of all, for it says what is wrong with the paths.
  reading = read(file, image_folder, layout=layout, on_bytes=on_bytes)
  wanted = {
    "format": _FORMAT,
    **_source(file, image_folder),
    "name": name,
    "domain": domain or name,
    "max_image_side": max_image_side,
    "shards": num_shards,
    "seed": seed,
    "layout": layout.name,
  }
  target = pathlib.Path(out) / name / finish.VERSION
  partial = target.with_name(f"{finish.VERSION}.partial")
  data, work = partial / "data", partial / "work"
  try:
    if target.exists():
      return _built(target, wanted)
    with _lock(partial) as held:
      if target.exists():  # Another process was faster.
        return _built(target, wanted)
      _begin(partial, wanted)
      plan = spool.read_plan(work)
      if plan is None:
        before = _stamp(file)
        plan = spool.write(
          reading,
          work,
          file=file.name,
          domain=domain or name,
          seed=seed,
          num_shards=num_shards,
        )
        if _stamp(file) != before:
          (work / spool.PLAN).unlink()
          raise ValueError(
            f"{file} changed while it was read; run the command again once "
            "nobody writes to it."
          )
      jobs = [
        shards.Job(str(work), str(data), file.name, name, shard, max_image_side)
        for shard in range(plan.num_shards)
      ]
      tally = Tally(plan, max_skipped, partial / LOG)
      tally.check()
      report("writing", 0, plan.num_samples)
      writing = workers.run(shards.PROGRAM, jobs, num_workers, held=[held])
      with contextlib.closing(writing):
        for job, answer in writing:
          tally.add(job.shard, answer)
          tally.check()
          report("writing", tally.num_done, plan.num_samples)
      about = finish.write(data, work, plan, tally, wanted)
      os.replace(data, target)
      shutil.rmtree(partial)
      return about
  except TooManySkipped as error:
    finish.gather_log(work, partial / LOG)
    if not _has_shards(partial):  # What is mended then counts.
      (work / spool.PLAN).unlink()
    first = finish.first_problems(partial / LOG, _NUM_NAMED)
    raise TooManySkipped("\n  ".join([str(error), *first])) from None
  except workers.WorkerError as error:
    raise workers.WorkerError(f"{error}. {_way_on(partial)}") from None
  except OSError as error:
    if isinstance(error, BlockingIOError):
      raise
    raise OSError(f"{error}. {_way_on(partial)}") from error


def _check_options(
  name: str,
  num_workers: int,
  max_image_side: int,
  num_shards: int | None,
  max_skipped: float | int,
) -> None:
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    better = re.sub(r"\W+", "_", name.lower()).strip("_0123456789")
    raise ValueError(
      f"name={name!r}: wanted lower case letters, digits and underscores, a "
      f"letter first (TFDS asks for it), e.g. {better or 'mine'!r}."
    )
  for key, value in (
    ("workers", num_workers),
    ("max_image_side", max_image_side),
    ("shards", num_shards),
  ):
    if value is not None and value < 1:
      raise ValueError(f"{key}={value}; wanted at least 1.")
  if not 0 <= max_skipped <= 1:
    raise ValueError(f"max_skipped={max_skipped}; wanted a share, 0 to 1.")


def _source(
  file: pathlib.Path, image_folder: pathlib.Path | None
) -> dict[str, Any]:
  """What tells an input from another, but for what is in the images."""
  with file.open("rb") as content:
    sha256 = hashlib.file_digest(content, "sha256").hexdigest()
  return {
    "file": file.name,
    "file_bytes": file.stat().st_size,
    "file_sha256": sha256,
    "images": str(image_folder) if image_folder else None,
  }


def _stamp(file: pathlib.Path) -> tuple[int, int]:
  status = file.stat()
  return status.st_size, status.st_mtime_ns


def _built(target: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
  """What is known of a set that an earlier call built."""
  about = _about(target)
  _check_same(target, about["wanted"], wanted)
  # A kill between the last two steps leaves it.
  shutil.rmtree(
    target.with_name(f"{finish.VERSION}.partial"), ignore_errors=True
  )
  return about


def _begin(partial: pathlib.Path, wanted: dict[str, Any]) -> None:
  """Starts a build, or goes on with one of the same input and options."""
  path = partial / "wanted.json"
  begun = json.loads(path.read_text()) if path.exists() else None
  if begun != wanted and not _has_shards(partial):
    # Nothing is lost, so whoever mended the input may just go on.
    shutil.rmtree(partial / "data", ignore_errors=True)
    shutil.rmtree(partial / "work", ignore_errors=True)
    spool.write_whole(path, json.dumps(wanted, indent=2).encode())
  elif begun is not None:
    _check_same(partial, begun, wanted)
  for folder in (partial / "data", partial / "work"):
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.partial"):
      left.unlink()


def _has_shards(partial: pathlib.Path) -> bool:
  return any((partial / "work").glob("shard-*.json"))


def _check_same(
  folder: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
  changes = [
    f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]
  if changes:
    raise ValueError(
      f"{folder} was made of something else: {'; '.join(changes)}. Give the "
      f"same input and options, another --name or --out, or remove {folder} "
      "to build anew."
    )


@contextlib.contextmanager
def _lock(partial: pathlib.Path) -> Iterator[int]:
  """Holds a build for this process and its workers; yields what holds it.

  The kernel drops the lock with the last of them. Workers of a build that was
  killed need a moment to notice.
  """
  deadline = time.monotonic() + _LOCK_SECONDS
  path = partial / "lock"
  while True:
    partial.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if time.monotonic() > deadline:
          file.seek(0)
          raise BlockingIOError(
            f"{partial} is being built by process {file.read().strip()}; "
            "wait for it or stop it."
          ) from None
        time.sleep(0.1)
        continue
      # Whoever held it may have finished, and removed it, meanwhile.
      if not path.exists() or not os.path.samestat(
        os.fstat(file.fileno()), path.stat()
      ):
        continue
      file.truncate(0)
      file.write(str(os.getpid()))
      file.flush()
      yield file.fileno()
      return


def _about(target: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads((target / records.ABOUT).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{target} is there but was not built by this command ({error}); give "
      "another --name or --out, or remove it."
    ) from None


def _way_on(partial: pathlib.Path) -> str:
  way_on = "see to the cause, then run the same command again."
  if _has_shards(partial):
    return f"Finished shards are kept in {partial}: {way_on}"
  return way_on.capitalize()
