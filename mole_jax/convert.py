r"""Weights in and out, in the formats that others use.

python -m mole_jax.convert inspect PATH
python -m mole_jax.convert from-hf --src LLAVA --out weights/llava
python -m mole_jax.convert to-hf --ckpt runs/mole3 --format mole --out exported
python -m mole_jax.convert verify --ckpt runs/mole3 --hf exported

What a checkpoint is comes from the checkpoint, never from flags.
Exit codes: 0 done; 1 `verify` found a difference; 2 wrong usage, or a
checkpoint that cannot be used.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

import rich.console
import rich.table

from mole_jax.interop import about, from_hf, parity, to_hf, verify

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    return args.run(args, console)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _inspect(args: argparse.Namespace, console: rich.console.Console) -> int:
  for table in about.describe(args.path, args.allow_pickle):
    console.print(table)
  return 0


def _from_hf(args: argparse.Namespace, console: rich.console.Console) -> int:
  report = from_hf.convert(
    args.src,
    args.out,
    llm=args.llm,
    vision=args.vision,
    dtype=args.dtype,
    allow_pickle=args.allow_pickle,
  )
  console.print(report)
  console.print(f"Written to {args.out}")
  return 0


def _to_hf(args: argparse.Namespace, console: rich.console.Console) -> int:
  report = to_hf.convert(
    args.ckpt,
    args.out,
    format=args.format,
    max_shard_bytes=args.max_shard_size,
    dtype=args.dtype,
    without_base=args.without_base,
    ignores_capacity=args.ignore_capacity,
    dry_run=args.dry_run,
  )
  console.print(report)
  console.print(
    "Nothing was written (--dry-run)."
    if args.dry_run
    else f"Written to {args.out}"
  )
  return 0


def _verify(args: argparse.Namespace, console: rich.console.Console) -> int:
  result = verify.verify(args.ckpt, args.hf, base=args.llm)
  out = args.out or args.hf
  parity.write(result, out)
  console.print(parity.table(result))
  console.print(f"Written to {out / parity.JSON_FILE} and {parity.TEXT_FILE}")
  return 0 if result.is_equal else 1


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

  def add(name, run, help):
    command = commands.add_parser(name, help=help)
    command.set_defaults(run=run)
    return command

  def add_path(command, flag, help, **options):
    command.add_argument(
      flag, metavar="PATH", type=pathlib.Path, help=help, **options
    )

  inspect = add("inspect", _inspect, "what a checkpoint is")
  inspect.add_argument("path", metavar="PATH", type=pathlib.Path)
  load = add("from-hf", _from_hf, "weights of any format to a base")
  add_path(load, "--src", "a model or a part of one", required=True)
  add_path(load, "--out", "where the base is written", required=True)
  add_path(load, "--llm", "decoder or whole LLaVA, where --src has none")
  add_path(load, "--vision", "tower, where --src has none")
  save = add("to-hf", _to_hf, "a base or a run to a folder for PyTorch")
  ckpt = "RUN[/STAGE[/checkpoints/STEP]] or a base"
  add_path(save, "--ckpt", ckpt, required=True)
  save.add_argument(
    "--format",
    required=True,
    choices=to_hf.FORMATS,
    help="merged: a stock LLaVA, plain LoRA added into its base; native-moe: "
    "a stock LLaVA with Mixtral, for whole FFNs as experts; mole: adapters and "
    "experts as they are, with their own modeling file; experts: a PEFT folder "
    "an expert, and the router",
  )
  add_path(save, "--out", "where to write", required=True)
  save.add_argument(
    "--max-shard-size", metavar="2GB", type=_size, default=_size("2GB")
  )
  save.add_argument(
    "--without-base",
    action="store_true",
    help="of the format mole: adapters alone, with hashes of their base",
  )
  save.add_argument(
    "--ignore-capacity",
    action="store_true",
    help="write experts that drop tokens at evaluation, though PyTorch drops "
    "none",
  )
  save.add_argument(
    "--dry-run", action="store_true", help="say what would be written"
  )
  check = add("verify", _verify, "compare a checkpoint with its export")
  add_path(check, "--ckpt", ckpt, required=True)
  add_path(check, "--hf", "what to-hf wrote of it", required=True)
  add_path(check, "--llm", "the base, where the export has none")
  add_path(check, "--out", "where the report goes (default: --hf)")
  for command in (load, save):
    command.add_argument(
      "--dtype",
      choices=("float32", "bfloat16"),
      help="of what is written (default: as stored)",
    )
  for command in (inspect, load):
    command.add_argument(
      "--allow-pickle",
      action="store_true",
      help="read PyTorch pickles (.bin, .pt), from sources you trust",
    )
  return parser


if __name__ == "__main__":
  sys.exit(main())
