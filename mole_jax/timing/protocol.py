"""How `bench` speaks with the programs that it compares.

Each runs in a process of its own and stays there between turns: it sends a
line when it is ready, then, for each number that it is told (steps, tokens of
an answer, records), one with the seconds they took. Imports neither jax nor
torch, since both sides use it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

# What a program says to its caller, among whatever libraries print.
_MARK = "mole_jax-bench "


class SideError(RuntimeError):
  """A side of a comparison ended before it was told to."""


class Side(NamedTuple):
  """A program that takes steps: its command, and what it is called."""

  name: str
  command: Sequence[str]


def environment(folder: str) -> dict[str, str]:
  """This process's, for one whose temporary files are to lie in `folder`.

  They go with the folder, though that process may be killed.
  """
  return os.environ | {"TMPDIR": folder}


class Process:
  """A side that is ready; what it prints on standard error goes to a file."""

  def __init__(self, side: Side, errors: IO[str], folder: str):
    self._side = side
    self._errors = errors
    self._process = subprocess.Popen(
      list(side.command),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=environment(folder),
    )
    try:
      self.about = self._answer()
    except BaseException:
      self.close()
      raise

  def steps(self, count: int) -> dict[str, Any]:
    """What a turn took: {"seconds": [...]}, of steps {"losses": [...]} too."""
    self._send(str(count))
    return self._answer()

  def stop(self) -> dict[str, Any]:
    """Ends the process; what it says at the end."""
    self._send("")
    last = self._answer()
    self._process.wait()
    return last

  def close(self) -> None:
    """Ends the process, whatever it does."""
    if self._process.poll() is None:
      self._process.kill()
      self._process.wait()
    for stream in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):
        stream.close()

  def _send(self, line: str) -> None:
    try:
      self._process.stdin.write(f"{line}\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      self._fail()

  def _answer(self) -> dict[str, Any]:
    for line in self._process.stdout:
      if line.startswith(_MARK):
        return json.loads(line.removeprefix(_MARK))
    return self._fail()

  def _fail(self) -> Any:
    code = self._process.wait()
    self._errors.seek(0)
    last = self._errors.read().strip().splitlines()[-12:]
    text = "\n  ".join(last)
    raise SideError(f"{self._side.name} ended with code {code}:\n  {text}")


@contextlib.contextmanager
def running(side: Side) -> Iterator[Process]:
  """A side's process, ended in any case."""
  # Libraries warn at length; only a failure shows it.
  with (
    tempfile.TemporaryFile("w+") as errors,
    tempfile.TemporaryDirectory(prefix="mole_jax-side-") as folder,
  ):
    process = Process(side, errors, folder)
    try:
      yield process
    finally:
      process.close()


def serve(
  about: Mapping[str, Any],
  steps: Callable[[int], Mapping[str, Any]],
  last: Callable[[], Mapping[str, Any]],
) -> None:
  """The other end: answers on standard output until it is told to stop."""
  _say(about)
  for line in sys.stdin:
    if not line.strip():
      break
    _say(steps(int(line)))
  _say(last())


def _say(values: Mapping[str, Any]) -> None:
  print(f"{_MARK}{json.dumps(values)}", flush=True)
