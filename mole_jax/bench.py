r"""Timings, printed and written as JSON; nothing here asserts one.

python -m mole_jax.bench step --config=configs/mole3.py --steps 20
python -m mole_jax.bench step --config=configs/mole3.py:7b --data synthetic \
  --config.stages.mole.batch_size=8 --config.stages.mole.max_length=2048 \
  --config.stages.mole.max_images=1 --json step.json
python -m mole_jax.bench compare --config=configs/lora.py --rounds 5

`step` times a config's train step: on random weights and batches, which any
config has, and on its data where they are there. `compare` takes turns with a
step of Transformers and PEFT on the same shapes (needs `.[torch]`). MFU is by
the formula in training/flops.py. Exit codes: 0 done; 1 it did not run (out of
memory, say); 2 wrong usage.
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
from mole_jax.timing import (
  compare,
  machine,
  profile,
  protocol,
  real,
  steps,
  synthetic,
)
from mole_jax.training import command_line, loop, metrics


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  args, rest = _parser().parse_known_args(argv)
  console = rich.console.Console(soft_wrap=True, highlight=False)
  try:
    config = command_line.read_config(["bench", *rest])
    args.config_arguments = rest
    found = args.run(args, config, console)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (jax.errors.JaxRuntimeError, metrics.NonFiniteLossError) as error:
    print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
    return 1
  except protocol.SideError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  if args.json and found is not None:
    args.json.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"Written to {args.json}", markup=False)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.bench", description="Timings of this machine."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  epilog = "Settings of the config: --config=FILE[:variant] --config.x=..."

  def add(name, run, **kwargs):
    command = commands.add_parser(
      name, epilog=epilog, allow_abbrev=False, **kwargs
    )
    command.add_argument("--stage", help="default: the last one")
    command.add_argument("--json", type=pathlib.Path, metavar="FILE")
    command.set_defaults(run=run)
    return command

  step = add("step", _step, help="a config's train step")
  step.add_argument("--steps", type=_positive, default=20)
  step.add_argument("--data", choices=("synthetic", "both"), default="both")
  step.add_argument(
    "--profile", action="store_true", help="also sum up a trace by name"
  )
  step.add_argument(
    "--skip-warm", action="store_true", help="compile once, from nothing"
  )
  compared = add("compare", _compare, help="beside Transformers and PEFT")
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
  add("worker", _worker)  # One of compare's sides; not for people.
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
  kinds = steps.COMPILATIONS[: 1 if args.skip_warm else 2]
  compiled = steps.compile_step(stage, kinds)
  found["compile_seconds"] = compiled.seconds
  found["predicted_memory"] = compiled.memory
  console.print(
    "compiled in "
    + ", ".join(f"{s:.1f} s {kind}" for kind, s in compiled.seconds.items())
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
  if args.profile:
    found["profile"] = profile.profile(run, compiled.step)
    _print_profile(found["profile"], console)
  if args.data == "both":
    found["real"] = real.time_steps(
      config, stage, compiled.step, run.weights(), args.steps
    )
    if "not_there" in found["real"]:
      console.print(f"real data: not there: {found['real']['not_there']}")
    else:
      _print_timing("real data", found["real"], console)
  return found


def _compare(
  args: argparse.Namespace,
  config: dict[str, Any],
  console: rich.console.Console,
) -> dict[str, Any]:
  """Asks for no device: the sides need them."""
  if args.cores:
    machine.use_cores(args.cores)
  name = _stage_name(config, args.stage)
  names = [args.only] if args.only else [compare.OURS, compare.PEER]
  peer_arguments = [
    f"--checkpointing={args.peer_checkpointing}",
    f"--adapters={args.peer_adapters}",
  ]

  def on_ready(side, about):
    console.print(f"{side} is ready: {about}", markup=False)

  with compare.sides(
    config, name, names, args.config_arguments, peer_arguments
  ) as sides:
    found = compare.take_turns(
      sides,
      args.rounds,
      args.steps,
      is_sequential=args.sequential,
      on_ready=on_ready,
    )
  result = {
    **_identity(config),
    "cpu": machine.cpu_name(),
    "num_cores": machine.num_cores(),
    "stage": name,
    "is_sequential": args.sequential,
    **compare.summed_up(config, name, found),
  }
  for side, values in result["sides"].items():
    seconds = values["step_seconds"]
    console.print(
      f"[bold]{side}[/]: {seconds['median']:.4f} s a step (quartiles "
      f"{seconds['quartile_1']:.4f} to {seconds['quartile_3']:.4f}), "
      f"{values['tokens_per_second']:,.0f} tokens/s, "
      f"{values['tflops_per_second']:,.3g} TFLOP/s, peak memory of the "
      f"{values['memory']['of']} {values['memory']['peak_gib']:.2f} GiB"
    )
  if "peer_over_ours" in result:
    ratio = result["peer_over_ours"]
    console.print(
      f"[bold]{compare.PEER} / {compare.OURS}[/]: {ratio['median']:.3f} "
      f"(quartiles {ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f}, "
      f"{ratio['count']} rounds); above 1 {compare.OURS} is faster"
    )
  return result


def _worker(
  args: argparse.Namespace, config: dict[str, Any], _: rich.console.Console
) -> None:
  stage = _make_stage(config, args.stage)
  compiled = steps.compile_step(stage)
  batches = steps.synthetic_batches(stage)
  weights = synthetic.parameters(stage)
  run = steps.Run(stage, compiled.step, batches, weights)
  del weights
  run.steps(steps.NUM_WARMUP)
  about = {
    "program": "mole_jax",
    "compile_seconds": compiled.seconds,
    "predicted_memory": compiled.memory,
    "device_kind": jax.devices()[0].device_kind,
    "remat": stage.model_config.remat,
    "versions": machine.versions(),
  }

  def timed(count):
    begun = len(run.losses)
    seconds = run.steps(count)["seconds"]
    return {"seconds": seconds, "losses": run.losses[begun:]}

  last = lambda: {"memory": machine.peak_memory(jax.local_devices())}
  protocol.serve(about, timed, last)


def _make_stage(config: dict[str, Any], name: str | None) -> loop.Stage:
  name = _stage_name(config, name)
  return loop.Stage(config, name, mesh_lib.make_mesh(config["mesh"]))


def _print_profile(
  found: dict[str, Any], console: rich.console.Console
) -> None:
  total = found["busy_seconds"]
  console.print(f"[bold]profile[/]: busy for {total:.4f} s a step")
  for place, seconds in list(found["by_place"].items())[:25]:
    console.print(
      f"  {seconds:.4f} s {seconds / total:6.1%}  {place}", markup=False
    )


def _stage_name(config: dict[str, Any], name: str | None) -> str:
  name = name or config["stage_names"][-1]
  if name not in config["stages"]:
    raise ValueError(
      f"--stage={name} is none of the config's: {list(config['stages'])}."
    )
  return name


def _identity(config: dict[str, Any]) -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {
    "config": config["name"],
    "variant": config["variant"],
    "time": now.isoformat(timespec="seconds"),
    "commit": machine.commit(),
  }


def _about(config: dict[str, Any], stage: loop.Stage) -> dict[str, Any]:
  return {
    **_identity(config),
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


if __name__ == "__main__":
  sys.exit(main())
