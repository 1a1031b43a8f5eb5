import io

import rich.console

from mole_jax.data import progress


def printed(is_terminal):
  return rich.console.Console(
    file=io.StringIO(), force_terminal=is_terminal, width=100
  )


def test_a_log_gets_a_line_now_and_then_with_the_time_left(monkeypatch):
  console = printed(False)
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  with progress.Progress(console) as bar:
    for second in range(101):
      now[0] = 100.0 + second
      bar.report("writing", 500 + 10 * second, 2000)
  assert console.file.getvalue().splitlines() == [
    "writing: 810 of 2,000 records, 10 records/s, 119 s left",
    "writing: 1,120 of 2,000 records, 10 records/s, 88 s left",
    "writing: 1,430 of 2,000 records, 10 records/s, 57 s left",
  ]


def test_a_terminal_gets_a_bar_that_goes_away():
  console = printed(True)
  with progress.Progress(console) as bar:
    bar.report("writing", 0, 10)
    bar.report("writing", 10, 10)
  text = console.file.getvalue()
  assert "writing" in text and "100%" in text
  assert text.endswith("\x1b[1A\x1b[2K")  # The line is taken away.


def test_bytes_read_add_up_to_the_file(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_bytes(bytes(3_000_000))
  monkeypatch.setattr(progress, "_LOG_SECONDS", -1.0)
  console = printed(False)
  with progress.Progress(console) as bar:
    on_bytes = bar.bytes_of(file)
    on_bytes(1_000_000)
    on_bytes(2_000_000)
  first, last = console.file.getvalue().splitlines()
  assert first.startswith("reading: 1 of 3 MB, ")
  assert last.startswith("reading: 3 of 3 MB, ")
  assert last.endswith(" 0 s left")
