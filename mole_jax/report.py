r"""Curves, tables and routing pictures of runs as one HTML page.

python -m mole_jax.report runs/mole3
python -m mole_jax.report runs/mole3 runs/lora --out=comparison

Reads only what the runs wrote; a run without evaluation has its curves.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from mole_jax.reporting import page


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a usage error (said on one line)."""
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.report",
    description="Writes index.html and PNGs about one or several runs.",
  )
  parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
  parser.add_argument(
    "--out",
    metavar="DIR",
    type=pathlib.Path,
    help="where to write (default: report in the first RUN)",
  )
  args = parser.parse_args(argv)
  try:
    path = page.write_report(args.runs, args.out)
    page.print_accuracy(args.runs)
  except (OSError, ValueError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main())
