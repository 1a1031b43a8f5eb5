r"""Curves, tables and routing pictures of runs as one HTML page.

python -m mole_jax.report runs/mole3
python -m mole_jax.report runs/mole3 runs/lora --out=comparison
python -m mole_jax.report --bench curves.json dispatch.json --out=pictures

Reads only what the runs wrote; a run without evaluation has its curves. With
--bench it draws what `mole_jax.bench ... --json` wrote, a PNG for each file.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from mole_jax.reporting import bench_figures, page


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a usage error (said on one line)."""
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.report",
    description="Writes index.html and PNGs about one or several runs.",
  )
  parser.add_argument("runs", nargs="*", metavar="RUN", help="run directory")
  parser.add_argument(
    "--bench",
    nargs="+",
    type=pathlib.Path,
    metavar="FILE",
    help="draw these files of `bench curves`, `dispatch` or `compare` instead",
  )
  parser.add_argument(
    "--out",
    metavar="DIR",
    type=pathlib.Path,
    help="where to write (default: report in the first RUN; of --bench, here)",
  )
  args = parser.parse_args(argv)
  if bool(args.runs) == bool(args.bench):
    parser.error("give one RUN or more, or --bench FILE ...")
  try:
    if args.bench:
      for path in bench_figures.draw(args.bench, args.out or pathlib.Path()):
        print(path)
      return 0
    path = page.write_report(args.runs, args.out)
    page.print_accuracy(args.runs)
  except (OSError, ValueError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main())
