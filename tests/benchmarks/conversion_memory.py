"""Peak memory of the conversions, on a synthetic LLaVA-1.5 of 2 GB.

python -m tests.benchmarks.conversion_memory [--layers 8] [--dir DIR]

Prints and asserts nothing; tests/interop/test_memory.py holds the bound on a
small model. Pages of mapped files count, though the system can take them
back. Takes about 2 minutes and 7 GB of disk.
"""

import argparse
import contextlib
import pathlib
import shutil
import tempfile
import time

import rich.console
import rich.table

from tests.interop import memory
from tests.interop.memory import MB


def main() -> None:
  args = _arguments()
  shape = memory.Shape(
    args.hidden, args.ffn, args.layers, args.vocab, args.dtype
  )
  with contextlib.ExitStack() as stack:
    folder = args.dir
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    _measure(pathlib.Path(folder), shape)


def _measure(folder: pathlib.Path, shape: memory.Shape) -> None:
  source, base, out = (folder / name for name in ("source", "base", "out"))
  began = time.perf_counter()
  if not source.exists():
    memory.write_llava(source, shape)
  size = sum(file.stat().st_size for file in source.iterdir())
  console = rich.console.Console()
  console.print(
    f"{shape}\n{size / MB:,.0f} MB, at hand in "
    f"{time.perf_counter() - began:.0f} s; largest stacked parameter "
    f"{shape.largest / MB:,.0f} MB; bound 1.5 x that + 500 MB = "
    f"{shape.bound / MB:,.0f} MB"
  )
  table = rich.table.Table()
  for title in ("command", "peak MB", "of bound", "after imports", "read MB"):
    table.add_column(title)
  table.add_column("s")

  def add(command: str, *arguments: str | pathlib.Path) -> None:
    words = [*command.split(), *map(str, arguments)]
    m = memory.run(words, folder)
    table.add_row(
      command,
      f"{m.peak / MB:,.0f}",
      f"{m.peak / shape.bound:.0%}",
      f"{m.imports / MB:,.0f}",
      f"{m.read / MB:,.0f}",
      f"{m.seconds:.1f}",
    )

  for name in (base, out):
    shutil.rmtree(name, ignore_errors=True)
  add("inspect", source)
  add("from-hf", "--src", source, "--out", base)
  add("inspect", base)
  ckpt = ("--ckpt", base, "--out", out)
  add("to-hf --format merged --dry-run", *ckpt)
  add("to-hf --format merged", *ckpt)
  shutil.rmtree(out)
  console.print(table)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  default = memory.Shape()
  for name in ("hidden", "ffn", "layers", "vocab"):
    parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default=default.dtype
  )
  parser.add_argument(
    "--dir", type=pathlib.Path, help="kept: a second run finds its source"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
