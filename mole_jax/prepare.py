r"""Data: checked before it is trained on, and built into a data set.

python -m mole_jax.prepare validate --json train.json --images pictures \
  --tokenizer weights/llava --report problems.html
python -m mole_jax.prepare build --json train.json --images pictures \
  --name mine --out data
python -m mole_jax.prepare info data/mine
python -m mole_jax.prepare mixture --config=configs/mole3.py

Exit codes: 0 no problem; 1 problems were found (`build`: it stopped); 2 wrong
usage.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

import rich.console

from mole_jax.data import composition, progress, templates, workers
from mole_jax.data.builders.llava_json import (
  validate,
  validate_page,
  validate_terminal,
)
from mole_jax.data.builders.prepared import (
  build,
  info,
  spool,
  terminal,
)
from mole_jax.data.recipes.table import RECIPES, find_recipe
from mole_jax.data.tokenizer import Tokenizer, read_json


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args, rest = _parser().parse_known_args(argv)
  if args.command == "mixture":
    args.config = rest  # As mole_jax.main takes it, --config.seed=1 as well.
  elif rest:
    _parser().error(f"unrecognized arguments: {' '.join(rest)}")
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    return args.run(args, console)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130


def _validate(args: argparse.Namespace, console: rich.console.Console) -> int:
  layout = find_recipe(args.recipe).layout
  page = args.report and validate_page.Page(args.report)
  measure, how = None, "Lengths are in characters; --tokenizer gives tokens."
  if args.tokenizer:
    tokenizer, template, name = _read_text(args.tokenizer)
    measure = validate.measure_tokens(tokenizer, template, args.image_tokens)
    how = (
      f"Lengths are in tokens of {args.tokenizer}, with {name}, an image "
      f"taking {args.image_tokens}, nothing cut."
    )
  problems = validate_terminal.Problems(console)

  def on_problem(problem):
    problems.add(problem)
    if page:
      page.add(problem)

  with progress.Progress(console) as bar:
    found = validate.validate(
      args.json,
      args.images,
      measure=measure,
      num_decoded=args.decode,
      layout=layout,
      on_bytes=bar.bytes_of(args.json),
      on_problem=on_problem,
    )
  validate_terminal.summary(found, problems.num_hidden, console)
  console.print(how, markup=False)
  if page:
    page.write(f"Validation of {args.json}", found, how)
    console.print(f"Written to {args.report}", markup=False)
  elif problems.num_hidden:
    console.print("All of them: --report problems.html")
  return 1 if found.has_problems else 0


def _build(args: argparse.Namespace, console: rich.console.Console) -> int:
  recipe = find_recipe(args.recipe)
  with progress.Progress(console) as bar:
    try:
      about = build.build(
        args.json,
        args.images,
        name=args.name,
        out=args.out,
        domain=args.domain or recipe.domain,
        num_workers=args.workers or workers.num_cores(),
        max_image_side=args.max_image_side,
        num_shards=args.shards,
        max_skipped=args.max_skipped,
        seed=args.seed,
        layout=recipe.layout,
        report=bar.report,
      )
    except (OSError, spool.BadInput, workers.WorkerError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
  terminal.summary(about, args.out / args.name, console)
  return 0


def _info(args: argparse.Namespace, console: rich.console.Console) -> int:
  description = info.describe(args.path, use_hashes=args.hashes)
  for table in info.tables(description):
    console.print(table)
  for problem in description.problems:
    print(f"error: {problem}", file=sys.stderr)
  if description.problems:
    return 1
  how = "hashes" if args.hashes else "sizes and numbers of records"
  console.print(f"All files are whole, by their {how}.")
  return 0


def _mixture(args: argparse.Namespace, console: rich.console.Console) -> int:
  # They import jax, which the other commands do without.
  from mole_jax.training import command_line, feed, state

  config = command_line.read_config(["prepare", *args.config])
  text = feed.read_tokenizer(config)
  for name in config["stage_names"]:
    if name == "base" and config["base"]["path"]:
      continue  # It stands.
    image_tokens = state.model_config(config, name).num_image_tokens
    with progress.Progress(console) as bar:
      loader = feed.make_loader(
        config, name, text, image_tokens, bar.count_tokens
      )
    lines = config["stages"][name]["mixture"]
    found = composition.compose(
      loader,
      {key: line["weight"] for key, line in lines.items()},
      config["data"]["domains"],
    )
    for table in composition.tables(name, found):
      console.print(table)
    console.print(composition.summary(found), markup=False)
    for key, account in feed.accounting(loader, lines).items():
      if account["skipped"]:
        console.print(f"{key}: skipped {account['skipped']}", markup=False)
  return 0


def _read_text(
  path: pathlib.Path,
) -> tuple[Tokenizer, templates.Template, str]:
  """A tokenizer, its own template or else Vicuna's, and what that is called."""
  tokenizer = Tokenizer(path / "tokenizer.json" if path.is_dir() else path)
  folder = tokenizer.path.parent
  files = ("tokenizer_config.json", "chat_template.json")
  if (folder / "chat_template.jinja").is_file() or any(
    read_json(folder / name).get("chat_template") for name in files
  ):
    template = templates.read_template("tokenizer", tokenizer)
    return tokenizer, template, "its own template"
  return tokenizer, templates.VICUNA, "Vicuna's template (it has none)"


def _images_to_decode(text: str) -> int | None:
  if text in ("all", "none"):
    return None if text == "all" else 0
  if not re.fullmatch("[0-9]{1,15}", text):
    raise argparse.ArgumentTypeError(
      f"{text!r}: wanted 'all', 'none' or a number of images."
    )
  return int(text)


def _positive(text: str) -> int:
  if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r}: wanted a number from 1.")
  return int(text)


def _share(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text!r}: wanted a share from 0 to 1.")
  return value


def _add_recipe(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--recipe",
    metavar="NAME",
    default="llava",
    help="published layout of --json (default: llava); one of: "
    + ", ".join(RECIPES),
  )


def _add_build(commands: argparse._SubParsersAction) -> None:
  make = commands.add_parser(
    "build", help="write a data set; the same command goes on after a kill"
  )
  make.set_defaults(run=_build)
  for flag, metavar, is_required, help in (
    ("--json", "FILE", True, "as of validate"),
    ("--images", "DIR", False, "the folder that image paths are relative to"),
    ("--out", "DIR", True, "where data sets are; writes DIR/NAME/1.0.0"),
  ):
    make.add_argument(
      flag, metavar=metavar, type=pathlib.Path, required=is_required, help=help
    )
  _add_recipe(make)
  make.add_argument("--name", required=True, help="of the data set")
  make.add_argument(
    "--domain",
    help="of records that name none (default: the recipe's, else --name)",
  )
  for flag, default, help in (
    ("--workers", None, "processes (default: one a core)"),
    ("--max-image-side", 1024, "pixels; larger images are stored smaller"),
    ("--shards", None, "files to write (default: of 256 MB)"),
  ):
    make.add_argument(
      flag, metavar="N", type=_positive, default=default, help=help
    )
  make.add_argument(
    "--max-skipped",
    metavar="SHARE",
    type=_share,
    default=0.001,
    help="records that may be bad (default: 0.001)",
  )
  make.add_argument(
    "--seed", type=int, default=0, help="of the order of the records"
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.prepare",
    description="Data, checked and built before it is trained on.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  check = commands.add_parser(
    "validate", help="read everything, write nothing, name every problem"
  )
  check.set_defaults(run=_validate)
  check.add_argument(
    "--json",
    metavar="FILE",
    type=pathlib.Path,
    required=True,
    help="LLaVA or ShareGPT JSON, JSON lines (both perhaps gzipped), parquet",
  )
  check.add_argument(
    "--images",
    metavar="DIR",
    type=pathlib.Path,
    help="the folder that image paths are relative to",
  )
  _add_recipe(check)
  check.add_argument(
    "--tokenizer",
    metavar="DIR",
    type=pathlib.Path,
    help="a folder with tokenizer.json: lengths in tokens",
  )
  check.add_argument(
    "--image-tokens",
    metavar="N",
    type=_positive,
    default=576,
    help="tokens an image takes (default: 576, LLaVA-1.5)",
  )
  check.add_argument(
    "--report",
    metavar="OUT.html",
    type=pathlib.Path,
    help="a page with all problems",
  )
  check.add_argument(
    "--decode",
    metavar="all|none|N",
    type=_images_to_decode,
    default="all",
    help="images to decode, each file once: N the first N (default: all)",
  )
  _add_build(commands)
  show = commands.add_parser("info", help="what a built data set holds")
  show.set_defaults(run=_info)
  show.add_argument("path", metavar="DIR", type=pathlib.Path)
  show.add_argument(
    "--hashes", action="store_true", help="read every byte of it"
  )
  mix = commands.add_parser(
    "mixture",
    usage="python -m mole_jax.prepare mixture --config=FILE[:variant] [...]",
    help="what the mixture of a config really is",
  )
  mix.set_defaults(run=_mixture)
  return parser


if __name__ == "__main__":
  sys.exit(main())
