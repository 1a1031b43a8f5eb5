"""Processes that do jobs, and what to do when one of them ends early.

A worker is `python -c PROGRAM`, and the program calls `serve`: it knows
nothing of this process but what the jobs say, and imports what it needs, so
not jax.
"""

import contextlib
import json
import os
import pathlib
import queue
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker, util
from typing import Any, TypeVar

import mole_jax

# A NamedTuple of what JSON holds; `str(job)` names it in messages.
Job = TypeVar("Job", bound=tuple)


class WorkerError(RuntimeError):
  """A job could not be done, as it says; others may have been."""


class JobError(WorkerError):
  """What a job reads, writes or is told is at fault, no worker."""


def num_cores() -> int:
  """Processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # Not on every system.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def outlive_kills() -> None:
  """Lets what multiprocessing shares be removed however its processes end.

  Its semaphores are files in /dev/shm, and a process of its own removes those
  that others leave. That one must not be in their process group, or who kills
  the group kills it too. Does nothing where it runs already.
  """

  def spawn(path, args, passed):
    for descriptor in passed:
      os.set_inheritable(descriptor, True)
    try:
      return os.posix_spawn(path, args, os.environ, setsid=True)
    except NotImplementedError:  # The system knows no such thing.
      return usual(path, args, passed)

  usual = util.spawnv_passfds
  util.spawnv_passfds = spawn
  try:
    resource_tracker.ensure_running()
  finally:
    util.spawnv_passfds = usual


def run(
  program: str,
  jobs: Sequence[Job],
  num_workers: int,
  *,
  held: Sequence[int] = (),
) -> Iterator[tuple[Job, dict[str, Any]]]:
  """Does jobs in processes, yields (job, answer) as `serve` gives it.

  Close the generator to stop the processes. They end with this process,
  however that ends.

  Args:
    program: Python that calls `serve`.
    jobs: in the order in which they are begun.
    num_workers: processes.
    held: file descriptors of locks that last as long as a worker does.

  Raises:
    WorkerError: at the first job that fails or worker that dies.
  """
  waiting = list(reversed(jobs))
  workers: list[_Worker] = []
  try:
    for _ in range(max(1, min(num_workers, len(jobs)))):
      workers.append(_Worker(program, held))
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

  def __init__(self, program: str, held: Sequence[int]):
    self.job: Any = None
    self._rest = b""
    source = os.fspath(pathlib.Path(mole_jax.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([source, *([inherited] if inherited else [])])
    self._process = subprocess.Popen(
      [sys.executable, "-c", program],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": path},
      pass_fds=held,
    )
    self.output = self._process.stdout

  def give(self, job: Any) -> None:
    self.job = job
    assert self._process.stdin is not None
    # A worker that has ended is noticed by its output.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(job._asdict()).encode() + b"\n")
      self._process.stdin.flush()

  def answers(self) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The whole lines that have come in."""
    assert self.output is not None
    data = os.read(self.output.fileno(), 2**16)
    if not data:
      raise WorkerError(self._obituary())
    *lines, self._rest = (self._rest + data).split(b"\n")
    for line in lines:
      job, answer = self.job, json.loads(line)
      if "error" in answer:
        raise JobError(f"{job}: {answer['error']}")
      if "crash" in answer:
        raise WorkerError(f"{job}: {answer['crash']}")
      if "known" in answer:
        self.job = None
      yield job, answer

  def stop(self) -> None:
    """Ends the process; what it was writing is not whole yet."""
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
    where = f" at {self.job}" if self.job else ""
    return f"a worker (process {self._process.pid}) {cause}{where}"


def serve(do: Callable[[dict[str, Any], Callable[..., None]], Any]) -> None:
  """Does the jobs that come in, one JSON line each, until the input ends.

  Answers with a line of what is reported of a job, as often as it is, then
  with {"known": what `do` returns}. A job that raises OSError or ValueError is
  answered by {"error": message}, one that raises anything else by {"crash":
  where and why}. Never returns: the process ends with its input, so none
  outlives whoever started it.

  Args:
    do: called with the fields of a job and a function that reports some
      fields, e.g. `report(done=3)`.
  """
  # Ctrl-C reaches the whole group; the parent says when to stop.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # What a library prints must not look like an answer.
  jobs: queue.Queue[str] = queue.Queue()

  def listen():
    for line in sys.stdin:
      jobs.put(line)
    os._exit(0)  # The parent is gone or done; so is this job.

  threading.Thread(target=listen, daemon=True).start()

  def answer(**fields):
    answers.write(json.dumps(fields) + "\n")

  while True:
    try:
      known = do(json.loads(jobs.get()), answer)
    except (OSError, ValueError) as error:
      answer(error=str(error))
    except Exception:
      answer(crash=traceback.format_exc())
    else:
      answer(known=known)
