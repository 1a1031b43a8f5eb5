"""Speed and memory of validate and build, on made files of any length.

python -m tests.benchmarks.prepare_scale --records 1000000 [--dir DIR]

Prints and asserts nothing. Of three records one has an image, one two and one
none, out of a thousand JPEGs of 3 to 10 KB; a conversation has about 700
characters. The peak is of all processes of a command together: "memory" as
the system counts it (libraries once a process), "own" without the pages of
files. Several numbers of records show whether it grows. A million take about
half an hour on 2 CPU cores and 9 GB of disk.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
from PIL import Image

from mole_jax.data import records
from mole_jax.data.tokenizer import EMBEDDED_TOKENIZER

ROOT = pathlib.Path(__file__).parents[2]
MB = 10**6
NUM_IMAGES = 1000
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_SECONDS = 0.1


class Measured(NamedTuple):
  """Of a command: bytes at the peak, and seconds."""

  memory: int
  own: int
  seconds: float


def main() -> None:
  args = _arguments()
  console = rich.console.Console(width=100)
  with contextlib.ExitStack() as stack:
    folder = args.dir
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    _measure(pathlib.Path(folder), args, console)


def _measure(
  folder: pathlib.Path,
  args: argparse.Namespace,
  console: rich.console.Console,
) -> None:
  pictures = folder / "pictures"
  write_images(pictures)
  table = rich.table.Table()
  for title in ("records", "command", "records/s", "MB/s", "memory MB"):
    table.add_column(title, justify="right")
  for title in ("own MB", "s"):
    table.add_column(title, justify="right")
  for count in args.records:
    file = folder / f"{count}.json"
    if not file.exists():
      write_json(file, count)
    size = file.stat().st_size
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    source = [f"--json={file}", f"--images={pictures}"]
    commands = {
      "validate": ["validate", *source],
      "validate, tokens": [
        "validate", *source, f"--tokenizer={EMBEDDED_TOKENIZER.parent}",
      ],
      f"build, {args.workers} workers": [
        "build", *source, "--name=made", f"--out={out}",
        f"--workers={args.workers}",
      ],
      "info --hashes": ["info", str(out / "made"), "--hashes"],
    }  # fmt: skip
    for name, command in commands.items():
      if args.only and args.only not in name:
        continue
      found = run([sys.executable, "-m", "mole_jax.prepare", *command])
      read = size
      if name.startswith(("build", "info")):
        read = sum(path.stat().st_size for path in out.rglob("*-of-*"))
      table.add_row(
        f"{count:,}",
        name,
        f"{count / found.seconds:,.0f}",
        f"{read / found.seconds / MB:,.1f}",
        f"{found.memory / MB:,.0f}",
        f"{found.own / MB:,.0f}",
        f"{found.seconds:,.1f}",
      )
    if (out / "made").exists():
      seconds = _read_texts(out / "made", count)
      table.add_row(
        f"{count:,}", "read texts", f"{count / seconds:,.0f}", "", "", "",
        f"{seconds:,.1f}",
      )  # fmt: skip
    if not args.keep:
      shutil.rmtree(out, ignore_errors=True)
      file.unlink()
  console.print(
    f"{os.cpu_count()} CPU cores; MB/s: of JSON, or of what is built"
  )
  console.print(table)


def _read_texts(folder: pathlib.Path, count: int) -> float:
  began = time.perf_counter()
  texts = records.open_texts(str(folder), "train")
  for start in range(0, count, 4096):
    texts.read(start, min(start + 4096, count))
  return time.perf_counter() - began


def run(command: Sequence[str]) -> Measured:
  """Runs a command and looks at all its processes ten times a second.

  Raises RuntimeError with its output where it fails.
  """
  began = time.perf_counter()
  with tempfile.TemporaryFile() as output:
    process = subprocess.Popen(
      command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
    )
    memory = own = 0
    while process.poll() is None:
      now = [_memory(pid) for pid in _tree(process.pid)]
      memory = max(memory, sum(each for each, _ in now))
      own = max(own, sum(each for _, each in now))
      time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
      output.seek(0)
      raise RuntimeError(f"{command}: {output.read().decode()}")
  return Measured(memory, own, seconds)


def _tree(root: int) -> list[int]:
  """A process and all that it started, and so on."""
  found = [root]
  for pid in found:
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
      with contextlib.suppress(OSError):
        found += map(int, path.read_text().split())
  return found


def _memory(pid: int) -> tuple[int, int]:
  """Bytes of a process, and those without pages of files."""
  try:
    _, resident, shared, *_ = (
      pathlib.Path(f"/proc/{pid}/statm").read_text().split()
    )
  except OSError:  # It has ended.
    return 0, 0
  return int(resident) * _PAGE, (int(resident) - int(shared)) * _PAGE


def write_images(folder: pathlib.Path) -> None:
  """A thousand different JPEGs of 3 to 10 KB, if they are not there."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for number in range(NUM_IMAGES):
    path = folder / f"{number:04d}.jpg"
    if path.exists():
      continue
    # Noise of more or less detail, and of the size of photographs on the web.
    cells = int(rng.integers(6, 24))
    noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
    size = (int(rng.integers(160, 256)), int(rng.integers(160, 256)))
    buffer = io.BytesIO()
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=70)
    path.write_bytes(buffer.getvalue())


def write_json(file: pathlib.Path, count: int) -> None:
  """A LLaVA file of so many different records."""
  rng = random.Random(0)
  letters = "etaoinshrdlu"
  words = [
    "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(5000)
  ]
  part = file.with_name(f"{file.name}.part")
  with part.open("w") as opened:
    for number in range(count):
      opened.write(",\n" if number else "[\n")
      opened.write(json.dumps(_record(number, rng, words)))
    opened.write("\n]\n")
  part.replace(file)


def _record(number: int, rng: random.Random, words: list[str]) -> dict:
  names = [f"{rng.randrange(NUM_IMAGES):04d}.jpg" for _ in range(number % 3)]
  turns = []
  for place in range(rng.randint(1, 4)):
    marks = "<image>\n" * len(names) if not place else ""
    question = " ".join(rng.choices(words, k=rng.randint(4, 20)))
    answer = " ".join(rng.choices(words, k=rng.randint(1, 80)))
    turns += [
      {"from": "human", "value": f"{marks}{question}?"},
      {"from": "gpt", "value": f"{answer}."},
    ]
  record = {"id": f"made-{number:09d}", "conversations": turns}
  if names:
    record["image"] = names[0] if len(names) == 1 else names
  return record


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000]
  )
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--only", help="commands with this in their name")
  parser.add_argument("--dir", type=pathlib.Path, help="of the made files")
  parser.add_argument(
    "--keep", action="store_true", help="leaves them and the last set there"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
