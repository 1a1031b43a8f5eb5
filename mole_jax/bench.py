r"""Timings, printed and written as JSON; nothing here asserts one.

python -m mole_jax.bench step --config=configs/mole3.py --steps 20
python -m mole_jax.bench step --config=configs/mole3.py:7b --data synthetic \
  --config.stages.mole.batch_size=8 --config.stages.mole.max_length=2048 \
  --config.stages.mole.max_images=1 --json step.json

`step` times a config's train step: on random weights and batches, which any
config has, and on its data where they are there. MFU is by the formula in
training/flops.py. Exit codes: 0 done; 1 it did not run (out of memory, say); 2
wrong usage.
"""

import argparse
import datetime
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console

from mole_jax.parallel import mesh as mesh_lib
from mole_jax.timing import machine, real, steps, synthetic
from mole_jax.training import command_line, loop, metrics


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args, rest = _parser().parse_known_args(argv)
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    config = command_line.read_config(["bench", *rest])
    found = args.run(args, config, console)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (jax.errors.JaxRuntimeError, metrics.NonFiniteLossError) as error:
    print(f"error: {_first_line(error)}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  if args.json:
    args.json.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"Written to {args.json}", markup=False)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.bench", description="Timings of this machine."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  step = commands.add_parser(
    "step",
    help="a config's train step",
    epilog="Settings of the config: --config=FILE[:variant] --config.x=...",
    allow_abbrev=False,
  )
  step.add_argument("--stage", help="default: the last one")
  step.add_argument("--steps", type=_positive, default=20)
  step.add_argument("--data", choices=("synthetic", "both"), default="both")
  step.add_argument("--json", type=pathlib.Path, metavar="FILE")
  step.set_defaults(run=_step)
  return parser


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
  return value


def _step(
  args: argparse.Namespace,
  config: dict[str, Any],
  console: rich.console.Console,
) -> dict[str, Any]:
  stage = _make_stage(config, args.stage)
  found = _about(config, stage)
  _print_about(found, console)
  compiled = steps.compile_step(stage)
  found["compile_seconds"] = compiled.seconds
  found["predicted_memory"] = compiled.memory
  console.print(
    "compiled in {cold:.1f} s, {warm:.1f} s from the cache".format(
      **compiled.seconds
    )
  )
  if compiled.memory:
    console.print(
      "the compiler predicts {total_gib:.2f} GiB on a device: "
      "{arguments_gib:.2f} of arguments, {temporaries_gib:.2f} of "
      "temporaries".format(**compiled.memory)
    )
  weights = synthetic.parameters(stage)
  jax.block_until_ready(weights)
  found["memory_of_weights"] = machine.peak_memory(jax.local_devices())
  run = steps.Run(stage, compiled.step, steps.synthetic_batches(stage), weights)
  del weights  # The step donates what it trains.
  run.steps(steps.NUM_WARMUP)
  found["synthetic"] = steps.report(stage, run.steps(args.steps))
  found["synthetic"]["losses"] = run.losses
  found["memory"] = machine.peak_memory(jax.local_devices())
  _print_timing("synthetic data", found["synthetic"], console)
  console.print(
    "peak memory of the {of}: {peak_gib} GiB".format(**found["memory"])
  )
  if args.data == "both":
    found["real"] = real.time_steps(
      config, stage, compiled.step, run.weights(), args.steps
    )
    if "not_there" in found["real"]:
      console.print(f"real data: not there: {found['real']['not_there']}")
    else:
      _print_timing("real data", found["real"], console)
  return found


def _make_stage(config: dict[str, Any], name: str | None) -> loop.Stage:
  name = name or config["stage_names"][-1]
  if name not in config["stages"]:
    raise ValueError(
      f"--stage={name} is none of the config's: {list(config['stages'])}."
    )
  return loop.Stage(config, name, mesh_lib.make_mesh(config["mesh"]))


def _about(config: dict[str, Any], stage: loop.Stage) -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {
    "config": config["name"],
    "variant": config["variant"],
    "time": now.isoformat(timespec="seconds"),
    "commit": machine.commit(),
    "machine": machine.describe(),
    "versions": machine.versions(),
    "step": steps.describe(stage),
  }


def _print_about(found: dict[str, Any], console: rich.console.Console) -> None:
  about, where = found["step"], found["machine"]
  console.print(
    f"[bold]{found['config']}:{found['variant']}[/] stage {about['stage']} on "
    f"{where['num_devices']} {where['device_kind']} ({where['cpu']}, "
    f"{where['num_cores']} cores), jax {found['versions']['jax']}"
  )
  console.print(
    f"{about['batch_size']} rows of {about['max_length']} tokens, "
    f"{about['max_images']} images a row, {about['dtype']}, remat "
    f"{about['remat']}, {about['num_experts']} experts of rank "
    f"{about['rank']}; {about['flops']['total'] / 1e12:.3g} TFLOP a step"
  )


def _print_timing(
  title: str, timing: dict[str, Any], console: rich.console.Console
) -> None:
  seconds, mfu = timing["step_seconds"], timing["mfu"]
  console.print(
    f"[bold]{title}[/]: {seconds['median']:.4f} s a step (quartiles "
    f"{seconds['quartile_1']:.4f} to {seconds['quartile_3']:.4f}, "
    f"{seconds['count']} steps)"
  )
  console.print(
    f"  {timing['tokens_per_second']:,.0f} tokens/s, "
    f"{timing['text_tokens_per_second']:,.0f} without padding, "
    f"{timing['samples_per_second']:,.2f} samples/s"
  )
  console.print(
    f"  {timing['tflops_per_second_per_device']:,.3g} TFLOP/s a device, MFU "
    f"{'unknown' if mfu is None else f'{mfu:.1%}'}; waiting for data "
    f"{timing['stall_share']:.2%} of the time"
  )


def _first_line(error: Exception) -> str:
  return str(error).strip().split("\n", 1)[0]


if __name__ == "__main__":
  sys.exit(main())
