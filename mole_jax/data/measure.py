"""Tokens and images of every record, counted once and kept beside the data.

What a run reads, and how it is packed, is planned from these counts; no image
is opened for them.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mole_jax.data import conversation, encoding, records, workers

_CHUNK = 2048  # Records read at once.
_PER_JOB = 4 * _CHUNK  # What a worker process is given, seconds of work.
_ABOUT, _ROWS, _SKIPPED = "about.json", "rows.npy", "skipped.jsonl"
_PROGRAM = "from mole_jax.data import measure; measure.main()"
_LEFT_SECONDS = 60  # After which a folder that nobody holds is litter.

# A row a record. `answer_tokens` have a label; `reason` and `domain` are
# indices into names, reason 0 standing for a record that is used.
ROW = np.dtype(
  [
    ("length", "<u4"),
    ("answer_tokens", "<u4"),
    ("images", "<u2"),
    ("domain", "<u4"),
    ("reason", "<u1"),
  ]
)

# Called with how many records were measured, and of how many.
Report = Callable[[int, int], Any]


def no_report(done: int, total: int) -> None:
  """Tells nobody how far a measurement is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """A data set as an encoder sees it.

  rows: of `ROW`, in the order of the records.
  reasons: names of `rows["reason"]`, "" first.
  domains: names of `rows["domain"]`.
  log: where each skipped record is named; None if it is nowhere.
  """

  rows: np.ndarray
  reasons: tuple[str, ...]
  domains: tuple[str, ...]
  log: pathlib.Path | None

  def skipped(self) -> dict[str, int]:
    """Number of records that are not used, by reason."""
    counts = np.bincount(self.rows["reason"], minlength=len(self.reasons))
    return dict(
      sorted(
        (reason, int(count))
        for reason, count in zip(self.reasons, counts, strict=True)
        if reason and count
      )
    )


def measure(
  texts: records.Texts, encoder: encoding.Encoder, report: Report = no_report
) -> tuple[Measured, list[dict[str, Any]]]:
  """Encodes every record; returns counts and what is wrong with the rest."""
  skipped: list[dict[str, Any]] = []
  total = len(texts)
  measured = _measure_span(
    texts,
    encoder,
    range(total),
    skipped.append,
    lambda done: report(done, total),
  )
  return measured, skipped


def _measure_span(
  texts: records.Texts,
  encoder: encoding.Encoder,
  places: range,
  on_skipped: Callable[[dict[str, Any]], Any],
  report: Callable[[int], Any],
) -> Measured:
  rows = np.zeros(len(places), ROW)
  reasons: dict[str, int] = {"": 0}
  domains: dict[str, int] = {}
  for start in range(places.start, places.stop, _CHUNK):
    stop = min(start + _CHUNK, places.stop)
    for index, record in enumerate(texts.read(start, stop), start):
      row = index - places.start
      domain = domains.setdefault(record["domain"], len(domains))
      try:
        sample = encoder.encode(record)
      except conversation.SkippedSample as error:
        reason = reasons.setdefault(error.reason, len(reasons))
        rows[row] = (0, 0, 0, domain, reason)
        on_skipped(
          {
            "record": index,
            "id": record["id"],
            "reason": error.reason,
            "message": str(error),
          }
        )
        continue
      answer_tokens = int((sample.labels != conversation.IGNORE_LABEL).sum())
      length = len(sample.input_ids)
      rows[row] = (length, answer_tokens, sample.num_images, domain, 0)
    report(stop - places.start)
  return Measured(rows, tuple(reasons), tuple(domains), None)


class _Job(NamedTuple):
  """Records start to stop; `folder` holds how, and gets what they are."""

  folder: str
  start: int
  stop: int

  def __str__(self) -> str:
    return f"counting tokens of records {self.start:,} to {self.stop:,}"

  def beside(self, suffix: str) -> pathlib.Path:
    return pathlib.Path(self.folder) / f"part-{self.start}{suffix}"


def _measure_in_processes(
  texts: records.Texts,
  encoder: encoding.Encoder,
  folder: pathlib.Path,
  num_workers: int,
  report: Report,
) -> Measured:
  """As `measure`, with the same result; `folder` gets the skipped records."""
  task = folder / "task.pickle"
  task.write_bytes(pickle.dumps((texts, encoder)))
  jobs = [
    _Job(str(folder), start, min(start + _PER_JOB, len(texts)))
    for start in range(0, len(texts), _PER_JOB)
  ]
  begun: dict[int, int] = {}
  known: dict[int, dict[str, list[str]]] = {}
  running = workers.run(_PROGRAM, jobs, num_workers)
  try:
    with contextlib.closing(running):
      for job, answer in running:
        if "known" in answer:
          known[job.start] = answer["known"]
        else:
          begun[job.start] = answer["done"]
          report(sum(begun.values()), len(texts))
  except workers.JobError as error:
    raise ValueError(str(error)) from None
  task.unlink()
  return _join(jobs, [known[job.start] for job in jobs], folder / _SKIPPED)


def _join(
  jobs: Sequence[_Job],
  known: Sequence[dict[str, list[str]]],
  log: pathlib.Path,
) -> Measured:
  """Parts as one; names are numbered as they appear, as in one process."""
  rows = np.zeros(jobs[-1].stop, ROW)
  reasons: dict[str, int] = {"": 0}
  domains: dict[str, int] = {}
  with log.open("wb") as skipped:
    for job, names in zip(jobs, known, strict=True):
      part = np.load(job.beside(".npy"))
      for key, numbers in (("reason", reasons), ("domain", domains)):
        new = [numbers.setdefault(n, len(numbers)) for n in names[key]]
        part[key] = np.array(new, part.dtype[key])[part[key]]
      rows[job.start : job.stop] = part
      with job.beside(".jsonl").open("rb") as lines:
        shutil.copyfileobj(lines, skipped)
      job.beside(".npy").unlink()
      job.beside(".jsonl").unlink()
  return Measured(rows, tuple(reasons), tuple(domains), None)


def main() -> None:
  """Measures the records that come in; reports {"done"}."""

  @functools.cache
  def read_task(folder: str) -> tuple[records.Texts, encoding.Encoder]:
    # Written by who started this process, into a folder of its own.
    path = pathlib.Path(folder) / "task.pickle"
    return pickle.loads(path.read_bytes())

  def do(fields, report):
    job = _Job(**fields)
    texts, encoder = read_task(job.folder)
    with job.beside(".jsonl").open("w", encoding="utf-8") as log:
      measured = _measure_span(
        texts,
        encoder,
        range(job.start, job.stop),
        lambda skipped: log.write(_line(skipped)),
        lambda done: report(done=done),
      )
    np.save(job.beside(".npy"), measured.rows)
    return {"reason": measured.reasons, "domain": measured.domains}

  workers.serve(do)


def load_or_measure(
  name: str,
  split: str,
  encoder: encoding.Encoder,
  report: Report = no_report,
  *,
  num_workers: int | None = None,
) -> Measured:
  """Measures a split, or finds what an earlier run measured.

  What was measured of a set that `python -m mole_jax.prepare build` made is
  kept in its folder, or, where that cannot be written to, in the user's cache.

  Args:
    name: of the data set, see `records.open_records`.
    split: of it.
    encoder: what makes samples of the records.
    report: called now and then, where there is something to measure.
    num_workers: processes for a large set; None: one a core. The result is
      the same.

  Raises:
    ValueError: where the set is damaged, the encoder does not fit, or there is
      no place for the result.
    workers.WorkerError: if a process dies.
  """
  if name in records.EMBEDDED:  # It takes less than a second.
    measured, _ = measure(records.open_texts(name, split), encoder, report)
    return measured
  key = f"{split}-{records.identity(name, split)[:16]}-{encoder.identity[:16]}"
  folder = cache_folder(name, "lengths") / key
  if not (folder / _ABOUT).is_file():
    texts = records.open_texts(name, split)
    try:
      _store(folder, texts, encoder, num_workers or workers.num_cores(), report)
    except OSError as error:
      raise ValueError(
        f"what was counted in {name} cannot be kept: {error}; make room or "
        "give leave to write there, or set XDG_CACHE_HOME to another folder "
        "and make that of the data set read-only."
      ) from error
  try:
    about = json.loads((folder / _ABOUT).read_text())
    rows = np.load(folder / _ROWS, mmap_mode="r")
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{folder} is damaged ({error}); remove it, it is made anew."
    ) from error
  return Measured(
    rows=rows,
    reasons=tuple(about["reasons"]),
    domains=tuple(about["domains"]),
    log=folder / _SKIPPED,
  )


def cache_folder(name: str, kind: str) -> pathlib.Path:
  """Where what was found out about a data set is kept: beside it, if it can.

  Else, and for what comes with the package, in the user's cache.
  """
  folder = records.find(name)
  if name not in records.EMBEDDED and os.access(folder, os.W_OK):
    return folder / kind
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "mole_jax" / kind


def _store(
  folder: pathlib.Path,
  texts: records.Texts,
  encoder: encoding.Encoder,
  num_workers: int,
  report: Report,
) -> None:
  """Writes a folder that is whole or absent, whoever else writes it too."""
  with _partial_folder(folder.parent) as partial:
    # Two jobs or fewer are done before processes are up.
    if len(texts) > 2 * _PER_JOB and num_workers > 1:
      measured = _measure_in_processes(
        texts, encoder, partial, num_workers, report
      )
    else:
      measured, skipped = measure(texts, encoder, report)
      (partial / _SKIPPED).write_text("".join(map(_line, skipped)))
    np.save(partial / _ROWS, measured.rows)
    about = {"reasons": measured.reasons, "domains": measured.domains}
    (partial / _ABOUT).write_text(json.dumps(about))
    partial.chmod(0o755)
    try:
      os.rename(partial, folder)
    except OSError:
      if not (folder / _ABOUT).is_file():  # Else another process was faster.
        raise


def _line(skipped: dict[str, Any]) -> str:
  return json.dumps(skipped) + "\n"


@contextlib.contextmanager
def _partial_folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill and rename; else it is removed.

  So are those of processes that were killed: nobody holds their locks.
  """
  parent.mkdir(parents=True, exist_ok=True)
  for left in parent.glob(".partial-*"):
    # Where locks do not work, nothing is removed.
    with contextlib.suppress(OSError):
      is_old = time.time() - left.stat().st_mtime > _LEFT_SECONDS
      if is_old:  # A new one may be about to be locked.
        with _opened(left) as folder:
          fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
          shutil.rmtree(left)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
  with _opened(partial) as folder:
    with contextlib.suppress(OSError):
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
      yield partial
    finally:
      shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator[int]:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    yield descriptor
  finally:
    os.close(descriptor)
