r"""Accuracy of a trained model by domain, beside answers that see nothing.

python -m mole_jax.evaluate --ckpt runs/mole3
python -m mole_jax.evaluate --ckpt runs/mole3/base --split validation

A run's own evaluation goes to RUN/evaluation, which the report reads; that of
another stage, step, split or number of questions to a folder beside it.
Exit codes: 0 done; 2 wrong usage, or nothing to evaluate.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from mole_jax.inference import pretrained, scoring


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args = _parser().parse_args(argv)
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    if args.max_questions is not None and args.max_questions < 1:
      raise ValueError(
        f"--max-questions={args.max_questions}; wanted at least 1."
      )
    model = pretrained.load(args.ckpt)
    directory = args.out or _directory(args, model)
    metrics = scoring.evaluate_run(
      model,
      model.config,
      directory,
      console,
      split=args.split,
      max_questions=args.max_questions,
    )
  except (OSError, ValueError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  console.print(accuracy_table(metrics))
  console.print(f"Written to {directory}")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.evaluate",
    description="Accuracy of a trained model by domain.",
  )
  parser.add_argument(
    "--ckpt",
    required=True,
    metavar="RUN[/STAGE[/checkpoints/STEP]]",
    type=pathlib.Path,
    help="what to evaluate; of a run, the last stage's newest step",
  )
  parser.add_argument(
    "--out", metavar="DIR", type=pathlib.Path, help="where to write"
  )
  parser.add_argument("--split", help="of each data set (default: the run's)")
  parser.add_argument(
    "--max-questions",
    metavar="N",
    type=int,
    help="at most N questions a domain, spread evenly over it",
  )
  return parser


def _directory(
  args: argparse.Namespace, model: pretrained.Model
) -> pathlib.Path:
  """RUN/evaluation for what the report shows, else a folder beside it."""
  path = args.ckpt.absolute()
  run = next(p for p in (path, *path.parents) if (p / "config.json").exists())
  split = args.split or model.config["evaluation"]["split"]
  is_own = split == model.config["evaluation"]["split"]
  if run == path and is_own and args.max_questions is None:
    return run / "evaluation"
  count = "" if args.max_questions is None else f"-{args.max_questions}"
  return run / f"evaluation-{model.stage}-{model.step}-{split}{count}"


def accuracy_table(metrics: Mapping[str, Any]) -> rich.table.Table:
  """Per cent by domain; `metrics` is what metrics.json holds."""
  table = rich.table.Table(
    title=f"{metrics['name']}, seed {metrics['seed']}, stage "
    f"{metrics['stage']}, step {metrics['step']}: accuracy in per cent"
  )
  table.add_column("domain")
  for name in ("questions", "model", "majority", "blank image"):
    table.add_column(name, justify="right")
  for domain, entry in metrics["domains"].items():
    table.add_row(domain, f"{entry['num_questions']:,}", *_percents(entry))
  table.add_section()
  count = sum(e["num_questions"] for e in metrics["domains"].values())
  table.add_row("average", f"{count:,}", *_percents(metrics["average"]))
  return table


def _percents(entry: Mapping[str, Any]) -> list[str]:
  keys = ("accuracy", "majority", "blank")
  return [f"{100 * entry[key]:.1f}" for key in keys]


if __name__ == "__main__":
  sys.exit(main())
