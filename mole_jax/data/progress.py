"""How far work on data is, on a terminal or in a log."""

import pathlib
import time
from collections.abc import Callable
from types import TracebackType

import rich.console
import rich.progress

_LOG_SECONDS = 30.0


class Progress:
  """A bar with the time left; in a log, a line every half a minute.

  A context manager; `report` is what whoever works is given.
  """

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._began = self._logged = time.monotonic()
    self._phase = ""
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.TaskProgressColumn(),
      rich.progress.TextColumn("{task.fields[speed_text]}"),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("left"),
      rich.progress.TimeRemainingColumn(),
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )
    self._task: rich.progress.TaskID | None = None

  def __enter__(self) -> "Progress":
    self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.stop()

  def bytes_of(self, file: pathlib.Path) -> Callable[[int], None]:
    """A function that is told the bytes read of a file since its last call."""
    # A file that is not there is the reader's to refuse.
    total = file.stat().st_size if file.is_file() else 0
    done = 0

    def on_bytes(count: int):
      nonlocal done
      done += count
      self.report("reading", done, total)

    return on_bytes

  def count_tokens(self, name: str, done: int, total: int) -> None:
    """Takes how many records of a data set have been measured."""
    self.report(f"counting tokens of {name}", done, total)

  def see_images(self, name: str, done: int, total: int) -> None:
    """Takes how many images of a data set have features by now."""
    self.report(f"features of {name}", done, total, "images")

  def report(
    self, phase: str, done: int, total: int, unit: str = "records"
  ) -> None:
    """Takes what is done of a phase: bytes while reading, else of a unit."""
    now = time.monotonic()
    if phase != self._phase:
      self._phase, self._began, self._first = phase, now, done
      if self._task is not None:
        self._bar.remove_task(self._task)
      self._task = self._bar.add_task(phase, total=total, speed_text="")
    seconds = max(now - self._began, 1e-3)
    # What an earlier call had done says nothing about the speed.
    speed = (done - self._first) / seconds
    unit, scale = ("MB", 10**6) if phase == "reading" else (unit, 1)
    text = f"{speed / scale:,.0f} {unit}/s"
    assert self._task is not None
    self._bar.update(self._task, completed=done, total=total, speed_text=text)
    if not self._console.is_terminal and now > self._logged + _LOG_SECONDS:
      self._logged = now
      left = (total - done) / speed if speed else float("inf")
      self._console.print(
        f"{phase}: {done / scale:,.0f} of {total / scale:,.0f} {unit}, "
        f"{text}, {left:,.0f} s left"
      )
