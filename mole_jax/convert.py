r"""Weights in and out, in Hugging Face's formats.

python -m mole_jax.convert inspect PATH
python -m mole_jax.convert from-hf --src LLAVA --out weights/llava
python -m mole_jax.convert to-hf --ckpt runs/mole3 --format mole --out exported

What a checkpoint is comes from the checkpoint, never from flags.
Exit codes: 0 done; 2 wrong usage, or a checkpoint that cannot be used.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

import rich.console
import rich.table

from mole_jax.interop import about, formats

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    if args.command == "inspect":
      for table in about.describe(args.path):
        console.print(table)
    elif args.command == "from-hf":
      report = formats.from_hf(
        args.src, args.out, llm=args.llm, vision=args.vision, dtype=args.dtype
      )
      console.print(report)
      console.print(f"Written to {args.out}")
    else:
      report = formats.to_hf(
        args.ckpt,
        args.out,
        format=args.format,
        max_shard_bytes=args.max_shard_size,
        dtype=args.dtype,
        dry_run=args.dry_run,
      )
      console.print(report)
      console.print(
        "Nothing was written (--dry-run)."
        if args.dry_run
        else f"Written to {args.out}"
      )
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _size(text: str) -> int:
  match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
  if not match:
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write 2GB, 500MB.")
  return int(match[1]) * SIZES[match[2]]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.convert", description="Weights in and out."
  )
  commands = parser.add_subparsers(dest="command", required=True)
  inspect = commands.add_parser("inspect", help="what a checkpoint is")
  inspect.add_argument("path", metavar="PATH", type=pathlib.Path)
  load = commands.add_parser(
    "from-hf", help="a LLaVA, or a decoder and a tower, to a base"
  )
  load.add_argument("--src", required=True, metavar="DIR", type=pathlib.Path)
  load.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path)
  load.add_argument(
    "--llm",
    metavar="DIR",
    type=pathlib.Path,
    help="decoder, where --src has none",
  )
  load.add_argument(
    "--vision",
    metavar="DIR",
    type=pathlib.Path,
    help="tower, where --src has none",
  )
  save = commands.add_parser(
    "to-hf", help="a base or a run to a folder for PyTorch"
  )
  save.add_argument(
    "--ckpt",
    required=True,
    metavar="RUN[/STAGE[/checkpoints/STEP]] or BASE",
    type=pathlib.Path,
  )
  save.add_argument(
    "--format",
    required=True,
    choices=("merged", "mole"),
    help="merged: a stock LLaVA, plain LoRA added into its base; mole: "
    "adapters as they are, with their own modeling file",
  )
  save.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path)
  save.add_argument(
    "--max-shard-size", metavar="2GB", type=_size, default=_size("2GB")
  )
  save.add_argument(
    "--dry-run", action="store_true", help="say what would be written"
  )
  for command in (load, save):
    command.add_argument(
      "--dtype",
      choices=("float32", "bfloat16"),
      help="of what is written (default: as stored)",
    )
  return parser


if __name__ == "__main__":
  sys.exit(main())
