"""Processes that write shards, and what to do when one of them ends early."""

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import mole_jax
from mole_jax.data.builders.prepared.shards import Job

_PROGRAM = "from mole_jax.data.builders.prepared import shards; shards.main()"


class WorkerError(RuntimeError):
  """A shard could not be written; the finished ones are kept."""


def run(
  jobs: Sequence[Job], num_workers: int, *, held: Sequence[int] = ()
) -> Iterator[tuple[Job, dict[str, Any]]]:
  """Does jobs in processes, yields (job, answer) as `shards.main` gives it.

  Close the generator to stop the processes. They end with this process,
  however that ends.

  Args:
    jobs: in the order in which they are begun.
    num_workers: processes.
    held: file descriptors of locks that last as long as a worker does.

  Raises:
    WorkerError: at the first job that fails or worker that dies.
  """
  waiting = list(reversed(jobs))
  workers = [_Worker(held) for _ in range(max(1, min(num_workers, len(jobs))))]
  try:
    with selectors.DefaultSelector() as selector:
      for worker in workers:
        selector.register(worker.output, selectors.EVENT_READ, worker)
        if waiting:
          worker.give(waiting.pop())
      while any(worker.job for worker in workers):
        for key, _ in selector.select():
          worker = key.data
          for job, answer in worker.answers():
            yield job, answer
            if "known" in answer and waiting:
              worker.give(waiting.pop())
  finally:
    for worker in workers:
      worker.stop()


class _Worker:
  """A process and the job it is at."""

  def __init__(self, held: Sequence[int]):
    self.job: Job | None = None
    self._rest = b""
    source = os.fspath(pathlib.Path(mole_jax.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([source, *([inherited] if inherited else [])])
    self._process = subprocess.Popen(
      [sys.executable, "-c", _PROGRAM],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": path},
      pass_fds=held,
    )
    self.output = self._process.stdout

  def give(self, job: Job) -> None:
    self.job = job
    assert self._process.stdin is not None
    # A worker that has ended is noticed by its output.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(job._asdict()).encode() + b"\n")
      self._process.stdin.flush()

  def answers(self) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The whole lines that have come in."""
    assert self.output is not None
    data = os.read(self.output.fileno(), 2**16)
    if not data:
      raise WorkerError(self._obituary())
    *lines, self._rest = (self._rest + data).split(b"\n")
    for line in lines:
      answer = json.loads(line)
      assert self.job is not None
      if "error" in answer:
        raise WorkerError(f"shard {self.job.shard}: {answer['error']}")
      job = self.job
      if "known" in answer:
        self.job = None
      yield job, answer

  def stop(self) -> None:
    """Ends the process; what it was writing is no shard yet."""
    for pipe in (self._process.stdin, self._process.stdout):
      assert pipe is not None
      with contextlib.suppress(OSError):
        pipe.close()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  def _obituary(self) -> str:
    code = self._process.wait()
    cause = f"ended with exit code {code}"
    if code < 0:
      name = signal.Signals(-code).name
      cause = f"was killed by {name}"
      if name == "SIGKILL":
        cause += " (the kernel does that when memory runs out)"
    where = f" at shard {self.job.shard}" if self.job else ""
    return f"a worker (process {self._process.pid}) {cause}{where}"
