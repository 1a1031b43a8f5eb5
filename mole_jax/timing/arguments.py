"""What `bench` takes on its command line."""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mole_jax.timing import beside, compare, curves, dispatch

Run = Callable[[argparse.Namespace], dict[str, Any]]
# What --unrolled says, for a Generator.
UNROLLED = {"auto": None, "on": True, "off": False}


def make_parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
  """`runs` by the command that each is; the parsed arguments hold theirs.

  `command` is its name, `has_config` whether it takes a config.
  """
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.bench", description="Timings of this machine."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  epilog = "Settings of the config: --config=FILE[:variant] --config.x=..."

  def add(name, has_config=True, **kwargs):
    command = commands.add_parser(
      name, epilog=epilog if has_config else "", allow_abbrev=False, **kwargs
    )
    if has_config:
      command.add_argument("--stage", help="default: the last one")
    command.add_argument("--json", type=pathlib.Path, metavar="FILE")
    command.set_defaults(command=name, run=runs[name], has_config=has_config)
    return command

  step = add("step", help="a config's train step")
  step.add_argument("--steps", type=_positive, default=20)
  step.add_argument("--data", choices=("synthetic", "both"), default="both")
  step.add_argument(
    "--profile", action="store_true", help="also sum up a trace by name"
  )
  step.add_argument(
    "--skip-warm", action="store_true", help="compile once, from nothing"
  )
  step.add_argument(
    "--first-step",
    action="store_true",
    help="also start it anew, to time what comes before a first step",
  )
  one = add("dispatch", False, help="strategies on one MLP")
  one.add_argument("--experts", type=_positive, nargs="+", default=[3, 8])
  one.add_argument(
    "--strategies",
    nargs="+",
    choices=dispatch.STRATEGIES,
    default=dispatch.STRATEGIES,
  )
  one.add_argument("--rank", type=_positive, default=32)
  one.add_argument("--tokens", type=_positive, default=2048)
  one.add_argument("--hidden", type=_positive, default=512)
  one.add_argument("--intermediate", type=_positive, default=1376)
  one.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
  one.add_argument("--rounds", type=_positive, default=7)
  compared = add("compare", help="beside Transformers and PEFT")
  compared.add_argument("--rounds", type=_positive, default=5)
  compared.add_argument(
    "--steps", type=_positive, default=3, help="in each round (default: 3)"
  )
  compared.add_argument(
    "--sequential",
    action="store_true",
    help="one side after the other: for a GPU that does not hold both",
  )
  compared.add_argument(
    "--only", choices=(compare.OURS, compare.PEER), help="one side alone"
  )
  compared.add_argument(
    "--cores", type=_positive, help="for each side (default: all there are)"
  )
  compared.add_argument(
    "--peer-checkpointing",
    choices=("auto", "off", "on"),
    default="auto",
    help="auto: where memory does not suffice without",
  )
  compared.add_argument(
    "--peer-adapters", choices=("float32", "bfloat16"), default="float32"
  )
  grown = add("curves", help="cost against size, by sizes")
  names = [*curves.CURVES, "records"]
  grown.add_argument("--only", nargs="+", choices=names, default=names)
  for name, (sizes, _) in curves.CURVES.items():
    grown.add_argument(
      f"--{name}", type=_positive, nargs="+", default=sizes, metavar="N"
    )
  grown.add_argument(
    "--records",
    type=_positive,
    nargs="+",
    default=curves.RECORDS,
    metavar="N",
    help="of made data sets; 1000000 is possible, too",
  )
  grown.add_argument("--steps", type=_positive, default=5)
  answers = add("decode", help="prefill and decoding")
  answers.add_argument("--batch-size", type=_positive, default=8)
  answers.add_argument("--prompt-tokens", type=_positive, default=128)
  answers.add_argument("--images", type=int, default=1, help="in each prompt")
  answers.add_argument("--new-tokens", type=_positive, default=32)
  answers.add_argument("--rounds", type=_positive, default=5)
  answers.add_argument(
    "--unrolled",
    choices=UNROLLED,
    default="auto",
    help="layers one by one, or scanned (default: as generation chooses)",
  )
  _add_beside(answers)
  data = add("data", help="batches alone, as fast as they come")
  data.add_argument("--batches", type=_positive, default=50)
  data.add_argument(
    "--records", type=_positive, default=200, help="with --beside: in a round"
  )
  data.add_argument("--rounds", type=_positive, default=5)
  _add_beside(data)
  # Not for people: sides of comparisons, and a start that is timed.
  add("worker")
  side = add("data-worker")
  side.add_argument("--records", type=int, required=True)
  side = add("decode-worker")
  for name in ("--batch-size", "--prompt-tokens", "--images", "--new-tokens"):
    side.add_argument(name, type=int, required=True)
  side.add_argument("--unrolled", choices=UNROLLED, default="auto")
  starter = add("starter")
  starter.add_argument("--cache", type=pathlib.Path, required=True)
  opened = add("opening")  # A point of `curves --only records`.
  opened.add_argument("--folder", type=pathlib.Path, required=True)
  opened.add_argument("--make", type=_positive, metavar="RECORDS")
  return parser


def _add_beside(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--beside", choices=(beside.PEER,), help="take turns with it"
  )
  command.add_argument(
    "--only", choices=(beside.OURS, beside.PEER), help="with --beside: one side"
  )
  command.add_argument(
    "--sequential",
    action="store_true",
    help="with --beside: one side after the other",
  )


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
  return value
